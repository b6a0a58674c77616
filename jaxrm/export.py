"""Export a trained model as a folder that transformers and vLLM load; a scalar reward model as a classifier.

python -m jaxrm.export --checkpoint=runs/quickstart/sft --output=exported/quickstart
python -m jaxrm.export --checkpoint=runs/quickstart/sft/checkpoints/best --output=exported/best --dtype=bfloat16
"""

import sys

from jaxrm.runtime import preemption

if __name__ == "__main__":
    preemption.say_interrupted()  # before the imports below

from absl import flags

from jaxrm.config import command_line
from jaxrm.errors import UserError

FLAG_OF_FIELD = {"path": "--checkpoint", "model.path": "--weights", "data.tokenizer": "--tokenizer"}
FLAG_OF_FIELD |= {"data.template": "--template"}


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    text = flags.DEFINE_string
    text("checkpoint", None, "folder of a run, or RUN_DIR/checkpoints/STEP (or /best)", flag_values=values)
    text("weights", None, "published weights instead (a GGUF file becomes safetensors)", flag_values=values)
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
    if (given.checkpoint is None) == (given.weights is None):
        raise UserError("give one of --checkpoint=RUN_DIR and --weights=MODEL")
    for name in ("tokenizer", "template"):
        if given.checkpoint is not None and given[name].value is not None:
            raise UserError(f"--{name} goes with --weights; a run has its own, so leave it out with --checkpoint")

    from jaxrm.data.exported_template import set_exported_template
    from jaxrm.data.templates import text_of
    from jaxrm.data.tokenizer import pad_apart_from
    from jaxrm.inference.load import check_flags, load_policy, load_reward_model, spread_mesh
    from jaxrm.inference.weights import find_checkpoint
    from jaxrm.models.hub import check_export_folder, export_model

    check_export_folder(given.output, overwrite=given.overwrite)
    path = check_flags(given.checkpoint, given.weights)
    is_scalar = given.checkpoint is not None and find_checkpoint(path).config.algorithm == "scalar_rm"
    load = load_reward_model if is_scalar else load_policy
    trained = load(path, mesh=spread_mesh(path), tokenizer=given.tokenizer, template=given.template)
    end_ids = trained.model.end_ids(trained.tokenizer, trained.template)
    if trained.template != "auto" or given.checkpoint is not None:
        set_exported_template(trained.tokenizer, trained.template)
    if is_scalar:
        template = text_of(trained.tokenizer, trained.template)
        pad_apart_from(trained.tokenizer, end_ids, trained.model.config.vocab_size, template)
    folder = export_model(
        given.output,
        trained.params,
        trained.model.config,
        tokenizer=trained.tokenizer,
        end_ids=end_ids,
        dtype=given.dtype,
        max_shard_bytes=given.max_shard_mb * 1_000_000,
        overwrite=given.overwrite,
    )
    print(f"{trained.name} is now in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main, define_flags=define_flags, flag_of_field=FLAG_OF_FIELD))
