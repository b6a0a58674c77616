"""The client of chat endpoints: what is sent, paid for once, retried, refused, and never written anywhere."""

import collections
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.chat_server import ChatServer, Reply, closed_url, serving

from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.errors import UserError
from jaxrm.inference.answer_cache import AnswerCache
from jaxrm.inference.chat_endpoint import ChatEndpoint
from jaxrm.runtime.preemption import StoppedError, catch_signals

ROOT = Path(__file__).resolve().parents[2]
GOOD = Reply("fine")
PASSING = {
    "an error of the server": Reply(status=500, body=b"out of memory"),
    "too many requests": Reply(status=429, headers={"Retry-After": "0"}),
    "a timeout of a gateway": Reply(status=504),
    "no JSON": Reply(body=b"<html>proxy</html>"),
    "bytes that are no text": Reply(body=b"\xff\xfe\x00"),
    "JSON nested too deep": Reply(body=b"[" * 100_000),
    "JSON of another form": Reply(body=b'{"choices": []}'),
    "an error with status 200": Reply(body=b'{"error": {"message": "overloaded"}}'),
    "an answer in parts": Reply(body=b'{"choices": [{"message": {"content": [1]}}]}'),
    "no text": Reply(""),
    "nothing in place of text": Reply(None),
    "an answer that was cut off": Reply("Score: 1", is_cut=True),
    "a connection that is closed": Reply(hangs_up=True),
    "no answer in time": Reply(delay=30.0),  # it is ended with the server
    "a body that is not gzip": Reply(body=b"plain", headers={"Content-Encoding": "gzip"}),
}


@pytest.fixture
def server():
    with serving(ChatServer(reply=lambda number, question: Reply(f"to {question}"))) as running:
        yield running


@pytest.fixture
def connect(tmp_path, server):
    """A client of the server, which waits little; changes of its config are given by name."""

    def open_endpoint(**changes):
        config = EndpointConfig(
            url=server.url, model="judge", cache=str(tmp_path / "cache"), retry_seconds=0.01, timeout=5.0, retries=2
        )
        return ChatEndpoint(dataclasses.replace(config, **changes))

    return open_endpoint


def ask(endpoint, *texts, **options):
    return endpoint.ask([[{"role": "user", "content": text}] for text in texts], **options)


# --- what is sent, and paid for once


def test_answers_come_in_the_order_of_the_questions(server, connect):
    server.reply = lambda number, question: Reply(f"to {question}", delay=0.2 if number == 0 else 0.0)
    assert ask(connect(), "a", "b", "c") == ["to a", "to b", "to c"]


def test_a_request_has_the_fields_of_the_config(server, connect):
    ask(connect(extra='{"top_p": 0.5}', max_tokens=7, temperature=0.25), "a")
    assert server.requests == [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 7,
            "temperature": 0.25,
            "top_p": 0.5,
        }
    ]
    ask(connect(max_tokens=None, temperature=None), "a")
    assert set(server.requests[1]) == {"model", "messages"}


def test_the_same_question_twice_is_asked_once(server, connect):
    endpoint = connect()
    assert ask(endpoint, "a", "b", "a") == ["to a", "to b", "to a"]
    assert sorted(server.questions) == ["a", "b"]
    assert endpoint.cost.questions == 2


def test_an_answer_on_disk_is_not_asked_for_again(server, connect):
    """Also by another client; the order in which a caller writes the fields of a message does not matter."""
    ask(connect(), "a")
    endpoint = connect()
    assert endpoint.ask([[{"content": "a", "role": "user"}]]) == ["to a"]
    assert ask(endpoint, "a", "b") == ["to a", "to b"]
    assert server.questions == ["a", "b"]
    assert (endpoint.cost.questions, endpoint.cost.cached, endpoint.cost.calls) == (3, 2, 1)


@pytest.mark.parametrize(
    "changes", [{"model": "other"}, {"max_tokens": 3}, {"temperature": 1.0}, {"extra": '{"a": 1}'}]
)
def test_what_decides_an_answer_decides_its_place(server, connect, changes):
    ask(connect(), "a")
    ask(connect(**changes), "a")
    assert len(server.questions) == 2


@pytest.mark.parametrize("changes", [{"timeout": 9.0}, {"retries": 0}, {"concurrency": 1}, {"answer": "0..1"}])
def test_what_does_not_decide_an_answer_costs_nothing(server, connect, changes):
    ask(connect(), "a")
    ask(connect(**changes), "a")
    assert len(server.questions) == 1


def test_an_answer_is_not_asked_for_at_another_address(server, connect):
    """A server may come back at another one."""
    ask(connect(), "a")
    with closed_url() as url:
        assert ask(connect(url=url), "a") == ["to a"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"answer": 3}', b"\xff"])
def test_a_damaged_file_of_the_cache_is_asked_for_again(server, connect, tmp_path, damage):
    ask(connect(), "a")
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_bytes(damage)
    assert ask(connect(), "a") == ["to a"]
    assert json.loads(file.read_text())["answer"] == "to a"


def test_text_of_any_characters_arrives(server, connect):
    text = 'é 漢 \U0001f600 "\\ \x00\x1f \ud800 </s>'
    assert ask(connect(), text) == [f"to {text}"]


def test_at_most_so_many_calls_are_made_at_once(server, connect):
    three = threading.Barrier(3, timeout=30)
    server.reply = lambda number, question: three.wait() + 1 and GOOD
    ask(connect(concurrency=3, timeout=60.0), *map(str, range(12)))
    assert server.most_at_once == 3
    assert len(server.questions) == 12


def test_calls_are_concurrent(server, connect):
    eight = threading.Barrier(8, timeout=30)
    server.reply = lambda number, question: eight.wait() + 1 and GOOD
    ask(connect(concurrency=8, timeout=60.0), *map(str, range(8)))
    assert server.most_at_once == 8


def test_it_works_where_a_loop_runs_as_in_a_notebook(connect):
    import asyncio

    async def cell():
        return ask(connect(), "a")

    assert asyncio.run(cell()) == ["to a"]


# --- what is retried


@pytest.mark.parametrize("bad", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_retried(server, connect, bad):
    server.reply = lambda number, question: bad if number == 0 else GOOD
    endpoint = connect(timeout=3.0 if bad.delay else 30.0)
    assert ask(endpoint, "a") == ["fine"]
    assert (endpoint.cost.calls, endpoint.cost.retries) == (2, 1)


@pytest.mark.parametrize("bad", PASSING.values(), ids=PASSING)
def test_what_does_not_pass_ends_in_one_line(server, connect, bad):
    """It names the question and the endpoint, and nothing of it is kept."""
    server.reply = lambda number, question: bad if question == "b" else GOOD
    with pytest.raises(UserError, match=r"failed on question 1: ") as caught:
        ask(connect(timeout=1.0 if bad.delay else 30.0, retries=1), "a", "b")
    assert "\n" not in str(caught.value) and server.url in str(caught.value)
    assert server.questions.count("b") == 2
    ask(connect(), "a")
    assert server.questions.count("a") == 1


def test_the_limit_of_time_is_of_the_whole_answer(server, connect):
    """A byte now and then, as a stuck server or proxy sends, does not extend it."""

    def drip(connection):
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        with connection, contextlib.suppress(OSError):  # the client hangs up
            while True:
                time.sleep(0.1)
                connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: drip(listening.accept()[0]))
        thread.start()
        with pytest.raises(UserError, match=r"no answer within 0\.5 s"):
            ask(connect(url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.5, retries=0), "a")
        thread.join()


def test_retry_after_is_obeyed(server, connect):
    server.reply = lambda number, question: Reply(status=429, headers={"Retry-After": "1"}) if number == 0 else GOOD
    started = time.perf_counter()
    ask(connect(), "a")
    assert time.perf_counter() - started >= 1.0


def test_a_retry_after_of_an_hour_is_an_error(server, connect):
    server.reply = lambda number, question: Reply("", status=429, body=b"", headers={"Retry-After": "3600"})
    with pytest.raises(UserError, match=r"status 429, and asks to wait 3,600 s"):
        ask(connect(), "a")
    assert len(server.questions) == 1


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 413, 422])
def test_what_is_said_of_the_question_is_not_retried(server, connect, status):
    server.reply = lambda number, question: Reply(status=status, body=b"the context\nis too long")
    with pytest.raises(UserError, match=rf"question 0: status {status}, the context is too long"):
        ask(connect(), "a")
    assert len(server.questions) == 1


def test_a_redirect_is_not_followed(server, connect):
    with serving(ChatServer()) as elsewhere:
        server.reply = lambda number, question: Reply(
            status=307, headers={"Location": f"{elsewhere.url}/chat/completions"}
        )
        with pytest.raises(UserError, match=f"redirects to {elsewhere.url}"):
            ask(connect(), "a")
        assert not elsewhere.questions


def test_after_a_failure_no_new_question_is_asked(server, connect):
    """Those under way are waited for and kept, since they are paid for."""
    server.reply = lambda number, question: Reply(status=400) if question == "0" else Reply("fine", delay=3.0)
    with pytest.raises(UserError, match="question 0"):
        ask(connect(concurrency=2, timeout=60.0), *map(str, range(10)))
    assert sorted(server.questions) == ["0", "1"]
    ask(connect(), "1")
    assert len(server.questions) == 2


def test_a_server_that_comes_back_is_asked_again(server, connect):
    server.reply = lambda number, question: Reply(status=503) if number < 5 else GOOD
    endpoint = connect(retries=20)
    assert ask(endpoint, "a") == ["fine"]
    assert endpoint.cost.retries == 5


def test_a_connection_that_is_refused_is_tried_again(connect):
    with closed_url() as url, pytest.raises(UserError, match=r"Connect.*, in the last of 4 calls"):
        ask(connect(url=url, retries=3), "a")


# --- problems that the caller sees in an answer


def no_number(answer):
    return None if answer.isdigit() else f"it is {answer!r}"


def test_an_answer_with_a_problem_is_retried(server, connect):
    server.reply = lambda number, question: Reply("none" if number < 1 else "7")
    endpoint = connect()
    assert ask(endpoint, "a", problem=no_number) == ["7"]
    assert (endpoint.cost.malformed, endpoint.cost.prompt_tokens) == (1, 22)


def test_an_answer_that_keeps_its_problem_is_an_error(server, connect):
    """After one retry, since each of them costs as much."""
    server.reply = lambda number, question: Reply("none")
    with pytest.raises(
        UserError, match=r"sample a: the answer cannot be used, since it is 'none', in the last of 2 calls"
    ):
        ask(connect(), "a", problem=no_number, name=lambda number: "sample a")
    server.reply = lambda number, question: Reply("7")
    assert ask(connect(), "a", problem=no_number) == ["7"]  # it was not kept


@pytest.mark.parametrize("bad", [Reply("none"), Reply("7", is_cut=True), Reply("")], ids=["none", "cut", "empty"])
def test_an_unusable_answer_may_be_kept_as_empty(server, connect, bad):
    """It is not paid for again, but where it would be an error it is not taken for an answer."""
    server.reply = lambda number, question: bad if number < 2 else Reply("8")
    endpoint = connect()
    assert ask(endpoint, "a", problem=no_number, keep_unusable=True) == [""]
    assert ask(endpoint, "a", problem=no_number, keep_unusable=True) == [""]
    assert (len(server.questions), endpoint.cost.unusable, endpoint.cost.malformed) == (2, 2, 2)
    assert ask(endpoint, "a", problem=no_number) == ["8"]


def test_a_server_that_fails_is_no_unusable_answer(server, connect):
    server.reply = lambda number, question: Reply(status=503)
    with pytest.raises(UserError, match="status 503"):
        ask(connect(), "a", problem=no_number, keep_unusable=True)


# --- cost


def test_tokens_are_counted_and_answers_without_a_count(server, connect):
    server.reply = lambda number, question: Reply("fine", is_metered=number < 2)
    endpoint = connect()
    ask(endpoint, "a", "b", "c")
    cost = dataclasses.replace(endpoint.cost, seconds=0.0)
    assert dataclasses.asdict(cost) == {
        "questions": 3,
        "cached": 0,
        "calls": 3,
        "retries": 0,
        "malformed": 0,
        "unusable": 0,
        "prompt_tokens": 22,
        "completion_tokens": 6,
        "unmetered": 1,
        "seconds": 0.0,
    }
    assert endpoint.cost.seconds > 0
    ask(endpoint, "a")
    assert (endpoint.cost.cached, endpoint.cost.calls) == (1, 3)


# --- killed and started again

SCRIPT = """
import sys
from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.inference.chat_endpoint import ChatEndpoint

config = EndpointConfig(url=sys.argv[1], model="judge", cache=sys.argv[2], concurrency=3)
ChatEndpoint(config).ask([[{"role": "user", "content": str(number)}] for number in range(40)])
"""


def test_after_a_kill_only_what_is_missing_is_asked(server, connect, tmp_path):
    """At most the calls that were under way are made twice, and no answer on disk is."""
    killed = threading.Event()

    def reply(number, question):
        if number >= 12:
            killed.wait(60)
        return Reply(f"to {question}")

    server.reply = reply
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.url, str(tmp_path / "cache")], cwd=ROOT, env=environment
    )
    while len(server.questions) < 15 and process.poll() is None:  # the last three are held back
        time.sleep(0.005)
    process.kill()
    process.wait()
    killed.set()
    stored = len(list((tmp_path / "cache").rglob("[0-9a-f]*.json")))
    assert stored == 12
    endpoint = connect(timeout=120.0)
    assert ask(endpoint, *map(str, range(40))) == [f"to {number}" for number in range(40)]
    assert endpoint.cost.cached == stored
    counts = collections.Counter(server.questions)
    assert set(counts) == set(map(str, range(40)))
    assert sum(count - 1 for count in counts.values()) <= 3


def test_a_stop_ends_the_waits_between_retries(server, connect):
    """No further question is put, and answers that are there are kept."""

    def reply(number, question):
        if question == "b":
            os.kill(os.getpid(), signal.SIGTERM)
            return Reply(status=503)
        return GOOD

    server.reply = reply
    endpoint = connect(retry_seconds=60.0, concurrency=1)
    with catch_signals(), pytest.raises(StoppedError):
        ask(endpoint, "a", "b", "c")
    assert server.questions == ["a", "b"]
    assert ask(endpoint, "a") == ["fine"] and endpoint.cost.calls == 2


def test_a_failure_is_said_though_the_run_is_to_stop(server, connect):
    def reply(number, question):
        os.kill(os.getpid(), signal.SIGTERM)
        return Reply(status=400, body=b"too long", delay=0.5)  # the stop is seen meanwhile

    server.reply = reply
    with catch_signals(), pytest.raises(UserError, match="failed on question 0: status 400, too long"):
        ask(connect(), "a")


@pytest.mark.parametrize("blocked", ["write", "read"])
def test_a_cache_that_fails_midway_is_one_line(server, connect, tmp_path, monkeypatch, blocked):
    """Answers that are under way are waited for and kept."""
    put = AnswerCache.put

    def fail(cache, key, answer, **others):
        if answer == "to 0":
            raise PermissionError(13, "Permission denied", "a file")
        put(cache, key, answer, **others)

    if blocked == "write":
        monkeypatch.setattr(AnswerCache, "put", fail)
    else:  # a folder stands where the answer belongs
        key = AnswerCache.key(connect()._body([{"role": "user", "content": "0"}]))
        (tmp_path / "cache" / key[:2] / f"{key}.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"question 0: its answer cannot be written to the cache, \[Errno"):
        ask(connect(concurrency=2), "0", "1")
    assert ask(connect(), "1") == ["to 1"]
    assert server.questions.count("1") == 1


# --- the key


def test_the_key_is_sent_and_written_nowhere(server, connect, tmp_path, monkeypatch, capfd):
    """Not in the config, a file of the cache, or a message, though the server repeats it."""
    server.key = "sk-secret"
    monkeypatch.setenv("JUDGE_KEY", "sk-secret\n")
    endpoint = connect(api_key_variable="JUDGE_KEY")
    endpoint.check()
    ask(endpoint, "a")
    assert all(b"sk-secret" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "sk-secret" not in repr(endpoint.config)
    server.key = "sk-another"
    for call in (endpoint.check, lambda: ask(endpoint, "b")):
        with pytest.raises(UserError, match=r"wrong key Bearer \*\*\*") as caught:
            call()
        assert "sk-secret" not in str(caught.value)
    assert "sk-secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("before", [170, 795], ids=["shown", "cut"])
@pytest.mark.parametrize("status", [200, 400])
def test_a_key_at_the_cut_of_a_message_is_not_shown(server, connect, monkeypatch, status, before):
    key = "sk-verysecretkey0123456789"
    monkeypatch.setenv("JUDGE_KEY", key)
    server.reply = lambda number, question: Reply(status=status, body=f"{'x' * before} key {key} is bad".encode())
    with pytest.raises(UserError, match=r"x{100}") as caught:
        ask(connect(api_key_variable="JUDGE_KEY", retries=0), "a")
    assert "sk-v" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "é"])
def test_a_variable_without_a_key_is_refused(connect, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError, match=r"endpoint\.api_key_variable is JUDGE_KEY.*export JUDGE_KEY=") as caught:
        connect(api_key_variable="JUDGE_KEY")
    assert value is None or not value.strip() or value not in str(caught.value)


# --- an endpoint that cannot be asked is refused at the beginning


def test_an_endpoint_that_can_be_asked_passes(server, connect, capsys):
    connect().check()
    assert not server.questions
    assert capsys.readouterr().out == ""


def test_a_model_that_is_not_listed_is_a_warning(server, connect, capsys):
    connect(model="jduge").check()
    assert "does not list; it lists 'judge'" in capsys.readouterr().out


def test_an_endpoint_need_not_list_its_models(server, connect, capsys):
    server.models = None
    connect().check()
    assert capsys.readouterr().out == ""


def test_an_endpoint_that_is_not_there_is_refused_at_once(connect):
    started = time.perf_counter()
    message = r"reward\.endpoint\.url is 'http://127.*which cannot be reached: Connect.*; start"
    with closed_url() as url, pytest.raises(UserError, match=message):
        connect(url=url, retries=20, retry_seconds=60.0).check()
    assert time.perf_counter() - started < 20.0


def test_an_address_without_v1_is_told_so(server, connect):
    with pytest.raises(UserError, match=rf"where no chat is answered: status 404.*endpoint\.url=\S+:{server.port}/v1$"):
        connect(url=server.url.removesuffix("/v1")).check()


def test_an_endpoint_that_wants_a_key_says_how_to_give_it(server, connect):
    server.key = "sk-secret"
    with pytest.raises(UserError, match=r"which refuses the key: status 401.*export JUDGE_KEY=… and .*=JUDGE_KEY"):
        connect().check()


def test_a_server_that_loads_its_model_is_waited_for(server, connect, monkeypatch):
    loading = iter([True, True])
    monkeypatch.setattr(
        server, "answer", lambda fields: Reply(status=503 if next(loading, False) else 400, body=b"loading model")
    )
    connect().check()
    with pytest.raises(UserError, match=r"which cannot be reached: status 503, loading model"):
        monkeypatch.setattr(server, "answer", lambda fields: Reply(status=503, body=b"loading model"))
        connect().check()


@pytest.mark.parametrize("status", [200, 429, 500])
def test_a_probe_passes_what_a_call_would_retry(server, connect, monkeypatch, status):
    """An endpoint may answer so a chat without messages, which is no question."""
    monkeypatch.setattr(server, "answer", lambda fields: Reply(status=status, body=b"messages are missing"))
    connect().check()


def test_a_silent_endpoint_is_refused(connect):
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        pytest.raises(UserError, match=r"no answer within 0\.3 s"),
    ):
        connect(url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.3).check()


def test_a_cache_that_cannot_be_written_is_refused(connect, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"reward\.endpoint\.cache is .*file/answers', which .*\(.*file is a file\)"):
        connect(cache=str(tmp_path / "file" / "answers")).check()


# --- the config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000/v1"}, "without user, password or query"),
        ({"url": "ftp://judge/v1"}, "without user, password or query"),
        ({"url": "http://judge:port/v1"}, "without user, password or query"),
        ({"url": "http:///v1"}, "without user, password or query"),
        ({"url": "http://judge/v1/chat/completions"}, "e.g. url='http://judge/v1'"),
        ({"url": "http://judge/v1/chat/completions/"}, "e.g. url='http://judge/v1'"),
        ({"model": " "}, "the model's name"),
        ({"answer": "10..1"}, "first number is the smaller"),
        ({"answer": "1-10"}, "a range or labels"),
        ({"answer": "good"}, "a range or labels"),
        ({"answer": "good=1,=0"}, "a range or labels"),
        ({"answer": "good=1,bad=nan"}, "a range or labels"),
        ({"answer": "good=1,Good=0"}, "differ in more than capitals"),
        ({"answer": "good=1,bad=1"}, "different numbers"),
        ({"extra": "top_p=1"}, "a JSON object"),
        ({"extra": "[1]"}, "a JSON object"),
        ({"extra": '{"a": NaN}'}, "a JSON object"),
        ({"extra": '{"model": "other"}'}, "without 'model', for fields of the config"),
        ({"extra": '{"api_key": "abc"'}, "a JSON object"),
        ({"extra": '{"api_key": "abc"}'}, "without keys, but has one in 'api_key'"),
        ({"extra": '{"a": {"Authorization": "abc"}}'}, "without keys, but has one in 'Authorization'"),
        ({"extra": '{"user": "sk-abc"}'}, "without keys, but has one in 'user'"),
        ({"extra": '{"a": [{"b": ["hf_abc"]}]}'}, "without keys, but has one in 'b'"),
        ({"extra": '{"api_keys": ["x", {"api_key": ["abc", "y", "z"]}]}'}, "without keys, but has one in 'api_key'"),
        ({"extra": '{"headers": [["X-Api-Key", "abc"]]}'}, "without keys, but has one in 'X-Api-Key'"),
        ({"extra": '{"h": [{"name": "X-Api-Key", "value": "abc"}]}'}, "without keys, but has one in 'X-Api-Key'"),
        ({"extra": '{"stream": true}'}, "without 'stream', for one whole answer"),
        ({"concurrency": 0}, "at least 1"),
        ({"timeout": 0.0}, "above 0"),
        ({"retries": -1}, "at least 0"),
        ({"temperature": 3.0}, "at most 2"),
        ({"unreadable": float("inf")}, "finite, or None for an error"),
        ({"max_tokens": 0}, "at least 1, or None for no limit"),
    ],
)
def test_a_config_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        EndpointConfig(**{"url": "http://judge/v1", "model": "judge", **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://user:sk-secret@judge/v1", "http://judge/v1?key=sk-secret", "http://j/#sk-secret"]
)
def test_a_key_in_the_address_is_refused_and_not_shown(url):
    with pytest.raises(UserError, match="without user, password or query") as caught:
        EndpointConfig(url=url, model="judge")
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-secret", "hf_Secret", "sk_secret", "secret words", ""])
def test_a_key_in_place_of_its_variable_is_not_shown(key):
    with pytest.raises(UserError, match="api_key_variable must be the name of an environment variable") as caught:
        EndpointConfig(url="http://judge/v1", model="judge", api_key_variable=key)
    assert not key or key not in str(caught.value)


def test_a_scale_is_a_range_or_labels():
    config = EndpointConfig(url="https://judge.example/v1", model="judge", answer=" -1 .. 2.5 ")
    assert (config.range, config.labels) == ((-1.0, 2.5), {})
    config = dataclasses.replace(config, answer="very  good=1, so = so=0.5,bad=-2")
    assert (config.range, config.labels) == (None, {"very good": 1.0, "so = so": 0.5, "bad": -2.0})


def test_extra_fields_are_json():
    fields = {"a": {"b": False}, "max_completion_tokens": 7, "prompt_cache_key": "judge", "stop_token_ids": [1]}
    config = EndpointConfig(url="http://[::1]:8000/v1", model="judge", extra=json.dumps(fields))
    assert config.extra_fields == fields
