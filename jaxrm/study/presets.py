"""The presets of a study: which worlds, arms, seeds and grids, where the config leaves them open."""

import dataclasses
from typing import Any

from jaxrm.config.fields import place, typed
from jaxrm.data import tasks
from jaxrm.errors import UserError
from jaxrm.study.arms import ARMS
from jaxrm.study.config import Study, axes, published

_MAIN: dict[str, Any] = {
    "size": "tiny",
    "worlds": tasks.TASKS,
    "biases": (1.0,),
    "arms": (
        "sft",
        "sft_chosen",
        "best_of_n_scalar",
        "best_of_n_seq2seq",
        "dpo",
        "ppo_scalar",
        "ppo_scalar_length_residual",
        "ppo_literal",
        "ppo_prefix",
        "ppo_soft",
    ),
    "seeds": (1, 2, 3, 4, 5),
    "kl_coefs": (0.02, 0.1, 0.5),
    "learning_rates": (3e-4, 1e-3),
    "dpo_betas": (0.1, 0.3),
}
_ONE_SETTING: dict[str, Any] = {"kl_coefs": (0.02,), "learning_rates": (1e-3,), "dpo_betas": (0.1,)}
_TWO_ARMS = ("sft", "ppo_scalar", "ppo_literal")
PRESETS: dict[str, dict[str, Any]] = {
    "main": _MAIN,
    "full": {**_MAIN, "arms": ARMS},
    "bias": {
        **_MAIN,
        **_ONE_SETTING,
        "worlds": ("safety", "summarize"),
        "biases": (0.0, 0.5, 1.0, 2.0, 4.0),
        "arms": _TWO_ARMS,
        "seeds": (1, 2, 3),
    },
    "small": {**_MAIN, **_ONE_SETTING, "size": "small", "arms": _TWO_ARMS, "seeds": (1, 2)},
    "smoke": {**_MAIN, **_ONE_SETTING, "worlds": tasks.TASKS[:1], "arms": _TWO_ARMS, "seeds": (1,)},
}


def apply_preset(config: Study) -> Study:
    """Return the study to run, in which no field of a preset is None.

    Raises:
      UserError: the published setting of an arm is not on its grid.
    """
    preset = PRESETS[config.preset]
    study = dataclasses.replace(config, **{name: preset[name] for name in preset if getattr(config, name) is None})
    if study.preset == "smoke":
        study = _shortened(study)
    for arm in study.arms or ():
        for (name, value), values in zip(published(study, arm), axes(study, arm).values(), strict=True):
            if value not in values:
                axis = {"ppo.kl_coef": "kl_coefs", "dpo.beta": "dpo_betas"}.get(name, "learning_rates")
                section = "dpo" if arm == "dpo" else "ppo" if name == "ppo.kl_coef" or "_" in arm else "imitation"
                raise UserError(
                    f"{place(config, axis)} has no {value:g}, which is the {name} of {arm} as published "
                    f"(config.{section}.{name}); required a grid that has it, "
                    f"e.g. {typed(config, axis, tuple(sorted((*values, value))))}"
                )
    return study


def _shortened(study: Study) -> Study:
    return dataclasses.replace(
        study,
        sft=_shorten(study.sft, num_steps=60),
        pairs=dataclasses.replace(study.pairs, pairs=dataclasses.replace(study.pairs.pairs, count=256)),
        rm_scalar=_shorten(study.rm_scalar, num_steps=8),
        rm_seq2seq=_shorten(study.rm_seq2seq, num_steps=8),
        imitation=_shorten(study.imitation, num_steps=4),
        dpo=_shorten(study.dpo, num_steps=4),
        best_of_n=_shorten(study.best_of_n, num_steps=1),
        ppo=_shorten(study.ppo, num_steps=4, evaluation=dataclasses.replace(study.ppo.evaluation, every=2)),
        evaluate=_shorten(study.evaluate),
    )


def _shorten(stage: Any, **changes: Any) -> Any:
    data = dataclasses.replace(stage.data, max_records=512, max_eval_records=64)
    return dataclasses.replace(stage, data=data, **changes)
