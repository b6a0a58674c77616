"""Files that appear whole: a reader finds the old file or the new one, never a part of either."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def open_for_writing(path: Path, mode: str = "w") -> Iterator[Any]:
    """Open a file that takes the place of ``path`` at the end, and is removed where the work in between fails.

    Args:
      path: the file; its folders are made.
      mode: ``w`` for text in UTF-8, ``wb`` for bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name, since several processes may write the same file at once. In the same folder, since a rename is
    # atomic only inside one file system.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with unfinished.open(mode, **text) as file:  # type: ignore[call-overload]  # mode is no literal
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, whole."""
    with open_for_writing(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole.

    Raises:
      ValueError: ``content`` holds NaN or an infinity, which JSON cannot.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is what a killed process left of one that it was writing."""
    return name.startswith(".") and name.endswith(".tmp")
