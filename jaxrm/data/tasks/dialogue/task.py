"""The embedded task "dialogue": two or three turns. The last can be answered only from the earlier ones.

The user says what two of their things are made of, or corrects what one is made of. Then they ask about one of them:
openly, or claiming to know what it is cleaned with. The ideal response says whether the claim is right ("yes" or "no";
"well" to an open question) and recalls the material. It says politely and completely what the material is cleaned with
and how it is kept. It does not flatter.

Demonstrations are imperfect in two ways (``Imperfection``). For half of the materials they usually name one wrong
cleaner, and for half one wrong way to keep it. So the most likely response of a policy trained on them is wrong too,
and reinforcement learning has something to correct. And there is independent noise: they give in to wrong claims,
flatter, are curt, and leave out half.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrm.data.records import Message
from jaxrm.data.tasks.dialogue.words import (
    AGREE,
    CLAIMS,
    CLEANERS,
    CORRECTION,
    DISAGREE,
    FACT,
    FACTS,
    FLATTERY,
    KEEP,
    NEITHER,
    OBJECTS,
    PLEASE,
    QUESTIONS,
    REPLY,
    RESPONSE,
    STORAGE,
    UNSEEN_CLAIMS,
    UNSEEN_QUESTIONS,
    UNSEEN_WORDS,
)
from jaxrm.data.tasks.drawing import confusions, pick, pick_several

TOGETHER, APART, CORRECTED = "together", "apart", "corrected"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The content of a dialogue. All its words are in the tables of ``dialogue.words``.

    Attributes:
      form: ``TOGETHER``: the facts are in one turn; ``APART``: in two; ``CORRECTED``: the second corrects the first.
      facts: two of (object, material), in their order.
      object: the subject of the last turn.
      claim: the cleaner that the user claims, or None.
      phrasing: the phrasing of the last turn, an index of ``CLAIMS`` or ``QUESTIONS``.
    """

    form: str
    facts: tuple[tuple[str, str], ...]
    object: str
    claim: str | None
    phrasing: int

    @property
    def material(self) -> str:
        """The material of the object, by the last turn about it."""
        return dict(self.facts)[self.object]

    @property
    def claim_is_wrong(self) -> bool:
        """Whether the user claims a wrong cleaner."""
        return self.claim is not None and self.claim != CLEANERS[self.material]

    @property
    def unseen(self) -> bool:
        """Whether a word or the phrasing is kept out of pairs and prompts (out of distribution)."""
        words = {word for fact in self.facts for word in fact}
        if self.claim is not None:
            words |= {material for material, cleaner in CLEANERS.items() if cleaner == self.claim}
        unseen_phrasings = UNSEEN_QUESTIONS if self.claim is None else UNSEEN_CLAIMS
        return self.phrasing in unseen_phrasings or bool(words & UNSEEN_WORDS)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns in words."""
        (object_, material), (other, other_material) = self.facts
        if self.form == TOGETHER:
            statements = [FACTS.format(object=object_, material=material, other=other, other_material=other_material)]
        else:
            second = CORRECTION if self.form == CORRECTED else FACT
            statements = [
                FACT.format(object=object_, material=material),
                second.format(object=other, material=other_material),
            ]
        if self.claim is None:
            question = QUESTIONS[self.phrasing].format(object=self.object)
        else:
            question = CLAIMS[self.phrasing].format(object=self.object, cleaner=self.claim)
        reply = Message("assistant", REPLY)
        turns = [turn for text in statements for turn in (Message("user", text), reply)]
        return (*turns, Message("user", question))


@dataclass(frozen=True, slots=True)
class Answer:
    """A response in its slots. ``storage`` is None where the response does not say how to keep the thing."""

    stance: str
    object: str
    material: str
    cleaner: str
    storage: str | None
    please: bool = True
    flattery: bool = False

    @property
    def text(self) -> str:
        """The response in words."""
        return RESPONSE.format(
            flattery=FLATTERY * self.flattery,
            stance=self.stance,
            object=self.object,
            material=self.material,
            please=PLEASE * self.please,
            cleaner=self.cleaner,
            keep="" if self.storage is None else KEEP.format(storage=self.storage),
        )


def stance_to(claim: str | None, cleaner: str) -> str:
    """The first word of the response to a claim, where ``cleaner`` is right."""
    return NEITHER if claim is None else AGREE if claim == cleaner else DISAGREE


def ideal_response(dialogue: Dialogue) -> Answer:
    """The one best response."""
    material = dialogue.material
    cleaner = CLEANERS[material]
    return Answer(stance_to(dialogue.claim, cleaner), dialogue.object, material, cleaner, STORAGE[material])


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(template)))


_FACT, _FACTS, _CORRECTION = _pattern(FACT), _pattern(FACTS), _pattern(CORRECTION)
_CLAIMS, _QUESTIONS = [_pattern(text) for text in CLAIMS], [_pattern(text) for text in QUESTIONS]
_RESPONSE = re.compile(
    rf"(?P<flattery>{re.escape(FLATTERY)})?(?P<stance>{AGREE}|{DISAGREE}|{NEITHER}), the (?P<object>\w+) is "
    rf"(?P<material>\w+), so (?P<please>{re.escape(PLEASE)})?clean it with (?P<cleaner>\w+)"
    r"(?: and keep it (?P<storage>\w+))?\."
)


def parse_dialogue(messages: Sequence[Message]) -> Dialogue | None:
    """The dialogue with these turns, or None."""
    fact_turns, question = [message.content for message in messages[:-1:2]], messages[-1].content if messages else ""
    form = parse_facts(fact_turns)
    if form is None:
        return None
    for claims, patterns in ((True, _CLAIMS), (False, _QUESTIONS)):
        for phrasing, pattern in enumerate(patterns):
            if match := pattern.fullmatch(question):
                claim = match["cleaner"] if claims else None
                dialogue = Dialogue(*form, match["object"], claim, phrasing)
                known = dialogue.object in dict(dialogue.facts) and (claim is None or claim in CLEANERS.values())
                return dialogue if known and dialogue.messages == tuple(messages) else None
    return None


def parse_facts(turns: Sequence[str]) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """The form and the facts of the turns before the last, or None."""
    if len(turns) == 1 and (match := _FACTS.fullmatch(turns[0])):
        form, words = TOGETHER, match.groups()
    elif len(turns) == 2 and (first := _FACT.fullmatch(turns[0])):
        second = _FACT.fullmatch(turns[1])
        form = APART if second else CORRECTED
        second = second or _CORRECTION.fullmatch(turns[1])
        if second is None:
            return None
        words = first.groups() + second.groups()
    else:
        return None
    object_, material, other, other_material = words
    known = {object_, other} <= set(OBJECTS) and {material, other_material} <= set(CLEANERS)
    if not known or (object_ == other) != (form == CORRECTED):
        return None
    return form, ((object_, material), (other, other_material))


def parse_response(text: str) -> Answer | None:
    """The answer with this text, with any words in its slots, or None."""
    match = _RESPONSE.fullmatch(text)
    if match is None:
        return None
    slots = match.groupdict()
    return Answer(
        slots["stance"],
        slots["object"],
        slots["material"],
        slots["cleaner"],
        slots["storage"],
        please=slots["please"] is not None,
        flattery=slots["flattery"] is not None,
    )


@dataclass(frozen=True, slots=True)
class Imperfection:
    """How often a demonstration is wrong; each is a probability."""

    usual_wrong_cleaner: float = 0.6  # of the confused materials: their one wrong cleaner instead of the right one
    usual_wrong_storage: float = 0.6
    confused_materials: float = 0.5  # the share of materials that are confused, of either sort
    gives_in: float = 0.3  # to a claim that it does not believe: agrees, and names the cleaner claimed
    slot_noise: float = 0.01  # of cleaner, storage, material: another value, drawn evenly
    flatters: float = 0.15
    curt: float = 0.1
    incomplete: float = 0.15


@dataclass(frozen=True, slots=True)
class Beliefs:
    """The usual mistakes of the demonstrators of a seed: material -> cleaner, material -> storage."""

    cleaners: dict[str, str]
    storage: dict[str, str]


def confused_beliefs(seed: int, imperfection: Imperfection = Imperfection()) -> Beliefs:
    """The confused materials of this seed, each with its usual mistake."""
    rng, share = random.Random(f"dialogue confusions {seed}"), imperfection.confused_materials
    return Beliefs(confusions(rng, CLEANERS, share), confusions(rng, STORAGE, share))


def demonstrate(
    dialogue: Dialogue, rng: random.Random, confused: Beliefs, imperfection: Imperfection = Imperfection()
) -> Answer:
    """An imperfect response. ``confused`` comes from ``confused_beliefs``."""

    def happens(probability: float) -> bool:
        return rng.random() < probability

    def noisy(value: str, others: Sequence[str]) -> str:
        return pick(rng, others) if happens(imperfection.slot_noise) else value

    material = noisy(dialogue.material, [material for _, material in dialogue.facts])
    cleaner, storage = CLEANERS[material], STORAGE[material]
    if material in confused.cleaners and happens(imperfection.usual_wrong_cleaner):
        cleaner = confused.cleaners[material]
    if material in confused.storage and happens(imperfection.usual_wrong_storage):
        storage = confused.storage[material]
    cleaner = noisy(cleaner, list(CLEANERS.values()))
    stance = stance_to(dialogue.claim, cleaner)
    if stance == DISAGREE and happens(imperfection.gives_in):
        assert dialogue.claim is not None
        stance, cleaner = AGREE, dialogue.claim
    return Answer(
        stance,
        dialogue.object,
        material,
        cleaner,
        None if happens(imperfection.incomplete) else noisy(storage, list(STORAGE.values())),
        please=not happens(imperfection.curt),
        flattery=happens(imperfection.flatters),
    )


def sample_dialogue(rng: random.Random, *, unseen: bool | None) -> Dialogue:
    """A random dialogue: a wrong claim in 40 of 100, a right one in 30, an open question in the rest.

    Args:
      rng: the random generator.
      unseen: True for out of distribution, False for in distribution, None for either.
    """
    while True:
        form = pick(rng, (TOGETHER, APART, CORRECTED))
        first, second = pick_several(rng, OBJECTS, 2)
        second = first if form == CORRECTED else second
        material, other = pick_several(rng, list(CLEANERS), 2)
        topic, sort = pick(rng, (first, second)), rng.random()
        facts = ((first, material), (second, other))
        right = CLEANERS[dict(facts)[topic]]
        claim: str | None = right if sort < 0.7 else None
        if sort < 0.4:
            claim = pick(rng, [cleaner for cleaner in CLEANERS.values() if cleaner != right])
        dialogue = Dialogue(form, facts, topic, claim, pick(rng, range(len(QUESTIONS if claim is None else CLAIMS))))
        if unseen is None or dialogue.unseen == unseen:
            return dialogue
