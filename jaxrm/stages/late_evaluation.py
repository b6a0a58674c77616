"""The evaluation that a stopped run still owes: it is made when the run goes on, as if it had never stopped."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.metrics import read_rows
from jaxrm.runtime.run_folder import RunFolder


def is_evaluation_pending(
    folder: RunFolder,
    checkpoints: Checkpoints,
    step: int,
    num_steps: int,
    every: int,
    loss_of: Callable[[Mapping[str, Any]], Any],
) -> bool:
    """Whether the run stopped before the evaluation that belongs to its latest checkpoint.

    Where it was made, and only the checkpoint knows nothing of it, the checkpoint is told.

    Args:
      folder: of the run.
      checkpoints: of the run.
      step: of the latest checkpoint; 0 where there is none.
      num_steps: the last step, which is always evaluated.
      every: steps between evaluations.
      loss_of: the loss in a row of ``metrics.jsonl``, or None.
    """
    if step == 0 or (step % every != 0 and step != num_steps):
        return False
    losses = [loss_of(row) for row in read_rows(folder.metrics) if row["step"] == step]
    known = [float(loss) for loss in losses if loss is not None]
    if known:
        checkpoints.add_loss(step, known[-1])
    return not known
