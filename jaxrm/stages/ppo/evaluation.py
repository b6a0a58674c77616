"""Evaluation of a policy in training on held-out prompts: metrics, and samples to read."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms.ppo import Programs
from jaxrm.algorithms.ppo_state import PPOState
from jaxrm.algorithms.reward_config import source_fields, weights_of
from jaxrm.algorithms.rollout import TokenLogProbs
from jaxrm.algorithms.summed_rewards import metrics_of_sums
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample, transcript
from jaxrm.data.responses import response_text
from jaxrm.data.tokenizer import token_texts
from jaxrm.models.sampling import prompt_keys
from jaxrm.runtime.metrics import append_row, read_rows
from jaxrm.runtime.preemption import StoppedError, StopRequest
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stages.inputs.prompts import PlacedPrompts
from jaxrm.stages.ppo.learner import Learner
from jaxrm.stages.stage import judge_of
from jaxrm.types import ResponseBatch, TokenRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicyEvaluation:
    """Samples responses to held-out prompts from a policy, and measures them.

    Attributes:
      learner: networks, devices and config.
      programs: of the run, with a sampler for ``config.evaluation.sampling``.
      base: under the adapters of all models; ``{}`` where they have none.
      reference_params: of the frozen SFT policy; its adapters alone where there is a base.
      prompts: the held-out prompts.
      batches: the same on the devices.
      key: of the sampling, the same at every evaluation.
      tokenizer: of the policy.
      folder: the run; its ``samples.jsonl`` gets some of the responses.
    """

    learner: Learner
    programs: Programs
    base: Any
    reference_params: Any
    prompts: Sequence[PromptExample]
    batches: Sequence[PlacedPrompts]
    key: jax.Array
    tokenizer: "PreTrainedTokenizerBase"
    folder: RunFolder

    def __call__(self, step: int, state: PPOState, stop: StopRequest) -> dict[str, float] | None:
        """Metrics of the policy after ``step`` steps; its samples are added to the run's ``samples.jsonl``.

        Returns:
          ``eval_reward`` (sum over a response, calibrated as before the first step), where there is a judge
          ``eval_judge`` and the metrics that `jaxrm.data.tasks.BEHAVIORS` has for its task (``eval_refusals``, ...;
          each over the prompts that it applies to), ``eval_kl`` (nats a response: log-ratio to the reference at the
          rollout's temperature, an estimate of the KL where these responses are sampled at it too), ``eval_length``
          (tokens), ``eval_ended`` (share with an end token); of several sources of rewards also ``eval_reward/NAME``
          and what else `jaxrm.algorithms.summed_rewards.metrics_of_sums` says of each. None where it was asked to stop
          before it was done; it has written nothing then.
        """
        try:
            responses = self._sample(state, stop)
        except StoppedError:
            return None
        ids = zip(responses.tokens, responses.mask, strict=True)
        texts = [response_text(self.tokenizer, self.learner.end_ids, tokens[mask]) for tokens, mask in ids]
        metrics, scores = self._measure(responses, texts)
        if self.folder.is_writer:
            self._write_samples(step, responses, texts, scores)
        return metrics

    def _sample(self, state: PPOState, stop: StopRequest) -> "_Responses":
        """One response to each prompt, with log-probs and rewards.

        Raises:
          StoppedError: where it was asked to stop.
        """
        replicate = _replicate(self.learner.mesh)
        decoder_params = self.learner.decoder_params(self.base, state.policy.params)
        critic_params = None if state.critic is None else state.critic.params
        batches: list[tuple[ResponseBatch, TokenLogProbs, TokenRewards]] = []
        for number, prompts in enumerate(stop.checked(self.batches)):
            keys = prompt_keys(self.key, number * len(prompts.tokens), len(prompts.tokens))
            batch = self.programs.rollout(decoder_params, prompts.tokens, prompts.mask, keys).responses
            token_log_probs = self.programs.log_probs(
                self.base, state.policy.params, critic_params, self.reference_params, batch
            )
            rewards = self.programs.scoring(
                state.initial_calibration, prompts.with_records(batch), token_log_probs.reference_log_probs
            )
            batches.append(jax.device_get(replicate((batch, token_log_probs, rewards))))
        count = len(self.prompts)  # the last batch is filled up

        def joined(arrays: Sequence[Any]) -> np.ndarray:
            return np.concatenate(arrays)[:count]

        return _Responses(
            tokens=joined([batch.responses for batch, _, _ in batches]),
            mask=joined([batch.response_mask for batch, _, _ in batches]),
            rewards=joined([rewards.rewards for _, _, rewards in batches]),
            log_ratio=joined([token.log_probs - token.reference_log_probs for _, token, _ in batches]),
            ended=joined([rewards.diagnostics["ended"] for _, _, rewards in batches]),
            parts={
                name: joined([rewards.parts[name].rewards for _, _, rewards in batches])
                for name in self.learner.config.rewards
            },
        )

    def _measure(self, responses: "_Responses", texts: Sequence[str]) -> tuple[dict[str, float], Sequence[float]]:
        """Metrics, and the judge's score of each response; no scores where there is no judge."""
        metrics = {"eval_reward": float(responses.rewards.sum(axis=1).mean())}
        scores: list[float] = []
        judge = judge_of(self.learner.config)
        if judge is not None:
            task = judge.removeprefix(tasks.PREFIX)
            pairs = [(example.messages, text) for example, text in zip(self.prompts, texts, strict=True)]
            scores = [tasks.judge(task, prompt, response) for prompt, response in pairs]
            metrics["eval_judge"] = float(np.mean(scores))
            behaviors = [tasks.behavior(task, prompt, response) for prompt, response in pairs]
            metrics |= {f"eval_{key}": mean for key, mean in tasks.mean_behavior(task, behaviors).items()}
        metrics |= {
            "eval_kl": float(responses.log_ratio.sum(axis=1).mean()),
            "eval_length": float(responses.mask.sum(axis=1).mean()),
            "eval_ended": float(responses.ended.mean()),
        }
        weights = weights_of(self.learner.config)
        lengths = responses.mask.sum(axis=1)
        sums = {name: rewards.sum(axis=1) for name, rewards in responses.parts.items()}
        metrics |= {f"eval_{name}": float(x) for name, x in metrics_of_sums(sums, lengths, weights).items()}
        return metrics, scores

    def _write_samples(self, step: int, responses: "_Responses", texts: Sequence[str], scores: Sequence[float]) -> None:
        for i in range(min(self.learner.config.evaluation.samples, len(texts))):
            mask = responses.mask[i]
            row: dict[str, Any] = {"step": step, "prompt": transcript(self.prompts[i].messages), "response": texts[i]}
            row["reward"] = float(responses.rewards[i].sum())
            if scores:
                row["judge"] = float(scores[i])
            row["tokens"] = token_texts(self.tokenizer, [int(token) for token in responses.tokens[i][mask]])
            row["rewards"] = [float(x) for x in responses.rewards[i][mask]]
            if responses.parts:
                rewards = {name: part[i][mask] for name, part in responses.parts.items()}
                row["sources"] = source_fields(weights_of(self.learner.config), rewards)
            append_row(self.folder.samples, row)


@dataclass(frozen=True)
class _Responses:
    """N responses: ``tokens``, ``mask``, ``rewards`` and ``log_ratio`` are ``[N, T]``, ``ended`` is ``[N]``.

    ``parts`` are the rewards ``[N, T]`` of each source of a sum, before its weight.
    """

    tokens: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray
    log_ratio: np.ndarray
    ended: np.ndarray
    parts: dict[str, np.ndarray]


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    """Program that copies its arguments to every device, from which each process reads them whole."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def print_samples(folder: RunFolder) -> None:
    """Print the first and the last of the responses that the run has saved, prompt by prompt."""
    rows = read_rows(folder.samples)
    if not rows:
        return
    first, last = rows[0]["step"], rows[-1]["step"]
    before = {row["prompt"]: row for row in rows if row["step"] == first}
    for row in (row for row in rows if row["step"] == last):
        scores = f"reward {row['reward']:.2f}"
        if sources := row.get("sources"):
            parts = [f"{source['weight']:g} * {name} {source['reward']:.2f}" for name, source in sources.items()]
            scores += f" = {' + '.join(parts)}"
        scores += f", judge {row['judge']:.2f}" if "judge" in row else ""
        print(f"prompt      {row['prompt']}")
        if first != last and row["prompt"] in before:
            print(f"at step {first:<4}{before[row['prompt']]['response']}")
        print(f"at step {last:<4}{row['response']}  ({scores})\n")
