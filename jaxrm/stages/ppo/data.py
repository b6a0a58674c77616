"""What a PPO run reads while it trains: prompts, and SFT rows where they are mixed in."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrm.data.loader import BatchIterator
from jaxrm.data.prompts import PromptExample
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.sharded_model import to_devices
from jaxrm.inference.weights import identity_of, identity_of_source
from jaxrm.stages.inputs.prompts import (
    PlacedPrompts,
    Prompts,
    numbered,
    prompt_loader,
    prompts_to_devices,
    stage_prompt_length,
    stage_prompts,
)
from jaxrm.stages.judge import check_judgeable
from jaxrm.stages.ppo.ptx import open_ptx
from jaxrm.stages.rewards.sources import identities_of
from jaxrm.stages.stage import Stage, judge_of
from jaxrm.types import TokenBatch


@dataclass(frozen=True)
class PPOData:
    """Endless batches, at a position that every checkpoint saves.

    Attributes:
      prompts: batches of prompts of this process.
      prompts_to_devices: puts one on the devices.
      fingerprint: of the prompts, the SFT rows and the models, saved with every checkpoint.
      ptx: batches of SFT rows, or None.
      ptx_to_devices: puts one on the devices; None without ``ptx``.
    """

    prompts: BatchIterator
    prompts_to_devices: Callable[[Any], PlacedPrompts]
    fingerprint: str
    ptx: BatchIterator | None = None
    ptx_to_devices: Callable[[dict[str, np.ndarray]], TokenBatch] | None = None

    def next_prompts(self) -> PlacedPrompts:
        """The next batch of prompts, on the devices."""
        return self.prompts_to_devices(next(self.prompts))

    def next_ptx(self) -> TokenBatch | None:
        """The next SFT rows, on the devices; None where there are none."""
        if self.ptx is None or self.ptx_to_devices is None:
            return None
        return self.ptx_to_devices(next(self.ptx))

    def get_state(self) -> dict[str, Any]:
        """The position, for JSON."""
        return {"prompts": self.prompts.get_state(), "ptx": None if self.ptx is None else self.ptx.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to a position that `get_state` returned."""
        self.prompts.set_state(state["prompts"])
        if self.ptx is not None:
            self.ptx.set_state(state["ptx"])


@dataclass(frozen=True)
class PPOInputs:
    """Prompts of both sides of the held-out split, and the batches of training.

    Attributes:
      train: prompts of training.
      held_out: those of evaluation.
      prompt_length: tokens that prompts are padded to.
      num_steps: of the run.
      prompts_per_step: of which each has ``config.rollout.responses_per_prompt`` responses.
      data: batches of training.
    """

    train: Prompts
    held_out: Prompts
    prompt_length: int
    num_steps: int
    prompts_per_step: int
    data: PPOData

    @property
    def every_prompt(self) -> tuple[PromptExample, ...]:
        """Prompts of both sides."""
        return (*self.train.examples, *self.held_out.examples)


def open_inputs(stage: Stage) -> PPOInputs:
    """Read and tokenize what a run trains and is evaluated on.

    Raises:
      UserError: where prompts or SFT rows cannot be used, or the judge cannot judge the held-out prompts.
    """
    config = stage.config
    train, held_out = numbered(config, [stage_prompts(stage, held_out=side) for side in (False, True)])
    judge = judge_of(config)
    if judge is not None:
        check_judgeable(held_out.examples, judge, "evaluation.judge")
    prompt_length = stage_prompt_length(stage, [*train.examples, *held_out.examples])
    prompts_per_step = _prompts_per_step(config, len(train.examples))
    section = dataclasses.replace(config.data, batch_size=prompts_per_step)
    prompts, fingerprint = prompt_loader(
        train.examples, section, prompt_length, stage.mesh, seed=config.seed, pad_id=stage.pad_id
    )
    data = PPOData(prompts, prompts_to_devices(stage.mesh), f"prompts {fingerprint}")
    if config.ptx is not None:
        ptx, fingerprint = open_ptx(stage, config.ptx)
        data = dataclasses.replace(
            data,
            ptx=ptx,
            ptx_to_devices=to_devices(stage.mesh, TokenBatch),
            fingerprint=f"{data.fingerprint}, SFT data {fingerprint[:12]}",
        )
    num_steps = stage.num_steps(len(train.examples) * config.rollout.responses_per_prompt)
    return PPOInputs(train, held_out, prompt_length, num_steps, prompts_per_step, data)


def _prompts_per_step(config: Any, num_prompts: int) -> int:
    """Prompts of a step, of which each has ``config.rollout.responses_per_prompt`` responses.

    Raises:
      UserError: where several responses are wanted to more prompts than there are.
    """
    n, batch_size = config.rollout.responses_per_prompt, config.data.batch_size
    if n > 1 and num_prompts < batch_size // n:
        raise UserError(
            f"{option('data.batch_size')} is {batch_size}, {option('rollout.responses_per_prompt')} {n} to each of "
            f"{batch_size // n} prompts, but {config.data.path!r} has only {num_prompts}; give more data, or a "
            f"smaller {flag('data.batch_size')}"
        )
    return batch_size // n


def with_models(inputs: PPOInputs, config: Any) -> PPOInputs:
    """The same with policy, reward source and critic in the fingerprint, so that none of them is replaced midway."""
    critic = [identity_of(config.critic.path)] if config.critic.path else []
    models = "; ".join(filter(None, [identity_of_source(config.model), *identities_of(config), *critic]))
    return dataclasses.replace(
        inputs, data=dataclasses.replace(inputs.data, fingerprint=f"{inputs.data.fingerprint}; {models}")
    )
