"""What a stage would do, found out before it does anything: what was read, examples as tokens, and what it comes to.

Every stage has a function ``inspect``, which runs its checks and reads its data. No weights are read and nothing is
written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrm.data.examples import TokenExample
from jaxrm.data.prompts import PromptExample
from jaxrm.data.readers import ReadReport
from jaxrm.data.tokenizer import token_texts
from jaxrm.models.config import ModelConfig
from jaxrm.stages.inputs.training_data import TrainingData
from jaxrm.stages.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class ShownExample:
    """An example as the model will see it.

    Attributes:
      source: the place of its record.
      title: what it is.
      use: what targets are for: ``trained on``, or ``reward at`` for a scalar reward model.
      tokens: its tokens as text, special ones by their names.
      is_target: whether each of them is a target; of a prompt, none is.
    """

    source: str
    title: str
    use: str
    tokens: tuple[str, ...]
    is_target: tuple[bool, ...]


@dataclass(frozen=True)
class Inspection:
    """What a stage would do.

    Attributes:
      reading: what became of the records, by the name of the data.
      examples: a few of them.
      lengths: tokens of every example, by what they are.
      facts: further figures by name.
      shape: of the model that its run will hold; None where it holds none.
      tokenizer: of that model.
      outputs: the records that its run will write for later stages, by file name, with stand-ins for what only a model
        can write.
    """

    reading: Mapping[str, ReadReport]
    examples: Sequence[ShownExample] = ()
    lengths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    shape: ModelConfig | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    outputs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def inspect_training(stage: Stage, reading: Mapping[str, ReadReport], data: TrainingData) -> Inspection:
    """Inspection of a stage that trains on a data set.

    Args:
      stage: that was opened.
      reading: what became of the records.
      data: that it would train on.
    """
    stage.check_local_weights()
    config = stage.config.data
    lengths = [len(example.tokens) for example in data.examples]
    used = sum(lengths) / (data.rows_per_epoch * config.max_length)
    targets = sum(int(_targets(example).sum()) for example in data.examples)
    return Inspection(
        reading,
        [_shown(stage, example) for example in _some(data.examples)],
        {"tokens an example": lengths},
        {
            "rows": f"{data.rows_per_epoch:,} of {config.max_length:,} tokens, {100 * used:.0f} % full",
            "trained tokens": f"{targets:,} of {sum(lengths):,}, {100 * targets / sum(lengths):.0f} %",
            "steps": f"{data.num_steps:,} of {config.batch_size} rows, "
            f"{data.num_steps * config.batch_size / data.rows_per_epoch:.3g} passes over the data",
        },
        stage.model.config,
        stage.tokenizer,
    )


def inspect_prompts(
    stage: Stage,
    reading: Mapping[str, ReadReport],
    prompts: Sequence[PromptExample],
    facts: Mapping[str, str],
    outputs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Inspection:
    """Inspection of a stage whose policy answers prompts.

    Args:
      stage: that was opened.
      reading: what became of the records.
      prompts: that are answered.
      facts: further figures by name.
      outputs: see `Inspection`.
    """
    stage.check_local_weights()
    return Inspection(
        reading,
        [_shown(stage, example) for example in _some(prompts)],
        {"tokens a prompt": [len(example.tokens) for example in prompts]},
        facts,
        stage.model.config,
        stage.tokenizer,
        outputs or {},
    )


def _some(examples: Sequence[Any]) -> list[Any]:
    """The first examples, and one from the middle."""
    indices = sorted({*range(min(NUM_EXAMPLES - 1, len(examples))), len(examples) // 2})
    return [examples[i] for i in indices if i < len(examples)]


def _shown(stage: Stage, example: Any) -> ShownExample:
    columns, targets = example.columns(), _targets(example)
    title = "prompt" if isinstance(example, PromptExample) else "example"
    if hasattr(example, "is_correction"):
        title = "correction of the rejected response" if example.is_correction else "copy of the chosen response"
    elif "is_chosen_end" in columns:
        title = "chosen side, then rejected side"
    use = "reward at" if "is_chosen_end" in columns and "loss_mask" not in columns else "trained on"
    return ShownExample(
        example.source, title, use, tuple(token_texts(stage.tokenizer, example.tokens)), tuple(map(bool, targets))
    )


def _targets(example: TokenExample) -> np.ndarray:
    """Bool ``[n]``: tokens that the loss is on; of a comparison, those that a reward is read from."""
    columns = example.columns()
    if "loss_mask" in columns:
        return columns["loss_mask"]
    if "is_chosen_end" not in columns:
        return np.zeros(len(example.tokens), bool)
    return columns["is_chosen_end"] | (np.arange(len(example.tokens)) == len(example.tokens) - 1)
