"""Random values of fields, random dicts and spoiled records: a config, or one line of a user's error."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import fuzz
from support.stage_configs import stage_config

from jaxrm.config import command_line, dicts, field_names
from jaxrm.errors import UserError
from jaxrm.runtime.folders import check_writable, checked_path
from jaxrm.stage_config import STAGES, read_stage

CONFIGS = {name: stage_config(name, run_dir="runs/x") for name in STAGES}
NAMES = [(name, field) for name, config in CONFIGS.items() for field in field_names.field_names(type(config))]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["None", "inf", "-inf", "nan", "1e400", "1e-400", "true", "()", "(1,", "1,2", "0x10", "9" * 5000]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@fuzz
@given(where=st.sampled_from(NAMES), text=TEXTS)
def test_fuzz_a_typed_value_is_read_or_refused(where, text):
    """What is read survives the file that is written of it."""
    stage, field = where
    config = CONFIGS[stage]
    annotation = field_names.field_names(type(config))[field]
    try:
        value = dicts.parse_text(text, annotation, field)
        changed = dicts.with_changes(config, {field.removeprefix("config."): value})
    except UserError:
        return
    recorded = json.loads(json.dumps(dicts.to_dict(changed), allow_nan=False))
    assert read_stage(recorded) == changed
    assert not dicts.differences(dicts.to_dict(changed), recorded)


@fuzz
@given(
    words=st.lists(
        st.one_of(
            st.text(max_size=20),
            st.builds("--config.{}={}".format, st.text(max_size=12), TEXTS),
            st.builds("--{}={}".format, st.sampled_from([field for _, field in NAMES]), TEXTS),
            st.builds("--no{}".format, st.sampled_from([field for _, field in NAMES])),
        ),
        max_size=4,
    )
)
def test_fuzz_a_command_line_is_a_config_or_one_line(words):
    """Whatever stands behind ``--config=sft_tiny``: status 0 or 2, and no traceback."""
    words = [word for word in words if not word.startswith(("--help", "-h", "-help"))]
    status = command_line.run(lambda config, flags: 0, object, argv=["train", "--config=sft_tiny", *words])
    assert status in (0, 2)


def paths_of(record, prefix=()):
    """Where a record has values."""
    for name, value in record.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from paths_of(value, (*prefix, name))


@fuzz
@given(stage=st.sampled_from(list(STAGES)), which=st.integers(0, 10**6), value=JSON, how=st.sampled_from("srax"))
def test_fuzz_a_spoiled_record_is_read_or_refused(stage, which, value, how):
    """A value of ``run.json`` set, removed, added to, or the whole replaced."""
    record = copy.deepcopy(json.loads(json.dumps(dicts.to_dict(CONFIGS[stage]))))
    *sections, last = list(paths_of(record))[which % len(list(paths_of(record)))]
    holder = record
    for section in sections:
        holder = holder[section]
    if how == "s":
        holder[last] = value
    elif how == "r":
        del holder[last]
    elif how == "a":
        holder[f"{last}x"] = value
    elif isinstance(value, dict):
        record = value
    try:
        config = read_stage(record)
    except UserError:
        return
    assert read_stage(json.loads(json.dumps(dicts.to_dict(config), allow_nan=False))) == config


@fuzz
@given(run_dir=st.one_of(st.text(max_size=300), st.text("/.~\0ab", max_size=12)))
def test_fuzz_a_folder_is_one_or_one_line(run_dir):
    try:
        check_writable(checked_path(run_dir), run_dir)
    except UserError as error:
        assert str(error).startswith("config.run_dir is ")


@pytest.mark.parametrize(
    "name", ["ppo.value_clip", "ppo.reward_clip", "optimizer.clip_norm", "critic.optimizer.clip_norm"]
)
def test_an_infinite_bound_is_written_and_read_back(name):
    config = CONFIGS["ppo"]
    value = dicts.parse_text("inf", float, f"config.{name}")
    changed = dicts.with_changes(config, {name: value})
    assert read_stage(json.loads(json.dumps(dicts.to_dict(changed), allow_nan=False))) == changed
