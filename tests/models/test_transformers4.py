"""Exports opened by transformers 4, in an environment of its own: the same ids, logits and scores.

python3 -m venv /tmp/transformers4 && /tmp/transformers4/bin/pip install 'transformers<5' torch
JAXRM_TRANSFORMERS4_PYTHON=/tmp/transformers4/bin/python pytest tests/models/test_transformers4.py
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrm import export
from jaxrm.algorithms.reading import response_scores
from jaxrm.config import command_line
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.inference.load import load_policy, load_reward_model
from jaxrm.models.hub import export_model
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import ResponseBatch

PYTHON = os.environ.get("JAXRM_TRANSFORMERS4_PYTHON")
SCRIPT = Path(__file__).with_name("transformers4.py")
TEXTS = ["how do i repair a lamp?", "a  <eos> b <image>c", "how do i steal 12 lamps, please!"]


def exported(run, folder):
    """The folder that ``python -m jaxrm.export`` makes of a run."""
    arguments = ["export", f"--checkpoint={run}", f"--output={folder}"]
    main = command_line.run(export.main, define_flags=export.define_flags, argv=arguments)
    assert main == 0
    return folder


@pytest.fixture(scope="module")
def exports(make_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    for name in ("sft", "scalar_rm"):
        make_run(root / name, name)
        exported(root / name, root / "out" / name)
    policy = load_policy(str(root / "sft"))
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<audio>"]})
    export_model(root / "out" / "extra", policy.params, policy.model.config, tokenizer=policy.tokenizer)
    return root


def test_a_tokenizer_is_written_as_both_versions_read_it(exports):
    for name in ("sft", "scalar_rm", "extra"):
        settings = json.loads((exports / "out" / name / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not isinstance(settings.get("extra_special_tokens"), list)
    assert settings["additional_special_tokens"] == ["<image>", "<audio>"]


def test_transformers_5_reads_the_same_ids(exports):
    from transformers import AutoTokenizer

    tokenizer = load_policy(str(exports / "sft")).tokenizer
    again = AutoTokenizer.from_pretrained(str(exports / "out" / "sft"))
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    extra = AutoTokenizer.from_pretrained(str(exports / "out" / "extra"))
    assert extra("<image>")["input_ids"] == [len(tokenizer)] and "<audio>" in extra.all_special_tokens


@pytest.mark.skipif(PYTHON is None, reason="JAXRM_TRANSFORMERS4_PYTHON names no Python with transformers<5 and torch")
def test_transformers_4_gives_the_same_ids_logits_and_scores(exports, tmp_path):
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    policy = load_policy(str(exports / "sft"), mesh=mesh)
    reward_model = load_reward_model(str(exports / "scalar_rm"), mesh=mesh)
    tokenizer = policy.tokenizer
    rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    request = {
        "policy": str(exports / "out" / "sft"),
        "classifier": str(exports / "out" / "scalar_rm"),
        "tokenizer": str(exports / "out" / "extra"),
        "texts": TEXTS,
        "rows": rows,
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    command = [PYTHON, str(SCRIPT), str(tmp_path / "request.json"), str(tmp_path / "result.json")]
    subprocess.run(command, check=True, env=environment, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert int(result["version"].split(".")[0]) == 4

    extra = load_tokenizer(str(exports / "out" / "extra"))
    assert result["tokenizer"]["ids"] == [extra(text)["input_ids"] for text in TEXTS]
    assert result["tokenizer"]["special"] == sorted(extra.all_special_tokens)
    theirs = result["policy"]
    assert theirs["class"] == "PreTrainedTokenizerFast"
    assert theirs["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert theirs["decoded"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in theirs["ids"]]
    assert theirs["special"] == sorted(tokenizer.all_special_tokens)
    assert theirs["eos"] == tokenizer.eos_token_id
    assert max(token for row in theirs["drawn"] for token in row) < len(tokenizer)
    decoder = nnx.merge(policy.model.graphdef, policy.params)
    differences = []
    for row, logits in zip(rows, theirs["logits"], strict=True):
        ids = jnp.asarray([row])
        hidden = decoder(ids, positions=jnp.arange(len(row))[None], segment_ids=jnp.ones_like(ids))
        ours = np.asarray(decoder.logits(hidden))[0, :, : len(tokenizer)]
        differences.append(np.abs(ours - np.asarray(logits)[:, : len(tokenizer)]).max())
    width = max(map(len, rows))
    tokens = jnp.asarray([[*row, *[0] * (width - len(row))] for row in rows], jnp.int32)
    mask = jnp.arange(width)[None] < jnp.asarray([len(row) for row in rows])[:, None]
    batch = ResponseBatch(tokens[:, :1], mask[:, :1], tokens[:, 1:], mask[:, 1:])
    scores = np.asarray(response_scores(reward_model.model.graphdef, reward_model.params, batch))
    assert result["classifier"]["pad"] not in reward_model.end_ids
    for side, values in result["classifier"]["scores"].items():
        differences.append(np.abs(scores - np.asarray(values)).max())
        print(f"padding {side}: scores differ by at most {differences[-1]:.1e} of {np.ptp(scores):.2f}")
    print(f"transformers {result['version']}: logits differ by at most {max(differences[: len(rows)]):.1e}")
    assert max(differences) < 1e-4
