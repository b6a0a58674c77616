"""A study: the same comparison for every arm, in every world, with every seed, as a list of ordinary runs.

A world is an embedded task, a synthetic task whose judge is exact. An arm is a way to make a policy
(`jaxrm.study.arms`). Every arm has a grid of settings, and every setting is run with every seed. So how a setting is
chosen is a reading of finished runs (`jaxrm.study.readings`), and costs none. `jaxrm.study.schedule` lists the runs,
`jaxrm.study.run_configs` builds their configs, and `jaxrm.study.run` runs them.
"""

import itertools
from dataclasses import dataclass, field
from typing import Literal

from jaxrm import stage_config
from jaxrm.config.fields import ROOT_CONFIG, above, at_least, at_most, bounded, check, place, typed, wrong
from jaxrm.data import tasks
from jaxrm.errors import UserError
from jaxrm.runtime.run_folder import OnExisting
from jaxrm.study.arms import check_arm, read_arm

SIZES = {"tiny": "lab-tiny", "small": "lab-small", "base": "lab-base"}
Setting = tuple[tuple[str, float], ...]
"""Values of the fields of an arm's grid, by dotted name."""
BEST = "best"
"""Name, in the place of a setting, of the checkpoint with the highest judge score of an arm and seed."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    A field that is None is as the preset says (`jaxrm.study.presets`). The stages are templates:
    `jaxrm.study.run_configs` fills in folders, models, data, seeds and settings. Their own values of KL coefficient,
    beta and learning rate are the setting that is called published, and lie on the grids.

    Attributes:
      run_dir: folder of the study.
      on_existing: a folder that already holds this study is continued (``resume``), put aside and started anew
        (``restart``) or refused (``error``). A restart that was stopped is continued by the same command.
      preset: which comparison: ``main``, a few arms; ``full``, all of them; ``bias``, annotators of growing bias;
        ``small``, two arms of a larger policy; ``smoke``, a trial of few steps.
      size: of the policy: ``tiny`` (0.36 M parameters), ``small`` (6 M) or ``base`` (31 M).
      worlds: embedded tasks.
      arms: of `jaxrm.study.arms.ARMS`; the kind of ``ppo_KIND`` may be a custom one (see
        `jaxrm.algorithms.reward_config`).
      biases: how many times its own bias the annotator of a world has, ascending; each makes a world of its own.
      max_notes: most notes of a prompt of ``summarize``, which makes it harder; None for 7.
      seeds: each has its own SFT policy, pairs and reward models.
      kl_coefs: KL coefficients of arms that rewards train, ascending; with ``learning_rates`` they are their grid.
      learning_rates: of these, of DPO, and of SFT on chosen responses or winners, ascending.
      dpo_betas: betas of DPO, ascending; with ``learning_rates`` they are its grid.
      blind_kl: largest KL from the SFT policy, nats a response, of a setting that is chosen by held-out reward.
      mechanism: world for which a page shows what two reward models pay for; None leaves it out.
      keep_policies: whether the parameters of arms stay when nothing needs them any more; about 10 MB each.
      workers: runs at once. None: one for each core, or one on an accelerator.
    """

    run_dir: str = "runs/study"
    on_existing: OnExisting = "resume"
    preset: Literal["main", "full", "bias", "small", "smoke"] = "main"
    size: Literal["tiny", "small", "base"] | None = None
    worlds: tuple[str, ...] | None = None
    arms: tuple[str, ...] | None = None
    biases: tuple[float, ...] | None = None
    max_notes: int | None = bounded(None, at_least(6), at_most(10))
    seeds: tuple[int, ...] | None = None
    kl_coefs: tuple[float, ...] | None = None
    learning_rates: tuple[float, ...] | None = None
    dpo_betas: tuple[float, ...] | None = None
    blind_kl: float = bounded(5.0, above(0))
    mechanism: str | None = "safety"
    keep_policies: bool = False
    workers: int | None = bounded(None, at_least(1))
    sft: stage_config.SFT = field(default_factory=stage_config.SFT, metadata=ROOT_CONFIG)
    pairs: stage_config.SamplePairs = field(default_factory=stage_config.SamplePairs, metadata=ROOT_CONFIG)
    rm_scalar: stage_config.ScalarRM = field(default_factory=stage_config.ScalarRM, metadata=ROOT_CONFIG)
    rm_seq2seq: stage_config.Seq2SeqRM = field(default_factory=stage_config.Seq2SeqRM, metadata=ROOT_CONFIG)
    imitation: stage_config.SFT = field(default_factory=stage_config.SFT, metadata=ROOT_CONFIG)
    dpo: stage_config.DPO = field(default_factory=stage_config.DPO, metadata=ROOT_CONFIG)
    best_of_n: stage_config.BestOfN = field(default_factory=stage_config.BestOfN, metadata=ROOT_CONFIG)
    ppo: stage_config.PPO = field(default_factory=stage_config.PPO, metadata=ROOT_CONFIG)
    evaluate: stage_config.Evaluate = field(default_factory=stage_config.Evaluate, metadata=ROOT_CONFIG)

    def __post_init__(self) -> None:
        check(self)
        for name in ("worlds", "arms", "seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise wrong(self, name, "each one once, at least one", _EXAMPLES[name])
        for world in (*(self.worlds or ()), *((self.mechanism,) if self.mechanism else ())):
            name = "worlds" if world in (self.worlds or ()) else "mechanism"
            if world not in tasks.TASKS:
                raise UserError(
                    f"{place(self, name)} has {world!r}; there are {', '.join(tasks.TASKS)}; "
                    f"e.g. {typed(self, name, _EXAMPLES['worlds'] if name == 'worlds' else 'safety')}"
                )
        for arm in self.arms or ():
            check_arm(arm, place(self, "arms"), typed(self, "arms", ("ppo_literal",)))
        if self.seeds is not None and min(self.seeds) < 0:
            raise wrong(self, "seeds", "none below 0", _EXAMPLES["seeds"])
        for name in ("kl_coefs", "learning_rates", "dpo_betas", "biases"):
            values = getattr(self, name)
            if values is None:
                continue
            is_low = bool(values) and (values[0] < 0 if name == "biases" else values[0] <= 0)
            if is_low or not values or list(values) != sorted(set(values)):
                least = "from 0 on" if name == "biases" else "above 0"
                raise wrong(self, name, f"numbers {least}, ascending", (0.02, 0.1))
        for name in ("ppo", "best_of_n", "evaluate"):
            for source in getattr(self, name).rewards:
                raise UserError(
                    f"{place(self, name)}.rewards has {source}, but arms say where rewards come from; leave it out, "
                    f"{typed(self, f'{name}.rewards.{source}', None)}, and choose among config.arms"
                )


_EXAMPLES = {"worlds": ("safety",), "arms": ("ppo_scalar", "ppo_literal"), "seeds": (1, 2, 3)}


def settings(study: Study, arm: str) -> list[Setting]:
    """The settings of an arm's grid, in order; one empty setting for an arm that has none.

    Args:
      study: from `jaxrm.study.presets.apply_preset`.
      arm: of the study.
    """
    fields = axes(study, arm)
    return [tuple(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def axes(study: Study, arm: str) -> dict[str, tuple[float, ...]]:
    """The fields of an arm's grid, by dotted name, each with its values."""
    rates = {"optimizer.lr": study.learning_rates or ()}
    if read_arm(arm) is not None:
        return {"ppo.kl_coef": study.kl_coefs or ()} | rates
    if arm == "dpo":
        return {"dpo.beta": study.dpo_betas or ()} | rates
    return rates if arm == "sft_chosen" or arm.startswith("rft_") else {}


def published(study: Study, arm: str) -> Setting:
    """The setting that an arm's template has."""
    template = study.dpo if arm == "dpo" else study.imitation if read_arm(arm) is None else study.ppo
    values = {
        "optimizer.lr": template.optimizer.lr,
        "ppo.kl_coef": study.ppo.ppo.kl_coef,
        "dpo.beta": study.dpo.dpo.beta,
    }
    return tuple((name, values[name]) for name in axes(study, arm))


def setting_name(setting: Setting) -> str:
    """A setting as the name of a folder: ``kl_coef=0.02,lr=0.001``; ``plain`` where there is none."""
    return ",".join(f"{name.rsplit('.', 1)[-1]}={value:g}" for name, value in setting) or "plain"
