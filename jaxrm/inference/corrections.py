"""What a seq2seq reward model writes when it is asked: greedy corrections of responses, and how good they are."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxrm.data import tasks
from jaxrm.data.pairs import TokenPair, cut_prompt
from jaxrm.data.prompts import transcript
from jaxrm.data.records import PreferenceRecord
from jaxrm.data.templates import bos_id, end_ids
from jaxrm.errors import UserError, flag, option
from jaxrm.evaluation.corrections import CorrectionQuality, correction_quality
from jaxrm.inference.sampler import Sampler
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models.config import ModelConfig
from jaxrm.models.generate import SamplingConfig
from jaxrm.runtime.progress import Progress, print_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 32  # corrections written at once


@dataclass(frozen=True)
class Corrector:
    """A seq2seq reward model that can be asked for corrections.

    Attributes:
      model: the decoder.
      params: its parameters.
      tokenizer: of the model.
      template: chat template, as in ``config.data.template``.
      request: ids that ask for the correction.
      max_new_tokens: longest correction.
    """

    model: ShardedModel
    params: Any
    tokenizer: "PreTrainedTokenizerBase"
    template: str
    request: tuple[int, ...]
    max_new_tokens: int

    def correct(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, show_progress: bool
    ) -> list[np.ndarray]:
        """Token ids of the greedy correction of each response; prompts are cut on the left where they must be.

        Raises:
          UserError: where the model cannot read a response and the longest correction.
        """
        sources = [f"responses[{i}]" for i in range(len(responses))]
        check_room(self.model.config, self.request, self.max_new_tokens, responses, sources, field="--max_new_tokens")
        sampling = SamplingConfig(max_new_tokens=self.max_new_tokens, temperature=0.0)
        responder = Sampler(self.model, self.params, self.tokenizer, self.template, sampling)
        first_id = bos_id(self.tokenizer, self.template)
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            rest = len(response) + len(self.request) + self.max_new_tokens
            room = self.model.config.max_position - rest
            rows.append([*cut_prompt(prompt, room, first_id), *response, *self.request])
        written: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with Progress("correct", len(rows), unit="responses", enabled=show_progress) as progress:
            for start in range(0, len(order), _ROWS):
                indices = order[start : start + _ROWS]
                found = responder.continue_ids([rows[i] for i in indices], jax.random.key(0))
                for i, correction in zip(indices, found, strict=True):
                    written[i] = correction
                progress.update(start + len(indices))
        return written

    def correct_pairs(self, pairs: Sequence[TokenPair], *, show_progress: bool) -> dict[str, list[np.ndarray]]:
        """Greedy corrections of both responses of pairs, ``{"chosen": ..., "rejected": ...}``; errors as `correct`."""
        prompts = [pair.prompt for pair in pairs]
        responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        written = self.correct(prompts * 2, responses, show_progress=show_progress)
        return {"chosen": written[: len(pairs)], "rejected": written[len(pairs) :]}

    def text(self, tokens: np.ndarray) -> str:
        """A response or correction as text."""
        ends = self.tokenizer.all_special_ids
        return str(self.tokenizer.decode([int(t) for t in tokens if int(t) not in ends])).strip()


def check_room(
    model: ModelConfig,
    request: Sequence[int],
    max_new_tokens: int,
    responses: Sequence[np.ndarray],
    sources: Sequence[str],
    *,
    field: str,
) -> None:
    """Refuse corrections that the model cannot write behind a response, the request and a token of the prompt.

    Args:
      model: whose positions they share.
      request: ids that ask for the correction.
      max_new_tokens: longest correction.
      responses: token ids of what is corrected; each can be read by itself.
      sources: where each response is from, for the message.
      field: that says ``max_new_tokens``, for the message.
    """
    longest = max(range(len(responses)), key=lambda i: len(responses[i]), default=None)
    if longest is None:
        return
    most = model.max_position - 1 - len(request) - len(responses[longest])
    if max_new_tokens > most:
        advice = f"e.g. {flag(field)}={most}" if most >= 1 else "give shorter responses"
        raise UserError(
            f"{option(field)} is {max_new_tokens}, but the model reads {model.max_position} tokens: a token of the "
            f"prompt, "
            f"{len(responses[longest])} of the longest response ({sources[longest]}) and {len(request)} that ask for "
            f"its correction leave {max(most, 0)}; {advice}"
        )


def check_judge(judge: str | None, records: Sequence[PreferenceRecord] = ()) -> None:
    """Refuse ``config.evaluation.judge`` where it names no embedded task, or cannot judge responses to ``records``."""
    if judge is None:
        return
    if judge.removeprefix(tasks.PREFIX) not in tasks.TASKS:
        known = ", ".join(f"{tasks.PREFIX}{task}" for task in tasks.TASKS)
        raise UserError(
            f"{option('evaluation.judge')} is {judge!r}; there is a judge for {known}; "
            f"e.g. {flag('evaluation.judge')}={tasks.PREFIX}{tasks.TASKS[0]}, or =None"
        )
    for record in records:
        try:
            judge_response(judge, record, record.chosen)
        except UserError as error:
            raise UserError(
                f"{option('evaluation.judge')} is {judge!r}, but {record.source} has no prompt of that task; judge "
                f"nothing, "
                f"{flag('evaluation.judge')}=None, or give the task's data, e.g. {flag('data.path')}={judge}"
            ) from error


def judge_response(judge: str, record: PreferenceRecord, response: str) -> float:
    """Exact utility of a response to a record's prompt."""
    return tasks.judge(judge.removeprefix(tasks.PREFIX), record.prompt, response)


def judge_pairs(judge: str, records: Sequence[PreferenceRecord]) -> np.ndarray:
    """Exact utilities ``[2, N]`` of the chosen and the rejected response of each record."""
    sides = ([getattr(record, side) for record in records] for side in ("chosen", "rejected"))
    return np.array([[judge_response(judge, *pair) for pair in zip(records, side, strict=True)] for side in sides])


def print_corrections(
    corrector: Corrector,
    pairs: Sequence[TokenPair],
    written: Mapping[str, Sequence[np.ndarray]],
    records: Mapping[str, PreferenceRecord],
    *,
    judge: str | None,
    samples: int,
) -> dict[str, dict[str, Any]]:
    """Print how good the corrections of pairs are, and a few of them; returns the table's numbers.

    Args:
      corrector: the reward model.
      pairs: held-out pairs.
      written: from `Corrector.correct_pairs`.
      records: the pairs as text, by source.
      judge: embedded task whose judge says what corrections gain, or None.
      samples: how many corrections of rejected responses to print.
    """
    texts = [records[pair.source] for pair in pairs]
    found: dict[str, CorrectionQuality] = {}
    for side in ("rejected", "chosen"):
        sources = [getattr(pair, side) for pair in pairs]
        before, after = ([corrector.text(tokens) for tokens in side_of] for side_of in (sources, written[side]))
        gains = None
        if judge is not None:
            gains = [
                judge_response(judge, record, new) - judge_response(judge, record, old)
                for record, old, new in zip(texts, before, after, strict=True)
            ]
        found[side] = correction_quality(
            sources,
            written[side],
            [pair.chosen for pair in pairs],
            source_texts=before,
            correction_texts=after,
            chosen_texts=[corrector.text(pair.chosen) for pair in pairs],
            judge_gains=gains,
        )
    ends = end_ids(corrector.tokenizer, corrector.template)
    ended = {side: np.mean([len(x) > 0 and int(x[-1]) in ends for x in written[side]]) for side in found}
    numbers = {side: {**dataclasses.asdict(of), "ended": float(ended[side])} for side, of in found.items()}
    said = {
        "ended": "share that ended within the tokens allowed",
        "changed": "share that differ from their source",
        "distance_to_source": "edit distance to the source, tokens",
        "distance_to_chosen": "edit distance to chosen, tokens",
        "source_to_chosen": "  of the source itself",
        "rouge_l_to_chosen": "ROUGE-L to chosen",
        "source_rouge_l": "  of the source itself",
        "judge_gain": "the judge's gain over the source",
    }
    print_table(
        f"Greedy corrections of {len(pairs)} held-out pairs",
        ["", "of rejected", "of chosen"],
        [[text, numbers["rejected"][name], numbers["chosen"][name]] for name, text in said.items()],
    )
    for pair, record, correction in list(zip(pairs, texts, written["rejected"], strict=True))[:samples]:
        print(
            f"prompt      {transcript(record.prompt)}\nrejected    {corrector.text(pair.rejected)}\n"
            f"correction  {corrector.text(correction)}\n"
        )
    return numbers
