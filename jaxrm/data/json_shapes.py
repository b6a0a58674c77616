"""Files of JSON in the shapes that programs write: lines, a list, objects over several lines, tables of columns."""

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from jaxrm.data import split_names
from jaxrm.data.fields import BadRecordError
from jaxrm.data.schemas import recognize
from jaxrm.data.sources import Place
from jaxrm.errors import UserError, flag

_BLANK = re.compile(r"[\s,]*")
_SCAN = json.JSONDecoder().raw_decode


def decode(line: bytes) -> Any:
    """The JSON value of a line, or a `BadRecordError`."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRecordError("not UTF-8")
    except (ValueError, RecursionError):  # too deep a nesting, or too long a number, is no usable JSON either
        return BadRecordError("invalid JSON")


def is_lines(probe: bytes, *, is_all: bool) -> bool:
    """Whether a file has one record a line, rather than values over any number of lines.

    Args:
      probe: the first bytes of the file.
      is_all: they are all of it.
    """
    text = probe.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    if text[:1] not in ("{", "["):
        return True
    lines = [line for line in text.split("\n") if line.strip()]
    first = decode(lines[0].encode())
    if not isinstance(first, BadRecordError):
        return not (isinstance(first, list) and len(lines) == 1 and is_all)
    if len(lines) == 1 and not is_all:  # its first line is longer than the probe: as a list it is read piece by piece
        return text.startswith("{")
    is_list = text.startswith("[") and text[1:].lstrip().startswith("{")
    try:
        _, end = _SCAN(text, text.index("{") if is_list else 0)
        is_value = is_list or end > len(lines[0])
    except json.JSONDecodeError as error:
        is_value = not is_all and error.pos > len(text) // 2  # the end of the probe breaks it off
    except (ValueError, RecursionError):
        is_value = False
    has_records = any(isinstance(decode(line.encode()), dict) for line in lines[:100])
    return not is_value and (text.startswith("{") or has_records)


def value_rows(chunks: Iterator[str], name: str, place: Place, limits: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    """The rows of a file of values: of a list, of objects one after another, or of one object that holds them all.

    Args:
      chunks: the file's text.
      name: of the file, for places and errors.
      place: whose split is wanted of an object that has several.
      limits: most characters of a record in a list, and of another value.

    Raises:
      UserError: the text breaks off or is no JSON, a value is too long, or an object has no such split.
    """
    values = _values(chunks, name, limits)
    head = list(islice(values, 2))
    if len(head) == 1 and not head[0][0] and isinstance(head[0][1], dict):
        yield from rows_of(head[0][1], name, place)
        return
    for number, (_, row) in enumerate(chain(head, values), 1):
        yield f"{name}:{number}", row


def rows_of(value: dict[str, Any], name: str, place: Place) -> list[tuple[str, Any]]:
    """The rows, with their places, of an object that is the whole file: itself a record, or all records in it.

    Raises:
      UserError: it has several lists of records, none of which is called ``split``.
    """
    rows, where = _inner_rows(value, name, place)
    return [(f"{name}{where}:{number}", row) for number, row in enumerate(rows, 1)]


def _values(chunks: Iterator[str], name: str, limits: tuple[int, int]) -> Iterator[tuple[bool, Any]]:
    """Each value, and whether it stands in a list."""
    text, start, in_list, number = "", 0, False, 0
    while True:
        start = _BLANK.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing, too
        if start == len(text):
            text, start = next(chunks, ""), 0
            if not text:
                break
        elif text[start] == "[" and not number and not in_list:
            in_list, start = True, start + 1
        elif text[start] == "]" and in_list:
            in_list, start = False, start + 1
        else:
            try:
                value, start = _SCAN(text, start)
            except (ValueError, RecursionError) as error:
                more = "" if isinstance(error, RecursionError) else _take(chunks, len(text) - start)
                if not more:
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"{name}: invalid JSON in record {number + 1}: {reason}; mend or fetch it"
                    ) from error
                text, start = text[start:] + more, 0
                limit = limits[not in_list]
                if len(text) > limit:
                    raise UserError(
                        f"{name}: record {number + 1} has more than {limit >> 20} MiB; write one record a line, "
                        "or remove that one"
                    ) from error
            else:
                number += 1
                yield in_list, value
    if in_list:
        raise UserError(f"{name}: invalid JSON: the list breaks off after {number} records; fetch or write it again")


def _take(chunks: Iterator[str], count: int) -> str:
    """At least ``count`` more characters, if there are as many. So a long value is not scanned too often."""
    taken = [next(chunks, "")]
    while taken[-1] and sum(map(len, taken)) < count:
        taken.append(next(chunks, ""))
    return "".join(taken)


def _inner_rows(value: dict[str, Any], name: str, place: Place) -> tuple[list[Any], str]:
    """Rows in an object, and the split that its key names, as a part of their places."""
    table = _columns(value)
    if table is not None or recognize(value) is not None:
        return ([value] if table is None else table), ""
    names, cells = value.get("columns"), value.get("data")  # as pandas writes it with orient="split"
    if isinstance(names, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        return [dict(zip(map(str, names), row, strict=False)) for row in cells], ""
    lists = {key: rows for key, rows in value.items() if rows and isinstance(rows, list) and isinstance(rows[0], dict)}
    if lists:
        key = _choose(list(lists), name, place)
        is_viewer = all(isinstance(row, dict) and set(row) >= {"row_idx", "row"} for row in lists[key])
        rows = [row["row"] for row in lists[key]] if is_viewer else lists[key]
        return rows, f"[{key}]" if split_names.splits(key) else ""
    records = list(value.values())  # by their ids
    is_by_id = (
        bool(records) and all(isinstance(record, dict) for record in records) and recognize(records[0]) is not None
    )
    return (records if is_by_id else [value]), ""


def _columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table of columns, each a list or, as pandas writes it, an object of numbered values."""
    columns = list(value.values())
    if all(isinstance(column, dict) and all(key.isdigit() for key in column) for column in columns):
        columns = [list(column.values()) for column in columns] if len({tuple(c) for c in columns}) == 1 else columns
    is_table = recognize(dict.fromkeys(value, "x")) is not None and all(isinstance(c, list) for c in columns)
    if not is_table or len(set(map(len, columns))) != 1 or any(_is_message(part) for c in columns for part in c[:1]):
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _choose(keys: list[str], name: str, place: Place) -> str:
    """Of lists in an object the one that is wanted."""
    split = place.split
    if len(keys) == 1 and (split is None or not split_names.splits(keys[0]) - split_names.splits(split)):
        return keys[0]
    key = split_names.choose(keys, split or "")
    if key is None:
        required = f"none is the split {split!r}" if split else "which of them is meant is not clear"
        raise UserError(
            f"{name} has records under {', '.join(map(repr, keys))}, and {required}; name one, e.g. "
            f"{flag(place.split_field)}={keys[0]}, or write each to a file of its own"
        )
    return key


def _is_message(part: object) -> bool:
    return isinstance(part, dict) and "role" in part
