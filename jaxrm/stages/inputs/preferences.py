"""Preference pairs from files to batches, on both sides of the held-out split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from jaxrm.data.config import DataConfig
from jaxrm.data.examples import TokenExample
from jaxrm.data.loader import BatchIterator, build_loader, eval_batches, fingerprint, rows_per_epoch, warm_up
from jaxrm.data.pairs import TokenPair, comparison_examples, mapping_examples, tokenize_pairs
from jaxrm.data.readers import ReadReport, read_records
from jaxrm.data.records import PreferenceRecord
from jaxrm.experiment import Experiment
from jaxrm.runtime.progress import Progress
from jaxrm.sharding.mesh import batch_shards, batch_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def load_preferences(
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, held_out: bool, show_progress: bool
) -> Preferences:
    """Read and tokenize one side of the split.

    Raises:
      UserError: where records are no pairs, or too many are unusable.
    """
    records, report = read_records(data, held_out=held_out)
    label = "tokenize held-out" if held_out else "tokenize"
    with Progress(label, len(records), unit="pairs", enabled=show_progress) as progress:
        pairs, tokenized = tokenize_pairs(records, tokenizer, data, lambda done, total: progress.update(done))
    by_source = {record.source: record for record in records if isinstance(record, PreferenceRecord)}
    return Preferences(pairs, by_source, report.merge(tokenized))


@dataclass(frozen=True)
class PreparedPairs:
    """What a reward model is trained and evaluated on.

    Attributes:
      loader: endless batches.
      fingerprint: of the data behind it.
      eval_batches: held-out batches of this process.
      rows: that one epoch makes.
      report: what became of the training records.
      held_out_report: what became of the held-out ones.
    """

    loader: BatchIterator
    fingerprint: str
    eval_batches: list[dict[str, np.ndarray]]
    rows: int
    report: ReadReport
    held_out_report: ReadReport


def prepare(
    config: Experiment,
    mesh: Mesh,
    train: Preferences,
    held_out: Preferences,
    request: Sequence[int],
    first_id: int | None,
    pad_id: int,
) -> PreparedPairs:
    """Mappings of a seq2seq reward model, or comparisons of a scalar one, in rows and batches.

    Args:
      config: the whole config.
      mesh: the devices.
      train: one side of the split.
      held_out: the other one, of which both mappings are evaluated, whatever is trained.
      request: ids that ask for a correction.
      first_id: the template's BOS, which stays where a prompt is cut.
      pad_id: fills rows up; never attended to and never a target, so any id will do.

    Raises:
      UserError: where too few pairs fit.
    """
    data, mapping = config.data, config.mapping
    part, parts = batch_share(mesh)
    share: dict[str, Any] = {"pad_id": pad_id, "process_index": part, "process_count": parts}
    batching = {**share, "seed": config.seed, "batch_unit": batch_shards(mesh) * config.num_microbatches}
    examples: Sequence[TokenExample]
    held_out_examples: Sequence[TokenExample]
    if config.algorithm == "scalar_rm":
        examples, fitted = comparison_examples(train.pairs, data, first_id=first_id)
        held_out_examples, held_out_fitted = comparison_examples(held_out.pairs, data, first_id=first_id)
        loader = build_loader(examples, data, **batching)
    else:
        mappings, fitted = mapping_examples(train.pairs, request, data, first_id=first_id, identity=mapping.identity)
        held_out_examples, held_out_fitted = mapping_examples(held_out.pairs, request, data, first_id=first_id)
        examples, loader = mappings, build_loader(mappings, data, **batching)
        if mapping.identity_warmup_steps:
            copies = [example for example in mappings if not example.is_correction]
            loader = warm_up(build_loader(copies, data, **batching), mapping.identity_warmup_steps, loader)
    return PreparedPairs(
        loader,
        fingerprint(examples, data),
        eval_batches(held_out_examples, data, **share),
        rows_per_epoch(examples, data),
        train.report.merge(fitted),
        held_out.report.merge(held_out_fitted),
    )
