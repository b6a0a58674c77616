"""Export a trained model as a folder that transformers and vLLM load; a scalar reward model as a classifier.

python -m jaxrm.export --checkpoint=runs/quickstart/sft --output=exported/quickstart
python -m jaxrm.export --checkpoint=runs/quickstart/sft/checkpoints/best --output=exported/best --dtype=bfloat16

Of a run with adapters it writes those, as a PEFT folder; with --merge the whole model, its adapters added to its
weights. Adapters that others trained are merged into their base likewise.

python -m jaxrm.export --checkpoint=runs/sft_lora --output=exported/adapter
python -m jaxrm.export --checkpoint=runs/sft_lora --merge --output=exported/merged
python -m jaxrm.export --weights=google/gemma-2b --adapter=exported/adapter --merge --output=exported/merged
"""

import sys
from typing import Any

from jaxrm.runtime import preemption

if __name__ == "__main__":
    preemption.say_interrupted()  # before the imports below

from absl import flags

from jaxrm.config import command_line
from jaxrm.errors import UserError

FLAG_OF_FIELD = {"path": "--checkpoint", "model.path": "--weights", "model.adapter": "--adapter"}
FLAG_OF_FIELD |= {"data.tokenizer": "--tokenizer", "data.template": "--template"}


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    text = flags.DEFINE_string
    text("checkpoint", None, "folder of a run, or RUN_DIR/checkpoints/STEP (or /best)", flag_values=values)
    text("weights", None, "published weights instead (a GGUF file becomes safetensors)", flag_values=values)
    text("adapter", None, "with --weights: adapters that stand on them, a PEFT folder or a run", flag_values=values)
    flags.DEFINE_bool("merge", False, "add adapters to the weights, and write the whole model", flag_values=values)
    text("tokenizer", None, "with --weights: tokenizer, if it is not beside them", flag_values=values)
    text("template", None, "with --weights: chat template to carry, if not the tokenizer's own", flag_values=values)
    text("output", None, "folder to make", flag_values=values)
    dtypes = ["float32", "bfloat16", "float16"]
    flags.DEFINE_enum("dtype", "float32", dtypes, "of the exported tensors", flag_values=values)
    flags.DEFINE_integer("max_shard_mb", 5000, "largest file in MB", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace an earlier export", flag_values=values)


def main(_: None, given: flags.FlagValues) -> int:
    """Read the parameters and write the folder."""
    if given.output is None:
        raise UserError("--output is missing; give the folder to make, e.g. --output=exported/model")
    for name in ("tokenizer", "template"):
        if given.checkpoint is not None and given[name].value is not None:
            raise UserError(f"--{name} goes with --weights; a run has its own, so leave it out with --checkpoint")

    from jaxrm.inference.load import check_flags
    from jaxrm.inference.run_checkpoint import find_checkpoint, is_run
    from jaxrm.inference.weights import check_has_adapters
    from jaxrm.models.hub import check_export_folder

    check_export_folder(given.output, overwrite=given.overwrite)
    path = check_flags(given.checkpoint, given.weights, given.adapter)
    trained = given.adapter or path
    run = find_checkpoint(trained, "model.adapter" if given.adapter else "path") if is_run(trained) else None
    if run is not None and given.adapter:
        check_has_adapters(run)
    has_adapters = given.adapter is not None if run is None else run.lora.is_on
    if given.merge and not has_adapters:
        raise UserError(f"--merge adds adapters to their weights, and {trained} has none; leave it out")
    if has_adapters and not given.merge:
        if run is None:
            raise UserError(f"--adapter is {trained!r}, a PEFT folder already; write the whole model with --merge")
        name, folder = _write_adapters(given, run)
    else:
        name, folder = _write_model(given, path, is_scalar=_is_scalar(given, path, run))
    print(f"{name} is now in {folder}")
    return 0


def _is_scalar(given: flags.FlagValues, path: str, run: Any) -> bool:
    from jaxrm.inference import weights
    from jaxrm.models.build import ModelSource

    if run is not None:
        return bool(run.config.algorithm == "scalar_rm")
    adapter = weights.peft_adapter(ModelSource(path=path, adapter=given.adapter))
    return adapter is not None and adapter.scalar_head


def _write_model(given: flags.FlagValues, path: str, *, is_scalar: bool) -> tuple[str, Any]:
    """The whole model, adapters merged."""
    from jaxrm.data.exported_template import set_exported_template
    from jaxrm.inference.classifier import Classifier
    from jaxrm.inference.load import load_policy, load_reward_model, spread_mesh
    from jaxrm.inference.parameters import merge
    from jaxrm.inference.run_checkpoint import is_run
    from jaxrm.models.hub import export_model, is_classifier

    if given.adapter is None and not is_run(path) and is_classifier(path):
        raise UserError(
            f"--weights is {path!r}, a sequence classifier, which is what an export makes; give the run of a reward "
            "model or a language model"
        )
    load = load_reward_model if is_scalar else load_policy
    trained = load(
        path,
        adapter=given.adapter,
        mesh=spread_mesh(path),
        dtype="float32",  # nothing is computed, and the base of adapters is kept in the compute dtype
        tokenizer=given.tokenizer,
        template=given.template,
    )
    assert not isinstance(trained, Classifier), trained  # it was refused
    model, params = trained.model, trained.params
    if trained.template != "auto" or given.checkpoint is not None:
        set_exported_template(trained.tokenizer, trained.template)
    end_ids = model.end_ids(trained.tokenizer, trained.template)
    if is_scalar:
        _pad_apart(trained.tokenizer, trained.template, model.config.vocab_size, end_ids)
    if model.lora.is_on:
        params = merge(model, params)
    folder = export_model(
        given.output,
        params,
        model.config,
        tokenizer=trained.tokenizer,
        end_ids=end_ids,
        dtype=given.dtype,
        max_shard_bytes=given.max_shard_mb * 1_000_000,
        overwrite=given.overwrite,
    )
    return trained.name, folder


def _write_adapters(given: flags.FlagValues, run: Any) -> tuple[str, Any]:
    """The adapters of a run alone; their base is not read."""
    from jaxrm.data.exported_template import set_exported_template
    from jaxrm.inference.base import read_base, recorded_base
    from jaxrm.inference.load import spread_mesh
    from jaxrm.inference.parameters import read_trained
    from jaxrm.inference.run_checkpoint import is_run
    from jaxrm.models.hub import write_adapter

    base = read_base(run, given.weights) if given.weights else recorded_base(run)
    if base.path is None:
        raise UserError(
            f"{run.name} has adapters of weights drawn by chance, which no one else has; write the whole model, --merge"
        )
    model, adapters, tokenizer = read_trained(run, spread_mesh(str(run.folder.path)))
    template = run.config.data.template
    end_ids = model.end_ids(tokenizer, template)
    set_exported_template(tokenizer, template)
    if run.config.algorithm == "scalar_rm":
        _pad_apart(tokenizer, template, model.config.vocab_size, end_ids)
    folder = write_adapter(
        given.output,
        adapters,
        model.config,
        model.lora,
        base=base.path,
        tokenizer=tokenizer,
        dtype=given.dtype,
        overwrite=given.overwrite,
    )
    if is_run(base.path):
        print(
            f"its base is {base.path}, which PEFT cannot open: export it too, python -m jaxrm.export "
            f"--checkpoint={base.path} --output=BASE, and give BASE as base_model_name_or_path in {folder}"
        )
    return run.name, folder


def _pad_apart(tokenizer: Any, template: str, vocab_size: int, end_ids: tuple[int, ...]) -> None:
    """A classifier's score is read at the last token that is not padding, so no end of a response may pad."""
    from jaxrm.data.templates import text_of
    from jaxrm.data.tokenizer import pad_apart_from

    pad_apart_from(tokenizer, end_ids, vocab_size, text_of(tokenizer, template))


if __name__ == "__main__":
    sys.exit(command_line.run(main, define_flags=define_flags, flag_of_field=FLAG_OF_FIELD))
