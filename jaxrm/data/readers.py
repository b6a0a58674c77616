"""Records from files, folders and the hub, with an account of what was read."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from jaxrm.data.config import DataConfig
from jaxrm.data.fields import BadRecordError, Fields, given, squeeze
from jaxrm.data.files import RawRecord
from jaxrm.data.prompt_columns import CONTEXT_FIELDS
from jaxrm.data.read_report import Count, ReadReport
from jaxrm.data.records import Record
from jaxrm.data.schemas import describe_schemas, parse, recognize
from jaxrm.data.sides import Side, check_sides_differ, find_side, split_values
from jaxrm.data.sources import Place, is_one_file
from jaxrm.data.unread_fields import unread_fields
from jaxrm.errors import UserError, flag, option

Parsed = tuple[str, Any, Record | BadRecordError | None]  # place, row, and what it is

_SAMPLE = 100  # rows from which the schema is recognized
_SHOWN = 5  # names in a row of a table

_INVISIBLE = re.compile(r"[\u200b\u2060\ufeff]")  # zero-width spaces and the byte order mark


def read_records(
    config: DataConfig, *, held_out: bool = False, with_fields: bool = False
) -> tuple[list[Record], ReadReport]:
    """Read the training records, or the held-out ones.

    Without ``config.eval_path`` and ``config.eval_split``, a hash of the prompt's text decides what is held out. So a
    prompt is never on both sides, and it stays on its side when records are added at the end. Prompts that differ in
    white space or letter case alone go with the first of them.

    Args:
      config: the section.
      held_out: which side.
      with_fields: give each record the columns of its row too.

    Returns:
      The records in the order of the files, and the report.

    Raises:
      UserError: there is nothing to read, a path could mean two things, a file is damaged, the schema is unknown, both
        sides are the same, more records are bad than ``config.max_bad_share``, or none is usable.
    """
    side = find_side(config, held_out=held_out)
    separate = config.eval_path is not None or config.eval_split is not None
    reserved = _held_out_prompts(config, side) if separate and not held_out else set()
    with closing(side.rows()) as rows:
        first_rows = list(islice(rows, _SAMPLE))
        side = side.by_field(first_rows)
        schema = config.schema if config.schema != "auto" else _recognize_most(first_rows, side.place)
        every = _parsed(chain(first_rows, rows), side, schema, config.preferred, with_fields)
        records, report = _select(every, config, side, reserved, held_out=held_out)
    _check_report(report, config, side, held_out=held_out)
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


def _held_out_prompts(config: DataConfig, side: Side) -> set[bytes]:
    """Keys of the prompts that another file or split holds out."""
    check_sides_differ(side, find_side(config, held_out=True))
    return {prompt_key(record) for record in read_records(config, held_out=True)[0]}


def _parsed(rows: Iterable[RawRecord], side: Side, schema: str, preferred: str, with_fields: bool) -> Iterator[Parsed]:
    """Each row with its record: None where it is of another split, an error where it is unusable."""
    for source, row in rows:
        try:
            if isinstance(row, BadRecordError):
                raise row
            is_meant = not isinstance(row, dict) or side.reads_row(row)
            record = parse(schema, row, source, preferred) if is_meant else None
            yield source, row, replace(record, fields=row) if with_fields and record is not None else record
        except BadRecordError as error:
            yield source, row, error


def _select(
    parsed: Iterator[Parsed], config: DataConfig, side: Side, reserved: set[bytes], *, held_out: bool
) -> tuple[list[Record], ReadReport]:
    """The records of a side, up to the limit, and what became of the rows. ``reserved``: keys of held-out prompts."""
    limit = config.max_eval_records if held_out else config.max_records
    records: list[Record] = []
    report, sample = ReadReport(), list[tuple[Fields, Record]]()
    sides: dict[bytes, bool] = {}  # whether a prompt is held out
    for source, row, record in parsed:
        report.total += 1
        if isinstance(record, BadRecordError):
            report.add_bad(str(record), source)
            continue
        if record is not None and len(sample) < _SAMPLE:
            sample.append((row, record))
        if record is None or not _is_on_side(record, config, sides, held_out=held_out):
            report.other_side += 1
            continue
        records.append(record)
        if reserved and prompt_key(record) in reserved:
            report.add_note("prompts that are held out too", source)
        if len(records) == limit:
            break
    report.used = len(records)
    _add_notes(report, sample, side)
    return records, report


def _is_on_side(record: Record, config: DataConfig, sides: dict[bytes, bool], *, held_out: bool) -> bool:
    if config.eval_path is not None or config.eval_split is not None:
        return True
    return sides.setdefault(prompt_key(record), is_held_out(record, config.eval_share)) == held_out


def _add_notes(report: ReadReport, sample: Sequence[tuple[Fields, Record]], side: Side) -> None:
    """Name the files, where there are several, and the fields that the first records have and nobody reads."""
    if side.files is not None and len(side.files) > 1:
        report.notes["files"] = Count(len(side.files), side.files[0].name)
    unread = unread_fields(sample)
    if unread:
        report.notes["fields with text that is not read"] = Count(len(unread), ", ".join(unread[:_SHOWN]))
    context = [name for name in CONTEXT_FIELDS if any(given(fields, name) for fields, _ in sample)]
    if context:
        report.notes["fields read as system text or earlier turns"] = Count(len(context), ", ".join(context))
    is_open = is_one_file(side.place) and not side.is_by_field
    values = split_values([fields for fields, _ in sample]) if is_open else []
    if values:
        name = "values of the field 'split', which is not read without config.data.eval_split"
        report.notes[name] = Count(len(values), ", ".join(values))


def _check_report(report: ReadReport, config: DataConfig, side: Side, *, held_out: bool) -> None:
    """Refuse what was read where too much of it, or all, is of no use."""
    path = side.place.path
    report.check(config.max_bad_share, path)
    if not report.used:
        kind = "held-out " if held_out else ""
        ways = f" or e.g. {flag('data.eval_share')}=0.2" if report.other_side and held_out else ""
        if side.is_by_field:
            ways = f", or name a split that it has, e.g. {flag(side.place.split_field)}=test"
        where = f"{option(side.place.field)} {path!r}"
        raise UserError(f"{where} has no usable {kind}records ({report.total} read); give more data{ways}")


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", text).replace("\r\n", "\n")).strip()


def _recognize_most(rows: list[RawRecord], place: Place) -> str:
    """The schema that most rows have, since a single row may be damaged."""
    with_fields = [row for _, row in rows if isinstance(row, dict)]
    votes = Counter(schema for row in with_fields if (schema := recognize(row)))
    if votes or not with_fields:  # rows without any fields are bad records under every schema
        return votes.most_common(1)[0][0] if votes else "preference"
    fields = ", ".join(repr(str(name)[:40]) for name in list(with_fields[0])[:20]) or "none"
    raise UserError(
        f"{option(place.field)} {place.path!r} has no known schema: its fields are {fields}; required is one of "
        f"{describe_schemas()}; rename the fields"
    )
