"""SFT data that PPO mixes in, so that the policy does not forget how to write (``ptx`` in arXiv 2203.02155)."""

import dataclasses

from jaxrm.data.config import DataConfig
from jaxrm.data.loader import BatchIterator, build_loader, fingerprint
from jaxrm.errors import naming, option
from jaxrm.models import build
from jaxrm.stages.inputs.demonstrations import read_demonstrations
from jaxrm.stages.stage import Stage, task_files


def open_ptx(stage: Stage, data: DataConfig) -> tuple[BatchIterator, str]:
    """Endless batches of SFT rows, written with the policy's tokenizer and template; and their fingerprint.

    Args:
      stage: of the run.
      data: its ``ptx`` section.

    Raises:
      UserError: as SFT does of its ``config.data``.
    """
    config = stage.config
    build.check_length(stage.model.config, "ptx.max_length", data.max_length)
    # The readers know one data section, and name it so.
    with naming({"data": option("ptx")}):
        with task_files(dataclasses.replace(data, template=stage.template), config.seed) as files:
            train = read_demonstrations(files, stage.tokenizer, held_out=False, show_progress=stage.show_progress)
        loader = build_loader(train.examples, files, **stage.batching)
    return loader, fingerprint(train.examples, files)
