"""Checkpoints through Orbax: whole, atomic, and restored onto any mesh."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrm.config.fields import at_least, bounded, check


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
      every: steps between checkpoints; the last step always has one.
      keep: latest checkpoints to keep.
      keep_best: besides those, the checkpoints with the lowest held-out loss to keep, of the steps that were both
        evaluated and saved; for PPO those with the highest held-out reward, which is what a policy may over-optimize.
    """

    every: int = bounded(100, at_least(1))
    keep: int = bounded(1, at_least(1))
    keep_best: int = bounded(1, at_least(0))

    def __post_init__(self) -> None:
        check(self)


class Checkpoints:
    """The checkpoints of a run, each a folder named after its step.

    A checkpoint holds named pytrees of arrays (``arrays``: parameters apart from optimizer state, so that a reader
    may take the one without the other) and ``progress``, a small JSON object. Writing goes on in the background; a
    folder appears under its name only once it is whole, so a killed run leaves the checkpoint before.

    Args:
      folder: where they are; made when the first one is written.
      config: which to keep.
      read_only: for commands that only look.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig | None = None, *, read_only: bool = False):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        config = config or CheckpointConfig()

        def score(metrics: dict[str, float]) -> float:
            return metrics["score"]

        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(config.keep),
                policies.BestN(get_metric_fn=score, n=config.keep_best, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else keep,
            best_fn=score,  # without it Orbax forgets the scores when the folder is opened again
            read_only=read_only,
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
            cleanup_tmp_directories=not read_only,
        )
        self.folder = Path(folder).resolve()
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, arrays: dict[str, Any], progress: dict[str, Any], loss: float | None = None) -> None:
        """Start to write the checkpoint of ``step``; returns once the arrays may be donated.

        Args:
          step: updates made so far.
          arrays: pytrees by name.
          progress: what JSON can hold, e.g. the loader's position.
          loss: evaluation loss of these parameters, where there is one, to keep the best by.
        """
        trees = {name: self._args.StandardSave(tree) for name, tree in arrays.items()}
        score = {"score": -loss} if loss is not None and math.isfinite(loss) else None
        record = {"step": step, "loss": loss, **progress}
        args = self._args.Composite(progress=self._args.JsonSave(record), **trees)
        self._manager.save(step, args=args, metrics=score)

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def progress(self, step: int) -> dict[str, Any]:
        """The JSON object saved with ``step``, with its ``step`` and evaluation ``loss``."""
        return self._manager.restore(step, args=self._args.Composite(progress=self._args.JsonRestore())).progress

    def best_step(self) -> int | None:
        """Step with the lowest evaluation loss among those kept; the latest where none has a finite one."""
        steps = self.steps()
        losses = {step: self.progress(step)["loss"] for step in steps}
        known = [step for step in steps if losses[step] is not None and math.isfinite(losses[step])]
        return min(known, key=losses.__getitem__) if known else (steps[-1] if steps else None)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Pytrees saved with ``step``, placed as asked, whatever mesh they were saved from.

        Args:
          step: one of ``steps``.
          abstract: by name, pytrees of ``jax.ShapeDtypeStruct`` with shardings; names left out are not read.
        """
        trees = {name: self._args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(step, args=self._args.Composite(**trees))
        return {name: restored[name] for name in abstract}

    def wait(self) -> None:
        """Return when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        self._manager.close()


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays to restore into: ``shapes`` with the sharding of each."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
