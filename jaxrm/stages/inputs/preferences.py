"""Preference pairs from files to tokens, on both sides of the held-out split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxrm.data.pairs import TokenPair, tokenize_pairs
from jaxrm.data.readers import ReadReport, read_records
from jaxrm.data.records import PreferenceRecord
from jaxrm.runtime.progress import Progress
from jaxrm.stages.stage import Stage


@dataclass(frozen=True)
class Preferences:
    """One side of the split.

    Attributes:
      pairs: as tokens.
      records: the same as text, by `TokenPair.source`.
      report: what became of the records.
    """

    pairs: Sequence[TokenPair]
    records: Mapping[str, PreferenceRecord]
    report: ReadReport


def load_preferences(stage: Stage, *, held_out: bool) -> Preferences:
    """Read and tokenize one side of the split.

    Raises:
      UserError: where records are no pairs, or too many are unusable.
    """
    records, report = read_records(stage.data, held_out=held_out)
    label = "tokenize held-out" if held_out else "tokenize"
    with Progress(label, len(records), unit="pairs", enabled=stage.show_progress) as progress:
        pairs, tokenized = tokenize_pairs(
            records, stage.tokenizer, stage.data, lambda done, total: progress.update(done)
        )
    by_source = {record.source: record for record in records if isinstance(record, PreferenceRecord)}
    return Preferences(pairs, by_source, report.merge(tokenized))
