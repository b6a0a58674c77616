"""The page of `jaxrm.score`: one self-contained HTML file with the reward of every token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.reports.document import fill_template, read_template, rounded


def write_page(
    path: str | Path, records: Iterable[Mapping[str, Any]], *, title: str, about: Sequence[tuple[str, str]]
) -> None:
    """Write the page of scored records, atomically.

    Each response has its tokens colored by their reward, a mark where it diverges, and the reward model's correction.
    The two responses of a pair stand side by side, wrong rankings first. The file needs no network and no other file.
    Records reach the browser as JSON and become text nodes there. The page's Content-Security-Policy runs no other
    script and loads nothing, whatever a record says. The page holds every record whole: some thousands are fine, and
    more are better read from the JSONL.

    Args:
      path: the HTML file; missing folders are made, and an existing file is replaced.
      records: scored records as `jaxrm.score` writes them to JSONL. A pair is a record with a "chosen" and a
        "rejected" response; "ranked_right" None on a pair is a tie. "tags", "diverges_at" and "correction" may be
        None, as they are for a scalar reward model. A response with "sources" has a row of tokens for each source of a
        sum too, with its own rewards before its weight.
      title: heading of the page.
      about: ``(name, value)`` lines below the heading, e.g. the checkpoint and the reward's scale.

    Raises:
      ValueError: a reward is NaN or infinite, which JSON cannot hold.
    """
    content = {"title": title, "about": [list(line) for line in about], "records": [_record(each) for each in records]}
    script = read_template("page_tokens.js") + read_template("page_records.js") + read_template("page_filters.js")
    page = fill_template(
        read_template("page.html"), title=title, style=read_template("page.css"), script=script, content=content
    )
    atomic.write_text(Path(path), page)


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "responses": [_response(response) for response in record["responses"]]}


def _response(response: Mapping[str, Any]) -> dict[str, Any]:
    """`response` with the index of its end token, and its correction with the difference from the response."""
    assert len(response["tokens"]) == len(response["token_ids"]) == len(response["rewards"]), response["text"]
    length, correction = _text_length(response), response["correction"]
    end = length if length < len(response["tokens"]) else None
    shown = {**response, "end": end, "rewards": [rounded(reward) for reward in response["rewards"]]}
    if sources := response.get("sources"):
        shown["sources"] = {
            name: {**source, "rewards": [rounded(reward) for reward in source["rewards"]]}
            for name, source in sources.items()
        }
    if correction is not None:
        ids = (response["token_ids"][:length], correction["token_ids"][: _text_length(correction)])
        shown["correction"] = {**correction, "diff": _token_diff(*ids)}
    return shown


def _text_length(response: Mapping[str, Any]) -> int:
    """Number of tokens before the end token, which the text leaves out."""
    tokens = response["tokens"]
    has_end = response["ended"] and tokens and not (tokens[-1] and response["text"].endswith(tokens[-1]))
    return len(tokens) - bool(has_end)


def _token_diff(source: Sequence[int], target: Sequence[int]) -> list[tuple[str, int]]:
    """The fewest tokens to delete (-) and insert (+) around those that stay (=), as runs of ``(sign, count)``."""
    from rapidfuzz.distance import Indel

    runs: list[tuple[str, int]] = []
    deleted = inserted = 0
    for step in Indel.opcodes([int(token) for token in source], [int(token) for token in target]):
        if step.tag != "equal":
            deleted += step.src_end - step.src_start
            inserted += step.dest_end - step.dest_start
            continue
        runs += [("-", deleted), ("+", inserted), ("=", step.src_end - step.src_start)]
        deleted = inserted = 0
    runs += [("-", deleted), ("+", inserted)]
    return [run for run in runs if run[1]]
