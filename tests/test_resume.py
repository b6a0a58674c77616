"""Stopping and continuing a real process: kill -9 anywhere, SIGTERM, another config, another mesh."""

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

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24


def command(run_dir, *more):
    fields = {
        "run_dir": run_dir,
        "num_steps": STEPS,
        "data.max_records": 300,
        "data.max_eval_records": 16,
        "data.batch_size": 4,
        "data.max_length": 64,
        "checkpoint.every": 3,
        "evaluation.every": 8,
        "evaluation.samples": 1,
        "evaluation.sampling.max_new_tokens": 4,
        "logging.every": 1,
        "logging.tensorboard": "false",
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "jaxrm.train", "--config=configs/quickstart.py", *overrides, *more]


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


def launch(environment, run_dir, *more):
    return subprocess.Popen(
        command(run_dir, *more),
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(environment, run_dir, *more):
    process = launch(environment, run_dir, *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def final_parameters(run_dir):
    import jax

    from jaxrm.runtime.mesh import MeshConfig, build_mesh
    from jaxrm.stages.trained import open_checkpoint

    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return jax.device_get(open_checkpoint(str(run_dir), mesh).params)


def rows_without_times(run_dir):
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name not in WALL_CLOCK} for row in rows]


@pytest.fixture(scope="module")
def unbroken(environment, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    finish(environment, run_dir)
    return run_dir


def steps_done(run_dir):
    path = Path(run_dir) / "metrics.jsonl"
    return path.read_text().count("grad_norm") if path.exists() else 0


def test_a_killed_run_ends_with_the_same_bits(environment, unbroken, tmp_path):
    """SIGKILL at random steps, the same command again until it is done."""
    import jax

    rng, run_dir, kills = random.Random(7), tmp_path / "run", []
    for _ in range(4):
        process = launch(environment, run_dir)
        target = rng.randrange(steps_done(run_dir) + 1, STEPS)
        deadline = time.monotonic() + 240
        while process.poll() is None and steps_done(run_dir) < target and time.monotonic() < deadline:
            time.sleep(0.002)
        if process.poll() is None:
            process.kill()
            kills.append(steps_done(run_dir))
        process.communicate()
    finish(environment, run_dir)
    assert len(kills) >= 2, kills
    for mine, theirs in zip(
        jax.tree.leaves(final_parameters(run_dir)), jax.tree.leaves(final_parameters(unbroken)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert rows_without_times(run_dir) == rows_without_times(unbroken)


def test_sigterm_saves_and_says_how_to_continue(environment, unbroken, tmp_path):
    run_dir = tmp_path / "run"
    process = launch(environment, run_dir)
    while process.poll() is None and steps_done(run_dir) < 4:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, output
    assert "the same command continues" in output
    saved = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdecimal())
    assert 4 <= saved[-1] < STEPS
    output = finish(environment, run_dir)
    assert rows_without_times(run_dir) == rows_without_times(unbroken)
    assert "resum" in output or "continu" in output


def test_a_finished_run_says_so_and_trains_no_more(environment, unbroken):
    before = rows_without_times(unbroken)
    output = finish(environment, unbroken)
    assert "Held-out data" in output and "train 1/" not in output
    assert rows_without_times(unbroken) == before


def test_another_config_is_refused_and_restart_keeps_the_old_run(environment, unbroken):
    process = launch(environment, unbroken, "--config.optimizer.lr=0.5")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    error = output.strip().splitlines()[-1]
    assert error.startswith("jaxrm: error:") and "optimizer.lr" in error and "on_existing=restart" in error
    finish(environment, unbroken, "--config.on_existing=restart", "--config.num_steps=2")
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
        "--config.num_steps=3",
    ]
    write("wash")
    finish(environment, run_dir, *more)
    write("clean")
    process = launch(environment, run_dir, *more)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "no longer gives the examples" in output.strip().splitlines()[-1]
    assert len(list((run_dir / "checkpoints").iterdir())) > 0


def test_a_loss_that_is_not_finite_stops_the_run_before_saving_it(environment, tmp_path):
    run_dir = tmp_path / "run"
    process = launch(
        environment,
        run_dir,
        "--config.optimizer.lr=1e30",
        "--config.optimizer.clip_norm=None",
        "--config.optimizer.warmup=0",
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    error = output.strip().splitlines()[-1]
    assert "is not finite" in error and "nothing was saved" in error and "Traceback" not in output
