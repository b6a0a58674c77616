"""Checksums of a checkpoint's files, since no other part of it notices a flipped bit in the weights."""

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxrm import atomic
from jaxrm.runtime.progress import Progress

_FILE = "checksums.json"
_UNCHECKED = {_FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}  # written after the checksums, or no content
_BLOCK = 1 << 22  # bytes
_SHOWN = 1 << 31  # bytes whose reading takes a few seconds


def write_checksums(folder: Path) -> None:
    """Write size and CRC-32 of every file below ``folder`` into it."""
    paths = [path for path in _files(folder) if path.name not in _UNCHECKED or path.parent != folder]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib works outside the interpreter's lock
        sums = list(pool.map(_size_and_crc, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    atomic.write_json(folder / _FILE, dict(zip(names, sums, strict=True)))


def has_checksums(folder: Path) -> bool:
    """Whether the checkpoint was written with checksums; older ones were not."""
    return (folder / _FILE).exists()


def find_damage(folder: Path, parts: Iterable[str] = (), *, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None where they are as they were written.

    Args:
      folder: of the checkpoint. Without checksums nothing is known, and None is returned.
      parts: folders in it that are of interest; all where there are none.
      share: which files this process reads, of ``num_shares`` processes that look together.
      num_shares: how many they are.
    """
    if not has_checksums(folder):
        return None
    try:
        sums = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        wanted = sorted((str(name), (int(size), int(crc))) for name, (size, crc) in sums.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{_FILE} cannot be read"
    parts = tuple(f"{part}/" for part in parts)
    mine = [(name, sums) for name, sums in wanted if not parts or name.startswith(parts)][share::num_shares]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        complaints = pool.map(lambda pair: _complaint(folder / pair[0], pair[0], pair[1]), mine)
        return next((complaint for complaint in complaints if complaint is not None), None)


def content_hash(paths: Iterable[Path]) -> str:
    """SHA-256 of the names and bytes of files, in this order; they are read once as long as none changes.

    A bar shows it where they are large.
    """
    stamps = ((path, path.stat()) for path in paths)
    return _content_hash(tuple((path, status.st_size, status.st_mtime_ns) for path, status in stamps))


@functools.lru_cache(64)
def _content_hash(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    total = sum(size for _, size, _ in stamps)
    digest, done = hashlib.sha256(), 0
    with Progress("hash the weights", total, unit="bytes", enabled=total > _SHOWN) as progress:
        for path, size, _ in stamps:
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    done += len(block)
                    progress.update(done)
    return digest.hexdigest()


def _complaint(path: Path, name: str, expected: tuple[int, int]) -> str | None:
    try:
        status = path.stat()
        if status.st_size != expected[0]:
            return f"{name} has {status.st_size:,} bytes in place of {expected[0]:,}"
        return (
            None
            if _known(path, status.st_size, status.st_mtime_ns) == expected
            else f"{name} has another checksum than when it was written"
        )
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@functools.lru_cache(4096)  # a command looks at a checkpoint several times
def _known(path: Path, size: int, changed: int) -> tuple[int, int]:
    del size, changed  # a file with others is read again
    return _size_and_crc(path)


def _size_and_crc(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
