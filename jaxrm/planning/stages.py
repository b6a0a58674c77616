"""The stages of a config that can be planned, with the shape of the model that each begins with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrm.errors import UserError, option
from jaxrm.models.build import ModelSource
from jaxrm.pipeline.config import PREFIX, Pipeline, stage_names
from jaxrm.stage_config import PLANNED, ModelStageConfig, StageConfig


def planned_stages(config: StageConfig | Pipeline, preset: str | None) -> dict[str, Any]:
    """The stages to plan by name; a config of one stage is named "".

    Args:
      config: of a stage or a pipeline.
      preset: public name of the model's shape, in place of ``config.model``; None keeps that.

    Raises:
      UserError: the stage, or no stage of the pipeline, can be planned.
    """
    if isinstance(config, StageConfig):
        if config.algorithm not in PLANNED:
            raise UserError(
                f"--config is a run of {config.algorithm}, which cannot be planned; those that can are "
                f"{', '.join(PLANNED)}, e.g. --config=ppo_tiny"
            )
        return {"": _with_preset(config, preset)}
    stages = {name: stage for name in config.stages if (stage := getattr(config, name)).algorithm in PLANNED}
    if not stages:
        raise UserError(f"{option('stages')} has none that can be planned; those are {', '.join(PLANNED)}")
    every = {name: getattr(config, name) for name in stage_names(config)}
    models = {name: stage.model for name, stage in every.items() if isinstance(stage, ModelStageConfig)}
    return {
        name: _with_preset(dataclasses.replace(stage, model=_initial_model(stage.model, models)), preset)
        for name, stage in stages.items()
    }


def _initial_model(model: ModelSource, models: Mapping[str, ModelSource]) -> ModelSource:
    """A stage's model, with ``stage:`` paths followed to the weights that the first of those stages begins with."""
    while model.path is not None and model.path.startswith(PREFIX):
        source = models[model.path.removeprefix(PREFIX)]
        model = dataclasses.replace(model, path=source.path, preset=source.preset)
    return model


def _with_preset(config: Any, preset: str | None) -> Any:
    if preset is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=None, adapter=None, preset=preset))
