"""GGUF files (llama.cpp's format): the files of one model, and their headers, checked before a library trusts them."""

import mmap
import re
import struct
from pathlib import Path
from typing import Any

from jaxrm.errors import UserError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind of value -> bytes
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


def gguf_parts(file: Path) -> list[Path]:
    """The files of the model that a ``.gguf`` file holds or is a part of, as llama.cpp names them, in order.

    Raises:
      UserError: one of them is not there.
    """
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise UserError(f"{file} is part {number} of {count} by its name; give it the name that it was published with")
    parts = [file.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = next((part.name for part in parts if not part.is_file()), None)
    if missing is not None:
        raise UserError(f"{file} is part {number} of {count}, and {missing} is not beside it; fetch all {count} parts")
    return parts


def models_in(folder: Path) -> list[Path]:
    """The models that a folder holds as ``.gguf`` files, each by its first file.

    Raises:
      UserError: a part of one is missing.
    """
    return sorted({gguf_parts(file)[0] for file in folder.glob("*.gguf")})


def open_reader(file: Path) -> Any:
    """A ``gguf.GGUFReader`` of one file.

    Raises:
      UserError: it is no GGUF file, or is damaged.
    """
    from gguf import GGUFReader

    try:
        _check_header(file)
        return GGUFReader(file)
    except Exception as error:  # the library trusts every number in the file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file} is not a GGUF file, or is cut short ({reason}); fetch it again") from error


def _check_header(file: Path) -> None:
    """Walk the header, since the library would make as many values as a damaged one says that there are."""
    if file.stat().st_size < 24:
        raise ValueError("it has no header")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, num_tensors, num_values = struct.unpack_from("<4sIQQ", data, 0)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}; required are versions 2 and 3")
        place = 24
        for _ in range(num_values):
            place = _skip_string(data, place)
            place = _skip_value(data, place + 4, _number(data, place, "<I"))
        for _ in range(num_tensors):
            place = _skip_string(data, place)
            dimensions = _number(data, place, "<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            place += 4 + 8 * dimensions + 4 + 8
            _check_inside(data, place)


def _number(data: mmap.mmap, place: int, form: str) -> int:
    return int(struct.unpack_from(form, data, place)[0])


def _skip_string(data: mmap.mmap, place: int) -> int:
    return _check_inside(data, place + 8 + _number(data, place, "<Q"))


def _skip_value(data: mmap.mmap, place: int, kind: int) -> int:
    if kind in _SCALARS:
        return _check_inside(data, place + _SCALARS[kind])
    if kind == _STRING:
        return _skip_string(data, place)
    if kind != _ARRAY:
        raise ValueError(f"a value has the unknown kind {kind}")
    inner, length = _number(data, place, "<I"), _number(data, place + 4, "<Q")
    place += 12
    if inner in _SCALARS:
        return _check_inside(data, place + _SCALARS[inner] * length)
    if inner != _STRING:
        raise ValueError(f"an array holds values of kind {inner}")
    for _ in range(length):
        place = _skip_string(data, place)
    return place


def _check_inside(data: mmap.mmap, place: int) -> int:
    if place > len(data):
        raise ValueError(f"it ends after {len(data)} bytes")
    return place
