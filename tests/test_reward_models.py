"""From a policy to scored responses: every command of the reward models in a row, on the embedded task."""

import contextlib
import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.stage_configs import stage_config

from jaxrm import score, train
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.reward_config import RewardKindConfig
from jaxrm.config import command_line
from jaxrm.data import tasks
from jaxrm.data.config import DataConfig
from jaxrm.data.pairs import MappingConfig, correction_request
from jaxrm.data.readers import read_records
from jaxrm.data.records import Message
from jaxrm.data.templates import encode_prompt
from jaxrm.inference.load import load_policy, load_reward_model
from jaxrm.inference.parameters import init_key
from jaxrm.models import config as models
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.ops.reward_kinds import names_for
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig, read_rows
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PairsConfig
from jaxrm.stages import sample_pairs, sft
from jaxrm.stages.objective import build_objective
from jaxrm.stages.reward_model import evaluation as reward_evaluation
from jaxrm.stages.reward_model import run as reward_model
from jaxrm.stages.stage import open_stage

pytestmark = pytest.mark.slow

SMALL = dataclasses.replace(
    models.PRESETS["tiny"], hidden_size=96, intermediate_size=256, num_layers=2, head_dim=24, max_position=192
)
EIGHT = MeshConfig(2, 2, 2)
STEPS = {"seq2seq_rm": 40, "scalar_rm": 12}
FEW = 6  # steps on eight devices
CORRECTED, LONGEST = 24, 28


@contextlib.contextmanager
def devices(count):
    """Stages open meshes over the first so many devices."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in (sft, sample_pairs, reward_model):
            patch.setattr(stage, "build_mesh", lambda config: build_mesh(config, jax.devices()[:count]))
        yield


class Runs:
    """Runs of one embedded task in one folder, each made once and when it is first asked for."""

    def __init__(self, folder):
        self.folder = folder

    def config(self, name, algorithm, **fields):
        config = {
            "run_dir": str(self.folder / name),
            "model": ModelSource(path=str(self.folder / "sft")),
            "data": self.pairs_data,
            "optimizer": OptimizerConfig(lr=5e-3, schedule="constant", warmup=0.0, weight_decay=0.1),
            "checkpoint": CheckpointConfig(every=1000),
            "evaluation": {
                "every": 1000,
                "samples": 1,
                "corrections": 0 if "eight" in name else CORRECTED,
                "judge": "task:safety",
                "sampling": SamplingConfig(max_new_tokens=LONGEST, temperature=0.0),
            },
            "logging": LoggingConfig(every=1, progress=False, tensorboard=False),
            "mapping": MappingConfig(instruction=""),
        }
        return stage_config(algorithm, **config | fields)

    @property
    def pairs_data(self):
        path = str(self.folder / "pairs" / "pairs.jsonl")
        return DataConfig(path=path, max_length=128, batch_size=16, eval_share=0.2)

    @functools.cached_property
    def sft(self):
        """A policy that has the form of responses, and errs in their content."""
        config = self.config(
            "sft",
            "sft",
            num_steps=60,
            model=ModelSource(preset="tiny"),
            data=DataConfig(path="task:safety", max_length=64, batch_size=32, max_records=2000, max_eval_records=16),
            optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1),
        )
        with devices(1):
            assert train.main(config, None) == 0
        return self.folder / "sft"

    def sampled(self, name):
        assert self.sft
        sampling = SamplingConfig(max_new_tokens=LONGEST)
        pairs = PairsConfig(count=500, ideal_share=0.5, batch_size=256, sampling=sampling)
        config = self.config(name, "sample_pairs", data=DataConfig(path="task:safety"), pairs=pairs)
        with devices(1):
            assert train.main(config, None) == 0
        return self.folder / name / "pairs.jsonl"

    @functools.cached_property
    def pairs(self):
        return self.sampled("pairs")

    def reward_model_config(self, algorithm, count=1):
        assert self.pairs
        kind = "literal" if algorithm == "seq2seq_rm" else "scalar"
        more = {"reward": RewardKindConfig(kind=kind), "num_steps": STEPS[algorithm] if count == 1 else FEW}
        name = algorithm if count == 1 else f"{algorithm}-eight"
        return self.config(name, algorithm, mesh=MeshConfig() if count == 1 else EIGHT, **more)

    @functools.cache  # noqa: B019  # one Runs a module, which lives as long
    def reward_model(self, algorithm, count=1):
        config = self.reward_model_config(algorithm, count)
        with devices(count):
            assert train.main(config, None) == 0
        return self.folder / Path(config.run_dir).name

    @functools.cached_property
    def held_out(self):
        """The held-out pairs as a file of their own."""
        assert self.pairs
        records, _ = read_records(self.pairs_data, held_out=True)
        rows = [{"prompt": r.prompt[-1].content, "chosen": r.chosen, "rejected": r.rejected} for r in records]
        path = self.folder / "held_out.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.PRESETS, "tiny", SMALL)
        yield Runs(tmp_path_factory.mktemp("runs"))


def run_score(*arguments):
    return command_line.run(
        score.main,
        score.CONFIG_CLASSES,
        define_flags=score.define_flags,
        config_required=False,
        flag_of_field=score.FLAG_OF_FIELD,
        argv=["score", *map(str, arguments)],
    )


@pytest.fixture(scope="module")
def scored(runs, tmp_path_factory):
    """What `jaxrm.score` writes of the held-out pairs, by reward model."""

    @functools.cache
    def scored(algorithm):
        folder = tmp_path_factory.mktemp("scored")
        more = [f"--html={folder / 'page.html'}", f"--max_new_tokens={LONGEST}", "--batch_size=32"]
        run = runs.reward_model(algorithm)
        output = folder / "scored.jsonl"
        assert run_score(f"--checkpoint={run}", f"--input={runs.held_out}", f"--output={output}", *more) == 0
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return rows, (folder / "page.html").read_text()

    return scored


def evaluation_of(run):
    return json.loads((run / "evaluation.json").read_text())


def rows_of(run):
    return read_rows(run / "metrics.jsonl")


# --- training


@pytest.mark.parametrize("algorithm", STEPS)
def test_one_device_and_eight_give_the_same_losses(runs, algorithm):
    one = [row for row in rows_of(runs.reward_model(algorithm)) if row["step"] <= FEW]
    eight = rows_of(runs.reward_model(algorithm, 8))
    trained = [[row for row in rows if "grad_norm" in row] for rows in (one, eight)]
    assert [row["step"] for row in trained[0]] == [row["step"] for row in trained[1]] == list(range(1, FEW + 1))
    for name in ("loss", "weight"):  # sums in another order; each update carries the difference on
        np.testing.assert_allclose([r[name] for r in trained[1]], [r[name] for r in trained[0]], rtol=5e-5)
    first = [next(row for row in rows if "eval_loss" in row) for rows in (one, eight)]
    assert first[0].keys() == first[1].keys()
    np.testing.assert_allclose(first[1]["eval_loss"], first[0]["eval_loss"], rtol=3e-5)


@pytest.mark.parametrize("algorithm", STEPS)
def test_a_checkpoint_opens_on_one_device_and_on_eight(runs, algorithm):
    one, eight = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), build_mesh(EIGHT)
    for run in (runs.reward_model(algorithm), runs.reward_model(algorithm, 8)):
        models_ = [load_reward_model(str(run), mesh=mesh) for mesh in (one, eight)]
        assert [len(jax.tree.leaves(model.params)[0].sharding.device_set) for model in models_] == [1, 8]
        for a, b in zip(*(jax.tree.leaves(jax.device_get(model.params)) for model in models_), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("algorithm", STEPS)
def test_a_reward_model_starts_from_the_policy(runs, algorithm):
    policy_run = runs.sft
    config = runs.reward_model_config(algorithm, 8)
    with open_stage(config, build_mesh(EIGHT), records="pairs") as stage:
        objective = build_objective(config, stage.model)
        first = jax.device_get(reward_model.init_params(stage, objective, init_key(config.seed)))
    trunk = first if algorithm == "seq2seq_rm" else first["decoder"]
    policy = jax.device_get(
        load_policy(str(policy_run), mesh=build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])).params
    )
    assert jax.tree.structure(trunk) == jax.tree.structure(policy)
    for a, b in zip(jax.tree.leaves(trunk), jax.tree.leaves(policy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_corrections_and_ranking_are_learnt(runs):
    """What only training can give: a lower loss on both mappings, and corrections that the exact judge likes."""
    run = runs.reward_model("seq2seq_rm")
    before, after = [row for row in rows_of(run) if "eval_loss" in row]
    for mapping in ("correction", "identity"):
        assert after[f"eval_nll_{mapping}"] < 0.85 * before[f"eval_nll_{mapping}"]
    report = evaluation_of(run)
    literal = next(kind for kind in report["kinds"] if kind["kind"] == "literal")
    assert literal["by_sum"][1] > 0.5 and literal["verdict"] == "ranks pairs"
    assert report["corrections"]["rejected"]["judge_gain"] > 0.1
    assert report["divergence"]["chosen"]["first_disagreement_share"] > (
        report["divergence"]["rejected"]["first_disagreement_share"] + 0.1
    )


# --- what a run leaves


def check_kinds(report, kinds):
    assert [kind["kind"] for kind in report["kinds"]] == list(kinds)
    for kind in report["kinds"]:
        for share, low, high in (kind["by_centered"], kind["by_sum"], kind["by_mean"]):
            assert 0 <= low < share < high <= 1
        _, low, high = kind["by_centered"]  # what PPO optimises
        expected = (
            "ranks pairs" if low > 0.5 else "ranks them the wrong way round" if high < 0.5 else "cannot rank pairs"
        )
        assert kind["verdict"] == expected
        assert -1 <= kind["length_correlation"] <= 1


def test_kinds_are_compared_with_the_exact_judge(capsys):
    """Whatever the labels of the pairs say."""
    sums = np.array([[3.0, 1.0, 5.0, 2.0], [2.0, 2.0, 1.0, 4.0]])
    of_kind = dict.fromkeys(("sum", "mean", "centered"), sums) | {"length": np.ones_like(sums)}
    marks = np.array([[0.5, 0.2, 0.1, 0.7], [0.4, 0.9, 0.6, 0.7]])  # the last pair is a tie, and is left out
    (found,) = reward_evaluation.print_ranking({"literal": of_kind}, marks)
    assert found["by_judge"][0] == pytest.approx(2 / 3) and found["by_sum"][0] == 0.5
    assert "as the judge" in capsys.readouterr().out
    (without,) = reward_evaluation.print_ranking({"literal": of_kind})
    assert "by_judge" not in without and "as the judge" not in capsys.readouterr().out
    (of_ties,) = reward_evaluation.print_ranking({"literal": of_kind}, np.ones_like(marks))
    assert "by_judge" not in of_ties


def test_the_report_of_a_seq2seq_reward_model_has_every_number(runs):
    run = runs.reward_model("seq2seq_rm")
    report = evaluation_of(run)
    assert report.keys() == {"step", "pairs", "kinds", "divergence", "corrections"}
    held_out = runs.held_out.read_text().count("\n")
    assert (report["step"], report["pairs"]) == (STEPS["seq2seq_rm"], held_out)
    check_kinds(report, names_for("seq2seq", "tokens"))  # a correction of one's own is read for `edit_aligned` alone
    for side in ("chosen", "rejected"):
        found = report["divergence"][side]
        assert 0 <= found["first_disagreement_token"] <= found["length"] <= LONGEST + 1
        for name in ("first_disagreement_share", "never_disagrees", "tag_rate", "end_tag"):
            assert 0 <= found[name] <= 1
        assert report["corrections"][side]["n"] == CORRECTED
    # The best rewriting of a chosen response that the report can name is the response itself.
    chosen = report["corrections"]["chosen"]
    assert chosen["source_to_chosen"] == 0 and chosen["source_rouge_l"] == 1
    assert chosen["distance_to_source"] == chosen["distance_to_chosen"]
    # The last row of the run says the same as the report.
    last = [row for row in rows_of(run) if "eval_loss" in row][-1]
    for kind in report["kinds"]:
        assert last[f"eval_pairs/{kind['kind']}_by_sum"] == kind["by_sum"][0]
        assert last[f"eval_pairs/{kind['kind']}_by_mean"] == kind["by_mean"][0]
        assert last[f"eval_pairs/{kind['kind']}_by_centered_sum"] == kind["by_centered"][0]
    assert last["eval_pair_accuracy"] == report["kinds"][0]["by_centered"][0]
    assert last["eval_tag_rate_chosen"] == report["divergence"]["chosen"]["tag_rate"]


def test_the_report_of_a_scalar_reward_model_has_every_number(runs):
    run = runs.reward_model("scalar_rm")
    report = evaluation_of(run)
    assert report.keys() == {"step", "pairs", "kinds", "calibration"}
    check_kinds(report, ("scalar", "value_difference", "scalar_length_residual"))
    assert all(kind["by_centered"] == kind["by_sum"] for kind in report["kinds"])  # a score has no centre
    assert abs(report["kinds"][2]["length_correlation"]) < 1e-6
    assert sum(count for _, _, count in report["calibration"]["rows"]) == report["pairs"]
    last = [row for row in rows_of(run) if "eval_loss" in row][-1]
    # Packed two to a row and in one row each, the responses are ranked alike; the loss is the ranking's log loss.
    np.testing.assert_allclose(last["eval_accuracy"], report["kinds"][0]["by_sum"][0], rtol=1e-6)
    np.testing.assert_allclose(last["eval_loss"], report["calibration"]["log_loss"], rtol=1e-4)


@pytest.mark.parametrize("algorithm", STEPS)
def test_a_finished_run_reports_again_and_trains_no_more(runs, algorithm, capsys):
    run = runs.reward_model(algorithm)
    rows, report = rows_of(run), evaluation_of(run)
    (run / "evaluation.json").unlink()
    capsys.readouterr()
    with devices(1):
        assert train.main(runs.reward_model_config(algorithm), None) == 0
    out = capsys.readouterr().out
    assert rows_of(run) == rows and evaluation_of(run) == report
    assert "continuing it" in out and "held-out pairs: chosen above rejected, with 95 % intervals" in out
    assert ("Greedy corrections of 24" in out) is (algorithm == "seq2seq_rm")


def test_pairs_are_the_same_again_and_hold_the_policys_errors(runs):
    first = runs.pairs.read_text()
    assert runs.sampled("again").read_text() == first
    rows = [json.loads(line) for line in first.splitlines()]
    assert len(rows) > 400 and all(row["chosen"] != row["rejected"] for row in rows)
    asked = [[Message("user", row["prompt"])] for row in rows]
    gold = [
        max(tasks.judge("safety", prompt, row[side]) for side in ("chosen", "rejected"))
        for prompt, row in zip(asked, rows, strict=True)
    ]
    assert 0.5 <= np.mean(np.array(gold) == 1.0) < 1  # one side of half of them is ideal
    assert runs.sampled("pairs").read_text() == first  # a second launch


# --- scoring


def test_the_held_out_side_of_a_file_is_scored_by_its_hash(runs, scored, tmp_path):
    everything, output = runs.folder / "pairs" / "pairs.jsonl", tmp_path / "scored.jsonl"
    flags = (f"--input={everything}", f"--output={output}", "--held_out", "--nocorrections", "--batch_size=32")
    assert run_score(f"--checkpoint={runs.reward_model('scalar_rm')}", *flags) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    alone, _ = scored("scalar_rm")
    assert [row["prompt"] for row in found] == [row["prompt"] for row in alone]
    np.testing.assert_allclose(
        [response["sum"] for row in found for response in row["responses"]],
        [response["sum"] for row in alone for response in row["responses"]],
        rtol=1e-5,
    )


def literal_by_hand(model, prompt, response):
    """Tags and rewards of the paper's rule from the whole logits of an unpadded row, in NumPy."""
    request = correction_request(model.tokenizer, model.template, model.instruction)
    row = np.array([*prompt, *response, *request, *response], np.int32)[None]

    @jax.jit
    def forward(params, tokens):
        decoder = nnx.merge(model.model.graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return decoder.logits(decoder(tokens, positions=positions, segment_ids=jnp.ones_like(tokens)))

    logits = np.asarray(forward(model.params, row))[0]
    start = len(row[0]) - len(response)
    tags = [int(logits[start + t - 1].argmax()) == token for t, token in enumerate(response)]
    rewards, diverged = [], False
    for tag in tags:
        diverged |= not tag
        rewards.append(-1.0 if not tag else 0.0 if diverged else 1.0)
    return tags, rewards


def score_by_hand(model, prompt, response):
    row = np.array([*prompt, *response], np.int32)[None]

    @jax.jit
    def forward(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        decoder = nnx.merge(model.model.graphdef, params)
        return decoder(tokens, positions=positions, segment_ids=jnp.ones_like(tokens))

    return float(forward(model.params, row)[0, -1])


@pytest.fixture(scope="module")
def one():
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def prompt_ids(model, row):
    (message,) = row["prompt"]
    return encode_prompt(model.tokenizer, [Message(**message)], model.template)


def test_every_held_out_pair_is_scored_in_order_as_written(runs, scored):
    given = [json.loads(line) for line in runs.held_out.read_text().splitlines()]
    for algorithm in STEPS:
        rows, _ = scored(algorithm)
        assert [row["source"] for row in rows] == [f"held_out.jsonl:{i}" for i in range(1, len(given) + 1)]
        for row, pair in zip(rows, given, strict=True):
            assert row["prompt"] == [{"role": "user", "content": pair["prompt"]}]
            assert [(r["side"], r["text"]) for r in row["responses"]] == [
                (side, pair[side]) for side in ("chosen", "rejected")
            ]
            for r in row["responses"]:
                assert len(r["tokens"]) == len(r["token_ids"]) == len(r["rewards"]) and r["ended"]
                written = "".join(r["tokens"])
                assert "<unk>" in written or written.startswith(r["text"])
                assert r["sum"] == pytest.approx(sum(r["rewards"]))
                assert r["mean"] == pytest.approx(r["sum"] / len(r["rewards"]))
            sums = [r["sum"] for r in row["responses"]]
            assert row["ranked_right"] is (None if sums[0] == sums[1] else sums[0] > sums[1])


def test_token_rewards_are_those_of_a_plain_forward(runs, scored, one):
    rows, _ = scored("seq2seq_rm")
    model = load_reward_model(str(runs.reward_model("seq2seq_rm")), mesh=one)
    right, wrong = ([row for row in rows if row["ranked_right"] is it] for it in (True, False))
    diverging = 0
    for row in (*right[:2], *wrong[:1]):
        for response in row["responses"]:
            tags, rewards = literal_by_hand(model, prompt_ids(model, row), response["token_ids"])
            assert response["tags"] == tags and response["rewards"] == rewards
            assert response["diverges_at"] == (None if all(tags) else tags.index(False))
            diverging += not all(tags)
    assert diverging >= 2


def test_scalar_rewards_are_those_of_a_plain_forward(runs, scored, one):
    rows, _ = scored("scalar_rm")
    model = load_reward_model(str(runs.reward_model("scalar_rm")), mesh=one)
    assert {row["kind"] for row in rows} == {"scalar"}
    for row in rows[:2]:
        for response in row["responses"]:
            assert not any(response["rewards"][:-1]) and response["tags"] is response["correction"] is None
            by_hand = score_by_hand(model, prompt_ids(model, row), response["token_ids"])
            np.testing.assert_allclose(response["rewards"][-1], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", STEPS)
def test_scored_pairs_are_ranked_as_the_run_reported(runs, scored, algorithm):
    """The report was made on one device while training, from other batches."""
    rows, _ = scored(algorithm)
    sums = np.array([[response["sum"] for response in row["responses"]] for row in rows])
    accuracy = np.mean(np.where(sums[:, 0] == sums[:, 1], 0.5, sums[:, 0] > sums[:, 1]))
    report = evaluation_of(runs.reward_model(algorithm))
    assert report["kinds"][0]["by_sum"][0] == pytest.approx(accuracy, abs=1e-9)


def test_the_judges_gain_is_that_of_the_written_corrections(runs, scored):
    rows, _ = scored("seq2seq_rm")
    report = evaluation_of(runs.reward_model("seq2seq_rm"))["corrections"]
    for i, side in enumerate(("chosen", "rejected")):
        gains, changed = [], []
        for row in rows[:CORRECTED]:
            response = row["responses"][i]
            prompt, correction = [Message(**turn) for turn in row["prompt"]], response["correction"]
            assert len(correction["token_ids"]) == len(correction["tokens"]) <= LONGEST
            gains.append(
                tasks.judge("safety", prompt, correction["text"]) - tasks.judge("safety", prompt, response["text"])
            )
            changed.append(correction["token_ids"] != response["token_ids"])
        assert np.mean(gains) == pytest.approx(report[side]["judge_gain"], abs=1e-9)
        assert np.mean(changed) == pytest.approx(report[side]["changed"], abs=1e-9)


def test_a_correction_begins_as_the_response_until_it_diverges(scored):
    """The tags say where the greedy correction leaves its source; cached decoding comes to the same place."""
    rows, _ = scored("seq2seq_rm")
    for row in rows:
        for response in row["responses"]:
            at, written = response["diverges_at"], response["correction"]["token_ids"]
            common = response["token_ids"] if at is None else response["token_ids"][:at]
            assert written[: len(common)] == common[:LONGEST]
            if at is not None and at < LONGEST:
                assert written[at] != response["token_ids"][at]


@pytest.mark.parametrize("algorithm", STEPS)
def test_the_page_holds_the_records_and_no_address(scored, algorithm):
    rows, page = scored(algorithm)
    assert page.lstrip().lower().startswith("<!doctype html>") and "Content-Security-Policy" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    for row in rows[:3]:
        assert row["responses"][0]["text"] in page


def test_another_kind_a_best_checkpoint_and_no_corrections(runs, tmp_path):
    output = tmp_path / "out.jsonl"
    run = runs.reward_model("seq2seq_rm")
    more = ["--kind=soft", "--nocorrections", "--max_records=3", "--batch_size=4"]
    status = run_score(f"--checkpoint={run}/checkpoints/best", f"--input={runs.held_out}", f"--output={output}", *more)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert status == 0 and len(rows) == 3 and {row["kind"] for row in rows} == {"soft"}
    rewards = [reward for row in rows for response in row["responses"] for reward in response["rewards"]]
    assert all(-1 <= reward <= 1 for reward in rewards) and len({round(reward, 3) for reward in rewards}) > 20
    assert all(response["correction"] is None for row in rows for response in row["responses"])


def test_contrast_compares_with_the_policy(runs, tmp_path):
    """With the policy for a reference, on the pairs of the report: the same share ranked right."""
    output = tmp_path / "out.jsonl"
    run = runs.reward_model("seq2seq_rm")
    more = ["--kind=contrast", f"--reference={runs.sft}", "--nocorrections", "--batch_size=32"]
    assert run_score(f"--checkpoint={run}", f"--input={runs.held_out}", f"--output={output}", *more) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    sums = np.array([[response["sum"] for response in row["responses"]] for row in rows])
    contrast = next(kind for kind in evaluation_of(run)["kinds"] if kind["kind"] == "contrast")
    # Other batches round otherwise: a pair that is all but a tie may fall on either side.
    assert contrast["by_sum"][0] == pytest.approx(np.mean(sums[:, 0] > sums[:, 1]), abs=1.01 / len(rows))


def test_responses_without_a_pair_are_scored_too(runs, tmp_path):
    source, output, page = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "page.html"
    pair = json.loads(runs.held_out.read_text().splitlines()[0])
    source.write_text(json.dumps({"prompt": pair["prompt"], "response": pair["rejected"]}) + "\n")
    run = runs.reward_model("scalar_rm")
    more = ["--kind=scalar_length_residual", f"--html={page}"]
    assert run_score(f"--checkpoint={run}", f"--input={source}", f"--output={output}", *more) == 0
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["ranked_right"] is None and [r["side"] for r in row["responses"]] == ["response"]
    assert pair["rejected"] in page.read_text()
