"""What a source of rewards is to score, and what every source has to say of itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.data.prompts import PromptExample
from jaxrm.data.responses import Response
from jaxrm.data.tokenizer import Vocabulary
from jaxrm.inference.reward_model import RewardModel
from jaxrm.models.build import ModelSource
from jaxrm.models.hub import ClassifierParams
from jaxrm.stage_config import PPO, BestOfN, Evaluate


@dataclass(frozen=True)
class Scored:
    """What a source is to score.

    Attributes:
      config: of the stage.
      mesh: the devices.
      policy: what the policy's token ids mean.
      examples: every prompt whose responses it will score.
    """

    config: PPO | BestOfN | Evaluate
    mesh: Mesh
    policy: Vocabulary
    examples: Sequence[PromptExample]


@dataclass(frozen=True)
class Responses(Scored):
    """The same, with what reads a response.

    Attributes:
      text: a response's ids as text.
      end_ids: ids that end the policy's responses.
      models: reward models that are open, by path: two sources of one model share its weights.
      classifiers: weights of classifiers that are open, by how they are computed, likewise.
    """

    text: Callable[[np.ndarray], Response]
    end_ids: tuple[int, ...]
    models: dict[str, RewardModel]
    classifiers: dict[ModelSource, ClassifierParams]


class Origin(NamedTuple):
    """What a source of rewards is: a row of the table in `jaxrm.stages.rewards.sources`.

    Each function takes the source's section, whose fields messages call ``reward.…`` (see `naming_source`).

    Attributes:
      check_config: refuses what the section alone shows to be wrong.
      check: refuses a source that cannot score the policy's responses, before weights are read; its name for people.
      open: the source.
      identity: which model, function or judge exactly; see `jaxrm.inference.weights.identity_of`.
      reads_fields: whether it looks at the columns of a prompt's record.
    """

    check_config: Callable[[RewardConfig], None]
    check: Callable[[RewardConfig, Scored], str]
    open: Callable[[RewardConfig, Responses], RewardSource]
    identity: Callable[[RewardConfig], str]
    reads_fields: Callable[[RewardConfig], bool]
