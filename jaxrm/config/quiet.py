"""Libraries below jaxrm explain themselves on stderr; what they say there helps no one who uses jaxrm."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Let absl show nothing, and transformers not advise to install torch.

    Orbax logs through absl. What it logs as an error, with a traceback, it raises as well. In a notebook without
    widgets, tqdm, which transformers imports, would warn that it draws bars as text.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="IProgress not found")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
