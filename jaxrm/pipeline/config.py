"""Several stages in one config, each an `Experiment`, that run one after another and build on each other.

    def get_config():
        return pipeline(
            run_dir="runs/quickstart",
            sft=Experiment(algorithm="sft", ...),
            pairs=Experiment(algorithm="sample_pairs", model=ModelSource(path="stage:sft"), ...),
            reward_model=Experiment(data=DataConfig(path="stage:pairs/pairs.jsonl"), ...),
        )

A stage's fields are set as ``--config.sft.optimizer.lr=1e-4``. Any of its texts may start with ``stage:NAME``, which
stands for the folder of another stage's run. `jaxrm.pipeline.run` runs them.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrm.config import fields
from jaxrm.errors import UserError, flag, option
from jaxrm.experiment import Experiment
from jaxrm.runtime.run_folder import OnExisting

PREFIX = "stage:"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What every pipeline has; the class of a config file's pipeline has a field for each of its stages too.

    Attributes:
      run_dir: folder of the pipeline; the run of a stage is in ``run_dir/NAME`` unless the stage says otherwise.
      seed: of every stage; None leaves each its own.
      on_existing: a folder that already holds this pipeline is continued (``resume``), put aside and started anew
        (``restart``) or refused (``error``). That of a stage says the same of its own run.
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
class Stage:
    """A stage as it runs.

    Attributes:
      name: what the pipeline calls it.
      experiment: its config, with folders and seed filled in.
      needs: the stages that it refers to, by the field that does.
    """

    name: str
    experiment: Experiment
    needs: Mapping[str, str]

    @property
    def where(self) -> str:
        """Dotted name of its section."""
        return f"{option(self.name)}"


def pipeline(
    run_dir: str, *, seed: int | None = None, on_existing: OnExisting = "resume", **stages: Experiment
) -> Pipeline:
    """Return the config of a pipeline whose stages run in the order given; for the arguments see `Pipeline`.

    Raises:
      UserError: where there is no stage, or what is given for one is no experiment.
    """
    own = [name.name for name in dataclasses.fields(Pipeline)]
    if not stages:
        raise UserError("pipeline() has no stage; give some, e.g. pipeline(run_dir, sft=Experiment(...))")
    values: dict[str, Experiment] = {}
    for name, stage in stages.items():
        if name in own:
            raise UserError(f"pipeline() has a stage called {name}, which means something else; call it otherwise")
        if not isinstance(stage, Experiment):
            raise UserError(f"the stage {name} of pipeline() is {type(stage).__name__}; required Experiment")
        values[name] = stage
    return _class_of(tuple(values))(run_dir=run_dir, seed=seed, on_existing=on_existing, stages=tuple(values), **values)


def stage_names(config: Any) -> tuple[str, ...]:
    """Return all the stages of a pipeline, or of the class of one, in the order of its config file."""
    return tuple(name.name for name in dataclasses.fields(config) if fields.is_root_config(name))


def resolve(config: Pipeline) -> dict[str, Stage]:
    """Return all stages by name, with their folders and the pipeline's seed filled in.

    Raises:
      UserError: a text refers to a stage that is not there, or that runs later.
    """
    names = stage_names(config)
    given: dict[str, Experiment] = {name: getattr(config, name) for name in names}
    folders = {name: stage.run_dir or _join(config.run_dir, name) for name, stage in given.items()}
    stages = {}
    for name, stage in given.items():
        needs: dict[str, str] = {}

        def folder_of(text: str, where: str, name: str = name, needs: dict[str, str] = needs) -> str:
            other, slash, rest = text.removeprefix(PREFIX).partition("/")
            _check_reference(config, name, other, f"{where} is {text!r}", f"--{where}={PREFIX}{{}}{slash}{rest}")
            needs[where] = other
            return os.path.expanduser(folders[other]) + slash + rest  # noqa: PTH111  # as it is written, beside that

        where = f"{option(name)}"
        changed = {"run_dir": folders[name]} | ({} if config.seed is None else {"seed": config.seed})
        filled = dataclasses.replace(_filled(stage, where, folder_of), **changed)
        stages[name] = Stage(name, filled, needs)
    return stages


def _class_of(names: tuple[str, ...]) -> Any:
    stages = [(name, Experiment, field(metadata=fields.ROOT_CONFIG)) for name in names]
    return dataclasses.make_dataclass("Pipeline", stages, bases=(Pipeline,), frozen=True, kw_only=True)


def _join(run_dir: str, name: str) -> str:
    return f"{run_dir.rstrip('/')}/{name}"


def _filled(value: Any, where: str, folder_of: Callable[[str, str], str]) -> Any:
    """The value with every text ``stage:…`` in it replaced."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {name.name: getattr(value, name.name) for name in dataclasses.fields(value)}
        filled = {name: _filled(part, f"{where}.{name}", folder_of) for name, part in held.items()}
        return value if filled == held else dataclasses.replace(value, **filled)
    if isinstance(value, tuple):
        return tuple(_filled(part, where, folder_of) for part in value)
    return folder_of(value, where) if isinstance(value, str) and value.startswith(PREFIX) else value


def _check_reference(config: Pipeline, name: str, other: str, found: str, typed: str) -> None:
    """Refuse a reference of the stage `name` to one that is not there, or that runs no earlier."""
    names = [known for known in stage_names(config) if known != name]
    if other == name:
        raise UserError(
            f"{found}, the stage itself; refer to another one" + f", e.g. {typed.format(names[0])}" * bool(names)
        )
    if other not in names:
        near = difflib.get_close_matches(other, names, n=1)
        advice = f"did you mean {typed.format(near[0])}?" if near else "the stages are " + ", ".join((*names, name))
        raise UserError(f"{found}, but there is no stage {other!r}; {advice}")
    running = list(config.stages)
    if name in running and other in running[running.index(name) :]:
        running.remove(other)
        running.insert(running.index(name), other)
        raise UserError(f"{found}, which runs after {name}; put it first, e.g. {flag('stages')}={','.join(running)}")
