"""Whether some files of a data set are others once more, by their names and by their bytes."""

import filecmp
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxrm.data.file_names import stem
from jaxrm.data.split_names import words


def has_copies(files: Mapping[str, Path]) -> bool:
    """Whether some files seem to be copies of others: backups, other formats, snapshots, or the same bytes.

    Args:
      files: where they are, by their path below one folder.
    """
    snapshots = {part for name in files for part in Path(name).parts if len(part) == 40 and part.isalnum()}
    return len(snapshots) > 1 or any(map(_has_near_copies, _siblings(files))) or _has_same_bytes(files.values())


def _siblings(names: Iterable[str]) -> list[list[str]]:
    """The names of the files in each folder, less their suffixes, and of the folders in it."""
    files: dict[str, list[str]] = {}
    folders: dict[str, set[str]] = {}
    for name in names:
        file = Path(name)
        files.setdefault(str(file.parent), []).append(stem(file.name))
        for folder in file.parents:
            if folder.name:
                folders.setdefault(str(folder.parent), set()).add(folder.name)
    return [*files.values(), *map(sorted, folders.values())]


def _has_near_copies(names: Iterable[str]) -> bool:
    """Whether one of the names is another with more words: ``pairs``, ``pairs_backup``."""
    several = [words(name) for name in names]
    seen = set(several)
    if len(seen) < len(several):
        return True
    shorter = {part for parts in seen for i in range(1, len(parts)) for part in (parts[:i], parts[i:])}
    return any(not all(word.isdigit() for word in part) for part in shorter & seen)


def _has_same_bytes(paths: Iterable[Path]) -> bool:
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        others = by_size.setdefault(path.stat().st_size, [])
        if path.stat().st_size and any(filecmp.cmp(path, other, shallow=False) for other in others):
            return True
        others.append(path)
    return False
