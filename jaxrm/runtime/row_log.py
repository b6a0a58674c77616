"""Rows that a run adds one block after another to a JSONL file, and finds again when it goes on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrm.runtime.metrics import append_lines, read_rows


class RowLog:
    """A file of rows that only grows.

    A block is on disk when `append` returns. A row that a kill cut short is dropped when the file is opened again.

    Args:
      path: the file; its folders are made with the first block.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = read_rows(path)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, none of which holds NaN."""
        block = [dict(row) for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in block)
        append_lines(self._path, text)
        self.rows += block
