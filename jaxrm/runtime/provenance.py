"""Where a result came from: versions, devices, the code and its git commit."""

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "jaxrm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "datasets",
    "grain",
    "numpy",
)
_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE.parent


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that results depend on; None where one is absent."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe_devices() -> dict[str, Any]:
    """Return the devices as jax sees them: platform, kind, number, and the number of processes."""
    import jax

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "process_count": jax.process_count(),
    }


@functools.cache
def code_digest() -> str:
    """Return 16 hexadecimal digits that change with any line of jaxrm's code."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def git_state() -> dict[str, Any] | None:
    """Return the commit of jaxrm's checkout and whether files differ from it; None outside a checkout."""
    if not (_ROOT / ".git").exists():  # an installed package inside somebody else's checkout
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
