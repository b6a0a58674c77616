"""What a reference policy says of the answers: the KL of those that were sampled, and their perplexity."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm.data import templates
from jaxrm.errors import naming
from jaxrm.inference import weights
from jaxrm.inference.load import load_policy
from jaxrm.inference.policy import Policy
from jaxrm.models.build import ModelSource
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.row_log import RowLog
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stage_config import Compare
from jaxrm.stages.compare.answers import AnswerKey, Answers
from jaxrm.stages.compare.log_probs import identity_of_kl, kl_temperature, log_prob_sums, vocabulary_digest
from jaxrm.stages.compare.prompts import PromptSet

# nll: nats of the response under the reference, tokens: that it has there, kl: log-ratio, or None.
ReferenceRows = Mapping[AnswerKey, Sequence[dict[str, Any]]]


def measure_reference(
    config: Compare, folder: Path, sets: Mapping[str, PromptSet], answers: Answers, *, show_progress: bool
) -> ReferenceRows:
    """Read every answer with the reference; nothing where there is none.

    A KL needs answers that were sampled as token ids of the reference's vocabulary. Where a policy has other ids its
    KL is None. Log-probs of a KL are at the temperature that `jaxrm.stages.compare.log_probs.kl_temperature` says,
    perplexity at 1.
    """
    path = config.compare.reference
    if path is None:
        return {}
    identity = weights.identity_of_source(ModelSource(path=path))
    logs = {}
    for key, rows in answers.items():
        texts = [[[turn.role, turn.content] for turn in prompt] for prompt in sets[key.prompts].prompts]
        decisive = [identity, texts, rows, *identity_of_kl(config, key.decoding)]
        content = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]
        name = f"{key.policy}-{key.run}-{key.prompts}-{key.decoding}-{content}.jsonl"
        logs[key] = RowLog(folder / "reference" / name)
    total, done = sum(map(len, answers.values())), sum(len(log.rows) for log in logs.values())
    if done < total:
        with naming({"path": "config.compare.reference"}):
            reference = load_policy(path, mesh=build_mesh(config.mesh))
        temperature = kl_temperature(config)
        with Progress("reference", total, unit="answers", done=done, enabled=show_progress) as progress:
            for key, log in logs.items():
                prompts = sets[key.prompts].prompts
                for start in range(len(log.rows), len(answers[key]), config.compare.batch_size):
                    block = answers[key][start : start + config.compare.batch_size]
                    here = prompts[start : start + len(block)]
                    log.append(_rows(reference, here, block, config.compare.batch_size, temperature))
                    done += len(block)
                    progress.update(done)
    return {key: log.rows for key, log in logs.items()}


def _rows(
    reference: Policy, prompts: Any, answers: Sequence[dict[str, Any]], rows: int, temperature: float
) -> list[dict[str, Any]]:
    own = [templates.encode_response(reference.tokenizer, answer["response"], reference.template) for answer in answers]
    sums = log_prob_sums(reference, prompts, own, rows)
    kl: list[float | None] = [None] * len(answers)
    drawn = [answer["token_ids"] for answer in answers]
    vocabulary = vocabulary_digest(reference)
    if all(each["log_prob"] is not None and each["vocabulary"] == vocabulary for each in answers):
        under_reference = log_prob_sums(reference, prompts, drawn, rows, temperature=temperature)
        kl = [answer["log_prob"] - other for answer, other in zip(answers, under_reference, strict=True)]
    return [{"nll": -total, "tokens": len(ids), "kl": ratio} for total, ids, ratio in zip(sums, own, kl, strict=True)]
