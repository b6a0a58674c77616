"""Batches to train on, from a file to arrays on the devices: what a training loop of one's own iterates over."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar

from jaxrm.data.config import DataConfig
from jaxrm.data.examples import TokenExample, tokenize_demonstrations
from jaxrm.data.loader import build_loader
from jaxrm.data.pair_examples import comparison_examples, mapping_examples
from jaxrm.data.pairs import TokenPair, tokenize_pairs
from jaxrm.data.readers import read_records
from jaxrm.data.records import as_demonstration
from jaxrm.data.templates import bos_id
from jaxrm.errors import UserError, arguments, flag, option
from jaxrm.inference.policy import Policy
from jaxrm.inference.prompts import check_count
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.sharded_model import pad_id, to_devices
from jaxrm.inference.task_files import Records, task_files
from jaxrm.models import build
from jaxrm.sharding.mesh import batch_shards, batch_share, check_batch, check_row_length
from jaxrm.types import ComparisonBatch, MarkedMappingBatch, TokenBatch

Batch = TypeVar("Batch")
_ARGUMENTS = {"data": ""}  # data.batch_size is the argument batch_size


@arguments(_ARGUMENTS)
def pairs(
    path: str | DataConfig,
    model: Policy | RewardModel,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> Iterator[MarkedMappingBatch]:
    """Batches of both mappings of a seq2seq reward model, without end, shuffled anew every epoch.

    Args:
      path: file, folder or hub name of preference pairs in any schema that jaxrm reads; an embedded task,
        ``task:safety``; or a whole `jaxrm.data.config.DataConfig`.
      model: whose tokenizer, template, request and devices they are for.
      batch_size: B, rows in a batch; 8 by default.
      max_length: T, tokens in a row; by default 1,024, or as many as the model reads. Examples are packed into rows.
      seed: of the order.
      held_out: read the records that are held out by a hash of their prompts, 5 % by default, in place of the others.

    Returns:
      Iterator over `jaxrm.types.MarkedMappingBatch`, ``[B, T]``, on the devices.

    Raises:
      UserError: where there is no such file, its records are no pairs, or rows or batch do not fit; at once.
    """
    rm = model if isinstance(model, RewardModel) else model.as_reward_model("seq2seq")
    data = _data(path, rm, batch_size, max_length)
    tokenized = _tokenized_pairs(data, rm, seed, held_out)
    examples, _ = mapping_examples(tokenized, rm.request, data, first_id=rm.bos_id, marks_edits=True)
    return _batches(examples, data, rm, seed, MarkedMappingBatch)


@arguments(_ARGUMENTS)
def comparisons(
    path: str | DataConfig,
    model: Policy | RewardModel,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> Iterator[ComparisonBatch]:
    """Batches of a scalar reward model: both responses of a pair in one row. Arguments and errors as for `pairs`.

    Returns:
      Iterator over `jaxrm.types.ComparisonBatch`, ``[B, T]``, on the devices.
    """
    data = _data(path, model, batch_size, max_length)
    tokenized = _tokenized_pairs(data, model, seed, held_out)
    examples, _ = comparison_examples(tokenized, data, first_id=bos_id(model.tokenizer, model.template))
    return _batches(examples, data, model, seed, ComparisonBatch)


@arguments(_ARGUMENTS)
def demonstrations(
    path: str | DataConfig,
    model: Policy | RewardModel,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> Iterator[TokenBatch]:
    """Batches of SFT: demonstrations, or the chosen responses of pairs. Arguments and errors as for `pairs`.

    Returns:
      Iterator over `jaxrm.types.TokenBatch`, ``[B, T]``, on the devices.
    """
    data = _data(path, model, batch_size, max_length)
    with task_files(data, seed, records="demonstrations") as files:
        records, _ = read_records(files, held_out=held_out)
    examples, _ = tokenize_demonstrations([as_demonstration(record) for record in records], model.tokenizer, data)
    return _batches(examples, data, model, seed, TokenBatch)


def _data(
    path: str | DataConfig, model: Policy | RewardModel, batch_size: int | None, max_length: int | None
) -> DataConfig:
    """The data section that the arguments come to, checked against model and devices."""
    if not isinstance(path, str | DataConfig) or path == "":
        raise UserError(
            f"{option('path')} is {path!r}; it must be a file of records, or a DataConfig, e.g. "
            f"{flag('path')}='pairs.jsonl'"
        )
    longest = model.model.config.max_position
    data = path if isinstance(path, DataConfig) else DataConfig(path=path, max_length=min(1024, longest))
    batch_size = data.batch_size if batch_size is None else batch_size
    max_length = data.max_length if max_length is None else max_length
    check_count("batch_size", batch_size)
    check_count("max_length", max_length, 2)
    data = dataclasses.replace(data, template=model.template, batch_size=batch_size, max_length=max_length)
    check_batch(model.model.mesh, "data.batch_size", data.batch_size)
    check_row_length(model.model.mesh, "data.max_length", data.max_length)
    build.check_length(model.model.config, "data.max_length", data.max_length)
    return data


def _tokenized_pairs(data: DataConfig, model: Policy | RewardModel, seed: int, held_out: bool) -> Sequence[TokenPair]:
    records: Records = "pairs"
    with task_files(data, seed, records=records) as files:
        read, _ = read_records(files, held_out=held_out)
    return tokenize_pairs(read, model.tokenizer, data)[0]


def _batches(
    examples: Sequence[TokenExample],
    data: DataConfig,
    model: Policy | RewardModel,
    seed: int,
    batch_type: type[Batch],
) -> Iterator[Batch]:
    mesh = model.model.mesh
    share, num_shares = batch_share(mesh)
    loader = build_loader(
        examples,
        data,
        pad_id=pad_id(model.tokenizer, model.model.config),
        seed=seed,
        process_index=share,
        process_count=num_shares,
        batch_unit=batch_shards(mesh),
    )
    return map(to_devices(mesh, batch_type), loader)
