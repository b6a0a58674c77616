"""Tables as HTML: the numbers of a column get the same decimals."""

from __future__ import annotations

import html
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from jaxrm.reports.charts import number_text


@dataclass(frozen=True)
class Shaded:
    """A cell with a colored background, as in a matrix of win rates.

    Attributes:
      text: of the cell.
      shade: −1 to 1, from full orange over none to full blue.
      strong: whether the text is bold, e.g. where an interval leaves out chance.
    """

    text: str
    shade: float
    strong: bool = False

    def __str__(self) -> str:
        return self.text


Cell = str | float | int | Shaded | None


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
      title: heading.
      columns: names of the columns; the first one names the rows.
      rows: cells row by row, as many as there are columns. The numbers of a column get the same decimals; None and
        NaN are shown as missing. A `Shaded` cell keeps its color, but not in the first column.
      note: a sentence below the table.
      is_folded: whether only its heading is seen until a reader opens it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    is_folded: bool = False


def draw_table(table: Table) -> str:
    """Return the table as HTML with all text escaped."""
    for row in table.rows:
        assert len(row) == len(table.columns), (table.title, table.columns, row)
    columns = [_column_texts([row[index] for row in table.rows]) for index in range(len(table.columns))]
    kinds = [""] + [_column_class(column) for column in columns[1:]]
    head = "".join(
        f'<th scope="col"{kind} dir="auto">{html.escape(name)}</th>'
        for kind, name in zip(kinds, table.columns, strict=True)
    )
    body = []
    for row, texts in zip(table.rows, zip(*columns, strict=True), strict=True):
        cells = [
            f'<td{kind}><span class="missing">–</span></td>'
            if text is None
            else f'<td{_shaded(cell, kind)} dir="auto">{html.escape(text)}</td>'
            for cell, kind, text in zip(row[1:], kinds[1:], texts[1:], strict=True)
        ]
        body.append(f'<tr><th scope="row" dir="auto">{html.escape(texts[0] or "–")}</th>{"".join(cells)}</tr>')
    note = f'<p class="note" dir="auto">{html.escape(table.note)}</p>' if table.note else ""
    heading = f'<h2 dir="auto">{html.escape(table.title)}</h2>'
    outer, heading = ("details", f"<summary>{heading}</summary>") if table.is_folded else ("section", heading)
    return (
        f'<{outer} class="result">{heading}<div class="card scroll" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}</{outer}>"
    )


def _shaded(cell: Cell, kind: str) -> str:
    """The class of a cell: that of its column and one of nine shades, as the page's policy allows no styles here."""
    if not isinstance(cell, Shaded):
        return kind
    level = round(4 * min(max(cell.shade, -1.0), 1.0))
    names = [*re.findall(r'class="(\w+)"', kind), f"{'m' if level < 0 else 'p'}{abs(level)}"]
    return f' class="{" ".join(names + ["strong"] * cell.strong)}"'


def _column_texts(cells: Sequence[Cell]) -> list[str | None]:
    """The cells of a column as text; None for an empty cell."""
    sizes = [abs(float(cell)) for cell in cells if _is_number(cell) and not isinstance(cell, numbers.Integral)]
    sizes = [size for size in sizes if 0 < size < math.inf]
    # Three digits of the largest number, so that a column of shares shows 0.812 and one of lengths 63.4.
    decimals: int | None = min(4, max(0, 2 - math.floor(math.log10(max(sizes))))) if sizes else 0
    if sizes and not 1e-3 <= max(sizes) < 1e7:
        decimals = None
    return [_cell_text(cell, decimals) for cell in cells]


def _cell_text(cell: Cell, decimals: int | None) -> str | None:
    if cell is None or cell == "":
        return None
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if not _is_number(cell):
        return str(cell)
    if isinstance(cell, numbers.Integral):
        return number_text(int(cell), 0)
    value = float(cell)
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounds_to_zero = decimals is not None and value and abs(value) < 0.5 * 10.0**-decimals
    return number_text(value, None if rounds_to_zero else decimals)


def _is_number(cell: Cell) -> TypeGuard[int | float]:
    return isinstance(cell, numbers.Real) and not isinstance(cell, bool)


def _column_class(column: Sequence[str | None]) -> str:
    """CSS class of a column: numbers, also with a unit or an interval, are right-aligned; sentences may wrap."""
    texts = [text for text in column if text is not None]
    if texts and all(re.match(r"[−+±<>≤≥~-]?\s?(\d|∞)", text) for text in texts):
        return ' class="n"'
    return ' class="wide"' if any(len(text) > 48 for text in texts) else ""
