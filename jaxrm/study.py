"""A study: the same comparison for every arm, in every world, with every seed, as a list of ordinary runs.

An arm is a way to a policy: ``sft`` (where all start), ``sft_chosen``, ``best_of_n_scalar``, ``best_of_n_seq2seq``,
``rft_scalar``, ``rft_seq2seq``, ``dpo`` and ``ppo_KIND`` for each kind of token reward. Worlds are embedded tasks,
whose judge is exact. `plan` says which runs there are, given the scores of those that are done: settings are chosen
for each arm and world alike, on prompts and seeds of their own, and only then do the runs of the final seeds start.
`jaxrm.stages.study` runs them.
"""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrm.algorithms.reward_config import SCALAR_KINDS, SEQ2SEQ_KINDS, check_kind
from jaxrm.data import tasks
from jaxrm.errors import UserError
from jaxrm.experiment import AnswersConfig, Experiment
from jaxrm.models.build import ModelSource
from jaxrm.runtime.config_fields import WHOLE
from jaxrm.runtime.run_folder import OnExisting

PPO = "ppo_"
ARMS = (
    "sft",
    "sft_chosen",
    "best_of_n_scalar",
    "best_of_n_seq2seq",
    "rft_scalar",
    "rft_seq2seq",
    "dpo",
    *(f"{PPO}{kind}" for kind in (*SCALAR_KINDS, *SEQ2SEQ_KINDS)),
)
SIZES = {"tiny": "lab-tiny", "small": "lab-small", "base": "lab-base"}
_SMOKE_ARMS = ("sft", "sft_chosen", "dpo", "ppo_scalar", "ppo_literal")

Setting = tuple[tuple[str, float], ...]
"""Values of the fields that are tuned, by dotted name."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    The stages are templates: `plan` fills in folders, models, data, seeds and what is tuned.

    Attributes:
      run_dir: folder of the study.
      on_existing: a folder that already holds this study is continued (``resume``), put aside and started anew
        (``restart``) or refused (``error``).
      preset: ``full`` leaves the config as it is; ``smoke`` makes of it one world, two seeds, few arms and few steps.
      size: of the policy: ``tiny`` (0.36 M parameters), ``small`` (6 M) or ``base`` (31 M).
      worlds: embedded tasks.
      arms: see `ARMS`; the kind of ``ppo_KIND`` may be one's own (see `jaxrm.algorithms.reward_config`).
      seeds: of the reported runs; each has its own SFT, pairs and reward models.
      selection_seeds: of the runs that settings are chosen with.
      kl_coefs: of PPO, ascending: its grid with ``learning_rates``.
      learning_rates: of PPO, DPO and of SFT on chosen responses or winners, ascending.
      dpo_betas: of DPO, ascending: its grid with ``learning_rates``.
      extensions: how often an axis goes on past an end of the grid, by its own ratio, while the best setting is there.
      workers: runs at once. None: one for each core, or one on an accelerator.
    """

    run_dir: str = "runs/study"
    on_existing: OnExisting = "resume"
    preset: Literal["full", "smoke"] = "full"
    size: Literal["tiny", "small", "base"] = "tiny"
    worlds: tuple[str, ...] = tasks.TASKS
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    selection_seeds: tuple[int, ...] = (1001,)
    kl_coefs: tuple[float, ...] = (0.05, 0.2)
    learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    dpo_betas: tuple[float, ...] = (0.1, 0.3)
    extensions: int = 3
    workers: int | None = None
    sft: Experiment = field(default_factory=lambda: Experiment(algorithm="sft"), metadata=WHOLE)
    pairs: Experiment = field(default_factory=lambda: Experiment(algorithm="sample_pairs"), metadata=WHOLE)
    rm_scalar: Experiment = field(default_factory=lambda: Experiment(algorithm="scalar_rm"), metadata=WHOLE)
    rm_seq2seq: Experiment = field(default_factory=lambda: Experiment(algorithm="seq2seq_rm"), metadata=WHOLE)
    imitation: Experiment = field(default_factory=lambda: Experiment(algorithm="sft"), metadata=WHOLE)
    dpo: Experiment = field(default_factory=lambda: Experiment(algorithm="dpo"), metadata=WHOLE)
    best_of_n: Experiment = field(default_factory=lambda: Experiment(algorithm="best_of_n"), metadata=WHOLE)
    ppo: Experiment = field(default_factory=lambda: Experiment(algorithm="ppo"), metadata=WHOLE)
    evaluate: Experiment = field(default_factory=lambda: Experiment(algorithm="evaluate"), metadata=WHOLE)

    def __post_init__(self) -> None:
        for name, known in (("worlds", tasks.TASKS), ("arms", ARMS)):
            found = getattr(self, name)
            if not found or len(set(found)) < len(found):
                raise _wrong(name, ",".join(found), "each one once, at least one", ",".join(known))
            for one in found:
                if one not in known and not (name == "arms" and ":" in one and one.startswith(PPO)):
                    near = difflib.get_close_matches(one, known, n=1)
                    meant = f"; did you mean {near[0]}?" if near else ""
                    raise UserError(f"config.{name} has {one!r}; there are {', '.join(known)}{meant}")
                if one.startswith(PPO):
                    check_kind(one.removeprefix(PPO), "config.arms")
        for name in ("seeds", "selection_seeds"):
            found = getattr(self, name)
            if not found or len(set(found)) < len(found) or min(found) < 0:
                raise _wrong(name, found, "each once, at least one, none below 0", "1,2,3")
        both = sorted(set(self.seeds) & set(self.selection_seeds))
        if both:
            raise _wrong("seeds", self.seeds, f"seeds that settings are not chosen with, not {both[0]}", "1,2,3")
        for name in ("kl_coefs", "learning_rates", "dpo_betas"):
            found = getattr(self, name)
            if not found or list(found) != sorted(set(found)) or found[0] <= 0:
                raise _wrong(name, found, "numbers above 0, ascending", "0.05,0.2")
        if self.extensions < 0:
            raise _wrong("extensions", self.extensions, "at least 0", "2")
        if self.workers is not None and self.workers < 1:
            raise _wrong("workers", self.workers, "at least 1", "2")


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
      name: ``WORLD/seedK/WHAT``, and so its folder.
      experiment: its config.
      needs: names of the runs that come first.
      final: whether its policy is reported.
    """

    name: str
    experiment: Experiment
    needs: tuple[str, ...] = ()
    final: bool = False


@dataclass(frozen=True)
class Choice:
    """What came of choosing the settings of an arm in a world.

    Attributes:
      scores: mean score of each setting that was tried.
      chosen: the best one; None while there are settings to be tried.
      at_edge: whether the best one lies at an end of what was tried, although the grid was extended.
      wanted: settings to be tried now.
    """

    scores: Mapping[Setting, float]
    chosen: Setting | None
    at_edge: bool = False
    wanted: tuple[Setting, ...] = ()


def shrunk(study: Study) -> Study:
    """The study that is run: ``config.preset`` applied."""
    if study.preset == "full":
        return study

    def few(stage: Experiment, steps: int | None) -> Experiment:
        data = dataclasses.replace(stage.data, max_records=512, max_eval_records=64)
        return dataclasses.replace(stage, num_steps=steps, data=data)

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
        sft=few(study.sft, 60),
        pairs=dataclasses.replace(study.pairs, pairs=dataclasses.replace(study.pairs.pairs, count=256)),
        rm_scalar=few(study.rm_scalar, 8),
        rm_seq2seq=few(study.rm_seq2seq, 8),
        imitation=few(study.imitation, 4),
        dpo=few(study.dpo, 4),
        best_of_n=few(study.best_of_n, 1),
        ppo=few(study.ppo, 2),
        evaluate=few(study.evaluate, None),
    )


def axes(study: Study, arm: str) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Fields that are tuned for an arm, each with the values of its grid; none where there is nothing to tune."""
    rate = ("optimizer.lr", study.learning_rates)
    if arm.startswith(PPO):
        return (("ppo.kl_coef", study.kl_coefs), rate)
    if arm == "dpo":
        return (("dpo.beta", study.dpo_betas), rate)
    return (rate,) if arm == "sft_chosen" or arm.startswith("rft_") else ()


def choose(grid: Sequence[tuple[str, Sequence[float]]], scores: Mapping[Setting, float], extensions: int) -> Choice:
    """Go through a grid, and on along the lines through its best point while that lies at an end of one.

    Args:
      grid: fields and their values, ascending.
      scores: of the settings tried so far; the highest is best, of equal ones the first, and NaN is no score.
      extensions: most values beyond either end of an axis; each is as far from the last as the grid's values are.
    """
    names = [name for name, _ in grid]
    first = [tuple(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in grid))]
    missing = tuple(setting for setting in first if setting not in scores)
    if missing:
        return Choice(scores, None, wanted=missing)
    best = max(scores, key=lambda setting: -math.inf if math.isnan(scores[setting]) else scores[setting])
    wanted: list[Setting] = []
    at_edge = False
    for place, (name, values) in enumerate(grid):
        ratio = values[-1] / values[-2] if len(values) > 1 else math.sqrt(10)
        rest = best[:place] + best[place + 1 :]
        on_line = [dict(s)[name] for s in scores if s[:place] + s[place + 1 :] == rest]
        value = best[place][1]
        for is_end, end, step in (
            (value == min(on_line), values[0], 1 / ratio),
            (value == max(on_line), values[-1], ratio),
        ):
            if not is_end:
                continue
            beyond = float(f"{value * step:.3g}")
            if abs(math.log(beyond / end) / math.log(ratio)) <= extensions + 0.5:
                wanted.append((*best[:place], (name, beyond), *best[place + 1 :]))
            else:
                at_edge = True
    wanted = [setting for setting in wanted if setting not in scores]
    return Choice(scores, None, wanted=tuple(wanted)) if wanted else Choice(scores, best, at_edge)


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
                for run in _arm(study, world, seed, arm, setting, final=False):
                    add(run)
    for world, seed in itertools.product(study.worlds, study.seeds):
        for run in base(study, world, seed):
            add(run)
        for arm in study.arms:
            chosen = choices[world, arm].chosen
            if chosen is not None:
                for run in _arm(study, world, seed, arm, chosen, final=True):
                    add(run)
    return list(runs.values()), choices


def selection_run(study: Study, world: str, seed: int, arm: str, setting: Setting) -> Run:
    """The run whose score counts for a setting."""
    return _arm(study, world, seed, arm, setting, final=False)[-1]


def base(study: Study, world: str, seed: int) -> list[Run]:
    """What every arm of a world and seed starts from: SFT policy, pairs, both reward models."""
    at, task = f"{world}/seed{seed}/", f"{tasks.PREFIX}{world}"
    policy = dataclasses.replace(study.sft.model, path=None, preset=SIZES[study.size])
    found = [_run(study, at + "sft", study.sft, seed, task, policy)]
    start = _from(study, at + "sft", study.sft.model)
    found.append(_run(study, at + "pairs", study.pairs, seed, task, start, needs=(at + "sft",)))
    for name in ("rm_scalar", "rm_seq2seq"):
        template = getattr(study, name)
        if name == "rm_seq2seq":
            template = _changed(template, "evaluation.judge", task)
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
        found = choose(grid, known, study.extensions)
        if found.chosen is not None:
            return found
        fresh = {}
        for setting in found.wanted:
            names = [selection_run(study, world, seed, arm, setting).name for seed in study.selection_seeds]
            if all(name in scores for name in names):
                fresh[setting] = sum(scores[name] for name in names) / len(names)
        if len(fresh) < len(found.wanted):
            return dataclasses.replace(found, scores=known)
        known |= fresh


def _arm(study: Study, world: str, seed: int, arm: str, setting: Setting, *, final: bool) -> list[Run]:
    """The runs of an arm at a setting; the last one has its score, or answers the test prompts."""
    at, task = f"{world}/seed{seed}/", f"{tasks.PREFIX}{world}"
    name = f"{at}{arm.replace(':', '-')}"
    if not final:
        name = f"{at}select/{arm.replace(':', '-')}/{setting_name(setting)}"
    start, pairs = _from(study, at + "sft", study.sft.model), f"{_folder(study, at + 'pairs')}/pairs.jsonl"
    found = base(study, world, seed) if not final else []
    answering, best_of, reward = at + "sft", 1, study.evaluate.reward
    if arm.startswith(PPO):
        kind = arm.removeprefix(PPO)
        rm = at + ("rm_scalar" if kind in SCALAR_KINDS else "rm_seq2seq")
        template = _changed(study.ppo, "reward.kind", kind, "reward.model", _folder(study, rm))
        template = _changed(template, "critic.path", _folder(study, at + "rm_scalar"), "data.eval_split", "selection")
        if not final:  # nothing but its end is looked at
            template = _changed(template, "evaluation.every", 1_000_000)
        run = _run(study, name, template, seed, task, start, setting, (at + "rm_scalar", rm), final)
        found.append(run)
        answering, reward = name, run.experiment.reward
        if not final:
            return found
    elif arm == "sft_chosen" or arm == "dpo":
        template = study.dpo if arm == "dpo" else study.imitation
        found.append(_run(study, name, template, seed, pairs, start, setting, (at + "pairs",), final))
        answering = name
    elif arm.startswith(("rft_", "best_of_n_")):
        kind = "scalar" if arm.endswith("_scalar") else study.best_of_n.reward.kind
        rm = at + f"rm_{arm.removeprefix('rft_').removeprefix('best_of_n_')}"
        draw = _changed(study.best_of_n, "reward.kind", kind, "reward.model", _folder(study, rm))
        reward = draw.reward
        if arm.startswith("rft_"):
            winners = at + f"winners_{arm.removeprefix('rft_')}"
            found.append(_run(study, winners, draw, seed, task, start, (), (rm,)))
            data = f"{_folder(study, winners)}/winners.jsonl"
            found.append(_run(study, name, study.imitation, seed, data, start, setting, (winners,), final))
            answering, reward = name, study.evaluate.reward
        else:
            best_of = draw.best_of_n.n
    answers = AnswersConfig(
        splits=("test", "test_ood") if final else ("selection",),
        decodings=("sampled", "greedy") if final and best_of == 1 else ("sampled",),
        best_of=best_of,
        reference=_folder(study, at + "sft"),
        token_rewards=study.evaluate.answers.token_rewards,
    )
    template = dataclasses.replace(study.evaluate, answers=answers, reward=reward)
    asked = _folder(study, answering)
    needs = (answering, *([] if reward.model is None else [f"{at}{reward.model.rsplit('/', 1)[-1]}"]))
    model = dataclasses.replace(start, path=asked)
    found.append(
        _run(
            study,
            f"{name}/answers" if not final else f"{at}answers/{arm.replace(':', '-')}",
            template,
            seed,
            task,
            model,
            (),
            needs,
            final,
        )
    )
    return found


def setting_name(setting: Setting) -> str:
    """A setting as the name of a folder: ``kl_coef=0.05,lr=0.0003``."""
    return ",".join(f"{name.rsplit('.', 1)[-1]}={value:g}" for name, value in setting)


def _run(
    study: Study,
    name: str,
    template: Experiment,
    seed: int,
    data: str,
    model: ModelSource,
    setting: Setting = (),
    needs: tuple[str, ...] = (),
    final: bool = False,
) -> Run:
    changed = _changed(template, "data.path", data, *itertools.chain.from_iterable(setting))
    experiment = dataclasses.replace(changed, seed=seed, run_dir=_folder(study, name), model=model)
    return Run(name, experiment, tuple(dict.fromkeys(needs)), final)


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


def _wrong(name: str, found: object, required: str, example: str) -> UserError:
    return UserError(f"config.{name} is {found!r}; required {required}, e.g. --config.{name}={example}")
