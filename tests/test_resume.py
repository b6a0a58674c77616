"""Stopping and continuing a real process: kill -9 anywhere, SIGTERM, another config, other data."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrm.runtime.metrics import WALL_CLOCK
from jaxrm.runtime.preemption import EXIT_PREEMPTED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
REWARD_MODEL = {
    "num_steps": STEPS // 2,
    "data.batch_size": 2,
    "data.max_length": 128,
    "evaluation.judge": "task:safety",
}
SAMPLES = {"evaluation.samples": 1, "evaluation.sampling.max_new_tokens": 4}
CONFIGS = {"sft": "sft_tiny", "adapters": "sft_tiny", "seq2seq_rm": "rm_seq2seq_tiny", "scalar_rm": "rm_scalar_tiny"}
ALGORITHMS = {
    "sft": SAMPLES,
    # After half of the steps the warm-up is over: launches begin in either phase of the loader.
    "seq2seq_rm": REWARD_MODEL
    | SAMPLES
    | {"evaluation.corrections": 1, "mapping.identity_warmup_steps": STEPS // 4, "mapping.instruction": ""},
    "scalar_rm": REWARD_MODEL | {"reward.kind": "scalar"},
    "adapters": SAMPLES | {"lora.rank": 4},
}
KILL, TERM = signal.SIGKILL, signal.SIGTERM


def command(run_dir, *more, algorithm="sft"):
    fields = {
        "run_dir": run_dir,
        "num_steps": STEPS,
        "data.max_records": 300,
        "data.max_eval_records": 16,
        "data.batch_size": 4,
        "data.max_length": 64,
        "checkpoint.every": 3,
        "evaluation.every": 8,
        "model.path": "None",
        "model.preset": "tiny",
        "data.path": "task:safety",
        "logging.every": 1,
        "logging.tensorboard": "false",
        **ALGORITHMS[algorithm],
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "jaxrm.train", f"--config=configs/{CONFIGS[algorithm]}.py", *overrides, *more]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and one compilation cache for all launches, so that a launch takes seconds."""
    cache = tmp_path_factory.mktemp("compiled")
    return {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def launch(environment, run_dir, *more, algorithm="sft"):
    return subprocess.Popen(
        command(run_dir, *more, algorithm=algorithm),
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(environment, run_dir, *more, algorithm="sft"):
    process = launch(environment, run_dir, *more, algorithm=algorithm)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def final_parameters(run_dir):
    import jax

    from jaxrm.inference.load import load_policy, load_reward_model
    from jaxrm.sharding.mesh import MeshConfig, build_mesh

    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    recorded = json.loads((Path(run_dir) / "run.json").read_text())["config"]
    opened = load_policy if recorded["algorithm"] == "sft" else load_reward_model
    return jax.device_get(opened(str(run_dir), mesh=mesh).params)


def rows_without_times(run_dir):
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name not in WALL_CLOCK} for row in rows]


@pytest.fixture(scope="module")
def unbroken_run(environment, tmp_path_factory):
    """Folder of a run of an algorithm that nothing interrupted; each is run once."""

    @functools.cache
    def unbroken_run(algorithm):
        run_dir = tmp_path_factory.mktemp("unbroken") / algorithm
        finish(environment, run_dir, algorithm=algorithm)
        return run_dir

    return unbroken_run


@pytest.fixture
def unbroken(unbroken_run):
    return unbroken_run("sft")


def steps_done(run_dir):
    path = Path(run_dir) / "metrics.jsonl"
    return path.read_text().count("grad_norm") if path.exists() else 0


def assert_same_run(run_dir, other):
    import jax

    mine, theirs = final_parameters(run_dir), final_parameters(other)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rows_without_times(run_dir) == rows_without_times(other)
    if (other / "evaluation.json").exists():
        assert (run_dir / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


@pytest.mark.parametrize(
    ("algorithm", "signals"),
    [
        ("sft", [TERM, KILL, KILL]),
        ("seq2seq_rm", [TERM, KILL]),
        ("scalar_rm", [KILL, TERM]),
        ("adapters", [KILL, TERM]),
    ],
    ids=list(ALGORITHMS),
)
def test_a_stopped_run_ends_with_the_same_bits(environment, unbroken_run, tmp_path, algorithm, signals):
    """Stopped at random steps, mostly by SIGKILL, and the same command again until it is done."""
    unbroken, run_dir = unbroken_run(algorithm), tmp_path / "run"
    rng, stops, num_steps = random.Random(7), [], steps_done(unbroken)
    part = num_steps // (len(signals) + 1)  # nothing is sent in the last one
    for number, signal_ in enumerate(signals):
        process = launch(environment, run_dir, algorithm=algorithm)
        target = part * number + rng.randint(1, part)
        deadline = time.monotonic() + 240
        while process.poll() is None and steps_done(run_dir) < target and time.monotonic() < deadline:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal_)
            stops.append(steps_done(run_dir))
        output, _ = process.communicate()
        if signal_ == TERM:  # SIGTERM saves, and says how to continue
            assert process.returncode == EXIT_PREEMPTED, output
            assert "the same command continues" in output and not (run_dir / "evaluation.json").exists()
            saved = [int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdecimal()]
            assert target <= max(saved) < num_steps
        else:
            assert process.returncode in (0, -KILL), output
    output = finish(environment, run_dir, algorithm=algorithm)
    assert "continuing it" in output
    assert len(stops) >= 2, stops
    assert_same_run(run_dir, unbroken)


def test_a_finished_run_says_so_and_trains_no_more(environment, unbroken):
    before = rows_without_times(unbroken)
    output = finish(environment, unbroken)
    assert "Held-out data" in output and "train 1/" not in output
    assert rows_without_times(unbroken) == before


def test_another_config_is_refused_and_restart_keeps_the_old_run(environment, unbroken):
    process = launch(environment, unbroken, "--config.optimizer.lr=0.5")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    error = output.strip().splitlines()[-1]
    assert error.startswith("jaxrm: error:") and "optimizer.lr" in error and "on_existing=restart" in error
    # Fewer rows tell the new run; the steps stay the same, and so compiled.
    finish(environment, unbroken, "--config.on_existing=restart", "--config.logging.every=8")
    old = unbroken.with_name(unbroken.name + ".1")
    assert len(rows_without_times(old)) > len(rows_without_times(unbroken)) > 0
    unbroken.rename(unbroken.with_name("short"))
    old.rename(unbroken)


def test_other_data_under_the_same_name_are_refused(environment, tmp_path):
    """A position in one data set means nothing in another."""
    data, run_dir = tmp_path / "pairs.jsonl", tmp_path / "run"

    def write(word):
        rows = [{"prompt": f"say {i}", "response": f"{word} the lamp in the office"} for i in range(40)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    from jaxrm.data.tasks import write_task

    write_task("safety", tmp_path / "task", seed=0)
    more = [
        f"--config.data.path={data}",
        f"--config.data.tokenizer={tmp_path / 'task' / 'tokenizer'}",
        "--config.data.eval_share=0.2",
    ]
    write("wash")
    finish(environment, run_dir, *more)
    write("clean")
    process = launch(environment, run_dir, *more)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert "no longer gives the examples" in output.strip().splitlines()[-1]
    assert len(list((run_dir / "checkpoints").iterdir())) > 0


def test_a_loss_that_is_not_finite_stops_the_run_before_a_save(environment, tmp_path):
    run_dir = tmp_path / "run"
    process = launch(
        environment,
        run_dir,
        "--config.optimizer.lr=1e30",
        "--config.optimizer.clip_norm=None",
        "--config.optimizer.warmup=0",
    )
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    error = output.strip().splitlines()[-1]
    assert "is not finite" in error and "nothing was saved" in error and "Traceback" not in output
