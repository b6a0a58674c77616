"""The `endpoint` section of a config: a judge behind an OpenAI-compatible chat endpoint, and how its answer is read."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jaxrm.config.fields import Bound, above, at_least, at_most, bounded, check, finite, place, typed, wrong
from jaxrm.errors import UserError

RESUMABLE_ENDPOINT_FIELDS = ("url", "concurrency", "timeout", "retries", "retry_seconds", "api_key_variable", "cache")
"""What may change between two launches of one run: nothing here decides an answer."""
_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*")
_VARIABLE = Bound(
    lambda name: re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) is not None,
    "the name of an environment variable in capitals",
    "JUDGE_KEY",
)
_SECRET_NAME = re.compile(
    "^key$|^token$|(api|access|private|auth)key$|(api|access|auth|bearer)token$|secret|authorization|password|credential"
)
_SECRET_TEXT = re.compile("sk-|hf_|bearer ", re.IGNORECASE)  # how keys of OpenAI and the hub, and headers, begin
_SET_ELSEWHERE = ("model", "messages", "max_tokens", "temperature")
_ONE_ANSWER = ("n", "stream")  # what would give another form of answer than the one that is read
_BASE = "an address that /chat/completions follows, without user, password or query"
_EXAMPLE_URL = "http://localhost:8000/v1"
_EXAMPLE_EXTRA = '{"top_p": 1}'


@dataclass(frozen=True)
class EndpointConfig:
    """A judge behind an endpoint that speaks OpenAI's chat completions, as vLLM, llama.cpp, TGI and hosts do.

    Nothing is called unless ``url`` names it. The fields and defaults are jaxrm choices.

    Attributes:
      url: what ``/chat/completions`` follows, ``http://localhost:8000/v1``.
      model: its name there; ``GET /models`` lists them.
      rubric: a text file with ``{response}``, and where wanted ``{prompt}``, ``{reference}`` and ``{scale}``, see
        `jaxrm.inference.rubric`; None for ``jaxrm/inference/rubric.txt``.
      answer: the scale: a range ``1..10``, or labels and what each counts as, ``good=1,fair=0.5,bad=0``.
      reference: the column of a record that ``{reference}`` stands for.
      unreadable: what an answer counts as that says nothing on this scale, after the retries; None for an error that
        ends the run, which may be continued.
      max_tokens: most tokens of an answer; None to send no limit.
      temperature: of the judge; None to send none.
      extra: more fields of each request as a JSON object, ``{"chat_template_kwargs": {"enable_thinking": false}}``.
      concurrency: calls at the same time.
      timeout: seconds for a call, from the question to the whole answer.
      retries: further calls after one that failed in a way that may pass: status 408, 429 or 5xx, no connection, or no
        answer in time. One whose text cannot be used is asked for once more at most.
      retry_seconds: to wait before the first retry; it doubles up to a minute. ``Retry-After`` is obeyed.
      api_key_variable: the environment variable that holds the key, not the key itself; None to send none.
      cache: a folder in which every answer stays, so that no question is paid for twice. An answer belongs to its
        request, not to the address: another model of the same name needs another folder.
    """

    url: str
    model: str
    rubric: str | None = None
    answer: str = "1..10"
    reference: str = "reference"
    unreadable: float | None = bounded(None, finite, meaning="an error")
    max_tokens: int | None = bounded(512, at_least(1), meaning="no limit")
    temperature: float | None = bounded(0.0, at_least(0), at_most(2), meaning="that of the endpoint")
    extra: str = "{}"
    concurrency: int = bounded(16, at_least(1))
    timeout: float = bounded(120.0, above(0), finite)
    retries: int = bounded(6, at_least(0))
    retry_seconds: float = bounded(1.0, at_least(0), finite)
    api_key_variable: str | None = None
    cache: str = "~/.cache/jaxrm/endpoint"

    def __post_init__(self) -> None:
        check(self)
        _check_url(self)
        if not self.model.strip():
            raise wrong(self, "model", "the model's name at the endpoint", "my-judge")
        if self.api_key_variable is not None and not _VARIABLE.holds(self.api_key_variable):
            # Its value is not shown, since it is the key itself where somebody gave that.
            example = typed(self, "api_key_variable", _VARIABLE.example)
            raise UserError(
                f"{place(self, 'api_key_variable')} must be {_VARIABLE.required} that holds the key, not the key "
                f"itself, e.g. {example}"
            )
        if not isinstance(extra := _json(self.extra), dict):  # it is not shown, since it may hold a key
            raise UserError(
                f"{place(self, 'extra')} must be a JSON object, e.g. {typed(self, 'extra', _EXAMPLE_EXTRA)}"
            )
        if (name := _secret_name(extra)) is not None:
            raise UserError(
                f"{place(self, 'extra')} must be without keys, but has one in {name!r}, which would be written into "
                f"files; e.g. export JUDGE_KEY=… and {typed(self, 'api_key_variable', _VARIABLE.example)}"
            )
        refused = [name for name in extra if name in (*_SET_ELSEWHERE, *_ONE_ANSWER)]
        if refused:
            others = (
                "fields of the config" if refused[0] in _SET_ELSEWHERE else "one whole answer, which is what is read"
            )
            raise wrong(self, "extra", f"without {refused[0]!r}, for {others}", _EXAMPLE_EXTRA)
        if (problem := _answer_problem(self.answer)) is not None:
            raise wrong(self, "answer", problem, "1..10")

    @property
    def range(self) -> tuple[float, float] | None:
        """Least and largest number of an answer; None where it is a label."""
        match = _RANGE.fullmatch(self.answer)
        return None if match is None else (float(match[1]), float(match[2]))

    @property
    def labels(self) -> dict[str, float]:
        """Labels of an answer and what each counts as; empty where it is a number."""
        return {} if self.range is not None else dict(_labels(self.answer))

    @property
    def extra_fields(self) -> dict[str, Any]:
        """Further fields of a request."""
        return _json(self.extra)


def _secret_name(fields: Mapping[str, Any]) -> str | None:
    """The first field, at any depth, whose text is a key by its name or form; None where there is none."""
    for name, text in _texts(fields, ""):
        if _SECRET_NAME.search(re.sub("[^a-z]", "", name.lower())) or _SECRET_TEXT.match(text):
            return name
    return None


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every text at any depth and its name; headers may be ``{"name": …, "value": …}`` or ``[name, value]`` too."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        if isinstance(value.get("name"), str) and isinstance(value.get("value"), str):
            yield value["name"], value["value"]
        for inner_name, inner in value.items():
            yield from _texts(inner, inner_name)
    elif isinstance(value, list):
        if len(value) == 2 and all(isinstance(item, str) for item in value):
            yield value[0], value[1]
        for item in value:
            yield from _texts(item, name)


def _check_url(section: EndpointConfig) -> None:
    try:
        parts = urlsplit(section.url)
        is_base = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise wrong(section, "url", _BASE, _EXAMPLE_URL) from None
    if "@" in section.url or parts.query or parts.fragment:  # which may hold a key, so it is not shown
        raise UserError(f"{place(section, 'url')} must be {_BASE}, e.g. {typed(section, 'url', _EXAMPLE_URL)}")
    if not is_base or re.search(r"\s", section.url):
        raise wrong(section, "url", _BASE, _EXAMPLE_URL)
    if parts.path.rstrip("/").endswith("/chat/completions"):
        base = section.url.rstrip("/").removesuffix("/chat/completions")
        raise wrong(section, "url", _BASE, base)


def _answer_problem(answer: str) -> str | None:
    """What is required of the scale; None where it is good."""
    match = _RANGE.fullmatch(answer)
    if match is not None:
        return None if float(match[1]) < float(match[2]) else "a range whose first number is the smaller one"
    labels = _labels(answer)
    if not labels or not all(name and math.isfinite(value) for name, value in labels):
        return "a range or labels with finite numbers, like good=1,fair=0.5,bad=0"
    if len({name.casefold() for name, _ in labels}) < len(labels):
        return "labels that differ in more than capitals"
    if len({value for _, value in labels}) < 2:
        return "labels of which at least two have different numbers"
    return None


def _labels(answer: str) -> list[tuple[str, float]]:
    """Labels and their numbers in the order of the text; NaN where there is no number."""
    pairs = [part.rpartition("=") for part in answer.split(",")]
    return [(" ".join(name.split()), _number(value)) for name, _, value in pairs]


def _number(text: str) -> float:
    return float(text) if re.fullmatch(_NUMBER, text.strip()) else math.nan


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: json.loads(""))  # NaN and infinities are no JSON
    except (ValueError, RecursionError):
        return None
