"""Sections that a person names: a field ``Mapping[str, Section]`` of a config, ``config.rewards.NAME.FIELD``.

In Python a dict gives them. A section keeps them frozen, in the order in which they were given. A config file that
gives one name twice would silently keep the last; `check_repeated_names` refuses it.
"""

import ast
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from jaxrm.errors import UserError

Section = TypeVar("Section")


class NamedSections(Mapping[str, Section], Generic[Section]):
    """A frozen, hashable mapping from name to section.

    Args:
      sections: by name.
    """

    def __init__(self, sections: Mapping[str, Section] | None = None) -> None:
        self._sections = dict(sections or {})

    def __getitem__(self, name: str) -> Section:
        return self._sections[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)

    def __hash__(self) -> int:
        return hash(frozenset(self._sections.items()))

    def __repr__(self) -> str:
        return repr(self._sections)


def class_of_named(annotation: Any) -> type | None:
    """The section's class in ``Mapping[str, Section]``; None for any other annotation."""
    origin = typing.get_origin(annotation)
    is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
    return typing.get_args(annotation)[1] if is_mapping else None


def typed_names(arguments: Iterable[str], fields: Mapping[str, type]) -> list[str]:
    """Named sections that a command line mentions, by dotted name, in its order.

    Args:
      arguments: of the command line, ``--config.rewards.length.weight=2``.
      fields: the fields that hold named sections, ``config.rewards``, with the sections' class.

    Returns:
      Such as ``config.rewards.length``; names that a section cannot have are left out.
    """
    sections: dict[str, None] = {}
    for argument in arguments:
        dotted = argument.lstrip("-").split("=", 1)[0].removeprefix("no")
        for field, section in fields.items():
            name = dotted.removeprefix(f"{field}.").partition(".")[0]
            if argument.startswith("-") and dotted.startswith(f"{field}.") and is_name(name, section):
                sections[f"{field}.{name}"] = None
    return list(sections)


def is_name(name: Any, section: type) -> bool:
    """Whether a section of a class may be called so: an identifier that is none of its fields."""
    return isinstance(name, str) and name.isidentifier() and name not in fields_of(section)


def fields_of(section: Any) -> tuple[str, ...]:
    """Names of the fields of a section's class."""
    return tuple(field.name for field in dataclasses.fields(section))


def check_repeated_names(source: bytes) -> None:
    """Refuse a config file with a dict that has one name twice, of which Python keeps the last.

    Named sections are made by calls, so only such values are looked at.

    Args:
      source: the file.

    Raises:
      UserError: with the line.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Dict):
            continue
        names: set[str] = set()
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str) or not isinstance(value, ast.Call):
                continue
            if key.value in names:
                raise UserError(
                    f"line {key.lineno}: a dict has {key.value!r} twice, of which Python keeps the last; give each a "
                    f"name of its own, e.g. {key.value}_2"
                )
            names.add(key.value)
