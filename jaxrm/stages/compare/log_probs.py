"""Log-probs of answers under a policy or the reference, which a KL and a perplexity follow from."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrm.data import templates
from jaxrm.data.records import Message
from jaxrm.inference.policy import Policy
from jaxrm.inference.response_batches import response_batches
from jaxrm.inference.token_scores import policy_log_probs
from jaxrm.stage_config import Compare


def kl_temperature(config: Compare) -> float:
    """The temperature of the log-probs of a KL: that of sampling, for a policy and the reference alike.

    Those are of the whole softmax at it, as of PPO and evaluations, also where top-k or top-p leaves tokens out. Then
    the mean over answers is not the KL of the full policy. Answers at temperature 0 are read at 1.
    """
    return config.compare.sampling.temperature or 1.0


def identity_of_kl(config: Compare, decoding: str) -> list[Any]:
    """What a kept log-prob's identity has beside the sampling: other than 1, temperatures once were not applied."""
    return ["tempered"] if decoding == "sampled" and kl_temperature(config) != 1.0 else []


def log_prob_sums(
    policy: Policy,
    prompts: Sequence[Sequence[Message]],
    ids: Sequence[Sequence[int]],
    rows: int,
    *,
    temperature: float = 1.0,
) -> list[float]:
    """Log-prob of each response, given as ids, under a policy at a temperature, in nats."""
    encoded = [
        np.array(templates.encode_prompt(policy.tokenizer, prompt, policy.template), np.int32) for prompt in prompts
    ]
    responses = [np.array(each, np.int32) for each in ids]
    read = _readers(policy)(temperature)
    sums = [0.0] * len(ids)
    for batch, indices in response_batches(encoded, responses, rows, policy.model.mesh):
        log_probs = np.asarray(read(batch))
        for row, i in enumerate(indices):
            sums[i] = float(log_probs[row, : len(responses[i])].sum())
    return sums


@functools.lru_cache(maxsize=1)  # of one policy, so that the memory of others is free
def _readers(policy: Policy) -> Callable[[float], Any]:
    """``temperature -> reader`` of a policy's log-probs, each made once."""

    @functools.cache
    def reader(temperature: float) -> Any:
        return policy_log_probs(policy.model, policy.params, policy.model.mesh, whole=True, temperature=temperature)

    return reader


def vocabulary_digest(policy: Policy) -> str:
    """What a policy's token ids mean, so that ids of one policy are read by another only where they mean the same."""
    return hashlib.sha256(json.dumps(policy.tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:16]


def free_memory() -> None:
    """Forget the programs of the models that are done with."""
    _readers.cache_clear()
    jax.clear_caches()
