"""The losses of `jaxrm.algorithms`, of a loaded model: ``jaxrm.losses.seq2seq_rm(model)``."""

from jaxrm.algorithms.scalar_rm import ScalarRMConfig, scalar_rm_loss
from jaxrm.algorithms.seq2seq_rm import seq2seq_rm_loss
from jaxrm.algorithms.sft import sft_loss
from jaxrm.algorithms.train_step import LossFn
from jaxrm.errors import UserError, arguments
from jaxrm.inference.policy import Policy
from jaxrm.inference.reward_model import RewardModel


@arguments()
def sft(model: Policy | RewardModel) -> LossFn:
    """Next-token loss on responses, of `jaxrm.demonstrations`; see `jaxrm.algorithms.sft.sft_loss`."""
    _check_sort(model, is_scalar=False)
    return sft_loss(model.model.graphdef)


@arguments()
def seq2seq_rm(
    model: Policy | RewardModel,
    *,
    correction_weight: float = 1.0,
    identity_weight: float = 1.0,
    edit_weight: float = 1.0,
) -> LossFn:
    """Sequence MLE on both mappings, of `jaxrm.pairs`; see `jaxrm.algorithms.seq2seq_rm.seq2seq_rm_loss`."""
    _check_sort(model, is_scalar=False)
    return seq2seq_rm_loss(
        model.model.graphdef,
        correction_weight=correction_weight,
        identity_weight=identity_weight,
        edit_weight=edit_weight,
    )


@arguments({"scalar_rm": ""})
def scalar_rm(model: RewardModel, *, margin: float = 0.0, l2: float = 0.0) -> LossFn:
    """Bradley-Terry loss, of `jaxrm.comparisons`; see `jaxrm.algorithms.scalar_rm.scalar_rm_loss`."""
    _check_sort(model, is_scalar=True)
    return scalar_rm_loss(model.model.graphdef, ScalarRMConfig(margin=margin, l2=l2))


def _check_sort(model: Policy | RewardModel, *, is_scalar: bool) -> None:
    if (isinstance(model, RewardModel) and model.sort == "scalar") == is_scalar:
        return
    if is_scalar:
        raise UserError(
            "model has no scalar head; it must be a scalar reward model, e.g. policy.as_reward_model('scalar')"
        )
    raise UserError("model is a scalar reward model, which has no language head; it must be a policy or a seq2seq one")
