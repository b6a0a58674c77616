"""Rows that a run adds one block after another to a JSONL file, and finds again when it goes on."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrm.runtime.metrics import read_rows


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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if size and file.read(1) != b"\n":
                file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += block
