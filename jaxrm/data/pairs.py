"""Preference pairs as tokens, and what asks a seq2seq reward model for a correction.

A response has the same tokens as source, as target, in a comparison (`jaxrm.data.pair_examples`) and when it is scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from jaxrm.config.fields import above, at_least, bounded, check, finite, place, wrong
from jaxrm.data.config import DataConfig
from jaxrm.data.cutting import CutPoints, cut_points, cut_prompt, find_cut
from jaxrm.data.examples import Progress, write_all
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import PreferenceRecord, Record
from jaxrm.data.templates import (
    Text,
    check_template,
    encode,
    encode_response,
    write_prompt,
    write_request,
    write_response,
)
from jaxrm.errors import UserError, flag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512  # pairs handed to the tokenizer at once
_REQUEST = 128  # tokens that ask for a correction, at most, unless the instruction is long


@dataclass(frozen=True)
class MappingConfig:
    """How a seq2seq reward model is asked for a correction, and what it learns.

    The paper trains on both mappings and has none of these fields: they are jaxrm choices.

    Attributes:
      instruction: the user's turn after the source response; empty where an empty turn is enough.
      correction_weight: weight of the loss on a token of the correction mapping.
      edit_weight: how much more a token of the correction mapping weighs where it is not copied from the source, that
        is not in a longest common subsequence of token ids. Most of a correction is copied, so with 1, as in the
        paper, a small model learns little else.
      identity: train on the identity mapping too.
      identity_weight: weight of the loss on a token of the identity mapping.
      identity_warmup_steps: first steps that see the identity mapping alone; they count among the run's steps.

    Raises:
      UserError: a value is out of its bounds.
    """

    instruction: str = "Rewrite your last response as the best one you can give."
    correction_weight: float = bounded(1.0, above(0), finite)
    edit_weight: float = bounded(1.0, above(0), finite)
    identity: bool = True
    identity_weight: float = bounded(1.0, above(0), finite, meaning=" (identity=False leaves the mapping out)")
    identity_warmup_steps: int = bounded(0, at_least(0))

    def __post_init__(self) -> None:
        check(self)
        if self.identity_warmup_steps and not self.identity:
            required = f"0 where {place(self, 'identity')} is False"
            raise wrong(self, "identity_warmup_steps", required, 0)

    @property
    def weighs_edits(self) -> bool:
        """Whether the loss has to know which tokens are edits."""
        return self.edit_weight != 1


@dataclass(frozen=True)
class TokenPair:
    """A preference pair as tokens.

    Attributes:
      prompt: int32 ``[p]``, up to the header that opens the response.
      chosen: int32 ``[n]``; the last token ends the turn.
      rejected: int32 ``[m]``; the last token ends the turn.
      source: the place of the record.
      points: where the prompt may be cut; None where it need not be, or where that cannot be told.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    source: str
    points: CutPoints | None = None


def tokenize_pairs(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    progress: Progress | None = None,
) -> tuple[list[TokenPair], ReadReport]:
    """Tokenize pairs: prompts by ``encode_prompt``, responses by ``encode_response``.

    Args:
      records: preference records.
      tokenizer: as ``load_tokenizer`` returns it.
      config: ``template``, ``max_bad_share``.
      progress: called with the number of records done and their total.

    Returns:
      The pairs, of any length, and the report. Bad are pairs with equal sides or an empty one, and dialogues that the
      template refused.

    Raises:
      UserError: a record is not a pair; there is no such template; more bad records than ``max_bad_share``, or nothing
        left.
    """
    # A template that cannot work at all is one error, not as many bad records as there are.
    check_template(tokenizer, config.template)
    empty = _empty_response(tokenizer, config.template)
    report = ReadReport(total=len(records))
    pairs: list[TokenPair] = []
    for start in range(0, len(records), _CHUNK):
        preferences = [_as_preference(record) for record in records[start : start + _CHUNK]]
        accepted, texts = write_all(preferences, lambda pair: _write_pair(tokenizer, pair, config.template), report)
        encoded = iter(encode(tokenizer, texts))
        chunk: list[tuple[PreferenceRecord, TokenPair]] = []
        for record in accepted:
            prompt, chosen, rejected = (_array(next(encoded)) for _ in range(3))
            if empty is not None and any(np.array_equal(side, empty) for side in (chosen, rejected)):
                report.add_bad("a response is empty", record.source)
                continue
            if np.array_equal(chosen, rejected) or record.chosen.strip() == record.rejected.strip():
                report.add_bad("both responses are the same", record.source)
                continue
            chunk.append((record, TokenPair(prompt, chosen, rejected, record.source)))
        pairs += _with_cut_points(chunk, tokenizer, config)
        if progress:
            progress(min(start + _CHUNK, len(records)), len(records))
    report.used = len(pairs)
    report.check(config.max_bad_share, config.path)
    return pairs, report


def correction_request(tokenizer: "PreTrainedTokenizerBase", template: str, instruction: str) -> list[int]:
    """Token ids between a source response and its correction, the same for every prompt and response.

    The template writes three things there: what follows an assistant's turn, a user's turn with ``instruction``, and
    the header that opens the assistant's next turn.

    Raises:
      UserError: no such template, or it refuses the dialogue.
    """
    return encode(tokenizer, [write_request(tokenizer, template, instruction)])[0]


def max_scored_prompt_tokens(max_length: int, responses: Sequence[np.ndarray], request: Sequence[int] | None) -> int:
    """Most tokens of a prompt that a reward model of ``max_length`` tokens can read with each of ``responses``.

    A scalar reward model reads prompt and response. A seq2seq one then reads ``request`` and the response again.
    """
    longest = max(len(response) for response in responses)
    return max_length - (longest if request is None else 2 * longest + len(request))


def readable_pairs(
    pairs: Sequence[TokenPair],
    max_length: int,
    config: DataConfig,
    *,
    request: Sequence[int] | None,
    first_id: int | None,
) -> tuple[list[TokenPair], ReadReport]:
    """The pairs whose two responses a reward model can score, with prompts cut to fit.

    Args:
      pairs: from ``tokenize_pairs``.
      max_length: most tokens that the model reads.
      config: ``max_bad_share``.
      request: from ``correction_request`` for a seq2seq reward model, None for a scalar one.
      first_id: the template's BOS (``templates.bos_id``), which stays where a prompt is cut.

    Raises:
      UserError: more bad pairs than ``max_bad_share``, or nothing left.
    """
    report = ReadReport(total=len(pairs))
    readable: list[TokenPair] = []
    for pair in pairs:
        max_prompt_tokens = max_scored_prompt_tokens(max_length, (pair.chosen, pair.rejected), request)
        if max_prompt_tokens < 1:
            needed = max_length - max_prompt_tokens + 1
            reason = f"a response too long for the {max_length} tokens of the model"
            report.add_bad(reason, pair.source, length=needed)
            continue
        count_cut(report, pair, max_prompt_tokens, first_id)
        prompt = cut_prompt(pair.prompt, max_prompt_tokens, first_id, pair.points)
        readable.append(replace(pair, prompt=prompt, points=pair.points if prompt is pair.prompt else None))
    report.used = len(readable)
    report.check(config.max_bad_share, config.eval_path or config.path)
    return readable, report


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def _empty_response(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[int] | None:
    try:
        return encode_response(tokenizer, "", template)
    except UserError:
        return None  # a template that wants a thought refuses it


def _as_preference(record: Record) -> PreferenceRecord:
    if isinstance(record, PreferenceRecord):
        return record
    raise UserError(
        f"{record.source}: a record without a chosen and a rejected response, but training learns from pairs; give "
        f"records with prompt, chosen and rejected, or name the schema, e.g. {flag('data.schema')}=preference"
    )


def _write_pair(tokenizer: "PreTrainedTokenizerBase", record: PreferenceRecord, template: str) -> list[Text]:
    """The texts of the prompt, the chosen and the rejected response."""
    if not (record.chosen.strip() and record.rejected.strip()):
        raise UserError("a response is empty")
    responses = [write_response(tokenizer, text, template) for text in (record.chosen, record.rejected)]
    return [write_prompt(tokenizer, record.prompt, template), *responses]


def _with_cut_points(
    chunk: Sequence[tuple[PreferenceRecord, TokenPair]], tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> list[TokenPair]:
    """The pairs, those that may have to be cut with the places where that can be."""
    long = [i for i, (_, pair) in enumerate(chunk) if _may_be_cut(pair, config.max_length)]
    prompts = [(record.prompt, pair.prompt) for record, pair in (chunk[i] for i in long)]
    points = dict(zip(long, cut_points(tokenizer, config.template, prompts), strict=True))
    return [replace(pair, points=points.get(i)) for i, (_, pair) in enumerate(chunk)]


def _may_be_cut(pair: TokenPair, max_length: int) -> bool:
    """Whether the prompt may have to be cut, in a comparison or in a mapping with a request of usual length."""
    prompt, chosen, rejected = (len(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))
    return max(2 * prompt + chosen + rejected, prompt + 2 * max(chosen, rejected) + _REQUEST) > max_length


def count_cut(report: ReadReport, pair: TokenPair, max_tokens: int, first_id: int | None) -> None:
    """Add a pair to the report's cut prompts, and to the cut heads, where ``max_tokens`` of its prompt stay."""
    report.cut_prompts += len(pair.prompt) > max_tokens
    report.cut_heads += not find_cut(pair.prompt, max_tokens, first_id, pair.points).keeps_head
