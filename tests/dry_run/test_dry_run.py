"""A dry run: what it shows, that it writes nothing, and that a pipeline is checked before its first stage."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

import jaxrm
from jaxrm import train
from jaxrm.config import command_line
from jaxrm.data.config import DataConfig
from jaxrm.dry_run import memory
from jaxrm.errors import UserError
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.sharding.mesh import MeshConfig

TINY = ModelSource(preset="tiny")
QUIET = LoggingConfig(tensorboard=False, progress=False)
TASK = DataConfig(path="task:safety", max_length=128, batch_size=8, max_records=64, max_eval_records=16)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def files():
    return sorted(str(path) for path in Path().rglob("*"))


def sft(**fields):
    return jaxrm.SFT(**{"run_dir": "runs/sft", "model": TINY, "data": TASK, "logging": QUIET, "num_steps": 2} | fields)


def method(**stages):
    """SFT, pairs, a reward model and PPO, as little as they can be; ``stages`` replaces some of them."""
    policy = ModelSource(path="stage:sft")
    sampling = jaxrm.SamplingConfig(max_new_tokens=16)
    return jaxrm.make_pipeline(
        "runs/method",
        **{
            "sft": sft(run_dir=""),
            "pairs": jaxrm.SamplePairs(
                model=policy, data=TASK, pairs=jaxrm.PairsConfig(count=64, sampling=sampling), logging=QUIET
            ),
            "rm": jaxrm.Seq2SeqRM(
                num_steps=2,
                model=policy,
                data=dataclasses.replace(TASK, path="stage:pairs/pairs.jsonl", eval_share=0.3),
                logging=QUIET,
            ),
            "ppo": jaxrm.PPO(
                num_steps=2,
                model=policy,
                data=dataclasses.replace(TASK, max_length=64),
                reward=jaxrm.RewardConfig(kind="literal", model="stage:rm"),
                rollout=jaxrm.RolloutConfig(sampling=sampling),
                evaluation=jaxrm.JudgedEvaluationConfig(sampling=sampling),
                logging=QUIET,
            ),
        }
        | stages,
    )


def test_a_stage_is_shown_as_it_will_be_trained_on():
    text = str(jaxrm.check(sft()))
    lines = text.splitlines()
    prompt = next(i for i, line in enumerate(lines) if line.startswith("  read "))
    assert lines[prompt].endswith("<|assistant|>") and "<bos> <|user|>" in lines[prompt]
    assert lines[prompt + 1].startswith("  trained on ") and lines[prompt + 1].endswith("<eos>")
    for part in ("used", "tokens an example", "2 of 8 rows", "GiB a device", "All checks passed"):
        assert part in text
    assert files() == []


def test_the_shown_mask_is_that_of_the_loss():
    """One example of each mapping of a pair: the target is the chosen response and its end, word by word."""
    config = jaxrm.Seq2SeqRM(
        run_dir="rm",
        model=TINY,
        mapping=jaxrm.MappingConfig(edit_weight=4.0),
        data=dataclasses.replace(TASK, path="task:safety"),
        num_steps=2,
        logging=QUIET,
    )
    inspection = jaxrm.check(config).stages["seq2seq_rm"].inspection
    assert re.fullmatch(r"[\d,]+ of [\d,]+ tokens of corrections, \d\d %; each weighs 4", inspection.facts["edits"])
    examples = inspection.examples
    assert {example.title for example in examples} == {
        "correction of the rejected response",
        "copy of the chosen response",
    }
    for example in examples:
        target = "".join(token for token, wanted in zip(example.tokens, example.is_target, strict=True) if wanted)
        whole = "".join(example.tokens)
        assert whole.endswith(target) and target.endswith("<eos>") and "<|assistant|>" not in target
        is_copy = whole.count(target.strip()) == 2
        assert is_copy == (example.title == "copy of the chosen response")


def test_a_scalar_model_shows_where_rewards_are_read():
    config = jaxrm.ScalarRM(run_dir="rm", model=TINY, data=TASK, num_steps=2, logging=QUIET)
    check = jaxrm.check(config)
    (example, *_) = check.stages["scalar_rm"].inspection.examples
    assert [token.strip() for token, read in zip(example.tokens, example.is_target, strict=True) if read] == [
        "<eos>"
    ] * 2
    assert "  reward at  <eos>" in str(check)


def test_every_stage_of_a_pipeline_is_checked():
    check = jaxrm.check(method())
    assert list(check.stages) == ["sft", "pairs", "rm", "ppo"] and not check.errors
    assert "stand-ins for those that pairs will write" in check.stages["rm"].inspection.facts["records"]
    assert check.stages["ppo"].inspection.facts["rewards"] == "literal from runs/method/rm"
    assert files() == []


def test_a_last_stage_that_cannot_work_is_named():
    rewards = jaxrm.RewardConfig(kind="scalar", model="stage:rm")
    broken = dataclasses.replace(method().ppo, reward=rewards)
    check = jaxrm.check(method(ppo=broken))
    assert [error.args[0].split(";")[0] for error in check.errors] == [
        "stage ppo: config.ppo.reward.kind is 'scalar', but config.ppo.reward.model, runs/method/rm, is a seq2seq "
        "reward model, whose kinds are literal, signed, prefix, soft, margin, contrast, edit_aligned"
    ]
    assert [stage.error is None for stage in check.stages.values()] == [True, True, True, False]
    assert "ppo cannot run as written" in str(check)


def test_what_needs_a_broken_stage_is_not_checked():
    broken = sft(run_dir="", data=dataclasses.replace(TASK, path="nowhere.jsonl"))
    check = jaxrm.check(method(sft=broken))
    assert check.stages["ppo"].waits_for == ("sft", "rm") and check.stages["ppo"].error is None
    assert "not checked, since it needs sft and rm" in str(check)


def test_a_pipeline_refuses_before_its_first_stage():
    broken = dataclasses.replace(method().ppo, reward=jaxrm.RewardConfig(kind="scalar", model="stage:rm"))
    with pytest.raises(UserError, match=r"^stage ppo: config.ppo.reward.kind is 'scalar'"):
        jaxrm.run(method(ppo=broken))
    assert files() == []


def test_winners_without_held_out_prompts_are_refused_early(task_folder):
    """Both stages hold out the same share of the same prompts, so that no winner would be held out."""
    data = dataclasses.replace(TASK, path=str(task_folder / "prompts.jsonl"), max_length=64, max_records=None)
    data = dataclasses.replace(data, tokenizer=str(task_folder / "tokenizer"))
    config = jaxrm.make_pipeline(
        "runs/rft",
        sft=sft(run_dir=""),
        winners=jaxrm.BestOfN(
            model=ModelSource(path="stage:sft"),
            data=data,
            reward=jaxrm.RewardConfig(kind="scalar", function="task:safety"),
            evaluation=jaxrm.JudgeConfig(judge=None),
            rollout=jaxrm.RolloutConfig(sampling=jaxrm.SamplingConfig(max_new_tokens=16)),
            logging=QUIET,
        ),
        again=sft(run_dir="", data=dataclasses.replace(data, path="stage:winners/winners.jsonl")),
    )
    (error,) = jaxrm.check(config).errors
    assert "runs/rft/winners/winners.jsonl" in str(error) and "--config.again.data.eval_share=0.2" in str(error)
    larger = dataclasses.replace(config.again, data=dataclasses.replace(config.again.data, eval_share=0.2))
    assert not jaxrm.check(dataclasses.replace(config, again=larger)).errors


def test_the_memory_that_stays_is_that_of_the_plan():
    needed = memory.reckon(sft(mesh=MeshConfig(1, 8, 1)))
    assert needed.gradients == pytest.approx(needed.residents["state"] / 3, rel=1e-3)  # Adam has two moments
    whole = memory.reckon(sft(mesh=MeshConfig(8, 1, 1)))
    assert whole.gradients == pytest.approx(8 * needed.gradients, rel=0.05)  # norms are not split


def test_with_adapters_the_base_is_named_apart():
    whole = memory.reckon(sft())
    needed = memory.reckon(sft(lora=LoRAConfig(rank=4)))
    adapters, base = needed.residents["adapters and their optimizer"], needed.residents["base in float32"]
    assert base == pytest.approx(whole.gradients) and adapters == pytest.approx(3 * needed.gradients, rel=1e-3)
    assert needed.gradients < whole.gradients / 2
    assert "base in float32" in needed.as_text()


def launch(*arguments):
    argv = ["train", *arguments]
    return command_line.run(train.main, train.CONFIG_CLASSES, define_flags=train.define_flags, argv=argv)


def test_the_command_prints_and_writes_a_page(capsys):
    flags = ["--config=sft_tiny", "--config.data.max_records=400", "--dry_run", "--html=page.html"]
    assert launch(*flags) == 0
    assert "All checks passed" in capsys.readouterr().out
    page = Path("page.html").read_text()
    assert "Content-Security-Policy" in page and "What it comes to" in page and files() == ["page.html"]


def test_a_page_without_a_dry_run_is_refused(capsys):
    assert launch("--config=sft_tiny", "--html=page.html") == 2
    assert "add --dry_run" in capsys.readouterr().err and sys.argv and files() == []
