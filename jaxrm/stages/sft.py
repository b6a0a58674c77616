"""The SFT stage: fine-tune a model on demonstrations, or on the chosen responses of pairs."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax

from jaxrm.algorithms import sft
from jaxrm.data.readers import ReadReport
from jaxrm.inference.sampler import Sampler, answerable, prompt_room
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stages.inputs.demonstrations import Demonstrations, load_demonstrations
from jaxrm.stages.inputs.training_data import TrainingData, training_data
from jaxrm.stages.inspection import Inspection, inspect_training
from jaxrm.stages.objective import Objective, build_objective
from jaxrm.stages.report import print_held_out, print_reading, print_size
from jaxrm.stages.stage import Stage, check_training, open_stage
from jaxrm.stages.supervised.train import exit_status, train
from jaxrm.types import TokenBatch


@dataclass(frozen=True)
class _Inputs:
    """What a run trains on, read before its folder is made; ``max_prompt_tokens`` is for prompts that are answered."""

    stage: Stage
    demonstrations: Demonstrations
    held_out: Demonstrations
    data: TrainingData
    max_prompt_tokens: int

    @property
    def reading(self) -> dict[str, ReadReport]:
        """What became of the records."""
        path = self.stage.config.data.path
        return {f"Data in {path}": self.demonstrations.report, "Held-out records": self.held_out.report}


def run(config: Any) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    inputs = _open_inputs(config)
    stage, data = inputs.stage, inputs.data
    folder = stage.open_run([inputs.demonstrations.examples, inputs.held_out.examples])
    if stage.is_writer:
        print_reading(inputs.reading)
        print_size(stage, data)
    trained = train(stage, folder, build_objective(config, stage.model), data)
    if trained.is_complete:
        _print_samples(stage, folder, trained.params, inputs.held_out, inputs.max_prompt_tokens)
    return exit_status(stage, trained, data)


def inspect(config: Any) -> Inspection:
    """What `run` would do; errors are the same, no weights are read and nothing is written."""
    inputs = _open_inputs(config)
    return inspect_training(inputs.stage, inputs.reading, inputs.data)


def _open_inputs(config: Any) -> _Inputs:
    mesh = build_mesh(config.mesh)
    check_training(config, mesh)
    with open_stage(config, mesh, records="demonstrations") as stage:
        max_prompt_tokens = prompt_room(
            stage.model.config, config.evaluation.sampling, "evaluation.sampling.max_new_tokens"
        )
        demonstrations, held_out = (load_demonstrations(stage, held_out=side) for side in (False, True))
        data = training_data(stage, demonstrations.examples, held_out.examples)
    return _Inputs(stage, demonstrations, held_out, data, max_prompt_tokens)


def objective(config: Any, decoder: ShardedModel) -> Objective:
    """Next-token loss on the response tokens of demonstrations."""
    del config
    return Objective(decoder, sft.sft_loss(decoder.graphdef), TokenBatch)


def _print_samples(
    stage: Stage, folder: RunFolder, params: Any, held_out: Demonstrations, max_prompt_tokens: int
) -> None:
    """Responses to the first held-out prompts; all processes generate them together."""
    config = stage.config
    every = (record.prompt for record in held_out.records)
    fitting = answerable(every, stage.tokenizer, stage.template, max_prompt_tokens)
    prompts = list(islice(fitting, config.evaluation.samples))
    sampler = Sampler(stage.model, params, stage.tokenizer, stage.template, config.evaluation.sampling)
    responses = sampler.respond(prompts, jax.random.key(config.seed))
    if stage.is_writer:
        print_held_out(folder)
        for prompt, response in zip(prompts, responses, strict=True):
            print(f"prompt    {prompt[-1].content}\nresponse  {response}\n")
        print(f"The run is in {folder.path}")
