"""Which checkpoints of a run are kept: that depends on steps and losses alone, not on how often the run was stopped.

A checkpoint that was made only because the run was asked to stop is called passing. It is there to continue from, takes
nobody's place, and goes when the next one is saved.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrm import atomic

_LATE_LOSS = "late_loss.json"


@dataclass(frozen=True)
class SavedStep:
    """What decides whether a checkpoint is kept: its held-out loss, if there is one, and whether it is passing."""

    loss: float | None = None
    is_passing: bool = False

    @property
    def has_finite_loss(self) -> bool:
        """Whether it may be the best."""
        return self.loss is not None and math.isfinite(self.loss)


class Preservation:
    """The preservation policy of Orbax's checkpoint manager.

    Args:
      keep: latest checkpoints to keep.
      keep_best: besides those, the ones with the lowest losses.
    """

    def __init__(self, keep: int, keep_best: int) -> None:
        self._keep, self._keep_best = keep, keep_best
        self.saved: dict[int, SavedStep] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Called by Orbax when it has begun to save the last of ``checkpoints``."""
        del context
        staying = self.preserved([one.step for one in checkpoints])
        return [one.step in staying for one in checkpoints]

    def preserved(self, steps: Iterable[int]) -> set[int]:
        """Those of the steps whose checkpoints are kept."""
        steps = sorted(steps)
        saved = {step: self.saved.get(step, SavedStep()) for step in steps}
        regular = [step for step in steps[:-1] if not saved[step].is_passing]
        latest = [*regular, *steps[-1:]][-self._keep :]
        scored = [step for step in steps if saved[step].has_finite_loss and not saved[step].is_passing]
        scored.sort(key=lambda step: saved[step].loss or 0.0, reverse=True)  # of equal losses, the later step counts
        return {*latest, *(scored[-self._keep_best :] if self._keep_best else ())}


def write_late_loss(checkpoint: Path, loss: float) -> None:
    """Note the loss of a checkpoint that was saved before it was evaluated.

    It is a file of its own beside what the checkpoint holds, since that is never written again.
    """
    number: float | str = loss if math.isfinite(loss) else str(loss)
    atomic.write_json(checkpoint / _LATE_LOSS, {"loss": number})


def read_late_loss(checkpoint: Path) -> float | None:
    """What `write_late_loss` wrote; None where it wrote nothing."""
    try:
        return float(json.loads((checkpoint / _LATE_LOSS).read_text(encoding="utf-8"))["loss"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
