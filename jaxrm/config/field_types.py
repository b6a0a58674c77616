"""The types of a config's fields, and how a person would say them."""

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, TypeGuard, Union

from jaxrm.config.named_sections import class_of_named


def annotations_of(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, with string annotations resolved."""
    return _annotations_of(cls)


@functools.cache
def _annotations_of(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


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
        elif class_of_named(kind) is not None:
            names.append(f"sections {args[1].__name__} by name")
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
