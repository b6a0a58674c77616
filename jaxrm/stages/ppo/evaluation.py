"""How a policy in training does on held-out prompts: metrics for the rows of the run, and samples for people."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms.rollout import Networks, RewardSource, TokenLogProbs
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample, transcript
from jaxrm.data.tokenizer import token_texts
from jaxrm.ops import reward_scaling
from jaxrm.runtime.metrics import append_row, read_rows
from jaxrm.runtime.preemption import StopRequest
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stages.inputs.prompts import PlacedPrompts
from jaxrm.types import ResponseBatch, TokenRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicyEvaluation:
    """Answers held-out prompts with a policy, and measures the answers.

    Attributes:
      examples: the prompts.
      batches: the same on the devices.
      respond: how the policy answers, e.g. a `jaxrm.algorithms.rollout.Respond`.
      read: from `jaxrm.algorithms.rollout.build_log_probs`.
      reward: source of token rewards.
      networks: what the parameters belong to.
      reference_params: of the frozen SFT policy.
      mesh: the devices.
      key: of the sampling, the same at every evaluation.
      tokenizer: of the policy.
      text: a response's ids as text.
      judge: embedded task whose exact judge marks the answers, or None.
      samples: how many of the answers are kept.
      folder: the run.
    """

    examples: Sequence[PromptExample]
    batches: Sequence[PlacedPrompts]
    respond: Callable[..., ResponseBatch]
    read: Callable[..., TokenLogProbs]
    reward: RewardSource
    networks: Networks
    reference_params: Any
    mesh: Mesh
    key: jax.Array
    tokenizer: "PreTrainedTokenizerBase"
    text: Callable[[np.ndarray], str]
    judge: str | None
    samples: int
    folder: RunFolder

    def __call__(
        self,
        step: int,
        policy_params: Any,
        critic_params: Any,
        calibration: reward_scaling.Calibration,
        stop: StopRequest,
    ) -> dict[str, float] | None:
        """Metrics of the policy after ``step`` steps; its samples are added to the run's ``samples.jsonl``.

        Returns:
          ``eval_reward`` (sum over a response, calibrated as before the first step), where there is a judge
          ``eval_judge`` and what `jaxrm.data.tasks.BEHAVIORS` has for its task (``eval_refusals``, ...; each over the
          prompts that it applies to), ``eval_kl`` (nats a response: log-ratio to the reference at the rollout's
          temperature, an estimate of the KL where these responses are drawn at it too), ``eval_length`` (tokens),
          ``eval_ended`` (share with an end token). None where it was asked to stop before it was done; it has written
          nothing then.
        """
        whole = _whole(self.mesh)
        decoder_params = self.networks.decoder_params(policy_params)
        found: list[tuple[ResponseBatch, TokenLogProbs, TokenRewards]] = []
        for number, (prompts, mask) in enumerate(self.batches):
            if stop.requested and jax.process_count() == 1:
                return None
            key = jax.random.fold_in(self.key, number)
            batch = self.respond(decoder_params, prompts, mask, key)
            readings = self.read(policy_params, critic_params, self.reference_params, batch)
            rewards = self.reward(calibration, batch, readings.reference_log_probs)
            found.append(jax.device_get(whole((batch, readings, rewards))))
        count = len(self.examples)  # the last batch is filled up

        def joined(arrays: Sequence[Any]) -> np.ndarray:
            return np.concatenate(arrays)[:count]

        kept_mask = joined([batch.response_mask for batch, _, _ in found])
        tokens = joined([batch.responses for batch, _, _ in found])
        token_reward = joined([rewards.rewards for _, _, rewards in found])
        log_ratio = joined([readings.log_probs - readings.reference_log_probs for _, readings, _ in found])
        ended = joined([rewards.diagnostics["ended"] for _, _, rewards in found])
        texts = [self.text(ids[kept]) for ids, kept in zip(tokens, kept_mask, strict=True)]
        prompts_asked = [example.messages for example in self.examples]
        metrics = {"eval_reward": float(token_reward.sum(axis=1).mean())}
        marks: list[float] = []
        if self.judge is not None:
            pairs = list(zip(prompts_asked, texts, strict=True))
            marks = [tasks.judge(self.judge, prompt, response) for prompt, response in pairs]
            metrics["eval_judge"] = float(np.mean(marks))
            shown = [tasks.behavior(self.judge, prompt, response) for prompt, response in pairs]
            metrics |= {f"eval_{key}": mean for key, mean in tasks.mean_behavior(self.judge, shown).items()}
        metrics |= {
            "eval_kl": float(log_ratio.sum(axis=1).mean()),
            "eval_length": float(kept_mask.sum(axis=1).mean()),
            "eval_ended": float(ended.mean()),
        }
        if self.folder.is_writer:
            for i in range(min(self.samples, count)):
                row: dict[str, Any] = {"step": step, "prompt": transcript(prompts_asked[i]), "response": texts[i]}
                row["reward"] = float(token_reward[i].sum())
                if marks:
                    row["judge"] = float(marks[i])
                row["tokens"] = token_texts(self.tokenizer, [int(token) for token in tokens[i][kept_mask[i]]])
                row["rewards"] = [float(x) for x in token_reward[i][kept_mask[i]]]
                append_row(self.folder.samples, row)
        return metrics


@functools.cache
def _whole(mesh: Mesh) -> Callable[[Any], Any]:
    """Program that copies what it is given to every device."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def print_samples(folder: RunFolder) -> None:
    """Print what the policy answered before and after, of the samples that the run has kept."""
    rows = read_rows(folder.samples)
    if not rows:
        return
    first, last = rows[0]["step"], rows[-1]["step"]
    before = {row["prompt"]: row for row in rows if row["step"] == first}
    for row in (row for row in rows if row["step"] == last):
        marks = "".join(f", {name} {row[name]:.2f}" for name in ("reward", "judge") if name in row)
        print(f"prompt      {row['prompt']}")
        if first != last and row["prompt"] in before:
            print(f"at step {first:<4}{before[row['prompt']]['response']}")
        print(f"at step {last:<4}{row['response']}  ({marks.removeprefix(', ')})\n")
