"""The results of a study that may be unfinished, in memory: policies with their answers, and reward models."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxrm.study.arms import in_order, read_arm
from jaxrm.study.worlds import task_of

SPLITS = ("test", "test_ood")
DECODINGS = ("sampled", "greedy")
SPLIT_NAMES = {"test": "in distribution", "test_ood": "out of distribution"}

JsonRow = Mapping[str, Any]


class PolicyKey(NamedTuple):
    """Names a policy: the setting is as `jaxrm.study.config.setting_name` has it, or `jaxrm.study.config.BEST`."""

    world: str
    arm: str
    seed: int
    setting: str


class Failure(NamedTuple):
    """A run that failed: its name, what went wrong in one line, and the file with its output."""

    name: str
    error: str
    log: str


@dataclass(frozen=True)
class Answers:
    """The measured answers of one policy to ``P`` prompts; NaN where a value is missing or does not apply.

    Attributes:
      prompts: ``[P]`` checksums of the prompts.
      judge: ``[P]`` judge scores.
      length: ``[P]`` tokens.
      kl: ``[P]`` KL from the SFT policy, nats a response.
      behavior: ``[P]`` of each behavior by name.
    """

    prompts: np.ndarray
    judge: np.ndarray
    length: np.ndarray
    kl: np.ndarray
    behavior: Mapping[str, np.ndarray]

    def values(self, name: str) -> np.ndarray:
        """``[P]`` values of a field, or of a behavior; NaN for one that was not measured."""
        if name in ("judge", "kl", "length"):
            return np.asarray(getattr(self, name))
        return self.behavior.get(name, np.full(len(self.judge), np.nan))


@dataclass(frozen=True)
class Policy:
    """One policy of an arm.

    Attributes:
      key: its name.
      selection: means over the selection prompts: ``judge``, ``kl``, ``length``, and where rewards trained it
        ``reward``, in standard deviations of the SFT policy's.
      answers: to the test prompts, by split and decoding.
      curve: rows along training, by ascending step; ``[]`` for arms that rewards do not train.
    """

    key: PolicyKey
    selection: Mapping[str, float]
    answers: Mapping[tuple[str, str], Answers]
    curve: Sequence[JsonRow] = ()


@dataclass(frozen=True)
class Results:
    """A study's results.

    Attributes:
      policies: whose answers are there.
      complete: ``(world, arm, seed)`` of which no run is to come or failed, so that settings can be chosen.
      published: the published setting of each arm.
      blind_kl: largest KL of a setting that is chosen by held-out reward, nats a response.
      agreement: how each reward model ranks held-out pairs: a row a world, seed and kind.
      examples: rows with answers of one seed, as published, by ``(world, split, prompt)`` and arm.
      missing: ``(world, arm)`` to the seeds that are not complete.
      failed: the runs that failed.
    """

    policies: Mapping[PolicyKey, Policy]
    complete: frozenset[tuple[str, str, int]]
    published: Mapping[str, str]
    blind_kl: float = 5.0
    agreement: Sequence[JsonRow] = ()
    examples: Mapping[tuple[str, str, str], Mapping[str, JsonRow]] = field(default_factory=dict)
    missing: Mapping[tuple[str, str], Sequence[int]] = field(default_factory=dict)
    failed: Sequence[Failure] = ()

    @property
    def worlds(self) -> list[str]:
        """The worlds that have a policy, in the order in which they came."""
        return list(dict.fromkeys(key.world for key in self.policies))

    @property
    def has_biases(self) -> bool:
        """Whether there are worlds that differ in their annotator's bias alone."""
        return len({task_of(world) for world in self.worlds}) < len(self.worlds)

    @property
    def arms(self) -> list[str]:
        """The arms that have a policy, in their order."""
        return in_order({key.arm for key in self.policies})

    @property
    def rewarded_arms(self) -> list[str]:
        """Those of them that rewards train."""
        return [arm for arm in self.arms if read_arm(arm) is not None]

    def behaviors(self, world: str) -> list[str]:
        """The names of the behaviors that are measured in a world."""
        names: dict[str, None] = {}
        for key, policy in self.policies.items():
            if key.world == world:
                for answers in policy.answers.values():
                    names.update(dict.fromkeys(answers.behavior))
        return list(names)

    def policies_of(self, world: str, arm: str) -> Mapping[int, Sequence[Policy]]:
        """The policies of an arm by seed."""
        return self._by_arm.get((world, arm), {})

    @functools.cached_property
    def _by_arm(self) -> dict[tuple[str, str], dict[int, list[Policy]]]:
        by_arm: dict[tuple[str, str], dict[int, list[Policy]]] = {}
        for key in sorted(self.policies):
            by_arm.setdefault((key.world, key.arm), {}).setdefault(key.seed, []).append(self.policies[key])
        return by_arm


def as_float(value: Any) -> float:
    """A number of a row as a float; None is NaN."""
    return float("nan") if value is None else float(value)
