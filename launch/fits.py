"""Fills the table of launch/README.md: which model and algorithm fit which devices, all from jaxrm.plan.

    python launch/fits.py            plans what runs/fits does not hold yet, then writes the table

Needs pip install -e '.[tpu]' and '.[gpu]', for the compilers; no accelerator. Each row is one run of jaxrm.plan, half
a minute to ten on two cores; what is planned is kept in runs/fits as JSON, so it may be stopped at any time. Remove a
file there to plan it again.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLANS = ROOT / "runs" / "fits"
BEGIN, END = "<!-- fits: written by launch/fits.py -->", "<!-- end of fits -->"
RM, PPO = "rm_seq2seq", "ppo"
RM_LORA, PPO_LORA = f"{RM}_lora", f"{PPO}_lora"
GRPO, GRPO_LORA = "grpo", "grpo_lora"
RLOO_LORA, RTO_LORA = "rloo_lora", "ppo_rto_lora"
# model, algorithm, topology, changes to the config
ROWS: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("gemma-2b", RM, "v5e:2x4", ()),
    ("gemma-2b", RM, "v5e:4x4", ()),
    ("gemma-2b", RM, "h100:8", ()),
    ("gemma-2b", PPO, "v5e:4x4", ()),
    ("llama-2-7b", RM, "v5e:2x4", ()),
    ("llama-2-7b", RM, "v5e:4x4", ()),
    ("llama-2-7b", RM, "v5e:16x16", ("mesh.tensor=4",)),
    ("llama-2-7b", RM, "v5p:4x4x4", ()),
    ("llama-2-7b", RM, "h100:8", ()),
    ("llama-2-7b", PPO, "v5e:16x16", ("mesh.tensor=2",)),
    ("llama-2-7b", PPO, "v5p:4x4x4", ("rollout.mesh.fsdp=1",)),
    ("llama-2-7b", PPO, "h100:8", ()),
    ("llama-2-7b", GRPO, "h100:8", ()),
    ("gemma-2b", PPO_LORA, "h100:1", ()),
    ("llama-2-7b", RM_LORA, "v5e:2x4", ()),
    ("llama-2-7b", RM_LORA, "h100:1", ()),
    ("llama-2-7b", PPO_LORA, "v5e:2x4", ()),
    ("llama-2-7b", PPO_LORA, "h100:1", ()),
    ("llama-2-7b", GRPO_LORA, "h100:1", ()),
    ("llama-2-7b", RLOO_LORA, "h100:1", ()),
    ("llama-2-7b", RTO_LORA, "h100:1", ()),
]


def load_or_make_plan(model: str, algorithm: str, topology: str, changes: tuple[str, ...]) -> dict:
    """The plan of a row as ``jaxrm.plan`` writes it, made now or before."""
    name = "_".join((model, algorithm, topology, *changes)).replace(":", "_").replace("=", "_")
    path = PLANS / f"{name}.json"
    if not path.exists():
        PLANS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "jaxrm.plan", f"--config={config_of(model, algorithm)}", f"--model={model}"]
        command += [f"--topology={topology}", f"--json={path}", "--tries=4"]
        command += [f"--config.{change}" for change in changes]
        print(shlex.join(command), flush=True)
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status not in (0, 1):
            sys.exit(f"jaxrm.plan ended with status {status}; see above")
    return json.loads(path.read_text(encoding="utf-8"))


def config_of(model: str, algorithm: str) -> str:
    """The config file of an algorithm for a model."""
    return f"configs/{algorithm}_{model.replace('-', '_').replace('.', '_')}.py"


def row(model: str, algorithm: str, topology: str, changes: tuple[str, ...]) -> str:
    """One row of the table in Markdown."""
    plan = load_or_make_plan(model, algorithm, topology, changes)
    peak = max(program["peak"] or program["needed"] or float("nan") for program in plan["programs"]) / 2**30
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    fits, speed = "yes", "–"
    if not plan["fits"]:
        fitting = [each["change"] for each in plan["tried"] if each["fits"]]
        flags = " ".join(f"--config.{name}={value}" for name, value in fitting[0].items()) if fitting else ""
        fits = f"no; with `{flags}`" if fitting else "no"
    elif plan["seconds"]:
        tokens = next(program["tokens"] * program["times"] for program in plan["programs"] if program["tokens"])
        speed = " to ".join(dict.fromkeys(f"{tokens / each / 1e3:,.0f}k" for each in reversed(plan["seconds"])))
    command = f"python -m jaxrm.train --config={config_of(model, algorithm)}"
    command += "".join(f" --config.{change}" for change in changes)
    memory = f"{peak:.3g} of {plan['memory'] / 2**30:g}"
    return f"| {model} | `{algorithm}` | `{topology}` | {mesh} | {fits} | {memory} | {speed} | `{command}` |"


def main() -> None:
    """Plan every row and write the table."""
    head = ["model", "algorithm", "topology", "mesh", "fits", "GiB a device", "tokens/s, estimated", "command"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(row(*each) for each in ROWS)]
    readme = ROOT / "launch" / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{rest.split(END)[1]}"
    unfinished = readme.with_name(".README.md.tmp")
    unfinished.write_text(new, encoding="utf-8")
    unfinished.replace(readme)
    print(f"The table is in {readme.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
