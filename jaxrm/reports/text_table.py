"""Token rewards as text: every token with its reward below it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WIDTH = 100  # characters a line
_MOST = 20  # responses that are shown


def token_rewards(records: Iterable[Mapping[str, Any]]) -> str:
    """Scored records as a table: a line of tokens, a line of their rewards, and the sum above them.

    Line ends and other characters that move the cursor are shown by their escape.

    Args:
      records: as `jaxrm.score` writes them to JSONL.
    """
    blocks = [
        _block(f"{record['source']} ({record['kind']})", response)
        for record in records
        for response in record["responses"]
    ]
    if not blocks:
        return "no responses"
    rest = [f"... and {len(blocks) - _MOST:,} more"] if len(blocks) > _MOST else []
    return "\n\n".join([*blocks[:_MOST], *rest])


def _block(title: str, response: Mapping[str, Any]) -> str:
    cells = [
        (_printable(token), f"{reward:+.2f}")
        for token, reward in zip(response["tokens"], response["rewards"], strict=True)
    ]
    lines = [f"{title}: sum {response['sum']:+.2f}"]
    for row in _wrap(cells):
        widths = [max(len(token), len(reward)) for token, reward in row]
        for part in zip(*row, strict=True):
            lines.append("  " + " ".join(text.ljust(width) for text, width in zip(part, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _wrap(cells: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The cells in rows of at most `_WIDTH` characters."""
    rows: list[list[tuple[str, str]]] = []
    used = _WIDTH
    for cell in cells:
        width = max(map(len, cell)) + 1
        if used + width > _WIDTH:
            rows.append([])
            used = 2
        rows[-1].append(cell)
        used += width
    return rows


def _printable(token: str) -> str:
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token).strip()
    return text or "␣"
