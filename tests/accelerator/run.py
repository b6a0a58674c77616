"""All checks one after the other, each in a process of its own and within its time; see ``run.sh``."""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accelerator import table
from accelerator.checks import BY_NAME, CHECKS, Check
from accelerator.report import read_report
from accelerator.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
CHILD = [sys.executable, "-m", "accelerator.one_check"]
SECONDS = 530  # of all checks; below 9 minutes with what is before and after them
DESCRIPTION = """What this machine's accelerator does with jaxrm: correctness against its CPU, speed, memory.

Weights are random, at published shapes; nothing is downloaded. Needs JAX for the accelerator, flax, optax, chex and
jinja2. torch and transformers are measured beside it where they are installed. The exit status is 0 only if the checks
of correctness passed. The table and figures are written to OUT/table.md and OUT/results.json after every check."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tests/accelerator/run.sh", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="full", help="tiny and small are for CPU")
    parser.add_argument("--only", help="names of checks, with commas between them")
    parser.add_argument("--list", action="store_true", help="list the checks and run none")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "accelerator", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="bound of the whole")
    options = parser.parse_args(arguments)
    if options.list:
        for check in CHECKS:
            print(f"{check.name:16}{check.what}")
        return 0
    names = options.only.split(",") if options.only else list(BY_NAME)
    if unknown := [name for name in names if name not in BY_NAME]:
        parser.error(f"--only has {unknown[0]!r}, which is no check; use some of {','.join(BY_NAME)}")
    chosen = [check for check in CHECKS if check.name in names]
    signal.signal(signal.SIGTERM, _stop)  # the process of a check is ended too, and what there is so far is printed
    return run_checks(chosen, options, " ".join(["tests/accelerator/run.sh", *(arguments or sys.argv[1:])]))


def run_checks(chosen: list[Check], options: argparse.Namespace, command: str) -> int:
    """Run the checks, write and print their table; exit status 0 where nothing that decides failed."""
    started, out = time.monotonic(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "compiled", ignore_errors=True)  # of a run that was killed
    setting = table.describe_run(command, options.shape, ROOT)
    results: list[table.Result] = []
    try:
        for number, check in enumerate(chosen):
            left = options.seconds - (time.monotonic() - started)
            # What is left is shared by those that are left, each by what it asks for.
            limit = left * check.seconds / sum(each.seconds for each in chosen[number:])
            results.append(_run(check, options.shape, out, limit, started))
            _say(started, results[-1].line)
            table.write(out, setting, results)
            if results[-1].note.startswith("NoAcceleratorError"):
                return 2
    except KeyboardInterrupt:
        print("\nStopped; what there is so far:")
    finally:
        shutil.rmtree(out / "compiled", ignore_errors=True)
    print("\n" + table.markdown(setting, results))
    print(f"Table and figures: {out / 'table.md'}, {out / 'results.json'}; logs beside them.")
    deciding = [result for result in results if result.decides] or results
    passed = len(results) == len(chosen) and all(result.passed for result in deciding)
    print(f"{'passed' if passed else 'FAILED'} after {time.monotonic() - started:.0f} s")
    return 0 if passed else 1


def _run(check: Check, shape: str, out: Path, limit: float, started: float) -> table.Result:
    """One check in a process of its own, ended where it takes too long."""
    report, log = out / f"{check.name}.jsonl", out / f"{check.name}.log"
    report.unlink(missing_ok=True)
    command = [*CHILD, check.name, f"--shape={shape}", f"--report={report}"]
    begun, doing = time.monotonic(), ""
    _say(started, f"{check.name}: at most {limit:.0f} s")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(check, out), stdout=output, stderr=output, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - begun < limit:
                time.sleep(0.2)
                now = next((line["doing"] for line in reversed(read_report(report)) if "doing" in line), "")
                if now != doing:
                    _say(started, f"{check.name}: {now}")
                    doing = now
        finally:
            is_late = process.poll() is None
            if is_late:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - begun
    late = f"more than {limit:.0f} s; it was at: {doing or 'its start'}" if is_late else ""
    return table.Result.of(check, read_report(report), log, seconds, process.returncode, late)


def _environment(check: Check, out: Path) -> dict[str, str]:
    environment = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["PYTHONUNBUFFERED"] = "1"
    # What the planner compiles is what runs, so it is compiled once.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # of a GPU, which nobody else is on
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    platforms = environment.get("JAX_PLATFORMS", "")
    if check.is_torch:
        environment["JAX_PLATFORMS"] = "cpu"
    elif platforms and "cpu" not in platforms.split(","):  # which results are compared with
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"
    return environment


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
