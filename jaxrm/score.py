"""Score responses token by token with a reward model, and see what it would have written.

python -m jaxrm.score --checkpoint=runs/rm_seq2seq_tiny --input=pairs.jsonl --output=scored.jsonl --html=scored.html
python -m jaxrm.score --checkpoint=runs/rm_seq2seq_tiny --kind=soft --input=pairs.jsonl --output=scored.jsonl

The input holds pairs, or prompts with one response, in any schema that jaxrm reads. Token rewards are written before
scale and centre, which belong to a run of PPO.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxrm import command_line
from jaxrm.errors import UserError
from jaxrm.experiment import Experiment

if TYPE_CHECKING:
    from jaxrm.data.readers import ReadReport
    from jaxrm.data.records import Record

FLAG_OF_FIELD = {"config.data.path": "input", "config.data.eval_path": "input"}


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    text = flags.DEFINE_string
    text(
        "checkpoint", None, "folder of a reward model's run, or RUN_DIR/checkpoints/STEP (or /best)", flag_values=values
    )
    text("input", None, "file of pairs, or of prompts and responses", flag_values=values)
    text("output", None, "JSONL to write, one record a line", flag_values=values)
    text("html", None, "page to draw, one self-contained file", flag_values=values)
    text("kind", None, "kind of token reward; that of the config or of the run by default", flag_values=values)
    text("reference", None, "with --kind=contrast: folder of the reference policy's run", flag_values=values)
    flags.DEFINE_bool("corrections", True, "let a seq2seq reward model write its corrections", flag_values=values)
    integer = flags.DEFINE_integer
    integer("max_new_tokens", 128, "longest correction in tokens", lower_bound=1, flag_values=values)
    integer("max_records", None, "score no more than so many records", lower_bound=1, flag_values=values)
    integer("batch_size", 16, "responses scored at once", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "compute dtype", flag_values=values)


def main(config: Experiment | None, given: flags.FlagValues) -> int:
    """Open the model, score, write and draw."""
    for name, example in (
        ("checkpoint", "runs/rm_seq2seq_tiny"),
        ("input", "pairs.jsonl"),
        ("output", "scored.jsonl"),
    ):
        if getattr(given, name) is None:
            raise UserError(f"--{name} is missing; e.g. --{name}={example}")
    _check_target("output", given.output, "scored.jsonl")
    if given.html is not None:
        _check_target("html", given.html, "scored.html")
    if (given.kind == "contrast") != (given.reference is not None):
        raise UserError("--kind=contrast and --reference=RUN_DIR go together; give both or neither")

    from jaxrm.algorithms.scoring import SCALAR_KINDS, RewardConfig
    from jaxrm.evaluation.ranking import pair_accuracy
    from jaxrm.runtime.mesh import MeshConfig, build_mesh
    from jaxrm.runtime.progress import print_table
    from jaxrm.stages import scored
    from jaxrm.stages.trained import open_checkpoint, open_reward_model

    records, report = _read(given.input, given.max_records)
    mesh = build_mesh(config.mesh if config is not None else MeshConfig())
    model = open_reward_model(given.checkpoint, mesh, given.dtype)
    default = "literal" if model.is_seq2seq else "scalar"
    recorded = model.config.reward.kind
    fits = (recorded in SCALAR_KINDS) != model.is_seq2seq
    kind = given.kind or (config.reward.kind if config is not None else recorded if fits else default)
    RewardConfig(kind=kind)  # refuses what is no kind at all
    scored.check_kind(kind, model)
    tasks = scored.encode(records, model, report)
    if not tasks:
        reason, found = next(iter(report.bad.items()))
        raise UserError(
            f"--input is {given.input!r}, of which nothing can be scored: {reason} (first at {found.first})"
        )
    reference = None
    if given.reference is not None:
        reference = open_checkpoint(given.reference, mesh, given.dtype)
        if reference.model.config.vocab_size != model.model.config.vocab_size:
            raise UserError(
                f"--reference has a vocabulary of {reference.model.config.vocab_size} tokens, but the reward model's "
                f"has {model.model.config.vocab_size}; both must read the same ids"
            )

    rewards = scored.score(model, tasks, kind, mesh=mesh, rows=given.batch_size, reference=reference)
    corrections: Sequence[Any] = [None] * len(tasks)
    if model.is_seq2seq and given.corrections:
        corrections = scored.correct(model, tasks, max_new_tokens=given.max_new_tokens)
    rows = [
        scored.as_record(model, task, found, written, kind)
        for task, found, written in zip(tasks, rewards, corrections, strict=True)
    ]
    _write_lines(Path(given.output).expanduser(), rows)

    print_table(f"Records in {given.input}", ["records", "number", "first at"], report.rows())
    pairs = [[response["sum"] for response in row["responses"]] for row in rows if len(row["responses"]) == 2]
    about = [("reward model", model.name), ("kind", kind), ("records", f"{len(rows):,}")]
    if pairs:
        ranked = pair_accuracy(*zip(*pairs, strict=True))
        said = f"{100 * ranked.accuracy:.1f} % [{100 * ranked.low:.1f}, {100 * ranked.high:.1f}]"
        about.append(("chosen above rejected, by sum", f"{said} of {ranked.n:,} pairs"))
    print_table("Scored", ["", ""], about)
    print(f"The token rewards are in {given.output}")
    if given.html is not None:
        from jaxrm.evaluation.page import write_page

        write_page(Path(given.html).expanduser(), rows, title=f"What {model.name} says", about=about)
        print(f"The page is {given.html}; open it in a browser")
    return 0


def _check_target(flag: str, path: str, example: str) -> None:
    target = Path(path).expanduser()
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        reason = "is a folder" if target.is_dir() else f"cannot be written, since {target.parent} is no such folder"
        raise UserError(f"--{flag} is {path!r}, which {reason}; give a file, e.g. --{flag}={example}")


def _read(path: str, most: int | None) -> "tuple[list[Record], ReadReport]":
    from jaxrm.data.config import DataConfig
    from jaxrm.data.readers import read_records

    # Nothing is held out of a file to score: the held-out side of a file given as such is all of it.
    return read_records(DataConfig(path=path, eval_path=path, max_eval_records=most, max_bad_share=1.0), held_out=True)


def _write_lines(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(
        command_line.run(
            main, Experiment, define_flags=define_flags, config_required=False, flag_of_field=FLAG_OF_FIELD
        )
    )
