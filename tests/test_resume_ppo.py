"""PPO in a real process: stopped at random moments of rollout, scoring, update or saving, it ends with the same bits.

The suite stops it a few times. For more, with a seq2seq reward model, SFT data and minibatches:

    JAXRM_STOPS=24 python -m pytest tests/test_resume_ppo.py -s
"""

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
STOPS = int(os.environ.get("JAXRM_STOPS", "3"))
MANY = STOPS > 3
STEPS = 48 if MANY else 10
KILL, TERM = signal.SIGKILL, signal.SIGTERM
REWARDS = '''"""Rewards for the test."""

def variety(prompts, responses):
    assert all(prompt[-1].role == "user" for prompt in prompts)
    return [len(set(response.split())) / 7 for response in responses]
'''


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, one compilation cache for all launches, and a module with a reward function."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "rewards_of_the_test.py").write_text(REWARDS)
    return {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }


def launch(environment, fields, config="ppo_tiny"):
    alone = {"model.path": None, "model.preset": "tiny", "data.path": "task:safety"}  # no run is needed
    fields = {"logging.every": 1, "logging.tensorboard": "false", "data.max_eval_records": 8, **alone, **fields}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxrm.train", f"--config=configs/{config}.py", *overrides],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(
    scope="module", params=[{}, {"lora.rank": 4, "rollout.responses_per_prompt": 2}], ids=["whole", "adapters"]
)
def ppo(environment, tmp_path_factory, request):
    """Fields of the run; the policy is drawn by chance."""
    fields = {
        "num_steps": STEPS,
        "data.max_length": 36,
        "data.batch_size": 8,
        "rollout.sampling.max_new_tokens": 12,
        "evaluation.sampling.max_new_tokens": 12,
        "evaluation.sampling.temperature": 1.0,
        "evaluation.every": 4,
        "evaluation.samples": 2,
        "checkpoint.every": 2,
        "reward.calibration_responses": 8,
        **request.param,
    }
    if not MANY:
        function = {"reward.function": "rewards_of_the_test:variety", "reward.model": None}
        return fields | function | {"reward.kind": "scalar"}
    run_dir = tmp_path_factory.mktemp("reward") / "model"
    few = {"num_steps": 2, "data.batch_size": 2, "data.max_length": 128, "mapping.instruction": ""}
    few |= {"evaluation.corrections": 0, "run_dir": run_dir, "evaluation.judge": None}
    output, _ = (process := launch(environment, few, "rm_seq2seq_tiny")).communicate()
    assert process.returncode == 0, output
    ptx = {"ptx.path": "task:safety", "ptx.max_length": 64, "ptx.batch_size": 2, "ppo.num_minibatches": 2}
    return fields | ptx | {"reward.kind": "soft", "reward.model": run_dir, "ppo.num_epochs": 2}


@pytest.fixture(scope="module")
def unbroken(environment, ppo, tmp_path_factory):
    """Folder of a run that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    output, _ = (process := launch(environment, ppo | {"run_dir": run_dir})).communicate(timeout=600)
    assert process.returncode == 0, output
    return run_dir


def rows(path):
    """Rows of a file without what depends on the clock, the last line of a killed launch left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{name: x for name, x in json.loads(line).items() if name not in WALL_CLOCK} for line in lines]


def steps_done(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("policy_loss") if path.exists() else 0


def arrays_of(run_dir):
    """Every array of the last checkpoint as it lies on disk, whatever it belongs to."""
    import orbax.checkpoint as ocp

    last = max(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdecimal())
    with ocp.CheckpointManager((run_dir / "checkpoints").resolve()) as manager:
        names = [path.name for path in (run_dir / "checkpoints" / str(last)).iterdir() if path.is_dir()]
        names = sorted(name for name in names if name not in ("progress", "metrics"))
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in names})
        return last, dict(manager.restore(last, args=args))


def assert_same(run_dir, other):
    import jax

    (step, mine), (other_step, theirs) = arrays_of(run_dir), arrays_of(other)
    assert step == other_step == STEPS
    assert {"params", "opt_state", "critic_params", "critic_opt_state", "feedback"} <= set(mine) == set(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(run_dir / name) == rows(other / name), name
    assert len({row["step"] for row in rows(other / "samples.jsonl")}) >= 3
    assert (run_dir / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


@pytest.mark.each_python
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_stopped_run_ends_with_the_same_bits(environment, ppo, unbroken, tmp_path):
    """SIGKILL mostly, a SIGTERM now and then, a random time after a random step; the same command until it is done."""
    run_dir, rng, stops, fields = tmp_path / "run", random.Random(11), [], None
    fields = ppo | {"run_dir": run_dir}
    num_stops = STOPS if MANY or "lora.rank" not in ppo else 1
    for number in range(num_stops):
        process = launch(environment, fields)
        target = max(steps_done(run_dir) + (0 if MANY else 1), (number * STEPS) // STOPS)
        while process.poll() is None and steps_done(run_dir) <= target:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.4)  # somewhere in a step
        if process.poll() is None:
            signal_ = TERM if number % 3 == 2 else KILL
            process.send_signal(signal_)
            sent = time.monotonic()
            output, _ = process.communicate()
            seconds = time.monotonic() - sent
            assert process.returncode in (0, EXIT_PREEMPTED if signal_ == TERM else -KILL), output
            if process.returncode == EXIT_PREEMPTED:
                assert "the same command continues" in output and seconds < 30
            stops.append((steps_done(run_dir), signal_.name, round(seconds, 1)))
        else:
            process.communicate()
    output, _ = (process := launch(environment, fields)).communicate(timeout=600)
    assert process.returncode == 0, output
    print(f"\n{len(stops)} stops of {STEPS} steps: {stops}")
    assert len(stops) >= min(max(num_stops - 1, 1), 20), stops
    assert_same(run_dir, unbroken)
