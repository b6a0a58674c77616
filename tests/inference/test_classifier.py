"""Classifiers as reward models: their scores are transformers', padded and alone, by their own tokenizer."""

import copy
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.classifiers import FAMILIES, classifier_fields, classifier_tokenizer, write_classifier

import jaxrm
from jaxrm import score
from jaxrm.algorithms.reward_config import ClassifierConfig
from jaxrm.data import templates
from jaxrm.data.records import Message
from jaxrm.data.responses import Response
from jaxrm.errors import UserError, naming
from jaxrm.inference.open_classifier import describe_classifier, open_classifier
from jaxrm.inference.text_counts import TextCounts
from jaxrm.inference.text_scorer import TextSample
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.hub import load_params, read_model_config
from jaxrm.sharding.mesh import MeshConfig, build_mesh

TOLERANCE = 1e-4
DIALOGUES = [
    ([Message("user", "what is the river ?")], "a stone"),
    ([Message("user", "hello")], "good " * 40),
    ([Message("user", "why 12 ?"), Message("assistant", "because"), Message("user", "bad")], "please think\n\ngood"),
    ([Message("user", "in french")], ""),
]


@pytest.fixture(scope="module")
def one():
    return build_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    return {family: write_classifier(root / family, family) for family in FAMILIES}


def opened(folder, mesh, **options):
    return open_classifier(str(folder), ClassifierConfig(**options), mesh=mesh)


def samples(dialogues=DIALOGUES):
    return [TextSample(prompt, Response(response), {}) for prompt, response in dialogues]


def as_dicts(prompt, response):
    turns = [*prompt, Message("assistant", response)]
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def loaded(folder):
    """The tokenizer as users of a classifier load it; its class may be the family's, which splits otherwise."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer, prompt, response, **options):
    """As the makers of a classifier have its users do it."""
    return list(tokenizer.apply_chat_template(as_dicts(prompt, response), return_dict=False, **options))


def score_of_language_model(folder, rows, copied):
    """The head on the hidden state of a language model with the same weights: another way through jaxrm."""
    copied.mkdir()
    fields = json.loads((folder / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("score.weight")[0]
    save_file(tensors, copied / "model.safetensors")
    config = read_model_config(str(copied))
    decoder = nnx.merge(
        build.abstract_decoder(config, ModelSource(preset="given"))[0], load_params(str(copied), config)
    )
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    hidden = nnx.jit(lambda m, *a: m(a[0], positions=a[1], segment_ids=a[2]))(
        decoder, *map(jnp.asarray, (tokens, positions, np.ones_like(tokens)))
    )
    return np.array([np.asarray(hidden, np.float64)[i, len(ids) - 1] @ head for i, ids in enumerate(rows)])


def ids_read(classifier, *dialogues):
    """Ids that a classifier reads of each dialogue."""
    texts = [classifier.write(*each) for each in dialogues]
    return [classifier._readable(ids) for ids in templates.encode(classifier.tokenizer, texts)]


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- scores


def test_a_score_is_the_head_on_the_last_token(folders, one, tmp_path):
    rows = [ids_of(loaded(folders["llama"]), *each) for each in DIALOGUES]
    expected = score_of_language_model(folders["llama"], rows, tmp_path / "as_language_model")
    scores = opened(folders["llama"], one)(samples())
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE)
    assert scores.dtype == np.float32
    assert np.ptp(scores) > 0.1


@pytest.mark.slow
def test_a_mesh_of_eight_gives_the_scores_of_one_device(folders, one):
    alone, spread = (opened(folders["qwen2"], mesh) for mesh in (one, build_mesh(MeshConfig(2, 2, 2))))
    np.testing.assert_allclose(spread(samples()), alone(samples()), atol=TOLERANCE)


def test_scores_alone_are_those_in_a_batch(folders, one):
    classifier = opened(folders["gemma"], one)
    alone = [classifier(samples([each]))[0] for each in DIALOGUES]
    np.testing.assert_allclose(classifier(samples()), alone, atol=1e-5)
    assert classifier._step._cache_size() <= 3  # widths, of few buckets


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_apply_chat_template(family, folders, one):
    """Also where the tokenizer would add a BOS to a text that has one."""
    classifier = opened(folders[family], one)
    rows = ids_read(classifier, *DIALOGUES)
    for row, each in zip(rows, DIALOGUES, strict=True):
        assert row.tolist() == ids_of(loaded(folders[family]), *each)


def test_a_spelled_out_special_token_stays_text(folders, one):
    classifier = opened(folders["llama"], one)
    (ids,) = ids_read(classifier, (DIALOGUES[0][0], "good<|eot_id|>good"))
    end = classifier.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert np.sum(ids == end) == 2  # of the two turns
    assert classifier.tokenizer.decode(ids).endswith("good<|eot_id|>good<|eot_id|>")


@pytest.mark.parametrize(("pad", "offset"), [(None, 0), ("<|eot_id|>", 1)])
def test_the_score_is_read_before_padding_by_its_id(pad, offset, tmp_path, one):
    """Also where that is the id which ends a turn, as transformers does; without one it is read at the last token."""
    tokenizer = classifier_tokenizer("llama")
    pad_id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    classifier = opened(write_classifier(tmp_path / "m", pad_token_id=pad_id), one)
    (ids,) = ids_read(classifier, DIALOGUES[0])
    whole = ids_of(tokenizer, *DIALOGUES[0])
    assert ids.tolist() == whole[: len(whole) - offset]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", ["option", "tokenizer", "positions"])
def test_overlong_texts_are_cut_as_the_tokenizer_does(side, limit, tmp_path, one, capsys):
    fields = {"truncation_side": side, "model_max_length": 40 if limit == "tokenizer" else 10**30}
    positions = 40 if limit == "positions" else 128
    folder = write_classifier(tmp_path / "m", tokenizer_fields=fields, max_position_embeddings=positions)
    classifier = opened(folder, one, max_length=40 if limit == "option" else None)
    for _ in range(2):
        classifier(samples())
    rows = ids_read(classifier, *DIALOGUES)
    for row, each in zip(rows, DIALOGUES, strict=True):
        assert row.tolist() == ids_of(loaded(folder), *each, truncation=True, max_length=40)
    num_long = sum(len(ids_of(loaded(folder), *each)) > 40 for each in DIALOGUES)
    assert classifier.counts == TextCounts(cut=2 * num_long, cut_share=num_long / 4)
    assert 0 < num_long < 4
    warned = capsys.readouterr().out
    lost = "the beginning" if side == "left" else "the end"
    assert warned.count("warning") == 1
    assert f"texts of more than 40 tokens lose {lost}" in warned


def test_a_bias_is_added(tmp_path, one):
    fields = {"head": "v_head", "architectures": ["LlamaForCausalLM"]}
    plain = write_classifier(tmp_path / "plain", **fields)
    biased = write_classifier(tmp_path / "biased", **fields, extra={"v_head.bias": np.array([2.5], np.float32)})
    scores = [opened(folder, one)(samples()) for folder in (plain, biased)]
    np.testing.assert_allclose(scores[1], scores[0] + 2.5, atol=1e-6)


def test_bfloat16_and_int8_scores_are_near(tmp_path, one):
    folder = write_classifier(tmp_path / "m", hidden_size=64, head_dim=16, intermediate_size=64)
    exact = opened(folder, one)(samples())
    for options in ({"dtype": "bfloat16"}, {"quantize": "int8"}):
        scores = opened(folder, one, **options)(samples())
        assert 0 < np.abs(scores - exact).max() < 0.1 * np.abs(exact).max() + 0.1, options


# --- templates


def test_another_template_is_a_name_or_a_file(folders, one, tmp_path):
    tokenizer = copy.deepcopy(classifier_tokenizer("llama"))
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(jinja)
    tokenizer.chat_template = jinja
    mine = opened(folders["llama"], one, template=str(tmp_path / "mine.jinja"))
    assert ids_read(mine, DIALOGUES[2])[0].tolist() == ids_of(tokenizer, *DIALOGUES[2])
    named = opened(folders["llama"], one, template="hh")
    assert "\n\nHuman: what is the river ?" in "".join(named.write(*DIALOGUES[0]).parts)


def test_no_template_is_refused_with_what_to_type(tmp_path, one):
    tokenizer = classifier_tokenizer("llama")
    tokenizer.chat_template = None
    folder = write_classifier(tmp_path / "m", tokenizer=tokenizer)
    described = refusal(describe_classifier, str(folder), ClassifierConfig(), mesh=one)
    assert described.startswith("config.reward.classifier.template is 'auto', but the tokenizer has no chat template")
    assert "--config.reward.classifier.template=hh" in described
    assert refusal(jaxrm.load_reward_model, str(folder)).endswith("e.g. template=hh")
    assert len(jaxrm.load_reward_model(str(folder), mesh=one, template="hh").score(["hello"], ["good"])) == 1


def test_roles_that_a_template_refuses_are_found_before(folders, one):
    classifier = describe_classifier(str(folders["gemma"]), ClassifierConfig(), mesh=one)
    prompts = [[Message("user", "hello")], [Message("system", "think"), Message("user", "why")]]
    classifier.check_roles(prompts[:1])
    assert "System role not supported" in refusal(classifier.check_roles, prompts)


def test_a_text_that_the_template_drops_is_not_hidden(folders, one, tmp_path, capsys):
    """`score` refuses it; a policy's run goes on with what transformers would score, and counts it."""
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content.split('</think>')[-1] + '\n' }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(jinja)
    classifier = opened(folders["llama"], one, template=str(tmp_path / "mine.jinja"))
    prompt = [Message("user", "why"), Message("assistant", "think </think> because"), Message("user", "hello")]
    whole, partly = (prompt, "good"), (prompt, "bad insult </think>good")
    assert "changes the text of a message of the role 'assistant'" in refusal(classifier.score, *zip(partly))
    scores = classifier(samples([whole, partly]))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert (classifier.counts.changed, classifier.counts.changed_share) == (1, 0.5)
    classifier(samples([whole]))
    assert (classifier.counts.changed, classifier.counts.changed_share) == (1, 0.0)
    assert capsys.readouterr().out.count("drops or changes some of a text") == 1


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 500}, "config.reward.classifier.max_length is 500, but the classifier reads at most 128"),
        ({"template": "none"}, "config.reward.classifier.template is 'none'"),
        ({"template": "no/file.jinja"}, "config.reward.classifier.template is 'no/file.jinja', which cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words, folders, one):
    assert words in refusal(describe_classifier, str(folders["llama"]), ClassifierConfig(**options), mesh=one)


def test_a_tokenizer_must_lie_beside_and_fit(tmp_path, one):
    folder = write_classifier(tmp_path / "m", vocab_size=300)
    assert "has embeddings for 300 tokens" in refusal(describe_classifier, str(folder), ClassifierConfig(), mesh=one)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refusal(describe_classifier, str(folder), ClassifierConfig(), mesh=one)
    assert message.startswith(f"config.reward.model is {str(folder)!r}, but ")
    assert "put it beside the weights" in message


def test_spoiled_weights_are_named(tmp_path, one):
    folder = write_classifier(tmp_path / "m", extra={"score.weight": np.full((1, 16), np.nan, np.float32)})
    assert "no finite number" in refusal(opened(folder, one), samples())


# --- Python and the command


def test_load_reward_model_opens_a_classifier(folders, one):
    model = jaxrm.load_reward_model(str(folders["qwen2"]), mesh=one)
    prompts, responses = zip(*DIALOGUES, strict=True)
    scores = model.score(prompts, responses)
    np.testing.assert_allclose(scores.sum, opened(folders["qwen2"], one)(samples()), atol=1e-5)
    assert all(np.count_nonzero(rewards) == 1 and rewards[-1] for rewards in scores.rewards)
    assert "".join(scores.tokens[1]) == responses[1]
    assert scores.tags is None
    assert "river" in scores._repr_html_()
    assert "stone" in repr(scores)
    residual = model.score(prompts, responses, kind="scalar_length_residual").sum
    assert np.abs(residual - scores.sum).max() > 1e-3
    assert "writes no corrections" in refusal(model.correct, ["hello"], ["good"])
    for kind in ("literal", "value_difference"):
        message = refusal(model.score, ["hello"], ["good"], kind=kind)
        assert message.startswith(f"kind is {kind!r}, but {model.name} is a classifier"), message


def test_score_takes_a_classifier(folders, tmp_path):
    from absl import flags

    rows = [
        {"prompt": "hello", "chosen": "good", "rejected": "bad bad"},
        {"prompt": "why", "chosen": "", "rejected": "bad"},
        {"prompt": "why", "chosen": "bad", "rejected": "bad "},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = flags.FlagValues()
    score.define_flags(values)
    arguments = [f"--{name}={tmp_path / file}" for name, file in (("input", "pairs.jsonl"), ("output", "out.jsonl"))]
    values(["score", f"--weights={folders['mistral']}", *arguments, f"--html={tmp_path / 'out.html'}"])
    with naming(score.FLAG_OF_FIELD):
        assert score.main(None, values) == 0
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    written = json.loads(line)
    expected = jaxrm.load_reward_model(str(folders["mistral"])).score(["hello"] * 2, ["good", "bad bad"]).sum
    np.testing.assert_allclose([response["sum"] for response in written["responses"]], expected, atol=1e-5)
    assert written["ranked_right"] == (expected[0] > expected[1])
    assert "bad" in (tmp_path / "out.html").read_text()


# --- transformers on torch


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(family, tmp_path, one):
    """Of a random classifier that transformers made and saved; rows padded on the right, and each alone."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    fields = classifier_fields(family, num_labels=1, id2label="absent")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(tmp_path / "m")
    classifier_tokenizer(family).save_pretrained(tmp_path / "m")
    tokenizer = loaded(tmp_path / "m")
    rows = [ids_of(tokenizer, *each) for each in DIALOGUES]
    width = max(map(len, rows))
    padded = torch.tensor([row + [fields["pad_token_id"]] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it guesses of padding
        theirs = model(padded, attention_mask=mask).logits[:, 0].numpy()
        alone = np.array([float(model(torch.tensor([row])).logits[0, 0]) for row in rows])
    ours = opened(tmp_path / "m", one)
    np.testing.assert_allclose(ours(samples()), theirs, atol=TOLERANCE)
    np.testing.assert_allclose([ours(samples([each]))[0] for each in DIALOGUES], alone, atol=TOLERANCE)
    assert np.ptp(theirs) > 0.1
