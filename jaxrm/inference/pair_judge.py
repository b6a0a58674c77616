"""Judges that are asked a question with two possible replies, A and B: a language model, or a chat endpoint.

Which of two answers is better is asked twice, with the answers in either order. A judge that prefers a place and no
answer contradicts itself then, which is a tie, and its position bias is seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrm.comparison_config import ComparisonJudgeConfig
from jaxrm.data import templates
from jaxrm.data.prompts import transcript
from jaxrm.data.records import Message
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.chat_endpoint import ChatEndpoint
from jaxrm.inference.policy import Policy
from jaxrm.inference.question_file import fill, read_question
from jaxrm.inference.response_batches import bucket
from jaxrm.models.transformer import positions_from_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHIPPED = Path(__file__).parent
SHIPPED = ("helpfulness", "harmlessness", "summary")
_LETTERS = ("A", "B")


@dataclass(frozen=True)
class PairQuestion:
    """Which of two answers to a prompt is better."""

    prompt: Sequence[Message]
    first: str
    second: str


class Asker(Protocol):
    """Replies to questions of two letters."""

    def ask(self, questions: Sequence[str]) -> np.ndarray:
        """Share ``[N]`` of A in each reply, float64 in [0, 1]; NaN where the question was too long to be read."""
        ...


class LanguageModelAsker:
    """A language model of this machine. The share of A comes from the log-probs of the letters as the next token.

    Args:
      policy: the model.
      field: of the config that names it.
      max_length: most tokens of a question.
      batch_size: questions read at once.

    Raises:
      UserError: the letters are not two tokens of the model.
    """

    def __init__(self, policy: Policy, field: str, *, max_length: int, batch_size: int) -> None:
        self._policy, self._batch_size = policy, batch_size
        self._max_length = min(max_length, policy.model.config.max_position)
        self._prefix, letters = letter_ids(policy.tokenizer, policy.template, policy.name, field)
        ids = jnp.asarray(letters, jnp.int32)
        graphdef = policy.model.graphdef

        @jax.jit
        def read(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden = model(tokens, positions=positions_from_mask(mask), segment_ids=mask.astype(jnp.int32))
            letters = model.logits(hidden[:, -1])[:, ids]  # [B, 2]; what other tokens have does not count
            return jax.nn.softmax(letters, axis=-1)[:, 0]

        self._read = read

    def ask(self, questions: Sequence[str]) -> np.ndarray:
        """See `Asker`."""
        policy = self._policy
        encoded = [
            [*templates.encode_prompt(policy.tokenizer, [Message("user", text)], policy.template), *self._prefix]
            for text in questions
        ]
        shares = np.full(len(questions), np.nan)
        order = sorted(
            (i for i, ids in enumerate(encoded) if len(ids) <= self._max_length), key=lambda i: len(encoded[i])
        )
        for start in range(0, len(order), self._batch_size):
            indices = order[start : start + self._batch_size]
            width = min(bucket(max(len(encoded[i]) for i in indices)), policy.model.config.max_position)
            tokens, mask = (np.zeros((self._batch_size, width), kind) for kind in (np.int32, bool))
            mask[:, -1] = True  # rows to fill up the batch read one token
            for row, i in enumerate(indices):
                tokens[row, width - len(encoded[i]) :], mask[row, width - len(encoded[i]) :] = encoded[i], True
            shares[indices] = np.asarray(self._read(policy.params, tokens, mask), np.float64)[: len(indices)]
        return shares


def letter_ids(
    tokenizer: "PreTrainedTokenizerBase", template: str, name: str, field: str
) -> tuple[list[int], tuple[int, int]]:
    """The ids that both replies begin with, and the ids of the two letters behind them.

    Args:
      tokenizer: of the model.
      template: its chat template.
      name: of the model, for the message.
      field: of the config that names it.

    Raises:
      UserError: the letters are not two tokens of the model.
    """
    replies = [templates.encode_response(tokenizer, letter, template) for letter in _LETTERS]
    shared = 0
    while shared < min(map(len, replies)) and replies[0][shared] == replies[1][shared]:
        shared += 1
    first, second = (reply[shared] if shared < len(reply) else tokenizer.unk_token_id for reply in replies)
    if first == second or tokenizer.unk_token_id in (first, second):
        raise UserError(
            f"{option(field)} is {name}, whose tokenizer has no two tokens for the letters A and B, from which a "
            f"verdict is read; give another model, e.g. {flag(field)}=HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return replies[0][:shared], (int(first), int(second))


class EndpointAsker:
    """A model behind a chat endpoint. Its replies are on disk as soon as they come, and none is paid twice."""

    def __init__(self, endpoint: ChatEndpoint) -> None:
        self.endpoint = endpoint

    def ask(self, questions: Sequence[str]) -> np.ndarray:
        """See `Asker`; A counts 1, B counts 0."""
        replies = self.endpoint.ask(
            [[{"role": "user", "content": text}] for text in questions],
            problem=lambda reply: None if _letter(reply) else "it is neither A nor B",
        )
        return np.array([1.0 if _letter(reply) == "A" else 0.0 for reply in replies])


def read_pair_question(config: ComparisonJudgeConfig, field: str) -> str:
    """The question of a judge: one that comes with jaxrm, or a file.

    Raises:
      UserError: there is no such file, or it lacks one of the texts.
    """
    path = _SHIPPED / f"pair_{config.prompt}.txt" if config.prompt in SHIPPED else Path(config.prompt).expanduser()
    words = ("prompt", "first", "second")
    return read_question(path, field, given=config.prompt, required=words, known=words)


def pair_texts(template: str, questions: Sequence[PairQuestion]) -> list[str]:
    """What a judge is asked."""
    return [
        fill(template, {"prompt": transcript(each.prompt), "first": each.first, "second": each.second})
        for each in questions
    ]


def refusal_texts(prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[str]:
    """What a judge is asked about refusals; A is yes."""
    template = (_SHIPPED / "refusal_question.txt").read_text(encoding="utf-8")
    return [
        fill(template, {"prompt": transcript(prompt), "response": response})
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _letter(reply: str) -> str:
    """A or B, or nothing where a reply is neither."""
    words = reply.rpartition("</think>")[2].strip().strip("*_`\"'.()[] \n")
    for prefix in ("Answer", "answer", "Summary", "summary"):
        words = words.removeprefix(prefix).strip(": *")
    return words if words in _LETTERS else ""
