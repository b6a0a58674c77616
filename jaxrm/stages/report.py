"""What a run says when it is done."""

from jaxrm.runtime.metrics import read_rows
from jaxrm.runtime.progress import print_table
from jaxrm.runtime.run_folder import RunFolder


def print_held_out(folder: RunFolder) -> None:
    """Table of the held-out metrics before and after, from the rows of the run, whichever launch wrote them."""
    rows = [row for row in read_rows(folder.metrics) if any(name.startswith("eval_") for name in row)]
    if not rows:
        return
    before, after = rows[0], rows[-1]
    names = [name for name in before if name.startswith("eval_") and "/" not in name]
    print_table(
        "Held-out data",
        ["", f"step {before['step']}", f"step {after['step']}"],
        [[name.removeprefix("eval_"), float(before[name]), float(after[name])] for name in names],
    )
