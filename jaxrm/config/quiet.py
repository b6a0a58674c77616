"""Libraries below jaxrm explain themselves on stderr; what they say there helps no one who uses jaxrm."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Let absl (Orbax logs through it) show errors only, and transformers not advise to install torch.

    In a notebook without widgets, tqdm, which transformers imports, would warn that it draws bars as text.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="IProgress not found")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
