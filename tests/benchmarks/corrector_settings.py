"""What makes a better corrector: seq2seq reward models of the study's worlds with some settings changed.

    PYTHONPATH=. python tests/benchmarks/corrector_settings.py runs/correctors
    PYTHONPATH=. python tests/benchmarks/corrector_settings.py runs/correctors --worlds=dialogue --seeds=1,2 --ppo \
        --variants "mapping.edit_weight=1" "mapping.edit_weight=4" "mapping.edit_weight=4 mapping.identity_weight=2"

Every variant is a list of fields of ``rm_seq2seq`` in configs/study.py; policies, pairs and all else are the study's,
with its seeds. For each world the table has means over the seeds, with the lowest and the highest: what the judge gives
more to corrections than to rejected and to chosen sources, and how often each kind of token rewards ranks held-out
pairs as the judge does. With ``--ppo`` there is the judge's mark of a policy after PPO, on selection prompts, beside
that of the scalar reward model and of SFT. Runs that are done are not repeated.
"""

import argparse
import contextlib
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from configs import study as study_file
from jaxrm.config.dicts import with_changes
from jaxrm.runtime.progress import print_table
from jaxrm.stages.table import run_stage

STUDY = study_file.get_config()
EVIDENCE = {"of rejected": ("rejected", "judge_gain"), "of chosen": ("chosen", "judge_gain")}


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--worlds", default="dialogue,safety,summarize")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--variants", nargs="+", default=[f"mapping.edit_weight={weight}" for weight in (1, 2, 4, 8)])
    parser.add_argument("--kinds", default="literal,soft,margin", help="that rank pairs, and are rewards of PPO")
    parser.add_argument("--ppo", nargs="*", help="fields of PPO; without any, KL 0.1, rate 3e-4 and 160 steps")
    parser.add_argument("--ppo-kinds", default="literal")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.folder / "compiled"))
    seeds, kinds = args.seeds.split(","), args.kinds.split(",")
    for seed in seeds:
        for world in args.worlds.split(","):
            site = Site(args.folder, world, int(seed))
            for variant in args.variants:
                site.reward_model(variant)
            if args.ppo is not None:
                for variant in (None, *args.variants):
                    for kind in args.ppo_kinds.split(",") if variant else ("scalar",):
                        site.ppo(variant, kind, args.ppo)
    for world in args.worlds.split(","):
        sites = [Site(args.folder, world, int(seed)) for seed in seeds]
        rows = [[variant, *row(sites, variant, kinds)] for variant in args.variants]
        print_table(
            f"{world}, seeds {args.seeds}: the judge's gain by correction, and pairs ranked as the judge",
            ["variant", *EVIDENCE, *kinds],
            rows,
        )
        if args.ppo is not None:
            ends = [["SFT", span([site.ppo(None, "scalar", args.ppo)["before"]["judge"] for site in sites]), ""]]
            for variant in (None, *args.variants):
                for kind in args.ppo_kinds.split(",") if variant else ("scalar",):
                    runs = [site.ppo(variant, kind, args.ppo)["after"] for site in sites]
                    shown = (span([run[name] for run in runs]) for name in ("judge", "kl"))
                    ends.append([f"{kind}, {variant}" if variant else kind, *shown])
            print_table(f"{world}, seeds {args.seeds}: after PPO", ["rewards", "judge", "KL"], ends)


class Site:
    """One seed in one world, and its runs."""

    def __init__(self, folder: Path, world: str, seed: int) -> None:
        self.folder, self.task, self.seed = folder / world / f"seed{seed}", f"task:{world}", seed

    def reward_model(self, variant: str) -> dict[str, Any]:
        """The evaluation of a seq2seq reward model."""
        pairs = {"data.path": str(self.pairs()), "evaluation.judge": self.task}
        return self.run(f"rm_seq2seq {variant}", STUDY.rm_seq2seq, pairs | fields(variant.split()))

    def ppo(self, variant: str | None, kind: str, changes: list[str]) -> dict[str, Any]:
        """The evaluation of PPO with a seq2seq reward model, or with the scalar one."""
        pairs = {"data.path": str(self.pairs()), "evaluation.judge": self.task}
        self.run("rm_scalar", STUDY.rm_scalar, pairs)
        own = fields(changes or ["ppo.kl_coef=0.1", "optimizer.lr=3e-4", "num_steps=160"])
        return self.run(
            f"ppo {kind} {variant or ''} {' '.join(changes)}".strip(),
            STUDY.ppo,
            {
                "data.path": self.task,
                "data.eval_split": "selection",
                "evaluation.every": 10_000,
                "critic.path": str(self.folder / "rm_scalar"),
                "reward.kind": kind,
                "reward.model": str(self.folder / (f"rm_seq2seq {variant}" if variant else "rm_scalar")),
            }
            | own,
        )

    def pairs(self) -> Path:
        """The pairs of this site's SFT policy."""
        file = self.folder / "pairs" / "pairs.jsonl"
        if not file.exists():
            self.run("sft", STUDY.sft, {"data.path": self.task}, preset="lab-tiny")
            self.run("pairs", STUDY.pairs, {"data.path": self.task})
        return file

    def run(self, name: str, template: Any, changes: dict[str, Any], preset: str | None = None) -> dict[str, Any]:
        """Run a stage unless it is done; its evaluation, if it has one."""
        run_dir = self.folder / name
        file = run_dir / "evaluation.json"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            path = None if preset else str(self.folder / "sft")
            model = replace(STUDY.sft.model, preset=preset, path=path)
            config = replace(with_changes(template, changes), seed=self.seed, run_dir=str(run_dir), model=model)
            with (self.folder / "printed.log").open("a") as log, contextlib.redirect_stdout(log):
                status = run_stage(config)
            if status:
                raise SystemExit(status)
            print(f"{run_dir} is done", flush=True)
            gc.collect()
            jax.clear_caches()
        return json.loads(file.read_text()) if file.exists() else {}


def fields(changes: list[str]) -> dict[str, Any]:
    """Values by dotted name from ``NAME=VALUE``."""
    pairs = (change.partition("=")[::2] for change in changes)
    return {name: json.loads(value) if value[:1] in "-0123456789[" else value for name, value in pairs}


def row(sites: list[Site], variant: str, kinds: list[str]) -> list[str]:
    """The numbers of a variant, over the seeds."""
    found = [site.reward_model(variant) for site in sites]
    gains = [span([one["corrections"][side][name] for one in found]) for side, name in EVIDENCE.values()]
    by_kind = [{ranking["kind"]: ranking["by_judge"][0] for ranking in one["kinds"]} for one in found]
    return [*gains, *(span([one[kind] for one in by_kind]) for kind in kinds)]


def span(numbers: list[float]) -> str:
    """Mean, lowest and highest."""
    return f"{sum(numbers) / len(numbers):.3f} [{min(numbers):.3f}, {max(numbers):.3f}]"


if __name__ == "__main__":
    main()
