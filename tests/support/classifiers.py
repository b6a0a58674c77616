"""Small sequence classifiers as published ones are: config.json, safetensors, tokenizer and chat template."""

import copy
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from support.published import published_tokenizer

from jaxrm.models.hub import parse_hf_config
from jaxrm.models.hub.names import scalar_table

# Families, each with a tokenizer of its own, whose tokens are not those of the embedded tasks.
FAMILIES = {
    "llama": ("Llama", "llama3"),
    "qwen2": ("Qwen2", "qwen2.5"),
    "mistral": ("Mistral", "mistral_v0.3"),
    "gemma": ("Gemma", "gemma1"),
}


def classifier_fields(family, **changes):
    """A small config.json of a classifier of one label."""
    fields = {
        "model_type": family,
        "architectures": [f"{FAMILIES[family][0]}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "vocab_size": 352,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 350,
        "sliding_window": None,
    }
    return {name: value for name, value in (fields | changes).items() if value != "absent"}


def classifier_tokenizer(family):
    """A tokenizer of the family, with padding that no text has."""
    tokenizer = copy.deepcopy(published_tokenizer(FAMILIES[family][1]))
    tokenizer.model_max_length = 128
    return tokenizer


def write_classifier(
    folder, family="llama", *, head="score", extra=None, tokenizer=None, tokenizer_fields=None, **changes
):
    """A classifier of random weights, written without torch.

    Args:
      folder: to be made.
      family: of `FAMILIES`.
      head: name of its head.
      extra: further tensors, by name; None takes one away.
      tokenizer: in place of the family's.
      tokenizer_fields: changes of tokenizer_config.json.
      changes: of the fields of config.json; ``"absent"`` leaves one out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    fields = classifier_fields(family, **changes)
    (folder / "config.json").write_text(json.dumps(fields))
    rng = np.random.default_rng(7)
    table = scalar_table(parse_hf_config(fields), head=f"{head}.weight")
    tensors = {t.name: rng.normal(size=t.file_shape, scale=0.3).astype(np.float32) for t in table}
    tensors = {name: x for name, x in (tensors | (extra or {})).items() if x is not None}
    save_file(tensors, folder / "model.safetensors")
    (tokenizer or classifier_tokenizer(family)).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (tokenizer_fields or {})))
    return folder
