"""How a policy answers in the evaluation stage: its programs, the rewards of its answers, the KL to a reference."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxrm.algorithms.reward_config import has_rewards, weights_of
from jaxrm.algorithms.rollout import BatchSampler, RewardSource
from jaxrm.data.prompts import PromptExample
from jaxrm.inference import parameters
from jaxrm.inference.rollout_model import build_sampler, divide_responses
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models.sampling import GenerateOptions
from jaxrm.stages.evaluate.answers import add_sources, answer_rows, draw_answers, log_ratio
from jaxrm.stages.inputs.prompts import fixed_batches
from jaxrm.stages.rewards.calibration import PolicyRewards, calibration_of
from jaxrm.stages.rewards.sources import open_rewards
from jaxrm.stages.stage import Stage, judge_of
from jaxrm.types import ResponseBatch, TokenRewards


@dataclass(frozen=True)
class AnswerGenerator:
    """A policy that answers, and what its answers are measured with.

    Attributes:
      stage: the stage.
      params: of the policy.
      reference: parameters that the KL is measured to; None measures none.
      samplers: programs by decoding, ``sampled`` and ``greedy``, and ``best_of`` where several responses compete.
      prompts_at_once: in a draw of those that compete.
      score: calibrated token rewards of responses, or None.
      source: of these rewards, or None.
      log_ratio: ``(params, reference, batch) -> [B]`` nats, jitted once for all checkpoints.
      prompt_length: tokens that prompts are padded to.
      key: of all answers.
    """

    stage: Stage
    params: Any
    reference: Any
    samplers: Mapping[str, BatchSampler]
    prompts_at_once: int
    score: Callable[[ResponseBatch], TokenRewards] | None
    source: RewardSource | None
    log_ratio: Callable[[Any, Any, ResponseBatch], jax.Array]
    prompt_length: int
    key: jax.Array

    def load_params(self, path: str) -> Any:
        """Parameters of other weights of the policy's shape."""
        return _load_others(self.stage, path)

    def rows(
        self, params: Any, split: tuple[int, str], examples: Sequence[PromptExample], decoding: str
    ) -> list[dict[str, Any]]:
        """A row for each answer.

        Args:
          params: who answers.
          split: number and name of the split; the number decides the draws.
          examples: its prompts.
          decoding: ``sampled`` or ``greedy``.
        """
        config = self.stage.config
        best_of = config.evaluate.best_of if decoding == "sampled" else 1
        # The KL is of plain samples: neither greedy answers nor the best of several are drawn from the policy.
        has_kl = self.reference is not None and decoding == "sampled" and best_of == 1
        split_key = jax.random.fold_in(self.key, split[0])
        at_once = self.prompts_at_once if best_of > 1 else config.data.batch_size
        answers = draw_answers(
            self.samplers["best_of" if best_of > 1 else decoding],
            self.score,
            params,
            fixed_batches(examples, at_once, self.prompt_length, self.stage.mesh),
            self.stage.mesh,
            jax.random.fold_in(split_key, config.evaluate.decodings.index(decoding)),
            best_of=best_of,
            read=functools.partial(self.log_ratio, params, self.reference) if has_kl else None,
        )
        rows = answer_rows(
            split[1],
            decoding,
            examples,
            answers,
            self.stage.response_text,
            self.stage.tokenizer,
            judge_of(config),
            token_rewards=config.evaluate.token_rewards,
        )
        if self.score is not None:
            add_sources(rows, answers, weights_of(config))
        return rows


def open_generator(
    stage: Stage,
    rollout_model: ShardedModel,
    every: Sequence[PromptExample],
    to_calibrate: Sequence[PromptExample],
    prompt_length: int,
) -> AnswerGenerator:
    """Load the policy and its reference, and calibrate the rewards where there are any.

    Args:
      stage: the stage.
      rollout_model: the policy on the mesh that it samples on.
      every: all prompts that are answered.
      to_calibrate: prompts whose answers the rewards are calibrated on.
      prompt_length: tokens that prompts are padded to.

    Raises:
      UserError: where the rewards cannot score the policy's answers.
    """
    config, sampling = stage.config, stage.config.rollout.sampling
    params = stage.init_params(jax.random.key(0))
    reference = None if config.evaluate.reference is None else _load_others(stage, config.evaluate.reference)
    build = functools.partial(
        build_sampler,
        stage.model,
        rollout_model,
        dtype=config.model.dtype,
        num_microbatches=config.rollout.num_microbatches,
    )
    options = GenerateOptions(sampling, stage.end_ids, slots=config.rollout.slots)
    greedy = dataclasses.replace(sampling, temperature=0.0, top_k=0, top_p=1.0)
    samplers = {
        "sampled": build(options=options),
        "greedy": build(options=dataclasses.replace(options, sampling=greedy)),
    }
    prompts_at_once, at_once = divide_responses(config, stage.mesh, rollout_model.mesh, config.evaluate.best_of)
    samplers["best_of"] = build(options=dataclasses.replace(options, responses_per_prompt=at_once))
    calibration_key, key = jax.random.split(jax.random.key(config.seed))
    score, source = None, None
    if has_rewards(config):
        source, _ = open_rewards(config, stage.mesh, stage.vocabulary, every, stage.response_text, stage.end_ids)
        start = params if reference is None else reference
        uncalibrated = PolicyRewards(config, stage.model, start, source)
        calibration = calibration_of(
            config,
            stage.mesh,
            to_calibrate,
            prompt_length,
            functools.partial(samplers["sampled"], start),
            uncalibrated,
            calibration_key,
            stage.show_progress,
        )
        score = functools.partial(uncalibrated, calibration)
    key = jax.random.fold_in(key, config.evaluate.sampling_seed)
    ratio = log_ratio(stage.model.graphdef, stage.mesh, sampling.temperature or 1.0)
    return AnswerGenerator(
        stage, params, reference, samplers, prompts_at_once, score, source, ratio, prompt_length, key
    )


def _load_others(stage: Stage, path: str) -> Any:
    source = dataclasses.replace(stage.model.source, path=path, adapter=None)
    model = dataclasses.replace(stage.model, source=source)
    return parameters.init_params(model, jax.random.key(0), stage.config.seed)
