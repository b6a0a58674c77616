"""What every stage opens: the devices, the model, the tokenizer, the files of its data and the folder of its run.

A stage runs in five phases. `jaxrm.stages.sft` is the shortest example.

1. Its own checks refuse what the config alone shows to be wrong.
2. `open_stage` opens model and tokenizer. It refuses bad input and writes nothing.
3. The inputs are read and counted (`jaxrm.stages.inputs`).
4. `Stage.open_run` makes the run's folder. Nothing is written before it.
5. The stage trains or samples, and reports.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm.config import dicts
from jaxrm.data import tasks
from jaxrm.data.config import DataConfig
from jaxrm.data.examples import TokenExample
from jaxrm.data.loader import fingerprint
from jaxrm.data.responses import Response, response_text
from jaxrm.data.templates import bos_id, text_of
from jaxrm.data.tokenizer import Vocabulary, load_tokenizer
from jaxrm.errors import option
from jaxrm.inference import parameters, run_checkpoint, sharded_model, weights
from jaxrm.inference.base import Base, check_kept, keep_base, load_base
from jaxrm.inference.load import save_shape_and_tokenizer
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.inference.task_files import Records, task_files
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import NO_LORA, LoRAConfig
from jaxrm.runtime.processes import check_same_inputs
from jaxrm.runtime.provenance import describe_devices
from jaxrm.runtime.run_folder import RunFolder, check_run, open_run
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, batch_share, check_batch, check_row_length
from jaxrm.stage_config import POLICIES, RESUMABLE_FIELDS, Evaluate, TrainingConfig
from jaxrm.stages.trained_template import check_trained_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Stage:
    """A stage whose model and data have been opened.

    Attributes:
      config: of the stage.
      mesh: the devices.
      model: the decoder of ``config.model``: the policy, or what a reward model starts from.
      data: the ``data`` section, with the files of an embedded task in place of its name.
      tokenizer: of the model.
    """

    config: Any
    mesh: Mesh
    model: ShardedModel
    data: DataConfig
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and prints."""
        return jax.process_index() == 0

    @property
    def show_progress(self) -> bool:
        """Whether this process draws progress bars."""
        return self.is_writer and self.config.logging.progress

    @property
    def vocabulary(self) -> Vocabulary:
        """What the policy's token ids mean."""
        return Vocabulary(self.tokenizer, self.model.config.vocab_size, "the policy")

    @property
    def template(self) -> str:
        """Chat template that prompts are written with."""
        return self.config.data.template

    @property
    def pad_id(self) -> int:
        """Id that rows are filled up with. It is never attended to and never a target, so any id will do."""
        return sharded_model.pad_id(self.tokenizer, self.model.config)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self.model.end_ids(self.tokenizer, self.template)

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The template's first id, which stays where a prompt is cut."""
        return bos_id(self.tokenizer, self.template)

    @functools.cached_property
    def base(self) -> Base:
        """What the adapters stand on. All processes look for it together, in `open_run`."""
        return parameters.base_of(self.config.model, self.config.seed)

    def load_base(self) -> Any:
        """The frozen parameters under the adapters; ``{}`` where there are none.

        As long as somebody has them, other models on this base find them in memory.
        """
        return load_base(self.base, self.model, parameters.init_key(self.base.seed)) if self.model.lora.is_on else {}

    @property
    def pad_to_multiple_of(self) -> int:
        """What the width of rows made on the devices is a multiple of."""
        return sharded_model.pad_to_multiple_of(self.mesh)

    @property
    def eval_batching(self) -> dict[str, Any]:
        """Arguments of `jaxrm.data.loader.eval_batches`: padding, and this process's share of the rows."""
        share, num_shares = batch_share(self.mesh)
        return {"pad_id": self.pad_id, "process_index": share, "process_count": num_shares}

    @property
    def batching(self) -> dict[str, Any]:
        """Arguments of `jaxrm.data.loader.build_loader`: the same, the seed, and what a batch divides into."""
        unit = batch_shards(self.mesh) * self.config.num_microbatches
        return {**self.eval_batching, "seed": self.config.seed, "batch_unit": unit}

    def num_steps(self, rows_per_epoch: int) -> int:
        """Updates in all: ``config.num_steps``, or what ``config.num_epochs`` passes over the rows come to."""
        return num_steps(self.config, rows_per_epoch)

    def response_text(self, tokens: np.ndarray) -> Response:
        """Text of a response's ids ``[T]``, without its end token."""
        return response_text(self.tokenizer, self.end_ids, tokens)

    def init_params(self, key: jax.Array) -> Any:
        """First parameters of the decoder: read from ``config.model.path``, or drawn with ``key``."""
        return parameters.init_params(self.model, key, self.config.seed)

    def check_local_weights(self) -> None:
        """Refuse weights of this machine that cannot be read; those of the hub are not fetched for it."""
        source = self.config.model
        if source.path is not None and Path(source.path).expanduser().exists():
            weights.check_weights(self.model.config, source)

    def open_run(
        self,
        read: Sequence[Sequence[TokenExample] | str],
        *,
        keeps_model: bool = True,
        layout: Mapping[str, Any] = MappingProxyType({}),
    ) -> RunFolder:
        """Make or find the folder of the run; the first thing that a stage writes.

        Args:
          read: the examples that were read of the data, or a text about them, alike in all processes.
          keeps_model: save the model's shape and tokenizer too, so that the run can be read without its sources.
          layout: see `open_run_folder`.

        Raises:
          UserError: where the weights cannot be read, the processes have read different inputs, or the folder holds
            another run.
        """
        weights.check_weights(self.model.config, self.config.model)  # last, since a hub model is fetched for it
        base = self.base if self.model.lora.is_on else None
        if jax.process_count() > 1:
            self._check_same_inputs(read, "" if base is None else base.sha256)
        if base is not None and keeps_model and self.config.on_existing != "restart":
            check_kept(self.config.run_dir, base)
        folder = open_run_folder(self.config, layout)
        if self.is_writer and self.mesh.devices.flat[0].platform != "cpu":  # where there is a choice
            print(f"kernels: {self.model.kernels}")
        if self.is_writer and keeps_model:
            save_shape_and_tokenizer(self.model.config, self.tokenizer, folder)
        if base is not None and keeps_model:
            keep_base(folder, base)
        return folder

    def _check_same_inputs(self, read: Sequence[Sequence[TokenExample] | str], base: str) -> None:
        texts = [x if isinstance(x, str) else fingerprint(x, self.config.data) for x in read]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = self.tokenizer.get_vocab() if backend is None else backend.to_str()
        check_same_inputs(
            {
                "tokenizer": f"{tokenizer} {self.tokenizer.special_tokens_map}",
                option("data.template"): f"{text_of(self.tokenizer, self.template)} {self.end_ids}",
                option("data.path"): " ".join(texts),
                option("model.path"): f"{self.model.config} {weights.contents_of(self.config.model)} {base}",
            }
        )


@contextmanager
def open_stage(config: Any, mesh: Mesh, *, records: Records) -> Iterator[Stage]:
    """Open model, tokenizer and data files of a stage; nothing is written and no weights are read.

    The files of an embedded task live as long as the block.

    Args:
      config: of the stage.
      mesh: the devices.
      records: what the stage reads of an embedded task.

    Raises:
      UserError: no such model, tokenizer or task; rows longer than the model reads; a folder that holds another run; a
        template that the model's run was not trained with.
    """
    adapters = _adapters(config)
    source = weights.as_stored(config.model) if adapters.is_on else config.model
    model = sharded_model.shard_model(source, mesh, lora=adapters)
    build.check_length(model.config, "data.max_length", config.data.max_length)
    check_run_folder(config)
    with task_files(config.data, config.seed, records=records) as data:
        path = sharded_model.tokenizer_path(data, config.model)
        tokenizer = load_tokenizer(path)
        sharded_model.check_tokenizer(tokenizer, path, data.template, config.model, model.config)
        check_trained_template(config, tokenizer)
        shape = sharded_model.with_tokens(model.config, tokenizer)
        model = sharded_model.shard_model(source, mesh, shape, lora=adapters)
        yield Stage(config, mesh, model, data, tokenizer)


def _adapters(config: Any) -> LoRAConfig:
    """The adapters of a stage's model: those that it trains, or in a stage that trains nothing those of its source.

    Raises:
      UserError: it trains others than those that it goes on from.
    """
    source = config.model
    if isinstance(config, Evaluate) and config.evaluate.reference is not None:
        # One graph serves policy and reference: where their adapters differ, both are merged into their weights.
        own, other = weights.lora_of(source), weights.lora_of(ModelSource(path=config.evaluate.reference))
        return own if other == own or not other.is_on else NO_LORA
    if not isinstance(config, TrainingConfig):
        return weights.lora_of(source)
    parameters.check_adapters(source, config.lora)
    build.check_trainable(source, config.lora)
    return config.lora


def check_run_folder(config: Any) -> None:
    """Refuse a folder that holds another run, before any work.

    Several processes must refuse together, which `Stage.open_run` alone sees to.
    """
    if jax.process_count() == 1:
        check_run(config.run_dir, dicts.to_dict(config), on_existing=config.on_existing, may_differ=RESUMABLE_FIELDS)


def open_run_folder(config: Any, layout: Mapping[str, Any] = MappingProxyType({})) -> RunFolder:
    """Make or find the folder of a run, and print what was found there.

    Args:
      config: of the stage.
      layout: what ``run.json`` says of the devices besides their kind and number.
    """
    folder = open_run(
        config.run_dir,
        dicts.to_dict(config),
        on_existing=config.on_existing,
        may_differ=RESUMABLE_FIELDS,
        is_writer=jax.process_index() == 0,
        process_count=jax.process_count(),
        devices={**describe_devices(), **layout},
    )
    if folder.is_writer:
        print(folder.message)
    return folder


def check_training(config: Any, mesh: Mesh) -> None:
    """Refuse batches, rows or offloading that do not fit the devices.

    Raises:
      UserError: naming the field, and a value that fits.
    """
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    check_row_length(mesh, "data.max_length", config.data.max_length)
    if config.optimizer.offload:
        partition.check_host_memory(mesh, "optimizer.offload")


def check_is_policy(config: Any) -> None:
    """Refuse a model or an adapter that is the run of something else than a policy.

    Raises:
      UserError: naming what the run holds.
    """
    for name in ("path", "adapter"):
        path = getattr(config.model, name)
        if run_checkpoint.is_run(path):
            run_checkpoint.find_checkpoint(path, f"model.{name}", POLICIES)


def judge_of(config: Any) -> str | None:
    """Embedded task (``task:safety``) whose exact judge scores responses: the one named, or that of the data."""
    if config.evaluation.judge is not None:
        return config.evaluation.judge
    return config.data.path if config.data.path.startswith(tasks.PREFIX) else None


def num_steps(config: Any, rows_per_epoch: int) -> int:
    """Updates in all: ``config.num_steps``, or what ``config.num_epochs`` passes over the rows come to."""
    return config.num_steps or math.ceil(config.num_epochs * rows_per_epoch / config.data.batch_size)
