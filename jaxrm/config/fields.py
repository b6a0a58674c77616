"""What a config's fields are called and may hold, as a person would say it.

A config is a tree of frozen dataclasses, called sections. Its fields are ``bool``, ``int``, ``float``,
``str``, ``Literal[...]``, tuples of those or of sections, sections, and ``| None`` of each, or sections by name
(`jaxrm.config.named_sections`); nothing else, so that every config is hashable and can be written as JSON. Dotted names
start with ``config``: ``config.optimizer.lr``.

A field says its bounds once, where it is declared, and a section checks them when it is made:

    @dataclass(frozen=True)
    class OptimizerConfig:
        lr: float = bounded(2e-5, above(0), finite)

        def __post_init__(self) -> None:
            check(self)

What is wrong is named as the person knows it: ``OptimizerConfig.lr`` in Python, ``config.critic.optimizer.lr`` in what
was read from a file or typed (see `placed`).
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from jaxrm.config.field_types import annotations_of, as_text, is_section, kinds_of, type_name
from jaxrm.config.named_sections import NamedSections, class_of_named, fields_of, is_name
from jaxrm.errors import UserError

_MISSING = dataclasses.MISSING
ROOT_CONFIG = {"is_root_config": True}
"""``field(metadata=ROOT_CONFIG)``: see `is_root_config`."""
_BOUNDS = "bounds"
_place: ContextVar[tuple[type, str]] = ContextVar("place", default=(type(None), ""))
_EXAMPLES = {bool: True, int: 8, float: 0.5}


@dataclasses.dataclass(frozen=True)
class Bound:
    """What the values of a field are.

    Attributes:
      holds: whether a value is one of them.
      required: the same in words, after "it must be".
      example: one of them.
    """

    holds: Callable[[Any], bool]
    required: str
    example: Any


def at_least(least: float) -> Bound:
    """``least`` or more."""
    return Bound(lambda value: value >= least, f"at least {least}", least)


def at_most(most: float) -> Bound:
    """``most`` or less."""
    return Bound(lambda value: value <= most, f"at most {most}", most)


def above(limit: float) -> Bound:
    """More than ``limit``."""
    return Bound(lambda value: value > limit, f"above {limit}", limit + 1)


def below(limit: float) -> Bound:
    """Less than ``limit``."""
    return Bound(lambda value: value < limit, f"below {limit}", limit - 1)


def one_of(*choices: str) -> Bound:
    """One of several texts."""
    return Bound(lambda value: value in choices, f"one of {', '.join(choices)}", choices[0])


finite = Bound(math.isfinite, "finite", 1.0)


def bounded(default: Any, *bounds: Bound, meaning: str = "") -> Any:
    """A field of a dataclass with a default and with bounds that `check` looks after.

    Args:
      default: the default; where it is None, bounds do not concern None.
      bounds: all of them must hold.
      meaning: what None or a special value stands for, or what the number is a share of; ends the message.
    """
    return dataclasses.field(default=default, metadata={_BOUNDS: (bounds, meaning)})


def check(section: Any) -> None:
    """Refuse a value that is out of its field's bounds; a section's ``__post_init__`` calls it.

    A dict of named sections becomes a frozen mapping.

    Raises:
      UserError: naming the field.
    """
    annotations = annotations_of(type(section))
    for field in dataclasses.fields(section):
        value, annotation = getattr(section, field.name), annotations[field.name]
        kinds = kinds_of(annotation)
        choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
        if len(choices) > 0 and isinstance(value, str) and str not in kinds and value not in choices:
            raise wrong(section, field.name, type_name(annotation), field.default)
        if any(is_section(kind) for kind in kinds) and not any(type(value) is kind for kind in kinds):
            raise UserError(place(section, field.name), type(value).__name__, type_name(annotation))
        if class_of_named(annotation) is not None:
            object.__setattr__(section, field.name, _frozen(section, field.name, value, annotation))
        bounds, meaning = field.metadata.get(_BOUNDS, ((), ""))
        if value is None and type(None) in kinds:
            continue
        if not all(_holds(bound, value) for bound in bounds):
            required = " and ".join(bound.required for bound in bounds)
            required += f", or None{' for ' if meaning else ''}{meaning}" if type(None) in kinds else meaning
            example = bounds[0].example if field.default is None else field.default
            raise wrong(section, field.name, required, example)


def wrong(section: Any, name: str, required: str, example: Any) -> UserError:
    """Return the error for a field of a section whose value is not what is ``required``."""
    value = getattr(section, name)
    return UserError(place(section, name), repr(value), required, typed(section, name, example))


def place(section: Any, name: str = "") -> str:
    """A section, or a field of it, as the person knows it: ``OptimizerConfig.lr`` or ``config.optimizer.lr``."""
    cls, where = _place.get()
    where = where if cls is type(section) else type(section).__name__
    return f"{where}{'' if where == '--' else '.'}{name}" if name else where


def typed(section: Any, name: str, value: Any) -> str:
    """A value of a field of a section as the person gives it: ``lr=1e-5``, or ``--config.optimizer.lr=1e-5``."""
    if _place.get()[0] is not type(section):
        return f"{name}={value!r}"
    return f"--{place(section, name).removeprefix('--')}={as_text(value)}"


@contextmanager
def placed(cls: type, where: str) -> Iterator[None]:
    """Name the fields of a section of class ``cls`` by their place while one is made.

    Args:
      cls: the section's class; sections of other classes are named as in Python.
      where: the dotted name of the section, or ``--`` where a command has a flag for each of its fields.
    """
    token = _place.set((cls, where))
    try:
        yield
    finally:
        _place.reset(token)


def _frozen(section: Any, name: str, value: Any, annotation: Any) -> NamedSections:
    """Named sections as a section keeps them."""
    named = class_of_named(annotation)
    assert named is not None
    if not isinstance(value, Mapping):
        raise UserError(
            place(section, name), type(value).__name__, type_name(annotation), f"{{'a': {named.__name__}()}}"
        )
    for key, part in value.items():
        check_name(key, named, place(section, name))
        if type(part) is not named:
            raise UserError(f"{place(section, name)}.{key}", type(part).__name__, f"a {named.__name__}")
    return NamedSections(value)


def check_name(name: Any, section: type, where: str) -> None:
    """Refuse a name that a section of a class cannot have.

    Args:
      name: to be checked.
      section: class of the section.
      where: dotted name of the field that holds the sections.

    Raises:
      UserError: naming it.
    """
    if not is_name(name, section):
        required = f"an identifier and none of the fields of a section, {', '.join(fields_of(section))}"
        example = f"my_{name}" if f"{name}".isidentifier() else "my_rule"
        raise UserError(f"a name in {where}", repr(name), required, example)


def _holds(bound: Bound, value: Any) -> bool:
    try:
        return bool(bound.holds(value))
    except TypeError:  # not even of a type that can be compared
        return False


def is_root_config(field: dataclasses.Field) -> bool:
    """Tell whether a field's section is a config by itself, as a stage of a pipeline is."""
    return bool(field.metadata.get("is_root_config"))


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
    if class_of_named(kind) is not None:
        return f"set the fields of one, e.g. --{where}.NAME.{fields_of(args[1])[0]}=…"
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
