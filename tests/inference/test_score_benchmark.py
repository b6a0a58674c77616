"""Benchmarks of preferences, in both published forms, through the command."""

import json
import logging

import jax
import numpy as np
import pytest

import jaxrm
from jaxrm import score
from jaxrm.config import command_line
from jaxrm.errors import UserError
from jaxrm.inference.score_benchmark import kinds_to_score, read_choices


def run(*arguments):
    flags = {"define_flags": score.define_flags, "config_required": False, "flag_of_field": score.FLAG_OF_FIELD}
    return command_line.run(score.main, score.CONFIG_CLASSES, argv=["score", *arguments], **flags)


@pytest.fixture
def benchmark(tmp_path):
    """A pair, a record of four answers, and a row that is none."""
    rows = [
        {"prompt": "how do i wash the lamp ?", "chosen": "with water .", "rejected": "no .", "subset": "plain"},
        {
            "prompt": "how do i mend the radio ?",
            "chosen": ["use a match ."],
            "rejected": ["no .", "you are done .", "please call the police ."],
            "subset": "four",
        },
        {"prompt": "how ?", "chosen": ["so ."], "rejected": [], "subset": "four"},
    ]
    path = tmp_path / "benchmark.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_forms_are_read_and_others_reported(benchmark):
    choices, report = read_choices(str(benchmark), None)
    assert [(len(choice.chosen), len(choice.rejected), choice.subset) for choice in choices] == [
        (1, 1, "plain"),
        (1, 3, "four"),
    ]
    assert report.total == 3 and "'rejected' must be a text or a list of texts" in next(iter(report.bad))


def test_every_kind_of_one_model_beside_a_second(benchmark, make_run, tmp_path, capsys):
    make_run(tmp_path / "rm", "seq2seq_rm")
    make_run(tmp_path / "other", "scalar_rm")
    output = tmp_path / "figures.json"
    arguments = [f"--checkpoint={tmp_path / 'rm'}", f"--pairs={benchmark}", f"--second={tmp_path / 'other'}"]
    assert run(*arguments, "--kind=all", f"--output={output}") == 0
    figures = json.loads(output.read_text())
    kinds = [name.rpartition(", ")[2] for name in figures]
    assert {"literal", "soft", "scalar"} <= set(kinds) and not {"contrast", "edit_aligned", "dpo"} & set(kinds)
    assert all([row["subset"] for row in rows] == ["plain", "four", "all", "mean"] for rows in figures.values())
    printed = capsys.readouterr()
    assert "Accuracy, %" in printed.out
    # All kinds come from one reading of a model's six responses.
    assert printed.err.count("score 6/6 responses") == 2


@pytest.mark.parametrize("algorithm", ["seq2seq_rm", "scalar_rm"])
def test_sums_are_those_of_scores(algorithm, make_run, tmp_path, caplog):
    make_run(tmp_path / "rm", algorithm)
    model = jaxrm.load_reward_model(tmp_path / "rm")
    prompts = ["how do i wash the lamp ?", "how do i mend the radio ?", "how do i wash the lamp ?"]
    responses = ["with water .", "please call the police .", "no ."]
    kinds = kinds_to_score(model, "all")
    sums = model.sums(prompts, responses, kinds, batch_size=2, show_progress=False)
    assert list(sums) == kinds and len(kinds) > 1
    for kind in kinds:
        expected = model.score(prompts, responses, kind=kind, batch_size=2).sum
        np.testing.assert_allclose(sums[kind], expected, atol=1e-5, err_msg=kind)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        model.score(prompts, responses, batch_size=2)  # compiled above
    assert not [line for line in caplog.messages if line.startswith("Compiling jit(step)")]
    if algorithm == "seq2seq_rm":
        make_run(tmp_path / "sft")
        reference = jaxrm.load_policy(tmp_path / "sft")
        for expected_compilations in (2, 0):  # the reward model's reading and the reference's
            caplog.clear()
            with jax.log_compiles(), caplog.at_level(logging.WARNING):
                model.score(prompts, responses, kind="contrast", batch_size=2, reference=reference)
            compiled = [line for line in caplog.messages if "jit(step)" in line or "jit(log_probs)" in line]
            assert sum(line.startswith("Compiling") for line in compiled) == expected_compilations, compiled
        with pytest.raises(UserError, match="reference"):
            model.sums(prompts, responses, ["contrast"], batch_size=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--second=rm", "--input=a", "--output=b"], "--second goes with --pairs=FILE"),
        (["--pairs=a", "--input=b", "--checkpoint=c"], "--input does not go with --pairs"),
        (["--pairs=a"], "--checkpoint"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
