"""What a run prints when it opens and when it is complete."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrm.data.readers import ReadReport
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import quantized, quantized_params
from jaxrm.runtime.metrics import read_rows
from jaxrm.runtime.progress import print_table
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stages.inputs.training_data import TrainingData
from jaxrm.stages.stage import Stage


def print_reading(reports: Mapping[str, ReadReport]) -> None:
    """A table for each data set: how many records were used, and why others were not."""
    for title, report in reports.items():
        print_table(title, ["records", "number", "first at"], report.rows())


def print_size(stage: Stage, data: TrainingData) -> None:
    """One line: rows of an epoch, and steps; before it one of the adapters, where they are trained."""
    section = stage.config.data
    if stage.model.lora.is_on:
        print(adapters_in_words(stage))
    print_quantized(stage.model)
    print(
        f"{data.rows_per_epoch:,} rows of {section.max_length:,} tokens; {data.num_steps:,} steps of "
        f"{section.batch_size} rows"
    )


def adapters_in_words(stage: Stage) -> str:
    """Which adapters are trained, how many parameters those are, and what they stand on."""
    model, base = stage.model, stage.base
    trained, frozen = map(quantized_params.count_parameters, (model.trained_shapes, model.frozen_shapes))
    where = base.path or f"chance ({base.preset}, seed {base.seed})"
    return (
        f"{model.lora}: {trained:,} parameters, {100 * trained / (trained + frozen):.2g} % of the model, on the base "
        f"{where} (sha256 {base.sha256[:12]})"
    )


def print_quantized(model: ShardedModel) -> None:
    """One line where the base is quantized: what that saves, and what it cost where it was measured."""
    kind = model.source.quantize
    if kind is not None:
        plain, width = quantized_params.plain_shapes(model.frozen_shapes), jnp.dtype(model.source.dtype).itemsize
        kernels = {path for path, _ in jax.tree_util.tree_leaves_with_path(plain)}
        kernels -= {path for path, _ in jax.tree_util.tree_leaves_with_path(model.frozen_shapes)}
        whole = sum(
            math.prod(x.shape) * (width if path in kernels else x.dtype.itemsize)
            for path, x in jax.tree_util.tree_leaves_with_path(plain)
        )
        stored = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(model.frozen_shapes))
        print(f"Base: {kind}, {stored / 1e6:,.0f} MB in place of {whole / 1e6:,.0f} MB ({quantized.MEASURED[kind]})")


def print_held_out(folder: RunFolder) -> None:
    """Table of the held-out metrics before and after, from the rows of the run, whichever launch wrote them."""
    rows = [row for row in read_rows(folder.metrics) if any(name.startswith("eval_") for name in row)]
    if not rows:
        return
    before, after = rows[0], rows[-1]
    names = [name for name in before if name.startswith("eval_") and "/" not in name]
    print_table(
        "Held-out data",
        ["", f"step {before['step']}", f"step {after['step']}"],
        [[name.removeprefix("eval_"), float(before[name]), float(after[name])] for name in names],
    )
