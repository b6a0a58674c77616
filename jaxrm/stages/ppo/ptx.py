"""SFT data that PPO mixes in, so that the policy does not forget how to write (``ptx`` in arXiv 2203.02155)."""

import dataclasses
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from jaxrm.data.config import DataConfig
from jaxrm.data.loader import BatchIterator, build_loader, fingerprint
from jaxrm.errors import naming, option
from jaxrm.experiment import Experiment
from jaxrm.models import build
from jaxrm.models.config import ModelConfig
from jaxrm.sharding.mesh import batch_shards, batch_share
from jaxrm.stages.inputs.demonstrations import read_demonstrations
from jaxrm.stages.stage import task_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_ptx(
    config: Experiment,
    data: DataConfig,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    mesh: Mesh,
    *,
    show_progress: bool,
) -> tuple[BatchIterator, str]:
    """Endless batches of ``config.ptx``, written with the policy's tokenizer and template; and their fingerprint.

    Args:
      config: the whole config.
      data: its ``ptx`` section.
      model: shape of the policy.
      tokenizer: of the policy.
      mesh: the devices.
      show_progress: draw a bar.

    Raises:
      UserError: as SFT does of its ``config.data``.
    """
    build.check_length(model, "ptx.max_length", data.max_length)
    part, parts = batch_share(mesh)
    # What reads them knows of one data section only, and calls it so.
    with naming({"data": option("ptx")}):
        with task_files(dataclasses.replace(data, template=config.data.template), config.seed) as files:
            train = read_demonstrations(files, tokenizer, held_out=False, show_progress=show_progress)
        loader = build_loader(
            train.examples,
            files,
            pad_id=tokenizer.pad_token_id or 0,
            seed=config.seed,
            process_index=part,
            process_count=parts,
            batch_unit=batch_shards(mesh) * config.num_microbatches,
        )
    return loader, fingerprint(train.examples, files)
