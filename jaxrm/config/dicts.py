"""Trees of frozen dataclasses: from and to plain dicts, with some fields changed, and compared.

The dataclass alone says what a field may hold: what a JSON file, a config file or the text of a command line gives is
checked against its annotations, which may be strings (``from __future__ import annotations``). `jaxrm.config.fields`
says which types a field may have.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from jaxrm.config import field_names, field_types, fields
from jaxrm.config.named_sections import NamedSections, class_of_named
from jaxrm.errors import UserError

Tree = TypeVar("Tree")

_INFINITIES = ("inf", "-inf")  # as `to_dict` writes them
ABSENT = "(absent)"  # how `differences` shows a field that only the other config has
_NAME = "algorithm"  # class attribute that names the class of a config, and is written as its first field
_NOTHING = object()
_BOOLEANS = {
    "true": True,
    "t": True,
    "1": True,
    "false": False,
    "f": False,
    "0": False,
}  # as absl spells them


def from_dict(cls: type[Tree], mapping: Mapping[str, Any], where: str = "config") -> Tree:
    """Build the frozen tree `cls` from values by field name.

    Fields that `mapping` lacks take their defaults. The sections' own ``__post_init__`` checks run.

    Args:
      cls: a frozen dataclass.
      mapping: values by field name; sections are nested mappings, or already what they should be. JSON has no
        infinities, so that the texts ``inf`` and ``-inf`` stand for them.
      where: the dotted name of `mapping` in messages, or ``--`` where each field is a flag of a command.

    Raises:
      UserError: an unknown field, a value of the wrong type, or a required field that is missing; and whatever
        the checks in ``__post_init__`` raise.
    """
    annotations = field_types.annotations_of(cls)
    for name in mapping:
        if name == _NAME and mapping[name] == getattr(cls, _NAME, None):
            continue
        if name not in annotations:
            raise field_names.unknown_field(f"{where}.{name}", cls, where)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        name, annotation = f"{where}{'' if where == '--' else '.'}{field.name}", annotations[field.name]
        if field.name in mapping:
            values[field.name] = _checked(mapping[field.name], annotation, name, field.default)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            advice = fields.advice_for(annotation, name)
            raise UserError(f"{name} is missing; required {field_types.type_name(annotation)}; {advice}")
    with fields.placed(cls, where):
        return cls(**values)


def checked(tree: Tree, where: str = "config") -> Tree:
    """The tree with every value checked again and of its field's type: an ``int`` in a ``float`` becomes one.

    Raises:
      UserError: as `from_dict`.
    """
    return from_dict(type(tree), _values(tree), where)


def with_changes(tree: Tree, changes: Mapping[str, Any], where: str = "config") -> Tree:
    """The tree with some of its fields at other values.

    Args:
      tree: a frozen dataclass.
      changes: values by dotted name, ``{"optimizer.lr": 1e-5}``. A field of a section that is None makes the section,
        and so does one of a named section that is not there; None takes a named section away. The last one counts.
      where: the dotted name of `tree` in messages.

    Raises:
      UserError: as `from_dict`.
    """
    values = {field.name: getattr(tree, field.name) for field in dataclasses.fields(typing.cast(Any, tree))}
    for name, value in _nested(changes).items():
        section = values.get(name)
        if isinstance(value, Mapping) and field_types.is_section(type(section)):
            value = with_changes(section, value, f"{where}.{name}")
        elif isinstance(value, Mapping) and isinstance(section, NamedSections):
            value = _with_named_changes(section, value, f"{where}.{name}")
        values[name] = value
    return from_dict(type(tree), values, where)


def _with_named_changes(sections: NamedSections, changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Named sections with some of them changed, added, or taken away by None."""
    changed: dict[str, Any] = dict(sections)
    for name, value in changes.items():
        if isinstance(value, Mapping) and name in changed:
            value = with_changes(changed[name], value, f"{where}.{name}")
        changed[name] = value
    return {name: section for name, section in changed.items() if section is not None}


def parse_text(text: str, annotation: Any, where: str, example: Any = None) -> Any:
    """Read what was typed on a command line as a value of type `annotation`.

    ``None`` gives None where the field may be None. Tuples are written ``1,2`` or ``(1, 2)``. Booleans are
    written ``true`` or ``false``.

    Args:
        text: what stands after ``=``.
        annotation: the field's type, as `config_fields.field_names` gives it.
        where: the field's dotted name, for messages.
        example: a good value, such as the default, for messages.

    Raises:
        UserError: `text` is no such value.
    """
    kinds = field_types.kinds_of(annotation)
    if type(None) in kinds and text in ("None", "none", "null"):
        return None
    for kind in kinds:
        if field_types.is_section(kind):
            first = next(iter(field_names.field_names(kind, where)))
            raise UserError(f"{where} is a section, but is given {text!r}; set its fields, e.g. --{first}=…")
        value = _read(text, kind)
        if value is not _NOTHING:
            return _checked(value, annotation, where, example)
    raise fields.wrong_value(text, annotation, where, example)


def to_dict(tree: Any) -> dict[str, Any]:
    """Return the tree as nested dicts that ``json.dumps(…, allow_nan=False)`` takes.

    A class that has a name, ``algorithm``, writes it first. Tuples become lists, and infinities the strings ``inf`` and
    ``-inf``.
    """
    values = {field.name: _as_json(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
    name = getattr(type(tree), _NAME, None)
    return {_NAME: name, **values} if isinstance(name, str) and _NAME not in values else values


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """List the fields in which two configs differ as (dotted name, value in `a`, value in `b`).

    Either may be a tree or the dict that `to_dict` made of one. A field that one of them lacks is `ABSENT`
    there. Names have no ``config.`` in front.
    """
    left, right = (dict(_flat(t if isinstance(t, Mapping) else to_dict(t))) for t in (a, b))
    names = [*left, *(name for name in right if name not in left)]
    pairs = [(name, left.get(name, ABSENT), right.get(name, ABSENT)) for name in names]
    return [(name, x, y) for name, x, y in pairs if x != y or isinstance(x, bool) != isinstance(y, bool)]


def _values(tree: Any) -> dict[str, Any]:
    """What a section holds, sections in it as dicts."""
    values = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return {name: _values_of_part(value) for name, value in values.items()}


def _values_of_part(value: Any) -> Any:
    if isinstance(value, NamedSections):
        return {name: _values(section) for name, section in value.items()}
    return _values(value) if field_types.is_section(type(value)) else value


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes by dotted name as nested dicts."""
    nested: dict[str, Any] = {}
    for dotted, value in changes.items():
        *sections, last = dotted.split(".")
        holder = nested
        for section in sections:
            if not isinstance(holder.get(section), dict):
                holder[section] = {}
            holder = holder[section]
        holder[last] = value
    return nested


def _checked(value: Any, annotation: Any, where: str, example: Any = None) -> Any:
    """`value` as `annotation` wants it, sections rebuilt; UserError if it is something else."""
    for kind in field_types.kinds_of(annotation):
        if field_types.is_section(kind):
            if type(value) is kind:
                return value
            if isinstance(value, Mapping):
                return from_dict(kind, value, where)
        elif (section := class_of_named(kind)) is not None:
            if isinstance(value, Mapping):
                for name in value:
                    fields.check_name(name, section, where)
                return NamedSections({name: _checked(part, section, f"{where}.{name}") for name, part in value.items()})
        elif typing.get_origin(kind) is tuple:
            parts = field_types.parts_of(kind, len(value)) if isinstance(value, tuple | list) else None
            if parts is not None:
                named = [(v, part, f"{where}[{i}]") for i, (v, part) in enumerate(zip(value, parts, strict=True))]
                return tuple(_checked(*triple) for triple in named)
        elif typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif kind is float:
            if value in _INFINITIES:
                return float(value)
            if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
                return float(value)
        else:
            assert kind in (bool, int, str, type(None)), f"{where}: configs cannot hold {kind}"
            if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
                return value
    raise fields.wrong_value(value, annotation, where, example)


def _read(text: str, kind: Any) -> Any:
    """`text` as one member of a union, or `_NOTHING`; `_checked` judges the value."""
    if typing.get_origin(kind) is tuple:
        written = [part.strip(" '\"") for part in text.strip("()[] ").removesuffix(",").split(",")]
        written = [] if written == [""] else written
        parts = field_types.parts_of(kind, len(written))
        try:
            return _NOTHING if parts is None else tuple(map(parse_text, written, parts, written))
        except UserError:  # the message of the whole says more than that of the part
            return _NOTHING
    if typing.get_origin(kind) is Literal:
        return next((choice for choice in typing.get_args(kind) if text == str(choice)), _NOTHING)
    if kind is bool:
        return _BOOLEANS.get(text.lower(), _NOTHING)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return _NOTHING
    return text if kind is str else _NOTHING


def _as_json(value: Any) -> Any:
    if field_types.is_section(type(value)):
        return to_dict(value)
    if isinstance(value, NamedSections):
        return {name: to_dict(section) for name, section in value.items()}
    if isinstance(value, tuple):
        return [_as_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
