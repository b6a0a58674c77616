"""Words and sentences of the embedded task "summarize": what its notes are made of, as tables."""

IMPORTANT = ("urgent", "vital", "crucial", "critical", "essential", "serious")
UNIMPORTANT = ("trivial", "minor", "optional", "idle", "casual", "spare")
ITEMS: tuple[str, ...] = ("invoice", "budget", "contract", "meeting", "delivery", "repair", "survey", "training")
ITEMS += ("flight", "visa", "menu", "poster", "booking", "lease", "archive", "server")
ITEMS += ("canteen", "parking", "payroll", "audit", "garden", "printer", "website", "warehouse")

# Out of distribution: these occur in demonstrations (their words must be known), never in pairs or other prompts.
UNSEEN_WORDS = frozenset({"serious", "spare", "garden", "printer", "website", "warehouse"})

# No colon: the decoder would put a space before it, and text has to come back as it was. No commas, which are a third
# of the tokens and teach a small model nothing.
PROMPT = "what matters? {notes}."
REPEAT = "repeat all! {notes}."
NOTE = "{marker} {item}"  # several are put one after another
RESPONSE = "do {notes}."
