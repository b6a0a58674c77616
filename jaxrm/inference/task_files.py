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
      UserError: where there is no such task, no such split, or a field that would do nothing.
    """
    if not data.path.startswith(tasks.PREFIX):
        if data.max_notes is not None:
            raise UserError(
                f"{option('data.max_notes')} is {data.max_notes}, but {option('data.path')} is {data.path!r}, no "
                f"embedded task with notes; leave it out, e.g. {flag('data.max_notes')}=None"
            )
        yield data
        return
    _check_fields(data, records)
    with tempfile.TemporaryDirectory(prefix="jaxrm-task-") as name:
        folder = Path(name)
        tasks.write_task(data.path.removeprefix(tasks.PREFIX), folder, seed=seed, max_notes=data.max_notes)
        is_own = data.eval_path is None  # else `eval_split` is that of the other path
        held_out = str(folder / f"{_task_split(data)}.jsonl") if is_own and records != "pairs" else data.eval_path
        file_names = {"demonstrations": "train.jsonl", "pairs": "pairs.jsonl", "prompts": "prompts.jsonl"}
        yield dataclasses.replace(
            data,
            path=str(folder / file_names[records]),
            eval_path=held_out,
            eval_split=None if is_own else data.eval_split,
            max_notes=None,
            tokenizer=str(folder / "tokenizer") if data.tokenizer is None else data.tokenizer,
        )


def _check_fields(data: DataConfig, records: Records) -> None:
    if data.split != DataConfig.split:
        raise UserError(
            f"{option('data.split')} is {data.split!r}, but {data.path} has one set of {records} to train on; leave it "
            f"out, e.g. {flag('data.split')}={DataConfig.split}"
        )
    if data.revision is not None:
        raise UserError(
            f"{option('data.revision')} is {data.revision!r}, but {data.path} is no data set of the hub; leave it out, "
            f"e.g. {flag('data.revision')}=None"
        )
    if records == "pairs" and data.eval_split is not None and data.eval_path is None:
        raise UserError(
            f"{option('data.eval_split')} is {data.eval_split!r}, but of the pairs of {data.path} a share is held out; "
            f"leave it out, e.g. {flag('data.eval_split')}=None"
        )


def _task_split(data: DataConfig) -> str:
    split = data.eval_split or "heldout"
    if split not in tasks.SPLITS:
        raise UserError(
            f"{option('data.eval_split')} is {split!r}; {data.path} has {', '.join(tasks.SPLITS)}, "
            f"e.g. {flag('data.eval_split')}=heldout"
        )
    return split
