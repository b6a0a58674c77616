"""What centring and scaling of token rewards are worth: runs of a study, once more with one field changed.

    PYTHONPATH=. python tests/benchmarks/reward_settings.py runs/study
    PYTHONPATH=. python tests/benchmarks/reward_settings.py runs/study --arms=ppo_soft --changes=center=none

Every run of an arm of PPO in the study (see configs/study.py) with one setting, by default the published one, is
repeated with the same seed, data, reward model, KL coefficient and learning rate. Printed is what the judge and the
length on the selection prompts become, and the difference with its 95 % interval over the seeds. The repetitions are
kept in STUDY/reward_settings, and are not run again. Two processes may share the work: ``--share=1/2`` and
``--share=2/2``.
"""

import argparse
import contextlib
import dataclasses
import json
import math
from pathlib import Path

from jaxrm.evaluation.win_rate import difference_interval
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.stage_config import PPO, read_stage
from jaxrm.stages.table import run_stage


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--arms", default="ppo_literal,ppo_soft", help="arms of PPO")
    parser.add_argument("--changes", default="center=none,scale=1.0", help="fields of config.reward with their values")
    parser.add_argument("--setting", default="kl_coef=0.02,lr=0.001", help="of the runs that are repeated")
    parser.add_argument("--share", default="1/1", help="which part of the runs to make, e.g. 1/2")
    args = parser.parse_args()
    arms, changes = args.arms.split(","), args.changes.split(",")
    finals = [
        found.parent
        for arm in arms
        for found in sorted((args.study / "runs").glob(f"*/seed*/{arm}/{args.setting}/run.json"))
        if (found.parent / "evaluation.json").exists()
    ]
    todo = [(final, change) for final in finals for change in changes]
    part, parts = map(int, args.share.split("/"))
    mine = todo[part - 1 :: parts]
    with Progress("runs", len(mine), unit="runs") as progress:
        for number, (final, change) in enumerate(mine, 1):
            again = repeated(args.study, final, change)
            if not (Path(again.run_dir) / "evaluation.json").exists():
                Path(again.run_dir).mkdir(parents=True, exist_ok=True)
                with (Path(again.run_dir).parent / "printed.log").open("a") as log, contextlib.redirect_stdout(log):
                    run_stage(again)
            progress.update(number)
    rows: list[list[str]] = []
    for world in dict.fromkeys(final.relative_to(args.study / "runs").parts[0] for final in finals):
        for arm in arms:
            here = [final for final in finals if final.relative_to(args.study / "runs").parts[::2] == (world, arm)]
            for change in changes:
                paths = [Path(repeated(args.study, final, change).run_dir) for final in here]
                pairs = [(after(a), after(b)) for a, b in zip(here, paths, strict=True) if after(a) and after(b)]
                if pairs:
                    rows.append([f"{world}, {arm}", change, str(len(pairs)), *compared(pairs)])
    print_table("Settings of the reward", ["arm", "change", "seeds", "judge", "difference", "length", "KL"], rows)


def repeated(study: Path, final: Path, change: str) -> PPO:
    """A final run of a study with one field of ``config.reward`` changed."""
    config = read_stage(json.loads((final / "run.json").read_text())["config"])
    field, _, text = change.partition("=")
    try:
        value: float | str = float(text)
    except ValueError:
        value = text
    folder = study / "reward_settings" / change / final.relative_to(study / "runs")
    reward = dataclasses.replace(config.reward, **{field: value})  # type: ignore[arg-type]  # checked by the class
    checkpoint = CheckpointConfig(every=config.num_steps or 1)
    return dataclasses.replace(config, reward=reward, run_dir=str(folder), checkpoint=checkpoint)


def after(run: Path) -> dict[str, float]:
    """What the policy gives after training; empty where the run is not done."""
    file = run / "evaluation.json"
    return dict(json.loads(file.read_text())["after"]) if file.exists() else {}


def compared(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> list[str]:
    """Mean judge before and after the change, their difference, length and KL."""
    firsts, seconds = zip(*pairs, strict=True)

    def both(name: str) -> str:
        of_first, of_second = (math.fsum(one[name] for one in side) / len(side) for side in (firsts, seconds))
        return f"{of_first:.3g} → {of_second:.3g}"

    apart = difference_interval([[one["judge"]] for one in seconds], [[one["judge"]] for one in firsts])
    interval = apart.note if apart.low is None else f"{apart.mean:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"
    return [both("judge"), interval, both("length"), both("kl")]


if __name__ == "__main__":
    main()
