"""Whether an endpoint can be asked, found out without a question."""

import asyncio
import json
from collections.abc import Mapping
from typing import NamedTuple

import httpx2

from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.inference.http_requests import (
    CHAT,
    LONGEST_RETRY_AFTER,
    CallError,
    RetryableError,
    in_loop_of_its_own,
    may_pass,
    open_client,
    request,
    status_text,
    wait_before_retry,
)


class Probed(NamedTuple):
    """What an endpoint said of itself.

    Attributes:
      models: that it lists.
      reason: why it cannot be asked, to follow its address; None where it can.
      refuses_key: whether it wants a key, or another.
    """

    models: tuple[str, ...] = ()
    reason: str | None = None
    refuses_key: bool = False


def probe(config: EndpointConfig, headers: Mapping[str, str]) -> Probed:
    """Whether an endpoint can be asked, without a question, so at no cost.

    ``GET /models`` lists what there is. Not all endpoints have it, and llama.cpp shows it without a key too. So a chat
    without messages is sent as well. An endpoint refuses it, but not as it refuses a key, or a page that is not there.
    """
    return in_loop_of_its_own(_probe, config, headers)


async def _probe(config: EndpointConfig, headers: Mapping[str, str]) -> Probed:
    async with open_client(config, headers) as client:
        for attempt in range(config.retries + 1):
            try:
                return await _probe_once(client, config)
            except CallError as failure:
                return Probed(reason=f"which cannot be reached: {failure}")
            except RetryableError as failure:
                # A server that loads its model says 503; one that is not there will not come by waiting.
                is_starting = failure.status is not None and failure.retry_after <= LONGEST_RETRY_AFTER
                if not is_starting or attempt == config.retries:
                    return Probed(reason=f"which cannot be reached: {failure}")
                await asyncio.sleep(max(failure.retry_after, wait_before_retry(config.retry_seconds, attempt)))
    raise AssertionError("the last attempt returns")


async def _probe_once(client: httpx2.AsyncClient, config: EndpointConfig) -> Probed:
    listed = await request(client, "GET", "models", config.timeout)
    body = json.dumps({"model": config.model, "max_tokens": 1}).encode()
    response = await request(client, "POST", CHAT, config.timeout, body)
    status = response.status_code
    if status in (502, 503, 504):
        raise may_pass(response)
    if status in (401, 403):
        return Probed(reason=f"which refuses the key: {status_text(response)}", refuses_key=True)
    if status in (404, 405, 501) or 300 <= status < 400:
        return Probed(reason=f"where no chat is answered: {status_text(response)}")
    return Probed(models=_models(listed))


def _models(response: httpx2.Response) -> tuple[str, ...]:
    try:
        return tuple(str(model["id"]) for model in json.loads(response.content)["data"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
