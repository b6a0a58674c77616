"""Readings of a study: which of an arm's finished policies a user would have, by how the setting is chosen.

Every setting of the grid is run with every seed, so that a choice costs no run. Each seed is read by itself, as a user
has one SFT policy, one set of pairs and one grid.

| protocol | the policy of a seed |
|---|---|
| ``published`` | of the setting that the template has: no choice is made |
| ``blind`` | of the highest held-out reward, in units of its calibration, at a KL of at most `Results.blind_kl` |
| ``oracle`` | of the highest judge score on prompts of their own, at the end of training |
| ``best checkpoint`` | the same, of all checkpoints along training |
| ``mean`` | all settings, each as likely |
| ``worst`` | of the lowest judge score on these prompts |

Blind is what a user can do, and the oracle what no user has. An arm that rewards do not train has no held-out reward,
and is blind as published.
"""

import math
from collections.abc import Sequence

from jaxrm.study.arms import read_arm
from jaxrm.study.config import BEST
from jaxrm.study.results import Policy, Results

PROTOCOLS = ("published", "blind", "oracle", "best checkpoint", "mean", "worst")
SINGLE = tuple(name for name in PROTOCOLS if name != "mean")
"""The protocols that choose one policy a seed."""


def read(results: Results, protocol: str, world: str, arm: str) -> dict[int, list[Policy]]:
    """The policies of an arm in a world, by seed; seeds whose grid is not there yet are left out.

    Args:
      results: of the study so far.
      protocol: of `PROTOCOLS`.
      world: of the study.
      arm: of the study.
    """
    chosen = {}
    for seed, policies in results.policies_of(world, arm).items():
        is_complete = (world, arm, seed) in results.complete
        picked = _pick(results, protocol, arm, policies, is_complete)
        if picked:
            chosen[seed] = picked
    return chosen


def blind_choice(policies: Sequence[Policy], largest_kl: float) -> Policy:
    """The policy of the highest held-out reward within a KL; where all go further, the one that goes least far."""
    within = [policy for policy in policies if policy.selection["kl"] <= largest_kl]
    if within:
        return max(within, key=lambda policy: policy.selection["reward"])
    return min(policies, key=lambda policy: policy.selection["kl"])


def _pick(results: Results, protocol: str, arm: str, policies: Sequence[Policy], is_complete: bool) -> list[Policy]:
    finals = [policy for policy in policies if policy.key.setting != BEST]
    published = [policy for policy in finals if policy.key.setting == results.published[arm]]
    if protocol == "published" or (protocol == "blind" and read_arm(arm) is None):
        return published
    if not is_complete or not finals:
        return []
    if protocol == "mean":
        return finals
    if protocol == "blind":
        return [blind_choice(finals, results.blind_kl)]
    if protocol == "worst":
        return [min(finals, key=_judge)]
    return [max(policies if protocol == "best checkpoint" else finals, key=_judge)]


def _judge(policy: Policy) -> float:
    score = policy.selection.get("judge", math.nan)
    return -math.inf if math.isnan(score) else score
