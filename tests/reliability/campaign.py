"""Runs stopped at random moments and continued by the same command, compared with unbroken ones to the bit.

    python tests/reliability/campaign.py --kills=100
    python tests/reliability/campaign.py --kills=20 --stages=sft,ppo --seed=7 --workdir=/tmp/campaign

Real processes of every stage get SIGKILL or SIGTERM at moments spread evenly over the time that an unbroken run takes,
from the first second to the last save. The same command continues, may be stopped again, and runs to its end. Then
every array of every checkpoint, metrics row, sample, evaluation and number of the closing report is compared. SIGTERM
must end with status 75, or 0 where the run was complete.

Each process has one core and one thread, since bits depend on the number of threads. Exit status: 1 where anything
differs.
"""

import argparse
import dataclasses
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.launches import KILL, NEEDS, TERM, command, environment, finish, launch
from support.same_run import closing_report, differences

from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.runtime.progress import format_seconds, print_table

STAGES = ("sft", "scalar_rm", "seq2seq_rm", "dpo", "best_of_n", "ppo", "pipeline")
_AGAIN = 0.4  # chance that a launch that continues a run is stopped too


@dataclasses.dataclass
class Stop:
    """One signal sent to a process.

    Attributes:
      stage: of the process.
      signal: its name.
      after: seconds since the launch.
      phase: what the run's folder showed then.
      problem: how the process ended where that is wrong; empty where it is right.
      is_equal: whether the run that it belongs to ended as the unbroken one; None until it has.
    """

    stage: str
    signal: str
    after: float
    phase: str
    problem: str = ""
    is_equal: bool | None = None


class Campaign:
    """Runs of the stages in ``folder``; ``unbroken/STAGE`` is what the others are compared with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.variables = environment(folder / "compiled")
        self.stops: list[Stop] = []
        self.differing: list[str] = []
        self._seconds: dict[str, float] = {}
        self._reports: dict[str, str] = {}

    def unbroken(self, stage: str) -> None:
        """Run a stage twice without a stop: the first compiles, the second is timed; they must be the same."""
        run_dir, output = self.folder / "unbroken" / stage, self.folder / f"{stage}.txt"
        arguments = command(stage, run_dir, self.folder / "unbroken")
        shutil.rmtree(run_dir, ignore_errors=True)
        finish(arguments, self.variables, output)
        self._reports[stage] = closing_report(output.read_bytes(), run_dir)
        if stage not in STAGES:
            return
        again = self.folder / "again" / stage
        shutil.rmtree(again, ignore_errors=True)
        self._seconds[stage] = finish(command(stage, again, self.folder / "unbroken"), self.variables, output)
        self._compare(stage, again, output, "without a stop")
        shutil.rmtree(again)

    def trial(self, stage: str, moments: list[float]) -> list[Stop]:
        """Stop one run at one or more of the ``moments`` in turn, continue it to its end and compare.

        Args:
          stage: to run.
          moments: shares of the unbroken run's time; those used are taken from the end.

        Returns:
          The stops that were made.
        """
        run_dir, output = self.folder / "stopped" / stage, self.folder / f"{stage}.txt"
        shutil.rmtree(run_dir, ignore_errors=True)
        arguments, stops = command(stage, run_dir, self.folder / "unbroken"), []
        while moments and (not stops or self.rng.random() < _AGAIN):
            stop = self._stop(stage, arguments, moments[-1] * self._seconds[stage], run_dir, output)
            if stop is None:  # it was done before
                if not stops:
                    moments[-1] *= 0.95
                    shutil.rmtree(run_dir, ignore_errors=True)
                    continue
                break
            moments.pop()
            stops.append(stop)
        try:
            finish(arguments, self.variables, output)
            is_equal = self._compare(stage, run_dir, output, "; ".join(f"{x.signal} at {x.phase}" for x in stops))
        except AssertionError as error:
            self.differing.append(f"{stage}: {error}")
            is_equal = False
        for stop in stops:
            stop.is_equal = is_equal
            if stop.problem:
                self.differing.append(f"{stage}: {stop.signal} at {stop.phase}: {stop.problem}")
        if not is_equal:  # to be looked at
            run_dir.rename(self.folder / f"differing_{stage}_{len(self.differing)}")
        self.stops += stops
        return stops

    def _stop(self, stage: str, arguments: list[str], after: float, run_dir: Path, output: Path) -> Stop | None:
        signal_ = self.rng.choice([KILL, TERM])
        process = launch(arguments, self.variables, output)
        deadline = time.monotonic() + after
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(min(0.005, max(deadline - time.monotonic(), 0)))
        if process.poll() is not None:
            return None
        phase = phase_of(run_dir)
        process.send_signal(signal_)
        sent = time.monotonic()
        status = process.wait(timeout=120)
        stop = Stop(stage, signal_.name, after, phase)
        text = output.read_text(errors="replace")
        if signal_ == TERM and status not in (EXIT_PREEMPTED, 0):
            stop.problem = f"exit status {status}: {text[-600:]}"
        elif "Traceback" in text:
            stop.problem = f"a traceback: {text[-1500:]}"
        elif time.monotonic() - sent > 30:
            stop.problem = f"{time.monotonic() - sent:.0f} s to its end"
        return stop

    def _compare(self, stage: str, run_dir: Path, output: Path, what: str) -> bool:
        unlike = differences(run_dir, self.folder / "unbroken" / stage)
        report = closing_report(output.read_bytes(), run_dir)
        if report != self._reports[stage]:
            (self.folder / f"report_{stage}.txt").write_text(f"{self._reports[stage]}\n=====\n{report}")
            unlike.append("the closing report reads otherwise")
        if unlike:
            self.differing += [f"{stage} ({what}): {line}" for line in unlike[:8]]
            print("\n".join(f"  DIFFERS {line}" for line in unlike[:8]), flush=True)
        return not unlike


def phase_of(run_dir: Path) -> str:
    """Where a run is, by what is in its folder."""
    if (run_dir / "pipeline.json").exists():
        inner = [path.parent for path in run_dir.glob("*/run.json")]
        latest = max(inner, key=lambda path: (path / "run.json").stat().st_mtime, default=None)
        return "pipeline" if latest is None else f"{latest.name}: {phase_of(latest)}"
    if not (run_dir / "run.json").exists():
        return "before the folder"
    if (run_dir / "evaluation.json").exists():
        return "closed"
    for name in ("candidates.jsonl", "metrics.jsonl"):
        if (run_dir / name).exists() and (lines := (run_dir / name).read_text().split("\n")[:-1]):
            row = json.loads(lines[-1])
            evaluated = any(field.startswith("eval_") for field in row)
            return f"step {row['step']}{', evaluated' if evaluated else ''}"
    return "before the loop"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--workdir", type=Path)
    given = parser.parse_args()
    stages = given.stages.split(",")
    folder = given.workdir or Path(tempfile.mkdtemp(prefix="jaxrm-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stopped").mkdir(exist_ok=True)
    campaign, started = Campaign(folder, given.seed), time.monotonic()
    print(f"{given.kills} stops of {', '.join(stages)}, seed {given.seed}, in {folder}", flush=True)

    needed = dict.fromkeys(name for stage in stages for name in (*NEEDS.get(stage, ()), stage))
    for stage in needed:
        campaign.unbroken(stage)
        print(f"[{format_seconds(time.monotonic() - started)}] unbroken: {stage}", flush=True)
    begun = time.monotonic()
    moments = {}
    for number, stage in enumerate(stages):
        count = given.kills // len(stages) + (number < given.kills % len(stages))
        moments[stage] = [(i + campaign.rng.random()) / count for i in range(count)]
        campaign.rng.shuffle(moments[stage])
    while any(moments.values()):
        stage = max(moments, key=lambda name: len(moments[name]))
        stops = campaign.trial(stage, moments[stage])
        now, done = time.monotonic(), len(campaign.stops)
        left = (now - begun) / max(done, 1) * (given.kills - done)
        shown = ", ".join(f"{stop.signal} at {stop.after:.1f} s, {stop.phase}" for stop in stops)
        verdict = "equal" if all(stop.is_equal and not stop.problem for stop in stops) else "DIFFERS"
        print(
            f"[{format_seconds(now - started)}] {done}/{given.kills} {stage}: {shown}: {verdict} · "
            f"{format_seconds(left)} left",
            flush=True,
        )
    return report(campaign, stages)


def report(campaign: Campaign, stages: list[str]) -> int:
    """Print the table, on the console and as Markdown; returns the exit status."""
    columns = ("stage", "stops", "SIGKILL", "SIGTERM", "phases", "equal")
    rows = []
    for stage in (*stages, "all"):
        stops = [stop for stop in campaign.stops if stage in (stop.stage, "all")]
        good = sum(bool(stop.is_equal) and not stop.problem for stop in stops)
        kinds = [sum(stop.signal == name for stop in stops) for name in ("SIGKILL", "SIGTERM")]
        phases = len({(stop.stage, stop.phase) for stop in stops})
        rows.append((stage, len(stops), *kinds, phases, f"{good} of {len(stops)}"))
    print_table("Stopped runs", columns, rows)
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in [columns, ["---"] * len(columns), *rows]))
    for line in campaign.differing:
        print(f"DIFFERS {line}")
    return 1 if campaign.differing else 0


if __name__ == "__main__":
    sys.exit(main())
