"""Libraries below jaxrm explain themselves on stderr; what they say there helps no one who uses jaxrm."""

import logging
import os
import sys
import warnings


def silence_libraries() -> None:
    """Let absl show nothing, and transformers not advise to install torch.

    Orbax logs through absl. What it logs as an error, with a traceback, it raises as well. In a notebook without
    widgets, tqdm, which transformers imports, would warn that it draws bars as text.
    """
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_closed_loops
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="IProgress not found")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def silence_shutdown() -> None:
    """Show nothing of what threads that were left in the middle of a write run into when the interpreter ends."""
    sys.unraisablehook = lambda _: None


def _without_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
    """Print what nobody could catch, except that tensorstore finds a loop closed after a write that failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
