"""The prompt of a row in all its columns: nothing that belongs to it is lost, and what cannot be read is refused."""

import pytest

from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, PromptRecord
from jaxrm.data.schemas import BadRecordError, parse, recognize

SYSTEM = Message("system", "answer in French")
EARLIER = (Message("user", "hi"), Message("assistant", "salut"))
ASKED = Message("user", "why?")
WRITTEN = {"role": "system", "content": "answer in French"}
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "why?"), ("assistant", "oui"), ("assistant", "no")))
EARLY, REPLY = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "salut")))
HH_FIRST = "\n\nHuman: hi\n\nAssistant:"
HH = "\n\nHuman: why?\n\nAssistant:"
HH_TWO = "\n\nHuman: hi\n\nAssistant: salut\n\nHuman: why?\n\nAssistant:"
ALPACA = {"instruction": "why?", "input": "", "output": "oui"}
PAIR = {"prompt": "why?", "chosen": "oui", "rejected": "no"}
PKU = {"prompt": "why?", "response_0": "oui", "response_1": "no", "better_response_id": 0}


def read(fields):
    return parse(recognize(fields), fields, "f:1", "better_response_id")


def pair(*prompt):
    return PreferenceRecord(prompt, "oui", "no", "f:1")


def demonstration(*prompt):
    return DemonstrationRecord((*prompt, Message("assistant", "oui")), "f:1")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({**ALPACA, "system": "answer in French"}, demonstration(SYSTEM, ASKED)),
        ({**ALPACA, "history": [["hi", "salut"]]}, demonstration(*EARLIER, ASKED)),
        (
            {**ALPACA, "system": "answer in French", "history": [["hi", "salut"]]},
            demonstration(SYSTEM, *EARLIER, ASKED),
        ),
        ({**ALPACA, "system": "", "history": []}, demonstration(ASKED)),
        ({**ALPACA, "system": None, "history": None}, demonstration(ASKED)),
        ({"instruction": "why?", "response": "oui", "context": ""}, demonstration(ASKED)),
        ({"prompt": "why?", "completion": "oui", "system_prompt": "answer in French"}, demonstration(SYSTEM, ASKED)),
        ({"messages": [USER, GOOD], "system": "answer in French"}, demonstration(SYSTEM, ASKED)),
        ({"messages": [WRITTEN, USER, GOOD], "system": "answer in French"}, demonstration(SYSTEM, ASKED)),
        ({"messages": [USER, GOOD], "prompt": "why?"}, demonstration(ASKED)),
        ({**PAIR, "system": "answer in French"}, pair(SYSTEM, ASKED)),
        (
            {**PAIR, "history": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "salut"}]},
            pair(*EARLIER, ASKED),
        ),
        ({**PKU, "system": "answer in French"}, pair(SYSTEM, ASKED)),
        (
            {"prompt": [WRITTEN, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            pair(SYSTEM, ASKED),
        ),
        ({"prompt": [WRITTEN], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, pair(SYSTEM, ASKED)),
        ({"prompt": "why?", "chosen": [WRITTEN, USER, GOOD], "rejected": [WRITTEN, USER, BAD]}, pair(SYSTEM, ASKED)),
        (
            {"prompt": [EARLY, REPLY, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            pair(*EARLIER, ASKED),
        ),
        (
            {"prompt": [WRITTEN, EARLY, REPLY, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            pair(SYSTEM, *EARLIER, ASKED),
        ),
        (
            {
                "prompt": "hi",
                "chosen": [WRITTEN, EARLY, REPLY, USER, GOOD],
                "rejected": [WRITTEN, EARLY, REPLY, USER, BAD],
            },
            pair(SYSTEM, *EARLIER, ASKED),
        ),
        ({**PAIR, "history": [WRITTEN, EARLY, REPLY]}, pair(SYSTEM, *EARLIER, ASKED)),
        ({**PAIR, "history": [WRITTEN, EARLY, REPLY], "system": "answer  in French"}, pair(SYSTEM, *EARLIER, ASKED)),
        (
            {"messages": [WRITTEN, USER, GOOD], "history": [WRITTEN, EARLY, REPLY]},
            demonstration(SYSTEM, *EARLIER, ASKED),
        ),
        ({"system": "answer in French", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, pair(SYSTEM, ASKED)),
        ({"chosen": HH + " oui", "rejected": HH + " no", "system": "answer in French"}, pair(SYSTEM, ASKED)),
        ({"prompt": "why?", "system": "answer in French"}, PromptRecord((SYSTEM, ASKED), "f:1")),
    ],
)
def test_context_in_columns_of_its_own_is_part_of_the_prompt(fields, expected):
    assert read(fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": HH, "chosen": HH + " oui", "rejected": HH + " no"}, pair(ASKED)),
        ({"prompt": HH, "chosen": " oui", "rejected": " no"}, pair(ASKED)),
        ({"prompt": HH, "chosen": "\n\nAssistant: oui", "rejected": "Assistant: no"}, pair(ASKED)),
        ({"prompt": "why?", "chosen": HH + " oui", "rejected": HH + " no"}, pair(ASKED)),
        ({"prompt": HH_TWO, "chosen": HH_TWO + " oui", "rejected": HH_TWO + " no"}, pair(*EARLIER, ASKED)),
        ({"prompt": "why?", "chosen": HH_TWO + " oui", "rejected": HH_TWO + " no"}, pair(*EARLIER, ASKED)),
        ({"prompt": HH_TWO, "response": "oui"}, demonstration(*EARLIER, ASKED)),
        ({"prompt": HH_TWO, "response": HH_TWO + " oui"}, demonstration(*EARLIER, ASKED)),
        ({"prompt": HH_TWO}, PromptRecord((*EARLIER, ASKED), "f:1")),
        ({"prompt": "Human: why?"}, PromptRecord((ASKED,), "f:1")),
    ],
)
def test_transcripts_beside_a_prompt_become_turns(fields, expected):
    """No label of a turn is left in the text of a prompt or a response."""
    assert read(fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"system": "", "question": "why?", "chosen": "oui", "rejected": "no"}, pair(ASKED)),
        ({"system": "answer in French", "question": "why?", "chosen": "oui", "rejected": "no"}, pair(SYSTEM, ASKED)),
        (
            {"instruction": "why?", "input": "this", "chosen": "oui", "rejected": "no"},
            pair(Message("user", "why?\n\nthis")),
        ),
        (
            {"instruction": "why?", "prompt": "Q: why?\nA:", "response": "oui"},
            demonstration(Message("user", "Q: why?\nA:")),
        ),
        ({"instruction": "why?", "prompt": "why?", "response": "oui"}, demonstration(ASKED)),
        ({"instruction": "why?", "output": "oui", "response": "oui"}, demonstration(ASKED)),
    ],
)
def test_the_prompt_is_found_under_each_of_its_names(fields, expected):
    assert read(fields) == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"instruction": "be brief", "prompt": "why?", "response": "oui"}, "'prompt' and 'instruction' are different"),
        ({**ALPACA, "response": "non"}, "'response' and 'output' are different responses"),
        ({**PAIR, "input": "this text"}, "'input' is not read by its schema; put it into the prompt"),
        ({**PAIR, "context": "a page"}, "'context' is not read"),
        ({"instruction": "why?", "response": "oui", "context": "a page"}, "'context' is not read"),
        ({**PAIR, "documents": [{"text": "a page"}]}, "'documents' is not read"),
        ({**PAIR, "images": [{"bytes": "x"}]}, "'images' is given, which jaxrm does not read"),
        ({"messages": [USER, GOOD], "tools": [{"name": "search"}]}, "'tools' is given"),
        ({"messages": [USER, GOOD], "prompt": "when?"}, "'prompt' is not read"),
        ({"messages": [WRITTEN, USER, GOOD], "system": "answer in German"}, "two different system texts"),
        ({**PAIR, "system": 3}, "'system' is not text"),
        ({**PAIR, "history": "hi salut"}, "'history' is not a list"),
        ({**PAIR, "history": [["hi"]]}, "'history' is not a list"),
        ({**PAIR, "history": [["hi", None]]}, "missing field 'history'"),
        ({"prompt": "when?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "'prompt' is another"),
        ({"prompt": "when?", "chosen": HH + " oui", "rejected": HH + " no"}, "'prompt' is another"),
        (
            {"prompt": [EARLY, REPLY, USER], "chosen": [EARLY, GOOD], "rejected": [EARLY, BAD]},
            "'prompt' is another",
        ),
        ({"prompt": HH_TWO, "chosen": HH_FIRST + " oui", "rejected": HH_FIRST + " no"}, "'prompt' is another"),
        ({"prompt": "why", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "'prompt' is another"),
        ({"prompt": "salut", "chosen": HH_TWO + " oui", "rejected": HH_TWO + " no"}, "'prompt' is another"),
        (
            {"prompt": "when?", "completion": [WRITTEN, {"role": "user", "content": "when? why?"}, GOOD]},
            "'prompt' is another",
        ),
        ({**PAIR, "history": [WRITTEN, EARLY, REPLY], "system": "answer in German"}, "two different system texts"),
        ({**PAIR, "history": [EARLY, WRITTEN, REPLY], "system": "answer in German"}, "two different system texts"),
        ({"messages": [{**WRITTEN, "content": "no"}, USER, GOOD], "history": [WRITTEN, EARLY, REPLY]}, "two different"),
        ({"prompt": HH, "chosen": HH + " oui", "rejected": " no"}, "differ before the last turn"),
        ({"prompt": HH, "chosen": " oui\n\nHuman: and?", "rejected": " no"}, "'chosen' goes on with further turns"),
        ({"prompt": HH + " oui"}, "the prompt ends with the assistant"),
        ({"prompt": "\n\nHuman:\n\nAssistant:"}, "a turn of the transcript is empty"),
    ],
)
def test_what_has_two_meanings_is_refused_with_its_field(fields, reason):
    with pytest.raises(BadRecordError, match=reason):
        read(fields)


def test_common_columns_without_meaning_stay_quiet():
    harmless = {
        "id": 7,
        "source": "web",
        "score": 0.5,
        "category": "how",
        "subset": "a",
        "reference": "a text",
        "tools": "[]",
    }
    assert read({**PAIR, **harmless, "images": [], "input": " ", "context": float("nan")}) == pair(ASKED)
