"""From pairs to what a reward model trains on: mappings of a seq2seq one, comparisons of a scalar one."""

from collections.abc import Sequence
from functools import partial

from jaxrm.data.examples import TokenExample
from jaxrm.data.loader import build_loader, warm_up
from jaxrm.data.pair_examples import comparison_examples, mapping_examples, marked_comparison_examples
from jaxrm.data.readers import ReadReport
from jaxrm.errors import UserError, flag, option
from jaxrm.stages.inputs.preferences import Preferences
from jaxrm.stages.inputs.training_data import TrainingData, training_data
from jaxrm.stages.stage import Stage


def reward_model_data(
    stage: Stage, train: Preferences, held_out: Preferences, request: Sequence[int] | None
) -> tuple[TrainingData, ReadReport, ReadReport]:
    """Batches for a reward model, and what became of the training and of the held-out pairs.

    Args:
      stage: whose config says how.
      train: one side of the split.
      held_out: the other side. Both mappings of it are evaluated, whatever is trained.
      request: ids that ask a seq2seq reward model for a correction; None for a scalar one.

    Raises:
      UserError: where too few pairs fit, or the run would end before it has learned a correction.
    """
    if request is None:
        # Without marks where they are not read: a run's data is known by a hash of all that is in its examples.
        compare = marked_comparison_examples if stage.config.scalar_rm.reads_prefixes else comparison_examples
        examples, fitted = compare(train.pairs, stage.config.data, first_id=stage.bos_id)
        held_out_examples, held_out_fitted = compare(held_out.pairs, stage.config.data, first_id=stage.bos_id)
        data = training_data(stage, examples, held_out_examples)
    else:
        data, fitted, held_out_fitted = _mappings(stage, train, held_out, request)
    return data, train.report.merge(fitted), held_out.report.merge(held_out_fitted)


def _mappings(
    stage: Stage, train: Preferences, held_out: Preferences, request: Sequence[int]
) -> tuple[TrainingData, ReadReport, ReadReport]:
    config, mapping = stage.config.data, stage.config.mapping
    # Without marks where they are not read: a run's data is known by a hash of all that is in its examples.
    build = partial(mapping_examples, first_id=stage.bos_id, marks_edits=mapping.weighs_edits)
    examples, fitted = build(train.pairs, request, config, identity=mapping.identity)
    held_out_examples, held_out_fitted = build(held_out.pairs, request, config)
    loader = None
    if mapping.identity_warmup_steps:
        copies: list[TokenExample] = [example for example in examples if not example.is_correction]
        loader = warm_up(
            build_loader(copies, config, **stage.batching),
            mapping.identity_warmup_steps,
            build_loader(examples, config, **stage.batching),
        )
    data = training_data(stage, examples, held_out_examples, loader=loader)
    if mapping.identity_warmup_steps >= data.num_steps:
        raise UserError(
            f"{option('mapping.identity_warmup_steps')} is {mapping.identity_warmup_steps}, but the run has "
            f"{data.num_steps} steps in all, so that it would learn no correction; e.g. "
            f"{flag('mapping.identity_warmup_steps')}={data.num_steps // 4}"
        )
    return data, fitted, held_out_fitted
