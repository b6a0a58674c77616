"""Score responses token by token with a reward model, and see what it would have written.

python -m jaxrm.score --checkpoint=runs/rm_seq2seq_tiny --input=pairs.jsonl --output=scored.jsonl --html=scored.html
python -m jaxrm.score --checkpoint=runs/rm_seq2seq_tiny --kind=soft --input=pairs.jsonl --output=scored.jsonl

The input holds pairs, or prompts with one response, in any schema that jaxrm reads. Records that cannot be scored are
counted and left out. Token rewards are written before scale and center, which belong to a run of PPO. A config is
needed only to lay the model over devices (config.mesh) or to name the kind (config.reward.kind).

A config of PPO with several sources (config.rewards) scores with their sum, and no --checkpoint is given. Each source
is calibrated on the responses of the input, and its own rewards stand in `sources`, before its weight.

python -m jaxrm.score --config=ppo.py --input=pairs.jsonl --output=scored.jsonl --html=scored.html

Benchmarks of preferences, with a column ``subset`` (RewardBench, RewardBench 2), are scored by subset:

python -m jaxrm.score --checkpoint=runs/rm_seq2seq_tiny --pairs=benchmark.jsonl --kind=all --second=runs/rm_scalar_tiny

python -m jaxrm.score --weights=google/gemma-2b --adapter=exported/rm --input=pairs.jsonl --output=scored.jsonl
python -m jaxrm.score --weights=Skywork/Skywork-Reward-V2-Qwen3-0.6B --input=pairs.jsonl --output=scored.jsonl
"""

import sys
from typing import Any

from jaxrm.runtime import preemption

if __name__ == "__main__":
    preemption.say_interrupted()  # before the imports below

from absl import flags

from jaxrm.config import command_line
from jaxrm.config.output_files import check_output_files
from jaxrm.errors import UserError, naming
from jaxrm.stage_config import PPO, BestOfN, Evaluate, ScalarRM, Seq2SeqRM

_SAME = ("kind", "reference", "max_new_tokens")
FLAG_OF_FIELD = {"path": "--checkpoint", "data.path": "--input", "data.eval_path": "--input"}
FLAG_OF_FIELD |= {"model.path": "--weights", "reward.model": "--weights", "model.adapter": "--adapter"}
FLAG_OF_FIELD |= {"data.template": "--template", "reward.classifier.template": "--template"}
FLAG_OF_FIELD |= {"reward.classifier.dtype": "--dtype"} | {name: f"--{name}" for name in _SAME}

CONFIG_CLASSES = (Seq2SeqRM, ScalarRM, PPO, BestOfN, Evaluate)  # those that name a kind of reward


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    run = "folder of a reward model's run, or RUN_DIR/checkpoints/STEP (or /best)"
    text("checkpoint", None, run, flag_values=values)
    text(
        "weights",
        None,
        "published weights instead: a classifier of one label, a seq2seq reward model, or a base",
        flag_values=values,
    )
    text("adapter", None, "with --weights: adapters that stand on them, a PEFT folder or a run", flag_values=values)
    text("template", None, "with --weights: chat template, a name or for a classifier a file", flag_values=values)
    text("input", None, "required: file of pairs, or of prompts and responses", flag_values=values)
    text("output", None, "required: JSONL to write, one record a line", flag_values=values)
    text("pairs", None, "in place of --input: a benchmark of preferences, scored by subset", flag_values=values)
    text("second", None, "with --pairs: another reward model, whose figures stand beside", flag_values=values)
    text("html", None, "page to draw, one self-contained file", flag_values=values)
    text("kind", None, "kind of token reward, by default that of the config or else of the run", flag_values=values)
    text("reference", None, "with --kind=contrast or dpo: run of the policy to compare with", flag_values=values)
    corrections = "let a seq2seq reward model write its corrections; --nocorrections is quicker"
    flags.DEFINE_bool("corrections", True, corrections, flag_values=values)
    whose = "score only those records whose prompts the run held out, by their hash, from data like --input"
    flags.DEFINE_bool("held_out", False, whose, flag_values=values)
    integer("max_new_tokens", 128, "longest correction in tokens", lower_bound=1, flag_values=values)
    integer("max_records", None, "score no more than so many records", lower_bound=1, flag_values=values)
    integer("batch_size", 16, "responses scored at once", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "compute dtype", flag_values=values)


def main(config: Any, given: flags.FlagValues) -> int:
    """Open the model, score, write and draw."""
    if given.pairs is not None:
        return _score_benchmark(config, given)
    if given.second is not None:
        raise UserError("--second goes with --pairs=FILE, a benchmark that two reward models are compared on")
    examples = {"input": "pairs.jsonl", "output": "scored.jsonl"}
    adds_sources = bool(getattr(config, "rewards", None))
    if given.weights is None and not adds_sources:
        examples = {"checkpoint": "runs/rm_seq2seq_tiny"} | examples
    for name, example in examples.items():
        if not getattr(given, name):
            raise UserError(f"--{name} is missing; e.g. --{name}={example}")
    check_output_files(given.input, {"output": given.output, "html": given.html}, "scored")
    if adds_sources:
        return _add_sources(config, given)

    from jaxrm.data.config import DataConfig
    from jaxrm.inference import score_file
    from jaxrm.inference.load import check_flags, load_policy, load_reward_model
    from jaxrm.inference.run_checkpoint import find_checkpoint, is_run
    from jaxrm.sharding.mesh import MeshConfig, build_mesh
    from jaxrm.stage_config import REWARD_MODELS

    path = check_flags(given.checkpoint, given.weights, given.adapter)
    configured, run = None if config is None else config.reward.kind, None
    if given.checkpoint is not None:
        run = find_checkpoint(path, "path", REWARD_MODELS)
    elif is_run(given.adapter):
        run = find_checkpoint(given.adapter, "model.adapter", REWARD_MODELS)
    if run is not None:
        kind = score_file.choose_kind_of_run(run, given.kind, configured)
        score_file.check_reference_run(given.reference, kind, run)
    elif given.held_out:
        raise UserError("--held_out goes with a run, which says what it held out; leave it out with --weights")
    data = DataConfig() if run is None else run.config.data
    records = score_file.read_records_to_score(given.input, data, given.held_out, given.max_records)
    mesh = build_mesh(config.mesh if config is not None else MeshConfig())
    model = load_reward_model(path, adapter=given.adapter, mesh=mesh, dtype=given.dtype, template=given.template)
    reference = None if given.reference is None else load_policy(given.reference, mesh=mesh, dtype=given.dtype)
    if run is None:
        kind = score_file.choose_kind_of_model(model, reference, given.kind, configured)
    max_new_tokens = given.max_new_tokens if given.corrections and model.is_seq2seq else None
    rows = score_file.score_records(model, records, kind, given.batch_size, reference, max_new_tokens)
    score_file.write_lines(given.output, rows)
    is_training_data = data.path == given.input and not given.held_out
    score_file.print_scored(records, rows, model.name, kind, given.output, is_training_data)
    if given.html is not None:
        score_file.write_page(given.html, rows, model.name, kind)
    return 0


def _score_benchmark(config: Any, given: flags.FlagValues) -> int:
    """Score a benchmark by subset."""
    for name in ("input", "html", "reference", "held_out"):
        if getattr(given, name):
            raise UserError(f"--{name} does not go with --pairs, a benchmark that is scored by subset; leave it out")
    if getattr(config, "rewards", None):
        raise UserError("--config has several sources, but --pairs scores with one reward model at a time")
    if given.output is not None:
        check_output_files(given.pairs, {"output": given.output}, "figures")

    from jaxrm.inference import score_benchmark
    from jaxrm.inference.load import check_flags, load_reward_model
    from jaxrm.sharding.mesh import MeshConfig, build_mesh

    path = check_flags(given.checkpoint, given.weights, given.adapter)
    mesh = build_mesh(config.mesh if config is not None else MeshConfig())
    models = [load_reward_model(path, adapter=given.adapter, mesh=mesh, dtype=given.dtype, template=given.template)]
    if given.second is not None:
        with naming({"path": "--second", "model.path": "--second", "reward.model": "--second"}):
            models.append(load_reward_model(given.second, mesh=mesh, dtype=given.dtype))
    score_benchmark.run_benchmark(
        models,
        given.pairs,
        kind=given.kind or (None if config is None else config.reward.kind),
        batch_size=given.batch_size,
        max_records=given.max_records,
        output=given.output,
    )
    return 0


def _add_sources(config: Any, given: flags.FlagValues) -> int:
    """Score with the sum of the config's sources."""
    single_model_flags = ("checkpoint", "weights", "adapter", "kind", "reference", "template", "dtype", "held_out")
    for name in single_model_flags:
        if getattr(given, name):
            raise UserError(
                f"--{name} is for scoring with one reward model, but config.rewards has {', '.join(config.rewards)}; "
                f"leave it out, or the config"
            )

    from jaxrm.inference import score_file
    from jaxrm.sharding.mesh import build_mesh
    from jaxrm.stages.rewards import score_records
    from jaxrm.stages.rewards.judges import print_costs

    read = score_file.read_records_to_score(given.input, config.data, False, given.max_records, with_fields=True)
    mesh = build_mesh(config.mesh)
    with naming({"path": "config.model.path", **{name: f"config.{name}" for name in ("model.path", "model.adapter")}}):
        rows, costs = score_records.score_records(config, read.records, read.report, mesh, given.batch_size)
    kind, names = rows[0]["kind"], ", ".join(config.rewards)
    score_file.write_lines(given.output, rows)
    score_file.print_scored(read, rows, names, kind, given.output, is_training_data=False)
    score_records.print_sources(rows)
    print_costs(costs)
    if given.html is not None:
        score_file.write_page(given.html, rows, f"the sum of {names}", kind)
    return 0


if __name__ == "__main__":
    names = FLAG_OF_FIELD
    sys.exit(
        command_line.run(main, CONFIG_CLASSES, define_flags=define_flags, config_required=False, flag_of_field=names)
    )
