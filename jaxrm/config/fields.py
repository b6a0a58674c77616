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
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeGuard, Union

from jaxrm.config.named_sections import NamedSections, class_of_named, fields_of, is_name, typed_names
from jaxrm.errors import UserError

_MISSING = dataclasses.MISSING
_SYNONYMS = {
    "lr": ("optimizer.lr",),
    "learning_rate": ("optimizer.lr",),
    "weight_decay": ("optimizer.weight_decay",),
    "wd": ("optimizer.weight_decay",),
    "warmup_ratio": ("optimizer.warmup",),
    "warmup_steps": ("optimizer.warmup",),
    "max_grad_norm": ("optimizer.clip_norm",),
    "grad_clip": ("optimizer.clip_norm",),
    "epochs": ("num_epochs",),
    "num_train_epochs": ("num_epochs",),
    "steps": ("num_steps",),
    "max_steps": ("num_steps",),
    "train_steps": ("num_steps",),
    "grad_accum": ("num_microbatches",),
    "gradient_accumulation_steps": ("num_microbatches",),
    "accumulation_steps": ("num_microbatches",),
    "batch_size": ("data.batch_size",),
    "train_batch_size": ("data.batch_size",),
    "per_device_train_batch_size": ("data.batch_size",),
    "max_len": ("data.max_length",),
    "max_length": ("data.max_length",),
    "seq_len": ("data.max_length",),
    "max_seq_length": ("data.max_length",),
    "dataset": ("data.path",),
    "model_name": ("model.path",),
    "output_dir": ("run_dir",),
    "temperature": ("rollout.sampling.temperature", "pairs.sampling.temperature", "evaluation.sampling.temperature"),
    "max_new_tokens": (
        "rollout.sampling.max_new_tokens",
        "pairs.sampling.max_new_tokens",
        "evaluation.sampling.max_new_tokens",
    ),
    "beta": ("ppo.kl_coef", "dpo.beta"),
    "kl_beta": ("ppo.kl_coef", "dpo.beta"),
    "kl_coef": ("ppo.kl_coef",),
    "cliprange": ("ppo.clip",),
    "clip_range": ("ppo.clip",),
    "epsilon": ("ppo.clip",),
    "epsilon_high": ("ppo.clip_high",),
    "loss_type": ("ppo.loss_aggregation",),
    "advantage_estimator": ("ppo.advantage",),
    "num_generations": ("rollout.responses_per_prompt",),
    "gamma": ("ppo.discount",),
    "lam": ("ppo.gae_lambda",),
}  # what others call a field, only used for hints; the first that the config has is meant
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


def annotations_of(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, with string annotations resolved."""
    return _annotations_of(cls)


@functools.cache
def _annotations_of(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_names(cls: type, where: str = "config", named: Iterable[str] = ()) -> dict[str, Any]:
    """Return the type of every field that can be set, by dotted name.

    Fields of a section that may be None are among them, and so is that section (None switches it off).

    Args:
      cls: a frozen dataclass.
      where: its dotted name.
      named: dotted names of the named sections that there are, ``config.rewards.length``; None takes such a one away.
    """
    names: dict[str, Any] = {}
    for name, annotation in annotations_of(cls).items():
        section = section_of(annotation)
        named_class = class_of_named(annotation)
        if named_class is not None:
            for dotted in named:
                if dotted.rpartition(".")[0] == f"{where}.{name}":
                    names |= {dotted: named_class | None, **field_names(named_class, dotted)}
            continue
        if section is None or type(None) in kinds_of(annotation):
            names[f"{where}.{name}"] = annotation
        if section is not None:
            names |= field_names(section, f"{where}.{name}", named)
    return names


def named_fields(cls: type, where: str = "config") -> dict[str, type]:
    """Return the fields that hold named sections, by dotted name, with the class of their sections."""
    by_name: dict[str, type] = {}
    for name, annotation in annotations_of(cls).items():
        named_class, section = class_of_named(annotation), section_of(annotation)
        if named_class is not None:
            by_name[f"{where}.{name}"] = named_class
        elif section is not None:
            by_name |= named_fields(section, f"{where}.{name}")
    return by_name


def names_given(config: Any, where: str = "config") -> list[str]:
    """Return the named sections that a config has, by dotted name."""
    given = []
    for field in named_fields(type(config), where):
        value = value_at(config, field.removeprefix(f"{where}."))
        given += [f"{field}.{name}" for name in value or ()]
    return given


def value_at(config: Any, field: str) -> Any:
    """The value of a field by dotted name; None where its section is absent."""
    for name in field.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return config


def is_root_config(field: dataclasses.Field) -> bool:
    """Tell whether a field's section is a config by itself, as a stage of a pipeline is."""
    return bool(field.metadata.get("is_root_config"))


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


def unknown_field(name: str, cls: type, where: str = "config") -> UserError:
    """Return the error for a field called `name`, with the field that was probably meant.

    A class on the way there may know more: ``explain_unknown(rest of the name)`` then ends the message.

    Args:
      name: the dotted name.
      cls: the dataclass at the top.
      where: its dotted name.
    """
    named = named_fields(cls, where)
    known = list(field_names(cls, where, typed_names([f"--{name}="], named)))
    for field, named_class in named.items():
        if name == field or (name.startswith(f"{field}.") and not any(k.startswith(f"{field}.") for k in known)):
            own = fields_of(named_class)
            return UserError(
                f"{name} is no field; {field} holds sections {named_class.__name__} by name, an identifier that is "
                f"none of their fields {', '.join(own)}; e.g. --{field}.NAME.{own[0]}=…"
            )
    inside = [k for k in known if k.startswith(f"{name}.")]
    if inside:
        return UserError(f"{name} is a section; set its fields, e.g. --{inside[0]}=…")
    section: type | None = cls
    parts = name.removeprefix(f"{where}.").split(".")
    for i, part in enumerate(parts):
        explain = getattr(section, "explain_unknown", None)
        explained = explain(".".join(parts[i:])) if explain is not None else None
        if explained is not None:
            return UserError(f"{name} {explained}")
        section = section_of(annotations_of(section).get(part)) if section is not None else None
    advice = did_you_mean(f"--{name}", [f"--{field}" for field in known]) or "--help lists the fields"
    return UserError(f"{name} is no field of the config; {advice}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?`` with the `known` name nearest to a mistyped `name`, or an empty string.

    In dotted names the last part counts most, so that ``config.seeed`` finds ``config.sft.seed``. What other libraries
    call a field is known too: ``config.learning_rate`` finds ``config.optimizer.lr``.
    """
    known = list(known)
    for meant in _SYNONYMS.get(name.rsplit(".", 1)[-1].lstrip("-"), ()):
        places = [place for place in known if place.endswith(f".{meant}")]
        if places:  # in a section, or a stage of a pipeline, its own field is meant
            nearest = max(places, key=lambda place: (_shared_parts(name, place), -place.count(".")))
            return f"did you mean {nearest}?"
    whole = {_without_prefix(k): k for k in known}
    last_parts = {k: k.rsplit(".", 1)[-1] for k in whole}
    name = _without_prefix(name)
    near_parts = difflib.get_close_matches(name.rsplit(".", 1)[-1], last_parts.values(), n=1, cutoff=0.7)
    close = difflib.get_close_matches(name, [k for k in whole if last_parts[k] in near_parts], n=1, cutoff=0.0)
    close = close or difflib.get_close_matches(name, whole, n=1, cutoff=0.75)
    return f"did you mean {whole[close[0]]}?" if close else ""


def _shared_parts(a: str, b: str) -> int:
    """How many parts two dotted names have in common at their beginning."""
    is_same = [x == y for x, y in zip(a.split("."), b.split("."), strict=False)]
    return [*is_same, False].index(False)


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
        section, named_class = section_of(annotation), class_of_named(annotation)
        if named_class is not None:
            lines.append(f"{where}.{name}.NAME.{fields_of(named_class)[0]}=…  ({type_name(annotation)})")
            for key, part in ({} if value is _MISSING else value).items():
                lines += describe(named_class, part, f"{where}.{name}.{key}")
            continue
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
