"""Records what TRL 0.11.4's PPOTrainer computes, for tests/ops/test_peers.py to compare with.

0.11 is the last TRL whose PPO maths stands in methods that can be called alone. It wants torch and an older
transformers, so it is not installed for the tests. To make tests/ops/recorded/trl.npz again, in an environment
with tests/requirements-torch.txt:

    pip install --no-deps trl==0.11.4 accelerate==1.15.0 tyro==1.0.17 docstring_parser==0.18.0 shtab==1.13.0 \
        typeguard==4.6.0 psutil==7.2.2
    python tests/ops/record_trl.py
"""

import types
from pathlib import Path

import numpy as np
import torch
import transformers

SETTINGS = {"gamma": 0.97, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.3, "kl_coefficient": 0.15}
CONTROLLER = {"init_kl_coef": 0.2, "target": 6.0, "horizon": 10_000}
BATCH = 256


def inputs(B: int = 5, T: int = 9) -> dict[str, np.ndarray]:
    """Rows of 1 to T tokens; the new log-probs and values have moved far enough to meet the clips."""
    rng = np.random.default_rng(4)
    log_probs = np.log(rng.uniform(0.05, 1.0, (B, T)))
    values = rng.normal(0, 0.6, (B, T))
    arrays = {
        "scores": rng.normal(0, 1.3, B),
        "old_log_probs": log_probs,
        "reference_log_probs": log_probs + rng.normal(0, 0.4, (B, T)),
        "log_probs": log_probs + rng.normal(0, 0.3, (B, T)),
        "old_values": values,
        "values": values + rng.normal(0, 0.4, (B, T)),
        "kls": np.asarray([9.0, 6.3, 1.2]),
    }
    mask = np.arange(T) < np.asarray([9, 1, 6, 3, 7])[:, None]
    return {name: array.astype(np.float32) for name, array in arrays.items()} | {"mask": mask}


def main() -> None:
    """Runs TRL's methods on `inputs` and writes inputs, settings and outputs to one file."""
    # Names that later transformers have dropped: TRL imports them and the maths never calls them.
    for name in ("TopKLogitsWarper", "TopPLogitsWarper"):
        if not hasattr(transformers, name):
            setattr(transformers, name, object)
    from trl.core import masked_whiten
    from trl.trainer.ppo_trainer import PPOTrainer
    from trl.trainer.utils import AdaptiveKLController

    arrays = inputs()
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    mask = given["mask"].float()
    config = types.SimpleNamespace(**SETTINGS, vf_coef=1.0, ratio_threshold=10.0, whiten_rewards=False)
    trainer = types.SimpleNamespace(config=config, kl_ctl=types.SimpleNamespace(value=SETTINGS["kl_coefficient"]))
    trainer._kl_penalty = types.MethodType(PPOTrainer._kl_penalty, trainer)
    outputs = {}

    for estimator, penalty in (("k1", "kl"), ("k2", "mse")):
        config.kl_penalty = penalty
        rewards, _, _ = PPOTrainer.compute_rewards(
            trainer, given["scores"], given["old_log_probs"], given["reference_log_probs"], given["mask"]
        )
        outputs[f"rewards_{estimator}"] = rewards
    for name, shift_mean in (("whitened", True), ("whitened_about_the_mean", False)):
        outputs[name] = masked_whiten(outputs["rewards_k1"], mask, shift_mean=shift_mean)

    _, advantages, returns = PPOTrainer.compute_advantages(trainer, given["old_values"], outputs["rewards_k1"], mask)
    outputs |= {"whitened_advantages": advantages, "returns": returns}

    log_probs, values = given["log_probs"].requires_grad_(), given["values"].requires_grad_()
    logits = torch.zeros(*mask.shape, 2)
    policy_loss, value_loss, statistics = PPOTrainer.loss(
        trainer, given["old_log_probs"], given["old_values"], logits, values, log_probs, mask, advantages, returns
    )
    outputs |= {"policy_loss": policy_loss.detach(), "value_loss": value_loss.detach()}
    outputs["policy_gradient"] = torch.autograd.grad(policy_loss, log_probs)[0]
    outputs["value_gradient"] = torch.autograd.grad(value_loss, values)[0]
    outputs["policy_clipped"] = statistics["policy/clipfrac"]
    outputs["value_clipped"] = statistics["val/clipfrac"]

    controller, coefficients = AdaptiveKLController(**CONTROLLER), []
    for kl in arrays["kls"]:
        controller.update(float(kl), BATCH)
        coefficients.append(controller.value)
    outputs["coefficients"] = torch.tensor(coefficients)

    path = Path(__file__).parent / "recorded" / "trl.npz"
    path.parent.mkdir(exist_ok=True)
    recorded = {name: output.detach().numpy() for name, output in outputs.items()}
    # What is outside the mask is nobody's promise.
    recorded = {name: np.where(arrays["mask"], x, 0) if x.shape == mask.shape else x for name, x in recorded.items()}
    recorded = {f"trl_{name}": output for name, output in recorded.items()}
    np.savez_compressed(path, **arrays, **SETTINGS, **CONTROLLER, batch=BATCH, **recorded)
    print(path.name, {name: float(output) for name, output in recorded.items() if output.ndim == 0})


if __name__ == "__main__":
    main()
