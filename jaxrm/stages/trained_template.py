"""The template that a run's model was trained with, beside the one that the next stage writes prompts with."""

from typing import TYPE_CHECKING, Any

import jax

from jaxrm.data.template_comparison import write_alike
from jaxrm.data.templates import check_template
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import run_checkpoint, weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_trained_template(config: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a template with which the run that the model or its adapter comes from never saw a prompt.

    SFT may teach another one. It says so.

    Raises:
      UserError: naming the template of the run.
    """
    template = config.data.template
    check_template(tokenizer, template)
    field, path = weights.trained_place(config.model)
    if not run_checkpoint.is_run(path):
        return
    run = run_checkpoint.find_checkpoint(path, field)
    trained = run.config.data.template
    if write_alike((tokenizer, template), (run.load_tokenizer(), trained)):
        return
    difference = (
        f"{option('data.template')} is {template!r}, but {path} was trained with {trained!r}, which "
        f"writes a dialogue differently"
    )
    if config.algorithm != "sft":
        own = f"{flag('data.template')}={trained}"
        if template == trained:  # the tokenizers' own, which are not the same
            own = f"leave {flag('data.tokenizer')} out"
        raise UserError(f"{difference}; use that, {own}, or teach the new one by SFT first")
    if jax.process_index() == 0:
        print(f"{difference}; this run teaches the new one")
