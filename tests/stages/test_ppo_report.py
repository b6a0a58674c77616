"""What a PPO run tells: rows, warnings with likely causes, and the closing numbers."""

import io
import json

import numpy as np
import pytest

from jaxrm.runtime.metrics import PHASES, LoggingConfig, open_metrics, read_rows
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stages.ppo.report import PPOReporter, closing_report, warnings

HEALTHY = {
    "reward": 0.5,
    "kl": 0.8,
    "kl_error": 0.1,
    "entropy": 1.5,
    "value_loss": 0.4,
    "ended": 0.9,
    "end_tag": 0.9,
    "response_length": 20.0,
    "tokens_per_second": 1000.0,
}


def history(count, **changes):
    """Steps of a run that is well, the last of them changed; a list changes as many of the last steps."""
    rows = [dict(HEALTHY) for _ in range(count)]
    for name, values in changes.items():
        values = values if isinstance(values, list) else [values]
        for row, value in zip(rows[-len(values) :], values, strict=True):
            row[name] = value
    return rows


def test_a_healthy_run_is_not_warned_of():
    rng = np.random.default_rng(0)
    seen = []
    for step in range(200):
        kl = 0.0 if step == 0 else step / 20
        noise = rng.normal(0, 0.1)  # as far as the KL of few responses may be off
        changes = {"kl": kl + noise, "value_loss": 5.0 * 0.97**step + 0.1, "entropy": 1.5 - step / 180}
        seen.append(HEALTHY | changes)
        assert warnings(seen) == {}


@pytest.mark.parametrize(
    ("seen", "name", "words"),
    [
        (
            history(3, kl=[-0.5, -0.6, -0.7]),
            "negative KL",
            ("-0.7 nats a response", "three steps running", "--config.model.attention", "--config.model.dtype"),
        ),
        (
            history(2, entropy=0.14),
            "entropy",
            ("from 1.5 to 0.14 nats a token", "--config.optimizer.lr", "--config.ppo.kl_coef"),
        ),
        (
            history(6, value_loss=8.1),
            "value loss",
            ("the value loss is 8.1", "--config.reward.scale=unit", "--config.critic.optimizer.lr"),
        ),
        (
            history(1, ended=0.0, end_tag=0.0),
            "truncated",
            ("within 20 tokens", "--config.rollout.sampling.max_new_tokens", "--config.ppo.missing_end_penalty"),
        ),
        (
            history(10, ended=[1.0] * 10, end_tag=[0.95] * 5 + [0.7] * 5),
            "early ends",
            ("30% of the responses", "5% at first", "--config.ppo.early_end_penalty=1", "--config.optimizer.lr"),
        ),
    ],
    ids=["negative KL", "entropy", "value loss", "truncated", "early ends"],
)
def test_each_warning_comes_alone_with_a_cause_and_a_remedy(seen, name, words):
    found = warnings(seen)
    assert list(found) == [name]
    for word in words:
        assert word in found[name]
    assert "Likely causes" in found[name]


@pytest.mark.parametrize(
    "seen",
    [
        history(2, kl=[-0.5, -0.6]),  # only two steps
        history(4, kl=[-0.5, 0.1, -0.6, -0.7]),  # not running
        history(9, kl=[-0.3, -0.3, -0.3]),  # within four errors
        history(3, kl=[-0.5] * 3, kl_error=[0.0] * 3),  # of one response there is no error
        history(3, kl=[-1e-6] * 3, kl_error=[1e-9] * 3),  # rounding
        history(9, entropy=0.16),
        history(6, value_loss=7.9),
        history(5, value_loss=80.0),  # of too few steps there is no median to speak of
        history(9, value_loss=[1e-9] * 8 + [1e-6]),
        history(9, ended=0.01, end_tag=0.01),
        history(9, end_tag=[0.9] * 4 + [0.5] * 5),  # too few steps
        history(20, end_tag=[0.5] * 20),  # a reward model that would never end
        history(20, ended=[0.99] * 10 + [0.5] * 10, end_tag=[0.98] * 10 + [0.45] * 10),  # cut off, not early
    ],
    ids=lambda _: "",
)
def test_what_may_be_chance_is_not_warned_of(seen):
    assert warnings(seen) == {}


# --- the reporter


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, resumed=False, message="")


@pytest.fixture
def report(folder):
    """Runs a reporter over steps; returns the rows it wrote and the lines it printed."""

    def run(steps, *, every=1, num_steps=None, evaluations=()):
        stream = io.StringIO()
        config = LoggingConfig(every=every, tensorboard=False)
        num_steps = num_steps or len(steps)
        with (
            open_metrics(folder, config, after_step=None, run_config={}) as writer,
            Progress("ppo", num_steps, stream=stream, seconds=1e9) as progress,
        ):
            reporter = PPOReporter(
                writer, progress, every=every, num_steps=num_steps, learning_rate=lambda step: 1e-3 * (step + 1)
            )
            for step, metrics in evaluations:
                reporter.evaluation(step, metrics)
            for step, metrics in enumerate(steps, 1):
                reporter.step(step, metrics)
        return read_rows(folder.metrics), stream.getvalue().splitlines()

    return run


def warned(lines):
    return [int(line.split(":")[0].removeprefix("step ")) for line in lines if ": warning: " in line]


def test_a_warning_is_not_repeated_within_twenty_steps(report):
    _, lines = report(history(50, ended=[0.0] * 50, end_tag=[0.0] * 50))
    assert warned(lines) == [1, 21, 41]


def test_warnings_do_not_silence_each_other(report):
    """One that is over comes back after twenty steps."""
    steps = history(30)
    for step in (2, 3, 8, 21, 22):  # counted from 1
        steps[step - 1] |= {"ended": 0.0, "end_tag": 0.0}
    steps[8]["entropy"] = 0.01
    _, lines = report(steps)
    assert warned(lines) == [2, 9, 22]
    assert "entropy fell" in next(line for line in lines if line.startswith("step 9: warning"))


def test_rows_are_written_every_so_often_and_at_the_last_step(report):
    rows, _ = report(history(8), every=3)
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert [row["learning_rate"] for row in rows] == pytest.approx([3e-3, 6e-3, 8e-3])  # that of the step itself
    for row in rows:
        assert {name: row[name] for name in HEALTHY} == HEALTHY and row["host_memory_gib"] > 0


def test_an_evaluation_always_has_its_row_and_its_line(report):
    rows, lines = report(history(1), every=10, num_steps=5, evaluations=[(0, {"eval_reward": 0.25, "eval_kl": 1.5})])
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows] == [
        {"step": 0, "eval_reward": 0.25, "eval_kl": 1.5}
    ]
    assert "step 0: held-out reward 0.25 · kl 1.5" in lines


# --- the end


def test_the_closing_report_has_both_evaluations(folder, capsys):
    """It has the median of each phase as well."""
    rows = [{"step": 0, "eval_reward": 0.1, "eval_judge": 0.2}]
    for step, factor in enumerate((1.0, 50.0, 3.0), 1):  # the first steps compile
        phases = {f"{phase}_seconds": factor * (i + 1) for i, phase in enumerate(PHASES)}
        phases |= {f"{phase}_tokens_per_second": 700.0 * factor + i for i, phase in enumerate(PHASES)}
        rows.append({"step": step, "step_seconds": 10 * factor, **phases})
    rows += [{"step": 2, "eval_reward": 0.3, "eval_judge": 0.4}, {"step": 3, "eval_reward": 0.5, "eval_judge": 0.6}]
    folder.metrics.write_text("".join(json.dumps(row | {"time": 1.0}) + "\n" for row in rows))
    found = closing_report(folder, "soft", 17)
    assert found == {
        "step": 3,
        "prompts": 17,
        "kind": "soft",
        "before": {"reward": 0.1, "judge": 0.2},
        "after": {"reward": 0.5, "judge": 0.6},
    }
    lines = capsys.readouterr().out.splitlines()
    assert "A step took 30 s (median)" in lines
    table = {line.split()[0]: line.split()[1:] for line in lines if line.split()[:1] and line.split()[0] in PHASES}
    assert table == {phase: [str(3 * (i + 1)), f"{2100 + i:,}"] for i, phase in enumerate(PHASES)}
