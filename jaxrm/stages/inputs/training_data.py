"""What a stage trains on: endless batches, and held-out ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrm.data.examples import TokenExample
from jaxrm.data.loader import BatchIterator, build_loader, eval_batches, fingerprint, rows_per_epoch
from jaxrm.stages.stage import Stage


@dataclass(frozen=True)
class TrainingData:
    """Batches of a data set.

    Attributes:
      examples: that are trained on.
      loader: endless training batches of this process, each array ``[local_B, T]``.
      fingerprint: of the examples behind it.
      eval_batches: held-out batches of this process.
      rows_per_epoch: rows that one pass over the examples makes.
      num_steps: updates in all.
    """

    examples: Sequence[TokenExample]
    loader: BatchIterator
    fingerprint: str
    eval_batches: Sequence[dict[str, np.ndarray]]
    rows_per_epoch: int
    num_steps: int


def training_data(
    stage: Stage,
    examples: Sequence[TokenExample],
    held_out: Sequence[TokenExample],
    *,
    loader: BatchIterator | None = None,
) -> TrainingData:
    """Batches of examples.

    Args:
      stage: whose ``data`` section says how rows are packed and batched.
      examples: to train on.
      held_out: to evaluate on.
      loader: in place of one pass after another over ``examples``.

    Raises:
      UserError: where there are too few examples for a batch.
    """
    data = stage.config.data
    rows = rows_per_epoch(examples, data)
    return TrainingData(
        examples,
        loader or build_loader(examples, data, **stage.batching),
        fingerprint(examples, data),
        eval_batches(held_out, data, **stage.eval_batching),
        rows,
        stage.num_steps(rows),
    )
