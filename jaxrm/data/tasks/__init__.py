"""Embedded tasks: small worlds in plain English, generated from a seed, that need no download.

A task is written to a folder as the files that any other data set has (JSONL records and a tokenizer in
Hugging Face form), and the ordinary readers take it from there; nothing above this package knows that the
text was generated. `config.data.path = "task:safety"` names one. What other data have not got is an exact judge
(`judge`), and an annotator whose bias is known (`annotate`).

Prompts to sample new pairs for are those of `pairs.jsonl`: they have the pairs' distribution, and no other file
shares one.
"""

from __future__ import annotations

import difflib
import random
from pathlib import Path

from jaxrm.errors import UserError

TASKS = ("safety",)
PREFIX = "task:"  # of a task's name, where a path could stand


def write_task(name: str, folder: str | Path, *, seed: int) -> None:
    """Writes the embedded task `name` into `folder`; the same seed gives the same bytes.

    The folder then holds `train.jsonl` and `heldout.jsonl` (demonstrations as chat messages), `prompts.jsonl`
    (prompts alone), `pairs.jsonl` (prompt, chosen, rejected) and `tokenizer/`. No two of these files share a
    prompt. Files that are already there under these names are replaced, each atomically.

    Raises:
      UserError: there is no task of this name; the message lists those there are.
    """
    _check_known(name)
    from jaxrm.data.tasks import safety

    safety.write(Path(folder), seed=seed)


def judge(name: str, prompt: str, response: str) -> float:
    """The exact utility, in [0, 1], of a response to a prompt of the task `name`; 1 is the one best response.

    Raises:
      UserError: there is no task of this name, or the prompt is none of the task's.
    """
    _check_known(name)
    from jaxrm.data.tasks import safety_judge

    return safety_judge.gold(prompt, response)


def annotate(name: str, prompt: str, first: str, second: str, rng: random.Random) -> int:
    """Which of two responses, 0 or 1, the task's annotator prefers: noisy, and biased on purpose (jaxrm choice).

    One `rng.random()` decides, so a seed gives the same preferences in every version of Python.

    Raises:
      UserError: as `judge`.
    """
    _check_known(name)
    from jaxrm.data.tasks import safety_judge

    return safety_judge.annotate(prompt, first, second, rng)


def is_refusal(name: str, response: str) -> bool:
    """Whether a response is a well-formed refusal in the task `name`.

    Raises:
      UserError: there is no task of this name.
    """
    _check_known(name)
    from jaxrm.data.tasks import safety_judge

    return safety_judge.is_refusal(response)


def _check_known(name: str) -> None:
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        meant = f"; did you mean task:{close[0]}?" if close else ""
        known = ", ".join(f"task:{task}" for task in TASKS)
        raise UserError(f"config.data.path: there is no embedded task {name!r}; there are: {known}{meant}")
