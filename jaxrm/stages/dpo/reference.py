"""Preference pairs for direct preference optimization, and what its frozen reference policy says of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm import atomic
from jaxrm.algorithms.dpo import DPOBatch, pair_log_probs
from jaxrm.data.config import DataConfig
from jaxrm.data.examples import MarkedComparisonExample
from jaxrm.data.loader import eval_batches
from jaxrm.data.pair_examples import marked_comparison_examples
from jaxrm.data.pairs import TokenPair
from jaxrm.data.readers import ReadReport
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.sharded_model import ShardedModel, to_devices
from jaxrm.runtime.progress import Progress
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_share

REFERENCE = "reference_log_probs.npy"  # in the folder of a run of DPO; what they belong to is in the .json beside it


@dataclass(frozen=True)
class DPOExample(MarkedComparisonExample):
    """Both sides of a pair in two segments, and the reference's log-probs of their responses.

    Attributes:
      pair: its number.
      reference: log pi_ref of the chosen and of the rejected response, in nats.
    """

    pair: int
    reference: tuple[float, float] = (0.0, 0.0)

    def columns(self) -> dict[str, np.ndarray]:
        """Those of a marked comparison; `pair` (int32), `reference_chosen` and `reference_rejected` (float32), which
        are at the last token of the chosen side and 0 elsewhere.
        """
        columns = super().columns()
        for name, value, dtype in (
            ("pair", self.pair, np.int32),
            ("reference_chosen", self.reference[0], np.float32),
            ("reference_rejected", self.reference[1], np.float32),
        ):
            columns[name] = np.where(columns["is_chosen_end"], value, 0).astype(dtype)
        return columns


def dpo_examples(
    pairs: Sequence[TokenPair], config: DataConfig, *, first_id: int | None, first_pair: int = 0
) -> tuple[list[DPOExample], ReadReport]:
    """Examples of pairs, numbered from ``first_pair`` on, as yet without a reference.

    Arguments, report and errors otherwise as for `jaxrm.data.pair_examples.comparison_examples`.
    """
    comparisons, report = marked_comparison_examples(pairs, config, first_id=first_id)
    examples = [
        DPOExample(one.tokens, one.chosen_length, one.source, one.response_lengths, number)
        for number, one in enumerate(comparisons, first_pair)
    ]
    return examples, report


def with_reference(examples: Sequence[DPOExample], log_probs: np.ndarray) -> list[DPOExample]:
    """The examples with the reference's log-probs, of which ``log_probs [N, 2]`` has those of every pair."""
    return [replace(one, reference=(float(log_probs[one.pair, 0]), float(log_probs[one.pair, 1]))) for one in examples]


def read_reference(
    examples: Sequence[DPOExample],
    config: DataConfig,
    model: ShardedModel,
    params: Any,
    mesh: Mesh,
    *,
    show_progress: bool,
) -> np.ndarray:
    """What a policy says of the responses of N pairs, in the very rows that training reads.

    Args:
      examples: numbered from 0 to N - 1.
      config: how they are put into rows and batches.
      model: the policy's.
      params: its parameters.
      mesh: the devices.
      show_progress: draw a bar.

    Returns:
      ``[N, 2]`` float32: log pi_ref(y+ | x) and log pi_ref(y- | x), in nats.

    Raises:
      UserError: where one is no finite number, which is the parameters' fault.
    """
    part, parts = batch_share(mesh)
    batches = eval_batches(examples, config, pad_id=0, process_index=part, process_count=parts)
    log_probs = pair_log_probs(model.graphdef)

    def ends(params: Any, batch: DPOBatch) -> tuple[jax.Array, ...]:
        sums = log_probs(params, batch)
        return batch.is_chosen_end, batch.pair, sums.chosen, sums.rejected

    step = jax.jit(
        ends,
        in_shardings=(model.shardings, partition.batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),  # whole for every process
    )
    place: Callable[[dict[str, np.ndarray]], DPOBatch] = to_devices(mesh, DPOBatch)
    reference = np.full((len(examples), 2), np.nan, np.float32)
    done = 0
    with Progress("read reference", len(examples), unit="pairs", enabled=show_progress) as progress:
        for batch in batches:
            is_end, pair, chosen, rejected = jax.device_get(step(params, place(batch)))
            reference[pair[is_end]] = np.stack([chosen[is_end], rejected[is_end]], axis=1)
            done += int(is_end.sum())
            progress.update(done)
    bad = np.flatnonzero(~np.isfinite(reference).all(axis=1))
    if len(bad):
        raise UserError(
            f"{option('model.path')}: the policy gives the responses of {examples[bad[0]].source} a log-prob of "
            f"{reference[bad[0]].tolist()}, which is no finite number: its parameters are spoiled; give an earlier "
            f"checkpoint, e.g. {flag('model.path')}=RUN_DIR/checkpoints/best"
        )
    return reference


def recorded_policy(folder: Path) -> str | None:
    """Which policy a run of DPO began with, by `jaxrm.inference.weights.identity_of_source`; None without a record."""
    try:
        described = json.loads((folder / REFERENCE).with_suffix(".json").read_text(encoding="utf-8"))
        return str(described["policy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_or_compute_reference(
    file: Path,
    described: dict[str, Any],
    read: Callable[[], np.ndarray],
    *,
    has_trained: bool,
    is_writer: bool,
) -> np.ndarray:
    """The reference's log-probs ``[N, 2]``: those saved in ``file``, or computed now and saved.

    A run that is continued compares with the policy that it began with, whatever ``config.model.path`` holds by then.

    Args:
      file: where they are, or will be; what they belong to is in a JSON file beside it.
      described: what they belong to: ``data``, a fingerprint of the pairs, and ``policy``.
      read: reads them.
      has_trained: whether the run has a checkpoint, whose policy began as that reference.
      is_writer: whether this process writes.

    Raises:
      UserError: where a run that has trained has lost them, or has other pairs by now.
    """
    note = file.with_suffix(".json")
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        saved = np.load(file, allow_pickle=False)
    except (OSError, ValueError):
        known, saved = None, None
    if saved is not None and known == described:
        return saved
    if has_trained:
        if saved is None or not isinstance(known, dict):
            raise UserError(
                f"{file} is lost or damaged, which holds the reference policy's log-probs from before this run began; "
                f"start the run anew, {flag('on_existing')}=restart"
            )
        if known.get("data") != described["data"]:
            raise UserError(
                f"{option('data.path')} no longer gives the pairs that {file} belongs to; give the same data and "
                f"tokenizer, "
                f"or put the run aside with {flag('on_existing')}=restart"
            )
        return saved
    reference = read()
    if is_writer:
        with atomic.open_for_writing(file, "wb") as opened:
            np.save(opened, reference)
        atomic.write_json(note, described)  # last: without it the numbers are read again
    return reference
