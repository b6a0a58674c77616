"""The sets of prompts that policies are compared on."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrm.comparison_config import PromptSetConfig
from jaxrm.data import tasks
from jaxrm.data.config import DataConfig
from jaxrm.data.readers import ReadReport, read_records
from jaxrm.data.records import Message, Record
from jaxrm.errors import UserError, flag, naming, option

SET_PREFIX = "set:"
_SHIPPED = Path(__file__).with_name("prompt_sets")
_LABELS = {"plain": "harmless", "harmless": "harmless", "harmful": "harmful"}


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one nature.

    Attributes:
      name: of the set in the config.
      prompts: as messages.
      label: ``harmless``, ``harmful`` or None.
      report: what became of the records.
      fields: the columns of each prompt's record by name, where a judge reads them; else None.
    """

    name: str
    prompts: Sequence[Sequence[Message]]
    label: str | None
    report: ReadReport
    fields: Sequence[Mapping[str, Any]] | None = None


def read_prompt_set(name: str, config: PromptSetConfig, seed: int, *, with_fields: bool = False) -> PromptSet:
    """Read a set.

    Args:
      name: of the set.
      config: of the set.
      seed: of an embedded task.
      with_fields: keep the columns of the records too.

    Raises:
      UserError: naming the field; where there is no such file, set or task, or a record is no prompt.
    """
    field = f"prompts.{name}"
    is_task = config.path.startswith(tasks.PREFIX)
    if is_task and config.held_out_share is not None:
        raise UserError(
            f"{option(f'{field}.held_out_share')} is {config.held_out_share!r}, but {config.path} has splits of "
            f"its own; use {flag(f'{field}.split')}=heldout"
        )
    if config.split is not None and config.path.startswith(SET_PREFIX):
        raise UserError(
            f"{option(f'{field}.split')} is {config.split!r}, but {config.path} has no splits; use "
            f"{flag(f'{field}.split')}=None"
        )
    with naming(
        {"data": f"config.{field}", "data.path": f"config.{field}.path", "data.eval_path": f"config.{field}.path"}
    ):
        if is_task:
            with tempfile.TemporaryDirectory(prefix="jaxrm-task-") as folder:
                path = _write_task(field, config, seed, Path(folder))
                data = DataConfig(path=path, eval_path=path, max_eval_records=config.max_prompts)
                records, report = _read(data, with_fields)
        else:
            records, report = _read(_data_of(_path_of(field, config.path), config), with_fields)
    shipped = _LABELS.get(config.path.removeprefix(SET_PREFIX)) if config.path.startswith(SET_PREFIX) else None
    fields = [record.fields for record in records] if with_fields else None
    return PromptSet(name, [record.prompt for record in records], config.label or shipped, report, fields)


def _path_of(field: str, path: str) -> str:
    if not path.startswith(SET_PREFIX):
        return path
    name = path.removeprefix(SET_PREFIX)
    if name not in _LABELS:
        raise UserError(
            f"{option(f'{field}.path')} is {path!r}; the sets that come with jaxrm are "
            f"{', '.join(SET_PREFIX + known for known in _LABELS)}, e.g. {flag(f'{field}.path')}=set:plain"
        )
    return str(_SHIPPED / f"{name}.jsonl")


def _write_task(field: str, config: PromptSetConfig, seed: int, folder: Path) -> str:
    task, split = config.path.removeprefix(tasks.PREFIX), config.split or "heldout"
    known = ("heldout", "selection", "test", "test_ood")
    if split not in known:
        raise UserError(
            f"{option(f'{field}.split')} is {split!r}; {config.path} has {', '.join(known)} to compare on, e.g. "
            f"{flag(f'{field}.split')}=test"
        )
    tasks.write_task(task, folder, seed=seed)
    return str(folder / f"{split}.jsonl")


def _data_of(path: str, config: PromptSetConfig) -> DataConfig:
    data = DataConfig(path=path, max_eval_records=config.max_prompts)
    if config.split is not None:
        data = dataclasses.replace(data, split=config.split)
    if config.held_out_share is not None:
        return dataclasses.replace(data, eval_share=config.held_out_share)
    # The held-out side of a file that is given as held out is all of it.
    return dataclasses.replace(data, eval_path=path, eval_split=config.split)


def _read(data: DataConfig, with_fields: bool) -> tuple[list[Record], ReadReport]:
    every = dataclasses.replace(data, max_bad_share=1.0)
    records, report = read_records(every, held_out=True, with_fields=with_fields)
    num_bad = sum(count.count for count in report.bad.values())
    if num_bad > data.max_bad_share * report.total or not records:
        reason, count = max(report.bad.items(), key=lambda item: item[1].count, default=("it is empty", None))
        where = "" if count is None else f" (most often, first at {count.first})"
        raise UserError(
            f"{option('data.path')} is {data.path!r}, where {num_bad} of {report.total} records are no prompts: "
            f"{reason}{where}; mend them, at most {data.max_bad_share:.0%} may be left out"
        )
    return records, report
