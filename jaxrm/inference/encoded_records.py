"""Records as a reward model reads them: the prompt and each response, as text and as tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxrm.data import templates
from jaxrm.data.cutting import cut_points, cut_prompt, find_cut
from jaxrm.data.pairs import max_scored_prompt_tokens
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, Record
from jaxrm.errors import UserError
from jaxrm.inference.policy import Policy
from jaxrm.inference.reward_model import RewardModel

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class EncodedRecord:
    """One record to score: a prompt and its responses, as text and as tokens.

    Attributes:
      source: where it was read.
      prompt: messages.
      prompt_ids: ``[P]`` int32.
      responses: ``(side, text, ids)`` of each response; sides are ``chosen`` and ``rejected``, or ``response``.
      texts: for a classifier, prompt and response as it reads them, one for each response.
    """

    source: str
    prompt: Sequence[Message]
    prompt_ids: np.ndarray
    responses: Sequence[tuple[str, str, np.ndarray]]
    texts: Sequence[templates.Text] = ()


def encode(
    records: Sequence[Record], model: RewardModel, report: ReadReport, *, reference: Policy | None = None
) -> list[EncodedRecord]:
    """Records as tokens; prompts are cut where they must be, and what cannot be scored is reported.

    Args:
      records: pairs or demonstrations.
      model: the reward model.
      report: counts records without a response, with an empty one, with two that are the same, or with one that is too
        long to be read.
      reference: policy that must be able to read them too.
    """

    def encode_one(record: Record, texts: Sequence[tuple[str, str]]) -> EncodedRecord:
        prompt_ids = templates.encode_prompt(model.tokenizer, record.prompt, model.template)
        scored, keeps_head = _encode(record.source, record.prompt, prompt_ids, texts, model, reference)
        report.cut_prompts += len(scored.prompt_ids) < len(prompt_ids)
        report.cut_heads += not keeps_head
        return scored

    return encode_each(records, report, encode_one)


def encode_each(
    records: Sequence[Record],
    report: ReadReport,
    encode_one: Callable[[Record, Sequence[tuple[str, str]]], EncodedRecord],
) -> list[EncodedRecord]:
    """Each record as ``encode_one`` encodes it with its responses; what cannot be scored is reported."""
    encoded = []
    for record in records:
        try:
            encoded.append(encode_one(record, responses_of(record)))
        except UserError as error:
            report.add_bad(str(error), record.source)
    report.used = len(encoded)
    return encoded


def encode_all(
    prompts: Sequence[Sequence[Message]], responses: Sequence[str], model: RewardModel, reference: Policy | None = None
) -> list[EncodedRecord]:
    """The same of prompts with one response each, every one of which must be scored.

    Raises:
      UserError: naming the first that cannot be, ``responses[3]``.
    """
    encoded = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        name = f"prompts[{i}]"
        try:
            prompt_ids = templates.encode_prompt(model.tokenizer, prompt, model.template)
            name = f"responses[{i}]"
            encoded.append(_encode(name, prompt, prompt_ids, [("response", response)], model, reference)[0])
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return encoded


def responses_of(record: Record) -> list[tuple[str, str]]:
    """``(side, text)`` of each response of a record.

    Raises:
      UserError: it has none, an empty one, or two that are the same.
    """
    if isinstance(record, PreferenceRecord):
        texts = [("chosen", record.chosen), ("rejected", record.rejected)]
    elif isinstance(record, DemonstrationRecord):
        texts = [("response", record.response)]
    else:
        raise UserError("a prompt without a response")
    if not all(text.strip() for _, text in texts):
        raise UserError("a response is empty")
    if len({text.strip() for _, text in texts}) < len(texts):
        raise UserError("both responses are the same")
    return texts


def _encode(
    source: str,
    prompt: Sequence[Message],
    prompt_ids: Sequence[int],
    texts: Sequence[tuple[str, str]],
    model: RewardModel,
    reference: Policy | None,
) -> tuple[EncodedRecord, bool]:
    """The record, and whether its prompt keeps system text and first header."""
    responses = [
        (side, text, np.array(templates.encode_response(model.tokenizer, text, model.template), np.int32))
        for side, text in texts
    ]
    every = [ids for _, _, ids in responses]
    if len(every) == 2 and np.array_equal(every[0], every[1]):
        raise UserError("both responses are the same")
    positions = model.model.config.max_position
    room = max_scored_prompt_tokens(positions, every, model.request if model.is_seq2seq else None)
    if reference is not None:
        positions = min(positions, reference.model.config.max_position)
        room = min(room, max_scored_prompt_tokens(reference.model.config.max_position, every, None))
    if room < 1:
        raise UserError(f"a response too long for the {positions} tokens of the model")
    ids, points = np.array(prompt_ids, np.int32), None
    if len(ids) > room:
        (points,) = cut_points(model.tokenizer, model.template, [(prompt, ids)])
    keeps_head = find_cut(ids, room, model.bos_id, points).keeps_head
    return EncodedRecord(source, prompt, cut_prompt(ids, room, model.bos_id, points), responses), keeps_head
