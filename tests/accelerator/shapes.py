"""What is measured at each ``--shape``: models by public name, with random weights, and the sizes of batches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answers:
    """A batch of prompts and responses: ``rows`` on each device, tokens of each."""

    rows: int
    prompt: int
    response: int


@dataclass(frozen=True)
class Ragged:
    """Responses of geometric lengths to ``prompts`` of ``prompt`` tokens, of ``mean`` tokens up to ``limit``."""

    prompts: int
    slots: int
    prompt: int
    mean: int
    limit: int


@dataclass(frozen=True)
class Shape:
    """Sizes of one ``--shape``. Of several models the first that fits is measured.

    Attributes:
      models: of training and of PPO, presets.
      adapted: of PPO with adapters, presets.
      rows: of a training batch on each device.
      length: tokens of a training row.
      checked_width: of the model that is compared with the CPU: its heads are half as wide.
      checked_length: tokens of its rows.
      scoring: batch that a reward model scores.
      decoding: batch that a policy answers.
      ragged: responses in fewer slots than there are prompts.
      ppo: batch of a PPO step.
      ppo_microbatches: parts of an update.
      lora: batch of a PPO step with adapters.
      lora_microbatches: parts of its update, and of its rollout.
      rounds: most runs of each measured program; the best counts.
    """

    models: tuple[str, ...]
    adapted: tuple[str, ...]
    rows: int
    length: int
    checked_width: int
    checked_length: int
    scoring: Answers
    decoding: Answers
    ragged: Ragged
    ppo: Answers
    ppo_microbatches: int
    lora: Answers
    lora_microbatches: int
    rounds: int


SHAPES = {
    # The 0.5B is for chips of 16 GiB, where a 2B and its optimizer do not fit.
    "full": Shape(
        models=("gemma-2b", "qwen2.5-0.5b"),
        adapted=("llama-2-7b", "gemma-2b"),
        rows=4,
        length=2048,
        checked_width=256,
        checked_length=256,
        scoring=Answers(8, 512, 512),
        decoding=Answers(32, 256, 256),
        ragged=Ragged(128, 32, 64, 64, 256),
        ppo=Answers(32, 512, 512),
        ppo_microbatches=4,
        lora=Answers(16, 512, 512),
        lora_microbatches=4,
        rounds=5,
    ),
    "small": Shape(
        models=("smollm2-135m",),
        adapted=("smollm2-135m",),
        rows=1,
        length=128,
        checked_width=256,
        checked_length=128,
        scoring=Answers(2, 32, 32),
        decoding=Answers(4, 16, 16),
        ragged=Ragged(32, 8, 16, 8, 32),
        ppo=Answers(4, 16, 16),
        ppo_microbatches=2,
        lora=Answers(4, 16, 16),
        lora_microbatches=2,
        rounds=2,
    ),
    "tiny": Shape(
        models=("tiny",),
        adapted=("tiny",),
        rows=2,
        length=32,
        checked_width=64,
        checked_length=32,
        scoring=Answers(2, 8, 8),
        decoding=Answers(2, 8, 8),
        ragged=Ragged(16, 8, 8, 4, 8),
        ppo=Answers(4, 8, 8),
        ppo_microbatches=2,
        lora=Answers(4, 8, 8),
        lora_microbatches=2,
        rounds=2,
    ),
}
