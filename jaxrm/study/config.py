"""A study: the same comparison for every arm, in every world, with every seed, as a list of ordinary runs.

A world is an embedded task, a synthetic task whose judge is exact. An arm is a way to train a policy: ``sft`` (where
all start), ``sft_chosen``, ``best_of_n_scalar``, ``best_of_n_seq2seq``, ``rft_scalar``, ``rft_seq2seq``, ``dpo`` and
``ppo_KIND`` for each kind of token reward that a model gives, and `RTO`. `jaxrm.study.schedule` lists the runs, given
the scores of those that are done: settings are chosen alike for each arm and world, on prompts and seeds of their own,
and only then do the runs of the final seeds start. `jaxrm.study.run` runs them.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrm import stage_config
from jaxrm.algorithms.reward_config import check_kind
from jaxrm.config.fields import ROOT_CONFIG, at_least, bounded, check, place, typed, wrong
from jaxrm.data import tasks
from jaxrm.errors import UserError
from jaxrm.ops.reward_kinds import is_custom, names_for
from jaxrm.runtime.run_folder import OnExisting

PPO = "ppo_"
RTO = "ppo_rto"
"""PPO with the sum of the kinds ``scalar`` and ``dpo`` (RTO, arXiv 2404.18922)."""
ARMS = (
    "sft",
    "sft_chosen",
    "best_of_n_scalar",
    "best_of_n_seq2seq",
    "rft_scalar",
    "rft_seq2seq",
    "dpo",
    *(f"{PPO}{kind}" for kind in (*names_for("scalar"), *names_for("seq2seq"), *names_for("dpo"))),
    RTO,
)
# What an ordinary study leaves out: kinds that came later than its published tables.
OPTIONAL_ARMS = ("ppo_value_difference", "ppo_edit_aligned", "ppo_dpo", RTO)
DEFAULT_ARMS = tuple(arm for arm in ARMS if arm not in OPTIONAL_ARMS)
SIZES = {"tiny": "lab-tiny", "small": "lab-small", "base": "lab-base"}
_SMOKE_ARMS = ("sft", "sft_chosen", "dpo", "ppo_scalar", "ppo_literal")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    The stages are templates: `jaxrm.study.schedule` fills in folders, models, data, seeds and what is tuned.

    Attributes:
      run_dir: folder of the study.
      on_existing: a folder that already holds this study is continued (``resume``), put aside and started anew
        (``restart``) or refused (``error``). A restart that was stopped is continued by the same command.
      preset: ``full`` leaves the config as it is; ``smoke`` reduces it to one world, two seeds, few arms and few steps.
      size: of the policy: ``tiny`` (0.36 M parameters), ``small`` (6 M) or ``base`` (31 M).
      worlds: embedded tasks.
      arms: of `ARMS`, by default all but `OPTIONAL_ARMS`; the kind of ``ppo_KIND`` may be a custom one (see
        `jaxrm.algorithms.reward_config`).
      seeds: seeds of the final runs; each seed has its own SFT policy, pairs and reward models.
      selection_seeds: seeds of the runs that settings are chosen with.
      kl_coefs: KL coefficients of PPO, ascending; with ``learning_rates`` they are its grid.
      learning_rates: of PPO, DPO and of SFT on chosen responses or winners, ascending.
      dpo_betas: betas of DPO, ascending; with ``learning_rates`` they are its grid.
      extensions: most values tried beyond either end of a grid's axis while the best setting lies at that end.
      tolerance: judge scores that are no further apart count as equal when settings are chosen (see
        `jaxrm.study.tuning.choose`).
      workers: runs at once. None: one for each core, or one on an accelerator.
    """

    run_dir: str = "runs/study"
    on_existing: OnExisting = "resume"
    preset: Literal["full", "smoke"] = "full"
    size: Literal["tiny", "small", "base"] = "tiny"
    worlds: tuple[str, ...] = tasks.TASKS
    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    selection_seeds: tuple[int, ...] = (1001,)
    kl_coefs: tuple[float, ...] = (0.05, 0.2)
    learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    dpo_betas: tuple[float, ...] = (0.1, 0.3)
    extensions: int = bounded(3, at_least(0))
    tolerance: float = 0.01
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
        for name, known in (("worlds", tasks.TASKS), ("arms", ARMS)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise wrong(self, name, "each one once, at least one", known)
            for value in values:
                if value not in known and not (name == "arms" and is_custom(value) and value.startswith(PPO)):
                    near = difflib.get_close_matches(value, known, n=1)
                    meant = f"; did you mean {near[0]}?" if near else ""
                    raise UserError(f"{place(self, name)} has {value!r}; there are {', '.join(known)}{meant}")
                if value.startswith(PPO) and value != RTO:
                    check_kind(value.removeprefix(PPO), place(self, "arms"), typed(self, "arms", ("ppo_literal",)))
        for name in ("ppo", "best_of_n", "evaluate"):
            for source in getattr(self, name).rewards:
                raise UserError(
                    f"{place(self, name)}.rewards has {source}, but arms say where rewards come from; leave it out, "
                    f"{typed(self, f'{name}.rewards.{source}', None)}, and choose among config.arms"
                )
        for name in ("seeds", "selection_seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < 0:
                raise wrong(self, name, "each once, at least one, none below 0", (1, 2, 3))
        both = sorted(set(self.seeds) & set(self.selection_seeds))
        if both:
            required = f"seeds that settings are not chosen with, not {both[0]}"
            raise wrong(self, "seeds", required, (1, 2, 3))
        for name in ("kl_coefs", "learning_rates", "dpo_betas"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)) or values[0] <= 0:
                raise wrong(self, name, "numbers above 0, ascending", (0.05, 0.2))


def apply_preset(study: Study) -> Study:
    """Return the study to run: ``config.preset`` applied."""
    if study.preset == "full":
        return study
    return dataclasses.replace(
        study,
        worlds=study.worlds[:1],
        arms=tuple(arm for arm in study.arms if arm in _SMOKE_ARMS or arm not in ARMS) or study.arms[:1],
        seeds=study.seeds[:2],
        selection_seeds=study.selection_seeds[:1],
        kl_coefs=study.kl_coefs[:1],
        learning_rates=study.learning_rates[-1:],
        dpo_betas=study.dpo_betas[:1],
        extensions=0,
        sft=_shorten(study.sft, num_steps=60),
        pairs=dataclasses.replace(study.pairs, pairs=dataclasses.replace(study.pairs.pairs, count=256)),
        rm_scalar=_shorten(study.rm_scalar, num_steps=8),
        rm_seq2seq=_shorten(study.rm_seq2seq, num_steps=8),
        imitation=_shorten(study.imitation, num_steps=4),
        dpo=_shorten(study.dpo, num_steps=4),
        best_of_n=_shorten(study.best_of_n, num_steps=1),
        ppo=_shorten(study.ppo, num_steps=2),
        evaluate=_shorten(study.evaluate),
    )


def axes(study: Study, arm: str) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """The fields that are tuned for an arm, by dotted name, each with the values of its grid."""
    rate = ("optimizer.lr", study.learning_rates)
    if arm.startswith(PPO):
        return (("ppo.kl_coef", study.kl_coefs), rate)
    if arm == "dpo":
        return (("dpo.beta", study.dpo_betas), rate)
    return (rate,) if arm == "sft_chosen" or arm.startswith("rft_") else ()


def _shorten(stage: Any, **changes: Any) -> Any:
    data = dataclasses.replace(stage.data, max_records=512, max_eval_records=64)
    return dataclasses.replace(stage, data=data, **changes)
