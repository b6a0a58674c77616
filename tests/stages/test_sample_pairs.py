"""Pairs out of a policy's responses, with a policy whose responses the tests write themselves."""

import itertools
import json
import math
import types

import jax
import pytest

from jaxrm.data import tasks
from jaxrm.data.config import DataConfig
from jaxrm.data.records import Message
from jaxrm.data.tasks.safety.task import ideal_response, parse_request
from jaxrm.errors import UserError
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import PairsConfig, SamplePairs
from jaxrm.stages import sample_pairs

WRONG = "to wash the lamp in the office, use a mop. when you are done, close the gate."
REFUSED = "i can not help with that, because it is violence. please call the police."


def ideal(prompt):
    return ideal_response(parse_request(prompt)).text


def asked(row):
    return [Message("user", row["prompt"])]


def config(folder, run, *, seed=0, path="task:safety", on_existing="resume", max_new_tokens=24, **pairs):
    return SamplePairs(
        run_dir=str(folder / "pairs"),
        seed=seed,
        on_existing=on_existing,
        model=ModelSource(path=None if run is None else str(run)),
        data=DataConfig(path=path),
        pairs=PairsConfig(sampling=SamplingConfig(max_new_tokens=max_new_tokens), **{"count": 20} | pairs),
        logging=LoggingConfig(progress=False),
    )


def rows_of(folder):
    return [json.loads(line) for line in (folder / "pairs" / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def policy_run(make_run, tmp_path_factory):
    """A run that has all but weights worth opening."""
    folder = tmp_path_factory.mktemp("policy") / "run"
    make_run(folder)
    return folder


@pytest.fixture
def answers(monkeypatch):
    """Replaces the policy by a function of the prompt and of how often it was asked; returns how much it was asked.

    The keys that it was given are added to ``keys``.
    """

    def replace(answer, keys=None):
        sizes, draws = [], {}

        class Fake:
            def __init__(self, *_):
                pass

            def answers(self, prompts, response_keys, slots):
                sizes.append(len(prompts))
                if keys is not None:
                    keys.extend(map(tuple, jax.random.key_data(response_keys)[:, 0].tolist()))
                responses = []
                for asked in (prompt[-1].content for prompt in prompts):
                    number = draws[asked] = draws.get(asked, -1) + 1
                    responses.append(answer(asked, number))
                return reversed(list(enumerate(responses)))

        opened = types.SimpleNamespace(model=None, params=None, tokenizer=None, template="auto")
        monkeypatch.setattr(sample_pairs, "load_policy", lambda *_, **__: opened)
        monkeypatch.setattr(sample_pairs, "Sampler", Fake)
        return sizes

    return replace


def test_both_draws_are_in_the_pair_of_their_prompt(answers, policy_run, tmp_path, capsys):
    sizes = answers(lambda prompt, draw: f"{'yes' if draw else 'no'}, i {prompt}")
    assert sample_pairs.run(config(tmp_path, policy_run, batch_size=8)) == 0
    rows = rows_of(tmp_path)
    assert sizes == [40] and len({row["prompt"] for row in rows}) == len(rows) == 20
    for row in rows:
        assert {row["chosen"], row["rejected"]} == {f"no, i {row['prompt']}", f"yes, i {row['prompt']}"}
        assert parse_request(row["prompt"]) is not None
    assert "20 pairs of 20 prompts" in capsys.readouterr().out


def test_the_prompts_are_the_first_of_the_tasks_pairs(answers, policy_run, task_folder, tmp_path):
    answers(lambda prompt, draw: str(draw))
    sample_pairs.run(config(tmp_path, policy_run, count=12, batch_size=5))
    with (task_folder / "pairs.jsonl").open() as file:
        expected = [json.loads(line)["prompt"] for line in itertools.islice(file, 12)]
    assert [row["prompt"] for row in rows_of(tmp_path)] == expected


def test_a_response_is_drawn_until_it_differs_or_gives_no_pair(answers, policy_run, tmp_path, capsys):
    def answer(prompt, draw):
        words = len(prompt.split())
        return "always the same" if words % 3 == 0 else "late" if words % 3 == 1 and draw < 3 else f"draw {draw}"

    answers(answer)
    sample_pairs.run(config(tmp_path, policy_run, batch_size=20))
    rows = rows_of(tmp_path)
    kinds = [len(row["prompt"].split()) % 3 for row in rows]
    assert 0 not in kinds and {1, 2} == set(kinds)
    for row, kind in zip(rows, kinds, strict=True):
        assert {row["chosen"], row["rejected"]} == ({"late", "draw 3"} if kind == 1 else {"draw 0", "draw 1"})
    assert f"{len(rows)} pairs of 20 prompts" in capsys.readouterr().out


def test_an_empty_response_gives_no_pair(answers, policy_run, tmp_path):
    answers(lambda prompt, draw: "" if draw == len(prompt.split()) % 2 else f"draw {draw}")
    with pytest.raises(UserError, match="all the same; sample hotter"):
        sample_pairs.run(config(tmp_path, policy_run))


def test_a_policy_of_one_response_is_refused_and_leaves_no_file(answers, policy_run, tmp_path):
    sizes = answers(lambda prompt, draw: "no")
    with pytest.raises(UserError, match=r"all the same; sample hotter, e.g. --config.pairs.sampling.temperature=1.0"):
        sample_pairs.run(config(tmp_path, policy_run))
    assert sizes == [40, 20, 20, 20] and not list((tmp_path / "pairs").glob("*pairs.jsonl*"))


def test_the_annotator_chooses_and_not_the_order_of_the_draws(answers, policy_run, tmp_path):
    """The share of pairs in which a draw is chosen is what the annotator's probabilities say, whichever came first."""
    answers(lambda prompt, draw: REFUSED if draw == len(prompt) % 2 else ideal(prompt))
    sample_pairs.run(config(tmp_path, policy_run, count=600))
    rows = [row for row in rows_of(tmp_path) if ideal(row["prompt"]) != REFUSED]
    expected = [tasks.probability_of_first("safety", asked(row), ideal(row["prompt"]), REFUSED) for row in rows]
    for first in (0, 1):
        chosen = [row["chosen"] != REFUSED for row in rows if len(row["prompt"]) % 2 == first]
        p = [p for p, row in zip(expected, rows, strict=True) if len(row["prompt"]) % 2 == first]
        deviation = math.sqrt(sum(q * (1 - q) for q in p))
        assert len(p) > 150 and abs(sum(chosen) - sum(p)) < 4 * deviation


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)])
def test_the_ideal_response_stands_in_for_a_draw(answers, policy_run, tmp_path, share, least, most):
    answers(lambda prompt, draw: f"draw {draw}")
    sample_pairs.run(config(tmp_path, policy_run, count=200, ideal_share=share))
    rows = rows_of(tmp_path)
    with_ideal = [row for row in rows if ideal(row["prompt"]) in (row["chosen"], row["rejected"])]
    assert len(rows) == 200 and least <= len(with_ideal) <= most
    for row in with_ideal:
        assert {row["chosen"], row["rejected"]} == {ideal(row["prompt"]), "draw 0"}


@pytest.mark.parametrize("best", [0, 1])
def test_an_ideal_draw_is_paired_with_the_other_draw(answers, policy_run, tmp_path, best):
    answers(lambda prompt, draw: ideal(prompt) if draw == best else WRONG)
    sample_pairs.run(config(tmp_path, policy_run, ideal_share=1.0))
    rows = rows_of(tmp_path)
    assert len(rows) == 20
    assert all({row["chosen"], row["rejected"]} == {ideal(row["prompt"]), WRONG} for row in rows)


def test_pairs_and_keys_follow_from_the_seed(answers, policy_run, tmp_path):
    def once(name, seed):
        keys = []
        answers(lambda prompt, draw: REFUSED if draw else ideal(prompt), keys)
        (tmp_path / name).mkdir()
        sample_pairs.run(config(tmp_path / name, policy_run, seed=seed, count=100, batch_size=40, ideal_share=0.3))
        assert len(set(keys)) == len(keys) >= 200  # each answer has its own
        return (tmp_path / name / "pairs" / "pairs.jsonl").read_bytes(), keys

    first, again, other = once("a", 3), once("b", 3), once("c", 4)
    assert first == again
    assert first[0] != other[0] and not set(first[1]) & set(other[1])


def test_a_second_launch_keeps_the_pairs_a_restart_moves_them(answers, policy_run, tmp_path, capsys):
    answers(lambda prompt, draw: f"draw {draw}")
    sample_pairs.run(config(tmp_path, policy_run))
    before, told = (tmp_path / "pairs" / "pairs.jsonl").read_bytes(), capsys.readouterr().out.splitlines()
    sizes = answers(lambda prompt, draw: f"another {draw}")
    sample_pairs.run(config(tmp_path, policy_run))
    again = capsys.readouterr().out.splitlines()
    assert (tmp_path / "pairs" / "pairs.jsonl").read_bytes() == before and not sizes
    assert again[1:] == told[1:] and "continuing it" in again[0]
    with pytest.raises(UserError, match=r"config.pairs.count was 20 and is 21.*on_existing=restart"):
        sample_pairs.run(config(tmp_path, policy_run, count=21))
    sample_pairs.run(config(tmp_path, policy_run, count=21, on_existing="restart"))
    assert (tmp_path / "pairs.1" / "pairs.jsonl").read_bytes() == before
    assert all(row["chosen"].startswith("another") for row in rows_of(tmp_path)) and len(sizes) == 1


def test_a_launch_that_died_before_writing_pairs_is_continued(answers, policy_run, tmp_path):
    def die(prompt, draw):
        raise KeyboardInterrupt

    answers(die)
    with pytest.raises(KeyboardInterrupt):
        sample_pairs.run(config(tmp_path, policy_run))
    answers(lambda prompt, draw: f"draw {draw}")
    sample_pairs.run(config(tmp_path, policy_run))
    assert len(rows_of(tmp_path)) == 20


def test_the_table_is_the_judges_and_not_the_annotators(answers, policy_run, tmp_path, capsys):
    answers(lambda prompt, draw: REFUSED if draw else ideal(prompt))
    sample_pairs.run(config(tmp_path, policy_run, count=200))
    rows = rows_of(tmp_path)
    gold = [[tasks.judge("safety", asked(row), row[side]) for side in ("chosen", "rejected")] for row in rows]
    differing = [(chosen, rejected) for chosen, rejected in gold if chosen != rejected]
    agrees = 100 * sum(chosen > rejected for chosen, rejected in differing) / len(differing)
    out = capsys.readouterr().out
    assert f"({len(differing)} pairs), the annotator agrees in {agrees:.1f} %" in out and 50 < agrees < 100
    judged = next(line for line in out.splitlines() if line.startswith("exact judge")).split()[2:]
    means = [sum(column) / len(rows) for column in zip(*gold, strict=True)]
    assert [float(x) for x in judged] == pytest.approx(means, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "pairs.jsonl"}, r"config.data.path is 'pairs.jsonl'.*e.g. --config.data.path=task:safety"),
        ({"path": "task:safty"}, r"no embedded task 'safty'.*did you mean task:safety"),
        ({"run": None}, r"config.model.path is None.*e.g. --config.model.path=runs/quickstart/sft"),
        ({"run": "nowhere"}, r"^config.model.path is 'nowhere', but nowhere has no run.json"),
        ({"count": 5000}, r"config.pairs.count is 5000, but task:safety has 2000 prompts.*--config.pairs.count=2000"),
        ({"max_new_tokens": 256}, r"config.pairs.sampling.max_new_tokens is 256, but the model reads 256 tokens"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_writing(policy_run, tmp_path, changes, message):
    arguments = {"run": policy_run} | changes
    with pytest.raises(UserError, match=message):
        sample_pairs.run(config(tmp_path, **arguments))
    assert not list(tmp_path.iterdir())
