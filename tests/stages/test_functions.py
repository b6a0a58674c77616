"""Functions of text: spans, fields of records, and processes of their own that hang, die and end with the run."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support.published import published_tokenizer

from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.data.prompts import PromptExample, tokenize_prompts
from jaxrm.data.readers import read_records
from jaxrm.data.records import Message
from jaxrm.data.responses import Response, response_text
from jaxrm.data.token_spans import lay_on_tokens
from jaxrm.errors import UserError, naming
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.inference.text_scorer import TextSample
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO, BestOfN, Evaluate
from jaxrm.stages.ppo import run as ppo
from jaxrm.stages.rewards.function_call import takes_fields
from jaxrm.stages.rewards.functions import FunctionScorer, open_function
from jaxrm.stages.rewards.sources import identities_of
from jaxrm.stages.rewards.text import TextRewards
from jaxrm.types import ResponseBatch

PROMPT = (Message("user", "why ?"),)


def sample(text, fields=None):
    response = Response(text)
    response.raw, response.token_ids, response.ended = text, np.arange(3, dtype=np.int32), True
    return TextSample(PROMPT, response, fields or {})


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module of one function ``f`` that this process and its workers find; returns the function's name."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"functions_of_{tmp_path.name.replace('-', '_')}"

    def write(source):
        (tmp_path / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
        return f"{name}:f"

    yield write
    sys.modules.pop(name, None)


@pytest.fixture
def scorer(write_module):
    """Builds a scorer of a module's ``f``, and ends its processes."""
    opened = []

    def build(source, **options):
        name = write_module(source)
        opened.append(FunctionScorer(name, open_function(name), **options))
        return opened[-1]

    yield build
    for one in opened:
        one.close()


# --- spans


@pytest.fixture(scope="module")
def tokenizer():
    return published_tokenizer("chatml")


def test_numbers_of_spans_become_rewards_of_tokens(tokenizer):
    """Of the whole source: a word's number is on its last token, that of the whole on the end token."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    responses = [[*tokenizer("think good stone")["input_ids"], end], [end]]
    batch = ResponseBatch(
        np.ones((2, 1), np.int32), np.ones((2, 1), bool), np.zeros((2, 20), np.int32), np.zeros((2, 20), bool)
    )
    for row, ids in enumerate(responses):
        batch.responses[row, : len(ids)], batch.response_mask[row, : len(ids)] = ids, True

    def function(prompts, responses):
        return [
            [(0, len(text), 0.5), (len(text), len(text), 3), *([(0, 5, -1)] if "think" in text else [])]
            for text in responses
        ]

    source = TextRewards(
        FunctionScorer("mine:f", function, functools.partial(lay_on_tokens, tokenizer, (end,))),
        KINDS["spans"],
        examples=[PromptExample(np.ones(1, np.int32), PROMPT, "a record")],
        text=lambda ids: response_text(tokenizer, (end,), ids),
        end_ids=(end,),
        mesh=build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
    )
    rewards = jax.device_get(source(reward_scaling.uncalibrated(), batch, None)).rewards
    places = np.flatnonzero(rewards[0])
    np.testing.assert_array_equal(rewards[0, places], [-1, 0.5, 3])
    written = [tokenizer.decode(responses[0][: place + 1], skip_special_tokens=True) for place in places]
    assert written == ["think", "think good stone", "think good stone"] and places[2] == len(responses[0]) - 1
    assert rewards[1].tolist() == [3.5] + [0.0] * 19


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[], 1.0], r"returned 1.0 for response 1 of the batch, 'good'; required a list of \(start, end, finite numb"),
        ([[], "ab"], r"returned 'ab' for response 1 of"),
        ([[], [(0, 2)]], r"returned the span \(0, 2\) for response 1 of"),
        ([[], [3]], r"returned the span 3 for response 1 of"),
        ([[], [(0, 5, 1.0)]], r"returned the span \(0, 5, 1.0\) for a response of 4 characters, response 1 of"),
        ([[], [(-1, 2, 1.0)]], r"returned the span \(-1, 2, 1.0\) for a response of"),
        ([[], [(2, 2, 1.0)]], r"returned the span \(2, 2, 1.0\) for a response of"),
        ([[], [(0, 2.5, 1.0)]], r"returned the span \(0, 2.5, 1.0\) for a response of"),
        ([[], [(0, 2, float("nan"))]], r"returned the span \(0, 2, nan\) for a response of"),
        ([[]], r"returned 1 rewards for 2 responses; required a list of"),
    ],
    ids=str,
)
def test_what_is_no_span_is_refused_with_the_response(returned, message):
    scorer = FunctionScorer("mine:f", lambda prompts, responses: returned, lambda *_: np.zeros(3))
    with pytest.raises(UserError, match=rf"^config.reward.function mine:f {message}"):
        scorer([sample("bad"), sample("good")])


# --- fields


def test_a_function_of_three_arguments_gets_the_records_columns(tokenizer, tmp_path):
    rows = [{"prompt": "answer the request", "answer": "4", "row": {"id": 7}}, {"prompt": "please", "answer": None}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "prompts.jsonl")
    data = DataConfig(path=path, eval_path=path)
    for with_fields in (True, False):
        records, _ = read_records(data, held_out=True, with_fields=with_fields)
        examples, _ = tokenize_prompts(records, tokenizer, "auto", 64)
        assert [example.fields for example in examples] == (rows if with_fields else [{}, {}])
    seen = []

    def function(prompts, responses, fields):
        seen.append(fields)
        return [1.0] * len(responses)

    FunctionScorer("mine:f", function)([sample("a", rows[0]), sample("b", rows[1])])
    assert seen == [rows] and seen[0][0] is not rows[0]  # a copy, so that it may be changed


@pytest.mark.parametrize(
    ("signature", "has_fields"),
    [
        ("prompts, responses", False),
        ("prompts, responses, fields", True),
        ("prompts, responses, fields=None", True),
        ("prompts, responses, limit=3", False),  # an option of the user's own
        ("prompts, responses, *, limit=3", False),
        ("*texts", False),
        ("prompts, responses, fields, limit=3", True),
    ],
)
def test_a_third_argument_is_for_fields(write_module, signature, has_fields):
    result = "texts" if "texts" in signature else "prompts, responses"
    function = open_function(
        write_module(f"def f({signature}):\n    return [len([{result}])]".replace("[texts]", "texts"))
    )
    assert takes_fields(function) is has_fields
    assert FunctionScorer("mine:f", function)([sample("a")]).tolist() == [2]


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "responses",
        "prompts, responses, *, fields",
        "a, b, c, d",
        "prompts, responses, rows",
        "prompts, completions, ground_truth, **kwargs",
        "prompts, completions, **kwargs",
        "prompts, responses, limit=3, fields=None",
    ],
)
def test_other_signatures_are_refused_with_what_to_type(write_module, signature):
    name = write_module(f"def f({signature}):\n    return []")
    with pytest.raises(UserError, match=r"which takes \(.*\); required def f\(prompts, responses\), or def f\(p"):
        open_function(name)


@pytest.mark.parametrize("returned", [{"a": 1.0}, {1.0}, "1", b"1"], ids=repr)
def test_a_return_without_an_order_is_refused(returned):
    with pytest.raises(UserError, match=r"mine:f returned .* for 1 responses; required one finite number"):
        FunctionScorer("mine:f", lambda prompts, responses: returned)([sample("a")])


# --- processes

WITHOUT_JAX = "import os, sys\ndef f(prompts, responses, fields):\n    assert 'jax' not in sys.modules\n"


def test_processes_share_the_samples_in_their_order(scorer):
    source = WITHOUT_JAX + "    return [os.getpid() + 0 * len(r.raw) + row['x'] for r, row in zip(responses, fields)]"
    score = scorer(source, workers=3, timeout=60.0)
    pids = score([sample("a", {"x": 0})] * 7).astype(int)
    assert len(set(pids)) == 3 and os.getpid() not in pids
    places = score([sample(f"{i}", {"x": i}) for i in range(7)]) - pids
    assert places.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "import time; time.sleep(60)",
            "took more than 2 s on response 2 of the batch, 'bad one'; required one finite number ",
        ),
        ("os._exit(3)", "ended its process, with exit status 3, on response 2 of the batch, 'bad one'; required one"),
        ("1 / 0", "raised ZeroDivisionError: division by zero, on response 2 of the batch, 'bad one'; required one "),
        ("raise SystemExit(2)", "raised SystemExit: 2, on response 2 of the batch, 'bad one'; required one finite"),
        ("return ['x'] * len(responses)", "returned 'x' for response 2 of the batch, 'bad one'; required one finite "),
        ("return []", "returned 0 rewards for 2 responses; required one finite number for each response, within 30 s"),
    ],
    ids=["hangs", "ends", "raises", "exits", "no number", "too few"],
)
def test_a_failure_in_a_process_names_the_response(scorer, line, message):
    source = f"import os\ndef f(prompts, responses):\n    if 'bad one' in responses:\n        {line}\n"
    score = scorer(source + "    return [1.0] * len(responses)", workers=2, timeout=2.0 if "sleep" in line else 30.0)
    samples = [sample(text) for text in ("a", "b", "bad one", "c")]
    with naming({"reward": "config.rewards.rule"}), pytest.raises(UserError) as caught:  # it has its name by then
        score(samples)
    assert message in str(caught.value) and "(config.reward.function_timeout)" in str(caught.value)
    assert score(samples[:2]).tolist() == [1.0, 1.0]  # in new processes


@pytest.mark.parametrize(
    ("line", "workers", "timeout"), [("time.sleep(60)", 1, 2.0), ("raise OSError('busy')", 3, 30.0)]
)
def test_a_failure_that_passes_costs_a_retry_alone(scorer, tmp_path, line, workers, timeout):
    """Also where a process has but one response."""
    (tmp_path / "broken").touch()
    source = f"""
import os, time
def f(prompts, responses):
    if 'x' in responses and os.path.exists({str(tmp_path / "broken")!r}):
        os.remove({str(tmp_path / "broken")!r})
        {line}
    return [float(len(r)) for r in responses]
"""
    score = scorer(source, workers=workers, timeout=timeout)
    assert score([sample("ab"), sample("x"), sample("abc")]).tolist() == [2, 1, 3]


def test_a_function_that_raises_late_is_not_late(scorer):
    """Finding the response to blame takes calls of its own, each with its own limit."""
    source = "import time\ndef f(prompts, responses):\n    time.sleep(3)\n    raise ValueError('no')"
    with pytest.raises(UserError, match="raised ValueError: no, on response 0 of the batch, 'a'"):
        scorer(source, workers=1, timeout=5.0)([sample("a"), sample("b")])


def test_a_dead_worker_whose_child_lives_on_is_noticed(scorer):
    """The child keeps the connection open, so nothing but the process says it: else the call would not return."""
    source = """
import os, signal
def f(prompts, responses):
    if os.fork() == 0:
        signal.pause()
    os.kill(os.getpid(), 9)
"""
    with pytest.raises(UserError, match="ended its process, with exit status -9, on response 0 of the batch, 'a'"):
        scorer(source, workers=1)([sample("a")])


def test_a_worker_ends_with_a_parent_that_is_killed(write_module, tmp_path):
    """In the middle of a call that hangs, too."""
    name = write_module(
        f"import os, pathlib\ndef f(prompts, responses):\n    pathlib.Path({str(tmp_path / 'pid')!r}).write_text("
        "str(os.getpid()))\n    while True: pass"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from jaxrm.stages.rewards.function_processes import FunctionProcesses\n"
        f"FunctionProcesses({name!r}, 1, None, is_spans=False)([None])"
    )
    script = script.replace("[None]", "[TextSample((), Response(), {})]").replace(
        "\nFunction",
        "\nfrom jaxrm.inference.text_scorer import TextSample\nfrom jaxrm.data.responses import Response\nFunction",
    )
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_until((tmp_path / "pid").exists)
        time.sleep(0.1)
        parent.kill()
    worker = Path("/proc", (tmp_path / "pid").read_text())
    wait_until(lambda: not worker.exists() or "Z" in (worker / "stat").read_text().split()[2])


def wait_until(is_so):
    for _ in range(1500):
        if is_so():
            return
        time.sleep(0.02)
    raise AssertionError("what was waited for did not come")


def test_a_signal_to_stop_the_run_does_not_stop_a_worker(scorer):
    score = scorer("import os\ndef f(prompts, responses):\n    return [float(os.getpid())] * len(responses)", workers=1)
    pid = int(score([sample("a")])[0])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert score([sample("a")]) == [pid]
    os.kill(pid, signal.SIGKILL)
    assert score([sample("a")])[0] not in (pid, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"function_timeout": 3.0},
            r"function_timeout is 3.0; it must be None without RewardConfig.function_workers",
        ),
        ({"function_timeout": 0.0, "function_workers": 1}, "function_timeout is 0.0; it must be above 0"),
        ({"function_workers": -1}, "function_workers is -1; it must be at least 0"),
        (
            {"function_workers": 2, "function": None},
            "function_workers is 2; it must be left out without RewardConf",
        ),
        (
            {"function_workers": 2, "function": "__main__:f"},
            "function is '__main__:f'; it must be in a module, ",
        ),
        (
            {"kind": "literal"},
            "kind is 'literal'; it must be one of scalar, .*spans, since RewardConfig.function ",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(UserError, match=rf"^RewardConfig.{message}"):
        RewardConfig(**{"kind": "scalar", "function": "my:f", **options})


def sha256_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.slow
def test_a_function_that_hangs_stops_ppo_with_its_state_saved(write_module, make_run, task_folder, tmp_path, capsys):
    """A whole run: spans by the fields of records, in processes; more of them are no other run, and a mend is said."""
    source = f"""
import pathlib, time
count = pathlib.Path({str(tmp_path / "count")!r})
def f(prompts, responses, fields):
    assert all(row["prompt"] == prompt[0].content for row, prompt in zip(fields, prompts))
    calls = len(count.read_text()) if count.exists() else 0
    while calls == 5:
        time.sleep(0.01)
    count.write_text("x" * (calls + 1))
    return [[(0, len(response), float(len(set(response))))] for response in responses]
"""
    make_run(tmp_path / "sft")
    sampling = SamplingConfig(max_new_tokens=6)

    def run(**options):
        reward = RewardConfig(kind="spans", function=name, calibration_responses=8, **options)
        return ppo.run(
            PPO(
                run_dir=str(tmp_path / "ppo"),
                model=ModelSource(path=str(tmp_path / "sft")),
                mesh=MeshConfig(1, 1, 1),
                data=DataConfig(
                    path=str(task_folder / "prompts.jsonl"), max_length=64, batch_size=8, max_eval_records=8
                ),
                rollout=RolloutConfig(sampling=sampling),
                reward=reward,
                evaluation=JudgedEvaluationConfig(every=50, samples=1, judge=None, sampling=sampling),
                logging=LoggingConfig(every=1, tensorboard=False, progress=False),
                num_steps=4,
            )
        )

    name = write_module(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "build_mesh", lambda given: build_mesh(given, jax.devices()[:1]))
        with pytest.raises(UserError, match=r"f took more than 4 s on response 0 of the batch, .* within 4 s"):
            run(function_workers=1, function_timeout=4.0)
        saved = max(int(path.name) for path in (tmp_path / "ppo" / "checkpoints").iterdir() if path.name.isdecimal())
        assert saved == 3  # calls: calibration, evaluation and three steps
        before = sha256_of(source)
        (tmp_path / "count").unlink()
        write_module(source.replace("while calls == 5", "while False"))
        assert run(function_workers=2, function_timeout=60.0) == 0
        mended = sha256_of(source.replace("while calls == 5", "while False"))
        words = f"({name} (file sha256 {before}), now {name} (file sha256 {mended})); the run goes on with the new one"
        assert words in capsys.readouterr().out
        assert run() == 0 and "reward function" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "policy_loss" in row] == [1, 2, 3, 4]


JOB = """
import sys
import numpy as np
from jaxrm.runtime import processes

index = int(sys.argv[1])
processes.start(processes.Processes(sys.argv[2], 2, index))
from jaxrm.data.prompts import PromptExample
from jaxrm.data.responses import Response
from jaxrm.errors import UserError
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.rewards.functions import FunctionScorer
from jaxrm.stages.rewards.text import TextRewards
from jaxrm.types import ResponseBatch
import jax

calls = []

def function(prompts, responses):
    calls.append(responses)
    if len(calls) > 1:
        raise UserError("no more \\ud800")  # no UTF-8 can be made of it
    return [float(response) for response in responses]

def text(ids):
    response = Response(ids[0])
    response.token_ids = ids
    return response

mesh = build_mesh(MeshConfig(data=2))
source = TextRewards(
    FunctionScorer("mine:f", function),
    KINDS["scalar"],
    examples=[PromptExample(np.ones(1, np.int32), (), "a record")],
    text=text,
    end_ids=(9,),
    mesh=mesh,
)
arrays = np.ones((2, 1), np.int32), np.ones((2, 1), bool), np.array([[5, 9], [6, 9]], np.int32), np.ones((2, 2), bool)
rows = partition.batch_sharding(mesh)
batch = ResponseBatch(*(jax.make_array_from_callback(x.shape, rows, x.__getitem__) for x in arrays))
(own,) = source(reward_scaling.uncalibrated(), batch, None).rewards.addressable_shards
print("reward", np.asarray(own.data).tolist())
try:
    source(reward_scaling.uncalibrated(), batch, None)
except UserError as error:
    print("error", str(error).encode(errors="replace").decode())
print("calls", len(calls), flush=True)
"""


@pytest.mark.slow
def test_a_job_of_two_processes_calls_a_function_once():
    """Each gets its row's reward, and the error of process 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    job = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(i), address], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=600)[0] for process in job]
    finally:
        for process in job:
            process.kill()
    for index, text in enumerate(printed):
        assert f"reward [[0.0, {5 + index}.0]]" in text
        assert (
            "error config.reward.function mine:f raised UserError: no more ?, on response 0 of the batch, '5'; " in text
        )
        assert f"calls {0 if index else 3}" in text  # the second one fails, and again with the first response alone


@pytest.mark.parametrize("stage", [PPO, BestOfN, Evaluate])
def test_an_edited_function_is_another_source_of_rewards(write_module, stage):
    """Its file says which one it is. What is not in a file has its name alone."""
    source = "def f(prompts, responses):\n    return [1.0 for _ in responses]\n"
    config = stage(reward=RewardConfig(kind="scalar", function=write_module(source), model=None))
    [first] = identities_of(config)
    assert re.fullmatch(rf"{config.reward.function} \(file sha256 [0-9a-f]{{12}}\)", first)
    assert identities_of(config) == [first]
    write_module(source.replace("1.0", "2.0"))
    assert identities_of(config) != [first]
    named = dataclasses.replace(config, reward=RewardConfig(), rewards={"exact": config.reward})
    assert identities_of(named) == [f"exact {identities_of(config)[0]}"]
    judge = dataclasses.replace(config, reward=dataclasses.replace(config.reward, function="task:safety"))
    assert identities_of(judge) == ["task:safety"]
