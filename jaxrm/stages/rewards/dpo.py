"""What a policy of DPO is compared with, where its log-probs are rewards."""

import json
from pathlib import Path

from jaxrm.errors import UserError, flag, option
from jaxrm.inference.weights import RunCheckpoint, identity_of, identity_of_source
from jaxrm.stage_config import PPO, BestOfN, Evaluate


def check_began_with_reference(run: RunCheckpoint, config: PPO | BestOfN | Evaluate) -> None:
    """Refuse a run of DPO that began with another policy than the one that its log-probs are compared with.

    The difference of their log-probs is what DPO learned only where both are the same. A run that lost its records is
    taken at its word.

    Args:
      run: of DPO.
      config: of the stage that is rewarded. Its reference is the policy that it starts from, or in an evaluation
        ``config.evaluate.reference``, where that is given.

    Raises:
      UserError: naming both.
    """
    began_with = _recorded_reference(run.folder.path)
    field, reference = "model.path", identity_of_source(config.model)
    if isinstance(config, Evaluate) and config.evaluate.reference is not None:
        field, reference = "evaluate.reference", identity_of(config.evaluate.reference)
    elif isinstance(config, Evaluate):
        field = "evaluate.reference"
    if began_with is None or _without_folder(began_with) == _without_folder(reference):
        return
    folder, step, _ = began_with.rpartition(", step ")
    raise UserError(
        f"{option('reward.model')} is {run.name}, a policy that DPO trained from {began_with or 'chance'}; its "
        f"log-probs are compared with those of {option(field)}, {reference or 'chance'}, and required is the same; "
        f"e.g. {flag(field)}={folder if step else began_with}"
    )


def _recorded_reference(folder: Path) -> str | None:
    """Which policy exactly a run of DPO began with, by `identity_of_source`; None where no record says so."""
    try:
        recorded = json.loads((folder / "reference_log_probs.json").read_text(encoding="utf-8"))
        return str(recorded["policy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _without_folder(identity: str) -> str:
    """A run's step and when it was started, since its folder may have been moved; of published weights all."""
    _, is_run, which = identity.rpartition(", step ")
    return which if is_run else identity
