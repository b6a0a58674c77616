"""What a pipeline says when all its stages are done: tables, and ``report.html`` in its folder.

All of it is read from the folders of the stages' runs, so that it is the same whichever launch ran them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrm.pipeline.config import Stage
from jaxrm.runtime.metrics import read_rows
from jaxrm.runtime.progress import format_seconds, format_value, print_table

if TYPE_CHECKING:
    from jaxrm.reports.report import Curves, Example, ExampleResponse

_WHAT = {
    "sft": "supervised fine-tuning",
    "sample_pairs": "preference pairs sampled from a policy",
    "seq2seq_rm": "seq2seq reward model",
    "scalar_rm": "scalar reward model",
    "dpo": "direct preference optimization",
    "best_of_n": "best of n responses",
    "evaluate": "answers to test prompts",
}
_CURVES = (  # field of a row in metrics.jsonl, title, unit
    ("eval_judge", "Judge, held-out prompts", "mean mark"),
    ("eval_refusals", "Refusals, held-out prompts", "share"),
    ("eval_reward", "Reward, held-out prompts", "sum over a response"),
    ("reward", "Reward of the rollouts", "sum over a response"),
    ("kl", "KL from the SFT policy", "nats a response"),
    ("entropy", "Entropy of the policy", "nats a token"),
    ("response_length", "Length of the responses", "tokens"),
    ("explained_variance", "Variance of the returns that the critic explains", "share"),
)

Cell = str | float | int | None


class Comparison(NamedTuple):
    """The table of policies: those that PPO made under the one that it started from."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str


def close(path: Path, stages: Sequence[Stage], seconds: Mapping[str, float]) -> None:
    """Print the tables and write the report.

    Args:
      path: folder of the pipeline.
      stages: those that are done, in their order.
      seconds: spent on each, by name.
    """
    from jaxrm.reports.report import Table, write_report

    timed = [(stage.name, _what(stage), format_seconds(seconds[stage.name])) for stage in stages]
    timed.append(("all", "", format_seconds(sum(seconds.values()))))
    columns = ("stage", "what", "time")
    print_table(f"Stages in {path}", columns, timed)
    tables = [Table("Stages", columns, tuple(timed))]
    comparison = compare(stages)
    if comparison is not None:
        print_table(comparison.title, comparison.columns, comparison.rows)
        if comparison.note:
            print(f"{comparison.note}\n")
        tables.insert(0, Table(*comparison))
    report = path / "report.html"
    write_report(
        report,
        title=f"{path.name}: what came of it",
        about=_about(path, stages),
        tables=tables,
        curves=curves(stages),
        examples=examples(stages),
    )
    print(f"The runs are in {path}; the report is {report}", flush=True)


def compare(stages: Sequence[Stage]) -> Comparison | None:
    """Held-out metrics of each PPO stage's policy, and of the one that it started from; None without PPO.

    A metric that the stages measure differently (each reward model has its own reward) is given as
    ``before → after`` in each row.
    """
    found = {stage.name: _evaluation(stage) for stage in stages if stage.experiment.algorithm == "ppo"}
    evaluations = {name: evaluation for name, evaluation in found.items() if evaluation is not None}
    if not evaluations:
        return None
    sides = [(one["before"], one["after"]) for one in evaluations.values()]
    names = [name for name in sides[0][0] if all(name in side for both in sides for side in both)]
    first = sides[0][0]
    shared = {name for name in names if all(_same(before[name], first[name]) for before, _ in sides)}
    rows: list[tuple[Cell, ...]] = [("SFT", *(float(first[name]) if name in shared else None for name in names))]
    for (stage, one), (before, after) in zip(evaluations.items(), sides, strict=True):
        cells = [
            float(after[name]) if name in shared else f"{_text(before[name])} → {_text(after[name])}" for name in names
        ]
        rows.append((f"{stage} ({one['kind']})", *cells))
    counts = {format_value(one["prompts"]) for one in evaluations.values()}
    title = f"Policies on {' or '.join(sorted(counts))} held-out prompts"
    own = [name for name in names if name not in shared]
    note = f"{', '.join(own)}: before → after, since each row measures it in its own way." if own else ""
    return Comparison(title, ("policy", *names), tuple(rows), note)


def curves(stages: Sequence[Stage]) -> "list[Curves]":
    """One chart for each thing that PPO runs measure, with a line for each run."""
    from jaxrm.reports.report import Curves, Series

    ppo = [stage for stage in stages if stage.experiment.algorithm == "ppo"]
    rows = {stage.name: read_rows(_folder(stage) / "metrics.jsonl") for stage in ppo}
    charts = []
    for field, title, unit in _CURVES:
        series = []
        for name, measured in rows.items():
            points = {float(row["step"]): float(row[field]) for row in measured if row.get(field) is not None}
            if points:
                series.append(Series(name, tuple(points), tuple(points.values())))
        if series:
            charts.append(Curves(title, "step", unit, tuple(series)))
    return charts


def examples(stages: Sequence[Stage]) -> "list[Example]":
    """For each sampled prompt, the response before PPO and the last one of each PPO stage."""
    from jaxrm.reports.report import Example

    by_prompt: dict[str, list[ExampleResponse]] = {}
    for stage in stages:
        if stage.experiment.algorithm != "ppo":
            continue
        sampled: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(_folder(stage) / "samples.jsonl"):
            sampled.setdefault(row["prompt"], []).append(row)
        for prompt, rows in sampled.items():
            responses = by_prompt.setdefault(prompt, [])
            first, last = min(rows, key=_step), max(reversed(rows), key=_step)  # of one step the latest row counts
            if not responses and first["step"] < last["step"]:
                responses.append(_response("SFT", first))
            responses.append(_response(f"{stage.name}, step {last['step']}", last))
    return [Example(prompt, tuple(responses)) for prompt, responses in by_prompt.items()]


def _response(name: str, row: Mapping[str, Any]) -> "ExampleResponse":
    from jaxrm.reports.report import ExampleResponse

    facts = tuple((fact, format_value(float(row[fact]))) for fact in ("reward", "judge") if row.get(fact) is not None)
    rewards = tuple(float(reward) for reward in row.get("rewards", ()))
    return ExampleResponse(name, row["response"], tuple(row.get("tokens", ())), rewards, facts)


def _step(row: Mapping[str, Any]) -> int:
    return int(row["step"])


def _evaluation(stage: Stage) -> dict[str, Any] | None:
    file = _folder(stage) / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _folder(stage: Stage) -> Path:
    return Path(stage.experiment.run_dir).expanduser()


def _what(stage: Stage) -> str:
    algorithm = stage.experiment.algorithm
    return f"PPO, {stage.experiment.reward.kind} rewards" if algorithm == "ppo" else _WHAT[algorithm]


def _text(value: float | str) -> str:
    return format_value(float(value))


def _same(a: float | str, b: float | str) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1e-6)


def _about(path: Path, stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """Where the results come from, as the last stage's latest launch noted it."""
    lines = [("Folder", str(path))]
    file = _folder(stages[-1]) / "run.json"
    if not file.exists():
        return lines
    launch = json.loads(file.read_text(encoding="utf-8"))["launches"][-1]
    git, devices, versions = launch.get("git"), launch["devices"], launch["versions"]
    lines += [("Command", " ".join(launch["command"])), ("Last stage started", launch["started"])]
    lines.append(("Devices", f"{devices['count']} × {devices['kind']}"))
    lines.append(
        ("Versions", ", ".join(f"{name} {versions[name]}" for name in ("python", "jax") if versions.get(name)))
    )
    if git:
        lines.append(("Commit", git["commit"] + (", with changes" if git["dirty"] else "")))
    return lines
