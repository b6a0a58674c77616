"""Token rewards in a notebook, ``HTML(token_rewards_html(records))``: no script and no style sheet, so that static
viewers show them as well.
"""

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

_PLUS, _MINUS = "82, 150, 230", "240, 150, 60"  # blue pays, orange costs, as on the page of `jaxrm.score`
_QUIET = "opacity: 0.7; font-size: 0.9em"
# Controls, zero-width spaces and direction overrides are shown as what they are.
_ODD = re.compile(r"[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_LINE_ENDS = {"\n": "↵", "\t": "⇥"}


def token_rewards_html(records: Iterable[Mapping[str, Any]]) -> str:
    """Return scored records as HTML: every token of every response on the colour of its reward.

    The colour scale is one for all records and ends at the largest reward among them. A token that a seq2seq reward
    model would not have written is underlined as well, and what it would have written stands below. All text is
    escaped; whatever it says, it adds no element.

    Args:
      records: as `jaxrm.score` writes them to JSONL, one object a line.
    """
    held = list(records)
    sizes = [abs(reward) for record in held for response in record["responses"] for reward in response["rewards"]]
    limit = max(sizes, default=0.0) or 1.0
    shown = "".join(_record(record, limit) for record in held)
    return f'{_legend(held, limit)}<div style="max-width: 70em">{shown}</div>'


def _legend(records: list[Mapping[str, Any]], limit: float) -> str:
    ends = [f'<span style="{_background(end, limit)}">{_number(end)}</span>' for end in (-limit, limit)]
    kinds = ", ".join(dict.fromkeys(str(record["kind"]) for record in records))
    has_tags = any(response["tags"] is not None for record in records for response in record["responses"])
    missed = "; <u>underlined</u>: the reward model would have written another token" if has_tags else ""
    kind = f" ({html.escape(kinds)})" if kinds else ""
    return f'<p style="{_QUIET}">Reward of a token{kind}: {ends[0]} to {ends[1]}{missed}.</p>'


def _record(record: Mapping[str, Any], limit: float) -> str:
    turns = "".join(
        f'<div><span style="{_QUIET}">{_text(turn["role"])}:</span> {_text(turn["content"])}</div>'
        for turn in record["prompt"]
    )
    responses = "".join(_response(response, limit) for response in record["responses"])
    return f'<div style="margin: 0 0 1.8em; overflow-wrap: anywhere">{turns}{responses}</div>'


def _response(response: Mapping[str, Any], limit: float) -> str:
    tags = response["tags"] or [True] * len(response["tokens"])
    tokens = "".join(
        _token(token, reward, tag, limit)
        for token, reward, tag in zip(response["tokens"], response["rewards"], tags, strict=True)
    )
    label = f"<b>{_text(response['side'])}</b>, sum of rewards {_number(response['sum'])}"
    correction = response["correction"]
    written = ""
    if correction is not None:
        is_same = correction["token_ids"] == response["token_ids"]
        said = "the same" if is_same else _text(correction["text"])
        written = f'<div><span style="{_QUIET}">would write:</span> {said}</div>'
    return (
        f'<div style="margin-top: 0.7em">{label}'
        f'<div style="line-height: 1.9; white-space: pre-wrap" dir="auto">{tokens}</div>{written}</div>'
    )


def _token(token: str, reward: float, tag: bool, limit: float) -> str:
    name = "span" if tag else "u"
    style = f"{_background(reward, limit)}; padding: 0.15em 0; border-radius: 2px"
    return f'<{name} style="{style}" title="{_number(reward)}">{_text(token, line_ends=True)}</{name}>'


def _background(reward: float, limit: float) -> str:
    strength = min(1.0, abs(reward) / limit) ** 0.8
    return f"background: rgba({_PLUS if reward > 0 else _MINUS}, {0.75 * strength:.2f})"


def _text(text: str, *, line_ends: bool = False) -> str:
    def mark(found: re.Match[str]) -> str:
        character = found[0]
        if character in _LINE_ENDS:
            return _LINE_ENDS[character] + character if line_ends else character
        return f"<code>U+{ord(character):04X}</code>"

    return _ODD.sub(mark, html.escape(text))


def _number(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return text if any(digit in text for digit in "123456789") else "0"
