"""Ask a model: one prompt, a file of them, or a chat.

python -m jaxrm.generate --checkpoint=runs/quickstart/ppo_seq2seq --prompt="how do i wash the lamp in the office ?"
python -m jaxrm.generate --checkpoint=runs/quickstart/sft --input=prompts.jsonl --output=responses.jsonl
python -m jaxrm.generate --weights=HuggingFaceTB/SmolLM2-135M-Instruct --interactive
"""

import sys

from jaxrm.runtime import preemption

if __name__ == "__main__":
    preemption.say_interrupted()  # before the imports below

from absl import flags

from jaxrm.config import command_line, dicts
from jaxrm.errors import UserError

FLAG_OF_FIELD = {"path": "--checkpoint", "model.path": "--weights", "data.eval_path": "--input"}
FLAG_OF_FIELD |= {"data.tokenizer": "--tokenizer", "data.template": "--template", "max_new_tokens": "--max_new_tokens"}
FLAG_OF_FIELD |= {"model.adapter": "--adapter", "batch_size": "--batch_size"}


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    text, number, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("checkpoint", None, "folder of a run, or RUN_DIR/checkpoints/STEP (or /best)", flag_values=values)
    text("weights", None, "published weights instead: hub name, folder or GGUF file", flag_values=values)
    text("adapter", None, "with --weights: adapters that stand on them, a PEFT folder or a run", flag_values=values)
    text("tokenizer", None, "with --weights: tokenizer, if it is not beside them", flag_values=values)
    text("template", "auto", "with --weights: chat template", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "compute dtype", flag_values=values)
    text("prompt", None, "a prompt to answer", flag_values=values)
    text("input", None, "file of prompts, in any schema that jaxrm reads", flag_values=values)
    text("output", None, "JSONL to write responses to, else standard output; a killed run goes on", flag_values=values)
    flags.DEFINE_bool("interactive", False, "chat; an empty line or Ctrl-D ends it", flag_values=values)
    number("batch_size", 16, "prompts answered at once, with --input", lower_bound=1, flag_values=values)
    number("max_new_tokens", 128, "longest response in tokens", flag_values=values)
    real("temperature", 1.0, "0 is greedy", flag_values=values)
    number("top_k", 0, "draw among this many tokens only; 0 for all", flag_values=values)
    real("top_p", 1.0, "draw among the likeliest tokens that reach this probability; 1 for all", flag_values=values)
    number("seed", 0, "sampling seed", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)


def main(_: None, given: flags.FlagValues) -> int:
    """Open the model and answer."""
    if sum([given.prompt is not None, given.input is not None, given.interactive]) != 1:
        raise UserError("give one of --prompt=TEXT, --input=FILE and --interactive")
    if (given.checkpoint is None) == (given.weights is None):
        raise UserError("give one of --checkpoint=RUN_DIR and --weights=MODEL")
    if given.prompt is not None and not given.prompt.strip():
        raise UserError('--prompt is empty; required some text, e.g. --prompt="how do i wash a lamp?"')
    if given.checkpoint is not None and (given.tokenizer is not None or given.template != "auto"):
        raise UserError("--tokenizer and --template go with --weights; a run has its own, so leave them out")
    if given.output is not None:
        if given.input is None:
            raise UserError("--output goes with --input=FILE; a single response and a chat go to standard output")
        command_line.check_output_file("--output", given.output, "responses.jsonl")

    import jax

    from jaxrm.data.records import Message
    from jaxrm.inference.chat import chat
    from jaxrm.inference.load import check_flags, load_policy
    from jaxrm.inference.prompt_file import read_prompt_file, write_responses
    from jaxrm.inference.weights import identity_of_source
    from jaxrm.models.build import ModelSource
    from jaxrm.models.sampling import SamplingConfig

    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    sampling = dicts.from_dict(SamplingConfig, {name: given[name].value for name in names}, "--")
    prompts = None if given.input is None else read_prompt_file(given.input)
    path = check_flags(given.checkpoint, given.weights, given.adapter)
    template = None if given.checkpoint is not None or given.template == "auto" else given.template
    policy = load_policy(path, adapter=given.adapter, dtype=given.dtype, tokenizer=given.tokenizer, template=template)
    sampler, key = policy.sampler(sampling), jax.random.key(given.seed)
    if given.interactive:
        print(f"{policy.name}; an empty line ends the chat", file=sys.stderr)
        chat(sampler, key)
    elif prompts is not None:
        flags_of_answers = ("checkpoint", "weights", "adapter", "tokenizer", "template", "dtype", "seed", *names)
        identity = {name: given[name].value for name in flags_of_answers}
        identity["model"] = identity_of_source(ModelSource(path=path, adapter=given.adapter))
        write_responses(sampler, prompts, given.output, given.batch_size, key, identity)
    else:
        print(sampler.respond([[Message("user", given.prompt)]], key)[0])
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main, define_flags=define_flags, flag_of_field=FLAG_OF_FIELD))
