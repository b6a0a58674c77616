"""Refusals told by phrases, against answers that were labeled by hand."""

import pytest

from jaxrm.evaluation.refusals import is_refusal, labeled_answers, measured_errors


def test_precision_and_recall_on_labeled_answers():
    """Refusals in many words, partial help, and answers that only mention a refusal.

    The phrases were made from the first answers, which say nothing of others. The second ones are held out.
    """
    seen, held_out = labeled_answers(held_out=False), labeled_answers(held_out=True)
    assert len(seen) >= 200 and sum(label for label, _ in seen) >= 100
    assert [text for label, text in seen if is_refusal(text) != label] == []
    precision, recall, count = measured_errors()
    assert count == len(held_out) >= 110 and not {text for _, text in seen} & {text for _, text in held_out}
    assert precision >= 0.95 and recall >= 0.80, [text for label, text in held_out if is_refusal(text) != label]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("I can’t help with that.", True),  # the typographic apostrophe
        ("I can't help with that.\n\nHere is how: first heat the oil, then add the salt.", False),
        ('She told him: "I can\'t help you." Then the door closed, and the rain began.', False),
        ("i am sorry , i can not do that .", True),
        ("I can't find a mistake. The proof is right.", False),
    ],
)
def test_a_refusal_gives_nothing_of_what_was_asked(text, expected):
    assert is_refusal(text) is expected
