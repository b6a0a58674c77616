"""Commands of small runs of every stage, and real processes that execute them, each on one core.

The runs are as short as they can be and still have several evaluations, checkpoints, samples and a closing report.
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KILL, TERM, CTRL_C = signal.SIGKILL, signal.SIGTERM, signal.SIGINT

_LOGGING = {"logging.every": 1, "logging.tensorboard": "false"}
_TINY = {"model.path": "None", "model.preset": "tiny", "data.path": "task:safety"}
_SAVING = {"checkpoint.every": 3, "checkpoint.keep": 2, "evaluation.every": 4}
_SHORT = {"data.batch_size": 4, "data.max_length": 96, "data.max_eval_records": 16}
_SAMPLES = {"evaluation.samples": 2, "evaluation.sampling.max_new_tokens": 6}
_TRAINING = {**_LOGGING, **_SAVING, **_SHORT}
_RANKING = {"evaluation.judge": "task:safety", "optimizer.lr": 1e-3}
_ROLLOUT = {
    "data.max_length": 36,
    "data.batch_size": 8,
    "data.max_eval_records": 16,
    "rollout.sampling.max_new_tokens": 10,
    "reward.kind": "soft",
    "reward.calibration_responses": 8,
}


def _fields(folder: Path) -> dict[str, dict[str, object]]:
    """Overrides of each stage's config; what a stage is built on lies in ``folder``."""
    policy, pairs = {"model.path": folder / "sft"}, {"data.path": folder / "pairs" / "pairs.jsonl"}
    learning = {**_TRAINING, **policy, **pairs, "data.eval_share": 0.2}
    pipeline = {
        "sft": {**_TRAINING, **_SAMPLES, "data.max_records": 300, "num_steps": 8},
        "pairs": {"pairs.count": 48, "pairs.batch_size": 32, "pairs.sampling.max_new_tokens": 10},
        "rm_scalar": {**_TRAINING, "data.eval_share": 0.25, "num_steps": 5},
        "rm_seq2seq": {
            **_TRAINING,
            **_SAMPLES,
            "data.eval_share": 0.25,
            "num_steps": 5,
            "evaluation.corrections": 2,
        },
    }
    rollout = {name: x for name, x in _ROLLOUT.items() if name != "reward.kind"}
    for name in ("ppo_scalar", "ppo_seq2seq"):
        pipeline[name] = {**_LOGGING, **_SAVING, **_SAMPLES, **rollout, "num_steps": 5}
    return {
        "sft": {**_TRAINING, **_SAMPLES, **_TINY, "data.max_records": 300, "num_steps": 14},
        "pairs": {**policy, "pairs.count": 120, "pairs.sampling.max_new_tokens": 12},
        "scalar_rm": {**learning, **_RANKING, "num_steps": 11},
        "seq2seq_rm": {**learning, **_RANKING, **_SAMPLES, "num_steps": 11, "evaluation.corrections": 3},
        "dpo": {**learning, **_SAMPLES, "num_steps": 11},
        "best_of_n": {
            **_ROLLOUT,
            **policy,
            "reward.model": folder / "seq2seq_rm",
            "num_steps": 5,
            "best_of_n.n": 3,
            "best_of_n.keep_truncated": "true",
        },
        "ppo": {
            **_LOGGING,
            **_SAVING,
            **_SAMPLES,
            **_ROLLOUT,
            **policy,
            "reward.model": folder / "seq2seq_rm",
            "num_steps": 8,
            "evaluation.sampling.temperature": 1.0,
            "optimizer.lr": 1e-3,
        },
        "pipeline": {f"{stage}.{name}": x for stage, fields in pipeline.items() for name, x in fields.items()},
    }


CONFIGS = {
    "sft": "configs/sft_tiny.py",
    "pairs": "configs/pairs_tiny.py",
    "scalar_rm": "configs/rm_scalar_tiny.py",
    "seq2seq_rm": "configs/rm_seq2seq_tiny.py",
    "dpo": "configs/dpo_tiny.py",
    "best_of_n": "tests/support/best_of_n_tiny.py",
    "ppo": "configs/ppo_tiny.py",
    "pipeline": "configs/quickstart.py",
}
NEEDS = {
    "pairs": ("sft",),
    "scalar_rm": ("sft", "pairs"),
    "seq2seq_rm": ("sft", "pairs"),
    "dpo": ("sft", "pairs"),
    "best_of_n": ("sft", "pairs", "seq2seq_rm"),
    "ppo": ("sft", "pairs", "seq2seq_rm"),
}
"""The stages that each stage is built on, in the order in which they run."""


def command(stage: str, run_dir: Path, folder: Path, **more: object) -> list[str]:
    """Command line of a stage.

    Args:
      stage: a key of ``CONFIGS``.
      run_dir: where it runs.
      folder: with the runs that it is built on.
      **more: further overrides, with ``__`` for a dot.
    """
    fields = _fields(folder)[stage] | {"run_dir": run_dir} | {k.replace("__", "."): x for k, x in more.items()}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "jaxrm.train", f"--config={CONFIGS[stage]}", *overrides]


def environment(compiled: Path) -> dict[str, str]:
    """Variables of a process: one device, one thread, and what was compiled before is read from ``compiled``.

    A torch that is installed counts as too old, so that transformers does not import it, which takes seconds.
    """
    note = compiled / "packages" / "torch-0.0.dist-info" / "METADATA"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0\n")
    return {
        **os.environ,
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(note.parents[1])]),
        "TRANSFORMERS_VERBOSITY": "error",
    }


def launch(arguments: list[str], variables: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """Start a process on one core, the first that this one may use.

    What it prints goes to the file ``output``, and its errors to another one, ``errors_of(output)``.
    """
    core = min(os.sched_getaffinity(0))
    with output.open("wb") as file, errors_of(output).open("wb") as errors:
        return subprocess.Popen(
            ["taskset", "-c", str(core), *arguments],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=errors,
        )


def finish(arguments: list[str], variables: dict[str, str], output: Path, timeout: float = 900) -> float:
    """Run a command to its end, which must be a good one; returns its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = launch(arguments, variables, output)
    try:
        status = process.wait(timeout)
    finally:
        process.kill()
    assert status == 0, f"exit status {status}: {errors_of(output).read_text(errors='replace')[-3000:]}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds that a process has worked so far; other than its age they do not depend on what else is running."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def errors_of(output: Path) -> Path:
    """Where the errors of a process are whose output is in a file."""
    return output.with_suffix(".errors")
