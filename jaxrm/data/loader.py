"""From examples to batches: endless, shuffled ones with a position that can be saved, and those of an evaluation."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxrm.data.config import DataConfig
from jaxrm.data.examples import TokenExample
from jaxrm.data.packing import Row, build_row, pack
from jaxrm.data.prompts import PromptExample
from jaxrm.errors import UserError, flag, option

if TYPE_CHECKING:
    import grain


def build_loader(
    examples: Sequence[TokenExample],
    config: DataConfig,
    *,
    pad_id: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    batch_unit: int = 1,
) -> "grain.DatasetIterator":
    """Endless batches, in an order that depends on ``seed`` and the position alone.

    Rows are packed once and shuffled anew every epoch. A batch may span two epochs. Process p of P gets the p-th part
    of the rows of every batch, so together the processes see what a single one would.

    Args:
      examples: all of one kind, none longer than ``config.max_length``.
      config: ``max_length`` T, ``batch_size`` and ``packing``.
      pad_id: the token of padding; its value never matters.
      seed: seed of the order.
      process_index: p.
      process_count: P, a divisor of ``config.batch_size``.
      batch_unit: batch sizes must be a multiple of it, so the error proposes one that works.

    Returns:
      A Grain iterator over dicts of arrays ``[batch_size / P, T]`` (see ``packing.build_row``). ``get_state()`` is a
      small dict for JSON, and ``set_state()`` goes back to exactly that position.

    Raises:
      UserError: the data do not fill one batch, or the processes do not share it evenly.
    """
    import grain

    share = _share(config, process_index, process_count)
    rows = _assign_rows(examples, config)
    if len(rows) < config.batch_size:
        largest = len(rows) // batch_unit * batch_unit
        ways = [f"e.g. {flag('data.batch_size')}={largest}"] if largest else []
        ways += [f"a smaller {flag('data.max_length')}"] if config.packing else []
        raise UserError(
            f"{option('data.batch_size')} is {config.batch_size}, but the {len(examples)} examples of "
            f"{config.path!r} make only {len(rows)} rows of {config.max_length} tokens; give more data"
            + (f", or use {' or '.join(ways)}" if ways else "")
        )

    columns = _columns(examples)

    def build_batch(row_indices: np.ndarray) -> Row:
        return _stack([[examples[i] for i in rows[r]] for r in row_indices[share]], columns, config, pad_id)

    # Grain shuffles epoch e with seed + e, so neighboring seeds would share epochs if they were used as they are.
    shuffle_seed = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])
    order = grain.MapDataset.range(len(rows)).shuffle(seed=shuffle_seed).repeat()
    batches = order.batch(config.batch_size).map(build_batch)
    # A batch takes well under a millisecond, so one thread a few batches ahead hides it from the step.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(
    examples: Sequence[TokenExample],
    config: DataConfig,
    *,
    pad_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Row]:
    """Every example once, in a fixed order. Empty rows (``segment_ids`` 0) fill the last batch.

    Returns:
      Dicts of arrays ``[batch_size / P, T]`` (see ``packing.build_row``), the same number of them on every process.

    Raises:
      UserError: the processes do not share a batch evenly.
    """
    share = _share(config, process_index, process_count)
    rows = _assign_rows(examples, config)
    rows += [[]] * (-len(rows) % config.batch_size)
    columns = _columns(examples)
    batches = [rows[start : start + config.batch_size][share] for start in range(0, len(rows), config.batch_size)]
    return [_stack([[examples[i] for i in row] for row in batch], columns, config, pad_id) for batch in batches]


class BatchIterator(Protocol):
    """Endless batches with a position that can be saved and restored."""

    def __next__(self) -> Row:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position, as a dict for JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


def warm_up(first: BatchIterator, num_batches: int, then: BatchIterator) -> "WarmUp":
    """First ``num_batches`` batches of ``first``, then those of ``then``."""
    assert num_batches >= 0
    return WarmUp(first, num_batches, then)


class WarmUp:
    """The ``BatchIterator`` that ``warm_up`` returns."""

    def __init__(self, first: BatchIterator, num_batches: int, then: BatchIterator) -> None:
        self._first, self._num_batches, self._then = first, num_batches, then
        self._done = 0  # batches of `first` that were taken

    def __iter__(self) -> "WarmUp":
        """Itself."""
        return self

    def __next__(self) -> Row:
        """The next batch."""
        if self._done == self._num_batches:
            return next(self._then)
        batch = next(self._first)
        self._done += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, as a dict for JSON."""
        return {"warm_up": self._done, "first": self._first.get_state(), "then": self._then.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._done = state["warm_up"]
        self._first.set_state(state["first"])
        self._then.set_state(state["then"])


def fingerprint(examples: Sequence[TokenExample], config: DataConfig) -> str:
    """Hash of everything that, with the seed, decides the batch at a position; a position is valid for one hash."""
    digest = hashlib.sha256(f"{config.max_length} {config.batch_size} {config.packing}".encode())
    for example in examples:
        digest.update(example.tokens.tobytes())
        if not isinstance(example, PromptExample):
            for values in example.columns().values():
                digest.update(values.tobytes())
        elif example.fields:  # rewards look at them
            digest.update(json.dumps(dict(example.fields), sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def rows_per_epoch(examples: Sequence[TokenExample], config: DataConfig) -> int:
    """Rows of the packed examples. Divided by ``config.batch_size``, they are the steps of an epoch."""
    return len(_assign_rows(examples, config))


def _assign_rows(examples: Sequence[TokenExample], config: DataConfig) -> list[list[int]]:
    if config.packing:
        return pack([len(example.tokens) for example in examples], config.max_length)
    return [[index] for index in range(len(examples))]


def _columns(examples: Sequence[TokenExample]) -> dict[str, np.dtype]:
    return {name: values.dtype for name, values in examples[0].columns().items()} if examples else {}


def _share(config: DataConfig, process_index: int, process_count: int) -> slice:
    assert 0 <= process_index < process_count
    if config.batch_size % process_count:
        raise UserError(
            f"{option('data.batch_size')} is {config.batch_size}, but there are {process_count} processes; use a "
            f"multiple, e.g. {flag('data.batch_size')}={-(-config.batch_size // process_count) * process_count}"
        )
    local = config.batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)


def _stack(rows: list[list[TokenExample]], columns: dict[str, np.dtype], config: DataConfig, pad_id: int) -> Row:
    built = [build_row(row, config.max_length, pad_id, columns) for row in rows]
    return {key: np.stack([row[key] for row in built]) for key in built[0]}
