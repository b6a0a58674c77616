"""Configs that were recorded before each stage had a config class of its own, as today's are written."""

from collections.abc import Mapping
from typing import Any

_FIELDS = {"algorithm", "answers", "scalar_rm", "dpo", "ppo"}  # of the one class that served all stages
_SINCE: Mapping[str, Any] = {
    "lora": {"rank": 0},
    "num_microbatches": 1,
    "advantage": "gae",
    "loss_aggregation": "token",
    "responses_per_prompt": 1,
    "function_workers": 0,
    "classifier": {"max_length": None, "template": None, "dtype": None, "quantize": None},
    "rewards": {},
    "weight": 1.0,
    "head": "zero",
    "edit_weight": 1.0,
    "early_end_penalty": 0.0,
    "annotator_bias": 1.0,
    "annotator_noise": 1.0,
    "prefix_coef": 0.0,
    "neighbor_coef": 0.0,
    "cached_attention": "auto",
    "vocabulary": "auto",
    "weights": "compute",
    "packing": False,
    "cache": "compute",
}
_RENAMED = {"answers": "evaluate", "along": "evaluate_checkpoints", "draw": "sampling_seed"}


def upgraded(recorded: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config with today's names, and without the sections that its stage does not have.

    A field that it lacks and that is None today was added since, and changes nothing. So were those of ``_SINCE``:
    runs before them computed with these values. So did those that recorded None where today's value cannot be None.

    Args:
      recorded: from ``run.json``, ``pipeline.json`` or ``study.json``; one of today passes unchanged.
      like: a config of the same class, as it is written today.
    """
    if set(recorded) >= _FIELDS:
        return _restricted(recorded, like)
    recorded = _without_nones(recorded, like)
    stages = {name: like.get(name) for name in recorded}
    return _added(recorded, like) | {
        name: upgraded(value, stage)
        if isinstance(value, Mapping) and isinstance(stage := stages[name], Mapping)
        else value
        for name, value in recorded.items()
    }


def _restricted(recorded: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    renamed = _without_nones({_RENAMED.get(name, name): value for name, value in recorded.items()}, like)
    both = {name: (value, like[name]) for name, value in renamed.items() if name in like}
    return _added(renamed, like) | {
        name: _restricted(value, today) if isinstance(value, Mapping) and isinstance(today, Mapping) else value
        for name, (value, today) in both.items()
    }


def _without_nones(recorded: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those of ``_SINCE`` that are None and cannot be None today, which `_added` gives a value."""
    return {
        name: value
        for name, value in recorded.items()
        if value is not None or name not in _SINCE or like.get(name) is None
    }


def _added(recorded: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    added: dict[str, Any] = {name: None for name, value in like.items() if value is None and name not in recorded}
    for name, since in _SINCE.items():
        if name in like and name not in recorded:
            added[name] = {**like[name], **since} if isinstance(since, Mapping) and since else since
    return added
