"""The arms of a study: ways to make a policy, by name.

``sft`` is where all start. ``sft_chosen`` imitates the chosen responses of the pairs, and ``dpo`` learns from the
pairs. ``best_of_n_…`` takes the best of several answers by a reward model, and ``rft_…`` imitates such winners.

Names of arms that reinforcement learning trains say how: ``ALGORITHM_KIND``. The algorithm is ``ppo``, ``rloo`` or
``grpo``, or ``ppo_lora``, PPO with adapters in place of all weights, of the reward models too. The kind is one of
`jaxrm.ops.reward_kinds.KINDS` or a custom one. ``ppo_rto`` has two kinds.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxrm.algorithms.reward_config import check_kind
from jaxrm.errors import UserError
from jaxrm.ops.reward_kinds import is_custom, names_for

BASELINE, FAIR_BASELINE, DEFAULT = "ppo_scalar", "ppo_scalar_length_residual", "ppo_literal"
RTO = "ppo_rto"
"""PPO with the sum of the kinds ``scalar`` and ``dpo`` (RTO, arXiv 2404.18922)."""
_RTO_WEIGHTS = {"scalar": 1.0, "dpo": 0.2}  # jaxrm choice: with 1, dpo taught to refuse (configs/README.md)
_ALGORITHMS = {"ppo_lora": ("gae", True), "ppo": ("gae", False), "rloo": ("rloo", False), "grpo": ("grpo", False)}
RESPONSES_PER_PROMPT = 4
"""Responses to a prompt of the algorithms that compare them with each other (jaxrm choice)."""

OTHERS = ("sft", "sft_chosen", "best_of_n_scalar", "best_of_n_seq2seq", "rft_scalar", "rft_seq2seq", "dpo")
"""The arms without reinforcement learning."""
ARMS = (
    *OTHERS,
    *(f"ppo_{kind}" for kind in (*names_for("scalar"), *names_for("seq2seq"), *names_for("dpo"))),
    RTO,
    *(f"{algorithm}_{kind}" for algorithm in ("rloo", "grpo", "ppo_lora") for kind in ("scalar", "literal")),
)
"""Every arm, in the order of tables; custom kinds are not among them."""


@dataclass(frozen=True)
class TrainedByRewards:
    """How reinforcement learning trains an arm.

    Attributes:
      advantage: as in `jaxrm.algorithms.ppo_config.PPOConfig`.
      weights: the kinds of its token rewards, each with its weight in the sum.
      has_adapters: whether adapters are trained in place of all weights.
    """

    advantage: str
    weights: Mapping[str, float]
    has_adapters: bool

    @property
    def sources(self) -> dict[str, str]:
        """The run that gives the rewards of each kind."""
        return {kind: f"rm_{_source_of(kind)}{'_lora' if self.has_adapters else ''}" for kind in self.weights}


def _source_of(kind: str) -> str:
    return next((source for source in ("scalar", "dpo") if kind in names_for(source)), "seq2seq")


def read_arm(arm: str) -> TrainedByRewards | None:
    """How rewards train an arm; None for an arm without reinforcement learning."""
    if arm == RTO:
        return TrainedByRewards("gae", MappingProxyType(_RTO_WEIGHTS), False)
    for prefix, (advantage, has_adapters) in _ALGORITHMS.items():
        if arm.startswith(f"{prefix}_"):
            kind = arm.removeprefix(f"{prefix}_")
            return TrainedByRewards(advantage, MappingProxyType({kind: 1.0}), has_adapters)
    return None


def check_arm(arm: str, place: str, example: str) -> None:
    """Refuse a name that is no arm's.

    Args:
      arm: the name.
      place: field that has it, for the message.
      example: what to type instead.

    Raises:
      UserError: with the arms that there are.
    """
    trained = read_arm(arm)
    if trained is not None and any(map(is_custom, trained.weights)):
        for kind in trained.weights:
            check_kind(kind, place, example)
    elif arm not in ARMS:
        near = difflib.get_close_matches(arm, ARMS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{place} has {arm!r}; there are {', '.join(ARMS)}{meant}")


def folder_name(arm: str) -> str:
    """An arm as the name of a folder, and in the results."""
    return arm.replace(":", "-")


def in_order(arms: "set[str] | list[str] | tuple[str, ...]") -> list[str]:
    """Arms in the order of `ARMS`, then others by name."""
    return sorted(set(arms), key=lambda arm: (ARMS.index(arm) if arm in ARMS else len(ARMS), arm))
