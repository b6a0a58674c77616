"""Every test runs on eight fake CPU devices, with rank promotion and warnings as errors.

Workers of pytest-xdist have a core each, and everything that is compiled comes from one cache on disk, which the
processes that tests start share. Both are set before JAX starts.
"""

import os
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# One core a worker: XLA makes its threads for the cores that it may use, and two workers with threads for all of them
# take each other's time.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if _worker.isdecimal() and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker) % len(_cores)]})

# Kept between launches, in a folder that git ignores; it may be deleted at any time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Most of the suite's time is XLA's: code that runs for milliseconds is not worth optimizing. The tests that launch real
# processes compile as users do.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # The older emitters of loops compile in less than half of the time; jaxlib 0.11 has only the new ones.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# A collective blocks a thread of XLA's pool until all devices are at it, and a device is at several at once where loops
# do not depend on each other. With a thread a device, XLA's choice, such programs can wait for each other forever.
os.environ["PJRT_NPROC"] = "64"
# Eight devices share one core here, and other work may share it: one that waits for the others is slow, not stuck. By
# default XLA ends the process, without a traceback, after 40 seconds.
os.environ["XLA_FLAGS"] += (
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=60 --xla_cpu_collective_call_terminate_timeout_seconds=300"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax  # noqa: E402  # after its environment is set
import pytest  # noqa: E402  # the same

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker begins the longest one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real preference pairs beside the checkout; tests that want it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real preference pairs are not at {SHARED_DATA}")
    return SHARED_DATA


# Set-ups that tests of several folders share.
from support.browser import browser  # noqa: E402, F401  # fixtures, found by name
from support.runs import make_run, small, task_folder  # noqa: E402, F401  # the same
