"""A trained model from the folder of its run, which is all that is needed to read it."""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from jaxrm.data.tokenizer import load_tokenizer, save_tokenizer
from jaxrm.errors import UserError
from jaxrm.experiment import Experiment
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig
from jaxrm.runtime import config as bridge
from jaxrm.runtime.checkpoint import Checkpoints, with_shardings
from jaxrm.runtime.mesh import MeshConfig, build_mesh
from jaxrm.runtime.run_folder import RunFolder, write_json_atomically
from jaxrm.stages.setup import OpenedModel, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trained:
    """A model with its parameters.

    Attributes:
      model: the decoder.
      params: its parameters, on the devices.
      tokenizer: that it was trained with.
      template: chat template that it was trained with.
      name: where it came from, for people.
    """

    model: OpenedModel
    params: Any
    tokenizer: "PreTrainedTokenizerBase"
    template: str
    name: str


def keep_model(config: ModelConfig, tokenizer: "PreTrainedTokenizerBase", folder: RunFolder) -> None:
    """Save shape and tokenizer in the run's folder, once and whole, so that it can be read without its sources."""
    if not folder.model.exists():
        write_json_atomically(folder.model, bridge.as_dict(config))
    if not folder.tokenizer.exists():
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder.path) as name:
            save_tokenizer(tokenizer, Path(name) / "tokenizer")
            (Path(name) / "tokenizer").rename(folder.tokenizer)


def open_checkpoint(path: str, mesh: Mesh | None, dtype: str | None = None) -> Trained:
    """Model of a run.

    Args:
      path: folder of a run, for its latest checkpoint; ``RUN_DIR/checkpoints/best`` for that with the lowest
        held-out loss; or ``RUN_DIR/checkpoints/STEP``.
      mesh: devices to put the parameters on; need not be those of the training. None: spread over as many as
        divide them.
      dtype: compute dtype, that of the training where it is None.

    Raises:
      UserError: where there is no run or no such checkpoint.
    """
    given = Path(path).expanduser()
    run, wanted = (given.parent.parent, given.name) if given.parent.name == "checkpoints" else (given, "latest")
    folder = RunFolder(run, resumed=True, message="", is_writer=False)
    missing = [file.name for file in (run / "run.json", folder.model, folder.tokenizer) if not file.exists()]
    if missing:
        raise UserError(
            f"--checkpoint is {path!r}, but {run} has no {' and no '.join(missing)}; give the folder of a run, "
            "e.g. --checkpoint=runs/quickstart"
        )
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    step = _choose(checkpoints, wanted, path)
    try:
        recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
        described = json.loads(folder.model.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--checkpoint is {path!r}, whose run.json or model.json is damaged ({error})") from error
    config = bridge.from_config_dict(Experiment, recorded)
    shape = bridge.from_config_dict(ModelConfig, described, "model.json")
    source = ModelSource(preset="as trained", dtype=dtype or config.model.dtype)  # attention by this platform
    model = open_model(source, mesh or _spread(shape), shape)
    params = checkpoints.restore(step, {"params": with_shardings(model.shapes, model.shardings)})["params"]
    checkpoints.close()
    tokenizer = load_tokenizer(str(folder.tokenizer))
    return Trained(model, params, tokenizer, config.data.template, f"{run}, step {step}")


def open_weights(source: ModelSource, tokenizer_path: str | None, template: str, mesh: Mesh | None) -> Trained:
    """Published model, as it is; for ``mesh`` see `open_checkpoint`.

    Raises:
      UserError: where there is no such model or its tokenizer does not fit.
    """
    assert source.path is not None
    shape = build.read_shape(source)
    model = open_model(source, mesh or _spread(shape), shape)
    path = tokenizer_path or source.path
    tokenizer = load_tokenizer(path)
    build.check_vocabulary(model.config, len(tokenizer), path)
    params = build.init_params(model.config, source, jax.random.key(0), model.shardings)
    return Trained(model, params, tokenizer, template, source.path)


def _spread(config: ModelConfig) -> Mesh:
    shards = math.gcd(jax.device_count(), config.hidden_size)
    return build_mesh(MeshConfig(data=-1, fsdp=shards))


def _choose(checkpoints: Checkpoints, wanted: str, path: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"--checkpoint is {path!r}, which has no checkpoint yet; wait for one, or give another run")
    if wanted == "latest":
        return steps[-1]
    best = checkpoints.best_step()
    if wanted == "best" and best is not None:
        return best
    if wanted.isdecimal() and int(wanted) in steps:
        return int(wanted)
    known = ", ".join(str(step) for step in steps)
    raise UserError(f"--checkpoint is {path!r}, but the checkpoints of that run are {known}, and best")
