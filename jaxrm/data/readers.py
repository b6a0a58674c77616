"""Records from files, folders and the hub, with an account of what was read."""

import gzip
import hashlib
import importlib
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from jaxrm.data.config import DataConfig
from jaxrm.data.fields import squeeze
from jaxrm.data.records import Record
from jaxrm.data.schemas import BadRecordError, describe_schemas, parse, recognize
from jaxrm.errors import UserError, flag, option

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json")
_SAMPLE = 100  # rows from which the schema is recognized

_INVISIBLE = re.compile(r"[\u200b\u2060\ufeff]")  # zero-width spaces and the byte order mark

RawRecord = tuple[str, Any]  # its place, and a dict of fields or a BadRecordError


@dataclass
class Count:
    """How many records were unusable for one reason, and the place of the first."""

    count: int
    first: str


@dataclass
class ReadReport:
    """What became of the records.

    Attributes:
      total: records that were read.
      used: records that remain.
      other_side: records of the other side of the held-out split.
      cut_prompts: used records whose prompt was cut.
      cut_heads: those of them that lost system text or the first turn's header too.
      bad: unusable records, by reason.
    """

    total: int = 0
    used: int = 0
    other_side: int = 0
    cut_prompts: int = 0
    cut_heads: int = 0
    bad: dict[str, Count] = field(default_factory=dict)

    def add_bad(self, reason: str, source: str, count: int = 1) -> None:
        """Count a record as unusable."""
        self.bad.setdefault(reason, Count(0, source)).count += count

    def merge(self, later: "ReadReport") -> "ReadReport":
        """This report and that of the next step, which saw the records used here, as one."""
        merged = ReadReport(self.total, later.used, self.other_side, self.cut_prompts + later.cut_prompts)
        merged.cut_heads = self.cut_heads + later.cut_heads
        for report in (self, later):
            for reason, entry in report.bad.items():
                merged.add_bad(reason, entry.first, entry.count)
        return merged

    def check(self, max_bad_share: float, path: str) -> None:
        """Check that enough is usable.

        Raises:
          UserError: more than ``max_bad_share`` is unusable, or nothing is left. It names the most frequent reason and
            its first record.
        """
        bad = sum(entry.count for entry in self.bad.values())
        if not bad or (bad <= max_bad_share * self.total and self.used):
            return
        reason, entry = max(self.bad.items(), key=lambda item: item[1].count)
        often = f"most often: {reason} ({entry.count}, first at {entry.first})"
        if not self.used:
            raise UserError(f"{path}: {bad} of {self.total} records are unusable and none is left; {often}; mend them")
        raise UserError(
            f"{path}: {bad} of {self.total} records are unusable, more than {option('data.max_bad_share')} "
            f"{max_bad_share:g}; {often}; mend them, or e.g. "
            f"{flag('data.max_bad_share')}={min(1.0, bad / self.total + 0.01):.2f}"
        )

    def rows(self) -> list[tuple[str, int, str]]:
        """Rows of a table: name, count, place of the first."""
        counts = [("read", self.total, ""), ("used", self.used, "")]
        counts += [("on the other side of the split", self.other_side, "")] if self.other_side else []
        counts += [("prompts cut on the left", self.cut_prompts, "")] if self.cut_prompts else []
        counts += [("of them without their system text or first header", self.cut_heads, "")] if self.cut_heads else []
        return counts + [(reason, entry.count, entry.first) for reason, entry in self.bad.items()]


def read_records(config: DataConfig, *, held_out: bool = False) -> tuple[list[Record], ReadReport]:
    """Read the training records, or the held-out ones.

    Without ``config.eval_path`` and ``config.eval_split``, a hash of the prompt's text decides what is held out. So a
    prompt is never on both sides, and it stays on its side when records are added at the end. Prompts that differ in
    white space or letter case alone go with the first of them.

    Returns:
      The records in the order of the files, and the report.

    Raises:
      UserError: there is nothing to read, a file is damaged, the schema is unknown, more records are bad than
        ``config.max_bad_share``, or none is usable.
    """
    separate = config.eval_path is not None or config.eval_split is not None
    field, path, split = "data.path", config.path, config.split
    if held_out and separate:
        field = field if config.eval_path is None else "data.eval_path"
        path, split = config.eval_path or path, config.eval_split or split
    limit = config.max_eval_records if held_out else config.max_records
    rows = _rows(path, split, field)
    first_rows = list(islice(rows, _SAMPLE))
    schema = config.schema if config.schema != "auto" else _recognize_most(first_rows, path, field)
    records: list[Record] = []
    report = ReadReport()
    sides: dict[bytes, bool] = {}  # whether a prompt is held out
    for source, row in chain(first_rows, rows):
        if len(records) == limit:
            break
        report.total += 1
        try:
            if isinstance(row, BadRecordError):
                raise row
            record = parse(schema, row, source, config.preferred)
        except BadRecordError as error:
            report.add_bad(str(error), source)
            continue
        if separate or sides.setdefault(prompt_key(record), is_held_out(record, config.eval_share)) == held_out:
            records.append(record)
        else:
            report.other_side += 1
    report.used = len(records)
    report.check(config.max_bad_share, path)
    if not records:
        side = "held-out " if held_out else ""
        raise UserError(
            f"{option(field)} {path!r} has no usable {side}records ({report.total} read); give more data"
            + (f" or e.g. {flag('data.eval_share')}=0.2" if report.other_side and held_out else "")
        )
    return records, report


def is_held_out(record: Record, share: float) -> bool:
    """Whether the hash of the record's prompt falls within ``share``, the same on every machine.

    Prompts that differ only at their ends, or in how Unicode and line ends are written, have the same hash.
    """
    text = "\n\n".join(_plain(message.content) for message in record.prompt)
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def prompt_key(record: Record) -> bytes:
    """The same for prompts that differ only in white space, letter case, or how Unicode is written."""
    text = "\n".join(f"{message.role} {squeeze(_plain(message.content)).casefold()}" for message in record.prompt)
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", text).replace("\r\n", "\n")).strip()


def _recognize_most(rows: list[RawRecord], path: str, field: str) -> str:
    """The schema that most rows have, since a single row may be damaged."""
    with_fields = [row for _, row in rows if isinstance(row, dict)]
    votes = Counter(schema for row in with_fields if (schema := recognize(row)))
    if votes or not with_fields:  # rows without any fields are bad records under every schema
        return votes.most_common(1)[0][0] if votes else "preference"
    fields = ", ".join(repr(str(name)[:40]) for name in list(with_fields[0])[:20]) or "none"
    raise UserError(
        f"{option(field)} {path!r} has no known schema: its fields are {fields}; required is one of "
        f"{describe_schemas()}; rename the fields"
    )


def _rows(path: str, split: str, field: str) -> Iterator[RawRecord]:
    if not path:
        raise UserError(
            f"{option(field)} is empty; name a file, a folder or a data set, e.g. {flag(field)}=task:safety"
        )
    location = Path(path).expanduser()
    if location.is_dir():
        for file in _files(location, split):
            yield from _file_rows(file, str(file.relative_to(location)))
    elif location.is_file():
        yield from _file_rows(location, location.name)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?(:[\w.-]+)?", path) and not path.endswith(SUFFIXES):
        yield from _hub_rows(path, split, field)
    else:
        raise UserError(
            f"{option(field)} is {path!r}, which is no file, folder or data set (org/name); check the spelling, "
            f"e.g. {flag(field)}=pairs.jsonl"
        )


def _files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder: those named after the split (``train.jsonl``, ``train-00000.parquet``), else all."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    # Beside lines and tables, a lone .json holds settings rather than records.
    files = [file for file in files if file.suffix != ".json"] or files
    named = [file for file in files if re.match(rf"{re.escape(split)}(\W|_|$)", file.name)]
    if named or (files and split == DataConfig.split):
        return named or files
    names = ", ".join(file.name for file in files[:10]) or "no file that ends in " + ", ".join(SUFFIXES)
    raise UserError(f"{folder}: there is no file of split {split!r}, but {names}; e.g. {flag('data.split')}=train")


def _file_rows(file: Path, name: str) -> Iterator[RawRecord]:
    try:
        if name.endswith(".parquet"):
            yield from _parquet_rows(file, name)
        elif name.endswith(".json"):
            yield from _json_rows(file, name)
        else:
            with gzip.open(file, "rb") if name.endswith(".gz") else file.open("rb") as lines:
                yield from _json_lines(lines, name)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise UserError(f"{file} cannot be read to its end ({error}); fetch or write it again") from error


def _json_lines(lines: Any, name: str) -> Iterator[RawRecord]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name}:{number}", _decode(line.removeprefix(b"\xef\xbb\xbf"))


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRecordError("not UTF-8")
    except (ValueError, RecursionError):  # too deep a nesting, or too long a number, is no usable JSON either
        return BadRecordError("invalid JSON")


def _json_rows(file: Path, name: str) -> Iterator[RawRecord]:
    """Rows of one list of records. A file of one object a line is read as lines, since many are named .json."""
    content = file.read_bytes()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(content.splitlines(), name)
        return
    records = _decode(content.removeprefix(b"\xef\xbb\xbf"))
    if isinstance(records, BadRecordError):
        raise UserError(f"{file}: {records}; it must be a list of records, or one record a line")
    for number, row in enumerate(records, 1):
        yield f"{name}:{number}", row


def _parquet_rows(file: Path, name: str) -> Iterator[RawRecord]:
    pyarrow, parquet = (_import(module, "read parquet files") for module in ("pyarrow", "pyarrow.parquet"))
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}); fetch or write it again") from error


def _hub_rows(path: str, split: str, field: str) -> Iterator[RawRecord]:
    datasets = _import("datasets", "read data sets from the hub")
    dataset, _, configuration = path.partition(":")
    repository, folder = "/".join(dataset.split("/")[:2]), "/".join(dataset.split("/")[2:])
    try:
        rows = datasets.load_dataset(repository, configuration or None, data_dir=folder or None, split=split)
    except Exception as error:  # datasets raises whatever its storage, parsers and the network raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{option(field)} {path!r} is no file or folder here, and as a data set of the hub (split {split!r}) it "
            f"could not be had: {reason}; check the name and the network, or give a file, "
            f"e.g. {flag(field)}=pairs.jsonl"
        ) from error
    for index, row in enumerate(rows):
        yield f"{dataset}[{split}]:{index}", row


def _import(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is needed to {purpose}, but is not installed; pip install datasets") from error
