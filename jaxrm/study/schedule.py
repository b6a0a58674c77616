"""The runs of a study: ordinary experiments, and which of them are known, given the scores so far."""

import dataclasses
import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config.dicts import with_changes
from jaxrm.data import tasks
from jaxrm.evaluation.config import EvaluateConfig
from jaxrm.models.build import ModelSource
from jaxrm.ops.reward_kinds import names_for
from jaxrm.study.config import PPO, RTO, SIZES, Study, axes
from jaxrm.study.tuning import Choice, Setting, choose, setting_name

Choices = dict[tuple[str, str], Choice]
"""The state of tuning, by world and arm."""

REWARD_MODELS = ("rm_scalar", "rm_seq2seq")
_RTO_WEIGHTS = {"scalar": 1.0, "dpo": 0.2}  # jaxrm choice: with 1, dpo taught to refuse (configs/README.md)
_NEVER = 1_000_000  # steps between evaluations of a run that needs none but the last


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


def schedule(study: Study, scores: Mapping[str, float]) -> tuple[list[StudyRun], Choices]:
    """List the runs of a study that are known so far.

    The final runs of an arm are known once its setting is chosen. That takes the scores of its selection runs.

    Args:
      study: from `jaxrm.study.config.apply_preset`.
      scores: mean judge score on the selection prompts by name of a finished run; NaN for a failed one.

    Returns:
      The runs, each after those that it needs, and the state of tuning by world and arm.
    """
    choices = {(world, arm): _choose_setting(study, world, arm, scores) for world in study.worlds for arm in study.arms}
    runs: list[StudyRun] = []
    for (world, arm), choice in choices.items():
        settings = (*choice.scores, *choice.wanted) if axes(study, arm) else ()
        for setting, seed in itertools.product(settings, study.selection_seeds):
            runs += _selection_runs(_Site(study, world, seed), arm, setting)
    # Seeds outside, worlds inside, so that a study that is stopped early has every world alike.
    for seed, world in itertools.product(study.seeds, study.worlds):
        site = _Site(study, world, seed)
        runs += shared_runs(study, world, seed)
        for arm in study.arms:
            chosen = choices[world, arm].chosen
            if chosen is not None:
                runs += _final_runs(site, arm, chosen)
    by_name: dict[str, StudyRun] = {}
    for run in runs:
        by_name.setdefault(run.name, run)
    return list(by_name.values()), choices


def shared_runs(study: Study, world: str, seed: int) -> list[StudyRun]:
    """What every arm of a world and seed starts from: SFT policy, pairs and both reward models."""
    site = _Site(study, world, seed)
    untrained = dataclasses.replace(study.sft.model, path=None, preset=SIZES[study.size])
    policy = site.model("sft")
    runs = [
        site.run("sft", study.sft, site.task, untrained),
        site.run("pairs", study.pairs, site.task, policy, needs=("sft",)),
    ]
    for name in REWARD_MODELS:
        template = with_changes(getattr(study, name), {"evaluation.judge": site.task})
        runs.append(site.run(name, template, f"{site.folder('pairs')}/pairs.jsonl", policy, needs=("pairs",)))
    return runs


def selection_run(study: Study, world: str, seed: int, arm: str, setting: Setting) -> StudyRun:
    """The run whose score counts for a setting."""
    return _selection_runs(_Site(study, world, seed), arm, setting)[-1]


def policy_name(world: str, seed: int, arm: str, setting: Setting) -> str:
    """The final run that trains an arm's policy."""
    return f"{world}/seed{seed}/{_policy_path(arm, setting, is_final=True)}"


def answers_name(world: str, seed: int, arm: str, setting: Setting) -> str:
    """The run in which an arm's policy answers the test prompts."""
    return f"{world}/seed{seed}/answers/{folder_name(arm)}/{setting_name(setting)}"


def folder_name(arm: str) -> str:
    """An arm as the name of a folder, and in the results."""
    return arm.replace(":", "-")


def evaluates_checkpoints(arm: str) -> bool:
    """Whether the checkpoints of an arm's final run are evaluated afterwards.

    PPO evaluates its policy while it trains, and the other arms train nothing.
    """
    return arm in ("sft_chosen", "dpo") or arm.startswith("rft_")


@dataclass(frozen=True)
class _Site:
    """One seed in one world: the names, folders and common fields of its runs."""

    study: Study
    world: str
    seed: int

    @property
    def task(self) -> str:
        return f"{tasks.PREFIX}{self.world}"

    def name(self, path: str) -> str:
        return f"{self.world}/seed{self.seed}/{path}"

    def folder(self, path: str) -> str:
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
        needs: tuple[str, ...] = (),
    ) -> StudyRun:
        """A run of this site: a template of the study with its data, model, setting, seed and folder."""
        tuned = with_changes(template, {"data.path": data, **dict(setting)})
        experiment = dataclasses.replace(tuned, seed=self.seed, run_dir=self.folder(path), model=model)
        return StudyRun(self.name(path), experiment, tuple(self.name(need) for need in dict.fromkeys(needs)))


@dataclass(frozen=True)
class _ArmPolicy:
    """How an arm answers prompts.

    Attributes:
      runs: those that train its policy, beyond the shared ones.
      path: of the run that holds the policy.
      reward: measured on its answers, or chooses among them.
      reward_paths: of the runs that hold the reward models.
      rewards: sources in place of ``reward``, by name, where there are several.
      best_of: answers to a prompt of which the best is taken.
    """

    runs: tuple[StudyRun, ...]
    path: str
    reward: RewardConfig
    reward_paths: tuple[str, ...] = ()
    rewards: Mapping[str, RewardConfig] = dataclasses.field(default_factory=dict)
    best_of: int = 1


def _choose_setting(study: Study, world: str, arm: str, scores: Mapping[str, float]) -> Choice:
    """Tune an arm as far as the scores go: the grid first, then what lies beyond it."""
    grid = axes(study, arm)
    if not grid:
        return Choice({}, ())
    setting_scores: dict[Setting, float] = {}
    while True:
        choice = choose(grid, setting_scores, extensions=study.extensions, tolerance=study.tolerance)
        if not choice.wanted:
            return choice
        new_scores = {}
        for setting in choice.wanted:
            names = [selection_run(study, world, seed, arm, setting).name for seed in study.selection_seeds]
            if all(name in scores for name in names):
                new_scores[setting] = sum(scores[name] for name in names) / len(names)
        if len(new_scores) < len(choice.wanted):
            return dataclasses.replace(choice, scores=setting_scores)
        setting_scores |= new_scores


def _selection_runs(site: _Site, arm: str, setting: Setting) -> list[StudyRun]:
    """The runs that give a setting its score, which is that of the last one."""
    policy = _arm_policy(site, arm, setting, is_final=False)
    runs = [*shared_runs(site.study, site.world, site.seed), *policy.runs]
    if arm.startswith(PPO):  # its own evaluation is on the selection prompts
        return runs
    answers = dataclasses.replace(site.study.evaluate.evaluate, splits=("selection",), decodings=("sampled",))
    return [*runs, _evaluation_run(site, arm, policy, f"{policy.path}/answers", answers)]


def _final_runs(site: _Site, arm: str, setting: Setting) -> list[StudyRun]:
    """The runs that train an arm's policy, if it trains one, and let it answer the test prompts.

    It answers the selection prompts too, on which PPO evaluates its policies while they train.
    """
    policy = _arm_policy(site, arm, setting, is_final=True)
    answers = dataclasses.replace(
        site.study.evaluate.evaluate,
        splits=("selection", "test", "test_ood"),
        decodings=("sampled", "greedy") if policy.best_of == 1 else ("sampled",),
        evaluate_checkpoints=evaluates_checkpoints(arm),
    )
    path = f"answers/{folder_name(arm)}/{setting_name(setting)}"
    return [*policy.runs, _evaluation_run(site, arm, policy, path, answers)]


def _arm_policy(site: _Site, arm: str, setting: Setting, *, is_final: bool) -> _ArmPolicy:
    """An arm's policy, trained with a setting."""
    study, path = site.study, _policy_path(arm, setting, is_final)
    if arm == "sft":
        return _ArmPolicy((), "sft", study.evaluate.reward)
    if arm in ("sft_chosen", "dpo"):
        template = _keep_checkpoints(study.dpo if arm == "dpo" else study.imitation, is_final)
        pairs = f"{site.folder('pairs')}/pairs.jsonl"
        run = site.run(path, template, pairs, site.model("sft"), setting, ("pairs",))
        return _ArmPolicy((run,), path, study.evaluate.reward)
    if arm.startswith(PPO):
        return _ppo_policy(site, arm, setting, is_final)
    return _best_of_n_policy(site, arm, setting, is_final)


def _ppo_policy(site: _Site, arm: str, setting: Setting, is_final: bool) -> _ArmPolicy:
    """A policy trained by PPO, with rewards of one kind or, in `RTO`, of two."""
    study, path = site.study, _policy_path(arm, setting, is_final)
    kinds = tuple(_RTO_WEIGHTS) if arm == RTO else (arm.removeprefix(PPO),)
    reward_paths = tuple(_reward_path(kind) for kind in kinds)
    sources = {
        kind: dataclasses.replace(study.ppo.reward, kind=kind, model=site.folder(reward_path))
        for kind, reward_path in zip(kinds, reward_paths, strict=True)
    }
    reward, rewards = sources[kinds[0]], {}
    if arm == RTO:
        reward = RewardConfig()
        rewards = {kind: dataclasses.replace(sources[kind], weight=weight) for kind, weight in _RTO_WEIGHTS.items()}
    changes: dict[str, Any] = {"critic.path": site.folder("rm_scalar"), "data.eval_split": "selection"}
    if not is_final:
        changes["evaluation.every"] = _NEVER
    template = dataclasses.replace(with_changes(study.ppo, changes), reward=reward, rewards=rewards)
    run = site.run(path, template, site.task, site.model("sft"), setting, ("rm_scalar", *reward_paths))
    source = (_dpo_source(site),) if "dpo" in kinds else ()
    return _ArmPolicy((*source, run), path, reward, reward_paths, rewards)


def _reward_path(kind: str) -> str:
    """The run that gives token rewards of a kind."""
    if kind in names_for("scalar"):
        return "rm_scalar"
    return "rm_dpo" if kind in names_for("dpo") else "rm_seq2seq"


def _dpo_source(site: _Site) -> StudyRun:
    """The run of DPO whose log-probs are rewards: as the template of DPO is, and not tuned."""
    pairs = f"{site.folder('pairs')}/pairs.jsonl"
    return site.run("rm_dpo", site.study.dpo, pairs, site.model("sft"), needs=("pairs",))


def _best_of_n_policy(site: _Site, arm: str, setting: Setting, is_final: bool) -> _ArmPolicy:
    """The best of n answers of the SFT policy, or a policy fine-tuned on such winners (``rft_…``)."""
    study, path = site.study, _policy_path(arm, setting, is_final)
    source = arm.removeprefix("rft_").removeprefix("best_of_n_")
    reward_path = f"rm_{source}"
    kind = "scalar" if source == "scalar" else study.best_of_n.reward.kind
    template = with_changes(study.best_of_n, {"reward.kind": kind, "reward.model": site.folder(reward_path)})
    if arm.startswith("best_of_n_"):
        return _ArmPolicy((), "sft", template.reward, (reward_path,), best_of=template.best_of_n.n)
    winners = f"winners_{source}"
    draw = site.run(winners, template, site.task, site.model("sft"), needs=("sft", reward_path))
    data = f"{site.folder(winners)}/winners.jsonl"
    imitation = _keep_checkpoints(study.imitation, is_final)
    run = site.run(path, imitation, data, site.model("sft"), setting, (winners,))
    return _ArmPolicy((draw, run), path, study.evaluate.reward)


def _evaluation_run(site: _Site, arm: str, policy: _ArmPolicy, path: str, answers: EvaluateConfig) -> StudyRun:
    """The run in which a policy answers prompts."""
    answers = dataclasses.replace(
        answers,
        best_of=policy.best_of,
        sampling_seed=zlib.crc32(arm.encode()),  # arms that are compared must not share their random numbers
        reference=site.folder("sft"),
    )
    template = dataclasses.replace(site.study.evaluate, evaluate=answers, reward=policy.reward, rewards=policy.rewards)
    needs = ("sft", policy.path, *policy.reward_paths)
    return site.run(path, template, site.task, site.model(policy.path), needs=needs)


def _policy_path(arm: str, setting: Setting, is_final: bool) -> str:
    return f"{'' if is_final else 'select/'}{folder_name(arm)}/{setting_name(setting)}"


def _keep_checkpoints(template: Any, is_final: bool) -> Any:
    """Keep the checkpoints of a final run, which are evaluated afterwards."""
    return with_changes(template, {"checkpoint.every": 12, "checkpoint.keep": 8}) if is_final else template
