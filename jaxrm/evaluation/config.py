"""The sections of a config that say how a policy or a reward model is evaluated."""

from dataclasses import dataclass, field

from jaxrm.config.fields import at_least, bounded, check, wrong
from jaxrm.models.sampling import SamplingConfig


def _greedy() -> SamplingConfig:
    return SamplingConfig(max_new_tokens=64, temperature=0.0)


@dataclass(frozen=True)
class JudgeConfig:
    """Judgment of responses.

    Attributes:
      judge: embedded task (``task:safety``) whose exact judge scores the responses; None takes that of the data.
    """

    judge: str | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out data while a policy is trained.

    Attributes:
      every: updates, in PPO rollouts, between evaluations; the first and the last parameters are always evaluated.
      samples: responses to held-out prompts that are generated when training ends, in PPO at every evaluation.
      sampling: how.
    """

    every: int = bounded(100, at_least(1))
    samples: int = bounded(3, at_least(0))
    sampling: SamplingConfig = field(default_factory=_greedy)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class JudgedEvaluationConfig(EvaluationConfig):
    """The same, with a judge.

    Attributes:
      judge: embedded task (``task:safety``) whose exact judge scores the responses; None takes that of the data.
    """

    judge: str | None = None


@dataclass(frozen=True)
class RankingEvaluationConfig:
    """Evaluation of a scalar reward model on held-out pairs.

    Attributes:
      every: updates between evaluations; the first and the last parameters are always evaluated.
      judge: embedded task (``task:safety``) whose exact judge the rewards are compared with.
    """

    every: int = bounded(100, at_least(1))
    judge: str | None = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class CorrectionEvaluationConfig(EvaluationConfig):
    """Evaluation of a seq2seq reward model on held-out pairs.

    Attributes:
      samples: corrections that are shown when training ends.
      sampling: ``max_new_tokens`` of a correction, which is greedy.
      corrections: held-out pairs whose two responses are corrected when training ends; 0 for none.
      judge: embedded task (``task:safety``) whose exact judge says what corrections gain.
    """

    corrections: int = bounded(64, at_least(0))
    judge: str | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """Which prompts a policy answers, and how.

    Attributes:
      splits: ``heldout``, the held-out prompts of ``data``; of an embedded task also the others of
        `jaxrm.data.tasks.SPLITS`, such as ``test`` and ``test_ood``.
      decodings: ``sampled``, as ``rollout.sampling`` says, and ``greedy``.
      best_of: responses that are drawn to each prompt and of which ``reward`` chooses the best; greedily there is but
        one.
      sampling_seed: random numbers of the answers: policies that are compared need different ones, lest they share
        their luck.
      reference: folder of the run that the KL is measured to; None measures none.
      evaluate_checkpoints: whether the first split is also answered, sampled, by the reference and with every
        checkpoint that is left of the policy's run, which shows what training did to the policy on the way.
      token_rewards: answers of each split and decoding that are kept with their token rewards, where there are any.
    """

    splits: tuple[str, ...] = ("heldout",)
    decodings: tuple[str, ...] = ("sampled", "greedy")
    best_of: int = bounded(1, at_least(1))
    sampling_seed: int = bounded(0, at_least(0))
    reference: str | None = None
    evaluate_checkpoints: bool = False
    token_rewards: int = bounded(8, at_least(0))

    def __post_init__(self) -> None:
        check(self)
        for name in ("splits", "decodings"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise wrong(self, name, "each one once, at least one", getattr(EvaluateConfig, name))
        if not set(self.decodings) <= {"sampled", "greedy"}:
            raise wrong(self, "decodings", "sampled, greedy or both", EvaluateConfig.decodings)
