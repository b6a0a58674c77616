"""A client of an OpenAI-compatible chat endpoint: many questions at once, each paid for once.

    endpoint = ChatEndpoint(EndpointConfig(url="http://localhost:8000/v1", model="judge"))
    endpoint.check()
    (answer,) = endpoint.ask([[{"role": "user", "content": "Is 7 prime? End with yes or no."}]])

Nothing is sent but to the address in the config, and no redirect is followed, so neither the texts nor the key go
elsewhere. The key is read from the environment when the client is made. It is in no config, file or message.

Every answer is on disk before the next question of that place is sent (`jaxrm.inference.answer_cache`): a run that was
killed asks only what is missing, and the same question twice in a batch is asked once. When one question fails for
good, no new one is sent, but answers that are under way are waited for and kept, since they are paid for.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.answer_cache import AnswerCache

_PROBE_SECONDS = 15.0
_SHOWN = 8  # models that a message lists

Question = Sequence[Mapping[str, Any]]


@dataclasses.dataclass
class EndpointCost:
    """What was asked, and what it came to.

    Attributes:
      questions: that were put, the same one in a batch counted once.
      cached: of them, those whose answer was on disk.
      calls: requests that were sent, retries included.
      retries: requests beyond the first of a question.
      malformed: answers that could not be used, each of which is a call.
      unusable: questions that have no answer that can be used, after the retries.
      prompt_tokens: read by the endpoint's model, as it says.
      completion_tokens: written by it.
      unmetered: answers without a count of tokens.
      seconds: that were waited in all.
    """

    questions: int = 0
    cached: int = 0
    calls: int = 0
    retries: int = 0
    malformed: int = 0
    unusable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    seconds: float = 0.0


class ChatEndpoint:
    """Asks questions of an endpoint.

    Args:
      config: of the endpoint.
      section: of the config, for messages.

    Raises:
      UserError: the environment has no key, or none that a header can hold.
    """

    def __init__(self, config: EndpointConfig, section: str = "reward.endpoint") -> None:
        self.config, self._option = config, option(section)  # as it is named where the source is opened
        self._url_flag, self._key_flag = flag(f"{section}.url"), flag(f"{section}.api_key_variable")
        self.cost = EndpointCost()
        self._cache = AnswerCache(config.cache)
        self._key = _read_key(config.api_key_variable, f"{section}.api_key_variable")

    def ask(
        self,
        questions: Sequence[Question],
        *,
        problem: Callable[[str], str | None] = lambda answer: None,
        keep_unusable: bool = False,
        name: Callable[[int], str] = lambda number: f"question {number}",
    ) -> list[str]:
        """Answers to questions, in their order.

        Args:
          questions: messages of a chat each, ``{"role": "user", "content": …}``.
          problem: what is wrong with an answer, to follow "since"; None where nothing is. An answer with a problem is
            retried once, and so is one that is empty or cut off. Answers on disk are read with it too.
          keep_unusable: return an empty text for an answer that cannot be used after its retry, and keep what it says;
            else it is an error.
          name: of the question of a number, for messages.

        Raises:
          UserError: a question that the endpoint refused, or did not answer well in spite of the retries, or whose
            answer cannot be written to the cache; it is named.
          StoppedError: the loop that asks was told to stop.
        """
        started = time.perf_counter()
        bodies = [self._body(question) for question in questions]
        keys = [AnswerCache.key(body) for body in bodies]
        requests = dict(zip(keys, bodies, strict=True))

        def usable(text: str) -> str:
            return text if text.strip() and problem(text) is None else ""

        answers = {key: usable(text) for key in requests if (text := self._cache.get(key)) is not None}
        if not keep_unusable:
            answers = {key: text for key, text in answers.items() if text}
        self.cost.questions += len(requests)
        self.cost.cached += len(answers)
        missing = {key: body for key, body in requests.items() if key not in answers}
        try:
            if missing:
                new, failure = self._send(missing, problem, keep_unusable)
                if failure is not None:
                    raise self._failed(name(keys.index(failure[0])), failure[1])
                answers |= {key: usable(text) for key, text in new.items()}
        finally:
            self.cost.seconds += time.perf_counter() - started
        self.cost.unusable += sum(not answer for answer in answers.values())
        return [answers[key] for key in keys]

    def check(self) -> None:
        """Refuse an endpoint that cannot be asked, at no cost: no question is put, see `jaxrm.inference.chat_probe`.

        A model that it does not list is a warning, since some endpoints take any name or do not list all.

        Raises:
          UserError: it cannot be reached, refuses the key, or answers no chat there; or the cache cannot be written.
        """
        from jaxrm.inference.chat_probe import probe  # here, so that no HTTP client is loaded for runs without a judge

        config = self.config
        self._cache.check(f"{self._option}.cache")
        limited = dataclasses.replace(config, timeout=min(config.timeout, _PROBE_SECONDS))
        probed = probe(limited, self._headers())
        if probed.reason is not None:
            advice = f"start the endpoint, or give another {self._url_flag}"
            if probed.refuses_key:
                advice = f"give the key as export JUDGE_KEY=… and {self._key_flag}=JUDGE_KEY"
            elif not urlsplit(config.url).path.strip("/"):
                advice += f", e.g. {self._url_flag}={config.url.rstrip('/')}/v1"
            raise UserError(f"{self._option}.url is {config.url!r}, {self._redacted(probed.reason)}; {advice}")
        if probed.models and config.model not in probed.models:
            others = ", ".join(map(repr, probed.models[:_SHOWN]))
            print(
                f"warning: {self._option}.model is {config.model!r}, which {config.url} does not list; "
                f"it lists {others}{', …' if len(probed.models) > _SHOWN else ''}"
            )

    def _body(self, question: Question) -> bytes:
        """The request: the same bytes for the same question, so that it has one key."""
        config = self.config
        fields: dict[str, Any] = {"model": config.model, "messages": [dict(message) for message in question]}
        if config.max_tokens is not None:
            fields["max_tokens"] = config.max_tokens
        if config.temperature is not None:
            fields["temperature"] = config.temperature
        return json.dumps(fields | config.extra_fields, sort_keys=True).encode("ascii")

    def _send(
        self, requests: Mapping[str, bytes], problem: Callable[[str], str | None], keep_unusable: bool
    ) -> tuple[dict[str, str], tuple[str, str] | None]:
        """Answers by key, and the key and reason of a failure; every answer is on disk as soon as it comes."""
        from jaxrm.inference.chat_calls import Answer, Calls

        def keep(key: str, answer: Answer) -> None:
            cut = {"cut": answer.cut} if answer.cut else {}
            self._cache.put(key, answer.text, url=self.config.url, request=json.loads(requests[key]), **cut)

        calls = Calls(self.config, self._headers(), self.cost, keep=keep, problem=problem, keep_unusable=keep_unusable)
        return calls.run(requests)

    def _headers(self) -> dict[str, str]:
        authorization = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        return {"Content-Type": "application/json", "Accept": "application/json", **authorization}

    def _failed(self, name: str, reason: str) -> UserError:
        config = self.config
        return UserError(
            f"{self._option}: {config.model} at {config.url} failed on {name}: {self._redacted(reason)}; mend "
            f"that and give the same command again, answers so far are in {config.cache}"
        )

    def _redacted(self, text: str) -> str:
        """The text without the key, which a server may have repeated."""
        return text if self._key is None else text.replace(self._key, "***")


def _read_key(variable: str | None, field: str) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{option(field)} is {variable}, but the environment has no such variable, or it is empty; type "
            f"export {variable}=… or {flag(field)}=None"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{option(field)} is {variable}, whose value is no key; it must be ASCII without white space, e.g. "
            f"export {variable}=sk-…"
        )
    return key
