"""Prompts of a stage, on both sides of the held-out split, as batches of one shape."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrm.data.config import DataConfig
from jaxrm.data.loader import BatchIterator, build_loader, fingerprint
from jaxrm.data.packing import Row, build_row
from jaxrm.data.prompts import RECORD, PromptExample, left_padded, tokenize_prompts, too_long_reason
from jaxrm.data.readers import ReadReport, read_records
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime.progress import Progress
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, batch_share
from jaxrm.stages.rewards.sources import reads_fields
from jaxrm.stages.stage import Stage
from jaxrm.types import RecordedBatch, ResponseBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlacedPrompts(NamedTuple):
    """A batch of prompts on the devices.

    Attributes:
      tokens: ``[G, P]`` int32, padded on the left.
      mask: ``[G, P]`` bool, False on padding.
      records: ``[G]`` int32, the number of each prompt's record; None where no rewards read its fields.
    """

    tokens: jax.Array
    mask: jax.Array
    records: jax.Array | None = None

    def with_records(self, batch: ResponseBatch) -> ResponseBatch:
        """Responses to these prompts, with the record of each; a prompt's are next to each other."""
        if self.records is None:
            return batch
        n = len(batch.responses) // len(self.records)
        return RecordedBatch(**vars(batch), records=_repeat(n, self.records.sharding)(self.records))


@functools.cache
def _repeat(n: int, sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda records: jnp.repeat(records, n), out_shardings=sharding)


@dataclass(frozen=True)
class Prompts:
    """One side of the split.

    Attributes:
      examples: the prompts.
      report: what became of the records.
    """

    examples: Sequence[PromptExample]
    report: ReadReport


def load_prompts(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    held_out: bool,
    show_progress: bool,
    with_fields: bool = False,
) -> Prompts:
    """Read and tokenize the prompts of one side of the split.

    Args:
      data: the section; ``max_length`` is for prompt and response together.
      tokenizer: of the policy.
      max_new_tokens: what of it is for the response.
      held_out: which side.
      show_progress: draw a bar.
      with_fields: give each prompt the columns of its record, for rewards of text.

    Raises:
      UserError: where every prompt is too long, or too many are unusable for another reason.
    """
    room = data.max_length - max_new_tokens
    if room < 1:
        raise UserError(
            f"{option('rollout.sampling.max_new_tokens')} is {max_new_tokens}, but {option('data.max_length')}, "
            f"prompt and "
            f"response together, is {data.max_length}; e.g. {flag('data.max_length')}={2 * max_new_tokens}"
        )
    records, report = read_records(data, held_out=held_out, with_fields=with_fields)
    label = "tokenize held-out" if held_out else "tokenize"
    with Progress(label, len(records), unit="prompts", enabled=show_progress) as progress:
        examples, tokenized = tokenize_prompts(
            records,
            tokenizer,
            data.template,
            room,
            lambda done, total: progress.update(done),
            max_new_tokens=max_new_tokens,
        )
    path = (held_out and data.eval_path) or data.path
    dropped = tokenized.bad.get(too_long_reason(room))
    if dropped is not None and not examples:
        raise UserError(
            f"{path}: {dropped.count} of {len(records)} prompts are longer than {room} tokens and none is left (first "
            f"at {dropped.first}); {option('data.max_length')}, prompt and response together, is {data.max_length}, "
            f"and responses have up to {max_new_tokens}; e.g. {flag('data.max_length')}={max(dropped.lengths)}"
        )
    # That a prompt is long is no fault of its record: only the others count against max_bad_share.
    others = {reason: bad for reason, bad in tokenized.bad.items() if reason != too_long_reason(room)}
    replace(tokenized, bad=others).check(data.max_bad_share, path)
    return Prompts(examples, report.merge(tokenized))


def stage_prompts(stage: Stage, *, held_out: bool) -> Prompts:
    """The prompts of one side of a stage's data, which leave room for a response; errors as for `load_prompts`."""
    return load_prompts(
        stage.data,
        stage.tokenizer,
        max_new_tokens=stage.config.rollout.sampling.max_new_tokens,
        held_out=held_out,
        show_progress=stage.show_progress,
        with_fields=reads_fields(stage.config),
    )


def numbered(config: Any, sides: Sequence[Prompts]) -> list[Prompts]:
    """The sides of a stage's data, each record with a number among all of them where rewards read its fields."""
    if not reads_fields(config):
        return list(sides)
    numbers = itertools.count()
    return [
        replace(side, examples=[replace(example, number=next(numbers)) for example in side.examples]) for side in sides
    ]


def stage_prompt_length(stage: Stage, examples: Sequence[PromptExample]) -> int:
    """Tokens that all prompts of a stage are padded to."""
    room = stage.config.data.max_length - stage.config.rollout.sampling.max_new_tokens
    return prompt_width(examples, room, max(16, stage.pad_to_multiple_of))


def prompt_width(examples: Sequence[PromptExample], room: int, multiple: int) -> int:
    """One width for all prompts of a run, so that nothing is compiled twice: the longest, on a full ``multiple``."""
    longest = max(len(example.tokens) for example in examples)
    return max(min(-(-longest // multiple) * multiple, room), longest)


def prompt_loader(
    examples: Sequence[PromptExample], data: DataConfig, width: int, mesh: Mesh, *, seed: int, pad_id: int
) -> tuple[BatchIterator, str]:
    """Endless batches of prompts, and the fingerprint of what is behind them."""
    part, parts = batch_share(mesh)
    rows = replace(data, max_length=width, packing=False)
    loader = build_loader(
        examples,
        rows,
        pad_id=pad_id,
        seed=seed,
        process_index=part,
        process_count=parts,
        batch_unit=batch_shards(mesh),
    )
    return loader, fingerprint(examples, data)[:12]


def prompts_to_devices(mesh: Mesh) -> Callable[[Row], PlacedPrompts]:
    """Function that puts this process's rows on its devices, padded on the left."""
    sharding = partition.batch_sharding(mesh)

    def place(row: Row) -> PlacedPrompts:
        return PlacedPrompts(*(jax.make_array_from_process_local_data(sharding, x) for x in _arrays(row)))

    return place


def fixed_batches(examples: Sequence[PromptExample], rows: int, width: int, mesh: Mesh) -> list[PlacedPrompts]:
    """The prompts in their order, ``rows`` at a time; the last batch is filled up from the beginning."""
    sharding = partition.batch_sharding(mesh)
    batches: list[PlacedPrompts] = []
    for start in range(0, len(examples), rows):
        indices = [i % len(examples) for i in range(start, start + rows)]
        columns = {name: values.dtype for name, values in examples[0].columns().items()}
        built = [build_row([examples[i]], width, 0, columns) for i in indices]
        arrays = _arrays({name: np.stack([row[name] for row in built]) for name in built[0]})
        # Every process has all of it and gives its devices their part.
        placed = (jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in arrays)
        batches.append(PlacedPrompts(*placed))
    return batches


def _arrays(row: Row) -> tuple[np.ndarray, ...]:
    """The arrays of `PlacedPrompts`; a row of a batch begins with its prompt."""
    return (*left_padded(row), *([row[RECORD][:, 0]] if RECORD in row else []))
