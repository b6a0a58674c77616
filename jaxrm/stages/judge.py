"""The exact judge of an embedded task, ``config.evaluation.judge``, on records that a stage has read."""

from collections.abc import Sequence

import numpy as np

from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample
from jaxrm.data.records import PreferenceRecord
from jaxrm.errors import UserError, flag, option


def check_judge(judge: str | None, records: Sequence[PreferenceRecord] = ()) -> None:
    """Refuse ``config.evaluation.judge`` where it names no embedded task, or cannot judge responses to ``records``."""
    if judge is None:
        return
    if judge.removeprefix(tasks.PREFIX) not in tasks.TASKS:
        known = ", ".join(f"{tasks.PREFIX}{task}" for task in tasks.TASKS)
        raise UserError(
            f"{option('evaluation.judge')} is {judge!r}; there is a judge for {known}; "
            f"e.g. {flag('evaluation.judge')}={tasks.PREFIX}{tasks.TASKS[0]}, or =None"
        )
    for record in records:
        try:
            judge_response(judge, record, record.chosen)
        except UserError as error:
            raise UserError(
                f"{option('evaluation.judge')} is {judge!r}, but {record.source} has no prompt of that task; judge "
                f"nothing, "
                f"{flag('evaluation.judge')}=None, or give the task's data, e.g. {flag('data.path')}={judge}"
            ) from error


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


def judge_response(judge: str, record: PreferenceRecord, response: str) -> float:
    """Exact utility of a response to a record's prompt."""
    return tasks.judge(judge.removeprefix(tasks.PREFIX), record.prompt, response)


def judge_pairs(judge: str, records: Sequence[PreferenceRecord]) -> np.ndarray:
    """Exact utilities ``[2, N]`` of the chosen and the rejected response of each record."""
    sides = ([getattr(record, side) for record in records] for side in ("chosen", "rejected"))
    return np.array([[judge_response(judge, *pair) for pair in zip(records, side, strict=True)] for side in sides])
