"""What a policy of DPO is compared with, where its log-probs are rewards."""

from jaxrm.errors import UserError, flag, option
from jaxrm.inference.run_checkpoint import RunCheckpoint
from jaxrm.inference.weights import identity_of, identity_of_source, is_same_identity, split_identity
from jaxrm.stage_config import PPO, BestOfN, Evaluate
from jaxrm.stages.dpo.reference import recorded_policy


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
    began_with = recorded_policy(run.folder.path)
    field, reference = "model.path", identity_of_source(config.model)
    if isinstance(config, Evaluate) and config.evaluate.reference is not None:
        field, reference = "evaluate.reference", identity_of(config.evaluate.reference)
    elif isinstance(config, Evaluate):
        field = "evaluate.reference"
    if began_with is None or is_same_identity(began_with, reference):
        return
    raise UserError(
        f"{option('reward.model')} is {run.name}, a policy that DPO trained from {began_with or 'chance'}; its "
        f"log-probs are compared with those of {option(field)}, {reference or 'chance'}, and required is the same; "
        f"e.g. {flag(field)}={split_identity(began_with)[0]}"
    )
