"""From a path and a split to the files that are read. A folder that could mean two things is refused."""

import glob
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxrm.data import split_names
from jaxrm.data.card import declared_splits
from jaxrm.data.copies import has_copies
from jaxrm.data.file_names import RANKS, is_data, is_metadata, stem
from jaxrm.data.split_names import TRAIN
from jaxrm.errors import UserError, flag, option

T = TypeVar("T")

_NO_DATA = ("__pycache__", "__MACOSX")
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class DataFile:
    """A file to read.

    Attributes:
      path: where it is.
      name: what its records' places are called after: the path below the folder that was named.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class Place:
    """What is to be read, and which fields say so.

    Attributes:
      path: file, folder, pattern or data set.
      split: of it; None is whatever is there, of a path that is given as held out.
      field: of the config that has the path.
      file_field: field that can name a file in its place.
      split_field: field that has the split.
    """

    path: str
    split: str | None
    field: str = "data.path"
    file_field: str = "data.path"
    split_field: str = "data.split"


def find_files(place: Place) -> list[DataFile] | None:
    """The files of a path, in the order in which they are read; None where it is no file, folder or pattern.

    Raises:
      UserError: a folder that lacks the split, or that could mean several things.
    """
    try:
        location = Path(place.path).expanduser()
        if location.is_dir():
            return _folder_files(place, location)
        if location.is_file():
            return [DataFile(location, location.name)]
        if glob.has_magic(place.path):
            return _pattern_files(place, str(location))
    except (OSError, RuntimeError, ValueError) as error:  # no right to look, no such user, a NUL or a name too long
        if isinstance(error, UserError):
            raise
        raise UserError(f"{option(place.field)} {place.path!r} cannot be read: {error}") from error
    return None


def is_one_file(place: Place) -> bool:
    """Whether the path names one file."""
    try:
        return Path(place.path).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def _folder_files(place: Place, folder: Path) -> list[DataFile]:
    saved = _saved_data_set(place, folder)
    if saved is not None:
        return saved
    declared = declared_splits(folder)
    if declared:
        split = _declared_split(place, {name: str(paths[0].relative_to(folder)) for name, paths in declared.items()})
        return [DataFile(file, str(file.relative_to(folder))) for file in dict.fromkeys(declared[split])]
    files = _by_rank(_walk(folder, folder))
    chosen = _of_split(place, files)
    if not chosen:
        raise _no_file(place, files)
    _check_one_answer(place, chosen, files)
    return chosen


def _pattern_files(place: Place, pattern: str) -> list[DataFile]:
    """Files that match a pattern. It names them itself, so copies and a lone part may be among them."""
    root = _root(pattern)
    matches = sorted(match for match in root.glob(str(Path(pattern).relative_to(root))) if match.name[0] != ".")
    files = [DataFile(m, str(m.relative_to(root))) for m in matches if m.is_file() and is_data(m.name)]
    files += [file for match in matches if match.is_dir() and "**" not in pattern for file in _walk(match, root)]
    ignored = split_names.splits(str(Path(pattern).relative_to(root)))
    chosen = _of_split(place, files, ignored)
    if not chosen:
        raise _no_file(place, files)
    return chosen


def _walk(folder: Path, root: Path) -> list[DataFile]:
    """Every data file below a folder, each once, in the order of the names. Links are followed, loops are not."""
    by_target: dict[str, Path] = {}
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NO_DATA)
        for name in sorted(names):
            file = Path(parent, name)
            if is_metadata(name) or not is_data(name):
                continue
            if file.is_symlink() and not file.exists():
                raise UserError(f"{file} is a link to a file that is not there; fetch it again")
            target = os.path.realpath(file)
            if file.is_file() and (target not in by_target or not file.is_symlink()):
                by_target[target] = file
    return [DataFile(file, str(file.relative_to(root))) for file in sorted(by_target.values())]


def _by_rank(files: list[DataFile]) -> list[DataFile]:
    """The files of the first rank that is there, and those of other ranks that are named like one of them."""
    for rank in RANKS:
        first = [file for file in files if file.name.lower().endswith(rank)]
        if first:
            stems = {stem(file.name) for file in first}
            return [file for file in files if file in first or stem(file.name) in stems]
    return []


def _of_split(place: Place, files: Sequence[DataFile], ignored: frozenset[str] = frozenset()) -> list[DataFile]:
    """The files whose names say that they are of the split; nothing that is called held out is of ``train``."""
    splits = {file.name: frozenset().union(*map(split_names.splits, _parts(file.name))) - ignored for file in files}
    split = place.split
    if split is None:
        if len(set(splits.values())) > 1:
            example = max(files, key=lambda file: bool(splits[file.name] - {TRAIN}))
            raise UserError(
                f"{option(place.field)} {place.path!r} has several splits: {_names(files)}; name the one that is held "
                f"out, e.g. {_example(place, example.name)}"
            )
        return list(files)
    if split in ignored:  # the pattern says it
        return [file for file in files if not splits[file.name]]
    literal = [file for file in files if any(split_names.names_split(part, split) for part in _parts(file.name))]
    other = split_names.splits(split) if len(split_names.words(split)) == 1 else frozenset()
    if other == {TRAIN}:
        trained = [file for file in files if splits[file.name] == other]
        return trained or ([] if any(splits.values()) else list(files))
    return literal or [file for file in files if splits[file.name] & other]


def _check_one_answer(place: Place, chosen: Sequence[DataFile], files: Sequence[DataFile]) -> None:
    """Refuse files of which some seem to be others once more, and those of which a part is missing."""
    names = [file.name for file in chosen]
    missing = split_names.missing_part(names)
    if missing is not None:
        raise UserError(
            f"{option(place.field)} {place.path!r} has no {missing!r}, but other parts of it; fetch it, or name the "
            f"parts that are there, e.g. {_example(place, _as_pattern(names))}"
        )
    named = [name for name in names if split_names.splits(Path(name).name)]
    shapes = {(split_names.pattern(Path(name).name), name.count(os.sep)) for name in names}
    if has_copies({file.name: file.path for file in chosen}) or (named and len(shapes) > 1):
        what = f"split {place.split!r}" if named or (place.split and len(chosen) < len(files)) else "its data"
        raise UserError(
            f"{option(place.field)} {place.path!r} has several files that may be {what}: {_names(chosen)}; name one, "
            f"e.g. {_example(place, names[0])}, or all by a pattern, e.g. {_example(place, _as_pattern(names))}"
        )


def _saved_data_set(place: Place, folder: Path) -> list[DataFile] | None:
    """The files of a folder that ``save_to_disk`` wrote, or None where it is none."""
    if (folder / "dataset_dict.json").is_file():
        declared = _json(folder / "dataset_dict.json", lambda content: [str(name) for name in content["splits"]])
        split = _declared_split(place, dict(zip(declared, declared, strict=True)))
        return _saved_files(folder / split, folder)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        own = _json(folder / "state.json", lambda content: content.get("_split"))
        if place.split not in (None, TRAIN) and not (isinstance(own, str) and split_names.is_split(own, place.split)):
            raise UserError(
                f"{option(place.split_field)} is {place.split!r}, but {place.path!r} is one saved split; leave it out, "
                f"or give the folder of the other one, e.g. {flag('data.eval_path')}=FOLDER"
            )
        return _saved_files(folder, folder)
    return None


def _declared_split(place: Place, declared: Mapping[str, str]) -> str:
    """The one of several declared splits that is wanted; of each, a path below the folder."""
    split = split_names.choose(declared, place.split or "")
    if place.split is None and len(declared) == 1:
        split = next(iter(declared))
    if split is None:
        is_held_out = place.split_field == "data.eval_split"
        one = max(declared, key=lambda name: (TRAIN in split_names.splits(name)) != is_held_out)
        example = f"{flag(place.split_field)}={one}" if place.split else _example(place, declared[one])
        where = f"{option(place.field)} {place.path!r}"
        raise UserError(f"{where} has the splits {', '.join(declared)}; name one of them, e.g. {example}")
    return split


def _saved_files(folder: Path, root: Path) -> list[DataFile]:
    names = _json(folder / "state.json", lambda content: [str(file["filename"]) for file in content["_data_files"]])
    return [DataFile(folder / name, str((folder / name).relative_to(root))) for name in names]


def _json(file: Path, read: Callable[[Any], T]) -> T:
    try:
        return read(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); save the data set again") from error


def _no_file(place: Place, files: Sequence[DataFile]) -> UserError:
    names = _names(files) if files else "no file that ends in .jsonl, .parquet, .arrow, .csv, .tsv or .json"
    what = f"there is no file of split {place.split!r}, but {names}" if place.split else f"there is {names}"
    # An example that goes with the side: what is called train to train on, anything else to hold out.
    is_held_out = place.split_field == "data.eval_split"
    splits = {file.name: split_names.splits(file.name) for file in files}
    fitting = sorted(splits, key=lambda name: bool(splits[name] - {TRAIN}) != is_held_out)
    ways = [_example(place, fitting[0])] if files else [f"{flag(place.file_field)}=pairs.jsonl"]
    others = sorted(splits[fitting[0]] - {TRAIN}) if files else []
    ways += [f"{flag(place.split_field)}={others[0]}"] if others and is_held_out and place.split else []
    return UserError(f"{place.path}: {what}; e.g. {' or '.join(ways)}")


def _example(place: Place, name: str) -> str:
    return f"{flag(place.file_field)}={shlex.quote(str(_root(place.path) / name))}"


def _root(path: str) -> Path:
    """The folder of a path, or of all that match a pattern."""
    root = Path(path)
    while glob.has_magic(str(root)) and not root.exists():
        root = root.parent
    return root


def _as_pattern(names: Sequence[str]) -> str:
    """A pattern that all the names match."""
    folders = {Path(name).parent for name in names}
    suffixes = {name.removeprefix(stem(name)) for name in names}
    end = f"*{suffixes.pop()}" if len(suffixes) == 1 else "*"
    return str(folders.pop() / end) if len(folders) == 1 else f"**/{end}"


def _names(files: Sequence[DataFile]) -> str:
    shown = ", ".join(file.name for file in files[:_SHOWN])
    return shown if len(files) <= _SHOWN else f"{shown} and {len(files) - _SHOWN} more"


def _parts(name: str) -> Iterable[str]:
    *folders, file = Path(name).parts
    return (*folders, stem(file))
