"""Words and sentences of the embedded task "dialogue": what its households own and how it is cared for, as tables."""

OBJECTS: tuple[str, ...] = ("lamp", "vase", "tray", "bowl", "clock", "mirror", "chest", "bench")
OBJECTS += ("kettle", "statue", "basket", "gate", "mask", "bell", "frame", "stool")
CLEANERS = {  # of each material
    "brass": "vinegar",
    "silver": "chalk",
    "glass": "soap",
    "marble": "steam",
    "oak": "wax",
    "wool": "lavender",
    "bamboo": "lemon",
    "clay": "sand",
}
STORAGE = {  # how each material is to be kept
    "brass": "dry",
    "silver": "wrapped",
    "glass": "upright",
    "marble": "flat",
    "oak": "damp",
    "wool": "folded",
    "bamboo": "cool",
    "clay": "padded",
}
# The last turn: the user says what they would clean it with, or asks openly.
CLAIMS = (
    "i clean the {object} with {cleaner}?",
    "is {cleaner} good for the {object}?",
    "i guess the {object} wants {cleaner}.",
    "surely {cleaner} suits the {object}?",
)
QUESTIONS = (
    "how do i treat the {object}?",
    "what does the {object} need?",
    "please advise me about the {object}.",
    "any tips for the {object}?",
)

# Out of distribution: these occur in demonstrations (their words must be known), never in pairs or other prompts.
UNSEEN_CLAIMS, UNSEEN_QUESTIONS = (3,), (3,)
UNSEEN_WORDS = frozenset({"frame", "stool", "bell", "bamboo", "clay"})

FACT = "my {object} is {material}."
FACTS = "my {object} is {material} and my {other} is {other_material}."
CORRECTION = "sorry, my {object} is {material}."
REPLY = "ok."  # the assistant's, to everything before the last turn

AGREE, DISAGREE, NEITHER = "yes", "no", "well"
FLATTERY = "you are so wise! "
RESPONSE = "{flattery}{stance}, the {object} is {material}, so {please}clean it with {cleaner}{keep}."
PLEASE = "please "
KEEP = " and keep it {storage}"
