"""Ask a model: one prompt, a file of them, or a chat.

python -m jaxrm.generate --checkpoint=runs/quickstart/ppo_seq2seq --prompt="how do i wash the lamp in the office ?"
python -m jaxrm.generate --checkpoint=runs/quickstart/sft --input=prompts.jsonl --output=responses.jsonl
python -m jaxrm.generate --weights=HuggingFaceTB/SmolLM2-135M-Instruct --interactive
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from absl import flags

from jaxrm import atomic
from jaxrm.config import command_line, dicts
from jaxrm.errors import UserError

FLAG_OF_FIELD = {
    "model.path": "--weights",
    "data.eval_path": "--input",
    "data.tokenizer": "--tokenizer",
    "data.template": "--template",
}

if TYPE_CHECKING:
    import jax

    from jaxrm.data.records import Message
    from jaxrm.inference.sampler import Sampler


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    text, number, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("checkpoint", None, "folder of a run, or RUN_DIR/checkpoints/STEP (or /best)", flag_values=values)
    text("weights", None, "published weights instead: hub name, folder or GGUF file", flag_values=values)
    text("tokenizer", None, "with --weights: tokenizer, if it is not beside them", flag_values=values)
    text("template", "auto", "with --weights: chat template", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "compute dtype", flag_values=values)
    text("prompt", None, "a prompt to answer", flag_values=values)
    text("input", None, "file of prompts, in any schema that jaxrm reads", flag_values=values)
    text("output", None, "JSONL to write responses to; standard output without it", flag_values=values)
    flags.DEFINE_bool("interactive", False, "chat; an empty line or Ctrl-D ends it", flag_values=values)
    number("batch_size", 16, "prompts answered at once, with --input", lower_bound=1, flag_values=values)
    number("max_new_tokens", 128, "longest response in tokens", flag_values=values)
    real("temperature", 1.0, "0 is greedy", flag_values=values)
    number("top_k", 0, "draw among this many tokens only; 0 for all", flag_values=values)
    real("top_p", 1.0, "draw among the likeliest tokens that reach this probability; 1 for all", flag_values=values)
    number("seed", 0, "of the draws", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)


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
    from jaxrm.inference.load import open_checkpoint, open_weights
    from jaxrm.inference.sampler import Sampler
    from jaxrm.models.build import ModelSource
    from jaxrm.models.generate import SamplingConfig
    from jaxrm.sharding.mesh import MeshConfig, build_mesh

    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    sampling = dicts.from_dict(SamplingConfig, {name: given[name].value for name in names}, "--")
    prompts = None if given.input is None else _read_prompts(given.input)
    mesh = build_mesh(MeshConfig())
    if given.checkpoint is not None:
        trained = open_checkpoint(given.checkpoint, mesh, given.dtype)
    else:
        source = ModelSource(path=given.weights, dtype=given.dtype or "float32")
        trained = open_weights(source, given.tokenizer, given.template, mesh)
    responder = Sampler(trained.model, trained.params, trained.tokenizer, trained.template, sampling)
    key = jax.random.key(given.seed)
    if given.interactive:
        print(f"{trained.name}; an empty line ends the chat", file=sys.stderr)
        _chat(responder, key)
    elif prompts is not None:
        _answer_file(responder, prompts, given.output, given.batch_size, key)
    else:
        print(responder.respond([[Message("user", given.prompt)]], key)[0])
    return 0


def _read_prompts(path: str) -> "list[Sequence[Message]]":
    from jaxrm.data.config import DataConfig
    from jaxrm.data.readers import read_records

    # Nothing is held out of a file of prompts: the held-out side of a file given as such is all of it.
    whole = DataConfig(path=path, eval_path=path, max_eval_records=None, max_bad_share=1.0)
    records, report = read_records(whole, held_out=True)
    for reason, found in report.bad.items():
        raise UserError(
            f"--input is {path!r}, where {found.count} of {report.total} records are no prompts: {reason} (first at "
            f"{found.first}); mend them, so that every prompt has its response"
        )
    return [record.prompt for record in records]


def _answer_file(
    responder: "Sampler", prompts: "list[Sequence[Message]]", output: str | None, batch_size: int, key: "jax.Array"
) -> None:
    """Write one JSON object a prompt, in order; a file appears under its name once it is whole."""
    import jax

    from jaxrm.runtime.progress import Progress

    def write(file: TextIO) -> None:
        with Progress("generate", len(prompts), unit="prompts", enabled=output is not None) as progress:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                for prompt, response in zip(
                    batch, responder.respond(batch, jax.random.fold_in(key, start)), strict=True
                ):
                    messages = [{"role": m.role, "content": m.content} for m in prompt]
                    row = {"prompt": messages, "response": response}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                progress.update(start + len(batch))

    responder.encode(prompts)  # refuses what cannot be answered before anything is
    if output is None:
        write(sys.stdout)
        return
    with atomic.open_for_writing(Path(output).expanduser()) as file:
        write(file)


def _forget(dialogue: "list[Message]", responder: "Sampler") -> None:
    """Drop the oldest turns of a dialogue that has outgrown the model; a single message stays, to be refused."""
    while len(dialogue) > 1:
        try:
            responder.encode([dialogue])
        except UserError:
            del dialogue[:2]
            print("(the oldest turns no longer fit and are forgotten)", file=sys.stderr)
        else:
            return


def _chat(responder: "Sampler", key: "jax.Array") -> None:
    """Alternate turns until an empty line; the whole dialogue is the prompt of each response."""
    import jax

    from jaxrm.data.records import Message

    dialogue: list[Message] = []
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            said = ""
        if not said:
            return
        dialogue.append(Message("user", said))
        _forget(dialogue, responder)
        response = responder.respond([dialogue], jax.random.fold_in(key, len(dialogue)))[0]
        dialogue.append(Message("assistant", response))
        print(response)


if __name__ == "__main__":
    sys.exit(command_line.run(main, define_flags=define_flags, flag_of_field=FLAG_OF_FIELD))
