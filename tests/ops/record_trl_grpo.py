"""Records GRPO and RLOO as TRL 1.12.0 computes them, for tests/ops/test_peers.py to compare with.

The lines of `GRPOTrainer._generate_and_score_completions`, `GRPOTrainer._compute_loss` and `RLOOTrainer` that do the
arithmetic are written here in torch; TRL itself is not needed. To make tests/ops/recorded/trl_grpo.npz again, in an
environment with tests/requirements-torch.txt:

    python tests/ops/record_trl_grpo.py
"""

from pathlib import Path

import numpy as np
import torch

N, T = 4, 7
SETTINGS = {"epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.04, "n": N}


def inputs(groups: int = 3) -> dict[str, np.ndarray]:
    """Responses of 1 to T tokens to three prompts; the rewards of the last group are all equal."""
    rng = np.random.default_rng(11)
    B = groups * N
    log_probs = np.log(rng.uniform(0.05, 1.0, (B, T)))
    rewards = rng.normal(0.4, 1.1, B)
    rewards[-N:] = 0.7
    arrays = {
        "rewards": rewards,
        "old_log_probs": log_probs,
        "reference_log_probs": log_probs + rng.normal(0, 0.4, (B, T)),
        "log_probs": log_probs + rng.normal(0, 0.3, (B, T)),
    }
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    return {name: array.astype(np.float32) for name, array in arrays.items()} | {"mask": mask}


def grpo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """``scale_rewards="group"``."""
    mean = rewards.view(-1, N).mean(dim=1).repeat_interleave(N, dim=0)
    std = rewards.view(-1, N).std(dim=1).repeat_interleave(N, dim=0)
    return (rewards - mean) / (std + 1e-4)


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Without a KL in the reward."""
    grouped = rewards.view(-1, N)
    baselines = (grouped.sum(dim=1, keepdim=True) - grouped) / (N - 1)
    return rewards - baselines.view(-1)


def per_token_loss(log_probs: torch.Tensor, given: dict[str, torch.Tensor], advantages: torch.Tensor) -> torch.Tensor:
    """The clipped surrogate and the KL."""
    coef_1 = torch.exp(log_probs - given["old_log_probs"])
    coef_2 = torch.clamp(coef_1, 1 - SETTINGS["epsilon_low"], 1 + SETTINGS["epsilon_high"])
    loss = -torch.min(coef_1 * advantages.unsqueeze(1), coef_2 * advantages.unsqueeze(1))
    difference = given["reference_log_probs"] - log_probs
    return loss + SETTINGS["beta"] * (torch.exp(difference) - difference - 1)


def main() -> None:
    """Writes inputs, settings and outputs to one file."""
    arrays = inputs()
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    mask = given["mask"].float()
    advantages = grpo_advantages(given["rewards"])
    outputs = {"grpo_advantages": advantages, "rloo_advantages": rloo_advantages(given["rewards"])}
    aggregations = {
        "token": lambda loss: (loss * mask).sum() / mask.sum().clamp(min=1.0),  # loss_type bnpo
        "sequence": lambda loss: ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean(),  # grpo
        "constant": lambda loss: (loss * mask).sum() / (loss.size(0) * T),  # dr_grpo
    }
    for name, aggregate in aggregations.items():
        log_probs = given["log_probs"].clone().requires_grad_()
        loss = aggregate(per_token_loss(log_probs, given, advantages))
        outputs[f"{name}_loss"] = loss.detach()
        outputs[f"{name}_gradient"] = torch.autograd.grad(loss, log_probs)[0]
    path = Path(__file__).parent / "recorded" / "trl_grpo.npz"
    recorded = {f"trl_{name}": output.detach().numpy() for name, output in outputs.items()}
    np.savez_compressed(path, **arrays, **SETTINGS, **recorded)
    print(path.name, {name: float(output) for name, output in recorded.items() if output.ndim == 0})


if __name__ == "__main__":
    main()
