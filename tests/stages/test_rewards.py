"""Where PPO's rewards come from: functions of text, reward models, what is refused of both, and their calibration."""

import copy
import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.published import published_tokenizer

from jaxrm.algorithms import scoring
from jaxrm.data.pairs import correction_request
from jaxrm.data.prompts import PromptExample
from jaxrm.data.records import Message
from jaxrm.data.responses import response_text
from jaxrm.data.tasks.safety.task import ideal_response, parse_request
from jaxrm.data.templates import end_ids
from jaxrm.data.tokenizer import Vocabulary, load_tokenizer
from jaxrm.errors import UserError
from jaxrm.inference.load import load_reward_model
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import KINDS, names_for
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.rewards.calibration import calibrate
from jaxrm.stages.rewards.functions import FunctionScorer, open_function
from jaxrm.stages.rewards.model_run import ModelRewards, check_reward_model, shared_readings
from jaxrm.stages.rewards.summed import SummedRewards
from jaxrm.stages.rewards.text import TextRewards
from jaxrm.types import ResponseBatch, TokenRewards

END = 9


@pytest.fixture(scope="module")
def one():
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def eight():
    return build_mesh(MeshConfig(2, 2, 2))


@pytest.fixture(scope="module")
def tokenizer(task_folder):
    return load_tokenizer(str(task_folder / "tokenizer"))


def respond(prompts, responses, P=4, T=5, junk=7):
    """A batch as a policy emits it; outside the masks stands what is no padding id."""
    B = len(prompts)
    batch = ResponseBatch(
        np.full((B, P), junk, np.int32), np.zeros((B, P), bool), np.full((B, T), junk, np.int32), np.zeros((B, T), bool)
    )
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = P - len(prompt)
        batch.prompts[row, start:], batch.prompt_mask[row, start:] = prompt, True
        batch.responses[row, : len(response)], batch.response_mask[row, : len(response)] = response, True
    return batch


# Prompts of several lengths, one of them all of padding's id; responses that end, are cut off, are nothing but their
# end, and are empty.
PROMPTS = [[1, 2], [0, 0, 0], [3], [1, 2, 3, 4]]
RESPONSES = [[5, 6, END], [0, 7, 7, 8, 8], [END], []]
BATCH = respond(PROMPTS, RESPONSES)


def message_of(prompt):
    return (Message("user", "ask " + " ".join(map(str, prompt))),)


def text_of(ids):
    return "say " + " ".join(str(i) for i in ids if i != END)


def source_of(function, mesh, kind="scalar", prompts=PROMPTS):
    examples = [PromptExample(np.array(prompt, np.int32), message_of(prompt), "a record") for prompt in prompts]
    scorer = FunctionScorer("mine:f", function)
    return TextRewards(scorer, KINDS[kind], examples=examples, text=text_of, end_ids=(END,), mesh=mesh)


def call(source, batch=BATCH, calibration=None):
    calibration = reward_scaling.uncalibrated() if calibration is None else calibration
    return jax.device_get(source(calibration, batch, None))


# --- functions


@pytest.mark.parametrize("mesh", ["one", "eight"])
def test_a_function_gets_each_response_with_its_own_prompt(mesh, request):
    """Its number stands on the last token of the response."""
    seen = []

    def function(prompts, responses):
        seen.append((prompts, responses))
        return [0.25, -1.5, 3, 100.0]

    found = call(source_of(function, request.getfixturevalue(mesh)))
    assert seen == [([message_of(prompt) for prompt in PROMPTS], [text_of(response) for response in RESPONSES])]
    expected = [[0, 0, 0.25, 0, 0], [0, 0, 0, 0, -1.5], [3, 0, 0, 0, 0], [0] * 5]  # none for no token
    np.testing.assert_array_equal(found.values, np.array(expected, np.float32))
    np.testing.assert_array_equal(found.rewards, found.values)
    np.testing.assert_array_equal(found.mask, BATCH.response_mask)
    np.testing.assert_array_equal(found.tags, BATCH.response_mask)
    assert found.values.dtype == found.rewards.dtype == np.float32
    for name, numbers in {
        "sum": [0.25, -1.5, 3, 0],
        "mean": [0.25 / 3, -0.3, 3, 0],
        "length": [3, 5, 1, 0],
        "ended": [1, 0, 1, 0],
        "end_tag": [1, 0, 1, 0],
        "divergence": [3, 5, 1, 0],
    }.items():
        np.testing.assert_allclose(found.diagnostics[name], np.array(numbers, np.float32), rtol=1e-6, err_msg=name)


def test_a_function_gets_the_raw_text_too(one):
    """Special tokens are not in a response, which is text for people; a reward of a format needs them."""
    tokenizer = copy.deepcopy(published_tokenizer("chatml"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    start, end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<answer>", "</answer>", "<|im_end|>"))
    words = tokenizer("good bad")["input_ids"]
    response = response_text(tokenizer, {eos}, [start, *words, end, eos])
    assert (response, response.raw, response.ended) == ("good bad", "<answer>good bad</answer>", True)
    assert response.token_ids.tolist() == [start, *words, end, eos]
    assert response_text(tokenizer, {eos}, words).ended is False

    seen = []

    def function(prompts, responses):
        seen.extend(responses)
        return [float("<answer>" in response.raw) for response in responses]

    batch = respond([[1], [1]], [[start, *words, end, eos], words], T=len(words) + 3)
    source = TextRewards(
        FunctionScorer("mine:f", function),
        KINDS["scalar"],
        examples=[PromptExample(np.array([1], np.int32), message_of([1]), "a record")],
        text=lambda ids: response_text(tokenizer, {eos}, ids),
        end_ids=(eos,),
        mesh=one,
    )
    np.testing.assert_array_equal(call(source, batch).diagnostics["sum"], [1, 0])
    assert [(text, text.raw) for text in seen] == [("good bad", "<answer>good bad</answer>"), ("good bad", "good bad")]


def test_calibration_scales_a_functions_rewards(one):
    """For the residual kind it subtracts what the length explains."""
    calibration = reward_scaling.Calibration(*(jnp.float32(x) for x in (2.0, 50.0, 0.5, 1.0)))  # scale, centre, line
    function = lambda prompts, responses: [1.0, 2.0, 3.0, 4.0]  # noqa: E731 - as a user would pass one
    scaled = call(source_of(function, one), calibration=calibration)
    np.testing.assert_allclose(scaled.diagnostics["sum"], [2.0, 4.0, 6.0, 0.0])
    residual = call(source_of(function, one, "scalar_length_residual"), calibration=calibration)
    expected = [2 * (1 - 0.5 * 3 - 1), 2 * (2 - 0.5 * 5 - 1), 2 * (3 - 0.5 - 1), 0.0]
    np.testing.assert_allclose(residual.diagnostics["sum"], expected)
    np.testing.assert_allclose(residual.values.sum(axis=1), [1.0, 2.0, 3.0, 0.0])  # as they were before


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        jnp.array,
        lambda x: (number for number in x),
        lambda x: [np.float64(number) for number in x],
        lambda x: [jnp.float32(number) for number in x],
    ],
    ids=["list", "tuple", "numpy", "jax", "generator", "numpy scalars", "jax scalars"],
)
def test_a_function_may_return_any_sequence_of_numbers(one, convert):
    found = call(source_of(lambda prompts, responses: convert([0.5, True, 2, -3.0]), one))
    np.testing.assert_array_equal(found.diagnostics["sum"], [0.5, 1, 2, 0])


def test_a_function_that_raises_is_named_with_the_response(one):
    def function(prompts, responses):
        if any("7 7" in response for response in responses):
            raise ZeroDivisionError("division by nothing")
        return [0.0] * len(responses)

    with pytest.raises(UserError) as caught:
        call(source_of(function, one))
    assert str(caught.value) == (
        "config.reward.function mine:f raised ZeroDivisionError: division by nothing, on response 1 of the batch, "
        "'say 0 7 7 8 8'; required one finite number for each response"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_raises_on_the_batch_alone_is_said_to(one):
    def function(prompts, responses):
        return [1 / (len(responses) - 4)] * len(responses)

    with pytest.raises(
        UserError, match=r"mine:f raised ZeroDivisionError: .*, on the whole batch; required one finite"
    ):
        call(source_of(function, one))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 2, float("nan"), 4], r"returned nan for response 2 of the batch, 'say '; required one finite number for"),
        ([1, float("inf"), 3, 4], r"returned inf for response 1 of the batch, 'say 0 7 7 8 8'; required"),
        ([-float("inf"), 2, 3, 4], r"returned -inf for response 0 of the batch, 'say 5 6'; required"),
        ([1, None, 3, 4], r"returned None for response 1 of the batch"),
        (["1", 2, 3, 4], r"returned '1' for response 0 of the batch"),
        ([1, 2, 3, 1j], r"returned 1j for response 3 of the batch"),
        ([1, 2, 1e39, 4], r"returned 1e\+39 for response 2 of the batch"),  # no float32
        ([1, 2, 10**400, 4], r"returned 10+ for response 2 of the batch"),
        ([[1], [2], [3], [4]], r"returned \[1\] for response 0 of the batch"),
        (np.ones((4, 1)), r"returned array\(\[1.\]\) for response 0 of the batch"),
        ([1, 2, 3], r"returned 3 rewards for 4 responses; required one finite number for each response"),
        ([1] * 5, r"returned 5 rewards for 4 responses"),
        ([], r"returned 0 rewards for 4 responses"),
        (None, r"returned None for 4 responses; required one finite number for each response"),
        (1.5, r"returned 1.5 for 4 responses"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, r"returned \{'a': 1, .*\} for 4 responses; required one finite number"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_is_not_one_finite_number_a_response_is_refused(one, returned, message):
    with pytest.raises(UserError, match=rf"^config.reward.function mine:f {message}"):
        call(source_of(lambda prompts, responses: returned, one))


def test_messages_quote_no_more_than_the_beginning_of_a_response(one):
    batch = respond([[1]], [list(range(10, 90))], T=100)
    with pytest.raises(UserError) as caught:
        call(source_of(lambda prompts, responses: [None], one, prompts=[[1]]), batch)
    assert text_of(range(10, 90))[:60] in str(caught.value) and len(str(caught.value)) < 250


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module that only this test can import; its name is new, since Python remembers modules."""
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"rewards_of_{tmp_path.name.replace('-', '_')}_{i}" for i in range(2)]

    def write(source):
        (tmp_path / f"{names[0]}.py").write_text(source)
        return names[0]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_function_is_found_by_module_and_name(write_module):
    name = write_module("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    assert open_function(f"{name}:score")([(), ()], ["ab", ""]) == [2.0, 0.0]


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (
            "",
            "{module}",
            r"; required package.module:function, e.g. --config.reward.function=my_rewards:score, or task:",
        ),
        ("", "{module}:", r"; required package.module:function"),
        ("", ":score", r"; required package.module:function"),
        ("", "", r"; required package.module:function"),
        ("", ".relative:score", r"; required package.module:function"),
        (
            "",
            "no_such_module_anywhere:score",
            r", but importing no_such_module_anywhere raised ModuleNotFoundError: No ",
        ),
        ("", "{module}:score", r", but {module} has no function 'score'; required package.module:function"),
        ("score = 3", "{module}:score", r", but {module} has no function 'score'"),
        (
            "def score(:",
            "{module}:score",
            r", but importing {module} raised SyntaxError: .*; required package.module:f",
        ),
        ("1 / 0", "{module}:score", r", but importing {module} raised ZeroDivisionError: division by zero; required"),
    ],
)
def test_a_missing_function_is_refused_with_what_to_type(write_module, source, name, message):
    module = write_module(source)
    name, message = name.replace("{module}", module), message.replace("{module}", module)
    with pytest.raises(UserError, match=rf"^config.reward.function is '{name}'{message}"):
        open_function(name)


def test_the_judge_of_a_task_is_a_function(task_folder):
    with (task_folder / "heldout.jsonl").open() as file:
        asked = [json.loads(line)["messages"][0]["content"] for line in itertools.islice(file, 5)]
    judge, prompts = open_function("task:safety"), [[Message("user", text)] for text in asked]
    assert judge(prompts, [ideal_response(parse_request(text)).text for text in asked]) == [1.0] * 5
    assert max(judge(prompts, ["banana"] * 5)) < 1.0
    with pytest.raises(
        UserError, match=r"^config.reward.function is 'task:math'; .* are task:safety, task:summarize, task:dialogue$"
    ):
        open_function("task:math")


# --- reward models


@pytest.fixture(scope="module")
def models(make_run, tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("reward_models")
    for name in ("seq2seq_rm", "scalar_rm"):
        make_run(folder / name, name)
    return {name: load_reward_model(str(folder / name), mesh=one) for name in ("seq2seq_rm", "scalar_rm")}


def check(model, tokenizer, kind=None, template="auto", length=64, response_length=32):
    kind = kind or ("literal" if model.is_seq2seq else "scalar")
    policy = Vocabulary(tokenizer, len(tokenizer), "the policy")
    check_reward_model(model, KINDS[kind], policy, template, length, response_length)


def test_a_reward_model_of_the_same_tokenizer_gives_every_kind(models, tokenizer):
    for kind in names_for("seq2seq"):
        check(models["seq2seq_rm"], tokenizer, kind)
    for kind in names_for("scalar"):
        check(models["scalar_rm"], tokenizer, kind)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("seq2seq_rm", "scalar", "is a seq2seq reward model, whose kinds are literal, .*--config.reward.kind=literal$"),
        ("scalar_rm", "literal", "is a scalar reward model, whose kinds are scalar, .*--config.reward.kind=scalar$"),
    ],
)
def test_a_kind_of_the_other_sort_is_refused(models, tokenizer, name, kind, message):
    with pytest.raises(
        UserError, match=rf"^config.reward.kind is '{kind}', but config.reward.model, .*{name}.* {message}"
    ):
        check(models[name], tokenizer, kind)


@pytest.mark.parametrize("name", ["seq2seq_rm", "scalar_rm"])
def test_a_reward_model_of_another_vocabulary_is_refused(models, task_folder, tmp_path, name):
    """The message shows the first token that differs."""
    content = json.loads((task_folder / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = sorted((word for word in vocabulary if word.isalpha()), key=vocabulary.get)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    for file in (task_folder / "tokenizer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    message = (
        rf"vocabulary is not that of the policy: token id {vocabulary[b]} is '{a}' in the one and '{b}' in the other"
    )
    with pytest.raises(UserError, match=rf"^config.reward.model is .*{message}; .*--config.model.path=POLICY_RUN$"):
        check(models[name], load_tokenizer(str(tmp_path)))


def test_a_policy_with_more_tokens_than_the_model_is_refused(models, task_folder):
    """The reward model has no embedding for them."""
    larger = load_tokenizer(str(task_folder / "tokenizer"))
    first = len(larger)
    larger.add_tokens(["extra", "more"])
    message = rf"the policy has 'extra', id {first}, for which the reward model has no token; "
    with pytest.raises(UserError, match=message):
        check(models["scalar_rm"], larger)


@pytest.mark.parametrize("name", ["seq2seq_rm", "scalar_rm"])
def test_a_reward_model_of_fewer_rows_than_tokens_is_refused(models, tokenizer, name):
    """Its embedding would be read out of bounds, which no device refuses."""
    model, small = models[name], len(tokenizer) - 1
    config = dataclasses.replace(model.model.config, vocab_size=small)
    with pytest.raises(UserError, match=rf"the policy has '.*', id {small}, for which the reward model has no token; "):
        check(dataclasses.replace(model, model=dataclasses.replace(model.model, config=config)), tokenizer)


def test_a_reward_model_of_another_template_is_refused(models, tokenizer):
    """The message shows the template of the reward model."""
    asked = dataclasses.replace(models["scalar_rm"], template="plain")
    with pytest.raises(
        UserError, match=r"^config.data.template is 'hh', but .* trained with 'plain', .*template=plain$"
    ):
        check(asked, tokenizer, template="hh")


def test_tokenizers_of_unlike_templates_get_no_template_hint(models, task_folder, tokenizer):
    """It would be no remedy to use their own templates."""
    other = load_tokenizer(str(task_folder / "tokenizer"))
    other.chat_template = "{% for m in messages %}{{ m.role + ' : ' + m.content + eos_token }}{% endfor %}"
    with pytest.raises(
        UserError, match=r"is 'auto', but .* with 'auto', .*differently; train the reward model from the"
    ):
        check(models["scalar_rm"], other)


@pytest.mark.parametrize("name", ["seq2seq_rm", "scalar_rm"])
@pytest.mark.parametrize(("length", "response_length"), [(300, 16), (300, 250), (1000, 999)])
def test_rows_too_long_for_a_reward_model_are_refused(models, tokenizer, name, length, response_length):
    """The message shows lengths that it can read."""
    with pytest.raises(
        UserError, match=r"^config.data.max_length is \d+ and responses .* but it reads 256; e.g. "
    ) as caught:
        check(models[name], tokenizer, length=length, response_length=response_length)
    typed = dict(part.removeprefix("--config.").split("=") for part in str(caught.value).split() if "--config" in part)
    fits = int(typed["data.max_length"]), int(typed.get("rollout.sampling.max_new_tokens", response_length))
    assert fits[0] > fits[1] > 1
    check(models[name], tokenizer, length=fits[0], response_length=fits[1])


def test_a_seq2seq_reward_model_needs_room_for_two_responses(models, tokenizer):
    """It reads the response twice."""
    request = len(correction_request(tokenizer, "auto", models["seq2seq_rm"].instruction))
    length = 256 - request - 40
    check(models["seq2seq_rm"], tokenizer, length=length, response_length=40)
    check(models["scalar_rm"], tokenizer, length=256, response_length=40)
    with pytest.raises(
        UserError, match=rf"has to read 257 tokens, but it reads 256; e.g. --config.data.max_length={length}"
    ):
        check(models["seq2seq_rm"], tokenizer, length=length + 1, response_length=40)


@pytest.mark.parametrize(
    ("name", "kind"), [("seq2seq_rm", "contrast"), ("scalar_rm", "scalar"), ("scalar_rm", "value_difference")]
)
def test_a_batch_is_scored_as_each_response_alone(models, tokenizer, one, name, kind):
    model, ends = models[name], tuple(sorted(end_ids(tokenizer, "auto")))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 60, n).tolist() for n in (3, 3, 1, 6)]
    responses = [[*rng.integers(5, 60, n).tolist(), *ends[: n % 2]] for n in (4, 3, 2, 5)]
    reference = rng.uniform(-4, 0, (4, 8)).astype(np.float32)
    calibration = dataclasses.replace(reward_scaling.uncalibrated(), scale=jnp.float32(1.5), center=jnp.float32(0.2))
    source = ModelRewards(model, KINDS[kind], one, num_microbatches=2)
    found = jax.device_get(source(calibration, respond(prompts, responses, P=8, T=8), reference))
    # The same responses one at a time, without padding.
    request = tuple(correction_request(tokenizer, "auto", model.instruction))
    score = jax.jit(scoring.build_scorer(KINDS[kind], model.model.graphdef, request=request, end_ids=ends))
    for row in (0, 1):
        prompt, response = prompts[row], responses[row]
        T = len(response)
        batch = respond([prompt], [response], P=len(prompt), T=T)
        alone = jax.device_get(score(model.params, calibration, batch, reference[row : row + 1, :T]))
        np.testing.assert_allclose(found.rewards[row, :T], alone.rewards[0], atol=2e-5)
        assert not found.rewards[row, T:].any() and np.abs(alone.rewards).max() > 0.01
        for diagnostic, numbers in alone.diagnostics.items():
            np.testing.assert_allclose(found.diagnostics[diagnostic][row], numbers[0], atol=1e-4, err_msg=diagnostic)
    assert found.diagnostics["ended"].tolist() == [float(r[-1] in ends) for r in responses]


def test_sources_of_one_model_read_it_once(models, one, monkeypatch):
    """Each gets what it gets alone. A kind that has a correction written reads other rows."""
    model, rng = models["seq2seq_rm"], np.random.default_rng(0)
    batch = respond([[5, 6, 7], [8]], [[9, 10, 11], [12, 13]], P=4, T=4)
    reference = rng.uniform(-4, 0, (2, 4)).astype(np.float32)
    calibration = reward_scaling.uncalibrated()
    sources = {kind: ModelRewards(model, KINDS[kind], one) for kind in ("literal", "contrast")}
    alone = {kind: source(calibration, batch, reference) for kind, source in sources.items()}
    readings, read = [], scoring.response_statistics
    monkeypatch.setattr(scoring, "response_statistics", lambda *a, **more: readings.append(a) or read(*a, **more))
    summed = SummedRewards(sources, dict.fromkeys(sources, 1.0), end_ids=(0,), mesh=one)
    together = summed(dict.fromkeys(sources, calibration), batch, reference).parts
    assert len(readings) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together, alone)
    assert len(shared_readings({**sources, "kept": ModelRewards(model, KINDS["edit_aligned"], one)})) == 1
    assert not shared_readings(
        {"literal": sources["literal"], "scalar": ModelRewards(models["scalar_rm"], KINDS["scalar"], one)}
    )


# --- calibration


def token_rewards_of(values, mask):
    values = np.where(mask, values, 0).astype(np.float32)
    return TokenRewards(values, values, mask, mask, {})


@pytest.mark.parametrize("kind", ["literal", "margin", "scalar", "scalar_length_residual"])
def test_calibrated_sums_have_unit_standard_deviation(one, eight, kind):
    """Over the calibration set."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 7, 24)  # some responses have no token
    mask = np.arange(6) < lengths[:, None]
    values = rng.normal(0.3, 2.0, (24, 6))
    if kind.startswith("scalar"):
        values = np.where(np.arange(6) == lengths[:, None] - 1, values + 0.7 * lengths[:, None], 0)
    batches = [token_rewards_of(values[i : i + 8], mask[i : i + 8]) for i in (0, 8, 16)]
    assert (lengths == 0).any()
    for mesh in (one, eight):
        found = calibrate(KINDS[kind], batches, scale="unit", center="running", mesh=mesh)
        assert found.scale.sharding.is_fully_replicated and set(found.scale.devices()) == set(mesh.devices.flat)
        a, c, slope, intercept = (float(x) for x in jax.tree.leaves(jax.device_get(found)))
        counted = lengths > 0
        if kind == "literal":
            np.testing.assert_allclose(c, values[mask].mean(), rtol=1e-4)
            sums = a * np.where(mask, values - c, 0).sum(axis=1)
        else:
            assert c == 0
            sums = a * (np.where(mask, values, 0).sum(axis=1) - slope * lengths - intercept)
        np.testing.assert_allclose(sums[counted].std(), 1.0, rtol=1e-4)
        if kind == "scalar_length_residual":
            assert abs(np.corrcoef(sums[counted], lengths[counted])[0, 1]) < 1e-3 < abs(slope)
        else:
            assert slope == intercept == 0


def test_a_given_scale_and_no_centre_are_taken_as_they_are(one):
    batches = [token_rewards_of(np.array([[1.0, 1.0]]), np.ones((1, 2), bool))]
    found = jax.device_get(calibrate(KINDS["literal"], batches, scale=0.25, center="none", mesh=one))
    assert (found.scale, found.center) == (0.25, 0.0)
