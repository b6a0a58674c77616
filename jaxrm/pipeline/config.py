"""A pipeline: several stages in one config, each a `StageConfig`, which run in order and build on each other.

    def get_config():
        return pipeline(
            run_dir="runs/quickstart",
            sft=SFT(...),
            pairs=SamplePairs(model=ModelSource(path="stage:sft"), ...),
            reward_model=Seq2SeqRM(data=DataConfig(path="stage:pairs/pairs.jsonl"), ...),
        )

A stage's fields are set as ``--config.sft.optimizer.lr=1e-4``. Any text of a stage may begin with ``stage:NAME``, which
stands for the folder of another stage's run. `jaxrm.pipeline.run` runs the stages.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrm.config import fields
from jaxrm.config.named_sections import NamedSections
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime.run_folder import OnExisting
from jaxrm.stage_config import StageConfig

PREFIX = "stage:"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What every pipeline has. The class of a config file's pipeline also has a field for each of its stages.

    Attributes:
      run_dir: folder of the pipeline; the run of a stage is in ``run_dir/NAME`` unless the stage says otherwise.
      seed: of every stage; with None each stage keeps its own.
      on_existing: a folder that already holds this pipeline is continued (``resume``), put aside and started anew
        (``restart``) or refused (``error``). A restart that was stopped is continued by the same command. A stage's
        own field does the same for its run.
      stages: names of the stages that run, in this order.
    """

    run_dir: str
    seed: int | None = fields.bounded(None, fields.at_least(0), fields.below(2**32))
    on_existing: OnExisting = "resume"
    stages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fields.check(self)
        names = stage_names(type(self))
        for name in self.stages:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                advice = f"did you mean {near[0]}?" if near else f"e.g. {fields.typed(self, 'stages', names)}"
                where = fields.place(self, "stages")
                raise UserError(f"{where} has {name!r}, but the stages are {', '.join(names)}; {advice}")
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise fields.wrong(self, "stages", "each stage to run, once", names)


@dataclass(frozen=True)
class PipelineStage:
    """A stage that is ready to run.

    Attributes:
      name: of the stage in the pipeline.
      experiment: its config, with folders and seed filled in.
      needs: the stages that it refers to, by the field that refers to them.
    """

    name: str
    experiment: Any
    needs: Mapping[str, str]

    @property
    def section(self) -> str:
        """Dotted name of its section of the config."""
        return option(self.name)


def pipeline(
    run_dir: str, *, seed: int | None = None, on_existing: OnExisting = "resume", **stages: StageConfig
) -> Pipeline:
    """Return the config of a pipeline whose stages run in the order given; for the arguments see `Pipeline`.

    Raises:
      UserError: where there is no stage, or what is given for one is no experiment.
    """
    own = [name.name for name in dataclasses.fields(Pipeline)]
    if not stages:
        raise UserError("pipeline() has no stage; give some, e.g. pipeline(run_dir, sft=SFT(...))")
    values: dict[str, StageConfig] = {}
    for name, stage in stages.items():
        if name in own:
            raise UserError(f"pipeline() has a stage called {name}, which means something else; call it otherwise")
        if not isinstance(stage, StageConfig):
            sort = type(stage).__name__
            raise UserError(f"the stage {name} of pipeline() is {sort}; required a stage, e.g. SFT(...)")
        values[name] = stage
    return _class_of(values)(run_dir=run_dir, seed=seed, on_existing=on_existing, stages=tuple(values), **values)


def stage_names(config: Any) -> tuple[str, ...]:
    """Return all the stages of a pipeline, or of the class of one, in the order of its config file."""
    return tuple(name.name for name in dataclasses.fields(config) if fields.is_root_config(name))


def resolve(config: Pipeline, stand_ins: Mapping[str, str] | None = None) -> dict[str, PipelineStage]:
    """Return all stages by name, with their folders and the pipeline's seed filled in.

    Args:
      config: the pipeline.
      stand_ins: folders by stage that ``stage:NAME`` stands for, in place of the folder of its run.

    Raises:
      UserError: a text refers to a stage that does not exist, or that runs later.
    """
    experiments: dict[str, StageConfig] = {name: getattr(config, name) for name in stage_names(config)}
    folders = {name: stage.run_dir or f"{config.run_dir.rstrip('/')}/{name}" for name, stage in experiments.items()}
    stages = {}
    for name, experiment in experiments.items():
        needs = {}
        for field_name, text in _references(experiment, option(name)):
            needs[field_name] = _referenced_stage(config, name, field_name, text)
        referenced = {**folders, **(stand_ins or {})}
        filled = dataclasses.replace(_with_folders(experiment, referenced), run_dir=folders[name])
        if config.seed is not None:
            filled = dataclasses.replace(filled, seed=config.seed)
        stages[name] = PipelineStage(name, filled, needs)
    return stages


def _class_of(stages: Mapping[str, StageConfig]) -> Any:
    """The class of a pipeline that has a field of its own for each stage."""
    own = [(name, type(stage), field(metadata=fields.ROOT_CONFIG)) for name, stage in stages.items()]
    return dataclasses.make_dataclass("Pipeline", own, bases=(Pipeline,), frozen=True, kw_only=True)


def _references(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every text ``stage:…`` in a tree of configs, with the dotted name of its field."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from _references(getattr(value, part.name), f"{name}.{part.name}")
    elif isinstance(value, NamedSections):
        for part_name, section in value.items():
            yield from _references(section, f"{name}.{part_name}")
    elif isinstance(value, tuple):
        for element in value:
            yield from _references(element, name)
    elif isinstance(value, str) and value.startswith(PREFIX):
        yield name, value


def _with_folders(value: Any, folders: Mapping[str, str]) -> Any:
    """The tree with the folder of the stage in place of every ``stage:NAME``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        filled = {name: _with_folders(part, folders) for name, part in parts.items()}
        return value if filled == parts else dataclasses.replace(value, **filled)
    if isinstance(value, NamedSections):
        return NamedSections({name: _with_folders(section, folders) for name, section in value.items()})
    if isinstance(value, tuple):
        return tuple(_with_folders(element, folders) for element in value)
    if isinstance(value, str) and value.startswith(PREFIX):
        stage, slash, rest = value.removeprefix(PREFIX).partition("/")
        return os.path.expanduser(folders[stage]) + slash + rest  # noqa: PTH111  # a Path would change the text
    return value


def _referenced_stage(config: Pipeline, name: str, field_name: str, text: str) -> str:
    """The stage that a field of the stage `name` refers to; refuses one that does not exist or runs no earlier."""
    stage, slash, rest = text.removeprefix(PREFIX).partition("/")
    example = f"--{field_name}={PREFIX}{{}}{slash}{rest}"
    problem = f"{field_name} is {text!r}"
    others = [other for other in stage_names(config) if other != name]
    if stage == name:
        advice = f", e.g. {example.format(others[0])}" if others else ""
        raise UserError(f"{problem}, the stage itself; refer to another one{advice}")
    if stage not in others:
        near = difflib.get_close_matches(stage, others, n=1)
        advice = f"did you mean {example.format(near[0])}?" if near else f"the stages are {', '.join((*others, name))}"
        raise UserError(f"{problem}, but there is no stage {stage!r}; {advice}")
    running = list(config.stages)
    if name in running and stage in running[running.index(name) :]:
        running.remove(stage)
        running.insert(running.index(name), stage)
        raise UserError(f"{problem}, which runs after {name}; put it first, e.g. {flag('stages')}={','.join(running)}")
    return stage
