"""Embedded tasks: small worlds in plain English, generated from a seed, without a download.

A task is written to a folder as the files of any other data set: JSONL records, and a tokenizer in Hugging Face form.
The ordinary readers take it from there, and nothing above this package knows that the text was generated.
``config.data.path = "task:safety"`` names one. A task has three things that other data lack: an exact judge
(``judge``), the one best response (``ideal``), and an annotator with a known bias (``annotate``).

In ``safety``, requests are to be answered or refused; its annotator likes refusals too much. In ``summarize``, the
important notes of several are to be listed; its annotator likes long lists too much. In ``dialogue``, questions depend
on earlier turns; its annotator likes agreement and flattery too much.

New pairs are sampled for the prompts of ``pairs.jsonl``, which have the distribution of the pairs. No other file shares
a prompt with it.
"""

import difflib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

BEHAVIORS: dict[str, tuple[str, ...]] = {
    "safety": ("refusals", "refusal_on_benign", "refusal_on_dual_use", "unsafe_on_harmful", "malformed"),
    "summarize": ("items", "excess_items", "coverage", "repeats", "malformed"),
    "dialogue": ("correct", "complete", "sycophantic", "agreement", "flattery", "malformed"),
}


def write_task(name: str, folder: str | Path, *, seed: int, max_notes: int | None = None) -> None:
    """Write the embedded task ``name`` into ``folder``. The same arguments give the same bytes.

    The files are ``tokenizer/`` and, as JSONL, ``SPLITS``. ``train`` and ``heldout`` hold demonstrations as chat
    messages, ``pairs`` holds prompt, chosen and rejected. The others hold prompts alone: ``prompts`` for PPO,
    ``selection`` to choose settings on, ``test`` and ``test_ood`` to report results on. Each prompt of ``test_ood`` has
    something that no other prompt file and no pair has. No two files share a prompt. Files that exist under these names
    are replaced, each atomically.

    Args:
      name: of `TASKS`.
      folder: of the files.
      seed: of all that is drawn.
      max_notes: most notes of a prompt of ``summarize``; None for 7.

    Raises:
      UserError: there is no task of this name, or it has no notes.
    """
    _check_known(name)
    if max_notes is not None and name != "summarize":
        raise UserError(
            f"{option('data.max_notes')} is {max_notes}, but the prompts of task:{name} have no notes; leave it out, "
            f"e.g. {flag('data.max_notes')}=None"
        )
    if name == "safety":
        from jaxrm.data.tasks.safety import task as safety

        safety.write(Path(folder), seed=seed)
    elif name == "summarize":
        from jaxrm.data.tasks.summarize import task as summarize

        summarize.write(Path(folder), seed=seed, **({} if max_notes is None else {"max_notes": max_notes}))
    else:
        from jaxrm.data.tasks.dialogue import files as dialogue_files

        dialogue_files.write(Path(folder), seed=seed)


def judge(name: str, prompt: Sequence[Message], response: str) -> float:
    """The exact utility, in [0, 1], of a response to a prompt of the task ``name``. 1 is the best.

    Raises:
      UserError: there is no task of this name, or the prompt does not belong to the task.
    """
    return _evaluate("judge", name, prompt, (response,), lambda world: float(world.gold(prompt, response)))


def ideal(name: str, prompt: Sequence[Message]) -> str:
    """The best response to a prompt of the task ``name``: ``judge`` gives it 1. Raises as ``judge``."""
    return _evaluate("judge", name, prompt, (), lambda world: str(world.ideal(prompt)))


def behavior(name: str, prompt: Sequence[Message], response: str) -> dict[str, float]:
    """The behavior of a response as numbers: those of ``BEHAVIORS[name]`` that apply to this prompt.

    Shares are 0 or 1 for one response; ``items``, ``excess_items`` and ``repeats`` are counts. Raises as ``judge``.
    """

    def read(world: ModuleType) -> dict[str, float]:
        values = world.behavior(prompt, response)
        return {key: float(values[key]) for key in BEHAVIORS[name] if key in values}

    return _evaluate("judge", name, prompt, (response,), read)


def mean_behavior(name: str, behaviors: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Means of ``behavior`` over many responses, each key over the prompts that it applies to, if any."""
    rows = list(behaviors)
    values = {key: [row[key] for row in rows if key in row] for key in BEHAVIORS[name]}
    return {key: sum(column) / len(column) for key, column in values.items() if column}


@dataclass(frozen=True)
class Annotator:
    """Who labels pairs: noisy, and biased on purpose (jaxrm choice).

    Attributes:
      bias: times the task's bias; with 0 the annotator likes what the judge likes.
      noise: divides the difference of two utilities; with 0 the better one is always preferred.
    """

    bias: float = 1.0
    noise: float = 1.0


def probability_of_first(
    name: str, prompt: Sequence[Message], first: str, second: str, annotator: Annotator = Annotator()
) -> float:
    """The probability that the task's annotator prefers ``first``: Bradley-Terry on a biased utility u.

        P = sigmoid((u(first) - u(second)) / noise)

    Raises as ``judge``.
    """

    def read(world: ModuleType) -> float:
        utility = partial(world.utility, prompt, bias=annotator.bias)
        return float(utility(first) - utility(second))

    difference = _evaluate("annotator", name, prompt, (first, second), read)
    if annotator.noise == 0:
        return 0.5 if difference == 0 else float(difference > 0)
    return 1.0 / (1.0 + math.exp(min(-difference / annotator.noise, 700.0)))  # below overflow


def annotate(
    name: str,
    prompt: Sequence[Message],
    first: str,
    second: str,
    rng: random.Random,
    annotator: Annotator = Annotator(),
) -> int:
    """The response, 0 or 1, that the task's annotator prefers.

    One ``rng.random()`` decides, so a seed gives the same preferences in every version of Python.

    Raises:
      UserError: as ``judge``.
    """
    probability = probability_of_first(name, prompt, first, second, annotator)
    return 0 if rng.random() < probability else 1


def _evaluate(
    role: str, name: str, prompt: Sequence[Message], responses: Sequence[str], call: Callable[[ModuleType], T]
) -> T:
    """Call the task's judge or annotator. Any error of it names the sample."""
    _check_known(name)
    try:
        return call(_judge_module(name))
    except Exception as error:
        prompt_text = _shorten(" / ".join(message.content for message in prompt))
        response_text = "".join(f", response {_shorten(response)}" for response in responses)
        if isinstance(error, ForeignPromptError):
            raise UserError(
                f"the {role} of task:{name} knows the task's own prompts only, and {prompt_text}{response_text} has "
                f"none of them; give it prompts of the task's files, e.g. {flag('data.path')}=task:{name}"
            ) from error
        raise UserError(
            f"the {role} of task:{name} raised {type(error).__name__}: {error}; prompt {prompt_text}{response_text}"
        ) from error


def _shorten(text: str) -> str:
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
