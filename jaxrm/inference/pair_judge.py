"""Judges that are asked a question with two possible replies, such as A and B: a language model, or a chat endpoint.

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
_MANY = 8  # replies of which one at least must be a verdict
SHIPPED = ("helpfulness", "harmlessness", "summary")


@dataclass(frozen=True)
class PairQuestion:
    """Which of two answers to a prompt is better."""

    prompt: Sequence[Message]
    first: str
    second: str


class Asker(Protocol):
    """Replies to questions with two possible replies."""

    def ask(self, questions: Sequence[str]) -> np.ndarray:
        """Share ``[N]`` of the first word in each reply, float64 in [0, 1]; NaN where there is no verdict."""
        ...


class LanguageModelAsker:
    """A language model of this machine. The share of a word comes from the log-probs of both as the next token.

    Args:
      policy: the model.
      field: of the config that names it.
      words: its two replies.
      max_length: most tokens of a question.
      batch_size: questions read at once.

    Raises:
      UserError: the words are not two tokens of the model.
    """

    def __init__(self, policy: Policy, field: str, words: Sequence[str], *, max_length: int, batch_size: int) -> None:
        self._policy, self._batch_size = policy, batch_size
        self._max_length = min(max_length, policy.model.config.max_position)
        self._prefix, verdicts = verdict_ids(policy.tokenizer, policy.template, words, policy.name, field)
        ids = jnp.asarray(verdicts, jnp.int32)
        graphdef = policy.model.graphdef

        @jax.jit
        def read(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden = model(tokens, positions=positions_from_mask(mask), segment_ids=mask.astype(jnp.int32))
            logits = model.logits(hidden[:, -1])[:, ids]  # [B, 2]; what other tokens have does not count
            return jax.nn.softmax(logits, axis=-1)[:, 0]

        self._read = read

    def ask(self, questions: Sequence[str]) -> np.ndarray:
        """See `Asker`."""
        policy = self._policy
        encoded = [question_ids(policy.tokenizer, policy.template, text, self._prefix) for text in questions]
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


def question_ids(
    tokenizer: "PreTrainedTokenizerBase", template: str, question: str, prefix: Sequence[int]
) -> list[int]:
    """Token ids of a question, up to where a verdict is read.

    Args:
      tokenizer: of the model.
      template: its chat template.
      question: the text.
      prefix: from `verdict_ids`.

    Raises:
      UserError: the chat template cannot write the question.
    """
    return [*templates.encode_prompt(tokenizer, [Message("user", question)], template), *prefix]


def verdict_ids(
    tokenizer: "PreTrainedTokenizerBase", template: str, words: Sequence[str], name: str, field: str
) -> tuple[list[int], tuple[int, int]]:
    """The ids that both replies begin with, and the ids of the tokens behind them, by which the replies differ.

    Args:
      tokenizer: of the model.
      template: its chat template.
      words: its two replies.
      name: of the model, for the message.
      field: of the config that names it, ``judges.NAME.language_model``.

    Raises:
      UserError: the words are not two tokens of the model.
    """
    prefix, ids = _apart(tokenizer, template, words)
    if ids is None:
        others = (("1", "2"), ("yes", "no"), tuple(sorted(filter(str.isalpha, tokenizer.get_vocab()))[-2:]))
        example = next((pair for pair in others if len(pair) == 2 and _apart(tokenizer, template, pair)[1]), ("A", "B"))
        words_flag = flag(f"{field.removesuffix('.language_model')}.words")
        raise UserError(
            f"{option(field)} is {name}, whose tokenizer has no two tokens for {words[0]} and {words[1]}, from which a "
            f"verdict is read; give two words that it has, e.g. {words_flag}={','.join(example)}, or another model, "
            f"e.g. {flag(field)}=HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return prefix, ids


def _apart(
    tokenizer: "PreTrainedTokenizerBase", template: str, words: Sequence[str]
) -> tuple[list[int], tuple[int, int] | None]:
    """What both replies begin with, and the tokens behind it; None where those are none or unknown ones."""
    replies = [templates.encode_response(tokenizer, word, template) for word in words]
    shared = 0
    while shared < min(map(len, replies)) and replies[0][shared] == replies[1][shared]:
        shared += 1
    if shared == min(map(len, replies)):
        return replies[0][:shared], None
    first, second = (int(reply[shared]) for reply in replies)
    return replies[0][:shared], None if tokenizer.unk_token_id in (first, second) else (first, second)


class EndpointAsker:
    """A model behind a chat endpoint. Its replies are on disk as soon as they come, and none is paid twice.

    Args:
      endpoint: the client.
      words: the two replies.
      field: of the config that names the endpoint, ``judges.NAME.endpoint``.
    """

    def __init__(self, endpoint: ChatEndpoint, words: Sequence[str], field: str) -> None:
        self.endpoint, self._words, self._field = endpoint, words, field

    def ask(self, questions: Sequence[str]) -> np.ndarray:
        """See `Asker`; the first word counts 1, the second 0, and a reply that is neither, after a retry, is NaN.

        Raises:
          UserError: no reply of many is one of the words, so the judge does not do what it is asked.
        """
        first, second = self._words
        unread: list[str] = []

        def problem(reply: str) -> str | None:
            if _verdict(reply, self._words):
                return None
            unread.append(reply)
            return f"it is neither {first} nor {second}"

        chats = [[{"role": "user", "content": text}] for text in questions]
        verdicts = [
            _verdict(reply, self._words) for reply in self.endpoint.ask(chats, problem=problem, keep_unusable=True)
        ]
        if len(verdicts) >= _MANY and not any(verdicts):
            words_flag = flag(f"{self._field.removesuffix('.endpoint')}.words")
            shown = f", e.g. {unread[-1].strip()[:60]!r}" if unread else ""
            raise UserError(
                f"{option(self._field)}: {self.endpoint.config.model} replied neither {first} nor {second} to any of "
                f"{len(verdicts):,} questions{shown}; give the words that it says, e.g. {words_flag}=1,2, or another "
                f"model, {flag(self._field)}.model=…"
            )
        return np.array([{first: 1.0, second: 0.0}.get(verdict, np.nan) for verdict in verdicts])


def read_pair_question(config: ComparisonJudgeConfig, field: str) -> str:
    """The question of a judge: one that comes with jaxrm, or a file.

    Raises:
      UserError: there is no such file, or it lacks one of the texts.
    """
    path = _SHIPPED / f"pair_{config.prompt}.txt" if config.prompt in SHIPPED else Path(config.prompt).expanduser()
    required = ("prompt", "first", "second")
    known = (*required, "first_word", "second_word")
    return read_question(path, field, given=config.prompt, required=required, known=known)


def pair_texts(template: str, questions: Sequence[PairQuestion], words: Sequence[str]) -> list[str]:
    """What a judge is asked, who replies with one of two words."""
    plain = _plain(words)
    return [
        fill(template, {"prompt": transcript(each.prompt), "first": each.first, "second": each.second}, plain)
        for each in questions
    ]


def refusal_texts(prompts: Sequence[Sequence[Message]], responses: Sequence[str], words: Sequence[str]) -> list[str]:
    """What a judge is asked about refusals; the first word is yes."""
    template = (_SHIPPED / "refusal_question.txt").read_text(encoding="utf-8")
    return [
        fill(template, {"prompt": transcript(prompt), "response": response}, _plain(words))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _plain(words: Sequence[str]) -> dict[str, str]:
    return {"first_word": words[0], "second_word": words[1]}


def _verdict(reply: str, words: Sequence[str]) -> str:
    """One of the two words, or nothing where a reply is neither."""
    bare = _bare(reply.rpartition("</think>")[2])
    for prefix in ("Answer", "answer", "Summary", "summary"):
        bare = _bare(bare.removeprefix(prefix).strip(":"))
    return next((word for word in words if _bare(word) == bare), "")


def _bare(text: str) -> str:
    return text.strip(" *_`\"'.()[]:\n")
