"""From preference pairs to the training examples of both kinds of reward model.

A seq2seq reward model learns two mappings between responses to a prompt x ("Sequence to Sequence Reward Modeling",
arXiv 2409.00162, section 3). The correction mapping is (x, rejected) -> chosen, the identity mapping is
(x, chosen) -> chosen. A scalar reward model learns to compare the two responses.
"""

from collections.abc import Sequence

import numpy as np

from jaxrm.data.config import DataConfig
from jaxrm.data.cutting import cut_prompt
from jaxrm.data.edits import copied_tokens
from jaxrm.data.examples import ComparisonExample, MappingExample, MarkedComparisonExample, MarkedMappingExample
from jaxrm.data.pairs import TokenPair, count_cut
from jaxrm.data.readers import ReadReport
from jaxrm.errors import UserError, flag, option


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
      pairs: from `jaxrm.data.pairs.tokenize_pairs`.
      request: from `jaxrm.data.pairs.correction_request`.
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
    request_ids = np.array(request, np.int32)
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
        count_cut(report, pair, min(max_prompt_tokens), first_id)
        report.used += 1
    report.check(config.max_bad_share, config.path)
    return examples, report


def comparison_examples(
    pairs: Sequence[TokenPair], config: DataConfig, *, first_id: int | None
) -> tuple[list[ComparisonExample], ReadReport]:
    """Examples of a scalar reward model: prompt and chosen response, then prompt and rejected response.

    Both sides have the same prompt. Where the pair is longer than a row, it is cut alike on both sides.

    Args:
      pairs: from `jaxrm.data.pairs.tokenize_pairs`.
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
        count_cut(report, pair, max_prompt_tokens, first_id)
    report.used = len(examples)
    report.check(config.max_bad_share, config.path)
    return examples, report


def _add_too_long(what: str, needed: int, pair: TokenPair, config: DataConfig, report: ReadReport) -> None:
    if config.too_long == "error":
        raise UserError(
            f"{pair.source}: {what} and one token of the prompt take {needed} tokens, but a row has "
            f"{config.max_length}; e.g. {flag('data.max_length')}={needed}, or {flag('data.too_long')}=drop"
        )
    report.add_bad(f"{what} longer than {option('data.max_length')} {config.max_length}", pair.source, length=needed)
