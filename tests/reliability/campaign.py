"""Runs stopped at random moments and continued by the same command, compared with unbroken ones to the bit.

    python tests/reliability/campaign.py --kills=100
    python tests/reliability/campaign.py --kills=20 --stages=sft,ppo --seed=7 --workdir=/tmp/campaign

Real processes of every stage get SIGKILL or SIGTERM at moments spread evenly over the time that an unbroken run works,
from the first second to the last save. The same command continues, may be stopped again, and runs to its end. Then
every array of every checkpoint, metrics row, sample, evaluation and number of the closing report is compared. SIGTERM
must end with status 75, or 0 where the run was complete; before Python has begun, with nothing written.

Each process has one core and one thread, since bits depend on the number of threads. Exit status: 1 where anything
differs.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).resolve().parents[number]) for number in (1, 2)]

from support.launches import KILL, NEEDS, TERM, command, cpu_seconds, environment, errors_of, finish, launch
from support.same_run import closing_report, differences

from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.runtime.progress import format_seconds, print_table

SHARES = {"sft": 3, "scalar_rm": 3, "seq2seq_rm": 3, "dpo": 3, "best_of_n": 3, "ppo": 3, "pipeline": 1.5}
"""How many of the stops each stage gets; a pipeline takes five times as long as the others."""
_AGAIN = 0.75  # chance that a launch that continues a run is stopped too


@dataclasses.dataclass
class Stop:
    """One signal sent to a process.

    Attributes:
      stage: of the process.
      signal: its name.
      after: CPU seconds since the launch.
      phase: what the run's folder showed then.
      problem: how the process ended where that is wrong; empty where it is right.
      is_equal: whether the run that it belongs to ended as the unbroken one.
    """

    stage: str
    signal: str
    after: float
    phase: str
    problem: str = ""
    is_equal: bool = False

    @property
    def is_good(self) -> bool:
        """Whether nothing of it differs."""
        return self.is_equal and not self.problem


class Campaign:
    """Runs of the stages in ``folder``; ``unbroken/STAGE`` is what the others are compared with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.variables = environment(folder / "compiled")
        self._log = folder / "stops.jsonl"
        rows = self._log.read_text().splitlines() if self._log.exists() else []
        self.stops = [Stop(**json.loads(row)) for row in rows]
        self._seconds: dict[str, float] = {}
        self._reports: dict[str, str] = {}

    def unbroken(self, stage: str) -> None:
        """Run a stage twice without a stop: the first compiles, the second is timed; they must be the same."""
        run_dir, output = self.folder / "unbroken" / stage, self.folder / f"{stage}.txt"
        note = self.folder / "unbroken" / f"{stage}.json"
        if not note.exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            seconds = finish(command(stage, run_dir, self.folder / "unbroken"), self.variables, output)
            report = closing_report(output.read_bytes(), run_dir)
            self._reports[stage] = report
            if stage in SHARES:
                again = self.folder / "again" / stage
                shutil.rmtree(again, ignore_errors=True)
                seconds = finish(command(stage, again, self.folder / "unbroken"), self.variables, output)
                unlike = self._unlike(stage, again, output)
                assert not unlike, f"two unbroken runs differ: {unlike}"
                shutil.rmtree(again)
            note.write_text(json.dumps([seconds, report]))
        self._seconds[stage], self._reports[stage] = json.loads(note.read_text())

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
            if stop is not None:
                moments.pop()
                stops.append(stop)
            elif stops:  # it was done before
                break
            else:
                moments[-1] *= 0.95
                shutil.rmtree(run_dir, ignore_errors=True)
        try:
            finish(arguments, self.variables, output)
            unlike = self._unlike(stage, run_dir, output)
        except AssertionError as error:
            unlike = [f"the last launch: {error}"]
        for stop in stops:
            stop.is_equal = not unlike
        if not all(stop.is_good for stop in stops):  # to be looked at
            kept = Path(tempfile.mkdtemp(prefix=f"differing-{stage}-", dir=self.folder))
            shutil.copytree(run_dir, kept / "run")
            lines = [f"{x.signal} at {x.after:.1f} s, {x.phase}: {x.problem or 'as it should be'}" for x in stops]
            (kept / "what.txt").write_text("\n".join([*lines, *unlike]))
            print("\n".join(f"  DIFFERS {line}" for line in [*lines, *unlike][:12]), flush=True)
        self.stops += stops
        with self._log.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(stop)) + "\n" for stop in stops)
        return stops

    def _stop(self, stage: str, arguments: list[str], after: float, run_dir: Path, output: Path) -> Stop | None:
        signal_, files = self.rng.choice([KILL, TERM]), _files(run_dir)
        process = launch(arguments, self.variables, output)
        while process.poll() is None and cpu_seconds(process) < after:
            time.sleep(0.003)
        if process.poll() is not None:
            return None
        phase = phase_of(run_dir)
        process.send_signal(signal_)
        sent = time.monotonic()
        status = process.wait(timeout=600)
        stop = Stop(stage, signal_.name, after, phase)
        text = errors_of(output).read_text(errors="replace")
        # Python itself has not begun in the first instant.
        is_too_early = status == -TERM and after < 0.2 and _files(run_dir) == files
        if signal_ == TERM and status not in (EXIT_PREEMPTED, 0) and not is_too_early:
            stop.problem = f"exit status {status}: {text[-600:]}"
        elif "Traceback" in text:
            stop.problem = f"a traceback: {text[-1500:]}"
        elif time.monotonic() - sent > 30:
            stop.problem = f"{time.monotonic() - sent:.0f} s to its end"
        return stop

    def _unlike(self, stage: str, run_dir: Path, output: Path) -> list[str]:
        unlike = differences(run_dir, self.folder / "unbroken" / stage)
        if closing_report(output.read_bytes(), run_dir) != self._reports[stage]:
            unlike.append("the closing report reads otherwise")
        return unlike


def _files(folder: Path) -> dict[Path, float]:
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


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
    parser.add_argument("--kills", type=int, default=100, help="stops in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--stages", default=",".join(SHARES), help="which stages")
    parser.add_argument("--workdir", type=Path, help="folder; given again, it is continued, its unbroken runs are kept")
    given = parser.parse_args()
    stages = given.stages.split(",")
    folder = given.workdir or Path(tempfile.mkdtemp(prefix="jaxrm-campaign-"))
    (folder / "stopped").mkdir(parents=True, exist_ok=True)
    campaign, started = Campaign(folder, given.seed), time.monotonic()
    before = len(campaign.stops)
    print(f"{given.kills} stops of {', '.join(stages)}, seed {given.seed}, in {folder}; {before} are done", flush=True)
    for stage in dict.fromkeys(name for needing in stages for name in (*NEEDS.get(needing, ()), needing)):
        campaign.unbroken(stage)
        print(f"[{format_seconds(time.monotonic() - started)}] unbroken: {stage}", flush=True)
    moments = moments_of(given.kills, stages, given.seed)
    for stage in stages:
        done = sum(stop.stage == stage for stop in campaign.stops)
        moments[stage] = moments[stage][: max(len(moments[stage]) - done, 0)]
    begun, left = time.monotonic(), sum(map(len, moments.values()))
    while any(moments.values()):
        stage = max(moments, key=lambda name: len(moments[name]) / SHARES[name])
        stops = campaign.trial(stage, moments[stage])
        now, remaining = time.monotonic(), sum(map(len, moments.values()))
        seconds_left = (now - begun) / (left - remaining) * remaining
        shown = ", ".join(f"{stop.signal} at {stop.after:.1f} s, {stop.phase}" for stop in stops)
        print(
            f"[{format_seconds(now - started)}] {len(campaign.stops)}/{given.kills} {stage}: {shown}: "
            f"{'equal' if all(stop.is_good for stop in stops) else 'DIFFERS'} · {format_seconds(seconds_left)} left",
            flush=True,
        )
    return report(campaign.stops, stages)


def moments_of(kills: int, stages: list[str], seed: int) -> dict[str, list[float]]:
    """Moments of the stops of each stage, as shares of its time: one in each of equal parts, in random order."""
    rng, whole = random.Random(f"moments {seed}"), sum(SHARES[stage] for stage in stages)
    moments, begin = {}, 0
    for number, stage in enumerate(stages, 1):
        end = round(kills * sum(SHARES[name] for name in stages[:number]) / whole)
        moments[stage] = [(i + rng.random()) / (end - begin) for i in range(end - begin)]
        rng.shuffle(moments[stage])
        begin = end
    return moments


def report(stops: list[Stop], stages: list[str]) -> int:
    """Print the table, on the console and as Markdown; returns the exit status."""
    columns = ("stage", "stops", "SIGKILL", "SIGTERM", "phases", "equal")
    rows = []
    for stage in (*stages, "all"):
        some = [stop for stop in stops if stage in (stop.stage, "all")]
        kinds = [sum(stop.signal == name for stop in some) for name in ("SIGKILL", "SIGTERM")]
        phases = len({(stop.stage, stop.phase) for stop in some})
        rows.append((stage, len(some), *kinds, phases, f"{sum(stop.is_good for stop in some)} of {len(some)}"))
    print_table("Stopped runs", columns, rows)
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in [columns, ["---"] * len(columns), *rows]))
    return 0 if all(stop.is_good for stop in stops) else 1


if __name__ == "__main__":
    sys.exit(main())
