"""Files of a task, written atomically."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrm import atomic


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    atomic.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
