"""What a run says when the disk refuses a file: what failed, what is saved, what to do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxrm.errors import StorageError, UserError
from jaxrm.storage import failure_of


@contextlib.contextmanager
def disk_errors(what: str, checkpoints: Path) -> Iterator[None]:
    """Make one line of whatever a library raises where the disk refuses a file; other errors pass.

    Args:
      what: happened, e.g. ``the run stopped``.
      checkpoints: folder of the run's checkpoints.

    Raises:
      StorageError: naming the last good checkpoint.
    """
    try:
        yield
    except (StorageError, UserError):
        raise
    except Exception as error:
        reason = failure_of(error)
        if reason is None:
            raise
        raise StorageError(f"{what} ({reason}); {advice(checkpoints)}") from error


def advice(checkpoints: Path) -> str:
    """What is saved in a folder of checkpoints, and what to do when the disk refuses more."""
    with contextlib.suppress(OSError):
        steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
        if steps:
            return (
                f"the last good checkpoint is {checkpoints / str(steps[-1])}; make room or mend the disk and give the "
                "same command again, which continues from there"
            )
    return "no checkpoint is saved yet; make room or mend the disk and give the same command again"
