"""A file of prompts, and the file of the responses to them."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrm import atomic
from jaxrm.data.config import DataConfig
from jaxrm.data.readers import read_records
from jaxrm.data.records import Message
from jaxrm.errors import UserError, option
from jaxrm.inference.sampler import Sampler
from jaxrm.models.sampling import prompt_keys
from jaxrm.runtime.metrics import read_rows
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
    sampler: Sampler,
    prompts: Sequence[Sequence[Message]],
    output: str | None,
    slots: int,
    key: jax.Array,
    identity: Mapping[str, Any],
) -> None:
    """Write one JSON object a prompt, in order.

    Responses are kept as they end in a file beside the output, ``OUTPUT.part``. A run that was killed goes on from it.

    Args:
      sampler: the model.
      prompts: each as messages.
      output: JSONL, which appears once it is whole; standard output without it.
      slots: prompts answered at once.
      key: typed PRNG key.
      identity: what the responses follow from besides the prompts; a file of others is not continued.

    Raises:
      UserError: a prompt that cannot be read whole, before anything is drawn or written; or responses of others are
        kept beside the output.
    """
    keys = prompt_keys(key, 0, max(len(prompts), 1))[: len(prompts)]
    if output is None:
        for line in _in_order(prompts, sampler.answers(prompts, keys, slots)):
            sys.stdout.write(line)
        return
    target = Path(output).expanduser()
    part_file = target.with_name(f"{target.name}.part")
    digest = hashlib.sha256(json.dumps([_messages(prompt) for prompt in prompts]).encode()).hexdigest()
    rows = _kept_rows(part_file, {"prompts": digest, **identity})
    done: dict[int, str] = {row["place"]: row["response"] for row in rows[1:]}
    rest = [place for place in range(len(prompts)) if place not in done]
    answers = sampler.answers([prompts[place] for place in rest], keys[np.asarray(rest, int)], slots)
    with atomic.open_for_writing(part_file) as file:  # after what cannot be read was refused
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with (
        Progress("generate", len(prompts), unit="prompts", done=len(done)) as progress,
        part_file.open("a", encoding="utf-8") as file,
    ):
        for number, response in answers:
            done[rest[number]] = response
            file.write(json.dumps({"place": rest[number], "response": response}, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(done))
    with atomic.open_for_writing(target) as file:
        file.writelines(_in_order(prompts, sorted(done.items())))
    part_file.unlink()


def _kept_rows(path: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a killed run has kept: what its responses follow from, and a row for each; the first alone without a file.

    Raises:
      UserError: they follow from something else, or a line before the last is no JSON object.
    """
    whole = read_rows(path)
    if whole and whole[0] != identity:
        other = [name for name in identity if whole[0].get(name) != identity[name]]
        raise UserError(
            f"{path} has responses of a run that was stopped, with other {', '.join(other)}; give what it was given to "
            "go on, or remove that file to begin anew, or give another --output=responses.jsonl"
        )
    return whole or [dict(identity)]


def _in_order(prompts: Sequence[Sequence[Message]], answers: Iterable[tuple[int, str]]) -> Iterator[str]:
    """A line for each answer, each as soon as those of the prompts before it are written."""
    waiting: dict[int, str] = {}
    first = 0
    for place, response in answers:
        waiting[place] = response
        while first in waiting:
            row = {"prompt": _messages(prompts[first]), "response": waiting.pop(first)}
            yield json.dumps(row, ensure_ascii=False) + "\n"
            first += 1


def _messages(prompt: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in prompt]
