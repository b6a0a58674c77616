"""A checkpoint of a run, found by the path that the user typed, and restored on a mesh."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrm.config import dicts
from jaxrm.data.tokenizer import Vocabulary, load_tokenizer
from jaxrm.errors import UserError, flag, option
from jaxrm.models import quantized_params
from jaxrm.models.config import ModelConfig
from jaxrm.models.lora import NO_LORA, LoRAConfig
from jaxrm.runtime.checkpoint import Checkpoints, with_shardings
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stage_config import read_stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEP_SEPARATOR = ", step "  # in names and identities of checkpoints
_EXAMPLES = {
    "sft": "runs/quickstart/sft",
    "seq2seq_rm": "runs/quickstart/rm_seq2seq",
    "scalar_rm": "runs/quickstart/rm_scalar",
    "dpo": "runs/dpo_tiny",
}


@dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint of a run, whose parameters are not read yet.

    Attributes:
      folder: the run's.
      step: updates made.
      config: of the run.
      shape: of its model.
    """

    folder: RunFolder
    step: int
    config: Any
    shape: ModelConfig

    @property
    def lora(self) -> LoRAConfig:
        """Its adapters, which are then all that it holds, but for a scalar head."""
        return getattr(self.config, "lora", NO_LORA)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.folder.path}{STEP_SEPARATOR}{self.step}"

    def vocabulary(self) -> Vocabulary:
        """What its model's token ids mean."""
        return Vocabulary(self.load_tokenizer(), self.shape.vocab_size, self.name)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that its model was trained with."""
        return load_tokenizer(str(self.folder.tokenizer))

    def restore(self, shapes: Any, shardings: Any) -> Any:
        """What it holds, made where ``shardings`` says: its parameters, or its adapters and a scalar head.

        Kernels that are quantized by ``shapes`` are restored as they are, and then quantized one after another.
        """
        kind = quantized_params.kind_of(shapes)
        if kind is not None:
            plain = self.restore(quantized_params.plain_shapes(shapes), quantized_params.plain_shardings(shardings))
            return quantized_params.quantize_params(plain, kind, shardings)
        checkpoints = Checkpoints(self.folder.checkpoints, read_only=True)
        try:
            return checkpoints.restore(self.step, {"params": with_shardings(shapes, shardings)})["params"]
        except Exception as error:
            step = self.folder.checkpoints / str(self.step)
            if not step.exists():
                raise UserError(f"{step} was removed by the run that goes on there; give the command again") from error
            if checkpoints.may_be_damage(self.step, error):
                why = " ".join(str(error).split())[:200]
                raise UserError(f"{step} is damaged ({why}); give another checkpoint or run") from error
            raise
        finally:
            checkpoints.close()


def find_checkpoint(path: str, field: str = "path", algorithms: tuple[str, ...] = ()) -> RunCheckpoint:
    """Find the checkpoint that a path names.

    Args:
      path: folder of a run, for its latest checkpoint; ``RUN_DIR/checkpoints/best`` for that with the lowest
        held-out loss; or ``RUN_DIR/checkpoints/STEP``.
      field: the flag or field that gives it, for messages.
      algorithms: those whose runs hold the kind of model that is wanted; empty for any.

    Raises:
      UserError: where there is no run, no such checkpoint, or a model of another kind.
    """
    run, wanted = _split(path)
    folder = RunFolder(run, resumed=True, message="", is_writer=False)
    instead = f"give the folder of a run, e.g. {flag(field)}=runs/quickstart/sft"
    if (run / "pipeline.json").is_file():
        stages = ", ".join(sorted(record.parent.name for record in run.glob("*/run.json")))
        raise UserError(
            f"{option(field)} is {path!r}, the folder of a pipeline; give one of its stages: "
            f"{flag(field)}={path}/STAGE, "
            f"with STAGE one of {stages}"
        )
    if not (run / "run.json").is_file():
        raise UserError(f"{option(field)} is {path!r}, but {run} has no run.json; {instead}")
    config = read_stage(_read_json(run / "run.json", path, field)["config"])
    if algorithms and config.algorithm not in algorithms:
        raise UserError(
            f"{option(field)} is {path!r}, a run of {config.algorithm}; required a model of {' or '.join(algorithms)}; "
            f"give such a run, e.g. {flag(field)}={_EXAMPLES[algorithms[0]]}"
        )
    missing = [file.name for file in (folder.model, folder.tokenizer) if not file.exists()]
    if missing:
        raise UserError(f"{option(field)} is {path!r}, but {run} has no {' and no '.join(missing)}; {instead}")
    described = _read_json(folder.model, path, field)
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    step = _choose(checkpoints, wanted, path, field)
    checkpoints.close()
    return RunCheckpoint(folder, step, config, dicts.from_dict(ModelConfig, described, "model.json"))


def _read_json(file: Path, path: str, field: str) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return dict(record) if file.name == "model.json" else {"config": dict(record["config"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{option(field)} is {path!r}, whose {file.name} is damaged ({error})") from error


def is_run(path: str | None) -> bool:
    """Whether a path names a run of jaxrm, or a pipeline of runs, rather than published weights."""
    return path is not None and any((_split(path)[0] / name).is_file() for name in ("run.json", "pipeline.json"))


def _split(path: str) -> tuple[Path, str]:
    """Folder of a run, and which of its checkpoints; a run may itself lie in a folder called checkpoints."""
    given = Path(path).expanduser()
    if given.parent.name == "checkpoints" and not (given / "run.json").exists():
        return given.parent.parent, given.name
    return given, "latest"


def _choose(checkpoints: Checkpoints, wanted: str, path: str, field: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{option(field)} is {path!r}, which has no checkpoint yet; wait for one, or give another run")
    if wanted in ("latest", "best"):
        sound = checkpoints.latest_sound("params") if wanted == "latest" else checkpoints.best_sound("params")
        if sound is None:
            raise UserError(f"{option(field)} is {path!r}, all of whose checkpoints are damaged; give another run")
        return sound
    if wanted.isdecimal() and int(wanted) in steps:
        damage = checkpoints.damage(int(wanted), "params")
        if damage is not None:
            raise UserError(f"{option(field)} is {path!r}, which is damaged ({damage}); give another checkpoint or run")
        return int(wanted)
    known = ", ".join(str(step) for step in steps)
    raise UserError(f"{option(field)} is {path!r}, but the checkpoints of that run are {known}, and best")
