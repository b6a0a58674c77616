"""The calls of `jaxrm.inference.chat_endpoint`: concurrent, each with a limit of time, retried where that may help.

A call may be retried when nothing was said against the question itself: no connection, no answer in time, status 408,
429 or 5xx, or an answer that cannot be read; one with text is retried once. Status 3xx and 4xx are final. A wait
doubles from ``EndpointConfig.retry_seconds`` to a minute, with chance in it, so that calls which failed together do not
come back together. ``Retry-After`` holds up all calls, for five minutes at most.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2

from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.inference.http_requests import (
    CHAT,
    LONGEST_RETRY_AFTER,
    CallError,
    RetryableError,
    first_words,
    in_loop_of_its_own,
    may_pass,
    open_client,
    request,
    status_text,
    wait_before_retry,
)
from jaxrm.runtime.preemption import StoppedError, stop_requested

if TYPE_CHECKING:
    from jaxrm.inference.chat_endpoint import EndpointCost

_MALFORMED_RETRIES = 1  # of an answer that came whole, since a judge at temperature 0 says the same again
_WATCH_SECONDS = 0.2
_USAGE = ("prompt_tokens", "completion_tokens")


class Answer(NamedTuple):
    """An answer to a question.

    Attributes:
      text: of the answer, whatever it says; empty where it was cut off.
      cut: the text of an answer that was cut off, for whoever looks for the reason.
    """

    text: str
    cut: str = ""


class _GivenUpError(Exception):
    """A question that is not asked again, since another one failed or the run is to stop."""


class Calls:
    """The calls of one batch of questions.

    Args:
      config: of the endpoint.
      headers: of every request.
      cost: is added to.
      keep: is given the key of every answer and the answer, once.
      problem: what is wrong with an answer; None where nothing is.
      keep_unusable: whether an answer that cannot be used is one after its retry.
    """

    def __init__(
        self,
        config: EndpointConfig,
        headers: Mapping[str, str],
        cost: "EndpointCost",
        *,
        keep: Callable[[str, Answer], None],
        problem: Callable[[str], str | None],
        keep_unusable: bool,
    ) -> None:
        self._config, self._headers, self._cost = config, headers, cost
        self._keep, self._problem, self._keep_unusable = keep, problem, keep_unusable
        self._answers: dict[str, str] = {}
        self._failure: tuple[str, str] | None = None
        self._is_stopping = False
        self._paused_until = 0.0  # of `time.monotonic`

    def run(self, requests: Mapping[str, bytes]) -> tuple[dict[str, str], tuple[str, str] | None]:
        """Texts of answers by the keys of ``requests``, and the key and reason of the first failure.

        After a failure no new call is made, but those under way are waited for.

        Raises:
          StoppedError: the run was asked to stop, and nothing failed. Calls under way are waited for too.
        """
        in_loop_of_its_own(self._run, requests)
        if self._is_stopping and self._failure is None:
            raise StoppedError
        return self._answers, self._failure

    async def _run(self, requests: Mapping[str, bytes]) -> None:
        self._stopped = asyncio.Event()
        waiting = iter(requests.items())
        number = min(self._config.concurrency, len(requests))
        async with open_client(self._config, self._headers) as client:
            watching = asyncio.create_task(self._watch())
            try:
                await asyncio.gather(*(self._work(client, waiting) for _ in range(number)))
            finally:
                watching.cancel()

    async def _watch(self) -> None:
        """Make no new call once the run is asked to stop."""
        while not stop_requested():
            await asyncio.sleep(_WATCH_SECONDS)
        self._is_stopping = True
        self._stopped.set()

    async def _work(self, client: httpx2.AsyncClient, waiting: Iterator[tuple[str, bytes]]) -> None:
        for key, body in waiting:
            if self._stopped.is_set():
                return
            try:
                answer = await self._answer(client, body)
            except CallError as failure:
                self._failure = self._failure or (key, str(failure))
                self._stopped.set()
                return
            except _GivenUpError:
                return
            self._answers[key] = answer.text
            try:
                self._keep(key, answer)
            except OSError as error:  # the others are waited for, since they may be kept
                self._failure = self._failure or (key, f"its answer cannot be written to the cache, {error}")
                self._stopped.set()
                return

    async def _answer(self, client: httpx2.AsyncClient, body: bytes) -> Answer:
        """The answer to one question, in as many calls as it takes.

        Raises:
          CallError: there is none.
          _GivenUpError: no further call is to be made.
        """
        retries, malformed = self._config.retries, 0
        for attempt in range(retries + 1):
            while (pause := self._paused_until - time.monotonic()) > 0:
                await self._sleep(pause)
            self._cost.retries += attempt > 0
            try:
                return await self._call(client, body)
            except RetryableError as failure:
                if failure.retry_after > LONGEST_RETRY_AFTER:
                    raise CallError(f"{failure}, and asks to wait {failure.retry_after:,.0f} s") from None
                malformed += failure.answer is not None
                if attempt == retries or malformed > _MALFORMED_RETRIES:
                    if failure.answer is not None and self._keep_unusable:
                        return failure.answer
                    raise CallError(f"{failure}{f', in the last of {attempt + 1} calls' if attempt else ''}") from None
                self._paused_until = max(self._paused_until, time.monotonic() + failure.retry_after)
                await self._sleep(wait_before_retry(self._config.retry_seconds, attempt))
        raise AssertionError("the last attempt returns or raises")

    async def _sleep(self, seconds: float) -> None:
        """Wait, unless no further call is to be made.

        Raises:
          _GivenUpError: none is.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
        if self._stopped.is_set():
            raise _GivenUpError

    async def _call(self, client: httpx2.AsyncClient, body: bytes) -> Answer:
        """One call.

        Raises:
          CallError: another call would fail alike.
          RetryableError: another one may not.
        """
        self._cost.calls += 1
        response = await request(client, "POST", CHAT, self._config.timeout, body)
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise may_pass(response)
        if status >= 300:
            raise CallError(status_text(response))
        try:
            answer = self._read(response)
            if (reason := self._problem(answer)) is not None:
                raise RetryableError(reason, answer=Answer(answer))
        except RetryableError as failure:
            self._cost.malformed += 1
            raise RetryableError(f"the answer cannot be used, since {failure}", answer=failure.answer) from None
        return Answer(answer)

    def _read(self, response: httpx2.Response) -> str:
        """The text of an answer; its tokens are counted also where it is not one.

        Raises:
          RetryableError: it is not one.
        """
        try:
            fields = json.loads(response.content)
        except (ValueError, RecursionError):
            raise RetryableError(f"it is no JSON but {first_words(response)!r}") from None
        self._count_tokens(fields)
        try:
            choice = fields["choices"][0]
            text, is_cut = choice["message"]["content"] or "", choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise RetryableError(f"it has no choices[0].message.content but is {first_words(response)}") from None
        if not isinstance(text, str):
            raise RetryableError(f"its content is no text but {first_words(response)}")
        if is_cut:  # what looks like "Score: 1" may be the beginning of 10
            limit = self._config.max_tokens
            at = "at the endpoint's limit" if limit is None else f"at max_tokens, {limit}"
            raise RetryableError(f"it was cut off {at}", answer=Answer("", cut=text))
        if not text.strip():
            raise RetryableError("it is empty", answer=Answer(""))
        return text

    def _count_tokens(self, fields: Any) -> None:
        usage = fields.get("usage") if isinstance(fields, dict) else None
        prompt, completion = (usage.get(name) if isinstance(usage, dict) else None for name in _USAGE)
        if type(prompt) is int and type(completion) is int and min(prompt, completion) >= 0:
            self._cost.prompt_tokens += prompt
            self._cost.completion_tokens += completion
        else:
            self._cost.unmetered += 1
