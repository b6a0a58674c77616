"""Whether two folders hold the same run, to the bit: every array, row, sample, evaluation and number of a report."""

import json
import re
from pathlib import Path

import numpy as np

from jaxrm.runtime.metrics import is_wall_clock

_CLOSING = re.compile(rb"\n(Held-out data|Best of \d+ by|\d[\d,]* pairs of|Policies on)")
_STAGES = re.compile(rb"\nStages in ")
_STEP_TIMES = re.compile(rb"\nA step took.*?\n\n", re.DOTALL)
_TIME = re.compile(r"\b\d+(:\d\d)+\b|\b[\d.e-]+ s\b|\d{4}-\d\d-\d\d[T ][\d:.+]+|\b[0-9a-f]{40}\b")


def differences(folder: Path, other: Path) -> list[str]:
    """What the run in ``folder`` has otherwise than the one in ``other``, a line each; empty where they are the same.

    Times, and the folder's own name, are left out of the comparison.
    """
    mine, theirs = _files(folder), _files(other)
    unlike = [f"{name}: only in {'one' if name in mine else 'the other'} run" for name in sorted(mine ^ theirs)]
    for name in sorted(mine & theirs):
        one, two = (_content(root / name, root) for root in (folder, other))
        if isinstance(one, dict) and isinstance(two, dict):
            parts = sorted(one.keys() ^ two.keys()) + [k for k in sorted(one.keys() & two.keys()) if one[k] != two[k]]
            unlike += [f"{name}: {part}: {one.get(part)!s:.120} | {two.get(part)!s:.120}" for part in parts]
        elif one != two:
            unlike.append(f"{name}: {_first_difference(one, two)}")
    return unlike


def closing_report(output: bytes, root: Path) -> str:
    """The tables and samples at the end of what a run printed, without times and without the folder's name.

    Of a pipeline those of all stages, since a launch that continues it prints the reports of the stages that were left.
    """
    matches = list(_STAGES.finditer(b"\n" + output)) or list(_CLOSING.finditer(b"\n" + output))
    text = _STEP_TIMES.sub(b"", output[matches[0].start() :] if matches else b"")
    return _plain(text.decode(errors="replace"), root)


def _files(root: Path) -> set[str]:
    """Files by path; of a checkpoint its folder alone."""
    names = set()
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if "checkpoints" in parts:
            end = parts.index("checkpoints") + 2
            if len(parts) == end:
                names.add("/".join(parts))
        elif path.is_file() and path.name != ".lock":
            names.add("/".join(parts))
    return names


def _content(path: Path, root: Path) -> object:
    if path.is_dir():
        return _checkpoint(path)
    if path.name == "run.json":
        return _plain(json.dumps(json.loads(path.read_text())["config"], sort_keys=True), root)
    if path.name == "pipeline.json":
        records = json.loads(path.read_text())["stages"]
        return _plain(json.dumps({name: (x["state"], x["config"]) for name, x in records.items()}), root)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: x for name, x in row.items() if not is_wall_clock(name)} for row in rows]
    if path.suffix == ".npy":
        return np.load(path).tobytes()
    return _plain(path.read_bytes().decode(errors="replace"), root)


def _checkpoint(folder: Path) -> dict[str, object]:
    """Every array of a checkpoint as bytes, whatever it belongs to, and its JSON."""
    import warnings

    import jax
    import orbax.checkpoint as ocp

    warnings.filterwarnings("ignore", message="Sharding info not provided")
    parts: dict[str, object] = {}
    for item in sorted(folder.iterdir()):
        if (item / "_METADATA").exists():
            tree = ocp.PyTreeCheckpointer().restore(item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                array = np.asarray(leaf)
                name = f"{item.name}{jax.tree_util.keystr(path)}"
                parts[name] = (array.dtype, array.shape, hash(array.tobytes()))
        elif item.is_dir():
            files = (file for file in item.iterdir() if file.is_file() and file.name != "commit_success.txt")
            root = folder.parents[1]  # progress of PPO names the folders of its models
            root = root.parent if (root.parent / "pipeline.json").exists() else root
            parts |= {f"{item.name}/{file.name}": json.loads(_plain(file.read_text(), root)) for file in files}
    late = folder / "late_loss.json"  # of a checkpoint that was saved before it was evaluated
    if late.exists():
        parts["progress/metadata"]["loss"] = json.loads(late.read_text())["loss"]  # type: ignore[index]
    parts.pop("metrics/metrics", None)  # the loss again
    return parts


def _plain(text: str, root: Path) -> str:
    named = re.sub(rf"(?<!\w){re.escape(root.name)}(?!\w)", "RUN", text.replace(str(root), "RUN"))
    return _TIME.sub("TIME", named)


def _first_difference(one: object, two: object) -> str:
    if isinstance(one, list) and isinstance(two, list):
        for number, (a, b) in enumerate(zip(one, two, strict=False)):
            if a != b:
                return f"row {number + 1}: {a!s:.160} | {b!s:.160}"
        return f"{len(one)} rows | {len(two)} rows"
    if isinstance(one, str) and isinstance(two, str):
        at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        return f"{one[max(at - 60, 0) : at + 60]!r} | {two[max(at - 60, 0) : at + 60]!r}"
    return "other bytes"
