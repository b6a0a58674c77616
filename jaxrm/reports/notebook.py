"""Token rewards in a notebook, ``HTML(token_rewards_html(records))``.

The HTML has no script and no style sheet, so that static viewers show it as well.
"""

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

_BLUE, _ORANGE = "82, 150, 230", "240, 150, 60"  # positive and negative rewards, as on the page of `jaxrm.score`
_QUIET = "opacity: 0.7; font-size: 0.9em"
# Controls, zero-width spaces and direction overrides are shown by their code points.
_INVISIBLE = re.compile(r"[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_LINE_ENDS = {"\n": "↵", "\t": "⇥"}


def token_rewards_html(records: Iterable[Mapping[str, Any]]) -> str:
    """Return scored records as HTML: every token of every response on the color of its reward.

    All records share one color scale, which ends at the largest reward. Each source of a sum has a scale of its own, so
    that one of large rewards does not hide the others. A token that a seq2seq reward model would not have written is
    underlined, and its correction stands below. All text is escaped.

    Args:
      records: as `jaxrm.score` writes them to JSONL, one object a line.
    """
    rows = list(records)
    responses = [response for record in rows for response in record["responses"]]
    limit = _limit(response["rewards"] for response in responses)
    names = dict.fromkeys(name for response in responses for name in response.get("sources", {}))
    limits = {
        name: _limit(
            response["sources"][name]["rewards"] for response in responses if name in response.get("sources", {})
        )
        for name in names
    }
    body = "".join(_record(record, limit, limits) for record in rows)
    return f'{_legend(rows, limit)}<div style="max-width: 70em">{body}</div>'


def _limit(rewards: Iterable[Iterable[float]]) -> float:
    """The largest reward of all responses, where a color scale ends."""
    return max((abs(reward) for each in rewards for reward in each), default=0.0) or 1.0


def _legend(records: list[Mapping[str, Any]], limit: float) -> str:
    ends = [f'<span style="{_background(end, limit)}">{_number(end)}</span>' for end in (-limit, limit)]
    kinds = ", ".join(dict.fromkeys(str(record["kind"]) for record in records))
    has_tags = any(response["tags"] is not None for record in records for response in record["responses"])
    underlined = "; <u>underlined</u>: the reward model would have written another token" if has_tags else ""
    kind = f" ({html.escape(kinds)})" if kinds else ""
    return f'<p style="{_QUIET}">Reward of a token{kind}: {ends[0]} to {ends[1]}{underlined}.</p>'


def _record(record: Mapping[str, Any], limit: float, limits: Mapping[str, float]) -> str:
    turns = "".join(
        f'<div><span style="{_QUIET}">{_text(turn["role"])}:</span> {_text(turn["content"])}</div>'
        for turn in record["prompt"]
    )
    responses = "".join(_response(response, limit, limits) for response in record["responses"])
    return f'<div style="margin: 0 0 1.8em; overflow-wrap: anywhere">{turns}{responses}</div>'


def _response(response: Mapping[str, Any], limit: float, limits: Mapping[str, float]) -> str:
    tags = response["tags"] or [True] * len(response["tokens"])
    tokens = "".join(
        _token(token, reward, tag, limit)
        for token, reward, tag in zip(response["tokens"], response["rewards"], tags, strict=True)
    )
    sources = "".join(
        _source(response, name, source, limits[name]) for name, source in response.get("sources", {}).items()
    )
    label = f"<b>{_text(response['side'])}</b>, sum of rewards {_number(response['sum'])}"
    correction = response["correction"]
    correction_line = ""
    if correction is not None:
        is_same = correction["token_ids"] == response["token_ids"]
        text = "the same" if is_same else _text(correction["text"])
        correction_line = f'<div><span style="{_QUIET}">would write:</span> {text}</div>'
    return (
        f'<div style="margin-top: 0.7em">{label}'
        f'<div style="line-height: 1.9; white-space: pre-wrap" dir="auto">{tokens}</div>'
        f"{sources}{correction_line}</div>"
    )


def _source(response: Mapping[str, Any], name: str, source: Mapping[str, Any], limit: float) -> str:
    """A row of tokens on the colors of one source of a sum, before its weight."""
    pairs = zip(response["tokens"], source["rewards"], strict=True)
    tokens = "".join(_token(token, reward, True, limit) for token, reward in pairs)
    label = f"{_text(name)}, weight {source['weight']:g}, reward {_number(source['reward'])}, color to ±{limit:.2g}"
    return (
        f'<div style="margin: 0.4em 0 0 1em"><span style="{_QUIET}">{label}</span>'
        f'<div style="line-height: 1.9; white-space: pre-wrap" dir="auto">{tokens}</div></div>'
    )


def _token(token: str, reward: float, tag: bool, limit: float) -> str:
    name = "span" if tag else "u"
    style = f"{_background(reward, limit)}; padding: 0.15em 0; border-radius: 2px"
    return f'<{name} style="{style}" title="{_number(reward)}">{_text(token, line_ends=True)}</{name}>'


def _background(reward: float, limit: float) -> str:
    strength = min(1.0, abs(reward) / limit) ** 0.8
    return f"background: rgba({_BLUE if reward > 0 else _ORANGE}, {0.75 * strength:.2f})"


def _text(text: str, *, line_ends: bool = False) -> str:
    return _INVISIBLE.sub(lambda match: _visible(match[0], line_ends), html.escape(text))


def _visible(character: str, line_ends: bool) -> str:
    if character in _LINE_ENDS:
        return _LINE_ENDS[character] + character if line_ends else character
    return f"<code>U+{ord(character):04X}</code>"


def _number(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return text if any(digit in text for digit in "123456789") else "0"
