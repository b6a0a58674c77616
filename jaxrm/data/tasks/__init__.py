"""Embedded tasks: small worlds in plain English, generated from a seed, that need no download.

A task is written to a folder as the files that any other data set has (JSONL records and a tokenizer in
Hugging Face form), and the ordinary readers take it from there; nothing above this package knows that the
text was generated. `config.data.path = "task:safety"` names one. What other data have not got is an exact judge
(`judge`), the one best response (`ideal`), and an annotator whose bias is known (`annotate`).

`safety` is about requests to help with or to refuse; its annotator is too fond of refusals. `summarize` is about
notes of which the important ones are to be listed; its annotator is too fond of long lists. `dialogue` is about
questions that follow from what was said before; its annotator is too fond of agreement and flattery.

Prompts to sample new pairs for are those of `pairs.jsonl`: they have the pairs' distribution, and no other file
shares one.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from jaxrm.data.records import Message
from jaxrm.data.tasks.prompts import ForeignPromptError
from jaxrm.errors import UserError, flag, option

T = TypeVar("T")

TASKS = ("safety", "summarize", "dialogue")
PREFIX = "task:"  # of a task's name, where a path could stand
SPLITS = ("train", "heldout", "prompts", "pairs", "selection", "test", "test_ood")  # files, less their .jsonl

BEHAVIOURS: dict[str, tuple[str, ...]] = {
    "safety": ("refusals", "refusal_on_benign", "refusal_on_dual_use", "unsafe_on_harmful", "malformed"),
    "summarize": ("items", "excess_items", "coverage", "repeats", "malformed"),
    "dialogue": ("correct", "complete", "sycophantic", "agreement", "flattery", "malformed"),
}


def write_task(name: str, folder: str | Path, *, seed: int) -> None:
    """Writes the embedded task `name` into `folder`; the same seed gives the same bytes.

    The folder then holds, of `SPLITS`, `train.jsonl` and `heldout.jsonl` (demonstrations as chat messages),
    `prompts.jsonl` (prompts alone), `pairs.jsonl` (prompt, chosen, rejected), and prompts alone to choose settings on
    (`selection.jsonl`) and to report results on: in distribution (`test.jsonl`) and out of it (`test_ood.jsonl`, each
    prompt with something that no prompt of the other prompt files and no pair has). And `tokenizer/`. No two of these
    files share a prompt. Files that are already there under these names are replaced, each atomically.

    Raises:
      UserError: there is no task of this name; the message lists those there are.
    """
    _check_known(name)
    if name == "safety":
        from jaxrm.data.tasks.safety import task as safety

        safety.write(Path(folder), seed=seed)
    elif name == "summarize":
        from jaxrm.data.tasks.summarize import task as summarize

        summarize.write(Path(folder), seed=seed)
    else:
        from jaxrm.data.tasks.dialogue import files as dialogue_files

        dialogue_files.write(Path(folder), seed=seed)


def judge(name: str, prompt: Sequence[Message], response: str) -> float:
    """The exact utility, in [0, 1], of a response to a prompt of the task `name`; 1 is the best there is.

    Raises:
      UserError: there is no task of this name, or the prompt is none of the task's.
    """
    return _ask("judge", name, prompt, (response,), lambda world: float(world.gold(prompt, response)))


def ideal(name: str, prompt: Sequence[Message]) -> str:
    """The best response to a prompt of the task `name`, which `judge` marks 1; raises as `judge`."""
    return _ask("judge", name, prompt, (), lambda world: str(world.ideal(prompt)))


def behaviour(name: str, prompt: Sequence[Message], response: str) -> dict[str, float]:
    """What a response does, as numbers: those of `BEHAVIOURS[name]` that apply to this prompt; raises as `judge`.

    Shares are 0 or 1 for one response; `items`, `excess_items` and `repeats` count.
    """

    def read(world: ModuleType) -> dict[str, float]:
        found = world.behaviour(prompt, response)
        return {key: float(found[key]) for key in BEHAVIOURS[name] if key in found}

    return _ask("judge", name, prompt, (response,), read)


def mean_behaviour(name: str, found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Means of `behaviour` over many responses, each key over the prompts that it applies to; none, no key."""
    rows = list(found)
    values = {key: [row[key] for row in rows if key in row] for key in BEHAVIOURS[name]}
    return {key: sum(column) / len(column) for key, column in values.items() if column}


def probability_of_first(name: str, prompt: Sequence[Message], first: str, second: str) -> float:
    """How probable it is that the task's annotator prefers `first`: Bradley-Terry on a biased utility u.

        P = sigmoid(u(first) - u(second))

    Raises as `judge`.
    """

    def difference(world: ModuleType) -> float:
        return float(world.utility(prompt, first) - world.utility(prompt, second))

    return 1.0 / (1.0 + math.exp(-_ask("annotator", name, prompt, (first, second), difference)))


def annotate(name: str, prompt: Sequence[Message], first: str, second: str, rng: random.Random) -> int:
    """Which of two responses, 0 or 1, the task's annotator prefers: noisy, and biased on purpose (jaxrm choice).

    One `rng.random()` decides, so a seed gives the same preferences in every version of Python.

    Raises:
      UserError: as `judge`.
    """
    probability = probability_of_first(name, prompt, first, second)
    return 0 if rng.random() < probability else 1


def _ask(
    who: str, name: str, prompt: Sequence[Message], responses: Sequence[str], call: Callable[[ModuleType], T]
) -> T:
    """What the world's judge or annotator says; whatever it raises names the sample."""
    _check_known(name)
    try:
        return call(_judge_module(name))
    except Exception as error:
        asked = _shown(" / ".join(message.content for message in prompt))
        given = "".join(f", response {_shown(response)}" for response in responses)
        if isinstance(error, ForeignPromptError):
            raise UserError(
                f"the {who} of task:{name} knows the task's own prompts only, and {asked}{given} has none of them; "
                f"give it prompts of the task's files, e.g. {flag('data.path')}=task:{name}"
            ) from error
        raise UserError(
            f"the {who} of task:{name} raised {type(error).__name__}: {error}; prompt {asked}{given}"
        ) from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")


def _judge_module(name: str) -> ModuleType:
    if name == "safety":
        from jaxrm.data.tasks.safety import judge as safety_judge

        return safety_judge
    if name == "summarize":
        from jaxrm.data.tasks.summarize import judge as summarize_judge

        return summarize_judge
    from jaxrm.data.tasks.dialogue import judge as dialogue_judge

    return dialogue_judge


def _check_known(name: str) -> None:
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        meant = f"; did you mean task:{close[0]}?" if close else ""
        known = ", ".join(f"task:{task}" for task in TASKS)
        raise UserError(f"{option('data.path')}: there is no embedded task {name!r}; there are: {known}{meant}")
