"""The checks in the order in which they run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check, which runs in a process of its own.

    Attributes:
      name: for ``--only``.
      function: ``module:function`` in this folder, called with a `shapes.Shape` and a `report.Report`.
      seconds: its share of the time; what a check leaves over goes to those after it.
      what: it does, for ``--list``.
      decides: whether the exit status depends on its rows.
      is_torch: whether it is torch's, and the accelerator is not opened by JAX.
    """

    name: str
    function: str
    seconds: int
    what: str
    decides: bool = False
    is_torch: bool = False


CHECKS = (
    Check("float32", "correctness:float32", 70, "logits, losses, gradients, tokens, PPO step against CPU", True),
    Check("bfloat16", "correctness:bfloat16", 70, "the same with the kernels of the platform", True),
    Check("decoding", "decoding:decode", 60, "tokens/s of a policy, share of the memory's bandwidth"),
    Check("slots", "refilled_slots:refill", 40, "tokens/s where lengths differ and slots are taken over"),
    Check("sft", "training:sft", 65, "SFT step: tokens/s, MFU, memory against the planner"),
    Check("reward-model", "training:reward_model", 55, "the same of a scalar reward model"),
    Check("scoring", "scoring_time:score", 35, "token rewards in one pass against a plain forward"),
    Check("ppo", "ppo_step:all_weights", 85, "a PPO step by phase, memory against the planner"),
    Check("ppo-lora", "ppo_step:adapters", 85, "a PPO step of a 7B with adapters"),
    Check("several-devices", "several_devices:scale", 40, "a step on all devices against one", True),
    Check("torch-sft", "torch_peer:train", 40, "the SFT step in torch + transformers", is_torch=True),
    Check("torch-decoding", "torch_peer:decode", 30, "the same sampling in torch + transformers", is_torch=True),
)
BY_NAME = {check.name: check for check in CHECKS}
