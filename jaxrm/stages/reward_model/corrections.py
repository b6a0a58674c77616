"""How good the corrections of held-out pairs are: the table that a seq2seq reward model's run ends with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrm.data.pairs import TokenPair
from jaxrm.data.prompts import transcript
from jaxrm.data.records import PreferenceRecord
from jaxrm.evaluation.corrections import CorrectionQuality, correction_quality
from jaxrm.inference.corrections import Corrector
from jaxrm.runtime.progress import print_table
from jaxrm.stages.judge import judge_response

_LABELS = {
    "ended": "share that ended within the tokens allowed",
    "changed": "share that differ from their source",
    "distance_to_source": "edit distance to the source, tokens",
    "distance_to_chosen": "edit distance to chosen, tokens",
    "source_to_chosen": "  of the source itself",
    "rouge_l_to_chosen": "ROUGE-L to chosen",
    "source_rouge_l": "  of the source itself",
    "judge_gain": "the judge's gain over the source",
}


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
    quality: dict[str, CorrectionQuality] = {}
    for side in ("rejected", "chosen"):
        sources = [getattr(pair, side) for pair in pairs]
        before, after = ([corrector.text(tokens) for tokens in side_of] for side_of in (sources, written[side]))
        gains = None
        if judge is not None:
            gains = [
                judge_response(judge, record, new) - judge_response(judge, record, old)
                for record, old, new in zip(texts, before, after, strict=True)
            ]
        quality[side] = correction_quality(
            sources,
            written[side],
            [pair.chosen for pair in pairs],
            source_texts=before,
            correction_texts=after,
            chosen_texts=[corrector.text(pair.chosen) for pair in pairs],
            judge_gains=gains,
        )
    ends = corrector.model.end_ids(corrector.tokenizer, corrector.template)
    ended = {side: np.mean([len(x) > 0 and int(x[-1]) in ends for x in written[side]]) for side in quality}
    numbers = {side: {**dataclasses.asdict(one), "ended": float(ended[side])} for side, one in quality.items()}
    print_table(
        f"Greedy corrections of {len(pairs)} held-out pairs",
        ["", "of rejected", "of chosen"],
        [[text, numbers["rejected"][name], numbers["chosen"][name]] for name, text in _LABELS.items()],
    )
    for pair, record, correction in list(zip(pairs, texts, written["rejected"], strict=True))[:samples]:
        print(
            f"prompt      {transcript(record.prompt)}\nrejected    {corrector.text(pair.rejected)}\n"
            f"correction  {corrector.text(correction)}\n"
        )
    return numbers
