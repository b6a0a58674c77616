"""What scoring refuses before it begins."""

import difflib
from collections.abc import Sequence

from jaxrm.data.pairs import correction_request
from jaxrm.data.tokenizer import load_tokenizer, vocabulary_conflict
from jaxrm.errors import UserError, option
from jaxrm.inference.corrections import check_room
from jaxrm.inference.load import TrainedRewardModel
from jaxrm.inference.token_scores import EncodedRecord
from jaxrm.inference.weights import RunCheckpoint, is_run
from jaxrm.ops import token_rewards


def choose_kind(run: RunCheckpoint, kind: str | None, configured: str | None) -> str:
    """Kind of token reward that a reward model is read by.

    Args:
      run: of the reward model.
      kind: what ``--kind`` says, if it is there.
      configured: what ``config.reward.kind`` says, if there is a config. Without either it is that of the run.

    Raises:
      UserError: where it is no kind, or none that this sort of reward model can give.
    """
    is_seq2seq = run.config.algorithm == "seq2seq_rm"
    kinds = token_rewards.names_for("seq2seq" if is_seq2seq else "scalar")
    if kind is not None and kind not in token_rewards.KINDS:
        near = difflib.get_close_matches(kind, kinds, n=1)
        advice = f"did you mean --kind={near[0]}?" if near else f"e.g. --kind={kinds[0]}"
        raise UserError(f"--kind is {kind!r}; use one of {', '.join(kinds)}; {advice}")
    chosen = kind or configured
    if chosen is None:
        recorded = run.config.reward.kind
        return recorded if recorded in kinds else kinds[0]
    if chosen not in kinds:
        field, sort = "reward.kind" if kind is None else "--kind", "seq2seq" if is_seq2seq else "scalar"
        raise UserError(
            f"{option(field)} is {chosen!r}, but {run.name} is a {sort} reward model, whose kinds are "
            f"{', '.join(kinds)}; "
            f"e.g. --kind={kinds[0]}"
        )
    return chosen


def check_reference(reference: RunCheckpoint, run: RunCheckpoint) -> None:
    """Refuse a reference policy to which a reward model's token ids mean something else, or nothing."""
    theirs, own = (load_tokenizer(str(found.folder.tokenizer)) for found in (reference, run))
    conflict = vocabulary_conflict(own, theirs)
    if conflict is None and max(own.get_vocab().values()) >= reference.shape.vocab_size:
        conflict = f"the one has {len(own)} tokens and the other {reference.shape.vocab_size}"
    if conflict is not None:
        start = run.config.model.path
        example = f"e.g. --reference={start}" if is_run(start) else "such as the run that it started from"
        raise UserError(
            f"--reference is {str(reference.folder.path)!r}, which has another vocabulary than {run.name}: {conflict}; "
            f"required a policy that reads the same ids, {example}"
        )


def check_corrections(model: TrainedRewardModel, tasks: Sequence[EncodedRecord], max_new_tokens: int) -> None:
    """Refuse corrections of up to so many tokens where the model cannot write them behind every response."""
    request = correction_request(model.tokenizer, model.template, model.config.mapping.instruction)
    responses = [ids for task in tasks for _, _, ids in task.responses]
    sources = [task.source for task in tasks for _ in task.responses]
    check_room(model.model.config, request, max_new_tokens, responses, sources, field="--max_new_tokens")
