"""From preference pairs to the training examples of both kinds of reward model.

A seq2seq reward model learns two mappings between responses to a prompt x ("Sequence to Sequence Reward Modeling",
arXiv 2409.00162, section 3). The correction mapping is (x, rejected) -> chosen, the identity mapping is
(x, chosen) -> chosen. A scalar reward model learns to compare the two responses. Examples of both are joined from the
same token ids. So a response has the same tokens as source, as target, in a comparison and when it is scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from jaxrm.config.fields import above, at_least, bounded, check, finite, place, wrong
from jaxrm.data.config import DataConfig
from jaxrm.data.cutting import CutPoints, cut_points, cut_prompt, find_cut
from jaxrm.data.edits import copied_tokens
from jaxrm.data.examples import (
    ComparisonExample,
    MappingExample,
    MarkedComparisonExample,
    MarkedMappingExample,
    Progress,
    write_all,
)
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
from jaxrm.errors import UserError, flag, option

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


def mapping_examples(
    pairs: Sequence[TokenPair],
    request: Sequence[int],
    config: DataConfig,
    *,
    first_id: int | None,
    identity: bool = True,
    marks_edits: bool = False,
) -> tuple[list[MappingExample], ReadReport]:
    """Examples of a seq2seq reward model: prompt, source response and request; the target is the chosen response.

    Args:
      pairs: from ``tokenize_pairs``.
      request: from ``correction_request``.
      config: ``max_length``, ``too_long``, ``max_bad_share``.
      first_id: the template's BOS (``templates.bos_id``), which stays where a prompt is cut.
      identity: make the identity mapping too.
      marks_edits: make examples that know which of their targets are edits.

    Returns:
      Two examples a pair, of at most ``max_length`` tokens: the correction mapping, then the identity mapping. And the
      report, which counts pairs. A pair is bad where a mapping leaves no token for the prompt.

    Raises:
      UserError: a pair does not fit and ``too_long`` is "error"; more bad pairs than ``max_bad_share``, or none left.
    """
    request_ids = _array(request)
    report = ReadReport(total=len(pairs))
    examples: list[MappingExample] = []
    for pair in pairs:
        mappings = [(pair.rejected, True), (pair.chosen, False)][: 1 + identity]
        rests = [np.concatenate([source, request_ids, pair.chosen]) for source, _ in mappings]
        max_prompt_tokens = [config.max_length - len(rest) for rest in rests]
        if min(max_prompt_tokens) < 1:
            needed = config.max_length - min(max_prompt_tokens) + 1
            _add_too_long("source, request and target", needed, pair, config, report)
            continue
        for rest, max_tokens, (_, is_correction) in zip(rests, max_prompt_tokens, mappings, strict=True):
            tokens = np.concatenate([cut_prompt(pair.prompt, max_tokens, first_id, pair.points), rest])
            loss_mask = np.arange(len(tokens)) >= len(tokens) - len(pair.chosen)
            if marks_edits:
                is_edit = np.zeros(len(tokens), bool)
                if is_correction:
                    is_edit[loss_mask] = ~copied_tokens(pair.chosen, pair.rejected)
                examples.append(MarkedMappingExample(tokens, loss_mask, pair.source, is_correction, is_edit))
            else:
                examples.append(MappingExample(tokens, loss_mask, pair.source, is_correction))
        _count_cut(report, pair, min(max_prompt_tokens), first_id)
        report.used += 1
    report.check(config.max_bad_share, config.path)
    return examples, report


def comparison_examples(
    pairs: Sequence[TokenPair], config: DataConfig, *, first_id: int | None
) -> tuple[list[ComparisonExample], ReadReport]:
    """Examples of a scalar reward model: prompt and chosen response, then prompt and rejected response.

    Both sides have the same prompt. Where the pair is longer than a row, it is cut alike on both sides.

    Args:
      pairs: from ``tokenize_pairs``.
      config: ``max_length``, ``too_long``, ``max_bad_share``.
      first_id: the template's BOS (``templates.bos_id``), which stays where a prompt is cut.

    Returns:
      One example a pair, of at most ``max_length`` tokens, and the report. A pair is bad where its responses leave no
      token for the prompt.

    Raises:
      UserError: a pair does not fit and ``too_long`` is "error"; more bad pairs than ``max_bad_share``, or none left.
    """
    marked, report = marked_comparison_examples(pairs, config, first_id=first_id)
    return [ComparisonExample(each.tokens, each.chosen_length, each.source) for each in marked], report


def marked_comparison_examples(
    pairs: Sequence[TokenPair], config: DataConfig, *, first_id: int | None
) -> tuple[list[MarkedComparisonExample], ReadReport]:
    """`comparison_examples` that know which tokens are those of the responses; arguments and errors are the same."""
    report = ReadReport(total=len(pairs))
    examples: list[MarkedComparisonExample] = []
    for pair in pairs:
        responses = len(pair.chosen) + len(pair.rejected)
        max_prompt_tokens = (config.max_length - responses) // 2
        if max_prompt_tokens < 1:
            _add_too_long("the two responses", responses + 2, pair, config, report)
            continue
        prompt = cut_prompt(pair.prompt, max_prompt_tokens, first_id, pair.points)
        tokens = np.concatenate([prompt, pair.chosen, prompt, pair.rejected])
        lengths = (len(pair.chosen), len(pair.rejected))
        examples.append(MarkedComparisonExample(tokens, len(prompt) + len(pair.chosen), pair.source, lengths))
        _count_cut(report, pair, max_prompt_tokens, first_id)
    report.used = len(examples)
    report.check(config.max_bad_share, config.path)
    return examples, report


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
        _count_cut(report, pair, max_prompt_tokens, first_id)
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


def _count_cut(report: ReadReport, pair: TokenPair, max_tokens: int, first_id: int | None) -> None:
    report.cut_prompts += len(pair.prompt) > max_tokens
    report.cut_heads += not find_cut(pair.prompt, max_tokens, first_id, pair.points).keeps_head


def _add_too_long(what: str, needed: int, pair: TokenPair, config: DataConfig, report: ReadReport) -> None:
    if config.too_long == "error":
        raise UserError(
            f"{pair.source}: {what} and one token of the prompt take {needed} tokens, but a row has "
            f"{config.max_length}; e.g. {flag('data.max_length')}={needed}, or {flag('data.too_long')}=drop"
        )
    report.add_bad(f"{what} longer than {option('data.max_length')} {config.max_length}", pair.source, length=needed)
