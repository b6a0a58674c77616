"""``config.*.FIELD``: a field of every stage of a pipeline or study that has it, set at once.

    python -m jaxrm.train --config=configs/quickstart.py --config.*.lora.rank=8 --config.sft.lora.rank=0

Stages that have no such field keep what they have. A name in ``config.*.rewards.NAME`` that no stage has is added to
every stage with rewards. The name of a stage in place of the star says more, and so goes first, wherever it stands on
the command line.
"""

from collections.abc import Iterable
from typing import Any

from jaxrm.config import field_names, field_types, fields
from jaxrm.config.named_sections import typed_names
from jaxrm.errors import UserError

PREFIX = "config.*."


def fields_of_stages(cls: Any, named: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """What each ``config.*.FIELD`` stands for.

    Args:
      cls: class of a config; one without stages has none of them.
      named: see `jaxrm.config.field_names.field_names`.

    Returns:
      By that name the types of the stages' fields, by their own dotted names.
    """
    stands_for: dict[str, dict[str, Any]] = {}
    for stage, stage_class in _stages(cls).items():
        for name, annotation in field_names.field_names(stage_class, f"config.{stage}", named).items():
            every = f"{PREFIX}{name.removeprefix(f'config.{stage}.')}"
            stands_for.setdefault(every, {})[name] = annotation
    return stands_for


def added_sections(arguments: Iterable[str], cls: Any, given: Iterable[str]) -> list[str]:
    """Named sections that ``config.*.FIELD.NAME`` adds to every stage with such a field: a name that no stage has.

    Args:
      arguments: of the command line, ``--config.*.rewards.length.weight=2``.
      cls: class of the config.
      given: dotted names of the sections that the config has, ``config.ppo.rewards.length``.

    Returns:
      Their dotted names in each stage.
    """
    fields_of_star: dict[str, list[str]] = {}
    classes = {}
    for name, section in field_names.named_fields(cls).items():
        stage, _, field = name.removeprefix("config.").partition(".")
        if stage in _stages(cls):
            fields_of_star.setdefault(f"{PREFIX}{field}", []).append(name)
            classes[f"{PREFIX}{field}"] = section
    sections, existing = [], set(given)
    for typed in typed_names(arguments, classes):
        star, _, name = typed.rpartition(".")
        everywhere = [f"{field}.{name}" for field in fields_of_star[star]]
        if existing.isdisjoint(everywhere):
            sections += everywhere
    return sections


def unknown_field(name: str, cls: type, file: str) -> UserError:
    """The error for a ``config.*.FIELD`` that no stage has.

    Args:
      name: as it was typed.
      cls: class of the config.
      file: that gave it.
    """
    field, names = name.removeprefix(PREFIX), list(fields_of_stages(cls))
    if not names:
        return UserError(
            f"{name} is a field of every stage of a pipeline, but {file} has no stages; give --config.{field}=…, or a "
            "pipeline, e.g. --config=configs/quickstart.py"
        )
    inside = [known for known in names if known.startswith(f"{name}.")]
    if inside:
        return UserError(f"{name} is a section; set its fields, e.g. --{inside[0]}=…")
    advice = field_names.did_you_mean(f"--{name}", [f"--{known}" for known in names]) or "--help lists the fields"
    return UserError(f"{name} is no field of any stage, which are {', '.join(_stages(cls))}; {advice}")


def help_lines(cls: type) -> list[str]:
    """What ``--help`` says of it; nothing for a config without stages."""
    if not _stages(cls):
        return []
    return ["--config.*.FIELD=value sets a field in every stage that has it; that of a stage by its name goes first."]


def _stages(cls: Any) -> dict[str, type]:
    annotations = field_types.annotations_of(cls)
    return {name: annotations[name] for name, field in cls.__dataclass_fields__.items() if fields.is_root_config(field)}
