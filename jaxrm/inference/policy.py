"""A policy with its parameters, ready to generate."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import jax

from jaxrm.data.pairs import MappingConfig
from jaxrm.data.responses import Response
from jaxrm.errors import UserError, arguments
from jaxrm.inference.prompts import Prompt, check_count, read_prompts
from jaxrm.inference.reward_kind import default_kind
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.sampler import Sampler
from jaxrm.inference.sharded_model import ShardedModel, shard_model, shard_scalar_model
from jaxrm.models import build, heads
from jaxrm.models.lora import LoRAConfig, init_adapters, join, split
from jaxrm.models.sampling import SamplingConfig, prompt_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LORA = LoRAConfig(rank=8)


@dataclass(frozen=True, eq=False)
class Policy:
    """A language model with its parameters.

    Attributes:
      model: the decoder, and where its parameters lie.
      params: its parameters, float32, on the devices.
      tokenizer: of the model.
      template: chat template that prompts are written with.
      name: where it came from, for people.
    """

    model: ShardedModel
    params: Any = dataclasses.field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = dataclasses.field(repr=False)
    template: str
    name: str

    @cached_property
    def log_prob_steps(self) -> dict[Any, Any]:
        """Functions to its log-probs of responses, by mesh, so that they are compiled once and not by every call."""
        return {}

    @arguments()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[Response]:
        """Generate one response to each prompt, as ``python -m jaxrm.generate --input`` does.

        Args:
          prompts: texts, or lists of messages; any number.
          max_new_tokens: longest response in tokens, its end token included.
          temperature: divides the logits; 0 is greedy.
          top_k: draw among this many tokens only; 0 for all.
          top_p: draw among the likeliest tokens that reach this probability; 1 for all.
          seed: sampling seed. A response depends on it, on its prompt and on the place of that among the prompts.
          batch_size: prompts answered at once; where one response ends, the next prompt takes its place.

        Returns:
          The responses in the order of the prompts, each a ``str`` without its end token.

        Raises:
          UserError: a prompt that cannot be read, one too long for the model, or a number out of range.
        """
        messages = read_prompts(prompts)
        check_count("batch_size", batch_size)
        check_count("seed", seed, 0)
        sampling = SamplingConfig(max_new_tokens, temperature, top_k, top_p)
        keys = prompt_keys(jax.random.key(seed), 0, len(messages))
        answers = dict(self.sampler(sampling).answers(messages, keys, batch_size))
        return [answers[place] for place in range(len(messages))]

    def with_adapters(self, lora: LoRAConfig = DEFAULT_LORA, *, seed: int = 0) -> "Policy":
        """The same model as the base of new adapters, which are then what is trained of it, and change nothing yet.

        Args:
          lora: their rank, scale and targets.
          seed: of their first values.

        Raises:
          UserError: where it has adapters already, or the rank is 0.
        """
        if self.model.lora.is_on or not lora.is_on:
            problem = f"{self.name} has {self.model.lora} already" if self.model.lora.is_on else "lora.rank is 0"
            raise UserError(f"{problem}; give a model without adapters a rank, e.g. lora=jaxrm.LoRAConfig(rank=8)")
        model = shard_model(self.model.source, self.model.mesh, self.model.config, lora=lora)
        first = init_adapters(model.trained_shapes, jax.random.key(seed), model.trained_shardings)
        return dataclasses.replace(self, model=model, params=join(self.params, first))

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        """What generates responses to messages, or continues token ids."""
        return Sampler(self.model, self.params, self.tokenizer, self.template, sampling)

    def with_params(self, params: Any) -> "Policy":
        """The same model with other parameters, such as those of a training state: its adapters, where it has any."""
        return dataclasses.replace(self, params=join(split(self.params)[1], params))

    @arguments()
    def as_reward_model(
        self, sort: Literal["seq2seq", "scalar"], *, instruction: str | None = None, seed: int = 0
    ) -> RewardModel:
        """The model as the reward model that training starts from.

        Args:
          sort: ``seq2seq``, the decoder itself, or ``scalar``, the decoder with a head that is drawn.
          instruction: what a seq2seq one is told after a response, see `jaxrm.data.pairs.MappingConfig`.
          seed: of the head.
        """
        if sort not in ("seq2seq", "scalar"):
            raise UserError(f"sort is {sort!r}; use one of seq2seq, scalar")
        instruction = MappingConfig().instruction if instruction is None else instruction
        model, params = self.model, self.params
        if sort == "scalar":
            model = shard_scalar_model(self.model.source, self.model.mesh, self.model.config, lora=self.model.lora)
            head = build.init_scalar_head(model.config, jax.random.key(seed), model.shardings["scalar_head"])
            params = heads.from_decoder_params(params, head)
        return RewardModel(
            model,
            params,
            self.tokenizer,
            self.template,
            self.name,
            sort=sort,
            instruction=instruction,
            kind=default_kind(sort),
        )
