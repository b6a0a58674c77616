"""Embedded tasks: small worlds in plain English, generated from a seed, that need no download.

A task is written to a folder as the files that any other data set has (JSONL records and a tokenizer in
Hugging Face form), and the ordinary readers take it from there; nothing above this package knows that the
text was generated. `config.data.path = "task:safety"` names one.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from jaxrm.errors import UserError

TASKS = ("safety",)


def write_task(name: str, folder: str | Path, *, seed: int) -> None:
    """Writes the embedded task `name` into `folder`; the same seed gives the same bytes.

    The folder then holds `train.jsonl` and `heldout.jsonl` (demonstrations as chat messages), `prompts.jsonl`
    (prompts alone), `pairs.jsonl` (prompt, chosen, rejected) and `tokenizer/`. No two of these files share a
    prompt. Files that are already there under these names are replaced, each atomically.

    Raises:
      UserError: there is no task of this name; the message lists those there are.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        meant = f"; did you mean task:{close[0]}?" if close else ""
        known = ", ".join(f"task:{task}" for task in TASKS)
        raise UserError(f"config.data.path: there is no embedded task {name!r}; there are: {known}{meant}")

    from jaxrm.data.tasks import safety

    safety.write(Path(folder), seed=seed)
