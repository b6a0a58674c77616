"""Tables of a finished pipeline on the console, and ``report.html`` in its folder.

Everything is read from the folders of the stages' runs, so it does not matter which launch ran them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm.algorithms.reward_config import in_words
from jaxrm.pipeline.config import PipelineStage
from jaxrm.reports.report import (
    Cell,
    Curves,
    ExampleResponse,
    Report,
    ReportExample,
    Series,
    SourceRewards,
    Table,
    write_report,
)
from jaxrm.runtime.metrics import read_rows
from jaxrm.runtime.progress import format_seconds, format_value, print_table
from jaxrm.stage_config import STAGES
from jaxrm.stages.compare.report import who_wins
from jaxrm.stages.compare.run import RESULT
from jaxrm.stages.ppo.report import source_columns, source_rows

_CURVES = (  # field of a row in metrics.jsonl, title, unit
    ("eval_judge", "Judge, held-out prompts", "mean judge score"),
    ("eval_refusals", "Refusals, held-out prompts", "share"),
    ("eval_reward", "Reward, held-out prompts", "sum over a response"),
    ("reward", "Reward of the rollouts", "sum over a response"),
    ("kl", "KL from the SFT policy", "nats a response"),
    ("sampler_mismatch", "Log-probs of the sampler less those of training", "mean |difference|, nats a token"),
    ("entropy", "Entropy of the policy", "nats a token"),
    ("response_length", "Length of the responses", "tokens"),
    ("explained_variance", "Explained variance of the critic", "share"),
)

_SOURCE_CURVES = (  # the same of each source of a sum of rewards
    ("reward", "Reward of the rollouts by source", "sum over a response, before its weight"),
    ("reward_share", "Share of the reward by source", "share of the spread of the sum"),
)
_SOURCES_NOTE = (
    "Rewards are before their weights. Share: how much of what tells responses apart is the source's own, its weight "
    "times the standard deviation of its rewards, over that of all. r: Pearson correlation over the responses."
)


def publish(path: Path, stages: Sequence[PipelineStage], seconds: Mapping[str, float]) -> None:
    """Print the tables and write the report.

    Args:
      path: folder of the pipeline.
      stages: those that are done, in their order.
      seconds: spent on each stage, by name.
    """
    timed = [(stage.name, _what(stage), format_seconds(seconds[stage.name])) for stage in stages]
    timed.append(("all", "", format_seconds(sum(seconds.values()))))
    columns = ("stage", "what", "time")
    print_table(f"Stages in {path}", columns, timed)
    by_source = source_tables(stages)
    tables = [*by_source, Table("Stages", columns, tuple(timed))]
    policies = policy_table(stages)
    if policies is not None:
        print_table(policies.title, policies.columns, policies.rows)
        if policies.note:
            print(f"{policies.note}\n")
        tables.insert(0, policies)
    tables[:0] = win_tables(stages)
    for table in by_source:
        print_table(table.title, table.columns, table.rows)
    report = path / "report.html"
    page = Report(
        title=f"{path.name}: results",
        about=_about(path, stages),
        tables=tables,
        curves=curves(stages),
        examples=examples(stages),
    )
    write_report(report, page)
    print(f"The runs are in {path}; the report is {report}", flush=True)


def policy_table(stages: Sequence[PipelineStage]) -> Table | None:
    """Held-out metrics of the policy that each PPO stage trained, and of the SFT policy; None without PPO.

    A metric that the stages measure differently (each reward model has its own reward) is given as
    ``before → after`` in each row.
    """
    ppo = [stage for stage in stages if stage.experiment.algorithm == "ppo"]
    evaluations = {stage.name: evaluation for stage in ppo if (evaluation := _evaluation(stage)) is not None}
    if not evaluations:
        return None
    metrics = [
        metrics for evaluation in evaluations.values() for metrics in (evaluation["before"], evaluation["after"])
    ]
    sft = metrics[0]
    names = [name for name in sft if all(name in each for each in metrics) and "/" not in name]
    shared = {
        name
        for name in names
        if all(_is_close(evaluation["before"][name], sft[name]) for evaluation in evaluations.values())
    }
    rows: list[tuple[Cell, ...]] = [("SFT", *(float(sft[name]) if name in shared else None for name in names))]
    for stage_name, evaluation in evaluations.items():
        before, after = evaluation["before"], evaluation["after"]
        cells = [
            float(after[name]) if name in shared else f"{_text(before[name])} → {_text(after[name])}" for name in names
        ]
        rows.append((f"{stage_name} ({evaluation['kind']})", *cells))
    counts = {format_value(evaluation["prompts"]) for evaluation in evaluations.values()}
    title = f"Policies on {' or '.join(sorted(counts))} held-out prompts"
    differing = [name for name in names if name not in shared]
    note = f"{', '.join(differing)}: before → after, since each row measures it in its own way." if differing else ""
    return Table(title, ("policy", *names), tuple(rows), note)


def win_tables(stages: Sequence[PipelineStage]) -> list[Table]:
    """Who wins, of each stage that compares policies."""
    results = [_folder(stage) / RESULT for stage in stages if stage.experiment.algorithm == "compare"]
    by_stage = [json.loads(path.read_text(encoding="utf-8"))["wins"] for path in results if path.exists()]
    return [who_wins(wins) for wins in by_stage if wins]


def source_tables(stages: Sequence[PipelineStage]) -> list[Table]:
    """What each source of a sum of rewards gave the policy, for each PPO stage with such a sum."""
    tables = []
    for stage in stages:
        evaluation = _evaluation(stage) if stage.experiment.algorithm == "ppo" else None
        if evaluation is None or not stage.experiment.rewards:
            continue
        before, after = ({f"eval_{name}": x for name, x in evaluation[side].items()} for side in ("before", "after"))
        rows = source_rows(before, after)
        title = f"Sources of the reward of {stage.name}, held-out prompts"
        columns = tuple(source_columns(rows, ("before", "after")))
        tables.append(Table(title, columns, tuple(tuple(row) for row in rows), _SOURCES_NOTE))
    return tables


def curves(stages: Sequence[PipelineStage]) -> list[Curves]:
    """One chart for each metric of PPO runs, with a line for each run, and for each source of a sum of rewards."""
    ppo = [stage for stage in stages if stage.experiment.algorithm == "ppo"]
    rows_of = {stage.name: read_rows(_folder(stage) / "metrics.jsonl") for stage in ppo}
    charts = []
    for field, title, unit in _CURVES:
        series = []
        for name, rows in rows_of.items():
            if points := _points(rows, field):
                series.append(Series(name, tuple(points), tuple(points.values())))
        if series:
            charts.append(Curves(title, "step", unit, tuple(series)))
    for field, title, unit in _SOURCE_CURVES:
        series = [
            Series(f"{stage.name}, {name}", tuple(points), tuple(points.values()))
            for stage in ppo
            for name in stage.experiment.rewards
            if (points := _points(rows_of[stage.name], f"{field}/{name}"))
        ]
        if series:
            charts.append(Curves(title, "step", unit, tuple(series)))
    return charts


def _points(rows: Sequence[Mapping[str, Any]], field: str) -> dict[float, float]:
    return {float(row["step"]): float(row[field]) for row in rows if row.get(field) is not None}


def examples(stages: Sequence[PipelineStage]) -> list[ReportExample]:
    """For each sampled prompt, the response before PPO and the last one of each PPO stage."""
    by_prompt: dict[str, list[ExampleResponse]] = {}
    for stage in stages:
        if stage.experiment.algorithm != "ppo":
            continue
        rows_by_prompt: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(_folder(stage) / "samples.jsonl"):
            rows_by_prompt.setdefault(row["prompt"], []).append(row)
        for prompt, rows in rows_by_prompt.items():
            responses = by_prompt.setdefault(prompt, [])
            first, last = (
                min(rows, key=_step),
                max(reversed(rows), key=_step),
            )  # where a step has two rows, the later one counts
            if not responses and first["step"] < last["step"]:
                responses.append(_response("SFT", first))
            responses.append(_response(f"{stage.name}, step {last['step']}", last))
    return [ReportExample(prompt, tuple(responses)) for prompt, responses in by_prompt.items()]


def _response(name: str, row: Mapping[str, Any]) -> ExampleResponse:
    facts = tuple((fact, format_value(float(row[fact]))) for fact in ("reward", "judge") if row.get(fact) is not None)
    rewards = tuple(float(reward) for reward in row.get("rewards", ()))
    sources = tuple(
        SourceRewards(source, each["weight"], each["reward"], tuple(each["rewards"]))
        for source, each in row.get("sources", {}).items()
    )
    return ExampleResponse(name, row["response"], tuple(row.get("tokens", ())), rewards, facts, sources)


def _step(row: Mapping[str, Any]) -> int:
    return int(row["step"])


def _evaluation(stage: PipelineStage) -> dict[str, Any] | None:
    file = _folder(stage) / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _folder(stage: PipelineStage) -> Path:
    return Path(stage.experiment.run_dir).expanduser()


def _what(stage: PipelineStage) -> str:
    algorithm = stage.experiment.algorithm
    return f"PPO, {in_words(stage.experiment)} rewards" if algorithm == "ppo" else STAGES[algorithm].phrase


def _text(value: float | str) -> str:
    return format_value(float(value))


def _is_close(a: float | str, b: float | str) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1e-6)


def _about(path: Path, stages: Sequence[PipelineStage]) -> list[tuple[str, str]]:
    """Where the results come from, as the last launch of the last stage recorded it."""
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
