"""Prompts of a stage, on both sides of the held-out split, as batches of one shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms.reward_config import sources_of
from jaxrm.data import tasks
from jaxrm.data.config import DataConfig
from jaxrm.data.loader import BatchIterator, build_loader, fingerprint
from jaxrm.data.packing import Row, build_row
from jaxrm.data.prompts import PromptExample, left_padded, tokenize_prompts, too_long_reason
from jaxrm.data.readers import ReadReport, read_records
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime.progress import Progress
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, batch_share
from jaxrm.stages.rewards.function_call import open_function, takes_fields
from jaxrm.stages.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PlacedPrompts = tuple[jax.Array, jax.Array]


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


def reads_fields(config: Any) -> bool:
    """Whether the rewards of a stage look at the columns of a prompt's record."""
    sources = sources_of(config).values()
    functions = [source.function for source in sources if source.function is not None]
    return any(source.endpoint is not None for source in sources) or any(
        takes_fields(open_function(function)) for function in functions
    )


def stage_prompt_length(stage: Stage, examples: Sequence[PromptExample]) -> int:
    """Tokens that all prompts of a stage are padded to."""
    room = stage.config.data.max_length - stage.config.rollout.sampling.max_new_tokens
    return prompt_width(examples, room, max(16, stage.pad_to_multiple_of))


def check_judgeable(prompts: Sequence[PromptExample], task: str, field: str) -> None:
    """Refuse a task (``task:safety``) whose judge knows nothing of one of the prompts; ``field`` names it.

    Raises:
      UserError: naming the first such prompt.
    """
    for prompt in prompts:
        try:
            tasks.judge(task.removeprefix(tasks.PREFIX), prompt.messages, "")
        except UserError as error:
            raise UserError(
                f"{option(field)} is {task!r}, but {prompt.source} has no prompt of that task; give the task's data, "
                f"e.g. {flag('data.path')}={task}, or {flag(field)}=None"
            ) from error


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
        tokens, mask = left_padded(row)
        return (
            jax.make_array_from_process_local_data(sharding, tokens),
            jax.make_array_from_process_local_data(sharding, mask),
        )

    return place


def fixed_batches(examples: Sequence[PromptExample], rows: int, width: int, mesh: Mesh) -> list[PlacedPrompts]:
    """The prompts in their order, ``rows`` at a time; the last batch is filled up from the beginning."""
    sharding = partition.batch_sharding(mesh)
    batches: list[PlacedPrompts] = []
    for start in range(0, len(examples), rows):
        indices = [i % len(examples) for i in range(start, start + rows)]
        built = [build_row([examples[i]], width, 0, {}) for i in indices]
        arrays = left_padded({name: np.stack([row[name] for row in built]) for name in built[0]})
        # Every process has all of it and gives its devices their part.
        tokens, mask = (jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in arrays)
        batches.append((tokens, mask))
    return batches
