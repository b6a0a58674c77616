"""Score responses token by token with a reward model, and see what it would have written.

python -m jaxrm.score --checkpoint=runs/rm_seq2seq_tiny --input=pairs.jsonl --output=scored.jsonl --html=scored.html
python -m jaxrm.score --checkpoint=runs/rm_seq2seq_tiny --kind=soft --input=pairs.jsonl --output=scored.jsonl

The input holds pairs, or prompts with one response, in any schema that jaxrm reads. Records that cannot be scored are
counted and left out. Token rewards are written before scale and centre, which belong to a run of PPO. A config is
needed only to lay the model over devices (config.mesh) or to name the kind (config.reward.kind).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxrm import atomic
from jaxrm.config import command_line
from jaxrm.errors import UserError, option
from jaxrm.experiment import Experiment

if TYPE_CHECKING:
    from jaxrm.data.config import DataConfig
    from jaxrm.data.readers import ReadReport
    from jaxrm.data.records import Record

FLAG_OF_FIELD = {"data.path": "--input", "data.eval_path": "--input"}


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    text = flags.DEFINE_string
    text(
        "checkpoint",
        None,
        "required: folder of a reward model's run, or RUN_DIR/checkpoints/STEP (or /best)",
        flag_values=values,
    )
    text("input", None, "required: file of pairs, or of prompts and responses", flag_values=values)
    text("output", None, "required: JSONL to write, one record a line", flag_values=values)
    text("html", None, "page to draw, one self-contained file", flag_values=values)
    text("kind", None, "kind of token reward, by default that of the config or else of the run", flag_values=values)
    text("reference", None, "with --kind=contrast: folder of the run of the policy to compare with", flag_values=values)
    flags.DEFINE_bool(
        "corrections",
        True,
        "let a seq2seq reward model write its corrections; --nocorrections is quicker",
        flag_values=values,
    )
    whose = "score only those records whose prompts the run held out, by their hash, from data like --input"
    flags.DEFINE_bool("held_out", False, whose, flag_values=values)
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
        if not getattr(given, name):
            raise UserError(f"--{name} is missing; e.g. --{name}={example}")
    _check_files(given)

    from jaxrm.evaluation.ranking import pair_accuracy
    from jaxrm.inference import score_checks
    from jaxrm.inference import token_scores as scored
    from jaxrm.inference.load import open_checkpoint, open_reward_model
    from jaxrm.inference.weights import LANGUAGE_MODELS, REWARD_MODELS, find_checkpoint
    from jaxrm.ops.token_rewards import find_kind
    from jaxrm.runtime.progress import print_table
    from jaxrm.sharding.mesh import MeshConfig, build_mesh

    run = find_checkpoint(given.checkpoint, "--checkpoint", REWARD_MODELS)
    kind = score_checks.choose_kind(run, given.kind, None if config is None else config.reward.kind)
    if find_kind(kind).needs_reference != (given.reference is not None):
        raise UserError(
            f"the kind is {kind}, and --reference is {given.reference}; contrast compares with a reference policy and "
            "the other kinds with none, so give both, e.g. --kind=contrast --reference=runs/quickstart/sft, or neither"
        )
    if given.reference is not None:
        score_checks.check_reference(find_checkpoint(given.reference, "--reference", LANGUAGE_MODELS), run)
    records, report = _read(given, run.config.data)
    mesh = build_mesh(config.mesh if config is not None else MeshConfig())
    model = open_reward_model(given.checkpoint, mesh, given.dtype)
    reference = None if given.reference is None else open_checkpoint(given.reference, mesh, given.dtype)
    tasks = scored.encode(records, model, report, reference=reference)
    if not tasks:
        reason, found = next(iter(report.bad.items()))
        raise UserError(
            f"--input is {given.input!r}, of which nothing can be scored: {reason} (first at {found.first}); required "
            "are prompts with a chosen and a rejected response, or with one response, e.g. --input=pairs.jsonl"
        )
    writes_corrections = model.is_seq2seq and given.corrections
    if writes_corrections:
        score_checks.check_corrections(model, tasks, given.max_new_tokens)

    rewards = scored.score(model, tasks, kind, mesh=mesh, rows=given.batch_size, reference=reference)
    corrections: Sequence[Any] = [None] * len(tasks)
    if writes_corrections:
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
    if run.config.data.path == given.input and not given.held_out:
        print("The reward model was trained on most of these records; --held_out leaves those out.")
    if given.html is not None:
        from jaxrm.reports.page import write_page

        write_page(Path(given.html).expanduser(), rows, title=f"What {model.name} says", about=about)
        print(f"The page is {given.html}; open it in a browser")
    return 0


def _check_files(given: flags.FlagValues) -> None:
    """Refuse to write where nothing can be written, or over what is read or written otherwise."""
    source = Path(given.input).expanduser().resolve()
    output = command_line.check_output_file("--output", given.output, "scored.jsonl").resolve()
    targets = [("output", given.output, output)]
    if given.html is not None:
        html = command_line.check_output_file("--html", given.html, "scored.html").resolve()
        if html == output:
            raise UserError(f"--html is {given.html!r}, and so is --output; name two files, e.g. --html=scored.html")
        targets.append(("html", given.html, html))
    for flag, path, target in targets:
        if target == source or (target.exists() and source in target.parents):
            part = "" if target == source else "a file of "
            raise UserError(
                f"--{flag} is {path!r}, which is {part}--input and would be overwritten; name another file, "
                f"e.g. --{flag}=scored.{'html' if flag == 'html' else 'jsonl'}"
            )


def _read(given: flags.FlagValues, of_run: "DataConfig") -> "tuple[list[Record], ReadReport]":
    """All records, or the side that the run held out; which label of PKU-SafeRLHF counts is as in the run."""
    from jaxrm.data.config import DataConfig
    from jaxrm.data.readers import read_records

    if given.held_out and (of_run.eval_path is not None or of_run.eval_split is not None):
        raise UserError(
            f"--held_out goes with a run that held out prompts by their hash, but this one had "
            f"{option('data.eval_path')} "
            f"{of_run.eval_path!r} and eval_split {of_run.eval_split!r}; give those records as --input, without it"
        )
    # The held-out side of a file that is given as held out is all of it.
    data = DataConfig(
        path=given.input,
        eval_path=None if given.held_out else given.input,
        eval_share=of_run.eval_share,
        preferred=of_run.preferred,
        max_eval_records=given.max_records,
        max_bad_share=1.0,
    )
    return read_records(data, held_out=True)


def _write_lines(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic.open_for_writing(target) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(
        command_line.run(
            main, Experiment, define_flags=define_flags, config_required=False, flag_of_field=FLAG_OF_FIELD
        )
    )
