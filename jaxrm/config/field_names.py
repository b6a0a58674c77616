"""The dotted names of a config's fields: all there are, the one that was meant, and the lines of --help."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxrm.config.field_types import annotations_of, as_text, kinds_of, section_of, type_name
from jaxrm.config.named_sections import class_of_named, fields_of, typed_names
from jaxrm.errors import UserError

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
            for key, part in ({} if value is dataclasses.MISSING else value).items():
                lines += describe(named_class, part, f"{where}.{name}.{key}")
            continue
        if section is None or value is None:
            shown = "(required)" if value is dataclasses.MISSING else as_text(value)
            lines.append(f"{where}.{name}={shown}  ({type_name(annotation)})")
        if section is not None:
            lines += describe(section, None if value is dataclasses.MISSING else value, f"{where}.{name}")
    return lines


def _value_or_default(cls: Any, config: Any, name: str) -> Any:
    if config is not None:
        return getattr(config, name)
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
