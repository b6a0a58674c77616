"""From a file to its rows: compression, encoding and format. A row takes at most ``MAX_RECORD_BYTES`` of memory."""

import csv
import importlib
import io
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import IO, Any

from jaxrm.data.fields import BadRecordError
from jaxrm.data.file_names import is_data
from jaxrm.data.json_shapes import decode, is_lines, rows_of, value_rows
from jaxrm.data.schemas import recognize
from jaxrm.data.sources import DataFile, Place
from jaxrm.errors import UserError

RawRecord = tuple[str, Any]  # its place, and a dict of fields or a BadRecordError

MAX_RECORD_BYTES = 16 * 2**20
_MAX_VALUE_BYTES = 64 * 2**20  # of a compressed file that is one JSON object with all records in it
_PROBE_BYTES = 2**20
_BATCH = 32  # rows of a table of columns that are read at once
_MAGIC = (
    (".gz", b"\x1f\x8b"),
    (".zst", b"(\xb5/\xfd"),
    (".xz", b"\xfd7zXZ\x00"),
    (".bz2", b"BZh"),
    (".zip", b"PK\x03\x04"),
)
_ENCODINGS = (
    *(
        (b"\xff\xfe\x00\x00", "utf-32"),
        (b"\x00\x00\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ),
    *((start.encode(name), name) for name in ("utf-16-le", "utf-16-be") for start in "{["),
)
# NotImplementedError is zipfile's for a way of packing that it does not know.
_DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, UnicodeError)


def file_rows(file: DataFile, place: Place) -> Iterator[RawRecord]:
    """The rows of a file, with their places.

    Args:
      file: of any known name. What its name does not say, its first bytes do.
      place: whose split is wanted of a file that holds several.

    Raises:
      UserError: it cannot be read to its end, or holds no rows in a shape that is known.
    """
    try:
        head = _head(file)
        if file.name.lower().endswith(".parquet") or head.startswith(b"PAR1"):
            yield from _parquet_rows(file)
        elif file.name.lower().endswith(".arrow"):
            yield from _arrow_rows(file)
        else:
            yield from _text_rows(file, place, _compression(file, head))
    except _damage() as error:  # gzip.BadGzipFile is an OSError
        raise UserError(
            f"{file.path} cannot be read to its end ({one_line(error)}); fetch or write it again"
        ) from error


def import_module(module: str, purpose: str) -> Any:
    """Import a package that only some data need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is needed to {purpose}, but is not installed; pip install datasets") from error


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises. Not every Python has lzma."""
    return (*_DAMAGE, sys.modules["lzma"].LZMAError) if "lzma" in sys.modules else _DAMAGE


def one_line(error: BaseException) -> str:
    """What an error of a library says, as a part of a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _head(file: DataFile) -> bytes:
    """The first bytes. What a download leaves in place of a file is refused."""
    with file.path.open("rb") as stream:
        head = stream.read(200)
    start = head.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file.path} is a pointer of Git LFS in place of the file; fetch the file, e.g. git lfs pull")
    if file.name.lower().endswith((".xlsx", ".xls", ".ods")):
        raise UserError(f"{file.path} is a workbook; save its sheet as a table of text, e.g. pairs.csv")
    if start.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{file.path} is a web page in place of the file; fetch the file itself")
    return head


def _compression(file: DataFile, head: bytes) -> str:
    """The suffix of a compression, or nothing. The name says it; else the first bytes."""
    named = next((suffix for suffix, _ in _MAGIC if file.name.lower().endswith(suffix)), "")
    return named or next((suffix for suffix, start in _MAGIC if head.startswith(start)), "")


@contextmanager
def _open(file: DataFile, compression: str) -> Iterator[tuple[IO[bytes], str]]:
    """The bytes of a file, unpacked, and the name that says their format."""
    name = file.name[: -len(compression)] if file.name.lower().endswith(compression or " ") else file.name
    if compression == ".zip":
        with zipfile.ZipFile(file.path) as archive:
            members = [info for info in archive.infolist() if is_data(info.filename)]
            members = [info for info in members if not info.filename.startswith("__MACOSX")]
            if len(members) != 1 or members[0].flag_bits & 1:
                what = "is encrypted" if len(members) == 1 else f"holds {len(members)} data files, not one"
                raise UserError(f"{file.path} {what}; unpack it, and name a file of it, e.g. pairs.jsonl")
            with archive.open(members[0]) as stream:
                yield stream, members[0].filename
    elif compression == ".zst":
        pyarrow = import_module("pyarrow", "read .zst files")
        with (
            pyarrow.input_stream(str(file.path), compression="zstd") as unpacked,
            io.BufferedReader(unpacked) as stream,
        ):
            yield stream, name
    else:
        modules = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2"}
        opener = import_module(modules[compression], f"read {compression} files").open if compression else open
        with opener(file.path, "rb") as stream:
            yield stream, name


def _text_rows(file: DataFile, place: Place, compression: str) -> Iterator[RawRecord]:
    with _open(file, compression) as (stream, name):
        probe = stream.read(_PROBE_BYTES)
        is_all = not stream.read(1)
    encoding = next((encoding for start, encoding in _ENCODINGS if probe.startswith(start)), "utf-8-sig")
    with _open(file, compression) as (stream, name):
        if name.lower().endswith((".csv", ".tsv")):
            with io.TextIOWrapper(stream, encoding, newline="") as text:
                yield from _table_rows(text, file, "\t" if name.lower().endswith(".tsv") else "")
            return
        if encoding != "utf-8-sig":
            probe = probe.decode(encoding, "replace").encode("utf-8", "replace")
        if is_lines(probe, is_all=is_all):
            lines = _text_lines(stream, encoding, file) if encoding != "utf-8-sig" else _lines(stream, file)
            yield from _line_rows(lines, file, place)
        else:
            limits = (MAX_RECORD_BYTES, _MAX_VALUE_BYTES if compression else 2**40)
            with io.TextIOWrapper(stream, encoding) as text:
                yield from value_rows(iter(partial(text.read, 2**18), ""), file.name, place, limits)


def _line_rows(lines: Iterator[bytes], file: DataFile, place: Place) -> Iterator[RawRecord]:
    values = (
        (f"{file.name}:{number}", decode(line.removeprefix(b"\xef\xbb\xbf")))
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    head = list(islice(values, 2))
    if len(head) == 1 and isinstance(head[0][1], dict):  # the only line may hold all records
        head = rows_of(head[0][1], file.name, place)
    yield from chain(head, values)


def _lines(stream: IO[Any], file: DataFile) -> Iterator[Any]:
    """Lines of bytes or of text, none of which is longer than a record."""
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(
                f"{file.path}: line {number} has more than {MAX_RECORD_BYTES >> 20} MiB; write one record a line, or "
                "remove that one"
            )
        yield line


def _text_lines(stream: IO[bytes], encoding: str, file: DataFile) -> Iterator[bytes]:
    with io.TextIOWrapper(stream, encoding, newline="\n") as text:
        for line in _lines(text, file):
            yield line.encode("utf-8", "surrogatepass")


def _table_rows(lines: IO[str], file: DataFile, delimiter: str) -> Iterator[RawRecord]:
    """Rows of CSV or TSV with a header. An empty cell is a field that is missing."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    texts = _lines(lines, file)
    first = next(texts, "")
    if not delimiter:  # the one that makes known fields of the header
        headers = ((mark, next(csv.reader([first], delimiter=mark), [])) for mark in ",;\t|")
        delimiter = next((mark for mark, names in headers if recognize(dict.fromkeys(names, "x")) is not None), ",")
    header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    if len(set(header)) < len(header):
        raise UserError(f"{file.path}: its header names a column twice: {', '.join(header)[:200]}; rename one")
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if not cells:
                continue
            row: Any = BadRecordError("another number of cells than the header")
            if len(cells) == len(header):
                row = {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell}
            yield f"{file.name}:{reader.line_num + 1}", row
    except csv.Error as error:
        raise UserError(
            f"{file.path}: line {reader.line_num + 1} is no CSV ({error}); mend its quotes, or write JSON lines"
        ) from error


def _cell(name: str, cell: str) -> Any:
    """A cell; a list or an object that was written into it as JSON, where a schema has one."""
    if cell[0] in "[{":
        value = decode(cell.encode("utf-8", "surrogatepass"))
        is_messages = isinstance(value, list) and all(isinstance(part, dict) and "role" in part for part in value)
        if is_messages or (name in ("history", "info", "summaries") and isinstance(value, list | dict)):
            return value
    return cell


def _parquet_rows(file: DataFile) -> Iterator[RawRecord]:
    parquet = import_module("pyarrow.parquet", "read parquet files")
    with file.path.open("rb") as stream, _arrow_errors(file):
        yield from _batch_rows(parquet.ParquetFile(stream).iter_batches(batch_size=_BATCH), file)


def _arrow_rows(file: DataFile) -> Iterator[RawRecord]:
    ipc = import_module("pyarrow.ipc", "read arrow files")
    with file.path.open("rb") as stream, _arrow_errors(file):
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            reader = ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(ipc.open_stream(stream))
        yield from _batch_rows(batches, file)


@contextmanager
def _arrow_errors(file: DataFile) -> Iterator[None]:
    pyarrow = import_module("pyarrow", "read parquet files")
    try:
        yield
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file.path}: not a readable table of columns ({one_line(error)}); fetch or write it again"
        ) from error


def _batch_rows(batches: Iterator[Any], file: DataFile) -> Iterator[RawRecord]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            sizes = [part.slice(i, 1).nbytes for i in range(part.num_rows)] if part.nbytes > MAX_RECORD_BYTES else [0]
            if max(sizes) > MAX_RECORD_BYTES:
                place = number + 1 + sizes.index(max(sizes))
                raise UserError(f"{file.path}: record {place} has more than {MAX_RECORD_BYTES >> 20} MiB; remove it")
            for row in part.to_pylist():
                number += 1
                yield f"{file.name}:{number}", row
