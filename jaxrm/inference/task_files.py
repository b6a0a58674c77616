"""The files of an embedded task, for as long as they are read."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from jaxrm.data import tasks
from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError, flag, option

Records = Literal["demonstrations", "pairs", "prompts"]


@contextmanager
def task_files(data: DataConfig, seed: int, *, records: Records = "demonstrations") -> Iterator[DataConfig]:
    """The data section with an embedded task (``task:safety``) replaced by its files, which live as long as the block.

    From here on a task is read like any other data. Demonstrations and prompts have held-out ones of their own: the
    split of `jaxrm.data.tasks.SPLITS` that ``eval_split`` names, ``heldout`` without it. Of pairs a share is held out.
    Other sections pass unchanged.

    Raises:
      UserError: where there is no such task, or no such split.
    """
    if not data.path.startswith(tasks.PREFIX):
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="jaxrm-task-") as name:
        folder = Path(name)
        tasks.write_task(data.path.removeprefix(tasks.PREFIX), folder, seed=seed)
        held_out = None if records == "pairs" else str(folder / f"{_task_split(data)}.jsonl")
        file_names = {"demonstrations": "train.jsonl", "pairs": "pairs.jsonl", "prompts": "prompts.jsonl"}
        yield dataclasses.replace(
            data,
            path=str(folder / file_names[records]),
            eval_path=held_out if data.eval_path is None else data.eval_path,
            eval_split=None,
            tokenizer=str(folder / "tokenizer") if data.tokenizer is None else data.tokenizer,
        )


def _task_split(data: DataConfig) -> str:
    split = data.eval_split or "heldout"
    if split not in tasks.SPLITS:
        raise UserError(
            f"{option('data.eval_split')} is {split!r}; {data.path} has {', '.join(tasks.SPLITS)}, "
            f"e.g. {flag('data.eval_split')}=heldout"
        )
    return split
