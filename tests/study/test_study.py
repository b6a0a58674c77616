"""The study: which runs there are, how settings are chosen, and a small one from end to end."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config.files import load_config_file
from jaxrm.errors import UserError
from jaxrm.runtime import run_lock
from jaxrm.runtime.metrics import read_rows
from jaxrm.stage_config import PPO, BestOfN, Evaluate, read_stage
from jaxrm.stages.evaluate import run as evaluate
from jaxrm.study import run as study_run
from jaxrm.study.config import Study
from jaxrm.study.schedule import answers_name, schedule
from jaxrm.study.tuning import choose, setting_name

ROOT = Path(__file__).resolve().parents[2]
GRID = (("beta", (0.1, 0.2)), ("lr", (1.0, 10.0)))


def at(beta, lr):
    return (("beta", beta), ("lr", lr))


def search(score, extensions=2):
    """Choose as a study does, with a function in place of runs; returns the choice and how many were tried."""
    scores = {}
    while True:
        found = choose(GRID, scores, extensions=extensions)
        if found.chosen is not None:
            return found, len(scores)
        assert found.wanted and not set(found.wanted) & set(scores)
        scores |= {setting: score(**dict(setting)) for setting in found.wanted}


def test_the_whole_grid_is_tried_first():
    found = choose(GRID, {}, extensions=2)
    assert set(found.wanted) == {at(beta, lr) for beta in (0.1, 0.2) for lr in (1.0, 10.0)} and found.chosen is None


def test_a_best_setting_inside_what_was_tried_is_chosen():
    found, tried = search(lambda beta, lr: -abs(math.log(beta / 0.1)) - abs(math.log(lr / 10.0)))
    assert found.chosen == at(0.1, 10.0) and not found.at_edge
    assert tried == 6  # the grid, and one beyond it on each side of the best


def test_an_axis_grows_while_its_end_is_best_and_then_says_so():
    found, _ = search(lambda beta, lr: beta - abs(math.log(lr)), extensions=2)
    assert found.chosen == at(0.8, 1.0)  # 0.2, 0.4, 0.8: two beyond the grid
    assert found.at_edge
    flat = dict.fromkeys(choose(GRID, {}, extensions=0).wanted, 0.0)
    assert choose(GRID, flat, extensions=0).at_edge


def test_a_failed_setting_is_not_chosen_over_a_bad_one():
    scores = dict.fromkeys(choose(GRID, {}, extensions=0).wanted, math.nan) | {at(0.2, 1.0): -5.0}
    assert choose(GRID, scores, extensions=0).chosen == at(0.2, 1.0)


def test_of_nearly_equal_scores_the_mildest_setting_is_chosen():
    named = (("ppo.kl_coef", (0.1, 0.2)), ("optimizer.lr", (1.0, 10.0)))
    scores = {
        tuple(zip(("ppo.kl_coef", "optimizer.lr"), (b, r), strict=True)): 0.5 for b in (0.1, 0.2) for r in (1, 10)
    }
    scores[("ppo.kl_coef", 0.1), ("optimizer.lr", 10)] = 0.508
    assert choose(named, scores, extensions=0).chosen == (("ppo.kl_coef", 0.1), ("optimizer.lr", 10))
    assert choose(named, scores, extensions=0, tolerance=0.01).chosen == (("ppo.kl_coef", 0.2), ("optimizer.lr", 1))


def test_where_every_setting_fails_none_is_chosen():
    found = choose(GRID, dict.fromkeys(choose(GRID, {}, extensions=0).wanted, math.nan), extensions=2)
    assert found.chosen is None and not found.wanted


def the_study(**changes):
    loaded, _ = load_config_file(str(ROOT / "configs/study.py"), Study)
    return dataclasses.replace(loaded, **changes)


def test_an_arm_of_dpo_rewards_brings_its_source():
    """A run of DPO for each seed that needs it, before PPO; RTO adds it to the scalar reward, and so do its answers."""
    study = the_study(worlds=("safety",), arms=("ppo_dpo", "ppo_rto", "ppo_value_difference"), seeds=(1,))
    assert not set(study.arms) & set(Study().arms)
    runs, _ = schedule(study, {})
    scores = {run.name: 0.5 for run in runs if "/select/" in run.name}
    for _ in range(4):
        runs, _ = schedule(study, scores)
        scores |= {run.name: 0.5 for run in runs if "/select/" in run.name}
    by_name = {run.name: run for run in runs}
    source = by_name["safety/seed1/rm_dpo"].experiment
    assert source.algorithm == "dpo" and source.model.path.endswith("safety/seed1/sft")
    for arm in ("ppo_dpo", "ppo_rto"):
        for run in (run for name, run in by_name.items() if name.startswith("safety/seed1/") and arm in name):
            assert "safety/seed1/rm_dpo" in run.needs, run.name
            rewards = run.experiment.rewards or {"dpo": run.experiment.reward}
            assert {name: source.kind for name, source in rewards.items()} == (
                {"scalar": "scalar", "dpo": "dpo"} if arm == "ppo_rto" else {"dpo": "dpo"}
            )
            assert rewards["dpo"].model == source.run_dir
            assert rewards["dpo"].weight == (0.2 if arm == "ppo_rto" else 1)
    (ppo,) = (run for name, run in by_name.items() if name.startswith("safety/seed1/ppo_value_difference/"))
    assert ppo.experiment.reward.model.endswith("safety/seed1/rm_scalar")


@pytest.mark.parametrize(("stage", "template"), [("ppo", PPO), ("best_of_n", BestOfN), ("evaluate", Evaluate)])
def test_sources_that_arms_would_replace_are_refused(stage, template):
    sources = {"brief": RewardConfig(kind="scalar", function="my:brief")}
    with pytest.raises(
        UserError, match=rf"^Study\.{stage}\.rewards has brief, but arms say .*{stage}\.rewards\.brief=N"
    ):
        Study(**{stage: template(rewards=sources)})


def test_every_run_comes_after_what_it_needs():
    """Settings come before the final runs."""
    study = the_study(worlds=("safety",), arms=("sft", "dpo", "ppo_scalar", "ppo_soft", "rft_seq2seq"))
    runs, choices = schedule(study, {})
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for number, run in enumerate(runs):
        assert set(run.needs) <= set(names[:number]), run.name
    assert choices["safety", "ppo_soft"].chosen is None
    assert not any("/answers/ppo" in run.name for run in runs)
    scores = {name: 0.5 for name in names if "/select/" in name}
    for _ in range(4):
        runs, choices = schedule(study, scores)
        scores |= {run.name: 0.5 for run in runs if "/select/" in run.name}
    final = [run for run in runs if "/answers/" in run.name]
    for arm in study.arms:
        setting = setting_name(choices["safety", arm].chosen)
        names = {answers_name("safety", seed, arm, choices["safety", arm].chosen) for seed in study.seeds}
        assert names <= {run.name for run in final} and all(name.endswith(setting) for name in names)
    assert all(run.experiment.seed in study.seeds for run in final)
    assert all(str(study.selection_seeds[0]) in run.name for run in runs if "/select/" in run.name)


def test_all_arms_of_ppo_differ_in_the_reward_alone():
    study = the_study(worlds=("safety",), arms=("ppo_scalar", "ppo_soft", "ppo_my_kinds:doubt"))
    runs, _ = schedule(study, {})
    by_arm = {}
    for run in runs:
        match = re.search(r"select/(ppo_[^/]+)/(.*)$", run.name)
        if match:
            same = dataclasses.replace(run.experiment, reward=study.ppo.reward, run_dir="")
            by_arm.setdefault(match[1], {})[match[2]] = same
            assert run.experiment.critic.path.endswith("rm_scalar")
    assert by_arm["ppo_scalar"] == by_arm["ppo_soft"] == by_arm["ppo_my_kinds-doubt"]
    assert len(by_arm["ppo_scalar"]) == len(study.kl_coefs) * len(study.learning_rates)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("arms", ("ppo_sclar",), ("Study.arms has 'ppo_sclar'", "ppo_scalar", "did you mean ppo_scalar")),
        ("worlds", ("safty",), ("Study.worlds has 'safty'", "summarize", "did you mean safety")),
        ("arms", (), ("Study.arms", "at least one")),
        ("seeds", (1, 1), ("Study.seeds", "each once")),
        ("seeds", (1001, 2), ("Study.seeds", "1001", "not chosen with")),
        ("kl_coefs", (0.2, 0.1), ("Study.kl_coefs", "ascending")),
        ("workers", 0, ("Study.workers is 0", "at least 1")),
    ],
)
def test_what_cannot_be_studied_is_refused_by_name(field, value, words):
    with pytest.raises(UserError) as error:
        the_study(**{field: value})
    assert all(word in str(error.value) for word in words), error.value


def launch(*arguments, **environment):
    command = [sys.executable, "-m", "jaxrm.train", f"--config={ROOT / 'configs/study.py'}", *arguments]
    quick = "--xla_backend_optimization_level=0"  # a study compiles much and computes little here
    env = {**os.environ, "XLA_FLAGS": quick, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=600)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Runs a study whose queue ends as it is told; the message it prints."""
    monkeypatch.setattr(study_run, "_publish", lambda *_: None)

    def run(status=0, **fields):
        monkeypatch.setattr(study_run, "_run_queue", lambda *_: status)
        return study_run.run_study(Study(run_dir=str(tmp_path / "study"), **fields))

    return run


def test_a_study_in_use_is_refused_even_by_a_restart(queue, tmp_path, monkeypatch):
    queue(75)
    run_lock.take(tmp_path / "study", "study")
    monkeypatch.setattr(run_lock, "_mine", {})  # as another process sees it
    for on_existing in ("resume", "restart"):
        with pytest.raises(UserError, match=r"^config\.run_dir is .*, which is in use by process "):
            queue(on_existing=on_existing)
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_a_stopped_restart_of_a_study_is_continued(queue, tmp_path):
    queue()
    for count, status in ((2, 75), (2, 75), (2, 0), (3, 0)):
        assert queue(status, on_existing="restart") == status
        assert len(list(tmp_path.iterdir())) == count
        assert not (tmp_path / "study/.lock").exists()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A study of one seed, with an arm whose kind of reward is the user's own, and one that cannot be imported."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "my_kinds.py").write_text(
        "from jaxrm.ops.reward_kinds import reward_kind\n\n\n@reward_kind(is_centered=False)\n"
        "def doubt(statistics, responses, mask):\n    return statistics.log_probs - statistics.max_log_prob\n"
    )
    arguments = [
        f"--config.run_dir={folder / 'run'}",
        "--config.preset=smoke",
        "--config.seeds=1",
        "--config.arms=sft,sft_chosen,ppo_my_kinds:doubt,ppo_no_such:kind",
    ]
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return folder / "run", arguments, environment, launch(*arguments, **environment)


@pytest.mark.slow
def test_a_small_study_runs_to_its_report(smoke):
    folder, _, _, done = smoke
    assert done.returncode == 1, done.stderr[-2000:]  # one arm failed, and the exit status says so
    assert "Traceback" not in done.stderr
    for arm in ("sft", "ppo_my_kinds-doubt"):
        rows = read_rows(folder / "results/safety" / arm / "seed1.jsonl")
        assert len(rows) == 2 * 2 * 64
        assert {(row["split"], row["decoding"]) for row in rows} == {
            (split, decoding) for split in ("test", "test_ood") for decoding in ("sampled", "greedy")
        }
        assert all(0 <= row["judge"] <= 1 for row in rows)
    own = read_rows(folder / "results/safety/ppo_my_kinds-doubt/seed1.jsonl")
    assert any(min(row["rewards"]) < max(row["rewards"]) for row in own if "rewards" in row)
    tidy = read_rows(folder / "results/results.jsonl")
    assert {(row["arm"], row["seed"]) for row in tidy} == {
        ("sft", 1),
        ("sft_chosen", 1),
        ("ppo_my_kinds-doubt", 1),
    }
    curves = read_rows(folder / "results/curves.jsonl")
    assert {row["step"] for row in curves if row["arm"] == "ppo_my_kinds-doubt"} == {0, 2}
    assert all(abs(row["kl"]) < 1e-5 for row in curves if row["step"] == 0)
    assert [row["kl"] for row in curves if row["arm"] == "sft"] == [pytest.approx(0.0, abs=1e-5)]
    start, end = (row for row in curves if row["arm"] == "sft_chosen")
    assert (start["step"], end["step"]) == (0, 4) and end["kl"] > 1e-4 > abs(start["kl"])
    (sampled,) = (
        row for row in tidy if (row["arm"], row["split"], row["decoding"]) == ("sft_chosen", "selection", "sampled")
    )
    assert (end["judge"], end["kl"]) == (sampled["judge"], sampled["kl"])  # the last checkpoint is the policy
    assert "too few" in done.stdout and (folder / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_answers_of_a_policy_that_was_trained_anew_are_refused(smoke, capsys):
    folder = smoke[0] / "runs/safety/seed1"
    answers = json.loads((folder / "answers/sft/plain/run.json").read_text())["config"]
    again = read_stage(answers)
    assert evaluate.run(again) == 0 and "selection, sampled" in capsys.readouterr().out
    record = folder / "sft/run.json"
    kept = record.read_text()
    try:
        record.write_text(json.dumps({**json.loads(kept), "launches": [{"started": "later"}]}))
        with pytest.raises(UserError, match=r"which now is .*, of later; use --config\.on_existing=restart"):
            evaluate.run(again)
    finally:
        record.write_text(kept)


@pytest.mark.slow
def test_a_failed_run_is_recorded_and_the_others_go_on(smoke):
    """The record has its error."""
    folder, _, _, done = smoke
    rows = {row["name"]: row for row in read_rows(folder / "queue.jsonl")}
    failed = {name: row for name, row in rows.items() if row["state"] == "failed"}
    assert failed and all("no_such" in name for name in failed)
    assert all("No module named 'no_such'" in row["error"] for row in failed.values())
    assert "failed: safety/" in done.stdout and "No module named 'no_such'" in done.stdout


@pytest.mark.slow
def test_finished_runs_stay_and_another_study_is_refused(smoke):
    folder, arguments, environment, _ = smoke
    before = {row["name"] for row in read_rows(folder / "queue.jsonl") if row["state"] == "done"}
    again = launch(*arguments, "--config.arms=sft,sft_chosen,ppo_my_kinds:doubt", **environment)
    assert again.returncode == 0, again.stderr[-2000:]
    lines = [json.loads(line)["name"] for line in (folder / "queue.jsonl").read_text().splitlines()]
    assert all(lines.count(name) == 1 for name in before)
    other = launch(*arguments, "--config.ppo.num_steps=7", **environment)
    assert other.returncode == 2
    assert (
        f"config.ppo.num_steps was {the_study().ppo.num_steps} and is 7" in other.stderr
        and "--config.on_existing=restart" in other.stderr
    )
