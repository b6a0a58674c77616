"""HTTP requests to an endpoint: each with a limit of time, none redirected, and errors that say what may pass.

A call may do better again when nothing was said against the question itself: no connection, no answer in time, status
408, 429 or 5xx.
"""

import asyncio
import functools
import ipaddress
import random
import ssl
import time
from collections.abc import Callable, Coroutine, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from anyio.from_thread import start_blocking_portal

from jaxrm.algorithms.endpoint_config import EndpointConfig

if TYPE_CHECKING:
    from jaxrm.inference.chat_calls import Answer

Result = TypeVar("Result")

CHAT = "chat/completions"
LONGEST_RETRY_AFTER = 300.0  # seconds that a server may ask to wait
_LONGEST_WAIT = 60.0  # seconds, of ours
_SHOWN = 200  # characters of a server's words


class CallError(Exception):
    """A question that is not answered; the message is the reason."""


class RetryableError(Exception):
    """A call that may do better again.

    Args:
      reason: as of a `CallError`.
      retry_after: seconds that the server asked for; 0 where it did not.
      answer: the answer that cannot be used; None where there is no text at all.
      status: of the response; None where none came, or where its status is no failure.
    """

    def __init__(
        self, reason: str, retry_after: float = 0.0, answer: "Answer | None" = None, status: int | None = None
    ) -> None:
        super().__init__(reason)
        self.retry_after, self.answer, self.status = retry_after, answer, status


def may_pass(response: httpx2.Response) -> RetryableError:
    """The error of a response whose status says nothing against the question."""
    return RetryableError(status_text(response), retry_after(response), status=response.status_code)


def in_loop_of_its_own(function: Callable[..., Coroutine[Any, Any, Result]], *args: Any) -> Result:
    """Run a coroutine in a thread, since that of a notebook has a loop already; Ctrl-C cancels it."""
    with start_blocking_portal() as portal:
        return portal.call(function, *args)


def open_client(config: EndpointConfig, headers: Mapping[str, str]) -> httpx2.AsyncClient:
    """A client of an endpoint, and of nothing else: no redirect is followed."""
    limits = httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
    return httpx2.AsyncClient(
        base_url=f"{config.url.rstrip('/')}/",
        headers=dict(headers),
        follow_redirects=False,
        timeout=None,  # that of `request` is of the whole call, also where the answer drips
        limits=limits,
        trust_env=not _is_this_machine(config.url),  # proxies are for others
        verify=_certificates(),
    )


@functools.cache  # it takes as long as ten answers to load them
def _certificates() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def request(
    client: httpx2.AsyncClient, method: str, path: str, timeout: float, body: bytes | None = None
) -> httpx2.Response:
    """A response of any status.

    Raises:
      CallError: the address cannot be one.
      RetryableError: there is none.
    """
    try:
        async with asyncio.timeout(timeout):
            return await client.request(method, path, content=body)
    except TimeoutError as error:
        raise RetryableError(f"no answer within {timeout:g} s") from error
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
        raise CallError(_one_line(f"{type(error).__name__}: {error}", client.headers)) from error
    except httpx2.RequestError as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise RetryableError(_one_line(reason, client.headers)) from error


def status_text(response: httpx2.Response) -> str:
    """A status, where it redirects to, and the server's words, in one line."""
    words, location = first_words(response), response.headers.get("location")
    redirect = "" if location is None else f", which redirects to {_one_line(location, response.request.headers)}"
    return f"status {response.status_code}{redirect}{f', {words}' if words else ''}"


def first_words(response: httpx2.Response) -> str:
    """The beginning of what a server said, in one line."""
    return _one_line(response.content.decode("utf-8", "replace"), response.request.headers)


def _one_line(text: str, headers: Mapping[str, str]) -> str:
    """The beginning of a text without the key in ``headers``, which is looked for before the text is cut."""
    key = headers.get("authorization", "").removeprefix("Bearer ")
    text = text.replace(key, "***") if key else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def retry_after(response: httpx2.Response) -> float:
    """Seconds of ``Retry-After``, which may be a date; 0 where there are none."""
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0


def wait_before_retry(first: float, attempt: int) -> float:
    """Seconds before the retry after attempt ``attempt``."""
    longest = min(first * 2.0 ** min(attempt, 30), _LONGEST_WAIT)
    return longest * random.uniform(0.5, 1.0)
