"""Scoring the records of a file, for `jaxrm.score`: what is read, refused, written and printed."""

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.data.config import DataConfig
from jaxrm.data.file_names import is_data
from jaxrm.data.readers import ReadReport, read_records
from jaxrm.data.records import Record
from jaxrm.data.sources import Place, is_one_file
from jaxrm.errors import UserError, option
from jaxrm.evaluation.ranking import pair_accuracy
from jaxrm.inference.classifier import Classifier
from jaxrm.inference.policy import Policy
from jaxrm.inference.reference import check_reference, check_reference_template
from jaxrm.inference.reward_kind import check_needs_reference, choose_kind, kind_of, sort_of
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.run_checkpoint import RunCheckpoint, find_checkpoint, is_run
from jaxrm.reports import page
from jaxrm.runtime.progress import print_table
from jaxrm.stage_config import LANGUAGE_MODELS


def choose_kind_of_run(run: RunCheckpoint, kind: str | None, configured: str | None) -> str:
    """Kind of token reward: what ``--kind`` says, else the config, else that of the run.

    Raises:
      UserError: where the reward model cannot give it.
    """
    if kind is None and configured is None:
        return kind_of(run)
    return choose_kind(run.name, sort_of(run), kind or configured or "", "kind" if kind else "reward.kind")


def choose_kind_of_model(
    model: RewardModel | Classifier, reference: Policy | None, kind: str | None, configured: str | None
) -> str:
    """The same for a reward model that is no run, and for the policy that ``contrast`` and ``dpo`` compare with.

    Raises:
      UserError: where the reward model cannot give the kind, or the reference reads other token ids or templates.
    """
    chosen = kind or configured or model.kind
    model.check_kind(chosen, "kind" if kind else "reward.kind")
    check_needs_reference(chosen, reference)
    if reference is not None:
        assert isinstance(model, RewardModel), model  # a classifier gives no kind that compares
        model.check_reference(reference)
    return chosen


def check_reference_run(path: str | None, kind: str, run: RunCheckpoint) -> None:
    """Refuse a reference policy where the kind needs none, and one that reads other token ids than the reward model.

    Args:
      path: of its run, or None.
      kind: of token reward.
      run: of the reward model.
    """
    check_needs_reference(kind, path)
    if path is None:
        return
    reference = find_checkpoint(path, "reference", LANGUAGE_MODELS)
    start = run.config.model.path
    example = start if is_run(start) else None
    own, theirs = run.vocabulary(), reference.vocabulary()
    check_reference(own, str(reference.folder.path), theirs, example)
    own_template = (own.tokenizer, run.config.data.template)
    reference_template = (theirs.tokenizer, reference.config.data.template)
    check_reference_template(own_template, run.name, reference_template, str(reference.folder.path))


@dataclass(frozen=True)
class RecordsToScore:
    """Records of a file.

    Attributes:
      path: the file.
      records: what was read.
      report: counts what was read, and what could not be scored.
    """

    path: str
    records: Sequence[Record]
    report: ReadReport


def read_records_to_score(
    path: str, data: DataConfig, held_out: bool, max_records: int | None, *, with_fields: bool = False
) -> RecordsToScore:
    """All records of a file, or the side that a run held out.

    Args:
      path: the file.
      data: of the run: which label of PKU-SafeRLHF counts, and how its records were read and held out.
      held_out: read only the records whose prompts the run held out, by their hash.
      max_records: read no more than so many.
      with_fields: give each record the columns of its row, for functions that read them.
    """
    if held_out and (data.eval_path is not None or data.eval_split is not None):
        raise UserError(
            f"--held_out goes with a run that held out prompts by their hash, but this one had "
            f"{option('data.eval_path')} "
            f"{data.eval_path!r} and eval_split {data.eval_split!r}; give those records as --input, without it"
        )
    # The held-out side of a file that is given as held out is all of it.
    section = DataConfig(
        path=path, eval_path=path, preferred=data.preferred, max_eval_records=max_records, max_bad_share=1.0
    )
    if held_out:
        section = replace(
            section,
            eval_path=None,
            eval_share=data.eval_share,
            schema=data.schema,
            split=data.split if _is_read_by_split(path, data.path) else DataConfig.split,
            revision=data.revision if path == data.path else None,
        )
    return RecordsToScore(path, *read_records(section, held_out=True, with_fields=with_fields))


def _is_read_by_split(path: str, trained: str) -> bool:
    """Whether the run's split says which records of ``path`` are meant, as it did of the ``trained`` data.

    Of a folder or a data set the split chose the files, so a single file that is given in its place is read whole.
    """
    was_one_file = is_data(trained) and not glob.has_magic(trained)
    return path == trained or was_one_file or not is_one_file(Place(path, None))


def score_records(
    model: RewardModel | Classifier,
    read: RecordsToScore,
    kind: str,
    batch_size: int,
    reference: Policy | None,
    max_new_tokens: int | None,
) -> list[dict[str, Any]]:
    """Scored records as JSON objects.

    Args:
      model: the reward model.
      read: pairs, or prompts with one response. What cannot be scored is counted in its report.
      kind: of token reward.
      batch_size: responses scored at once.
      reference: policy that ``contrast`` and ``dpo`` compare with.
      max_new_tokens: longest correction; None for no corrections.

    Raises:
      UserError: where nothing can be scored, or corrections have no room.
    """
    encoded = model.encode_records(read.records, read.report, reference=reference)
    if not encoded:
        reason, count = next(iter(read.report.bad.items()))
        raise UserError(
            f"--input is {read.path!r}, of which nothing can be scored: {reason} (first at {count.first}); required "
            "are prompts with a chosen and a rejected response, or with one response, e.g. --input=pairs.jsonl"
        )
    return model.score_records(encoded, kind, batch_size=batch_size, reference=reference, max_new_tokens=max_new_tokens)


def write_lines(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSONL, whole."""
    with atomic.open_for_writing(Path(path).expanduser()) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def print_scored(
    read: RecordsToScore, rows: Sequence[dict[str, Any]], name: str, kind: str, output: str, is_training_data: bool
) -> None:
    """Print what was read, how often the chosen response ranks first, and where the rewards are.

    Args:
      read: the records.
      rows: from `score_records`.
      name: of the reward model.
      kind: of token reward.
      output: where the rewards are.
      is_training_data: whether the reward model was trained on most of them.
    """
    print_table(f"Records in {read.path}", ["records", "number", "first at"], read.report.rows())
    print_table("Scored", ["", ""], summary(rows, name, kind))
    print(f"The token rewards are in {output}")
    if is_training_data:
        print("The reward model was trained on most of these records; --held_out leaves those out.")


def summary(rows: Sequence[dict[str, Any]], name: str, kind: str) -> list[tuple[str, str]]:
    """What was scored, and how often the chosen response ranks first, as the rows of a table."""
    pairs = [[response["sum"] for response in row["responses"]] for row in rows if len(row["responses"]) == 2]
    about = [("reward model", name), ("kind", kind), ("records", f"{len(rows):,}")]
    if pairs:
        ranked = pair_accuracy(*zip(*pairs, strict=True))
        share = f"{100 * ranked.accuracy:.1f} % [{100 * ranked.low:.1f}, {100 * ranked.high:.1f}]"
        about.append(("chosen above rejected, by sum", f"{share} of {ranked.n:,} pairs"))
    return about


def write_page(path: str, rows: Sequence[dict[str, Any]], name: str, kind: str) -> None:
    """Draw the rows as a page."""
    page.write_page(Path(path).expanduser(), rows, title=f"What {name} says", about=summary(rows, name, kind))
    print(f"The page is {path}; open it in a browser")
