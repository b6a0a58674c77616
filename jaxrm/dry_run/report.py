"""A dry run on the console and as a page: what was read, examples with the tokens that are trained on, sizes."""

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from jaxrm.data.readers import ReadReport
from jaxrm.pipeline.check import StageCheck
from jaxrm.reports.report import ExampleResponse, Report, ReportExample, Table, write_report
from jaxrm.runtime.progress import print_table
from jaxrm.stages.inspection import Inspection, ShownExample

_READING = ("records", "number", "share", "first at")
_SHOWN = 700  # characters of a piece of an example on the console


def as_text(stages: Mapping[str, StageCheck], done: Sequence[str]) -> str:
    """Tables and examples of all stages, and at the end which of them can run."""
    out = io.StringIO()
    for name, check in stages.items():
        if check.inspection is not None:
            _write_stage(out, name, check.inspection, heading=len(stages) > 1)
    rows = _verdicts(stages, done)
    if len(rows) > 1:
        print_table("Stages", ["stage", "can it run?"], rows, out)
    out.write(_closing(stages) + "\n")
    return out.getvalue()


def write_page(path: Path, stages: Mapping[str, StageCheck], done: Sequence[str], title: str) -> None:
    """The same as one self-contained HTML file."""
    rows = _verdicts(stages, done)
    tables = [Table("Stages", ("stage", "can it run?"), tuple(rows))] if len(rows) > 1 else []
    examples: list[ReportExample] = []
    for name, inspection in _inspected(stages).items():
        prefix = f"{name}: " if len(stages) > 1 else ""
        tables.append(
            Table(
                f"{prefix}what it comes to" if prefix else "What it comes to", ("", "figure"), tuple(_facts(inspection))
            )
        )
        for heading, report in inspection.reading.items():
            tables.append(Table(f"{prefix}{heading}", _READING, tuple(_reading_rows(report))))
        examples += [_page_example(prefix, example) for example in inspection.examples]
    page = Report(
        title=title,
        about=[("result", _closing(stages)), ("colored", "tokens that are trained on, or that a reward is read from")],
        tables=tables,
        examples=examples,
    )
    write_report(path, page)


def _inspected(stages: Mapping[str, StageCheck]) -> dict[str, Inspection]:
    return {name: check.inspection for name, check in stages.items() if check.inspection is not None}


def _verdicts(stages: Mapping[str, StageCheck], done: Sequence[str]) -> list[tuple[str, str]]:
    rows = [(name, "its run is there") for name in done]
    for name, check in stages.items():
        verdict = "yes"
        if check.error is not None:
            verdict = f"no: {str(check.error).removeprefix(f'stage {name}: ')}"
        elif check.waits_for:
            verdict = f"not checked, since it needs {' and '.join(check.waits_for)}"
        rows.append((name, verdict))
    return rows


def _closing(stages: Mapping[str, StageCheck]) -> str:
    failed = [name for name, check in stages.items() if check.error is not None]
    if failed:
        return f"{', '.join(failed)} cannot run as written. Nothing was trained and nothing was written."
    return "All checks passed. Nothing was trained and nothing was written."


def _write_stage(out: io.StringIO, name: str, inspection: Inspection, *, heading: bool) -> None:
    if heading:
        out.write(f"\n== {name}\n")
    for title, report in inspection.reading.items():
        print_table(title, _READING, _reading_rows(report), out)
    for number, example in enumerate(inspection.examples, 1):
        out.write(f"{example.title} {number}, from {example.source}, {len(example.tokens)} tokens\n")
        for is_target, text in _pieces(example):
            label = f"  {example.use if is_target else 'read':10} "
            lines = _shortened(text.lstrip(" ")).replace("\n", "\n" + " " * len(label))
            out.write(f"{label}{lines}\n")
        out.write("\n")
    print_table("What it comes to", ["", "figure"], _facts(inspection), out)


def _reading_rows(report: ReadReport) -> list[tuple[str, int, str, str]]:
    """What became of the records, with shares of all that were read."""
    return [(name, count, f"{100 * count / max(report.total, 1):.3g} %", first) for name, count, first in report.rows()]


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    """Figures by name, lengths first."""
    rows = []
    for name, lengths in inspection.lengths.items():
        middle, most, longest = np.percentile(lengths, [50, 90, 100])
        rows.append((name, f"median {middle:,.0f}, nine in ten up to {most:,.0f}, longest {longest:,.0f}"))
    return [*rows, *inspection.facts.items()]


def _pieces(example: ShownExample) -> list[tuple[bool, str]]:
    """Runs of tokens that are all trained on, or all not, as text."""
    runs = groupby(zip(example.is_target, example.tokens, strict=True), key=lambda pair: pair[0])
    return [(is_target, "".join(token for _, token in tokens)) for is_target, tokens in runs]


def _shortened(text: str) -> str:
    """A long text without its middle; characters that move the cursor are escaped, line ends stay."""
    if len(text) > _SHOWN:
        half = _SHOWN // 2
        text = f"{text[:half]} [… {len(text) - 2 * half:,} characters …] {text[-half:]}"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _page_example(prefix: str, example: ShownExample) -> ReportExample:
    return ReportExample(
        f"{prefix}{example.title}, from {example.source}",
        (
            ExampleResponse(
                f"{len(example.tokens)} tokens",
                "".join(example.tokens),
                example.tokens,
                tuple(1.0 if is_target else None for is_target in example.is_target),
                ((example.use, str(sum(example.is_target))),),
            ),
        ),
    )
