"""Chat templates are programs from the net: this runs them as ``transformers`` does, within bounds.

``transformers`` keeps a template away from Python's internals. It bounds neither its time nor its memory, and it tells
it the day. Here a template is stopped after so many steps or characters, with an error. It gets one fixed day, so that
the same dialogue has the same tokens tomorrow. And it may not draw at random.
"""

import operator
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, Undefined, nodes, pass_context
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

DATE = datetime(2024, 7, 26)  # the day that the templates of Llama 3.1 to 3.3 fall back to
_MAX_SOURCE = 500_000  # characters of a template; published ones have up to 20,000
_MAX_STEPS = 500_000  # rounds of loops, calls and filters in one rendering
_CALL = 5  # steps; a call of a macro takes about as long
_MAX_ITEMS = 100_000  # of lists within lists
_MAX_TEXT = 20_000_000  # characters of a text that a template makes
_MAX_RANGE = 10_000
_MAX_NUMBER = 1_000_000  # as an argument, such as a width
_MAX_BITS = 10_000  # of a whole number that is computed
_MAX_WORK = 1_000_000_000  # what a method of text can make of its arguments, at the worst
_WIDE = re.compile(r"\d{7,}|%[^a-zA-Z%]*\*")  # a width in a format that would fill the memory
_ROUND = "round of a loop"  # a filter that no template can name
_QUICK = ("length", "count", "first", "last", "default", "d")  # filters that do not read all of their input
_RANDOM = ("random", "lipsum")


class TemplateLimitError(ValueError):
    """A template that asks for too much, or for something else every time."""


class _Counts(threading.local):
    steps = 0
    written = 0


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of ``transformers``, where every loop, call, filter and sum of texts is counted."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, extensions: Sequence[type[Extension]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.write)
        self.counts = _Counts()
        self.filters = {
            name: function if name in _QUICK else self._counted(function) for name, function in self.filters.items()
        }
        self.filters[_ROUND] = pass_context(lambda _, written: self.step(1, written))

    def reset(self) -> None:
        """Begin to count anew."""
        self.counts.steps = self.counts.written = 0

    def step(self, count: int = 1, written: int = 0) -> str:
        """Count steps, and characters that the body of a loop writes as they stand."""
        self.counts.steps += count
        if self.counts.steps > _MAX_STEPS:
            raise TemplateLimitError(f"it takes more than {_MAX_STEPS:,} steps")
        self._count_text(written)
        return ""

    def write(self, value: Any) -> Any:
        """Count what an expression writes; what is neither text nor data has an address, another one every time."""
        if isinstance(value, str):
            self._count_text(len(value))
        elif isinstance(value, list | tuple | dict):
            self.step(_elements(value))
        elif not isinstance(value, int | float | Undefined | None):
            raise TemplateLimitError(f"it writes a {type(value).__name__}, which is no text")
        return value

    def concatenate(self, *values: Any) -> str:
        """Jinja's ``~``."""
        texts = [str(self.write(value)) for value in values]
        return self._checked_text("".join(texts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's ``+``, ``*``, ``**`` and ``%``, unless the result would be too large."""
        if operator == "+" and type(left) is str and type(right) is str:  # what templates do most
            _check_text(len(left) + len(right))
            return left + right
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        if operator == "*":
            _check_product(left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_text(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, after a look at the arguments."""
        self.step(_CALL)
        method = getattr(function, "__wrapped__", function)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str) and getattr(method, "__name__", "") in ("format", "format_map"):
            _check_format(owner)
        _check_arguments((owner, *args, *kwargs.values()) if isinstance(owner, str) else (*args, *kwargs.values()))
        return super().call(context, function, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        names = [node.name for node in tree.find_all(nodes.Filter)] + [node.name for node in tree.find_all(nodes.Name)]
        for name_used in names:
            if name_used in _RANDOM:
                raise TemplateLimitError(f"it uses {name_used!r}, which is something else every time")
        for loop in tree.find_all(nodes.For):
            written = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
            # As a filter, since a call goes a long way in the sandbox.
            step = nodes.Filter(nodes.Const(written), _ROUND, [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(step))
            loop.test = loop.test and nodes.Or(step, loop.test)  # a step is "", so the test decides
        _replace_concatenations(tree)
        tree.set_environment(self)
        return tree

    def _count_text(self, length: int) -> None:
        self.counts.written += length
        _check_text(self.counts.written)

    def _checked_text(self, text: str) -> str:
        _check_text(len(text))
        return text

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose input is counted and whose arguments are looked at."""
        is_passed = int(getattr(function, "jinja_pass_arg", None) is not None)

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            values = (*args[is_passed:], *kwargs.values())
            self.step(1 + sum(_elements(value) for value in values))
            _check_arguments(values)
            if function.__name__ == "do_format":
                _check_format(str(values[0]))
            return function(*args, **kwargs)

        return counted


def render(source: str, variables: Mapping[str, Any]) -> str:
    """What a template writes.

    Args:
      source: the template, in Jinja.
      variables: what it can read.

    Raises:
      Exception: whatever the template raises; `TemplateLimitError` where it asks for too much.
    """
    template = _compile(source)
    environment = template.environment
    assert isinstance(environment, _BoundedEnvironment)
    environment.reset()
    return template.render(**variables)


@lru_cache(maxsize=32)
def _compile(source: str) -> Template:
    if len(source) > _MAX_SOURCE:
        raise TemplateLimitError(f"it has {len(source):,} characters, more than {_MAX_SOURCE:,}")
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> _BoundedEnvironment:
    from transformers.utils import chat_template_utils

    theirs = chat_template_utils._compile_jinja_template("").environment
    environment = _BoundedEnvironment([type(extension) for extension in theirs.extensions.values()])
    environment.filters["tojson"] = environment._counted(theirs.filters["tojson"])
    environment.globals.update({name: theirs.globals[name] for name in ("raise_exception", "dict", "namespace")})
    environment.globals.update({"strftime_now": DATE.strftime, "range": _short_range})
    return environment


def _short_range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > _MAX_RANGE:
        raise TemplateLimitError(f"it counts to more than {_MAX_RANGE:,}")
    return numbers


def _replace_concatenations(node: nodes.Node) -> None:
    """``a ~ b`` as a call of the environment, since Jinja has no hook for it."""
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Concat):
            setattr(node, field, _concatenation(value))
        elif isinstance(value, list):
            setattr(node, field, [_concatenation(item) if isinstance(item, nodes.Concat) else item for item in value])
    for child in node.iter_child_nodes():
        _replace_concatenations(child)


def _concatenation(node: nodes.Concat) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("concatenate"), node.nodes, [], None, None)


def _elements(value: Any, most: int = _MAX_ITEMS) -> int:
    """Items of data within data, which may hold the same list many times over."""
    if not isinstance(value, list | tuple | dict | range):
        return 0
    count = len(value)
    for item in () if isinstance(value, range) else value.values() if isinstance(value, dict) else value:
        if count > most:
            raise TemplateLimitError(f"it makes more than {_MAX_ITEMS:,} items")
        count += _elements(item, most - count)
    return count


def _check_arguments(values: Sequence[Any]) -> None:
    work = 1
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise TemplateLimitError(f"it gives a number above {_MAX_NUMBER:,} to a function")
        work *= len(value) + 1 if isinstance(value, str | list | tuple) else 1
    if work > _MAX_WORK:
        raise TemplateLimitError(f"it makes a text of more than {_MAX_TEXT:,} characters")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            _check_text(operator.mul(len(one), max(other, 0)))


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise TemplateLimitError(f"it computes a number of more than {_MAX_BITS:,} bits")


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise TemplateLimitError("it formats text to a width that is too large")


def _check_text(length: int) -> None:
    if length > _MAX_TEXT:
        raise TemplateLimitError(f"it makes a text of more than {_MAX_TEXT:,} characters")
