"""Libraries below jaxrm explain themselves on stderr; what they say there helps no one who uses jaxrm."""

import logging
import os


def silence_libraries() -> None:
    """Let absl (Orbax logs through it) show errors only, and transformers not advise to install torch."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
