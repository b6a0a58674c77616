"""The safetensors file format, read and written one tensor at a time.

A file is an 8-byte little-endian length, a JSON header of that length (tensor name to dtype, shape and byte
range), and the tensors' bytes in little-endian row-major order. Reading through a memory map means that
only the rows a device asks for ever leave the disk; NumPy's lack of bfloat16 is met with ml_dtypes.
"""

import json
import math
import operator
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxrm.errors import UserError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the format's own bound


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, and a function that reads it (a view of the file where possible).

    ``unreadable`` says why there is nothing that could read it.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    unreadable: str | None = None


def open_tensors(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file.

    Tensors of types other than floating point are listed as unreadable.

    Raises:
      UserError: if the file is not safetensors, is cut short, or its header does not fit its bytes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UserError(f"{file} is not a safetensors file, or is cut short; fetch it again")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} has a damaged safetensors header; fetch it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{file} has a damaged safetensors header; fetch it again")
    header.pop("__metadata__", None)
    start = 8 + length
    stored = {name: _stored(file, name, entry, start, size) for name, entry in header.items()}
    # As the format asks: each byte belongs to one tensor.
    spans = sorted((int(first), int(last)) for first, last in (entry["data_offsets"] for entry in header.values()))
    ends = [0, *(last for _, last in spans)]
    if [first for first, _ in spans] != ends[:-1] or ends[-1] != size - start:
        raise UserError(f"{file} has tensors that overlap, or bytes that belong to none; fetch it again")
    return stored


def _stored(file: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        shape = tuple(operator.index(n) for n in entry["shape"])
        first, last = (operator.index(n) for n in entry["data_offsets"])
        dtype = _DTYPES.get(entry["dtype"])
        if min((first, *shape)) < 0:
            raise ValueError("a negative number")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: the header entry of {name} is damaged; fetch the file again") from error
    if start + last > size:
        raise UserError(f"{file} is cut short: {name} ends past the end of the file; fetch it again")
    if dtype is not None and (first < 0 or last - first != dtype.itemsize * math.prod(shape)):
        raise UserError(f"{file}: the bytes of {name} do not fit its shape {list(shape)}; fetch the file again")

    def read() -> np.ndarray:
        assert dtype is not None, "an unreadable tensor is refused before it is read"
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        # A map of its own per tensor: its pages leave memory with the last view of it.
        return np.memmap(file, dtype=dtype, mode="r", offset=start + first, shape=shape)

    unreadable = None
    if dtype is None:
        unreadable = (
            f"{name} is stored as {entry['dtype']}; jaxrm reads {', '.join(_DTYPES)}: "
            "choose a checkpoint that is not quantized"
        )
    return StoredTensor(shape, read, unreadable)


def write_tensors(
    file: Path,
    entries: Iterable[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    fetch: Callable[[str], np.ndarray],
) -> int:
    """Write a safetensors file, holding one tensor in memory at a time.

    Args:
      file: written in place; the caller makes it atomic.
      entries: name and shape of each tensor.
      dtype: of every tensor.
      fetch: gives the tensor of a name, in that shape; converted to ``dtype`` here.

    Returns:
      Bytes of tensor data written.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in entries:
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name, shape in entries:
            array = np.ascontiguousarray(fetch(name), dtype=dtype)
            assert array.shape == shape, (name, array.shape, shape)
            stream.write(array.reshape(-1).view(np.uint8).data)
    return end
