"""The base of adapters: frozen weights that any number of models stand on, in memory once.

A run with adapters saves those alone. Its ``base.json`` says where the base was, and a hash of its content, so that
adapters never stand on other weights than they were trained on. A base that is loaded while the same one is in use, on
the same devices and in the same form, is that one.
"""

import dataclasses
import hashlib
import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import run_checkpoint, weights
from jaxrm.inference.sharded_model import ShardedModel, in_compute_dtype
from jaxrm.models import build, hub
from jaxrm.models.build import ModelSource
from jaxrm.runtime import checksums
from jaxrm.runtime.run_folder import RunFolder


@dataclass(frozen=True)
class Base:
    """Where a base is, and which it is.

    Attributes:
      path: published weights, or ``RUN_DIR/checkpoints/STEP``; None for weights drawn by chance.
      preset: shape of drawn weights.
      seed: that drawn weights follow from.
      sha256: of the content.
    """

    path: str | None
    preset: str | None
    seed: int
    sha256: str


def locate_base(source: ModelSource, seed: int) -> Base:
    """Where the weights are that ``source`` names, as the base of adapters; without a hash of their content.

    Raises:
      UserError: where there are none.
    """
    if source.path is None:
        return Base(None, source.preset, seed, "")
    if not run_checkpoint.is_run(source.path):
        return Base(source.path, None, 0, "")
    run = run_checkpoint.find_checkpoint(source.path, "model.path", weights.LANGUAGE_MODELS)
    return Base(str(run.folder.checkpoints / str(run.step)), None, 0, "")


def describe_base(source: ModelSource, seed: int) -> Base:
    """The weights that ``source`` names, as the base of adapters; their files are read for it.

    Raises:
      UserError: where there are none.
    """
    base = locate_base(source, seed)
    if base.path is None:
        shape = dicts.to_dict(build.read_shape(source))
        drawn = json.dumps({"drawn": shape, "seed": seed}, sort_keys=True)
        return dataclasses.replace(base, sha256=hashlib.sha256(drawn.encode()).hexdigest())
    if not run_checkpoint.is_run(base.path):
        return dataclasses.replace(base, sha256=checksums.content_hash(hub.model_files(base.path)))
    step = Path(base.path)
    files = sorted(path for path in (step / "params").rglob("*") if path.is_file())
    return dataclasses.replace(base, sha256=checksums.content_hash((step.parents[1] / "model.json", *files)))


def read_base(run: run_checkpoint.RunCheckpoint, path: str | None = None) -> Base:
    """The base that the adapters of a run stand on, which is there and has not changed.

    Args:
      run: with adapters.
      path: where it is now. None: where it was, or beside the run as it was, where both were moved together.

    Raises:
      UserError: it is elsewhere, or has another content; with what to type.
    """
    recorded = recorded_base(run)
    stands = f"{run.name} stands on the base {recorded.path or recorded.preset}"
    instead = "give that one"
    if path is None:
        instead = f"say where it is now, {flag('model.path')}=BASE {flag('model.adapter')}={run.folder.path}"
    places = [path or recorded.path] if path or recorded.path is None else _places(run, recorded, recorded.path)
    if not places:
        raise UserError(f"{stands}, where there is none now; {instead}")
    problems = []
    for place in places:
        source = ModelSource(path=place) if place is not None else ModelSource(preset=recorded.preset)
        try:
            present = describe_base(source, recorded.seed)
        except UserError as error:
            problems.append(f", which cannot be read ({error})")
            continue
        if present.sha256 == recorded.sha256:
            _seen[present.sha256] = place
            return present
        other = f"{place or recorded.preset} is now another (sha256 {present.sha256[:12]})"
        problems.append(f" (sha256 {recorded.sha256[:12]}), but {other}")
    raise UserError(f"{stands}{problems[0]}; {instead}")


def recorded_base(run: run_checkpoint.RunCheckpoint) -> Base:
    """The base that a run with adapters was trained on, which may be there no more.

    Raises:
      UserError: its record is gone, or damaged.
    """
    recorded = _recorded(run.folder.path)
    if recorded is None:
        raise UserError(
            f"{run.folder.path} has adapters, but no {weights.BASE_FILE}, which says what they stand on; give another "
            "run, or put that file back"
        )
    return recorded


def is_same_place(one: Base, other: Base) -> bool:
    """Whether two bases are the same by where they are; what is there may have changed."""

    def place(base: Base) -> tuple[str | None, str | None, int]:
        local = None if base.path is None else Path(base.path).expanduser()
        return str(local.resolve()) if local is not None and local.exists() else base.path, base.preset, base.seed

    return place(one) == place(other)


def keep_base(folder: RunFolder, base: Base) -> None:
    """Note the base of a run in its folder, if it is not there."""
    if folder.is_writer and not (folder.path / weights.BASE_FILE).exists():
        atomic.write_json(folder.path / weights.BASE_FILE, dataclasses.asdict(base))


def check_kept(run_dir: str, base: Base) -> None:
    """Refuse to go on in the folder of a run on another base than it was begun on.

    Raises:
      UserError: the run was begun on another base.
    """
    folder = Path(run_dir).expanduser()
    recorded = _recorded(folder)
    if recorded is not None and recorded.sha256 != base.sha256:
        raise UserError(
            f"{folder} was begun on the base {recorded.path or recorded.preset} (sha256 {recorded.sha256[:12]}), "
            f"but {option('model.path')} now gives {base.path or base.preset} (sha256 {base.sha256[:12]}); give the "
            f"same one, or put the run aside with {flag('on_existing')}=restart"
        )


def load_base(base: Base, model: ShardedModel, key: jax.Array) -> Any:
    """The frozen parameters of a decoder, in its compute dtype: those that are in use already, or read or drawn now.

    Args:
      base: from `describe_base` or `read_base`.
      model: the decoder, with adapters.
      key: that drawn weights are drawn with.
    """
    source = model.source
    name = (base.sha256, model.mesh, source.dtype, source.quantize)
    shared = _in_use.get(name)
    if shared is not None:
        leaves = [reference() for reference in shared[0]]
        if all(leaf is not None and not leaf.is_deleted() for leaf in leaves):
            return jax.tree.unflatten(shared[1], leaves)
    frozen = _read(base, model, key)
    leaves, structure = jax.tree.flatten(frozen)
    _in_use[name] = ([weakref.ref(leaf) for leaf in leaves], structure)
    return frozen


_seen: dict[str, str | None] = {}  # the place of each base that was read, by its content
_in_use: dict[Any, Any] = {}  # weak references to the parameters of each base, and the structure of their tree


def _read(base: Base, model: ShardedModel, key: jax.Array) -> Any:
    shardings = model.frozen_shardings
    if base.path is not None and run_checkpoint.is_run(base.path):
        run = run_checkpoint.find_checkpoint(base.path, "model.path")
        shapes = jax.tree.map(_as_saved, model.frozen_shapes)
        return in_compute_dtype(run.restore(shapes, shardings), model.source.dtype)
    source = dataclasses.replace(model.source, path=base.path, preset=base.preset, adapter=None)
    return in_compute_dtype(build.init_params(model.config, source, key, shardings), model.source.dtype)


def _as_saved(shape: Any) -> Any:
    """The shape as a run's checkpoint has it, in float32; codes are made of what it has."""
    return shape if jnp.issubdtype(shape.dtype, jnp.integer) else jax.ShapeDtypeStruct(shape.shape, "float32")


def _recorded(folder: Path) -> Base | None:
    file = folder / weights.BASE_FILE
    try:
        return dicts.from_dict(Base, json.loads(file.read_text(encoding="utf-8")), weights.BASE_FILE)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); give another run") from error


def _places(run: run_checkpoint.RunCheckpoint, recorded: Base, path: str) -> list[str | None]:
    """Where there is something that may be the base: where it was, as far from the run as it was, where it was seen."""
    beside = Path(os.path.normpath(run.folder.path / os.path.relpath(path, run.config.run_dir)))
    seen = _seen.get(recorded.sha256) or path
    return [place for place in dict.fromkeys((path, str(beside), seen)) if _is_there(place)]


def _is_there(path: str) -> bool:
    return Path(path).expanduser().exists() or hub.is_hub_name(path)
