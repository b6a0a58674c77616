"""Policies compared: what is answered, judged, kept, and refused. Most policies are files of answers."""

import dataclasses
import importlib
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from support.chat_server import ChatServer, Reply, serving

import jaxrm
from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.algorithms.reward_config import RewardKindConfig
from jaxrm.comparison_config import (
    CompareConfig,
    ComparedPolicyConfig,
    ComparisonJudgeConfig,
    PromptSetConfig,
)
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import Message
from jaxrm.data.responses import Response
from jaxrm.errors import UserError
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig, read_rows
from jaxrm.runtime.row_log import RowLog
from jaxrm.stage_config import Compare
from jaxrm.stages.compare import answers, log_probs, reference
from jaxrm.stages.compare.answers import AnswerKey, _generate
from jaxrm.stages.compare.measures import Comparison, tables_of
from jaxrm.stages.compare.prompts import PromptSet
from jaxrm.stages.compare.run import compare, inspect

PROMPTS = [f"how do i wash lamp {number} ?" for number in range(12)]
SHORT, LONG = "with water .", "with water , soap , and a lot of time ."


@pytest.fixture
def config(tmp_path):
    """Two files of answers to twelve prompts: ``brief`` and ``wordy``."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    for name, answer in (("brief", SHORT), ("wordy", LONG)):
        rows = [{"prompt": text, "response": f"{answer} {text[-3]}"} for text in reversed(PROMPTS)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Compare(
        run_dir=str(tmp_path / "run"),
        policies={name: ComparedPolicyConfig(answers=str(tmp_path / f"{name}.jsonl")) for name in ("brief", "wordy")},
        prompts={"lamps": PromptSetConfig(path=str(tmp_path / "prompts.jsonl"), label="harmless")},
        compare=CompareConfig(decodings=("greedy",), batch_size=4),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


@pytest.fixture
def judge_module(monkeypatch):
    """A module of functions that judge, which counts the answers that it was given."""
    module = types.ModuleType("comparison_judges")
    module.given, module.fails_after = [], None

    def longer(prompts, responses):
        module.given += responses
        if module.fails_after is not None and len(module.given) > module.fails_after:
            raise RuntimeError("out of order")
        return [float(len(response)) for response in responses]

    module.longer = longer
    monkeypatch.setitem(sys.modules, "comparison_judges", module)
    return module


LONGER = ComparisonJudgeConfig(function="comparison_judges:longer")


def with_judges(config, **judges):
    return dataclasses.replace(config, judges=judges)


def test_a_judge_of_length_and_its_page(config, judge_module, tmp_path, capsys):
    found = compare(with_judges(config, longer=LONGER))
    (wins,) = found.tables["wins"]
    assert (wins["policy"], wins["against"], wins["win_rate"], wins["wins"]) == ("wordy", "brief", 1.0, 1.0)
    assert wins["verdicts"] == 12 and wins["position_bias"] is None
    answers = {row["policy"]: row for row in found.tables["answers"]}
    assert answers["wordy"]["words"] == len(LONG.split()) + 1 and answers["wordy"]["refusals"] == 0.0
    assert answers["wordy"]["ended"] is None and answers["wordy"]["kl"] is None
    assert json.loads((tmp_path / "run/comparison.json").read_text())["wins"] == found.tables["wins"]
    verdicts = read_rows(tmp_path / "run/verdicts.jsonl")
    assert len(verdicts) == 12 and {row["verdict"] for row in verdicts} == {"win"}
    page = (tmp_path / "run/comparison.html").read_text()
    assert "Who wins" in page and "wordy against brief" in page and SHORT in page
    assert "Who wins" in capsys.readouterr().out


def test_nothing_is_judged_twice(config, judge_module):
    """Neither after an end midway nor when a policy or a judge is added."""
    judge_module.fails_after = 10
    with pytest.raises(UserError, match=r"config.judges.longer.function comparison_judges:longer raised RuntimeError"):
        compare(with_judges(config, longer=LONGER))
    kept = len(judge_module.given) - 4 - 4  # the block that failed, and its answers one by one
    judge_module.fails_after, judge_module.given = None, []
    first = compare(with_judges(config, longer=LONGER))
    assert len(judge_module.given) <= 24 - kept + 4
    judge_module.given = []
    policies = {**config.policies, "again": config.policies["brief"]}
    again = compare(dataclasses.replace(with_judges(config, longer=LONGER), policies=policies))
    assert judge_module.given == [] and again.tables["wins"][0] == first.tables["wins"][0]
    assert again.tables["wins"][1]["ties"] == 1.0


def test_no_answer_is_lost_that_came_before_an_earlier_one(config, tmp_path, monkeypatch):
    """The last response completes the first of three batches; the two behind it are whole."""
    order = [*range(1, 10), 0]

    def answered(prompts, keys, rows):
        for place in order:
            response = Response(f"answer {place}")
            response.raw, response.token_ids, response.ended = str(response), np.zeros(1, np.int32), True
            yield place, response

    sampler = types.SimpleNamespace(answers=answered)
    tokenizer = types.SimpleNamespace(get_vocab=dict)
    policy = types.SimpleNamespace(sampler=lambda sampling: sampler, tokenizer=tokenizer, name="late")
    prompts = PromptSet("lamps", [[Message("user", f"prompt {i}")] for i in order], None, ReadReport())
    log = RowLog(tmp_path / "answers.jsonl")
    key = AnswerKey("late", 0, "lamps", "greedy")
    assert list(_generate(config, policy, key, prompts, log)) == [*range(1, 10), 0]
    assert [row["response"] for row in read_rows(tmp_path / "answers.jsonl")] == [f"answer {i}" for i in range(10)]


def test_a_function_that_was_edited_judges_anew(config, tmp_path, monkeypatch):
    """Its name stays, so only its file tells."""
    monkeypatch.syspath_prepend(str(tmp_path))
    judged = with_judges(config, mine=ComparisonJudgeConfig(function="edited_judge:score"))
    rates = []
    for sign in ("", "-"):
        code = f"def score(prompts, responses):\n    return [{sign}float(len(each)) for each in responses]\n"
        (tmp_path / "edited_judge.py").write_text(code)
        monkeypatch.delitem(sys.modules, "edited_judge", raising=False)
        importlib.invalidate_caches()
        rates.append(compare(judged).tables["wins"][0]["win_rate"])
    assert rates == [1.0, 0.0]


def test_a_function_reads_the_columns_of_prompts(config, judge_module, tmp_path):
    """``wordy`` is right in 8 of 12 prompts; the first comes again with an answer that ``brief`` alone has."""
    prompts = [{"prompt": text, "answer": ("time", "time", SHORT)[number % 3]} for number, text in enumerate(PROMPTS)]
    prompts.append({**prompts[0], "answer": SHORT})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))

    def right(prompts, responses, fields):
        judge_module.given += fields
        return [float(row["answer"] in each) for each, row in zip(responses, fields, strict=True)]

    judge_module.right = right
    judged = with_judges(config, right=ComparisonJudgeConfig(function="comparison_judges:right"), longer=LONGER)
    by_judge = {row["judge"]: row for row in compare(judged).tables["wins"]}
    assert by_judge["right"]["win_rate"] == pytest.approx(8 / 13) and by_judge["longer"]["win_rate"] == 1.0
    judge_module.given = []
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({**row, "answer": "time"}) + "\n" for row in prompts))
    by_judge = {row["judge"]: row for row in compare(judged).tables["wins"]}
    assert by_judge["right"]["win_rate"] == 1.0 and all(row["answer"] == "time" for row in judge_module.given)


def test_an_endpoint_is_asked_in_both_orders(config, tmp_path):
    """One that always says A has a position bias of 1 and gives 50 %; it is asked once, whatever happens."""
    with serving(ChatServer(reply=lambda number, question: Reply("A"))) as server:
        endpoint = EndpointConfig(url=server.url, model="judge", cache=str(tmp_path / "cache"), retry_seconds=0.0)
        judged = with_judges(config, chat=ComparisonJudgeConfig(endpoint=endpoint))
        (wins,) = compare(judged).tables["wins"]
        assert (wins["win_rate"], wins["position_bias"]) == (0.5, 1.0)
        assert "chat goes by the first place" in (tmp_path / "run/comparison.html").read_text()
        assert len(server.questions) == 24 and SHORT in server.questions[0] and "Answer A" in server.questions[0]
        compare(judged)
        assert len(server.questions) == 24


def test_an_endpoint_that_fails_loses_and_repeats_nothing(config, tmp_path):
    """Slow, wrong, silent, then back: no question that had an answer is asked again, and the tables are the same."""

    def answered(number, question):
        return Reply("A" if question.index(SHORT) < question.index(LONG) else "B")

    with serving(ChatServer(reply=answered)) as server:
        fields = {"retry_seconds": 0.0, "retries": 1, "timeout": 0.5, "concurrency": 2}
        endpoint = EndpointConfig(url=server.url, model="judge", cache=str(tmp_path / "never"), **fields)
        expected = compare(with_judges(config, chat=ComparisonJudgeConfig(endpoint=endpoint))).tables
        assert len(set(server.questions)) == len(server.questions) == 24
        server.questions.clear()
        judged = with_judges(
            dataclasses.replace(config, run_dir=str(tmp_path / "again")),
            chat=ComparisonJudgeConfig(endpoint=dataclasses.replace(endpoint, cache=str(tmp_path / "cache"))),
        )
        good = []

        def five_and_then(reply):
            return lambda number, question: (
                (good.append(question) or answered(number, question)) if number < 5 else reply
            )

        for reply in (Reply(delay=2.0), Reply(status=503), Reply(hangs_up=True)):
            server.questions.clear()
            server.reply = five_and_then(reply)
            with pytest.raises(
                UserError, match=r"config\.judges\.chat\.endpoint: judge at .* failed on .* same command"
            ):
                compare(judged)
        odd = []

        def back(number, question):
            """Its first reply is no verdict; asked again, it is."""
            if not odd:
                odd.append(question)
                return Reply("Both are fine.")
            good.append(question)
            return answered(number, question)

        server.reply = back
        assert compare(judged).tables == expected
        assert sorted(good) == sorted(set(good)) and len(good) == 24
        server.questions.clear()
        assert compare(judged).tables == expected and not server.questions


def test_replies_that_are_no_verdict_are_counted(config, tmp_path):
    """One of many is left out; where all are, the judge is refused with what it says."""
    for name, silent, words in (("some", LONG + " 3", None), ("all", "", ("neither A nor B", "'It depends.'"))):
        reply = lambda number, question, silent=silent: Reply("It depends." if silent in question else "A")  # noqa: E731
        with serving(ChatServer(reply=reply)) as server:
            endpoint = EndpointConfig(url=server.url, model="judge", cache=str(tmp_path / name), retry_seconds=0.0)
            judged = with_judges(config, chat=ComparisonJudgeConfig(endpoint=endpoint))
            if words is None:
                (wins,) = compare(judged).tables["wins"]
                assert 0 < wins["without_verdict"] < 12
                continue
            with pytest.raises(UserError) as error:
                compare(dataclasses.replace(judged, run_dir=str(tmp_path / "other")))
            assert all(each in str(error.value) for each in (*words, "--config.judges.chat.words=1,2"))


def test_refusals_may_be_asked_of_a_judge(config, tmp_path):
    said = {"refuse": lambda question: "A" if LONG in question else "B"}
    reply = lambda number, question: Reply(said["refuse"](question) if "refuse" in question else "B")  # noqa: E731
    with serving(ChatServer(reply=reply)) as server:
        endpoint = EndpointConfig(url=server.url, model="judge", cache=str(tmp_path / "cache"), retry_seconds=0.0)
        judged = with_judges(config, chat=ComparisonJudgeConfig(endpoint=endpoint))
        found = compare(dataclasses.replace(judged, compare=dataclasses.replace(config.compare, refusal_judge="chat")))
    rates = {row["policy"]: row["refused_of_harmless"] for row in found.tables["labels"]}
    assert rates == {"brief": 0.0, "wordy": 1.0}


@pytest.mark.slow
def test_policies_answer_and_what_is_there_stays(config, make_run, tmp_path):
    """Random policies: the reference measures KL 0 of itself; again, no file of answers or verdicts changes."""
    for number, name in enumerate(("one", "two")):
        make_run(tmp_path / name, seed=number)
    make_run(tmp_path / "rm", "seq2seq_rm", seed=3)
    config = dataclasses.replace(
        config,
        policies={name: ComparedPolicyConfig(path=str(tmp_path / name)) for name in ("one", "two")},
        prompts={"heldout": PromptSetConfig(path="task:safety", max_prompts=5)},
        judges={
            "rm": ComparisonJudgeConfig(reward_model=str(tmp_path / "rm")),
            "exact": ComparisonJudgeConfig(function="task:safety"),
        },
        compare=CompareConfig(
            decodings=("sampled",),
            sampling=SamplingConfig(max_new_tokens=8),
            batch_size=4,
            reference=str(tmp_path / "one"),
            token_rewards=2,
        ),
    )
    found = compare(config)
    answers = {row["policy"]: row for row in found.tables["answers"]}
    assert answers["one"]["kl"] == pytest.approx(0, abs=1e-4) and answers["two"]["kl"] > 0
    assert {duel.judge for duel in found.duels} == {"rm", "exact"}
    assert all(np.isin(duel.outcomes, (0, 0.5, 1)).all() for duel in found.duels)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*/*.jsonl")}
    assert jaxrm.run(config) == 0 and compare(config).tables == found.tables
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_kl_is_at_the_sampling_temperature(config, make_run, tmp_path, monkeypatch):
    """By hand from log-probs at 1 of answers of one token; perplexity stays at 1, and older KLs are not taken."""
    for number, name in enumerate(("one", "two")):
        make_run(tmp_path / name, seed=number)
    config = dataclasses.replace(
        config,
        policies={name: ComparedPolicyConfig(path=str(tmp_path / name)) for name in ("one", "two")},
        prompts={"heldout": PromptSetConfig(path="task:safety", max_prompts=3)},
        compare=CompareConfig(
            decodings=("sampled",),
            sampling=SamplingConfig(max_new_tokens=1, temperature=0.25, top_p=0.9),
            batch_size=4,
            reference=str(tmp_path / "one"),
        ),
    )
    with monkeypatch.context() as older:
        for module in (answers, log_probs, reference):
            older.setattr(module, "kl_temperature", lambda config: 1.0)
        before = compare(config)
    result = compare(config)
    key = AnswerKey("two", 0, "heldout", "sampled")
    rows, prompts = result.answers[key], result.sets["heldout"].prompts
    assert [row["response"] for row in rows] == [row["response"] for row in before.answers[key]]
    one, two = (jaxrm.load_policy(str(tmp_path / name)) for name in ("one", "two"))
    vocabulary = [[token] for token in range(len(one.tokenizer))]
    for row, prompt, read in zip(rows, prompts, result.reference[key], strict=True):
        (token,), by_hand = row["token_ids"], []
        for policy in (two, one):
            scaled = np.array(log_probs.log_prob_sums(policy, [prompt] * len(vocabulary), vocabulary, 256)) / 0.25
            by_hand.append(scaled[token] - np.log(np.exp(scaled).sum()))
        assert read["kl"] == pytest.approx(by_hand[0] - by_hand[1], rel=1e-4, abs=1e-4)
    for read, old in zip(result.reference[key], before.reference[key], strict=True):
        assert read["nll"] == pytest.approx(old["nll"]) and abs(read["kl"] - old["kl"]) > 0.1


@pytest.mark.slow
def test_a_comparison_killed_at_every_write_is_the_same(config, make_run, tmp_path, monkeypatch):
    """Each launch is killed at its first block of answers or verdicts, half of which is on disk, its last row cut."""
    make_run(tmp_path / "policy")
    prompts = {"heldout": PromptSetConfig(path="task:safety", max_prompts=4)}
    judge = ComparisonJudgeConfig(language_model=str(tmp_path / "policy"), words=("do", "how"))
    config = dataclasses.replace(
        config,
        policies={name: ComparedPolicyConfig(path=str(tmp_path / "policy")) for name in ("one", "two")},
        prompts=prompts,
        judges={"lm": judge},
        compare=CompareConfig(decodings=("sampled",), sampling=SamplingConfig(max_new_tokens=4), batch_size=1),
    )
    expected = compare(dataclasses.replace(config, run_dir=str(tmp_path / "whole"))).tables

    append = RowLog.append

    def killed(log, rows):
        block = list(rows)
        half = (len(block) + 1) // 2
        append(log, block[:half])
        if block[half:]:
            with log._path.open("a") as file:
                file.write(json.dumps(block[half])[:-5])
        raise Killed

    monkeypatch.setattr(RowLog, "append", killed)
    files, launches = {}, 0
    while launches < 30:
        launches += 1
        try:
            result = compare(config)
            break
        except Killed:
            earlier = files
            files = {path: path.read_text().splitlines() for path in (tmp_path / "run").glob("*/*.jsonl")}
            assert all(files[path][: len(rows) - 1] == rows[:-1] for path, rows in earlier.items())
    assert result.tables == expected and 5 < launches < 30
    rows = [json.loads(row) for path in (tmp_path / "run/verdicts").iterdir() for row in path.read_text().splitlines()]
    assert len({row["question"] for row in rows}) == len(rows)


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: {"policies": {"brief": c.policies["brief"]}},
            ("config.policies has 1", "--config.policies.ppo.path="),
        ),
        (lambda c: {"prompts": {}}, ("config.prompts is empty", "set:plain")),
        (lambda c: {"prompts": {"lamps": PromptSetConfig(path="set:plane")}}, ("'set:plane'", "set:harmless")),
        (
            lambda c: {"prompts": {"p": PromptSetConfig(path="set:plain", split="test")}},
            ("config.prompts.p.split is 'test'", "no splits"),
        ),
        (
            lambda c: {
                "prompts": {"lamps": dataclasses.replace(c.prompts["lamps"], label=None)},
                "compare": dataclasses.replace(c.compare, refusals=True),
            },
            ("have no label", "--config.prompts.lamps.label=harmless"),
        ),
        (
            lambda c: {"compare": dataclasses.replace(c.compare, refusal_judge="chat")},
            ("config.compare.refusal_judge is 'chat'",),
        ),
        (
            lambda c: {"judges": {"exact": ComparisonJudgeConfig(function="task:safety")}},
            ("config.judges.exact.function", "no prompt of that task"),
        ),
        (
            lambda c: {"judges": {"lm": ComparisonJudgeConfig(language_model="/nowhere/at/all")}},
            ("config.judges.lm.language_model", "'/nowhere/at/all'"),
        ),
        (
            lambda c: {
                "judges": {
                    "lm": ComparisonJudgeConfig(language_model="x", prompt="no_such_file.txt"),
                }
            },
            ("config.judges.lm.prompt is 'no_such_file.txt'", "{prompt} and {first} and {second}"),
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_writing(config, tmp_path, change, words):
    for run in (compare, inspect):
        with pytest.raises(UserError) as error:
            run(dataclasses.replace(config, **change(config)))
        assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "run").exists()


@pytest.fixture
def judge_without_weights(tmp_path, task_folder):
    """Published weights of which only shape and tokenizer are there; its tokens are words, and A and B are none."""
    shutil.copytree(task_folder / "tokenizer", tmp_path / "judge")
    shape = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 320}
    (tmp_path / "judge/config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5, **shape}))
    return str(tmp_path / "judge")


@pytest.mark.parametrize(
    ("judge", "changes", "words"),
    [
        (
            {"prompt": "long.txt"},
            {},
            ("config.judges.lm.prompt is", "long.txt", "at most 320;", "--config.judges.lm.language_model="),
        ),
        (
            {"prompt": "short.txt"},
            {"max_length": 9},
            ("config.judges.lm.prompt is", "but config.compare.max_length is 9;", "--config.compare.max_length="),
        ),
        (
            {"prompt": "short.txt"},
            {"max_length": 100, "refusal_judge": "lm"},
            ("config.compare.refusal_judge is 'lm', whose question has", "but config.compare.max_length is 100;"),
        ),
        ({"words": ("A", "B")}, {}, ("no two tokens for A and B", "--config.judges.lm.words=")),
    ],
    ids=["for the model", "for the bound", "of refusals", "words"],
)
def test_questions_without_room_are_refused_without_weights(
    config, judge_without_weights, tmp_path, monkeypatch, judge, changes, words
):
    """A question that no answer fits behind would leave every pair without a verdict."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("which is better ? {prompt} {first} {second}")
    (tmp_path / "long.txt").write_text("which is better ? " * 99 + "{prompt} {first} {second}")
    for run in (compare, inspect):
        with pytest.raises(UserError) as error:
            lm = ComparisonJudgeConfig(language_model=judge_without_weights, **{"words": ("do", "how"), **judge})
            run(dataclasses.replace(with_judges(config, lm=lm), compare=dataclasses.replace(config.compare, **changes)))
        assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "run").exists()


def test_answers_that_do_not_match_the_prompts_are_named(config, tmp_path):
    rows = (tmp_path / "wordy.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "wordy.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(UserError, match=r"config.policies.wordy.answers .* no answer to prompt 12 of lamps, 'how do"):
        compare(config)
    (tmp_path / "wordy.jsonl").write_text("".join([*rows, rows[0].replace("water", "sand")]))
    with pytest.raises(UserError, match="answer one prompt differently"):
        inspect(config)
    assert not (tmp_path / "run").exists()  # before a policy has answered


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "has no judge"),
        ({"function": "task:safety", "language_model": "x"}, "has function and language_model"),
        ({"function": "task:safety", "kind": "soft"}, "kind is 'soft', which is for reward models"),
        (
            {"reward_model": "x", "kind": "scalar_length_residual"},
            "kind is 'scalar_length_residual', which is fitted on the answers of a batch",
        ),
        ({"reward_model": "x", "prompt": "summary"}, "prompt is 'summary', which is for a language_model"),
        (
            {"endpoint": EndpointConfig(url="http://localhost:1/v1", model="m", answer="1..5")},
            "answer asks for a score of one answer",
        ),
    ],
)
def test_a_judge_is_one_thing(fields, words):
    with pytest.raises(UserError) as error:
        ComparisonJudgeConfig(**fields)
    assert words in str(error.value)


def test_a_run_that_is_fitted_on_a_batch_is_no_judge(config, make_run, tmp_path):
    """Its own kind is refused as the config's is, and with another kind it judges."""
    make_run(tmp_path / "rm", "scalar_rm", reward=RewardKindConfig(kind="scalar_length_residual"))
    judge = ComparisonJudgeConfig(reward_model=str(tmp_path / "rm"))
    words = r"config.judges.rm.reward_model is .* kind scalar_length_residual, .*--config.judges.rm.kind=scalar"
    with pytest.raises(UserError, match=words):
        inspect(with_judges(config, rm=judge))
    inspect(with_judges(config, rm=dataclasses.replace(judge, kind="scalar")))


@pytest.mark.parametrize(
    "seeds", [("runs/a",), ("runs/b", "runs/b"), ("runs/b", "runs/c/../b/"), ("./runs/a/",), ("~/a", "{home}/a")]
)
def test_a_run_is_one_seed(seeds):
    """Given twice it would count as two that agree."""
    seeds = tuple(path.format(home=Path.home()) for path in seeds)
    with pytest.raises(UserError, match=r"seeds is .*; give each run once, e\.g\. .*seeds="):
        ComparedPolicyConfig(path="runs/a", seeds=seeds)
    assert ComparedPolicyConfig(path="runs/a", seeds=("runs/b", "runs/a2")).seeds == ("runs/b", "runs/a2")


def test_refusals_of_runs_that_agree_count_once():
    """Three of eight prompts of each set are refused, by one run or by five that are the same."""
    texts = [[Message("user", f"prompt {number}")] for number in range(8)]
    rows = []
    for runs in (1, 5):
        keys = [AnswerKey("ppo", run, name, "greedy") for name in ("some", "others") for run in range(runs)]
        sets = {name: PromptSet(name, texts, "harmful", ReadReport()) for name in ("some", "others")}
        replies = {key: [{"response": "no .", "ended": True}] * 8 for key in keys}
        refused = {key: np.repeat([1.0, 0.0], [3, 5]) for key in keys}
        tables = tables_of(Comparison(sets, replies, (), refused, {}))
        (labels,), some = tables["labels"], tables["answers"][0]
        rows.append([labels[f"complied_of_harmful{end}"] for end in ("_low", "", "_high")])
        rows[-1] += [some[f"refusals{end}"] for end in ("_low", "", "_high")]
    one, five = rows
    assert one[1::3] == five[1::3] == [5 / 8, 3 / 8]
    assert all(five[i] <= one[i] < one[i + 2] <= five[i + 2] for i in (0, 3))


def test_a_dry_run_counts_answers_and_questions(config):
    judge = ComparisonJudgeConfig(endpoint=EndpointConfig(url="http://localhost:1/v1", model="judge"))
    facts = inspect(with_judges(config, chat=judge)).facts
    assert facts["answers"].startswith("24,") and facts["questions"].startswith("at most 24 to each of chat")
