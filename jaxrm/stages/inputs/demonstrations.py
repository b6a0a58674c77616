"""Demonstrations from files to examples, on both sides of the held-out split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxrm.data.config import DataConfig
from jaxrm.data.examples import Example, tokenize_demonstrations
from jaxrm.data.readers import ReadReport, read_records
from jaxrm.data.records import DemonstrationRecord, PreferenceRecord, Record, as_demonstration
from jaxrm.errors import UserError, option
from jaxrm.runtime.progress import Progress
from jaxrm.stages.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Demonstrations:
    """One side of the split.

    Attributes:
      records: as they were read, pairs as their chosen responses.
      examples: the same as tokens, without those that do not fit.
      report: what became of the records.
    """

    records: Sequence[DemonstrationRecord]
    examples: Sequence[Example]
    report: ReadReport


def load_demonstrations(stage: Stage, *, held_out: bool) -> Demonstrations:
    """Read and tokenize one side of a stage's data; arguments and errors as for `read_demonstrations`."""
    return read_demonstrations(stage.data, stage.tokenizer, held_out=held_out, show_progress=stage.show_progress)


def read_demonstrations(
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, held_out: bool, show_progress: bool
) -> Demonstrations:
    """Read and tokenize one side of the split.

    Args:
      data: where the records are, and how they are written as tokens.
      tokenizer: of the model.
      held_out: which side.
      show_progress: draw a bar.

    Raises:
      UserError: where records have no response, or too many are unusable.
    """
    records, report = read_records(data, held_out=held_out)
    demonstrations = [_as_demonstration(record, data) for record in records]
    label = "tokenize held-out" if held_out else "tokenize"
    with Progress(label, len(demonstrations), unit="records", enabled=show_progress) as progress:
        examples, tokenized = tokenize_demonstrations(
            demonstrations, tokenizer, data, lambda done, total: progress.update(done)
        )
    return Demonstrations(demonstrations, examples, report.merge(tokenized))


def _as_demonstration(record: Record, data: DataConfig) -> DemonstrationRecord:
    if isinstance(record, PreferenceRecord):
        return as_demonstration(record)
    if isinstance(record, DemonstrationRecord):
        return record
    raise UserError(
        f"{option('data.path')} is {data.path!r}, whose records are prompts without a response (first at "
        f"{record.source}); SFT needs demonstrations (messages, prompt and response) or pairs"
    )
