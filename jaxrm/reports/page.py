"""One self-contained HTML file that shows what a reward model thinks of every token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.reports.document import fill
from jaxrm.reports.document import part as _part


def write_page(
    path: str | Path, records: Iterable[Mapping[str, Any]], *, title: str, about: Sequence[tuple[str, str]]
) -> None:
    """Writes the page of scored records, atomically.

    Each response stands with its tokens coloured by their reward, the mark where it diverges and the reward model's
    correction; the two of a pair stand next to each other, wrong rankings first. The file needs no network and no
    other file. Records reach the browser as JSON and become text nodes there, and the page's own
    Content-Security-Policy runs no other script and loads nothing, whatever a record says. It holds every record
    whole; some thousands of them are fine, and more are better read from the JSONL.

    Args:
      path: the HTML file; missing folders are made, and a file that is there is replaced.
      records: scored records as `jaxrm.score` writes them to JSONL. A pair is a record with a "chosen" and a
        "rejected" response; "ranked_right" None on a pair is a tie. "tags", "diverges_at" and "correction" may be
        None, as they are for a scalar reward model.
      title: heading of the page.
      about: ``(name, value)`` lines below the heading, e.g. the checkpoint and the reward's scale.

    Raises:
      ValueError: a reward is NaN or infinite, which JSON cannot hold.
    """
    content = {"title": title, "about": [list(line) for line in about], "records": [_record(each) for each in records]}
    script = _part("page_tokens.js") + _part("page_records.js") + _part("page_filters.js")
    page = fill(_part("page.html"), title=title, style=_part("page.css"), script=script, content=content)
    atomic.write_text(Path(path), page)


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "responses": [_response(response) for response in record["responses"]]}


def _response(response: Mapping[str, Any]) -> dict[str, Any]:
    """`response` with the place of its end token, and its correction with the way there from it."""
    assert len(response["tokens"]) == len(response["token_ids"]) == len(response["rewards"]), response["text"]
    body, correction = _body(response), response["correction"]
    end = body if body < len(response["tokens"]) else None
    shown = {**response, "end": end, "rewards": [float(f"{reward:.4g}") for reward in response["rewards"]]}
    if correction is not None:
        kept = _body(correction)
        ids = (response["token_ids"][:body], correction["token_ids"][:kept])
        shown["correction"] = {**correction, "diff": _token_diff(*ids)}
    return shown


def _body(written: Mapping[str, Any]) -> int:
    """Number of tokens before the end token, which the text leaves out."""
    tokens = written["tokens"]
    has_end = written["ended"] and tokens and not (tokens[-1] and written["text"].endswith(tokens[-1]))
    return len(tokens) - bool(has_end)


def _token_diff(source: Sequence[int], target: Sequence[int]) -> list[tuple[str, int]]:
    """The fewest tokens to take out (-) and put in (+) around those that stay (=), as runs of ``(sign, count)``."""
    from rapidfuzz.distance import Indel

    runs: list[tuple[str, int]] = []
    out = put = 0
    for step in Indel.opcodes([int(token) for token in source], [int(token) for token in target]):
        if step.tag != "equal":
            out += step.src_end - step.src_start
            put += step.dest_end - step.dest_start
            continue
        runs += [("-", out), ("+", put), ("=", step.src_end - step.src_start)]
        out = put = 0
    runs += [("-", out), ("+", put)]
    return [run for run in runs if run[1]]
