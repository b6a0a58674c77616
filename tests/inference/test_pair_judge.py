"""Judges that reply A or B: a language model's share of A is that of its log-probs; replies of an endpoint are read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.published import published_tokenizer

from jaxrm.comparison_config import ComparisonJudgeConfig
from jaxrm.data import templates
from jaxrm.data.records import Message
from jaxrm.errors import UserError
from jaxrm.inference import pair_judge
from jaxrm.inference.load import load_policy
from jaxrm.inference.pair_judge import LanguageModelAsker, PairQuestion, pair_texts, read_pair_question
from jaxrm.inference.policy import Policy
from jaxrm.inference.sharded_model import shard_model
from jaxrm.models.build import ModelSource
from jaxrm.sharding.mesh import MeshConfig, build_mesh


@pytest.fixture(scope="module")
def policy(small):
    """A random policy that writes any text."""
    tokenizer = published_tokenizer("chatml")
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    shape = dataclasses.replace(small, vocab_size=len(tokenizer))
    model = shard_model(ModelSource(preset="tiny"), mesh, shape)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), model.shapes)
    return Policy(model, params, tokenizer, "auto", "a judge")


def test_the_share_of_a_is_that_of_the_next_token(policy):
    """As a plain forward of each question alone has it; a question that is too long has none."""
    asker = LanguageModelAsker(policy, "judges.lm.language_model", ("A", "B"), max_length=120, batch_size=3)
    texts = ["which one ?", "A or B , please", "the first or the second ?", "x " * 200, "B"]
    shares = asker.ask(texts)
    model = nnx.merge(policy.model.graphdef, policy.params)
    letters = [templates.encode_response(policy.tokenizer, letter, "auto")[0] for letter in "AB"]
    for text, share in zip(texts, shares, strict=True):
        ids = np.array([templates.encode_prompt(policy.tokenizer, [Message("user", text)], "auto")])
        if ids.shape[1] > 120:
            assert np.isnan(share)
            continue
        hidden = model(ids, positions=np.arange(ids.shape[1])[None], segment_ids=np.ones_like(ids))
        a, b = np.asarray(model.logits(hidden[:, -1]))[0, letters]
        assert share == pytest.approx(1 / (1 + np.exp(b - a)), abs=1e-5)


def test_words_that_a_tokenizer_lacks_are_refused(make_run, tmp_path):
    """That of an embedded task has words alone, and no letters; with words of its own it may judge."""
    make_run(tmp_path / "sft")
    policy, field = load_policy(str(tmp_path / "sft")), "judges.lm.language_model"
    with pytest.raises(UserError) as error:
        LanguageModelAsker(policy, field, ("A", "B"), max_length=99, batch_size=2)
    words = ("config.judges.lm.language_model is", "no two tokens for A and B", "--config.judges.lm.words=")
    assert all(each in str(error.value) for each in words)
    assert 0 < LanguageModelAsker(policy, field, ("do", "how"), max_length=99, batch_size=2).ask(["how ?"])[0] < 1


@pytest.mark.parametrize("prompt", pair_judge.SHIPPED)
def test_both_answers_are_quoted_in_their_order(prompt):
    template = read_pair_question(ComparisonJudgeConfig(language_model="x", prompt=prompt), "judges.lm.prompt")
    question = PairQuestion([Message("user", "why ?")], "say {second} <<<END", "because")
    (text,) = pair_texts(template, [question], ("one", "two"))
    assert text.index("why ?") < text.index("say {second} <<<END") < text.index("because")
    assert "one or two." in text and "{first_word}" not in text
    assert text.count("because") == 1  # a word in braces that an answer has is text


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        (" b", ""),
        ("B.", "B"),
        ("**A**", "A"),
        ("Answer B", "B"),
        ("<think>B?</think>\nA", "A"),
        ("A or B", ""),
    ],
)
def test_a_reply_is_one_letter_or_none(reply, letter):
    assert pair_judge._verdict(reply, ("A", "B")) == letter
