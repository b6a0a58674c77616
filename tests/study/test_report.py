"""The report of a study, made from a folder as a study leaves it."""

import json
import re

import numpy as np
import pytest

from jaxrm.errors import UserError
from jaxrm.evaluation.over_optimization import TrainingCurve, at_kl, mean_curve, reach
from jaxrm.runtime.metrics import read_rows
from jaxrm.study import report
from jaxrm.study.results import AnswerKey, in_order, read_results
from jaxrm.study.win_rates import win_rates

SKILL = {
    "sft": 0.55,
    "sft_chosen": 0.6,
    "best_of_n_scalar": 0.62,
    "best_of_n_seq2seq": 0.66,
    "rft_scalar": 0.61,
    "rft_seq2seq": 0.64,
    "dpo": 0.65,
    "ppo_scalar": 0.66,
    "ppo_scalar_length_residual": 0.68,
    "ppo_literal": 0.71,
    "ppo_signed": 0.66,
    "ppo_soft": 0.75,
    "ppo_margin": 0.69,
    "ppo_my_own_kind": 0.7,
}
KEYS = {
    "safety": ("refusals", "refusal_on_benign", "refusal_on_dual_use", "unsafe_on_harmful", "malformed"),
    "summarize": ("items", "excess_items", "coverage"),
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answer(index, *, prompt=None, judge=0.5, split="test", decoding="sampled", behaviour=None, **more):
    row = {
        "split": split,
        "decoding": decoding,
        "index": index,
        "prompt": prompt or f"prompt {index}",
        "response": "yes .",
    }
    return row | {"judge": judge, "length": 12, "kl": 0.5, "behaviour": behaviour or {}, "reward": 0.1, **more}


def write_study(folder, *, arms=SKILL, worlds=("safety", "summarize"), seeds=4, prompts=30, hostile=""):
    """A study with answers, curves, settings and agreement, of drawn numbers."""
    rng = np.random.default_rng(0)
    curves, selection, agreement = [], [], []
    for world in worlds:
        for arm in arms:
            for seed in range(seeds):
                skill, rows = SKILL.get(arm, 0.6) + rng.normal(0, 0.02), []
                for split in ("test", "test_ood"):
                    for decoding in ("sampled", "greedy"):
                        for index in range(prompts):
                            mark = round(4 * np.clip(rng.normal(skill - 0.1 * (split != "test"), 0.25), 0, 1)) / 4
                            behaviour = {key: float(rng.random() < 0.2) for key in KEYS[world][: 5 - index % 2]}
                            tokens = ["how", " you", " wash", " it", " ."]
                            prompt = f"how do i wash {split} {index} ?{hostile}"
                            row = answer(index, prompt=prompt, judge=mark, split=split, decoding=decoding)
                            row["behaviour"] = behaviour
                            row["response"] = "how you wash it ." + hostile
                            row["kl"] = float(rng.normal(0.5, 0.3)) if decoding == "sampled" else None
                            if index < 4 and arm.startswith("ppo"):
                                row |= {"tokens": tokens, "rewards": rng.normal(0, 0.3, 5).round(3).tolist()}
                            rows.append(row)
                write(folder / "results" / world / arm / f"seed{seed}.jsonl", rows)
                if not arm.startswith("ppo"):
                    continue
                speed = 0.3 + 0.2 * list(arms).index(arm)
                for step in range(0, 101, 10):
                    kl = speed * step / 100 + abs(rng.normal(0, 0.03)) * (step > 0)
                    behaviour = {key: 0.2 + 0.05 * kl + rng.normal(0, 0.01) for key in KEYS[world]}
                    mark = 0.55 + (skill - 0.5) * kl - 0.05 * kl**2
                    curves.append({"world": world, "arm": arm, "seed": seed, "beta": 0.1, "lr": 1e-3, "step": step})
                    curves[-1] |= {
                        "kl": kl,
                        "judge": mark,
                        "reward": kl**0.5,
                        "length": 15 + kl,
                        "behaviour": behaviour,
                    }
            if arm.startswith("ppo"):
                for beta in (0.05, 0.1, 0.2):
                    selection.append({"world": world, "arm": arm, "seed": 0, "settings": {"beta": beta, "lr": 1e-3}})
                    selection[-1] |= {"score": 0.6, "kl": 1.0, "chosen": beta == 0.1, "at_edge": arm == "ppo_soft"}
        for rm, kind in (("scalar", "scalar"), ("seq2seq", "literal"), ("seq2seq", "soft")):
            for seed in range(seeds):
                found = {"sum": rng.normal(0.7, 0.02), "mean": rng.normal(0.65, 0.02), "pairs": 400}
                found["judge"] = rng.normal(0.8, 0.02)
                agreement.append({"world": world, "rm": rm, "seed": seed, "kind": kind, **found})
    for name, rows in (("curves", curves), ("selection", selection), ("agreement", agreement)):
        write(folder / "results" / f"{name}.jsonl", rows)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "lab"
    write_study(folder)
    return folder


def closed(folder, capsys, **more):
    report.publish(folder, about=[("Folder", "lab")], **more)
    return capsys.readouterr().out, read_rows(folder / "win_rates.jsonl"), (folder / "report.html").read_text()


# --- over-optimisation


def test_a_value_at_a_kl_is_interpolated_at_its_first_crossing():
    kl, values = [0.0, 1.0, 0.5, 3.0], [10.0, 20.0, 0.0, 50.0]
    assert at_kl(kl, values, 0.0) == 10.0
    assert at_kl(kl, values, 0.75) == 17.5  # not on the way back, nor the second time
    assert at_kl(kl, values, 2.0) == pytest.approx(30.0)  # 0 + 50 · 1.5 / 2.5
    assert at_kl(kl, values, 3.5) is None
    assert at_kl([1.0, 2.0], [1.0, 2.0], 0.5) is None
    assert at_kl([0.0, np.nan, 2.0], [1.0, 7.0, 3.0], 1.0) == 2.0


def test_what_every_run_reaches_is_the_least_of_their_largest():
    assert reach([[0, 2, 1], [0, 3], [0, 1.5, np.nan]]) == 1.5
    assert reach([]) == 0.0


def test_a_mean_path_has_the_steps_of_all_runs():
    found = mean_curve([TrainingCurve([0, 5, 10], [0, 1, 2], [1, 2, 3]), TrainingCurve([0, 10], [0, 4], [3, np.nan])])
    assert found == ([0, 10], [0, 3], [2, 3])


# --- reading


def test_arms_have_their_order_and_others_come_last():
    arms = ["zeta", "ppo_soft", "ppo_scalar", "alpha", "sft", "rft_scalar", "dpo", "best_of_n_seq2seq", "sft_chosen"]
    assert in_order(arms) == [
        "sft", "sft_chosen", "best_of_n_seq2seq", "rft_scalar", "dpo", "ppo_scalar", "ppo_soft", "alpha", "zeta",
    ]  # fmt: skip


def test_answers_are_compared_at_the_prompts_that_both_have(tmp_path):
    write(tmp_path / "results/w/a/seed0.jsonl", [answer(3, judge=0.9), answer(1, judge=0.1), answer(2, judge=0.5)])
    write(tmp_path / "results/w/sft/seed0.jsonl", [answer(1, judge=0.2), answer(3, judge=0.3), answer(7, judge=0.4)])
    write(tmp_path / "results/w/sft/seed1.jsonl", [answer(1)])
    ((a, b),) = read_results(tmp_path).pairs(AnswerKey("w", "a", "test", "sampled"), "sft")
    assert (a.index.tolist(), a.judge.tolist(), b.judge.tolist()) == ([1, 3], [0.1, 0.9], [0.2, 0.3])


def test_arms_that_were_asked_different_prompts_are_refused(tmp_path, capsys):
    write(tmp_path / "results/w/a/seed0.jsonl", [answer(1, prompt="one")])
    write(tmp_path / "results/w/sft/seed0.jsonl", [answer(1, prompt="another")])
    with pytest.raises(UserError, match="w, seed 0: a and sft were asked different prompts"):
        closed(tmp_path, capsys)


def test_a_row_that_is_no_answer_is_named(tmp_path, capsys):
    write(tmp_path / "results/w/a/seed0.jsonl", [answer(1), {"split": "test"}])
    with pytest.raises(UserError, match=r"seed0\.jsonl:2 is no answer: KeyError 'judge'"):
        closed(tmp_path, capsys)
    assert not (tmp_path / "report.html").exists()


# --- the whole


def test_win_rates_by_hand(tmp_path, capsys):
    for arm, marks in {"sft": [[0.5, 0.5]] * 3, "dpo": [[1.0, 0.5], [1.0, 0.0], [1.0, 1.0]]}.items():
        for seed, row in enumerate(marks):
            write(tmp_path / f"results/w/{arm}/seed{seed}.jsonl", [answer(n, judge=x) for n, x in enumerate(row)])
    _, rows, _ = closed(tmp_path, capsys)
    (row,) = rows
    assert {name: row[name] for name in ("world", "arm", "opponent", "rate", "seeds", "prompts", "note")} == {
        "world": "w", "arm": "dpo", "opponent": "sft", "rate": 0.75, "seeds": 3, "prompts": 2, "note": "",
    }  # fmt: skip
    assert row["low"] < 0.5 and row["high"] == 1.0


def test_a_study_is_told_in_tables_that_fit_the_console(study, capsys):
    out, rows, page = closed(study, capsys)
    assert max(map(len, out.splitlines()[:-1])) <= report.CONSOLE_WIDTH
    for title in (
        "all worlds: win rate against …, in distribution, sampled",
        "safety: win rate against …, out of distribution, sampled",
        "safety: what the arms do, in distribution, sampled (1 of",
        "summarize: at an equal KL of",
        "Along training",
        "Reward models: pairs ranked right",
        "Settings chosen for each arm",
    ):
        assert title in out
    assert "Not there yet" not in out
    assert out.rstrip().endswith(f"the report is {study / 'report.html'}")
    found = {tuple(row[name] for name in ("world", "split", "decoding", "arm", "opponent")): row for row in rows}
    assert len(found) == len(rows) == 3 * 2 * 2 * (14 * 4 - 4)
    soft = found["all worlds", "test", "sampled", "ppo_soft", "sft"]
    assert 0.5 < soft["low"] < soft["rate"] < soft["high"] <= 1
    assert "not reached" in out  # at the larger of both KLs
    assert page.index("Results") < page.index("Curves") < page.index("Examples")
    assert "ppo_my_own_kind" in page and "p2 strong" in page


def test_two_seeds_are_told_and_have_no_interval(tmp_path, capsys):
    write_study(tmp_path, seeds=2, prompts=4, arms=("sft", "ppo_scalar"), worlds=("safety",))
    out, rows, page = closed(tmp_path, capsys)
    assert {row["note"] for row in rows} == {"2 seeds: too few for an interval"}
    assert {row["low"] for row in rows} == {None}
    assert "No interval: 2 seeds: too few for an interval." in " ".join(out.split())
    assert not re.search(r"±\d", out + page)  # an interval; the page's script writes a bare ± of its colors


def test_an_unfinished_study_says_what_is_missing(tmp_path, capsys):
    out, rows, _ = closed(tmp_path, capsys)
    assert "no results" in out and rows == []
    write_study(tmp_path, seeds=3, prompts=4, arms=("sft", "ppo_soft"))
    (tmp_path / "results/safety/ppo_soft/seed1.jsonl").unlink()
    (tmp_path / "results/curves.jsonl").unlink()
    out, _, _ = closed(tmp_path, capsys)
    line = next(line for line in out[out.index("Not there yet") :].splitlines() if line.startswith("safety"))
    assert line.split() == ["safety", "ppo_soft", "1", "2"]
    out, _, _ = closed(tmp_path, capsys, expected=[("dialogue", "dpo", 7)])
    assert "dialogue  dpo" in out


def test_text_of_the_data_is_inert(tmp_path, capsys):
    write_study(tmp_path, seeds=1, prompts=2, arms=("sft", "ppo_soft"), hostile="</script><img src=x onerror=alert(1)>")
    _, _, page = closed(tmp_path, capsys)
    assert "<img" not in page and page.count("</script>") == 2


def test_what_seeds_share_in_their_prompts_widens_the_interval(tmp_path):
    for folder, own in (("shared", ""), ("nested", " {seed}")):
        for seed in range(4):
            prompts = [f"prompt {n}{own.format(seed=seed)}" for n in range(6)]
            marks = [0.9, 0.9, 0.1, 0.1, 0.9, 0.9 if seed else 0.1]
            rows = [answer(n, prompt=prompt, judge=marks[n]) for n, prompt in enumerate(prompts)]
            write(tmp_path / folder / f"results/w/dpo/seed{seed}.jsonl", rows)
            rows = [answer(n, prompt=prompt, judge=0.5) for n, prompt in enumerate(prompts)]
            write(tmp_path / folder / f"results/w/sft/seed{seed}.jsonl", rows)
    shared, nested = (win_rates(read_results(tmp_path / name))[0].rate for name in ("shared", "nested"))
    assert (shared.rate, nested.rate) == pytest.approx((0.625, 0.625))
    assert shared.high - shared.low > 1.5 * (nested.high - nested.low)
