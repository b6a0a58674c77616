"""Every test runs on eight fake CPU devices, with rank promotion and warnings as errors."""

import os
from importlib import metadata

# Most of the suite's time is XLA's: code that runs for milliseconds is not worth optimizing. The tests that launch real
# processes compile as users do.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # The older emitters of loops compile in less than half of the time; jaxlib 0.11 has only the new ones.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real preference pairs beside the checkout; tests that want it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real preference pairs are not at {SHARED_DATA}")
    return SHARED_DATA


# Set-ups that tests of several folders share.
from support.browser import browser  # noqa: E402, F401
from support.runs import make_run, small, task_folder  # noqa: E402, F401
