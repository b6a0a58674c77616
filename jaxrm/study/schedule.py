"""The runs of a study, each an ordinary experiment, and which of them there are, given what is known by now."""

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrm.algorithms.reward_config import SCALAR_KINDS, RewardConfig
from jaxrm.data import tasks
from jaxrm.experiment import Experiment
from jaxrm.models.build import ModelSource
from jaxrm.study.config import PPO, SIZES, Study, axes
from jaxrm.study.tuning import Choice, Setting, choose, setting_name


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
      name: ``WORLD/seedK/WHAT``, and so its folder.
      experiment: its config.
      needs: names of the runs that come first.
    """

    name: str
    experiment: Experiment
    needs: tuple[str, ...] = ()


def plan(study: Study, scores: Mapping[str, float]) -> tuple[list[Run], dict[tuple[str, str], Choice]]:
    """The runs of a study that are known by now, each after those that it needs, and the choices of settings.

    Args:
      study: from `shrunk`.
      scores: mean mark of the exact judge on the selection prompts, by name, of the runs that are done; NaN for
        those that failed.
    """
    runs: dict[str, Run] = {}
    choices: dict[tuple[str, str], Choice] = {}

    def add(run: Run) -> None:
        runs.setdefault(run.name, run)

    for world in study.worlds:
        for arm in study.arms:
            choice = _choice(study, world, arm, scores)
            choices[world, arm] = choice
            tried = (*choice.scores, *choice.wanted) if axes(study, arm) else ()
            for setting, seed in itertools.product(tried, study.selection_seeds):
                for run in _to_select(study, world, seed, arm, setting):
                    add(run)
    for seed, world in itertools.product(study.seeds, study.worlds):  # so that what there is so far is balanced
        for run in base(study, world, seed):
            add(run)
        for arm in study.arms:
            chosen = choices[world, arm].chosen
            if chosen is not None:
                for run in _to_report(study, world, seed, arm, chosen):
                    add(run)
    return list(runs.values()), choices


def base(study: Study, world: str, seed: int) -> list[Run]:
    """What every arm of a world and seed starts from: SFT policy, pairs, both reward models."""
    at, task = f"{world}/seed{seed}/", f"{tasks.PREFIX}{world}"
    policy = dataclasses.replace(study.sft.model, path=None, preset=SIZES[study.size])
    found = [_run(study, at + "sft", study.sft, seed, task, policy)]
    start = _from(study, at + "sft", study.sft.model)
    found.append(_run(study, at + "pairs", study.pairs, seed, task, start, needs=(at + "sft",)))
    for name in ("rm_scalar", "rm_seq2seq"):
        template = _changed(getattr(study, name), "evaluation.judge", task)
        data = f"{_folder(study, at + 'pairs')}/pairs.jsonl"
        found.append(_run(study, at + name, template, seed, data, start, needs=(at + "pairs",)))
    return found


def _choice(study: Study, world: str, arm: str, scores: Mapping[str, float]) -> Choice:
    """The state of choosing; settings are found by going on from the grid as long as their scores are known."""
    grid = axes(study, arm)
    if not grid:
        return Choice({}, ())
    known: dict[Setting, float] = {}
    while True:
        found = choose(grid, known, extensions=study.extensions, tolerance=study.tolerance)
        if not found.wanted:
            return found
        fresh = {}
        for setting in found.wanted:
            names = [selection_run(study, world, seed, arm, setting).name for seed in study.selection_seeds]
            if all(name in scores for name in names):
                fresh[setting] = sum(scores[name] for name in names) / len(names)
        if len(fresh) < len(found.wanted):
            return dataclasses.replace(found, scores=known)
        known |= fresh


def selection_run(study: Study, world: str, seed: int, arm: str, setting: Setting) -> Run:
    """The run whose score counts for a setting."""
    return _to_select(study, world, seed, arm, setting)[-1]


def policy_name(world: str, seed: int, arm: str, setting: Setting, *, final: bool = True) -> str:
    """The run that trains an arm's policy."""
    return f"{world}/seed{seed}/{'' if final else 'select/'}{folder_of(arm)}/{setting_name(setting)}"


def answers_name(world: str, seed: int, arm: str, setting: Setting) -> str:
    """The run in which an arm's policy answers the test prompts."""
    return f"{world}/seed{seed}/answers/{folder_of(arm)}/{setting_name(setting)}"


def folder_of(arm: str) -> str:
    """An arm as the name of a folder, and in the results."""
    return arm.replace(":", "-")


@dataclass(frozen=True)
class _Policy:
    """How an arm answers: with which policy, or the best of how many responses of it, by which reward."""

    runs: tuple[Run, ...]
    name: str
    reward: RewardConfig
    best_of: int = 1


def _to_select(study: Study, world: str, seed: int, arm: str, setting: Setting) -> list[Run]:
    """The runs that give a setting its score, which is that of the last one."""
    policy = _policy(study, world, seed, arm, setting, final=False)
    found = [*base(study, world, seed), *policy.runs]
    if arm.startswith(PPO):  # which answers the selection prompts itself
        return found
    name = f"{policy.name}/answers"
    return [*found, _answers(study, world, seed, arm, policy, name, ("selection",), ("sampled",))]


def _to_report(study: Study, world: str, seed: int, arm: str, setting: Setting) -> list[Run]:
    """The runs that train an arm's policy, if it trains one, and let it answer the test prompts.

    It answers the selection prompts too, on which the policies of PPO are watched in training.
    """
    policy = _policy(study, world, seed, arm, setting, final=True)
    name, decodings = answers_name(world, seed, arm, setting), ("sampled", "greedy")[: 1 + (policy.best_of == 1)]
    splits = ("selection", "test", "test_ood")
    return [*policy.runs, _answers(study, world, seed, arm, policy, name, splits, decodings, along=watched(arm))]


def _policy(study: Study, world: str, seed: int, arm: str, setting: Setting, *, final: bool) -> _Policy:
    at, task = f"{world}/seed{seed}/", f"{tasks.PREFIX}{world}"
    name = policy_name(world, seed, arm, setting, final=final)
    start, pairs = _from(study, at + "sft", study.sft.model), f"{_folder(study, at + 'pairs')}/pairs.jsonl"
    if arm == "sft":
        return _Policy((), at + "sft", study.evaluate.reward)
    if arm in ("sft_chosen", "dpo"):
        template = study.dpo if arm == "dpo" else study.imitation
        run = _run(study, name, _kept(template, final), seed, pairs, start, setting, (at + "pairs",))
        return _Policy((run,), name, study.evaluate.reward)
    if arm.startswith(PPO):
        kind = arm.removeprefix(PPO)
        rm = at + ("rm_scalar" if kind in SCALAR_KINDS else "rm_seq2seq")
        template = _changed(study.ppo, "reward.kind", kind, "reward.model", _folder(study, rm))
        template = _changed(template, "critic.path", _folder(study, at + "rm_scalar"), "data.eval_split", "selection")
        if not final:  # of the way there nothing is looked at
            template = _changed(template, "evaluation.every", 1_000_000)
        run = _run(study, name, template, seed, task, start, setting, (at + "rm_scalar", rm))
        return _Policy((run,), name, run.experiment.reward)
    sort = arm.removeprefix("rft_").removeprefix("best_of_n_")
    kind, rm = "scalar" if sort == "scalar" else study.best_of_n.reward.kind, f"{at}rm_{sort}"
    template = _changed(study.best_of_n, "reward.kind", kind, "reward.model", _folder(study, rm))
    if arm.startswith("best_of_n_"):
        return _Policy((), at + "sft", template.reward, template.best_of_n.n)
    winners = f"{at}winners_{sort}"
    draw = _run(study, winners, template, seed, task, start, (), (at + "sft", rm))
    data = f"{_folder(study, winners)}/winners.jsonl"
    run = _run(study, name, _kept(study.imitation, final), seed, data, start, setting, (winners,))
    return _Policy((draw, run), name, study.evaluate.reward)


def watched(arm: str) -> bool:
    """Whether an arm's checkpoints are asked on the way; PPO watches itself, and the others train nothing."""
    return arm in ("sft_chosen", "dpo") or arm.startswith("rft_")


def _kept(template: Experiment, final: bool) -> Experiment:
    """With the checkpoints of the way kept, where they are asked."""
    return _changed(template, "checkpoint.every", 12, "checkpoint.keep", 8) if final else template


def _answers(
    study: Study,
    world: str,
    seed: int,
    arm: str,
    policy: _Policy,
    name: str,
    splits: tuple[str, ...],
    decodings: tuple[str, ...],
    *,
    along: bool = False,
) -> Run:
    """The run in which a policy answers prompts."""
    at = f"{world}/seed{seed}/"
    answers = dataclasses.replace(
        study.evaluate.answers,
        splits=splits,
        decodings=decodings,
        best_of=policy.best_of,
        draw=zlib.crc32(arm.encode()),
        reference=_folder(study, at + "sft"),
        along=along,
    )
    template = dataclasses.replace(study.evaluate, answers=answers, reward=policy.reward)
    needs: tuple[str, ...] = (at + "sft", policy.name)
    if policy.reward.model is not None:
        needs = (*needs, at + policy.reward.model.rsplit("/", 1)[-1])
    model = _from(study, policy.name, study.sft.model)
    return _run(study, name, template, seed, f"{tasks.PREFIX}{world}", model, (), needs)


def _run(
    study: Study,
    name: str,
    template: Experiment,
    seed: int,
    data: str,
    model: ModelSource,
    setting: Setting = (),
    needs: tuple[str, ...] = (),
) -> Run:
    changed = _changed(template, "data.path", data, *itertools.chain.from_iterable(setting))
    experiment = dataclasses.replace(changed, seed=seed, run_dir=_folder(study, name), model=model)
    return Run(name, experiment, tuple(dict.fromkeys(needs)))


def _changed(tree: Any, *fields_and_values: Any) -> Any:
    """The tree with some of its fields, by dotted name, at other values."""
    for dotted, value in _pairs(fields_and_values):
        name, _, rest = dotted.partition(".")
        tree = dataclasses.replace(tree, **{name: _changed(getattr(tree, name), rest, value) if rest else value})
    return tree


def _pairs(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _folder(study: Study, name: str) -> str:
    return f"{study.run_dir.rstrip('/')}/runs/{name}"


def _from(study: Study, name: str, like: ModelSource) -> ModelSource:
    return dataclasses.replace(like, preset=None, path=_folder(study, name))
