"""The worlds of a study: embedded tasks, each also with annotators of other biases than its own."""

from jaxrm.study.config import Study

_BIAS = ",bias="
# Tokens of the longest prompt with its template; rows that are no longer cost less.
_PROMPT_TOKENS = {"safety": 19, "summarize": 21, "dialogue": 32}
_TOKENS_OF_A_NOTE = 2


def world_name(task: str, bias: float) -> str:
    """A task whose annotator has so many times its bias; with 1 the name is that of the task."""
    return task if bias == 1 else f"{task}{_BIAS}{bias:g}"


def task_of(world: str) -> str:
    """The embedded task of a world."""
    return world.partition(_BIAS)[0]


def bias_of(world: str) -> float:
    """How many times its own bias the annotator of a world has."""
    bias = world.partition(_BIAS)[2]
    return float(bias) if bias else 1.0


def prompt_tokens(task: str, max_notes: int | None = None) -> int:
    """Tokens of the longest prompt of a task, with its template.

    Args:
      task: embedded task.
      max_notes: most notes of a prompt of ``summarize``; None for 7.
    """
    more = 0 if task != "summarize" or max_notes is None else _TOKENS_OF_A_NOTE * (max_notes - 7)
    return _PROMPT_TOKENS[task] + more


def worlds_of(study: Study) -> list[str]:
    """The worlds of a study, in order.

    Args:
      study: from `jaxrm.study.presets.apply_preset`.
    """
    return [world_name(task, bias) for task in study.worlds or () for bias in study.biases or ()]
