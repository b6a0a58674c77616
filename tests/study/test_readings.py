"""How a study is read: policies by protocol, win rates, tables and the page, from results that are made up."""

import math
import re

import numpy as np
import pytest

from jaxrm.errors import UserError
from jaxrm.evaluation.many_comparisons import adjusted
from jaxrm.evaluation.win_rate import win_rate
from jaxrm.study import report
from jaxrm.study.config import BEST
from jaxrm.study.curves import frontier
from jaxrm.study.mechanism import over_credit_tables
from jaxrm.study.readings import blind_choice, read
from jaxrm.study.results import Answers, Policy, PolicyKey, Results
from jaxrm.study.win_rates import select, win_rates

SETTINGS = ("kl_coef=0.02,lr=0.001", "kl_coef=0.1,lr=0.001", "kl_coef=0.5,lr=0.001")
PUBLISHED = SETTINGS[0]


def policy(seed, setting, *, arm="ppo_scalar", world="safety", judge=0.5, kl=1.0, reward=0.0, marks=(0.5,), curve=()):
    """A policy whose answers have these marks, to prompts of its seed."""
    count = len(marks)
    prompts = np.arange(count) + 1000 * seed
    behavior = {"refusals": np.linspace(0, 1, count), "refusal_on_benign": np.full(count, math.nan)}
    answers = Answers(prompts, np.array(marks, float), np.full(count, 12.0), np.full(count, kl), behavior)
    both = {(split, decoding): answers for split in ("test", "test_ood") for decoding in ("sampled", "greedy")}
    selection = {"judge": judge, "kl": kl, "reward": reward, "length": 12.0}
    return Policy(PolicyKey(world, arm, seed, setting), selection, both, curve)


def results_of(policies, **more):
    arms = {one.key.arm for one in policies}
    complete = frozenset((one.key.world, one.key.arm, one.key.seed) for one in policies)
    published = {arm: PUBLISHED if arm.startswith("ppo") else "plain" for arm in arms}
    return Results({one.key: one for one in policies}, **{"complete": complete, "published": published, **more})


def grid(seed, **more):
    """Three settings: the published one has the highest reward and goes too far, the second is the best."""
    return [
        policy(seed, SETTINGS[0], judge=0.2, kl=9.0, reward=3.0, **more),
        policy(seed, SETTINGS[1], judge=0.8, kl=2.0, reward=1.0, **more),
        policy(seed, SETTINGS[2], judge=0.6, kl=0.5, reward=2.0, **more),
        policy(seed, BEST, judge=0.9, kl=1.0, reward=0.5, **more),
    ]


@pytest.mark.parametrize(
    ("protocol", "chosen"),
    [
        ("published", [SETTINGS[0]]),
        ("blind", [SETTINGS[2]]),
        ("oracle", [SETTINGS[1]]),
        ("best checkpoint", [BEST]),
        ("mean", list(SETTINGS)),
        ("worst", [SETTINGS[0]]),
    ],
)
def test_each_protocol_reads_the_same_runs(protocol, chosen):
    results = results_of(grid(1))
    assert [one.key.setting for one in read(results, protocol, "safety", "ppo_scalar")[1]] == chosen


def test_nothing_is_chosen_before_the_grid_is_there():
    """The published setting needs no grid."""
    results = results_of(grid(1), complete=frozenset())
    assert read(results, "oracle", "safety", "ppo_scalar") == {}
    assert read(results, "published", "safety", "ppo_scalar").keys() == {1}


def test_blind_takes_the_least_kl_where_all_go_too_far():
    assert blind_choice(grid(1)[:3], 0.1).key.setting == SETTINGS[2]
    assert blind_choice(grid(1)[:3], math.inf).key.setting == SETTINGS[0]


def test_win_rates_of_a_mean_are_those_of_all_pairs():
    """By hand: the arm's two settings win 1 and 0 of the opponent's first, and tie with and lose to its second."""
    arm = [policy(1, name, arm="ppo_soft", marks=(mark,)) for name, mark in zip(SETTINGS, (0.9, 0.2), strict=False)]
    other = [policy(1, name, marks=(mark,)) for name, mark in zip(SETTINGS, (0.3, 0.9), strict=False)]
    rates = win_rates(results_of([*arm, *other]))
    (mean,) = select(rates, protocol="mean", split="test", decoding="sampled", arm="ppo_soft", opponent="ppo_scalar")
    assert mean.rate.rate == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    (alone,) = select(rates, protocol="published", split="test", decoding="sampled", arm="ppo_soft")
    assert alone.rate.rate == 1.0 and "too few" in alone.rate.note


def test_policies_that_were_asked_different_prompts_are_refused():
    other = policy(1, PUBLISHED, arm="ppo_soft", marks=(0.5, 0.5))
    with pytest.raises(UserError, match="safety, seed 1: ppo_soft and ppo_scalar were asked different prompts"):
        win_rates(results_of([policy(1, PUBLISHED), other]))


def test_many_comparisons_by_hand():
    """Holm and Bonferroni of three rates; one without an interval is not counted."""
    rates = [win_rate([[x] for x in row]) for row in ([0.9, 0.92, 0.94], [0.6, 0.5, 0.7], [0.5, 0.5, 0.8], [1.0])]
    single = [adjusted([rate])[0].p for rate in rates]
    several = adjusted(rates)
    assert several[0].p == pytest.approx(3 * single[0]) and several[1].p == pytest.approx(2 * single[1])
    assert several[2].p == pytest.approx(max(2 * single[1], single[2])) and several[3].p is None
    assert [one.comparisons for one in several] == [3, 3, 3, 3]
    t = 3**0.5 * (0.92 - 0.5) / 0.02  # Student's t with 2 degrees of freedom, in closed form
    assert single[0] == pytest.approx(1 - t / (t**2 + 2) ** 0.5)
    assert several[0].is_sure and not several[1].is_sure
    assert several[1].low < rates[1].low and several[1].high > rates[1].high


def test_the_frontier_is_the_best_within_a_kl():
    rows = [{"step": n, "kl": kl, "judge": mark} for n, (kl, mark) in enumerate([(0.0, 0.5), (1.0, 0.8), (3.0, 0.4)])]
    results = results_of([policy(1, SETTINGS[0], curve=rows), policy(1, SETTINGS[1], curve=rows[:1])])
    assert frontier(results, "safety", "ppo_scalar", [0.0, 1.5, 5.0]) == [0.5, 0.8, 0.8]


def row(judge, refuses, scalar, literal):
    sources = {"scalar": {"weight": 1.0, "reward": scalar}, "literal": {"weight": 1.0, "reward": literal}}
    return {"judge": judge, "behaviour": {"refusal_on_benign": refuses}, "sources": sources}


def test_over_credit_is_what_the_judge_does_not_pay():
    """By hand: of answers with a spread of 1 each, scalar pays 2 more for a refusal, where the judge pays 2 less."""
    rows = [row(0.0, 1.0, 2.0, 0.0), row(2.0, 0.0, 0.0, 2.0)]
    answered = {name: {1: rows} for name in ("sft", "ppo_scalar", "ppo_literal")}
    paid, moved = over_credit_tables(answered, "refusal_on_benign")
    assert [str(cell) for cell in paid.rows[0]] == ["sft", "0.500", "+2.00", "−2.00", "−2.00", "+4.00", "+0.00"]
    assert [str(cell) for cell in moved.rows[1]][1:4] == ["+0.000"] * 3


def made_up(seeds=4, worlds=("safety", "summarize")):
    """Two arms that rewards train and two others, over seeds and worlds."""
    rng = np.random.default_rng(0)
    policies = []
    for world in worlds:
        for seed in range(seeds):
            for arm, skill in {"sft": 0.4, "sft_chosen": 0.5, "ppo_scalar": 0.5, "ppo_literal": 0.8}.items():
                for setting in SETTINGS if arm.startswith("ppo") else ("plain",):
                    curve = [
                        {"step": n, "kl": 0.1 * n, "judge": skill, "reward": 0.1 * n, "length": 12.0, "behaviour": {}}
                        for n in range(3)
                    ]
                    marks = rng.normal(skill, 0.1, 20)
                    curve = curve if arm.startswith("ppo") else ()
                    policies.append(policy(seed, setting, arm=arm, world=world, judge=skill, marks=marks, curve=curve))
    return results_of(policies, missing={("dialogue", "dpo"): [7]})


def test_a_study_is_told_in_tables_that_fit_the_console(tmp_path, capsys):
    results = made_up()
    report.write_tables(results, win_rates(results), tmp_path, [("Folder", "</script><img src=x>")])
    out, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert max(map(len, out.splitlines())) <= report.CONSOLE_WIDTH
    for title in (
        "all worlds: win rate against ppo_scalar, in distribution, sampled",
        "safety: the judge's mark by protocol, in distribution, sampled",
        "summarize: what the policies do, published, in distribution, sampled",
        "Along training, published",
        "Not there yet",
    ):
        assert title in out
    assert "dialogue, dpo" in out
    for title in ("where every setting ends", "the best within a KL", "Chosen blind", "adjusted", "at an equal KL of"):
        assert title in page
    assert "<img" not in page and re.search(r"\d \[\d+, \d+\] \*", page)
    assert {path.stem for path in (tmp_path / "results").iterdir()} == {
        "policies", "curves", "choices", "agreement", "win_rates",
    }  # fmt: skip


def test_two_seeds_are_told_and_have_no_interval(tmp_path, capsys):
    results = made_up(seeds=2, worlds=("safety",))
    report.write_tables(results, win_rates(results), tmp_path, [])
    out = capsys.readouterr().out
    assert "No interval: 2 seeds: too few for an interval." in " ".join(out.split()) and "±" not in out
