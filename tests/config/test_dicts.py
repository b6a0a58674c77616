"""Trees of frozen dataclasses from and to dicts, changed and compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from jaxrm.config.dicts import ABSENT, checked, differences, from_dict, parse_text, to_dict, with_changes
from jaxrm.config.field_names import did_you_mean, field_names
from jaxrm.config.fields import above, bounded, check
from jaxrm.errors import UserError


@dataclass(frozen=True)
class Optimizer:
    lr: float = bounded(1e-5, above(0))
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["adamw", "adafactor"] = "adamw"
    clip: float | None = None

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class Judge:
    every: int = 10
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    num_steps: int
    optimizer: Optimizer = field(default_factory=Optimizer)
    judge: Judge | None = None
    stages: tuple[Judge, ...] = ()
    run_dir: str = "runs/x"
    packing: bool = True
    eval_path: str | None = None
    max_records: int | None = 512
    length: int | Literal["auto"] = "auto"


FULL = Tree(
    7,
    Optimizer(lr=2, betas=(0.5, 1), kind="adafactor", clip=3),
    Judge(3, ("a", "b")),
    (Judge(1), Judge(2, ("c",))),
    "elsewhere",
    False,
    "a.jsonl",
    None,
    12,
)


@pytest.mark.parametrize("tree", [Tree(3), FULL])
def test_a_tree_survives_json_and_can_be_hashed(tree):
    again = from_dict(Tree, json.loads(json.dumps(to_dict(tree))))
    assert again == tree
    assert hash(again) == hash(tree)
    assert isinstance(again.optimizer, Optimizer)
    assert all(isinstance(stage, Judge) for stage in again.stages)


def test_ints_in_float_fields_become_floats():
    for optimizer in (
        checked(Tree(1, Optimizer(lr=3, betas=(1, 0)))).optimizer,
        from_dict(Tree, {"num_steps": 1, "optimizer": {"lr": 3, "betas": [1, 0]}}).optimizer,
        with_changes(Tree(1), {"optimizer.lr": 3, "optimizer.betas": (1, 0)}).optimizer,
    ):
        assert (optimizer.lr, optimizer.betas) == (3.0, (1.0, 0.0))
        assert [type(x) for x in (optimizer.lr, *optimizer.betas)] == [float, float, float]


@pytest.mark.parametrize(
    ("changes", "tree"),
    [
        ({}, FULL),
        ({"num_steps": 8, "optimizer.lr": 0.5}, replace(FULL, num_steps=8, optimizer=replace(FULL.optimizer, lr=0.5))),
        ({"judge.every": 4}, replace(FULL, judge=Judge(4, ("a", "b")))),
        ({"judge": None}, replace(FULL, judge=None)),
        ({"judge.every": 4, "judge": None}, replace(FULL, judge=None)),
        ({"judge": Judge(9)}, replace(FULL, judge=Judge(9))),
        ({"length": "auto", "max_records": 5}, replace(FULL, length="auto", max_records=5)),
    ],
)
def test_fields_are_changed_by_dotted_name(changes, tree):
    assert with_changes(FULL, changes) == tree
    assert FULL.num_steps == 7


def test_a_field_of_a_section_that_is_none_makes_the_section():
    assert with_changes(Tree(1), {"judge.every": 4}) == Tree(1, judge=Judge(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.rate": 1}, r"config\.optimizer\.rate is no field of the config"),
        ({"judge.evry": 1}, r"config\.judge\.evry is no field of the config; did you mean --config\.judge\.every"),
        ({"optimizer.lr": 0}, r"config\.optimizer\.lr is 0\.0; it must be above 0"),
        ({"num_steps": "x"}, r"config\.num_steps is 'x'; required int"),
        ({"optimizer": 3}, r"config\.optimizer is 3 \(int\); required section Optimizer"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        with_changes(FULL, changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_step": 3}, r"config\.num_step is no field of the config; did you mean --config\.num_steps\?"),
        ({"num_steps": 3, "lr": 1.0}, r"config\.lr is no field .* did you mean --config\.optimizer\.lr\?"),
        (
            {"num_steps": 3, "optimizer": {"beta": 1}},
            r"config\.optimizer\.beta is .* --config\.optimizer\.betas\?",
        ),
        ({}, r"config\.num_steps is missing; required int; e\.g\. --config\.num_steps=8"),
        ({"num_steps": "3"}, r"config\.num_steps is '3'; required int"),
        ({"num_steps": True}, r"config\.num_steps is True \(bool\); required int"),
        ({"num_steps": 1.0}, r"config\.num_steps is 1\.0 \(float\); required int"),
        ({"num_steps": None}, r"config\.num_steps is None; required int"),
        ({"num_steps": 1, "packing": 1}, r"config\.packing is 1 \(int\); required bool"),
        (
            {"num_steps": 1, "eval_path": 1},
            r"config\.eval_path is 1 \(int\); required str or None; e\.g\. --config\.eval_path=text",
        ),
        (
            {"num_steps": 1, "optimizer": {"lr": "abc"}},
            r"config\.optimizer\.lr is 'abc'; required float; e\.g\. --config\.optimizer\.lr=1e-05",
        ),
        ({"num_steps": 1, "optimizer": {"lr": float("nan")}}, r"config\.optimizer\.lr is nan, not a number"),
        (
            {"num_steps": 1, "optimizer": {"kind": "sgd"}},
            r"config\.optimizer\.kind is 'sgd'; required 'adamw' or 'adafactor'",
        ),
        (
            {"num_steps": 1, "optimizer": {"betas": (1.0,)}},
            r"config\.optimizer\.betas .* required tuple of float, float",
        ),
        (
            {"num_steps": 1, "optimizer": {"betas": (1.0, "x")}},
            r"config\.optimizer\.betas\[1\] is 'x'; required float",
        ),
        ({"num_steps": 1, "optimizer": 3}, r"config\.optimizer is 3 \(int\); required section Optimizer"),
        ({"num_steps": 1, "stages": ({"every": "x"},)}, r"config\.stages\[0\]\.every is 'x'; required int"),
        ({"num_steps": 1, "optimizer": {"lr": 0}}, r"config\.optimizer\.lr is 0\.0; it must be above 0"),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_required(config, message):
    with pytest.raises(UserError, match=message):
        from_dict(Tree, config)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("num_steps", "12", 12),
        ("optimizer.lr", "3", 3.0),
        ("optimizer.lr", "3e-6", 3e-6),
        ("optimizer.lr", "inf", float("inf")),
        ("optimizer.betas", "1,0.5", (1.0, 0.5)),
        ("optimizer.betas", "(1, 0.5)", (1.0, 0.5)),
        ("optimizer.kind", "adafactor", "adafactor"),
        ("optimizer.clip", "None", None),
        ("judge", "None", None),
        ("judge.names", "a, b", ("a", "b")),
        ("judge.names", "('a',)", ("a",)),
        ("judge.names", "3", ("3",)),
        ("judge.names", "", ()),
        ("judge.names", "()", ()),
        ("run_dir", "None", "None"),
        ("run_dir", "", ""),
        ("packing", "False", False),
        ("packing", "true", True),
        ("eval_path", "3", "3"),
        ("eval_path", "None", None),
        ("max_records", "None", None),
        ("length", "auto", "auto"),
        ("length", "8", 8),
    ],
)
def test_text_is_read_by_the_type_of_the_field(name, text, value):
    read = parse_text(text, field_names(Tree)[f"config.{name}"], f"config.{name}")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("num_steps", "1e3", r"config\.num_steps is '1e3'; required int"),
        ("num_steps", "None", r"required int"),
        ("packing", "maybe", r"required bool; e\.g\. --config\.packing=true"),
        ("optimizer.betas", "1,2,3", r"is '1,2,3'; required tuple of float, float; e\.g\. .*betas=0\.5,0\.5"),
        ("optimizer.betas", "1,x", r"config\.optimizer\.betas is '1,x'; required tuple of float, float"),
        ("optimizer.lr", "nan", r"config\.optimizer\.lr is nan, not a number; required float"),
        ("optimizer.kind", "sgd", r"required 'adamw' or 'adafactor'"),
        ("judge", "3", r"config\.judge is a section, .* set its fields, e\.g\. --config\.judge\.every="),
    ],
)
def test_text_that_does_not_fit_the_field_is_named(name, text, message):
    with pytest.raises(UserError, match=message):
        parse_text(text, field_names(Tree)[f"config.{name}"], f"config.{name}")


def test_field_names_reach_into_sections_that_may_be_none():
    names = field_names(Tree)
    assert {"config.judge", "config.judge.every", "config.optimizer.lr"} <= set(names)
    assert "config.optimizer" not in names


def test_infinities_survive_json():
    tree = replace(FULL, optimizer=Optimizer(lr=float("inf")))
    text = json.dumps(to_dict(tree), allow_nan=False)
    assert from_dict(Tree, json.loads(text)) == tree
    assert json.loads(text)["optimizer"]["lr"] == "inf"
    assert differences(json.loads(text), tree) == []


def test_differences_are_dotted_names_with_both_values():
    a = Tree(3, judge=Judge(2))
    b = replace(a, num_steps=4, optimizer=Optimizer(lr=1.0), packing=False)
    assert differences(a, b) == [("num_steps", 3, 4), ("optimizer.lr", 1e-5, 1.0), ("packing", True, False)]
    assert differences({"x": {"y": 1}}, {"x": {"z": 1}}) == [("x.y", 1, ABSENT), ("x.z", ABSENT, 1)]
    assert differences({"x": 1}, {"x": True}) == [("x", 1, True)]


def test_a_typo_finds_the_nearest_name_and_nonsense_finds_none():
    names = ["optimizer.lr", "data.batch_size", "data.eval_path", "seed"]
    known = [f"--config.{name}" for name in names]
    assert did_you_mean("--config.batchsize", known) == "did you mean --config.data.batch_size?"
    assert did_you_mean("--config.data.batchsize", known) == "did you mean --config.data.batch_size?"
    assert did_you_mean("--config.optimiser.lr", known) == "did you mean --config.optimizer.lr?"
    assert did_you_mean("--config.zzzzzz", known) == ""


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"critic": {"optimizer": {"lr": -1.0}}}, "config.critic.optimizer.lr"),
        ({"optimizer": {"lr": -1.0}}, "config.optimizer.lr"),
        ({"ptx": {"path": "x", "batch_size": 0}}, "config.ptx.batch_size"),
        ({"rollout": {"mesh": {"fsdp": 0}}}, "config.rollout.mesh.fsdp"),
        ({"rollout": {"mesh": {"fsdp": -1}}}, "config.rollout.mesh.data"),
        ({"ppo": {"kl_coef": 0.0, "kl_target": 1.0}}, "config.ppo.kl_coef"),
    ],
)
def test_a_section_that_stands_elsewhere_is_named_by_its_place(given, field):
    from jaxrm.stage_config import PPO

    with pytest.raises(UserError) as error:
        from_dict(PPO, given)
    message = str(error.value)
    assert message.startswith(f"{field} is") and f"--{field}=" in message


def test_an_error_of_a_section_made_in_python_names_its_class():
    """A Python user typed ``OptimizerConfig(lr=-1)``; only the reader of a tree knows where a section stands."""
    from jaxrm.algorithms.optimizer import OptimizerConfig
    from jaxrm.algorithms.ppo_config import CriticConfig

    required = "it must be above 0 and finite, e.g. lr=2e-05"
    with pytest.raises(UserError) as error:
        OptimizerConfig(lr=-1)
    assert str(error.value) == f"OptimizerConfig.lr is -1; {required}"
    assert (error.value.where, error.value.found) == ("OptimizerConfig.lr", "-1")
    assert (error.value.required, error.value.example) == ("above 0 and finite", "lr=2e-05")
    with pytest.raises(UserError, match=r"^config\.critic\.optimizer\.lr is .* --config\.critic\.optimizer\.lr="):
        from_dict(CriticConfig, {"optimizer": {"lr": -1}}, "config.critic")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "fast"}, "OptimizerConfig.lr is 'fast'; it must be above 0 and finite"),
        ({"lr": float("nan")}, "OptimizerConfig.lr is nan; it must be above 0 and finite"),
        ({"b1": 1}, "OptimizerConfig.b1 is 1; it must be at least 0 and below 1, e.g. b1=0.9"),
        ({"clip_norm": 0}, "OptimizerConfig.clip_norm is 0; it must be above 0, or None for no clipping, e.g. clip"),
        ({"name": "sgd"}, "OptimizerConfig.name is 'sgd'; it must be one of adamw, adafactor, e.g. name='adamw'"),
        ({"warmup": 1}, "OptimizerConfig.warmup is 1; it must be at least 0 and below 1, a share of the steps, e.g."),
    ],
)
def test_a_bound_is_said_with_what_is_required(values, message):
    from jaxrm.algorithms.optimizer import OptimizerConfig

    with pytest.raises(UserError) as error:
        OptimizerConfig(**values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rate", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("critic.learning_rate", "critic.optimizer.lr"),
        ("sft.optimizer.learning_rate", "sft.optimizer.lr"),
        ("sft.epochs", "sft.num_epochs"),
        ("beta", "ppo.kl_coef"),
        ("kl_beta", "ppo.kl_coef"),
        ("temperature", "rollout.sampling.temperature"),
        ("batch_size", "data.batch_size"),
        ("max_len", "data.max_length"),
        ("grad_accum", "num_microbatches"),
        ("max_steps", "num_steps"),
    ],
)
def test_what_others_call_a_field_finds_it(name, meant):
    fields = ["optimizer.lr", "optimizer.name", "critic.optimizer.lr", "ppo.kl_coef", "data.batch_size", "num_steps"]
    fields += ["data.max_length", "num_microbatches", "rollout.sampling.temperature", "sft.optimizer.lr"]
    fields += ["pairs.optimizer.lr", "pairs.num_epochs", "sft.num_epochs"]
    known = [f"--config.{field}" for field in fields]
    assert did_you_mean(f"--config.{name}", known) == f"did you mean --config.{meant}?"
