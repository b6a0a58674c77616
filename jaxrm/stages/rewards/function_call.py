"""A user's function of text: how it is opened and called, and what it may return. Nothing here needs JAX."""

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from jaxrm.data import tasks
from jaxrm.data.responses import Response
from jaxrm.data.token_spans import Span
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.text_scorer import TextSample

# (prompts, responses) or (prompts, responses, fields) -> a number, or a list of spans, for each response
RewardFunction = Callable[..., Iterable[Any]]
SHOWN = 60  # characters of a response or a value that a message quotes
_FILE = re.compile(r" \(file sha256 [0-9a-f]{12}\)")
_LARGEST = 3.4028234663852886e38  # of float32


class FunctionFault(Exception):  # noqa: N818 - a fault of the user's function, not of this code
    """What a function did that it must not do.

    Attributes:
      problem: to be followed by the response.
      index: of the response among those of the call; None where it is none in particular.
      is_unplaced: whether calls with single responses would say which one is to blame, or that none is.
    """

    def __init__(self, problem: str, index: int | None = None, is_unplaced: bool = False) -> None:
        super().__init__(problem, index, is_unplaced)
        self.problem, self.index, self.is_unplaced = problem, index, is_unplaced


def open_function(name: str) -> RewardFunction:
    """The function that ``config.reward.function`` names.

    Raises:
      UserError: where there is no such module or function, or it takes other arguments.
    """
    if name.startswith(tasks.PREFIX):
        return _judge_of(name.removeprefix(tasks.PREFIX))
    module_name, _, function_name = name.partition(":")
    form = f"required package.module:function, e.g. {flag('reward.function')}=my_rewards:score, or task:safety"
    if not module_name or module_name.startswith(".") or not function_name:
        raise UserError(f"{option('reward.function')} is {name!r}; {form}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{option('reward.function')} is {name!r}, but importing {module_name} raised {type(error).__name__}: "
            f"{error}; {form}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f"{option('reward.function')} is {name!r}, but {module_name} has no function {function_name!r}; {form}"
        )
    if not _takes_texts(function):
        raise UserError(
            f"{option('reward.function')} is {name!r}, which takes {inspect.signature(function)}; required "
            f"def {function_name}(prompts, responses), or def {function_name}(prompts, responses, fields), where a "
            f"record's columns are those of fields[i], a dict"
        )
    return function


def identity_of_function(name: str) -> str:
    """Which function exactly: its name and a hash of its file, but not of what that imports.

    Args:
      name: as `open_function` takes it. The judge of an embedded task, and what no file defines, is its name alone.

    Raises:
      UserError: as `open_function`.
    """
    digest = None if name.startswith(tasks.PREFIX) else source_digest(open_function(name))
    return name if digest is None else f"{name} (file sha256 {digest[:12]})"


def without_files(identities: str) -> str:
    """A text with identities of functions, without the hashes of their files."""
    return _FILE.sub("", identities)


def source_digest(function: RewardFunction) -> str | None:
    """Hash of the file that defines a function, so that what an edited one says is not taken for its own."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # not written in Python
        return None
    return None if file is None or not Path(file).is_file() else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def takes_fields(function: RewardFunction) -> bool:
    """Whether it has a third argument ``fields``, for the columns of the prompts' records."""
    by_place = [p for p in _parameters(function) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(by_place) > 2 and by_place[2].name == "fields" and _can_be_called_with(function, 3)


def _takes_texts(function: RewardFunction) -> bool:
    """Whether it can be called, and expects no columns in arguments that it would not get."""
    if takes_fields(function):
        return True
    expects_more = any(p.kind == p.VAR_KEYWORD or p.name == "fields" for p in _parameters(function))
    return not expects_more and _can_be_called_with(function, 2)


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # one that does not say what it takes
        return []


def call(
    function: RewardFunction, samples: Sequence[TextSample], *, is_spans: bool, finds_failure: bool = True
) -> list[Any]:
    """What the function returns for each sample: a number, or a list of `Span` where ``is_spans``.

    Where it raises, ``finds_failure`` calls it with one sample at a time, to name the one that it cannot take.

    Raises:
      FunctionFault: it raises, or returns anything else.
    """
    arguments = _arguments(function, samples)
    try:
        returned = function(*arguments)
        is_list = isinstance(returned, Iterable) and not isinstance(returned, Mapping | Set | str | bytes)
        results = list(returned) if is_list else None
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        at = _first_failure(function, samples) if finds_failure or len(samples) == 1 else None
        place = "on the whole batch" if at is None else "on"
        raise FunctionFault(f"raised {type(error).__name__}: {error}, {place}", at, not finds_failure) from error
    if results is None:
        raise FunctionFault(f"returned {_shown(returned)} for {len(samples)} responses")
    if len(results) != len(samples):
        raise FunctionFault(f"returned {len(results)} rewards for {len(samples)} responses")
    if is_spans:
        return [_spans(result, samples[i].response, i) for i, result in enumerate(results)]
    for i, number in enumerate(results):
        if not _is_finite(number):
            raise FunctionFault(f"returned {_shown(number)} for", i)
    return [float(number) for number in results]


def _judge_of(task: str) -> RewardFunction:
    if task not in tasks.TASKS:
        known = ", ".join(tasks.PREFIX + known for known in tasks.TASKS)
        raise UserError(
            f"{option('reward.function')} is {tasks.PREFIX + task!r}; embedded tasks with a judge are {known}"
        )
    return lambda prompts, responses: [
        tasks.judge(task, prompt, response) for prompt, response in zip(prompts, responses, strict=True)
    ]


def _can_be_called_with(function: RewardFunction, count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except ValueError:  # it does not say what it takes
        return True
    except TypeError:
        return False
    return True


def _arguments(function: RewardFunction, samples: Sequence[TextSample]) -> tuple[list[Any], ...]:
    arguments = [sample.prompt for sample in samples], [sample.response for sample in samples]
    return (*arguments, [dict(sample.fields) for sample in samples]) if takes_fields(function) else arguments


def _first_failure(function: RewardFunction, samples: Sequence[TextSample]) -> int | None:
    """Index of the first response that the function cannot take alone; None where it takes each."""
    if len(samples) == 1:
        return 0
    for i, sample in enumerate(samples):
        try:
            function(*_arguments(function, [sample]))
        except (Exception, SystemExit):  # the same one again
            return i
    return None


def _spans(result: Any, response: Response, index: int) -> list[Span]:
    if not isinstance(result, Iterable) or isinstance(result, str | Mapping):
        raise FunctionFault(f"returned {_shown(result)} for", index)
    spans: list[Span] = []
    for span in result:
        try:
            start, end, number = span
        except (TypeError, ValueError) as error:
            raise FunctionFault(f"returned the span {_shown(span)} for", index) from error
        is_place = all(hasattr(place, "__index__") and not isinstance(place, bool) for place in (start, end))
        if not is_place or not _is_within(int(start), int(end), len(response)) or not _is_finite(number):
            what = f"returned the span {_shown(span)} for a response of {len(response)} characters,"
            raise FunctionFault(what, index)
        spans.append((int(start), int(end), float(number)))
    return spans


def _is_within(start: int, end: int, length: int) -> bool:
    return 0 <= start < end <= length or start == end == length


def _is_finite(number: Any) -> bool:
    """Whether it is a number, of Python or an array of no axes, that float32 can hold."""
    if getattr(number, "ndim", 0):
        return False
    try:
        return abs(float(number + 0)) <= _LARGEST  # what is text cannot be added to
    except (TypeError, ValueError, OverflowError):
        return False


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:SHOWN]
