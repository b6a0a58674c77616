"""The study: which runs there are, what is refused, and a small one from end to end."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config.dicts import with_changes
from jaxrm.config.files import load_config_file
from jaxrm.data import tasks
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError
from jaxrm.runtime import run_lock
from jaxrm.runtime.metrics import read_rows
from jaxrm.stage_config import PPO, BestOfN, Evaluate, read_stage
from jaxrm.stages.evaluate import run as evaluate
from jaxrm.study import costs, report
from jaxrm.study import run as study_run
from jaxrm.study.arms import ARMS, OTHERS, read_arm
from jaxrm.study.checkpoints import keep_best, remove_unneeded
from jaxrm.study.collect import collect
from jaxrm.study.config import Study, settings
from jaxrm.study.presets import PRESETS, apply_preset
from jaxrm.study.readings import PROTOCOLS, read
from jaxrm.study.run_configs import StudyRun, policy_name
from jaxrm.study.schedule import Best, Schedule, unknown_answers
from jaxrm.study.win_rates import win_rates
from jaxrm.study.worker_pool import Outcome
from jaxrm.study.worlds import prompt_tokens

GRID_PROTOCOLS = tuple(name for name in PROTOCOLS if name != "published")
ROOT = Path(__file__).resolve().parents[2]


def the_study(**changes):
    loaded, _ = load_config_file(str(ROOT / "configs/study.py"), Study)
    return dataclasses.replace(loaded, **changes)


def runs_of(study, best=None):
    return {run.name: run for run in Schedule(apply_preset(study)).runs(best or {})}


def test_every_setting_is_run_with_every_seed():
    """All runs are known beforehand, each after what it needs, and each of them has a cost."""
    study = apply_preset(the_study(preset="full", seeds=(1, 2), worlds=("safety",)))
    runs = Schedule(study).runs({})
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for number, run in enumerate(runs):
        assert set(run.needs) <= set(names[:number]), run.name
        assert costs.sort_of(run.name) in costs.SECONDS
    for arm in ARMS:
        answers = [name for name in names if f"/answers/{arm}/" in name]
        assert len(answers) == len(study.seeds) * len(study.worlds) * len(settings(study, arm)), arm
    assert len(unknown_answers(study, {})) == len(study.seeds) * len(study.worlds) * (len(ARMS) - len(OTHERS))
    assert "hours of one core" in costs.in_words(study, names, 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fill_in_what_the_config_leaves_open(preset):
    study = apply_preset(the_study(preset=preset, seeds=(7,)))
    assert study.seeds == (7,) and study.arms == PRESETS[preset]["arms"] and study.size == PRESETS[preset]["size"]


def test_annotators_of_other_biases_share_the_sft_policy():
    study = the_study(preset="bias", worlds=("safety",), biases=(1.0, 4.0), seeds=(1,))
    names = [run.name for run in Schedule(apply_preset(study)).runs({})]
    assert len(set(names)) == len(names) and sum(name.endswith("/sft") for name in names) == 2  # one is the mechanism's
    pairs = runs_of(study)["safety,bias=4/seed1/pairs"]
    assert pairs.experiment.pairs.annotator_bias == 4 and pairs.needs == ("safety/seed1/sft",)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "max_notes"), [("safety", None), ("summarize", 10), ("dialogue", None)])
def test_the_rows_of_a_world_hold_its_longest_prompt(task, max_notes, tmp_path):
    """And no more than it."""
    tasks.write_task(task, tmp_path, seed=1, max_notes=max_notes)
    tokenizer, longest = load_tokenizer(str(tmp_path / "tokenizer")), 0
    for split in ("prompts", "selection", "test", "test_ood"):
        for row in read_rows(tmp_path / f"{split}.jsonl"):
            prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
            ids = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=False)
            longest = max(longest, len(ids))
    assert longest == prompt_tokens(task, max_notes)


def test_the_best_checkpoint_answers_when_the_grid_is_there():
    study = the_study(
        worlds=("safety",), arms=("ppo_literal",), seeds=(1,), kl_coefs=(0.02, 0.1), learning_rates=(1e-3,)
    )
    first, second = (
        policy_name("safety", 1, "ppo_literal", one) for one in settings(apply_preset(study), "ppo_literal")
    )
    name = "safety/seed1/answers/ppo_literal/best,kl_coef=0.02,lr=0.001,step=32"
    best = {first: Best(0.7, 32, is_last=False)}
    assert name not in runs_of(study, best)
    best[second] = Best(0.6, 160, is_last=True)
    run = runs_of(study, best)[name]
    assert run.experiment.model.path.endswith("ppo_literal/kl_coef=0.02,lr=0.001/checkpoints/32")
    assert name not in runs_of(study, best | {second: Best(0.8, 160, is_last=True)})  # its answers are there anyway
    # That of a wider grid is another run, so the answers of the first are not taken for its own.
    wider = runs_of(study, best | {second: Best(0.8, 96, is_last=False)})
    assert name not in wider
    assert "safety/seed1/answers/ppo_literal/best,kl_coef=0.1,lr=0.001,step=96" in wider


def test_an_arm_of_dpo_rewards_brings_its_source():
    """A run of DPO for each seed that needs it, before PPO; RTO adds it to the scalar reward."""
    runs = runs_of(the_study(worlds=("safety",), arms=("ppo_dpo", "ppo_rto"), seeds=(1,)))
    source = runs["safety/seed1/rm_dpo"].experiment
    assert source.algorithm == "dpo" and source.model.path.endswith("safety/seed1/sft")
    for arm in ("ppo_dpo", "ppo_rto"):
        run = runs[f"safety/seed1/{arm}/kl_coef=0.02,lr=0.001"]
        assert "safety/seed1/rm_dpo" in run.needs
        rewards = run.experiment.rewards or {"dpo": run.experiment.reward}
        assert {name: one.weight for name, one in rewards.items()} == (
            {"scalar": 1, "dpo": 0.2} if arm == "ppo_rto" else {"dpo": 1}
        )
        assert rewards["dpo"].model == source.run_dir


def test_arms_of_one_algorithm_differ_in_the_reward_alone():
    arms = ("ppo_scalar", "ppo_soft", "ppo_my_kinds:doubt")
    runs = runs_of(the_study(worlds=("safety",), arms=arms, seeds=(1,)))
    same = {
        arm: [
            dataclasses.replace(runs[policy_name("safety", 1, arm, one)].experiment, reward=RewardConfig(), run_dir="")
            for one in settings(apply_preset(the_study(arms=arms)), arm)
        ]
        for arm in arms
    }
    assert same["ppo_scalar"] == same["ppo_soft"] == same["ppo_my_kinds:doubt"] and len(same["ppo_soft"]) == 6


def test_early_ends_are_those_of_arms_with_tags():
    study = the_study(worlds=("safety",), arms=("ppo_scalar", "ppo_soft"), seeds=(1,))
    study = dataclasses.replace(study, ppo=with_changes(study.ppo, {"ppo.early_end_penalty": 1.0}))
    runs = runs_of(study)
    for arm, penalty in (("ppo_scalar", 0.0), ("ppo_soft", 1.0)):
        assert runs[f"safety/seed1/{arm}/kl_coef=0.02,lr=0.001"].experiment.ppo.early_end_penalty == penalty


def test_algorithms_are_read_off_an_arm():
    runs = runs_of(the_study(worlds=("safety",), arms=("rloo_literal", "ppo_lora_scalar"), seeds=(1,)))
    rloo = runs["safety/seed1/rloo_literal/kl_coef=0.02,lr=0.001"].experiment
    assert (rloo.ppo.advantage, rloo.rollout.responses_per_prompt, rloo.critic.path) == ("rloo", 4, None)
    adapted = runs["safety/seed1/ppo_lora_scalar/kl_coef=0.02,lr=0.001"]
    assert adapted.experiment.lora.rank == 8 and adapted.needs == ("safety/seed1/rm_scalar_lora",)
    assert runs["safety/seed1/rm_scalar_lora"].experiment.lora.rank == 8
    assert [arm for arm in ARMS if read_arm(arm) is None] == list(OTHERS)


def test_the_best_and_the_last_checkpoint_stay(tmp_path):
    """Until no run of the arm is to come."""
    rows = [{"step": step, "eval_judge": mark} for step, mark in ((0, 0.9), (2, 0.3), (4, 0.8), (6, 0.5))]
    run = tmp_path / "runs/w/seed1/ppo_literal/one"
    for step in (2, 4, 6):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert keep_best(run) == Best(0.8, 4, is_last=False)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "6"]
    names = ["w/seed1/ppo_literal/one", "w/seed1/answers/ppo_literal/one"]
    runs = [StudyRun(names[0], None), StudyRun(names[1], None, (names[0],))]
    remove_unneeded(tmp_path, names[0], runs, names[:1])
    assert (run / "checkpoints").exists()
    remove_unneeded(tmp_path, names[1], runs, names)
    assert run.exists() and not (run / "checkpoints").exists()


@pytest.mark.parametrize(("stage", "template"), [("ppo", PPO), ("best_of_n", BestOfN), ("evaluate", Evaluate)])
def test_sources_that_arms_would_replace_are_refused(stage, template):
    sources = {"brief": RewardConfig(kind="scalar", function="my:brief")}
    with pytest.raises(
        UserError, match=rf"^Study\.{stage}\.rewards has brief, but arms say .*{stage}\.rewards\.brief=N"
    ):
        Study(**{stage: template(rewards=sources)})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("arms", ("ppo_sclar",), ("Study.arms has 'ppo_sclar'", "ppo_scalar", "did you mean ppo_scalar")),
        ("worlds", ("safty",), ("Study.worlds has 'safty'", "summarize", "safety")),
        ("mechanism", "safty", ("Study.mechanism has 'safty'", "summarize", "safety")),
        ("arms", (), ("Study.arms", "at least one")),
        ("seeds", (1, 1), ("Study.seeds", "each one once")),
        ("kl_coefs", (0.2, 0.1), ("Study.kl_coefs", "ascending")),
        ("kl_coefs", (0.1, 0.5), ("Study.kl_coefs has no 0.02", "as published", "0.02, 0.1, 0.5")),
        ("workers", 0, ("Study.workers is 0", "at least 1")),
    ],
)
def test_what_cannot_be_studied_is_refused_by_name(field, value, words):
    with pytest.raises(UserError) as error:
        apply_preset(the_study(**{field: value}))
    assert all(word in str(error.value) for word in words), error.value


def test_a_study_of_the_first_edition_is_refused(tmp_path):
    """In one line that says what to type."""
    (tmp_path / "study.json").write_text(json.dumps({"config": {"selection_seeds": [1001]}}))
    with pytest.raises(UserError, match=r"chose its settings by the judge beforehand; .*on_existing=restart"):
        study_run.run_study(the_study(run_dir=str(tmp_path)))


def launch(*arguments, **environment):
    command = [sys.executable, "-m", "jaxrm.train", f"--config={ROOT / 'configs/study.py'}", *arguments]
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=600)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Runs a study whose queue ends as it is told; the message it prints."""
    monkeypatch.setattr(study_run, "_publish", lambda *_: None)

    def run(status=0, **fields):
        monkeypatch.setattr(study_run, "_run_queue", lambda *_: status)
        return study_run.run_study(the_study(run_dir=str(tmp_path / "study"), preset="smoke", arms=("sft",), **fields))

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


class Worker:
    """Ends each run at once; a policy has a checkpoint of step 2, the best, and one of step 4."""

    def __init__(self, outcomes, fails, lacked):
        self.outcomes, self.fails, self.lacked = outcomes, fails, lacked

    def start(self, run, log):
        folder = Path(run.experiment.run_dir)
        if read_arm(run.name.split("/")[2]):
            for step in (2, 4):
                (folder / f"checkpoints/{step}").mkdir(parents=True, exist_ok=True)
            means = {"judge": 0.5, "kl": 1.0, "reward": 1.0, "length": 9.0}
            rows = [{"step": step, **{f"eval_{name}": x / step for name, x in means.items()}} for step in (2, 4)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "evaluation.json").write_text(json.dumps({"after": means}))
        policies = [need for need in run.needs if read_arm(need.split("/")[2])]
        runs = Path(str(folder)[: -len(run.name)])
        self.lacked += [run.name for need in policies if not list((runs / need).glob("checkpoints/[24]"))]
        self.outcomes.put(Outcome(self, int(self.fails in run.name), "out of memory", 1.0))

    def stop(self):
        pass


@pytest.fixture
def grid_study(tmp_path, monkeypatch):
    """Launches a study of two settings whose runs end at once, where those of a name fail.

    It returns the exit status, and the runs that lacked their policy; ``published`` has what each launch publishes.
    """

    def run(fails):
        lacked = []
        monkeypatch.setattr(
            study_run, "_open_workers", lambda _, __, ends: contextlib.nullcontext([Worker(ends, fails, lacked)])
        )
        grid = {"arms": ("ppo_literal",), "kl_coefs": (0.02, 0.1), "learning_rates": (1e-3,), "seeds": (1,)}
        config = the_study(run_dir=str(tmp_path / "study"), preset="smoke", worlds=("safety",), **grid)
        return study_run.run_study(config), lacked

    run.published = []
    monkeypatch.setattr(study_run, "publish", lambda *given: run.published.append(given))
    return run


def test_failed_answers_are_repeated(grid_study, tmp_path):
    """Their policy stays until they are there."""
    for fails, status in (("answers/ppo_literal/kl_coef=0.02", 1), ("no run", 0)):
        assert grid_study(fails) == (status, [])
    assert not list(tmp_path.glob("study/runs/safety/seed1/ppo_literal/*/checkpoints"))


@pytest.mark.parametrize("fails", ["seed1/ppo_literal/kl_coef=0.1,", "answers/ppo_literal/kl_coef=0.1,"])
def test_a_seed_counts_as_published_where_a_setting_failed(fails, grid_study, tmp_path, capsys):
    """Whether its training failed or its answers; once the run is done, the seed counts."""
    for name, status in ((fails, 1), ("no run", 0)):
        assert grid_study(name)[0] == status
    for (study, folder, progress), has_failed in zip(grid_study.published, (True, False), strict=True):
        results = collect(study, folder, progress)
        read_seeds = {protocol: set(read(results, protocol, "safety", "ppo_literal")) for protocol in GRID_PROTOCOLS}
        assert read_seeds == dict.fromkeys(GRID_PROTOCOLS, set() if has_failed else {1})
        assert read(results, "published", "safety", "ppo_literal").keys() == {1}
        assert results.missing == ({("safety", "ppo_literal"): [1]} if has_failed else {})
        best = [name for name in progress.done if name.startswith("safety/seed1/answers/ppo_literal/best,")]
        assert bool(best) == (not has_failed or "answers" in fails)
        report.write_tables(results, win_rates(results), tmp_path, [])
        name, log = f"{fails}lr=0.001", f"logs/safety/seed1/{fails.removeprefix('seed1/')}lr=0.001.log"
        assert all((text in (tmp_path / "report.html").read_text()) == has_failed for text in (name, log))
    out = capsys.readouterr().out
    assert f"{name}: out of memory (its output: {tmp_path / 'study' / log})" in out
    assert "Until they are done, their seeds count as published only." in out


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
        "--config.arms=sft,ppo_my_kinds:doubt,ppo_no_such:kind",
        "--config.keep_policies=True",
    ]
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return folder / "run", arguments, environment, launch(*arguments, **environment)


@pytest.mark.slow
def test_a_small_study_runs_to_its_report(smoke):
    """One arm fails, and the others go on; the exit status and the record say so."""
    folder, _, _, done = smoke
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "runs, of a size whose cost is not known" in done.stdout
    rows = read_rows(folder / "results/policies.jsonl")
    tested = [row for row in rows if row["split"] != "selection"]
    assert {(row["arm"], row["split"], row["decoding"]) for row in tested} == {
        (arm, split, decoding)
        for arm in ("sft", "ppo_my_kinds-doubt")
        for split in ("test", "test_ood")
        for decoding in ("sampled", "greedy")
    }
    assert all(0 <= row["judge"] <= 1 for row in rows)
    curves = read_rows(folder / "results/curves.jsonl")
    assert [row["step"] for row in curves] == [0, 2, 4] and abs(curves[0]["kl"]) < 1e-5 < curves[-1]["kl"]
    queue = {row["name"]: row for row in read_rows(folder / "queue.jsonl")}
    trained = queue["safety/seed1/ppo_my_kinds:doubt/kl_coef=0.02,lr=0.001".replace(":", "-")]
    assert trained["best"]["judge"] == max(row["judge"] for row in curves[1:])
    failed = {name: row for name, row in queue.items() if row["state"] == "failed"}
    assert failed and all("no_such" in name for name in failed)
    assert all("No module named 'no_such'" in row["error"] for row in failed.values())
    assert "failed: safety/" in done.stdout and (folder / "report.html").stat().st_size > 10_000


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
def test_finished_runs_stay_and_another_study_is_refused(smoke):
    folder, arguments, environment, _ = smoke
    before = {row["name"] for row in read_rows(folder / "queue.jsonl") if row["state"] == "done"}
    again = launch(*arguments, "--config.arms=sft,ppo_my_kinds:doubt", **environment)
    assert again.returncode == 0, again.stderr[-2000:]
    lines = [json.loads(line)["name"] for line in (folder / "queue.jsonl").read_text().splitlines()]
    assert all(lines.count(name) == 1 for name in before)
    other = launch(*arguments, "--config.ppo.evaluation.samples=7", **environment)
    assert other.returncode == 2
    assert "config.ppo.evaluation.samples was 8 and is 7" in other.stderr
    assert "--config.on_existing=restart" in other.stderr
