"""Checkpoints through Orbax: whole, atomic, checked, and restored onto any mesh."""

import contextlib
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrm.config.fields import at_least, bounded, check
from jaxrm.errors import UserError, flag
from jaxrm.runtime import checksums
from jaxrm.runtime.disk import disk_errors
from jaxrm.runtime.preemption import agree
from jaxrm.runtime.preservation import Preservation, SavedStep, read_late_loss, write_late_loss

DAMAGED = "damaged"
"""Folder of a run that damaged checkpoints are put into."""
_NOT_WRITTEN = "a checkpoint could not be written"
_UNFINISHED = "*.orbax-checkpoint-tmp*"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)  # what reading spoiled files raises


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


class Restored(NamedTuple):
    """A checkpoint that was read: its step, its ``progress`` and its ``arrays`` (see `Checkpoints`)."""

    step: int
    progress: dict[str, Any]
    arrays: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, each a folder named after its step.

    A checkpoint holds named pytrees of arrays (``arrays``: parameters apart from optimizer state, so that a reader
    may take the one without the other) and ``progress``, a small JSON object. Writing goes on in the background; a
    folder appears under its name only once it is whole, so a killed run leaves the checkpoint before. It holds the
    checksums of its files (`jaxrm.runtime.checksums`), and one that is damaged is passed over.

    Args:
      folder: where they are; made when the first one is written.
      config: which to keep.
      read_only: for commands that only look.

    Raises:
      StorageError: from every method, where the disk refuses what is read or written.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig | None = None, *, read_only: bool = False):
        import orbax.checkpoint as ocp

        config = config or CheckpointConfig()
        self._preservation = Preservation(config.keep, config.keep_best)

        def score(metrics: dict[str, float]) -> float:
            return metrics["score"]

        self.folder = Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else self._preservation,
            # Without it Orbax forgets the scores when the folder is opened again; a reader does not need them.
            best_fn=None if read_only else score,
            read_only=read_only,
            lightweight_initialize=read_only,  # the same: Orbax would not open a folder with a damaged score
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._args = ocp.args
        with disk_errors(_NOT_WRITTEN, self.folder):
            if not read_only:
                self._remove_unfinished()
                self._put_aside(self._without_score())
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(
        self,
        step: int,
        arrays: dict[str, Any],
        progress: dict[str, Any],
        loss: float | None = None,
        *,
        is_passing: bool = False,
    ) -> None:
        """Start to write the checkpoint of ``step``; returns once the arrays may be donated.

        Args:
          step: updates made so far.
          arrays: pytrees by name.
          progress: what JSON can hold, e.g. the loader's position.
          loss: evaluation loss of these parameters, where there is one, to keep the best by.
          is_passing: whether it is saved only to be continued, where the run was asked to stop. It is never the best,
            and goes when the next one is saved.
        """
        loss = None if is_passing else loss
        for earlier in set(self.steps()) - set(self._preservation.saved):
            self._preservation.saved[earlier] = self._saved_step(earlier)
        self._preservation.saved[step] = SavedStep(loss, is_passing)
        trees = {name: self._args.StandardSave(tree) for name, tree in arrays.items()}
        score = {"score": -loss} if loss is not None and math.isfinite(loss) else None
        record = {"step": step, "loss": loss, "is_passing": is_passing, **progress}
        args = self._args.Composite(progress=self._args.JsonSave(record), **trees)
        with disk_errors(_NOT_WRITTEN, self.folder):
            self._manager.save(step, args=args, metrics=score)

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def progress(self, step: int) -> dict[str, Any]:
        """The JSON object saved with ``step``, with its ``step`` and evaluation ``loss``."""
        progress = self._manager.restore(step, args=self._args.Composite(progress=self._args.JsonRestore())).progress
        if progress["loss"] is None:
            progress["loss"] = read_late_loss(self.folder / str(step))
        return progress

    def add_loss(self, step: int, loss: float) -> None:
        """Give a checkpoint the loss that it was saved without; nothing where it has one, or is passing."""
        if self._saved_step(step) != SavedStep():
            return
        with disk_errors(_NOT_WRITTEN, self.folder):
            if jax.process_index() == 0:
                write_late_loss(self.folder / str(step), loss)
            agree(False)  # the others wait until it is done
            for saved in self.steps():
                self._preservation.saved[saved] = self._saved_step(saved)
            for other in set(self.steps()) - self._preservation.preserved(self.steps()):
                self._manager.delete(other)

    def _saved_step(self, step: int) -> SavedStep:
        try:
            progress = self.progress(step)
            return SavedStep(progress["loss"], progress.get("is_passing", False))
        except _DAMAGE:
            return SavedStep()

    def latest_sound(self, *names: str) -> int | None:
        """The latest step whose checkpoint is not damaged, as far as checksums tell; None where there is none.

        Args:
          names: what is going to be read of it; all where there are none.
        """
        return self._first_sound(reversed(self.steps()), names)

    def best_sound(self, *names: str) -> int | None:
        """The one with the lowest evaluation loss; the latest where none has a finite one. Otherwise `latest_sound`."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(*_DAMAGE):
                losses[step] = self.progress(step)["loss"]
        known = [step for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
        best = sorted(known, key=losses.__getitem__)
        return self._first_sound([*best, *(step for step in reversed(self.steps()) if step not in best)], names)

    def best_step(self) -> int | None:
        """`best_sound` of the whole checkpoint."""
        return self.best_sound()

    def damage(self, step: int, *names: str) -> str | None:
        """What is wrong with a checkpoint, in a few words; None where it is as it was written.

        All processes of a job call it, and each reads a share of the files.
        """
        parts = (*names, "progress") if names else ()
        share, num_shares = jax.process_index(), jax.process_count()
        damage = checksums.find_damage(self.folder / str(step), parts, share=share, num_shares=num_shares)
        return _agreed(damage)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Pytrees saved with ``step``, placed as asked, whatever mesh they were saved from.

        Args:
          step: one of ``steps``.
          abstract: by name, pytrees of ``jax.ShapeDtypeStruct`` with shardings; names left out are not read.
        """
        trees = {name: self._args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(step, args=self._args.Composite(**trees))
        return {name: restored[name] for name in abstract}

    def may_be_damage(self, step: int, error: Exception) -> bool:
        """Whether a checkpoint could not be read since its files are spoiled, which no checksums could show before."""
        # What is spoiled raises almost anything, Exception itself among it; lack of memory is another matter.
        return not isinstance(error, MemoryError | RuntimeError) and not checksums.has_checksums(
            self.folder / str(step)
        )

    def restore_latest(
        self, abstract: dict[str, Any], check_progress: Callable[[int, dict[str, Any]], None]
    ) -> Restored:
        """Read the latest checkpoint that is not damaged; those after it are put aside, with a line for each.

        Args:
          abstract: as for `restore`.
          check_progress: refuses to continue from a step and its ``progress``.

        Raises:
          UserError: all are damaged; nothing is put aside then.
        """
        passed: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                restored = self._try_restore(step, abstract, check_progress)
                damage = _agreed(restored if isinstance(restored, str) else None)
                if isinstance(restored, Restored) and damage is None:
                    self._put_aside(passed)
                    return restored
            passed[step] = str(damage)
        raise UserError(
            f"all checkpoints of {self.folder.parent} are damaged ({_listed(passed)}); put the run aside and start "
            f"anew with {flag('on_existing')}=restart"
        )

    def _try_restore(
        self, step: int, abstract: dict[str, Any], check_progress: Callable[[int, dict[str, Any]], None]
    ) -> Restored | str:
        """A checkpoint, or what is wrong with it, for one that was written without checksums."""
        try:
            progress = self.progress(step)
            check_progress(step, progress)
            return Restored(step, progress, self.restore(step, abstract))
        except UserError:
            raise
        except Exception as error:
            if not self.may_be_damage(step, error):
                raise
            return _one_line(error)

    def wait(self) -> None:
        """Return when everything that was saved is on disk."""
        with disk_errors(_NOT_WRITTEN, self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        with disk_errors(_NOT_WRITTEN, self.folder):
            self._manager.close()

    def _first_sound(self, steps: Iterable[int], names: tuple[str, ...]) -> int | None:
        for step in steps:
            damage = self.damage(step, *names)
            if damage is None:
                return step
            _say(f"{self.folder / str(step)} is damaged ({damage}) and passed over")
        return None

    def _write_checksums(self) -> None:
        """Called by Orbax, in the background, when the files of a checkpoint are there but not its name."""
        for unfinished in self.folder.glob(_UNFINISHED):
            checksums.write_checksums(unfinished)

    def _remove_unfinished(self) -> None:
        """Remove what a run that was stopped has begun to write; the lock of the folder is this job's."""
        if jax.process_index() == 0:
            for unfinished in self.folder.glob(_UNFINISHED):
                shutil.rmtree(unfinished, ignore_errors=True)

    def _without_score(self) -> dict[int, str]:
        """Checkpoints whose score cannot be read, by step: Orbax would not open a folder that has one."""
        unreadable = {}
        for file in self.folder.glob("*/metrics/metrics"):
            if file.parents[1].name.isdecimal():
                try:
                    float(json.loads(file.read_text(encoding="utf-8"))["score"])
                except _DAMAGE:
                    unreadable[int(file.parents[1].name)] = "metrics/metrics cannot be read"
        return unreadable

    def _put_aside(self, damaged: dict[int, str]) -> None:
        """Move damaged checkpoints out of the way of those that are going to have their steps."""
        for step, damage in damaged.items():
            source = self.folder / str(step)
            target = self.folder.parent / DAMAGED / source.name
            if jax.process_index() == 0:
                number = 1
                while target.exists():
                    target, number = target.with_name(f"{step}.{number}"), number + 1
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
                _say(f"{source} is damaged ({damage}) and passed over; it is now {target}")
        agree(False)  # the others wait until it is done
        if damaged and hasattr(self, "_manager"):
            self._manager.reload()


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays to restore into: ``shapes`` with the sharding of each."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _agreed(damage: str | None) -> str | None:
    """What is wrong with a checkpoint, in every process where one sees it."""
    if agree(damage is not None) and damage is None:
        return "another process sees that its files are not as they were written"
    return damage


def _listed(damaged: dict[int, str]) -> str:
    return ", ".join(f"{step}: {damage}" for step, damage in damaged.items())


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@functools.cache  # a command looks at a checkpoint several times
def _say(message: str) -> None:
    if jax.process_index() == 0:
        print(f"jaxrm: {message}", file=sys.stderr, flush=True)
