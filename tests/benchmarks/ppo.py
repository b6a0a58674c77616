"""One PPO iteration beside TRL's, phase by phase, on the same shape and batch in one run.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/ppo.py
    PYTHONPATH=. .venv/bin/python tests/benchmarks/ppo.py --preset=smollm2-135m --batch=8 --prompt=64 --response=64

A scalar reward model, a critic of its own, one epoch of one minibatch, random parameters. TRL is the last version with
PPO (pip install trl==1.12.0 accelerate, and torch); without it that line is left out. TRL collects garbage several
times in each iteration; here that is switched off, which is to its advantage. TRL keeps all of each layer for the
backward pass; what jaxrm keeps is --remat.
"""

import argparse
import dataclasses
import gc
import importlib.util
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.algorithms import scoring
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.inference import sharded_model, weights
from jaxrm.models import heads
from jaxrm.models.build import ModelSource, init_scalar_head
from jaxrm.models.config import preset
from jaxrm.models.sampling import SamplingConfig
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.runtime.checkpoint import CheckpointConfig, Checkpoints
from jaxrm.runtime.metrics import PHASES
from jaxrm.runtime.preemption import StopRequest
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO
from jaxrm.stages.inputs.prompts import PlacedPrompts
from jaxrm.stages.ppo.critic import zero_head
from jaxrm.stages.ppo.data import PPOData
from jaxrm.stages.ppo.learner import open_learner
from jaxrm.stages.ppo.loop import PPORun, fit

SMALL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 24,
}


def shape_of(name):
    if name == "small":
        return dataclasses.replace(preset("tiny"), vocab_size=256, **SMALL)
    return preset(name)


class Prompts:
    """The same prompts again and again."""

    def __init__(self, ids):
        self.ids = ids

    def __next__(self):
        return self.ids

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


class RecordedMetrics:
    def __init__(self):
        self.rows = []

    def step(self, step, metrics):
        self.rows.append(metrics)

    def evaluation(self, step, metrics):
        pass


def jaxrm_side(arguments, ids):
    """Metrics of each iteration, and how many programs were compiled after the first."""
    shape, source = shape_of(arguments.preset), ModelSource(preset="tiny", remat=arguments.remat)
    end = shape.vocab_size - 1
    config = PPO(
        model=source,
        data=DataConfig(path="none", batch_size=arguments.batch, max_length=arguments.prompt + arguments.response),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=arguments.response)),
        reward=RewardConfig(kind="scalar", function="none:none"),
        ppo=PPOConfig(),
        critic=CriticConfig(optimizer=OptimizerConfig(lr=5e-6)),
        optimizer=OptimizerConfig(lr=1e-5),
        evaluation=JudgedEvaluationConfig(every=10**9),
        checkpoint=CheckpointConfig(every=10**9),
    )
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    decoder, scalar = (
        sharded_model.shard_model(source, mesh, shape),
        sharded_model.shard_scalar_model(source, mesh, shape),
    )
    learner = open_learner(config, mesh, decoder, scalar, num_steps=arguments.steps, end_ids=(end,))

    def params(seed):
        return weights.load_or_init_params(shape, source, jax.random.key(seed), decoder.shapes, decoder.shardings)

    head = init_scalar_head(shape, jax.random.key(3), scalar.shardings["scalar_head"])
    reward_params = heads.from_decoder_params(params(1), head)
    score = scoring.build_score_step(
        scoring.build_scorer(KINDS["scalar"], scalar.graphdef, request=(), end_ids=(end,)),
        params_sharding=scalar.shardings,
        batch_sharding=learner.shardings.policy.step,
    )
    programs = learner.programs(lambda calibration, batch, _: score(reward_params, calibration, batch, None))
    state = learner.init_state(params(0), heads.from_decoder_params(params(2), zero_head(scalar)), jax.random.key(0))
    place = lambda ids: PlacedPrompts(jnp.asarray(ids), jnp.ones(ids.shape, bool))  # noqa: E731 - short
    recorded, compiled = RecordedMetrics(), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(len(recorded.rows)) if name.endswith("backend_compile_duration") else None
    )
    with tempfile.TemporaryDirectory() as folder:
        run = PPORun(
            learner=learner,
            programs=programs,
            base={},
            reference_params=params(0),
            data=PPOData(Prompts(ids), place, fingerprint=""),
            evaluate=lambda *_: {"eval_reward": 0.0},
            checkpoints=Checkpoints(folder),
            reporter=recorded,
            stop=StopRequest(),
        )
        fit(run, state, jax.random.key(0))
    # The last iteration saves, after its metrics came.
    return recorded.rows, sum(1 <= at < arguments.steps for at in compiled)


def trl_side(arguments, ids):
    """Seconds of each iteration of TRL's PPOTrainer."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import datasets
    import torch
    import transformers
    from trl.experimental.ppo import PPOConfig as TrlConfig
    from trl.experimental.ppo import PPOTrainer

    from jaxrm.data.tasks import write_task
    from jaxrm.data.tokenizer import load_tokenizer

    shape = shape_of(arguments.preset)
    llama = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_embeddings,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=shape.vocab_size - 1,
        pad_token_id=0,
        num_labels=1,
    )

    class Clock(transformers.TrainerCallback):
        def __init__(self):
            self.times = [time.perf_counter()]

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        write_task("safety", folder, seed=0)
        tokenizer = load_tokenizer(f"{folder}/tokenizer")
        tokenizer.padding_side, tokenizer.pad_token_id = "left", 0
        config = TrlConfig(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=arguments.batch,
            num_ppo_epochs=1,
            num_mini_batches=1,
            total_episodes=arguments.batch * arguments.steps,
            response_length=arguments.response,
            temperature=1.0,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        rows = datasets.Dataset.from_dict({"input_ids": ids.tolist() * 2})
        torch.manual_seed(0)
        language = transformers.AutoModelForCausalLM.from_config
        classifier = transformers.AutoModelForSequenceClassification.from_config
        trainer = PPOTrainer(
            config,
            processing_class=tokenizer,
            model=language(llama),
            ref_model=language(llama),
            reward_model=classifier(llama),
            value_model=classifier(llama),
            train_dataset=rows,
            eval_dataset=rows.select(range(2)),
        )
        clock = Clock()
        trainer.add_callback(clock)
        collect, gc.collect = gc.collect, lambda *_: 0
        try:
            trainer.train()
        finally:
            gc.collect = collect
    return np.diff(clock.times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help="small, or a public name such as smollm2-135m")
    parser.add_argument("--remat", default="full", help="what jaxrm keeps: full, attention, dots or none")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=14)
    parser.add_argument("--response", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="iterations of each side; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2, help="times that the sides take turns")
    arguments = parser.parse_args()
    vocab = min(shape_of(arguments.preset).vocab_size, 190)
    ids = np.random.default_rng(0).integers(2, vocab, (arguments.batch, arguments.prompt)).astype(np.int32)
    has_trl = all(importlib.util.find_spec(name) is not None for name in ("trl", "torch"))
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        rows, recompiled = jaxrm_side(arguments, ids)
        ours += rows[1:]
        if has_trl:
            theirs += list(trl_side(arguments, ids)[1:])
    best = min(ours, key=lambda row: row["step_seconds"])
    print(f"{arguments.preset}, batch {arguments.batch}, {arguments.prompt} + {arguments.response} tokens, float32")
    print(
        f"jaxrm  {best['step_seconds']:.3f} s an iteration (median "
        f"{statistics.median(row['step_seconds'] for row in ours):.3f}); compiled after the first: {recompiled}"
    )
    for phase in PHASES:
        print(f"  {phase:8s} {best[f'{phase}_seconds']:.3f} s  {best[f'{phase}_tokens_per_second']:,.0f} tokens/s")
    if has_trl:
        print(
            f"TRL    {min(theirs):.3f} s an iteration (median {statistics.median(theirs):.3f}), without its garbage "
            f"collection; jaxrm takes {best['step_seconds'] / min(theirs):.2f} of it"
        )
    else:
        print("TRL    is not installed: pip install trl==1.12.0 accelerate torch")


if __name__ == "__main__":
    main()
