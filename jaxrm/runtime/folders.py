"""Folders that a run, a pipeline or a study may be written to: which may, what to type where one may not."""

import os
from pathlib import Path

from jaxrm.errors import UserError, flag, option


def check_writable(path: Path, run_dir: str) -> None:
    """Refuse a path whose nearest folder that exists is no folder, or takes no files.

    Raises:
      UserError: naming it; ``run_dir`` is how ``config.run_dir`` spells the path.
    """
    if (reason := why_unwritable(path)) is not None:
        raise unusable(run_dir, reason)


def why_unwritable(path: Path) -> str | None:
    """Why no folder can be made at a path, and nothing written to it; None where it can."""
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"no permission to write in {nearest}"


def unusable(run_dir: str, reason: str) -> UserError:
    """Return the error for a ``config.run_dir`` that cannot be written to."""
    return UserError(
        f"{option('run_dir')} is {run_dir!r}, which cannot be written ({reason}); "
        f"required a folder that can, e.g. {flag('run_dir')}=runs/first"
    )


def checked_path(run_dir: str) -> Path:
    """Return the folder that ``config.run_dir`` names.

    Raises:
      UserError: it names none, or one that is not in the file system.
    """
    if not run_dir:
        raise UserError(f"{option('run_dir')} is empty; required a folder, e.g. {flag('run_dir')}=runs/first")
    if "://" in run_dir:
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, a URL; required a folder, such as one that mounts the bucket"
        )
    try:
        path = Path(run_dir).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # `check_writable` says it better
    except (OSError, ValueError, RuntimeError) as error:  # too long, bytes that no name has, no such user
        raise unusable(run_dir, str(getattr(error, "strerror", None) or error)) from error
    return path


def what_to_type(run_dir: str, choices: tuple[str, ...]) -> str:
    """Say what to do about a folder that is taken: the ``choices`` of ``config.on_existing``, or another folder."""
    meaning = {"resume": "continue it", "restart": "put it aside and start anew"}
    ways = [f"{flag('on_existing')}={choice} to {meaning[choice]}" for choice in choices]
    return f"use {', '.join(ways)}, or another folder, e.g. {flag('run_dir')}={next_name(run_dir)}"


def next_name(run_dir: str) -> str:
    """Another folder to propose in place of one that is taken."""
    return f"{run_dir.rstrip('/')}-2"


def rename_aside(path: Path) -> Path:
    """Rename a folder to the first of ``path.1``, ``path.2``, … that is free, and return that."""
    path = path.resolve()
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)
