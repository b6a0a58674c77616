"""What a config's fields are called and may hold, as a person would say it.

A config is a tree of frozen dataclasses, called sections. Its fields are ``bool``, ``int``, ``float``,
``str``, ``Literal[...]``, tuples of those or of sections, sections, and ``| None`` of each; nothing else, so
that every config is hashable and can be written as JSON. Dotted names start with ``config``:
``config.optimizer.lr``.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeGuard, Union

from jaxrm.errors import UserError

WHOLE = {"holds a whole config": True}
"""``field(metadata=WHOLE)``: the field's section is a config by itself, whose own checks call its fields ``config.…``,
as a stage of a pipeline is; `config.from_dict` names them by their place."""

_MISSING = dataclasses.MISSING
_EXAMPLES = {bool: True, int: 8, float: 0.5}


def annotations_of(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, with string annotations resolved."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_names(cls: type, where: str = "config") -> dict[str, Any]:
    """Return the type of every field that can be set, by dotted name.

    Fields of a section that may be None are among them, and so is that section (None switches it off).
    """
    names: dict[str, Any] = {}
    for name, annotation in annotations_of(cls).items():
        section = section_of(annotation)
        if section is None or type(None) in kinds_of(annotation):
            names[f"{where}.{name}"] = annotation
        if section is not None:
            names |= field_names(section, f"{where}.{name}")
    return names


def section_of(annotation: Any) -> type | None:
    """Return the dataclass in ``Section`` or ``Section | None``, and None for any other annotation."""
    return next((kind for kind in kinds_of(annotation) if is_section(kind)), None)


def is_section(kind: Any) -> TypeGuard[type]:
    """Tell whether a type is a dataclass."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, None last, or the annotation alone."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(sorted(typing.get_args(annotation), key=lambda kind: kind is type(None)))
    return (annotation,)


def parts_of(annotation: Any, length: int) -> tuple[Any, ...] | None:
    """Return the types of a tuple's `length` parts, or None where the annotation wants another length."""
    args = typing.get_args(annotation)
    parts = args[:1] * length if args[-1] is Ellipsis else args
    return parts if len(parts) == length else None


def type_name(annotation: Any) -> str:
    """Return a type as a person would say it: ``int or None``, ``'a' or 'b'``, ``tuple of float``."""
    names = []
    for kind in kinds_of(annotation):
        args = typing.get_args(kind)
        if typing.get_origin(kind) is Literal:
            names += [repr(choice) for choice in args]
        elif typing.get_origin(kind) is tuple:
            inner = args[:1] if args[-1] is Ellipsis else args
            names.append(f"tuple of {', '.join(map(type_name, inner))}")
        elif is_section(kind):
            names.append(f"section {kind.__name__}")
        else:
            names.append("None" if kind is type(None) else kind.__name__)
    return " or ".join(names)


def as_text(value: Any) -> str:
    """Write a value as it is typed on a command line."""
    if isinstance(value, tuple | list):
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def wrong_value(value: Any, annotation: Any, where: str, example: Any = None) -> UserError:
    """Return the error for a `value` that the field `where` cannot hold; `example` is one that it can."""
    shown = f"{value!r}"[:200]
    if isinstance(value, float) and math.isnan(value):
        shown = "nan, not a number"
    elif value is not None and not isinstance(value, str):
        shown += f" ({type(value).__name__})"
    advice = advice_for(annotation, where, example)
    return UserError(f"{where} is {shown}; required {type_name(annotation)}; {advice}")


def advice_for(annotation: Any, where: str, example: Any = None) -> str:
    """Say what to type for a field, ``e.g. --config.optimizer.lr=3e-06``, with `example` if there is one."""
    kind = kinds_of(annotation)[0]
    args = typing.get_args(kind)
    if any(is_section(part) for part in (kind, *args)):
        return "set it in the config file"
    if example in (None, _MISSING, (), ""):
        if typing.get_origin(kind) is Literal:
            example = args[0]
        elif typing.get_origin(kind) is tuple:
            parts = args[:1] * 2 if args[-1] is Ellipsis else args
            example = tuple(_EXAMPLES.get(part, "text") for part in parts)
        else:
            example = _EXAMPLES.get(kind, "text")
    return f"e.g. --{where.split('[')[0]}={as_text(example)}"


def unknown_field(name: str, known: Iterable[str]) -> UserError:
    """Return the error for a field called `name`, with the `known` dotted name that was probably meant."""
    known = list(known)
    inside = [k for k in known if k.startswith(f"{name}.")]
    if inside:
        return UserError(f"{name} is a section; set its fields, e.g. --{inside[0]}=…")
    advice = did_you_mean(name, known) or "--help lists the fields"
    return UserError(f"{name} is no field of the config; {advice}")


def relocated(message: str, where: str) -> str:
    """Return a message about the fields of a config with the place `where` that this config has in a larger one.

    ``config.optimizer.lr`` in it becomes ``config.sft.optimizer.lr`` where `where` is ``config.sft``.
    """
    return re.sub(r"(?<![\w./-])(--(?:no)?)?config\.(?!json\b|py\b)(?=[a-z_])", rf"\g<1>{where}.", message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?`` with the `known` name nearest to a mistyped `name`, or an empty string.

    In dotted names the last part counts most, so that ``config.lr`` finds ``config.optimizer.lr``.
    """
    whole = {_without_prefix(k): k for k in known}
    last = {k: k.rsplit(".", 1)[-1] for k in whole}
    name = _without_prefix(name)
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], last.values(), n=1, cutoff=0.7)
    nearest = difflib.get_close_matches(name, [k for k in whole if last[k] in near], n=1, cutoff=0.0)
    nearest = nearest or difflib.get_close_matches(name, whole, n=1, cutoff=0.75)
    return f"did you mean {whole[nearest[0]]}?" if nearest else ""


def _without_prefix(name: str) -> str:
    return name.removeprefix("--").removeprefix("config.")  # what all names share says nothing about nearness


def describe(cls: Any, config: Any = None, where: str = "config") -> list[str]:
    """List the fields as ``config.section.field = value  (type)``, with the values of `config` or the defaults.

    Args:
        cls: a frozen dataclass.
        config: an instance of it; None for the defaults.
        where: the dotted name of `cls`.
    """
    lines = []
    for name, annotation in annotations_of(cls).items():
        value = _value_or_default(cls, config, name)
        section = section_of(annotation)
        if section is None or value is None:
            shown = "(required)" if value is _MISSING else as_text(value)
            lines.append(f"{where}.{name}={shown}  ({type_name(annotation)})")
        if section is not None:
            lines += describe(section, None if value is _MISSING else value, f"{where}.{name}")
    return lines


def _value_or_default(cls: Any, config: Any, name: str) -> Any:
    if config is not None:
        return getattr(config, name)
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field.default_factory() if field.default_factory is not _MISSING else field.default
