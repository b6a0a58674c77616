"""`import jaxrm` as a library: the example of README, three short scripts, results that draw themselves, bad input."""

import html.parser
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jaxrm
from jaxrm.data.config import DataConfig
from jaxrm.data.records import Message
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import SFT

ROOT = Path(__file__).parents[1]
PROMPT = "how do i wash the lamp in the office ?"

SCORE = """\
import jaxrm

rm = jaxrm.load_reward_model("rm_seq2seq")
print(rm.score(["how do i wash the lamp ?"], ["use a cloth"]))
"""

SAMPLE = """\
import jaxrm

policy = jaxrm.load_policy("sft")
print(policy.generate(["how do i wash the lamp ?"], max_new_tokens=8, temperature=0.0))
"""

TRAIN = """\
import itertools
import jaxrm
import optax

policy = jaxrm.load_policy("sft")
batches = jaxrm.pairs("pairs.jsonl", policy, batch_size=8, max_length=128)
state, step = jaxrm.build_training(policy, jaxrm.losses.seq2seq_rm(policy, edit_weight=2.0), optax.adamw(1e-3))
for batch in itertools.islice(batches, 3):
    state, metrics = step(state, batch)
    print(float(metrics["loss"]))
"""


@pytest.fixture(scope="module")
def folder(make_run, task_folder, tmp_path_factory):
    """Runs of a policy and of both sorts of reward model, and a file of pairs."""
    folder = tmp_path_factory.mktemp("api")
    for name, algorithm in (("sft", "sft"), ("rm_seq2seq", "seq2seq_rm"), ("rm_scalar", "scalar_rm")):
        make_run(folder / name, algorithm)
    (folder / "pairs.jsonl").write_bytes((task_folder / "pairs.jsonl").read_bytes())
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def models(folder):
    """The three of them on one device."""
    one = build_mesh(MeshConfig(), jax.devices()[:1])
    policy = jaxrm.load_policy(str(folder / "sft"), mesh=one)
    loaded = (jaxrm.load_reward_model(str(folder / name), mesh=one) for name in ("rm_seq2seq", "rm_scalar"))
    return policy, *loaded


# --- the way in


def test_importing_is_quick_and_starts_no_jax():
    """Within 0.3 s of the import alone, at best of three, since other processes may hold the core."""
    program = (
        "import sys, time; start = time.perf_counter(); import jaxrm; seconds = time.perf_counter() - start; "
        "dir(jaxrm); assert not {'jax', 'transformers', 'numpy'} & set(sys.modules), sys.modules; print(seconds)"
    )
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.3


def test_every_public_name_is_there():
    assert {"load_policy", "losses", "run", "UserError", "__version__"} <= set(jaxrm.__all__) <= set(dir(jaxrm))
    for name in jaxrm.__all__:
        assert getattr(jaxrm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        jaxrm.load_model  # noqa: B018


def readme_example():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "import jaxrm" in block)


def test_the_example_of_the_readme_runs(capsys):
    source = readme_example()
    assert len(source.splitlines()) <= 9
    for run, stand_in in (("runs/quickstart/rm_seq2seq", "rm_seq2seq"), ("runs/quickstart/ppo_seq2seq", "sft")):
        assert run in source
        source = source.replace(run, stand_in)
    exec(compile(source, "README.md", "exec"), {})  # noqa: S102
    assert "responses[0] (literal): sum" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("script", "most"), [(SCORE, 4), (SAMPLE, 4), (TRAIN, 10)], ids=["score", "sample", "train"])
def test_a_script_is_short_and_quiet(script, most):
    """Imports included. Nothing but its own print is seen, on stdout or stderr."""
    lines = [line for line in script.splitlines() if line]
    assert len(lines) <= most
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout and not result.stderr, result.stderr


# --- generate


def test_responses_come_in_order_whatever_the_batch_size(models):
    policy, *_ = models
    prompts = [f"how do i {verb} the {thing} ?" for verb in ("wash", "ship") for thing in ("lamp", "rug", "radio")]
    options = {"max_new_tokens": 6, "temperature": 0.0}
    at_once = policy.generate(prompts, **options)
    assert at_once == [policy.generate([prompt], **options)[0] for prompt in prompts]
    assert at_once == policy.generate(prompts, batch_size=4, **options)
    assert all(len(response.token_ids) <= 6 for response in at_once)


def test_messages_are_prompts_too(models):
    policy, *_ = models
    options = {"max_new_tokens": 6, "seed": 3}
    as_text = policy.generate([PROMPT], **options)
    assert as_text == policy.generate([[{"role": "user", "content": PROMPT}]], **options)
    assert as_text == policy.generate([[Message("user", PROMPT)]], **options)
    assert policy.generate([]) == []


def test_a_response_says_whether_it_ended(models):
    policy, *_ = models
    cut_off, drawn = policy.generate([PROMPT], max_new_tokens=1, temperature=0.0)[0], policy.generate([PROMPT])[0]
    assert len(cut_off.token_ids) == 1
    assert drawn.ended == (len(drawn.token_ids) < 128 or drawn.token_ids[-1] in policy.tokenizer.all_special_ids)


# --- score and correct


def test_scores_are_one_number_a_token(models):
    _, rm, scalar = models
    responses = ["use a cloth", "i will not help with that"]
    scores = rm.score([PROMPT] * 2, responses)
    assert len(scores) == 2 and scores.kind == "literal"
    for tokens, rewards, tags in zip(scores.tokens, scores.rewards, scores.tags, strict=True):
        assert len(tokens) == len(rewards) == len(tags)
        assert set(rewards) <= {-1.0, 0.0, 1.0} and not (rewards[tags] < 0).any()
    np.testing.assert_allclose(scores.sum, [rewards.sum() for rewards in scores.rewards])
    ends = scalar.score([PROMPT] * 2, responses)
    assert ends.tags is None and ends.kind == "scalar"
    for rewards, total in zip(ends.rewards, ends.sum, strict=True):
        assert (rewards[:-1] == 0).all() and rewards[-1] == total


def test_scores_do_not_depend_on_the_batch(models):
    _, rm, _ = models
    responses = [f"use {count} cloths" for count in ("two", "three", "some", "no", "many")]
    whole = rm.score([PROMPT] * 5, responses, kind="soft")
    for i, response in enumerate(responses):
        (alone,) = rm.score([PROMPT], [response], kind="soft", batch_size=1).rewards
        np.testing.assert_allclose(whole.rewards[i], alone, atol=1e-5)


def test_contrast_takes_a_reference_policy(models):
    policy, rm, _ = models
    scores = rm.score([PROMPT], ["use a cloth"], kind="contrast", reference=policy)
    assert np.isfinite(scores.rewards[0]).all() and (abs(scores.rewards[0]) <= 1).all()


def test_an_empty_response_is_its_end_token(models):
    _, rm, _ = models
    scores = rm.score([PROMPT], [""])
    assert len(scores.tokens[0]) == 1


def test_a_correction_is_what_the_model_would_write(models):
    _, rm, _ = models
    corrections = rm.correct([PROMPT] * 2, ["use a cloth", "no"], max_new_tokens=5)
    assert len(corrections) == 2 and all(isinstance(text, str) for text in corrections)
    assert rm.correct([], []) == [] and len(rm.score([], [])) == 0


class _Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.names = set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)


def test_scores_draw_themselves_and_escape_markup(models):
    _, rm, _ = models
    scores = rm.score(["<script>alert(1)</script> <img src=x>"], ["<b onclick='x'>wash</b>"])
    page = scores._repr_html_()
    reader = _Tags()
    reader.feed(page)
    assert "background: rgba(" in page and reader.names <= {"p", "div", "span", "u", "b", "code"}
    assert "<script" not in page and "<img" not in page and "onclick='" not in page


def test_scores_print_as_a_table(models):
    _, rm, _ = models
    text = str(rm.score([PROMPT] * 30, ["use a cloth\nand water"] * 30))
    assert text.startswith("responses[0] (literal): sum ") and text.endswith("... and 10 more")
    assert max(map(len, text.splitlines())) <= 100


# --- training


@pytest.mark.parametrize("sort", ["sft", "seq2seq", "scalar"])
def test_a_loop_of_ones_own_learns(models, sort):
    """Ten steps on one batch lower its loss, and the model that they started from stays as it was."""
    policy, *_ = models
    model = policy if sort == "sft" else policy.as_reward_model(sort)
    read = {"sft": jaxrm.demonstrations, "seq2seq": jaxrm.pairs, "scalar": jaxrm.comparisons}[sort]
    loss = {"sft": jaxrm.losses.sft, "seq2seq": jaxrm.losses.seq2seq_rm, "scalar": jaxrm.losses.scalar_rm}[sort](model)
    batch = next(read("pairs.jsonl", model, batch_size=8, max_length=128))
    before = jax.device_get(model.params)
    state, step = jaxrm.build_training(model, loss, optax.adam(1e-2), num_microbatches=2)
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(model.params))
    trained = model.with_params(state.params)
    if sort == "sft":
        assert trained.generate([PROMPT], max_new_tokens=4)
    else:
        assert np.isfinite(trained.score([PROMPT], ["use a cloth"]).sum).all()


def test_batches_follow_the_seed_and_the_held_out_side(models):
    policy, *_ = models
    options = {"batch_size": 4, "max_length": 128}
    first, again, other, held_out = (
        np.asarray(next(jaxrm.pairs("pairs.jsonl", policy, **options, **more)).tokens)
        for more in ({}, {"seed": 0}, {"seed": 1}, {"held_out": True})
    )
    assert first.shape == (4, 128)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, held_out)


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda policy, rm, scalar: policy.generate(PROMPT), r"^prompts is 'how .*; it must be a list, e\.g\. \["),
        (lambda policy, rm, scalar: policy.generate([PROMPT, "", "a"]), r"^prompts\[1\] is ''; it must have some text"),
        (lambda policy, rm, scalar: policy.generate([PROMPT, 3]), r"^prompts\[1\] is 3; it must be a text, or a list"),
        (lambda policy, rm, scalar: policy.generate([[]]), r"^prompts\[0\] is \[\]; it must be a text, or a list"),
        (lambda policy, rm, scalar: policy.generate([[{"role": "user"}]]), r"^prompts\[0\]\[0\] has the fields role;"),
        (
            lambda policy, rm, scalar: policy.generate([[{"role": "human", "content": "a"}]]),
            r"^prompts\[0\]\[0\] has the role 'human'; use one of system, user, assistant",
        ),
        (
            lambda policy, rm, scalar: policy.generate([PROMPT, "a " * 300]),
            r"^prompt 2 has \d+ tokens, .* smaller max_new_tokens$",
        ),
        (
            lambda policy, rm, scalar: policy.generate([PROMPT], max_new_tokens=256),
            r"^max_new_tokens is 256, but the model reads 256 tokens, .* e\.g\. max_new_tokens=64$",
        ),
        (lambda policy, rm, scalar: policy.generate([PROMPT], temperature=-1.0), r"temperature is -1\.0; it must be"),
        (
            lambda policy, rm, scalar: policy.generate([PROMPT], batch_size=0),
            r"^batch_size is 0; it must be a whole number of at least 1, e\.g\. batch_size=1$",
        ),
        (lambda policy, rm, scalar: rm.score([PROMPT], []), r"^there are 1 prompts and 0 responses; give each"),
        (lambda policy, rm, scalar: rm.score([PROMPT], [None]), r"^responses\[0\] is None; it must be a text"),
        (
            lambda policy, rm, scalar: rm.score([PROMPT], ["a " * 300]),
            r"^responses\[0\]: a response too long for the 256 tokens of the model$",
        ),
        (lambda policy, rm, scalar: rm.score([PROMPT], ["a"], kind="x"), r"^kind is 'x'; use one of literal, "),
        (
            lambda policy, rm, scalar: scalar.score([PROMPT], ["a"], kind="literal"),
            r"^kind is 'literal', but .* is a scalar reward model, whose kinds are scalar, .* e\.g\. kind=scalar$",
        ),
        (
            lambda policy, rm, scalar: rm.score([PROMPT], ["a"], kind="contrast"),
            r"^the kind is contrast, and reference is None; ",
        ),
        (lambda policy, rm, scalar: scalar.correct([PROMPT], ["a"]), r" is a scalar reward model, which writes no "),
        (
            lambda policy, rm, scalar: rm.correct([PROMPT], ["a"], max_new_tokens=250),
            r"^max_new_tokens is 250, but the model reads 256 tokens: .* \(responses\[0\]\) .* e\.g\. max_new_tokens=",
        ),
        (lambda policy, rm, scalar: jaxrm.load_policy(""), r"^path is ''; it must be the folder of a run, or pub"),
        (lambda policy, rm, scalar: jaxrm.load_policy("nowhere"), r"^path is 'nowhere'"),
        (
            lambda policy, rm, scalar: jaxrm.load_policy("sft/checkpoints/9"),
            r"^path is 'sft/checkpoints/9', but the checkpoints of that run are 4, and best$",
        ),
        (
            lambda policy, rm, scalar: jaxrm.load_policy("rm_scalar"),
            r"^path is 'rm_scalar', a run of scalar_rm; required a model of sft or .*, e\.g\. path=",
        ),
        (lambda policy, rm, scalar: jaxrm.load_reward_model("sft"), r"^path is 'sft', a run of sft; required a model"),
        (
            lambda policy, rm, scalar: jaxrm.load_policy("sft", template="gemma"),
            r"^template is 'gemma', but sft is a run, which has its own; leave it out$",
        ),
        (lambda policy, rm, scalar: policy.as_reward_model("both"), r"^sort is 'both'; use one of seq2seq, scalar$"),
        (lambda policy, rm, scalar: jaxrm.losses.scalar_rm(policy), r"^model has no scalar head; it must be"),
        (lambda policy, rm, scalar: jaxrm.losses.sft(scalar), r"^model is a scalar reward model, which has no lang"),
        (lambda policy, rm, scalar: jaxrm.pairs("missing.jsonl", policy), r"^path is 'missing\.jsonl'"),
        (
            lambda policy, rm, scalar: jaxrm.pairs("pairs.jsonl", policy, max_length=512),
            r"^max_length is 512, but the model reads at most 256 tokens; e\.g\. max_length=256$",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(models, call, message):
    with pytest.raises(jaxrm.UserError, match=message) as caught:
        call(*models)
    assert not re.search(r"\n|--|config\.(?!json)", str(caught.value))


def test_the_folder_of_a_pipeline_names_its_stages(make_run, tmp_path):
    make_run(tmp_path / "sft")
    (tmp_path / "pipeline.json").write_text("{}")
    with pytest.raises(jaxrm.UserError, match=r"^path is '.*', the folder of a pipeline; .* one of sft$"):
        jaxrm.load_policy(str(tmp_path))


def test_run_refuses_as_the_command_does(tmp_path):
    """The errors of a stage name fields of its config, not arguments."""
    config = SFT(run_dir=str(tmp_path / "run"), data=DataConfig(path="task:safety"))
    with pytest.raises(jaxrm.UserError, match=r"^config\.model has neither path nor preset; .* --config\.model\.path="):
        jaxrm.run(config)
    assert not (tmp_path / "run").exists()
