"""Prompts of a PPO run: what is read, what is refused, and the batches of one shape."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrm.data.config import DataConfig
from jaxrm.data.prompts import PromptExample
from jaxrm.data.records import Message
from jaxrm.data.templates import encode_prompt
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.inputs.prompts import fixed_batches, load_prompts, prompt_loader, prompt_width, prompts_to_devices
from jaxrm.types import ResponseBatch


@pytest.fixture(scope="module")
def one():
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def eight():
    return build_mesh(MeshConfig(2, 2, 2))


@pytest.fixture(scope="module")
def tokenizer(task_folder):
    return load_tokenizer(str(task_folder / "tokenizer"))


def examples(*lengths, seed=0):
    """Prompts of token ids from 1 on, so that a 0 in a batch is padding."""
    rng = np.random.default_rng(seed)
    return [PromptExample(rng.integers(1, 1000, n).astype(np.int32), (), f"f:{n}") for n in lengths]


def kept(tokens, mask):
    """What the masks of a batch leave, row by row."""
    tokens, mask = jax.device_get((tokens, mask))
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def ids(prompts):
    return [example.tokens.tolist() for example in prompts]


# --- width


@pytest.mark.parametrize(
    ("lengths", "room", "multiple", "width"),
    [
        ((3, 17, 9), 100, 16, 32),
        ((3, 16, 9), 100, 16, 16),
        ((1,), 100, 16, 16),
        ((3, 17, 9), 20, 16, 20),  # a full multiple would leave no room for the response
        ((3, 17, 9), 17, 16, 17),
        ((3, 17, 9), 100, 2048, 100),
    ],
)
def test_the_width_is_the_longest_prompt_rounded_up(lengths, room, multiple, width):
    """It is rounded up to the multiple as far as there is room."""
    assert prompt_width(examples(*lengths), room, multiple) == width


# --- fixed batches


@pytest.mark.parametrize(("count", "rows", "batches"), [(5, 2, 3), (6, 2, 3), (3, 8, 1), (1, 4, 1)])
def test_every_prompt_is_there_in_its_order(one, count, rows, batches):
    """The last batch is filled from the beginning."""
    prompts = examples(*range(1, count + 1))
    found = fixed_batches(prompts, rows, 8, one)
    assert len(found) == batches and {batch[0].shape for batch in found} == {(rows, 8)}
    order = list(range(count))
    while len(order) < batches * rows:
        order.append(order[len(order) - count])
    assert [row for batch in found for row in kept(*batch[:2])] == [prompts[i].tokens.tolist() for i in order]


def test_fixed_batches_are_padded_on_the_left(one):
    (batch,) = fixed_batches(examples(3, 6), 2, 6, one)
    tokens, mask = jax.device_get(batch[:2])
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)
    assert mask.astype(int).tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert tokens[0, :3].tolist() == [0, 0, 0] and tokens[~mask].max() == 0


def test_rows_of_fixed_batches_lie_over_data_and_fsdp(one, eight):
    """They are the rows that one device has."""
    prompts = examples(4, 9, 1, 7, 2, 8)
    for mine, theirs in zip(fixed_batches(prompts, 4, 10, one), fixed_batches(prompts, 4, 10, eight), strict=True):
        for a, b in zip(mine[:2], theirs[:2], strict=True):
            np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))
            assert {shard.data.shape for shard in b.addressable_shards} == {(1, 10)}
            assert len({shard.index[0].start for shard in b.addressable_shards}) == 4  # the tensor axis has copies


# --- the loader


def test_an_epoch_of_the_loader_has_every_prompt_once(eight):
    """Each is whole and padded on the left."""
    prompts = examples(*range(1, 17))
    data = DataConfig(path="f", batch_size=4, max_length=500, packing=True)
    loader, _ = prompt_loader(prompts, data, 16, eight, seed=0, pad_id=0)
    place = prompts_to_devices(eight)
    rows = []
    for _ in range(4):
        tokens, mask, records = place(next(loader))
        assert records is None
        assert tokens.shape == (4, 16) and {shard.data.shape for shard in tokens.addressable_shards} == {(1, 16)}
        np.testing.assert_array_equal(np.sort(jax.device_get(mask), axis=1), jax.device_get(mask))
        rows += kept(tokens, mask)
    assert sorted(rows) == sorted(ids(prompts)) and rows != ids(prompts)


def test_a_prompt_brings_the_number_of_its_record(one, eight):
    """From the loader and in fixed batches, with n responses beside each other; the data are the same without it."""
    plain = examples(*range(1, 9))
    prompts = [dataclasses.replace(example, number=100 + i) for i, example in enumerate(plain)]
    by_tokens = {tuple(example.tokens): example.number for example in prompts}
    data = DataConfig(path="f", batch_size=4)
    loader, mark = prompt_loader(prompts, data, 8, eight, seed=0, pad_id=0)
    assert mark == prompt_loader(plain, data, 8, eight, seed=0, pad_id=0)[1]
    for batch in (prompts_to_devices(eight)(next(loader)), *fixed_batches(prompts, 4, 8, eight)):
        assert batch.records.tolist() == [by_tokens[tuple(row)] for row in kept(batch.tokens, batch.mask)]
        rows = [jax.numpy.repeat(x, 2, axis=0) for x in batch[:2]]
        recorded = batch.with_records(ResponseBatch(*rows, *rows))
        assert recorded.records.tolist() == np.repeat(batch.records, 2).tolist()
        assert recorded.records.sharding == batch.records.sharding
    (batch,) = fixed_batches(plain, 8, 8, one)
    responses = ResponseBatch(*batch[:2], *batch[:2])
    assert batch.with_records(responses) is responses


def test_the_order_of_prompts_follows_from_the_seed(one):
    """The fingerprint follows from the prompts."""

    def first(prompts, seed, width=16):
        loader, fingerprint = prompt_loader(prompts, data, width, one, seed=seed, pad_id=0)
        return [kept(*prompts_to_devices(one)(next(loader))[:2]) for _ in range(3)], fingerprint

    data, prompts = DataConfig(path="f", batch_size=4), examples(*range(1, 13))
    rows, mark = first(prompts, 0)
    assert (rows, mark) == first(prompts, 0)
    others, same_mark = first(prompts, 1)
    assert others != rows and same_mark == mark
    assert first(prompts[:-1], 0)[1] != mark
    assert first(prompts, 0, width=32)[1] == mark  # which depends on the platform


# --- reading


@pytest.fixture
def write_prompts(tmp_path):
    def write(texts, name="prompts.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return str(tmp_path / name)

    return write


def load(tokenizer, path, *, held_out=False, max_new_tokens=16, **fields):
    data = DataConfig(**{"path": path, "eval_share": 0.3, "max_length": 48, **fields})
    return load_prompts(data, tokenizer, max_new_tokens=max_new_tokens, held_out=held_out, show_progress=False)


def test_both_sides_of_the_split_are_apart_and_whole(tokenizer, write_prompts):
    texts = [f"how do i wash lamp {i} ?" for i in range(40)]
    path = write_prompts(texts)
    train, held_out = (load(tokenizer, path, held_out=side) for side in (False, True))
    asked = [[example.messages[-1].content for example in side.examples] for side in (train, held_out)]
    assert sorted(asked[0] + asked[1]) == sorted(texts) and min(map(len, asked)) > 4
    assert (train.report.used, train.report.other_side) == (len(asked[0]), len(asked[1]))
    for example in train.examples:
        assert example.tokens.tolist() == encode_prompt(tokenizer, example.messages, "auto")


def test_prompts_have_what_the_response_leaves_of_a_row(tokenizer, write_prompts):
    text = "how do i wash the lamp ?"
    needed = len(encode_prompt(tokenizer, [Message("user", text)], "auto"))
    path = write_prompts([text] * 10)
    fits = {"held_out": True, "eval_path": path, "max_new_tokens": 16}
    assert len(load(tokenizer, path, max_length=needed + 16, **fits).examples) == 10
    with pytest.raises(UserError, match=rf"10 of 10 prompts are longer than {needed - 1} tokens"):
        load(tokenizer, path, max_length=needed + 15, **fits)


def test_prompts_all_too_long_name_the_first_and_a_length(tokenizer, write_prompts):
    path, train = write_prompts(["wash the lamp " * 30] * 10), write_prompts(["wash the lamp"] * 10, "train.jsonl")
    longest = len(encode_prompt(tokenizer, [Message("user", "wash the lamp " * 30)], "auto"))
    message = (
        rf"^{path}: 10 of 10 prompts are longer than 32 tokens and none is left \(first at prompts.jsonl:1\); "
        "config.data.max_length, prompt and response together, is 48, and responses have up to 16; "
        f"e.g. --config.data.max_length={longest + 16}$"
    )
    for side in ({"path": path, "eval_path": train}, {"path": train, "eval_path": path, "held_out": True}):
        with pytest.raises(UserError, match=message):
            load(tokenizer, **side)


def test_prompts_that_are_too_long_are_dropped_and_counted(tokenizer, write_prompts):
    """However many they are."""
    texts = ["wash the lamp"] * 2 + ["wash the lamp " * 30] * 8
    path = write_prompts(texts)
    found = load(tokenizer, path, eval_path=path, max_bad_share=0.0)
    assert (found.report.total, found.report.used, len(found.examples)) == (10, 2, 2)
    ((reason, dropped),) = found.report.bad.items()
    assert reason.startswith("prompt longer than the 32 tokens") and dropped.count == 8
    assert dropped.first == "prompts.jsonl:3"


@pytest.mark.parametrize("max_new_tokens", [48, 60])
def test_responses_that_fill_the_row_leave_no_prompt(tokenizer, write_prompts, max_new_tokens):
    message = (
        rf"^config.rollout.sampling.max_new_tokens is {max_new_tokens}, but config.data.max_length, prompt and "
        rf"response together, is 48; e.g. --config.data.max_length={2 * max_new_tokens}$"
    )
    with pytest.raises(UserError, match=message):
        load(tokenizer, write_prompts(["a"]), max_new_tokens=max_new_tokens)
