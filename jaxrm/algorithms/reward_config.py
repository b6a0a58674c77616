"""The `reward` section of a config: where rewards come from, and how they become token rewards."""

from dataclasses import dataclass
from typing import Literal

from jaxrm.errors import UserError, flag, option
from jaxrm.ops import token_rewards


def check_kind(kind: str, field: str) -> None:
    """Refuse what is no kind of token reward; ``field`` names what gave it. One's own is not imported for it.

    Raises:
      UserError: with the kinds that there are.
    """
    module, _, function = kind.partition(":")
    own = all(part.isidentifier() for part in (*module.split("."), function))
    if kind not in token_rewards.KINDS and not own:
        raise UserError(
            f"{option(field)} is {kind!r}; use one of {', '.join(token_rewards.KINDS)}, or one's own, "
            f"package.module:function, "
            f"e.g. {flag('reward.kind')}=literal"
        )


@dataclass(frozen=True)
class RewardConfig:
    """Where rewards come from, and how they become token rewards.

    The defaults are the paper's kind, which none beats in the lab (README, "The lab"), scaled to one unit so that a KL
    coefficient means the same for all kinds, and centred: without, ``soft`` lost up to 0.14 of the judge's 1 there.

    Attributes:
      kind: one of `jaxrm.ops.token_rewards.KINDS`; ``literal`` is the paper's, ``scalar`` and
        ``scalar_length_residual`` belong to a scalar reward model, or to a function, and the others to a seq2seq one.
        One's own is ``package.module:function``, see `jaxrm.ops.token_rewards.reward_kind`.
      model: folder of the reward model's run, for PPO.
      function: in place of a reward model, for rewards that can be verified: ``package.module:name`` of a Python
        function ``(prompts, responses) -> rewards`` (see `jaxrm.stages.rewards.sources`), or the exact judge of an
        embedded task, ``task:safety``.
        What follows is set by a calibration pass before PPO and read there; a reward model's own evaluation reads
        ``center`` alone.
      scale: ``unit`` gives the sum over a response unit standard deviation over a calibration set; or a number.
      center: what is taken off each token's value in tag and ``soft`` rewards: a ``running`` mean, the ``fixed`` mean
        of the calibration set, or ``none``.
      center_momentum: how much of the running mean survives an update.
      calibration_responses: responses of the SFT policy in the calibration set, at least; whole batches are taken.
    """

    kind: str = "literal"
    model: str | None = None
    function: str | None = None
    scale: float | Literal["unit"] = "unit"
    center: Literal["running", "fixed", "none"] = "running"
    center_momentum: float = 0.9
    calibration_responses: int = 256

    def __post_init__(self) -> None:
        check_kind(self.kind, "reward.kind")
        if self.model is not None and self.function is not None:
            raise UserError(
                f"{option('reward')} has both model {self.model!r} and function {self.function!r}; rewards come "
                f"from one "
                f"of them, e.g. {flag('reward.function')}=None"
            )
        if self.function is not None and self.kind not in token_rewards.names_for("scalar"):
            raise UserError(
                f"{option('reward.kind')} is {self.kind!r}, but a function rewards the whole response; "
                f"use {flag('reward.kind')}=scalar"
            )
        if self.scale != "unit" and not 0 < self.scale < float("inf"):
            raise UserError(
                f"{option('reward.scale')} is {self.scale}; it must be unit or a finite number above 0, "
                f"e.g. {flag('reward.scale')}=unit"
            )
        if self.center not in ("running", "fixed", "none"):
            raise UserError(
                f"{option('reward.center')} is {self.center!r}; use running, fixed or none, "
                f"e.g. {flag('reward.center')}=running"
            )
        if not 0 <= self.center_momentum < 1:
            raise UserError(
                f"{option('reward.center_momentum')} is {self.center_momentum}; it must be at least 0 and below 1, "
                f"e.g. {flag('reward.center_momentum')}=0.9"
            )
        if self.calibration_responses < 2:
            raise UserError(
                f"{option('reward.calibration_responses')} is {self.calibration_responses}; it must be at least 2, "
                f"e.g. {flag('reward.calibration_responses')}=256"
            )
