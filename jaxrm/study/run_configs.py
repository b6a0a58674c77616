"""The runs of one seed in one world: the name, the needs and the config of each."""

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrm.algorithms.ppo_config import CriticConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config.dicts import with_changes
from jaxrm.data import tasks
from jaxrm.evaluation.config import EvaluateConfig
from jaxrm.models.build import ModelSource
from jaxrm.ops.reward_kinds import tags_tokens
from jaxrm.study.arms import RESPONSES_PER_PROMPT, TrainedByRewards, folder_name, read_arm
from jaxrm.study.config import BEST, SIZES, Setting, Study, published, setting_name
from jaxrm.study.worlds import bias_of, prompt_tokens, task_of

REWARD_MODELS = ("rm_scalar", "rm_seq2seq")
MECHANISM = ("ppo_scalar", "ppo_literal")
"""The arms whose reward models a page compares, if both are in the study."""
MECHANISM_KINDS = {"scalar": "rm_scalar", "literal": "rm_seq2seq"}
_ALL = 1_000_000  # checkpoints


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
      name: ``WORLD/seedK/WHAT``, which is its folder too.
      experiment: its config.
      needs: names of the runs that come first.
    """

    name: str
    experiment: Any
    needs: tuple[str, ...] = ()


def policy_name(world: str, seed: int, arm: str, setting: Setting) -> str:
    """The run that trains an arm's policy."""
    return f"{world}/seed{seed}/{_policy_path(arm, setting)}"


def answers_name(world: str, seed: int, arm: str, setting: str) -> str:
    """The run in which an arm's policy answers the test prompts; named by `setting_name` or `best_setting_name`."""
    return f"{world}/seed{seed}/answers/{folder_name(arm)}/{setting}"


def best_setting_name(setting: Setting, step: int) -> str:
    """The best checkpoint of an arm, where `setting_name` stands: a wider grid may find another, which answers too."""
    return f"{BEST},{setting_name(setting)},step={step}"


def mechanism_name(world: str, seed: int, arm: str) -> str:
    """The run in which a policy's answers are read by two reward models."""
    return f"{world}/seed{seed}/mechanism/{folder_name(arm)}"


def _policy_path(arm: str, setting: Setting) -> str:
    return "sft" if arm == "sft" or arm.startswith("best_of_n_") else f"{folder_name(arm)}/{setting_name(setting)}"


@dataclass(frozen=True, eq=False)
class Site:
    """One seed in one world: the names, folders and common fields of its runs.

    Attributes:
      study: from `jaxrm.study.presets.apply_preset`.
      world: one of `jaxrm.study.worlds.worlds_of`.
      seed: of every run.
    """

    study: Study
    world: str
    seed: int

    @property
    def task(self) -> str:
        """Data of the world's embedded task."""
        return f"{tasks.PREFIX}{task_of(self.world)}"

    @property
    def pairs(self) -> str:
        """File of the pairs that the annotator labels."""
        return f"{self.folder('pairs')}/pairs.jsonl"

    def name(self, path: str) -> str:
        """Name of a run; worlds of one task share its SFT policy, which knows no annotator."""
        world = task_of(self.world) if path == "sft" else self.world
        return f"{world}/seed{self.seed}/{path}"

    def folder(self, path: str) -> str:
        """Folder of a run."""
        return f"{self.study.run_dir.rstrip('/')}/runs/{self.name(path)}"

    def model(self, path: str) -> ModelSource:
        """The model that another run of this site trained."""
        return dataclasses.replace(self.study.sft.model, preset=None, path=self.folder(path))

    def run(
        self,
        path: str,
        template: Any,
        data: str,
        model: ModelSource,
        setting: Setting = (),
        needs: Sequence[str] = (),
    ) -> StudyRun:
        """A run of this site: a template of the study with its data, model, setting, seed and folder."""
        changes: dict[str, Any] = {"data.path": data, **dict(setting)}
        if data == self.task and task_of(self.world) == "summarize":
            changes["data.max_notes"] = self.study.max_notes
        if data == self.task and hasattr(template, "rollout"):
            longest = prompt_tokens(task_of(self.world), self.study.max_notes)
            longest += template.rollout.sampling.max_new_tokens
            changes["data.max_length"] = min(longest, template.data.max_length)
        changed = with_changes(template, changes)
        experiment = dataclasses.replace(changed, seed=self.seed, run_dir=self.folder(path), model=model)
        return StudyRun(self.name(path), experiment, tuple(self.name(need) for need in dict.fromkeys(needs)))


def shared_runs(site: Site) -> list[StudyRun]:
    """What the arms of a world and seed start from: SFT policy, pairs and both reward models."""
    study, bias = site.study, bias_of(site.world)
    pairs = study.pairs if bias == 1 else with_changes(study.pairs, {"pairs.annotator_bias": bias})
    untrained = dataclasses.replace(study.sft.model, path=None, preset=SIZES[study.size or "tiny"])
    return [
        site.run("sft", study.sft, site.task, untrained),
        site.run("pairs", pairs, site.task, site.model("sft"), needs=("sft",)),
        *(_reward_model(site, name) for name in REWARD_MODELS),
    ]


def arm_runs(site: Site, arm: str, setting: Setting) -> list[StudyRun]:
    """The runs that train an arm's policy, if it trains one, and let it answer the test prompts."""
    policy = _arm_policy(site, arm, setting)
    answers = dataclasses.replace(
        site.study.evaluate.evaluate,
        # Rewards train on prompts of their own, and the policy answers the selection prompts meanwhile.
        splits=("test", "test_ood") if read_arm(arm) else ("selection", "test", "test_ood"),
        decodings=("sampled", "greedy") if policy.best_of == 1 else ("sampled",),
    )
    path = f"answers/{folder_name(arm)}/{setting_name(setting)}"
    return [*policy.runs, _answers_run(site, arm, policy, path, answers, policy.path)]


def best_run(site: Site, arm: str, setting: Setting, step: int) -> StudyRun:
    """The answers of the best checkpoint of an arm and seed.

    Args:
      site: of the policy.
      arm: whose policy it is.
      setting: of the run that has the checkpoint.
      step: of the checkpoint.
    """
    policy = _arm_policy(site, arm, setting)
    answers = dataclasses.replace(site.study.evaluate.evaluate, splits=("test", "test_ood"))
    path = f"answers/{folder_name(arm)}/{best_setting_name(setting, step)}"
    return _answers_run(site, arm, policy, path, answers, f"{policy.path}/checkpoints/{step}")


def mechanism_runs(site: Site) -> list[StudyRun]:
    """Answers of the SFT policy and of two arms as published, each with the token rewards of both reward models."""
    study = site.study
    if site.world != study.mechanism or not set(MECHANISM) <= set(study.arms or ()):
        return []
    rewards = {
        kind: dataclasses.replace(study.ppo.reward, kind=kind, model=site.folder(path))
        for kind, path in MECHANISM_KINDS.items()
    }
    answers = dataclasses.replace(
        study.evaluate.evaluate, splits=("test",), decodings=("sampled",), token_rewards=1_000, sampling_seed=1
    )
    answers = dataclasses.replace(answers, reference=site.folder("sft"))
    template = dataclasses.replace(study.evaluate, evaluate=answers, rewards=rewards, reward=RewardConfig())
    runs = []
    for arm in ("sft", *MECHANISM):
        path = "sft" if arm == "sft" else _policy_path(arm, published(study, arm))
        needs = (path, *MECHANISM_KINDS.values())
        runs.append(site.run(f"mechanism/{arm}", template, site.task, site.model(path), needs=needs))
    return runs


@dataclass(frozen=True)
class _ArmPolicy:
    """How an arm answers prompts.

    Attributes:
      runs: those that train its policy, beyond the shared ones.
      path: of the run that holds the policy.
      reward: chooses among its answers, where there are several to a prompt.
      reward_paths: of the runs that hold the reward models.
      best_of: answers to a prompt of which the best is taken.
    """

    runs: tuple[StudyRun, ...]
    path: str
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    reward_paths: tuple[str, ...] = ()
    best_of: int = 1


def _arm_policy(site: Site, arm: str, setting: Setting) -> _ArmPolicy:
    """An arm's policy, trained with a setting."""
    study, path = site.study, _policy_path(arm, setting)
    trained = read_arm(arm)
    if trained is not None:
        return _ArmPolicy(tuple(_rewarded_runs(site, trained, path, setting)), path)
    if arm == "sft":
        return _ArmPolicy((), "sft")
    if arm in ("sft_chosen", "dpo"):
        template = study.dpo if arm == "dpo" else study.imitation
        return _ArmPolicy((site.run(path, template, site.pairs, site.model("sft"), setting, ("pairs",)),), path)
    return _best_of_n_policy(site, arm, setting)


def _rewarded_runs(site: Site, arm: TrainedByRewards, path: str, setting: Setting) -> list[StudyRun]:
    """A policy trained by token rewards, after the reward models that only such arms have."""
    study, sources = site.study, arm.sources
    rewards = {
        kind: dataclasses.replace(study.ppo.reward, kind=kind, model=site.folder(sources[kind]), weight=weight)
        for kind, weight in arm.weights.items()
    }
    critic = "rm_scalar_lora" if arm.has_adapters else "rm_scalar"
    changes: dict[str, Any] = {
        "data.eval_split": "selection",
        "ppo.advantage": arm.advantage,
        # Every evaluated step has a checkpoint until the run is done; then the best and the last are left.
        "checkpoint.every": study.ppo.evaluation.every,
        "checkpoint.keep": _ALL,
        "checkpoint.keep_best": 0,
    }
    if not any(map(tags_tokens, rewards)):
        changes["ppo.early_end_penalty"] = 0.0  # of the arms that have tags
    if arm.advantage == "gae":
        changes["critic.path"] = site.folder(critic)
    else:
        changes["rollout.responses_per_prompt"] = RESPONSES_PER_PROMPT
    template = study.ppo if arm.advantage == "gae" else dataclasses.replace(study.ppo, critic=CriticConfig())
    template = _with_adapters(with_changes(template, changes), arm.has_adapters)
    if len(rewards) == 1:
        template = dataclasses.replace(template, reward=next(iter(rewards.values())), rewards={})
    else:
        template = dataclasses.replace(template, reward=RewardConfig(), rewards=rewards)
    needs = tuple(dict.fromkeys((*sources.values(), *((critic,) if arm.advantage == "gae" else ()))))
    models = [_reward_model(site, need) for need in needs if need not in REWARD_MODELS]
    return [*models, site.run(path, template, site.task, site.model("sft"), setting, needs)]


def _reward_model(site: Site, name: str) -> StudyRun:
    """The run that trains a reward model; ``rm_dpo`` is one of DPO as its template has it."""
    study = site.study
    if name == "rm_dpo":
        return site.run(name, study.dpo, site.pairs, site.model("sft"), needs=("pairs",))
    template = with_changes(getattr(study, name.removesuffix("_lora")), {"evaluation.judge": site.task})
    template = _with_adapters(template, name.endswith("_lora"))
    return site.run(name, template, site.pairs, site.model("sft"), needs=("pairs",))


def _with_adapters(template: Any, has_adapters: bool) -> Any:
    return with_changes(template, {"lora.rank": 8}) if has_adapters else template


def _best_of_n_policy(site: Site, arm: str, setting: Setting) -> _ArmPolicy:
    """The best of n answers of the SFT policy, or a policy fine-tuned on such winners (``rft_…``)."""
    study, path = site.study, _policy_path(arm, setting)
    source = arm.removeprefix("rft_").removeprefix("best_of_n_")
    reward_path = f"rm_{source}"
    kind = "scalar" if source == "scalar" else study.best_of_n.reward.kind
    template = with_changes(study.best_of_n, {"reward.kind": kind, "reward.model": site.folder(reward_path)})
    if arm.startswith("best_of_n_"):
        return _ArmPolicy((), "sft", template.reward, (reward_path,), best_of=template.best_of_n.n)
    winners = f"winners_{source}"
    draw = site.run(winners, template, site.task, site.model("sft"), needs=("sft", reward_path))
    data = f"{site.folder(winners)}/winners.jsonl"
    run = site.run(path, study.imitation, data, site.model("sft"), setting, (winners,))
    return _ArmPolicy((draw, run), path)


def _answers_run(site: Site, arm: str, policy: _ArmPolicy, path: str, answers: EvaluateConfig, model: str) -> StudyRun:
    """The run in which a policy answers prompts.

    Args:
      site: of the policy.
      arm: whose policy it is.
      policy: how it answers.
      path: of the run.
      answers: which prompts, and how.
      model: path of the policy's parameters.
    """
    answers = dataclasses.replace(
        answers,
        best_of=policy.best_of,
        sampling_seed=zlib.crc32(arm.encode()),  # arms that are compared must not share their random numbers
        reference=site.folder("sft"),
    )
    template = dataclasses.replace(site.study.evaluate, evaluate=answers, reward=policy.reward)
    needs = ("sft", policy.path, *policy.reward_paths)
    return site.run(path, template, site.task, site.model(model), needs=needs)
