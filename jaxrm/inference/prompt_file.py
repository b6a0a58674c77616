"""A file of prompts, and the file of the responses to them."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from jaxrm import atomic
from jaxrm.data.config import DataConfig
from jaxrm.data.readers import read_records
from jaxrm.data.records import Message
from jaxrm.errors import UserError, option
from jaxrm.inference.sampler import Sampler
from jaxrm.runtime.progress import Progress


def read_prompt_file(path: str) -> list[Sequence[Message]]:
    """Prompts of a file in any schema that jaxrm reads.

    Raises:
      UserError: where there is no such file, or one of its records has no prompt.
    """
    # Nothing is held out of a file of prompts: the held-out side of a file given as such is all of it.
    whole = DataConfig(path=path, eval_path=path, max_eval_records=None, max_bad_share=1.0)
    records, report = read_records(whole, held_out=True)
    for reason, count in report.bad.items():
        raise UserError(
            f"{option('data.eval_path')} is {path!r}, where {count.count} of {report.total} records are no prompts: "
            f"{reason} (first at {count.first}); mend them, so that every prompt has its response"
        )
    return [record.prompt for record in records]


def write_responses(
    sampler: Sampler, prompts: Sequence[Sequence[Message]], output: str | None, batch_size: int, key: jax.Array
) -> None:
    """Write one JSON object a prompt, in order.

    Args:
      sampler: the model.
      prompts: each as messages.
      output: JSONL, which appears once it is whole; standard output without it.
      batch_size: prompts answered at once.
      key: typed PRNG key.

    Raises:
      UserError: a prompt that cannot be read whole, before anything is drawn or written.
    """
    batches = sampler.in_batches(prompts, key, batch_size)

    def lines() -> Iterator[str]:
        with Progress("generate", len(prompts), unit="prompts", enabled=output is not None) as progress:
            done = 0
            for batch in batches:
                for prompt, response in zip(prompts[done : done + len(batch)], batch, strict=True):
                    messages = [{"role": message.role, "content": message.content} for message in prompt]
                    yield json.dumps({"prompt": messages, "response": response}, ensure_ascii=False) + "\n"
                done += len(batch)
                progress.update(done)

    if output is None:
        sys.stdout.writelines(lines())
        return
    with atomic.open_for_writing(Path(output).expanduser()) as file:
        file.writelines(lines())
