"""Files that appear whole: a reader finds the old file or the new one, never a part of either."""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrm.owner import is_alive, place_name

_DAY = 86_400.0  # seconds
_MAKER = re.compile(r"\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.tmp$")


@contextmanager
def open_for_writing(path: Path, mode: str = "w") -> Iterator[Any]:
    """Open a file that takes the place of ``path`` at the end, and is removed where the work in between fails.

    Args:
      path: the file; its folders are made.
      mode: ``w`` for text in UTF-8, ``wb`` for bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, since several processes may write the same file at once; with its maker, so that others know
    # whether it is still being written. In the same folder, since a rename is atomic only inside one file system.
    unfinished = path.with_name(f".{path.name}.{place_name()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
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


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed left of files in ``folder``; those of a process that lives stay."""
    for path in folder.iterdir():
        if is_unfinished(path.name) and _is_left_over(path):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_left_over(path: Path) -> bool:
    maker = _MAKER.search(path.name)
    if maker is not None and maker[1] == place_name():
        return not is_alive(int(maker[2]))
    try:  # of another host, or of a version of before: nothing is written for a day
        return time.time() - path.stat().st_mtime > _DAY
    except OSError:
        return False
