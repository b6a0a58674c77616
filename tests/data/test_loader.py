import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from jaxrm.data.config import DataConfig
from jaxrm.data.examples import ComparisonExample, Example, MappingExample
from jaxrm.data.loader import build_loader, eval_batches, fingerprint, rows_per_epoch, warm_up
from jaxrm.errors import UserError

KEYS = {"tokens", "segment_ids", "positions", "loss_mask"}


def make_examples(count, seed=0):
    """Each example repeats its own number, so that a batch shows which examples are in it."""
    rng = np.random.default_rng(seed)
    return [
        Example(np.full(n, i, np.int32), np.arange(n) > 0, f"f:{i}")
        for i, n in enumerate(rng.integers(2, 13, count), 1)
    ]


EXAMPLES = make_examples(60)
CONFIG = DataConfig(path="f", max_length=16, batch_size=4)


@pytest.fixture
def loader():
    pytest.importorskip("grain")

    def build(examples=EXAMPLES, config=CONFIG, **settings):
        return build_loader(examples, config, **{"pad_id": 0, "seed": 0, **settings})

    return build


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys() >= KEYS - {"loss_mask"}
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def contents(rows):
    """The set of examples of each row."""
    return [tuple(np.unique(row[row > 0])) for row in rows]


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_every_example_once_in_another_order(loader, packing):
    config = DataConfig(path="f", max_length=16, batch_size=4, packing=packing)
    rows = rows_per_epoch(EXAMPLES, config)
    stream = [row for batch in take(loader(config=config), rows) for row in contents(batch["tokens"])]
    epochs = [stream[i * rows : (i + 1) * rows] for i in range(4)]
    for epoch in epochs:
        assert sorted(example for row in epoch for example in row) == list(range(1, 61))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert packing == (rows < 60)


def test_batches_have_the_promised_arrays(loader):
    batch = next(loader())
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    integers = ((4, 16), "int32")
    assert shapes == {
        "tokens": integers,
        "segment_ids": integers,
        "positions": integers,
        "loss_mask": ((4, 16), "bool"),
    }
    for row in range(4):
        segments = batch["segment_ids"][row]
        assert (np.diff(segments[segments > 0]) >= 0).all()
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert len(np.unique(batch["tokens"][row][inside])) == 1
            np.testing.assert_array_equal(batch["positions"][row][inside], np.arange(inside.sum()))
            np.testing.assert_array_equal(batch["loss_mask"][row][inside], np.arange(inside.sum()) > 0)
        assert not batch["loss_mask"][row][segments == 0].any()


def test_the_order_is_a_function_of_the_seed(loader):
    assert_equal(take(loader(seed=5), 30), take(loader(seed=5), 30))
    streams = [[contents(b["tokens"]) for b in take(loader(seed=seed), 40)] for seed in range(4)]
    assert all(a != b for a, b in itertools.combinations(streams, 2))
    rows = rows_per_epoch(EXAMPLES, CONFIG)
    flat = [[row for batch in stream for row in batch] for stream in streams]
    assert flat[0][rows : 2 * rows] != flat[1][:rows]  # the second epoch of a seed is not the first of the next


@pytest.mark.parametrize("position", [0, 1, 7, 13, 14, 15, 29, 40])
def test_a_saved_position_gives_exactly_the_remainder(loader, position):
    unbroken = take(loader(), position + 20)
    iterator = loader()
    take(iterator, position)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = take(iterator, 9)  # what is read after saving, and lost, changes nothing
    assert_equal(ahead, unbroken[position : position + 9])
    fresh = loader()
    fresh.set_state(state)
    assert_equal(take(fresh, 20), unbroken[position:])
    iterator.set_state(state)
    assert_equal(take(iterator, 20), unbroken[position:])
    assert iterator.get_state() == fresh.get_state()


def test_a_position_is_restored_in_another_process(loader):
    iterator = loader()
    take(iterator, 11)
    state = json.dumps(iterator.get_state())
    code = f"""
import itertools, json, numpy as np
from jaxrm.data.config import DataConfig
from jaxrm.data.examples import Example
from jaxrm.data.loader import build_loader
lengths = np.random.default_rng(0).integers(2, 13, 60)
examples = [Example(np.full(n, i, np.int32), np.arange(n) > 0, "") for i, n in enumerate(lengths, 1)]
iterator = build_loader(examples, DataConfig(max_length=16, batch_size=4), pad_id=0, seed=0)
iterator.set_state(json.loads({state!r}))
print(json.dumps([batch["tokens"].tolist() for batch in itertools.islice(iterator, 15)]))
"""
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not fresh.stderr  # the reading thread ends with the process, quietly
    assert json.loads(fresh.stdout) == [batch["tokens"].tolist() for batch in take(iterator, 15)]


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_processes_together_see_what_one_sees(loader, process_count):
    alone = take(loader(), 25)
    parts = [take(loader(process_index=p, process_count=process_count), 25) for p in range(process_count)]
    joined = [{key: np.concatenate([part[i][key] for part in parts]) for key in KEYS} for i in range(25)]
    assert_equal(joined, alone)


def test_eval_batches_hold_every_example_once_in_order():
    batches = eval_batches(EXAMPLES, CONFIG, pad_id=0)
    rows = [row for batch in batches for row in contents(batch["tokens"])]
    assert sorted(example for row in rows for example in row) == list(range(1, 61))
    assert {batch["tokens"].shape for batch in batches} == {(4, 16)}
    assert_equal(batches, eval_batches(EXAMPLES, CONFIG, pad_id=0))
    plain = DataConfig(path="f", max_length=16, batch_size=7, packing=False)
    rows = [row for batch in eval_batches(EXAMPLES, plain, pad_id=0) for row in contents(batch["tokens"])]
    assert rows == [(i,) for i in range(1, 61)] + [()] * 3


def test_eval_batches_are_filled_with_empty_rows():
    batches = eval_batches(EXAMPLES[:3], DataConfig(max_length=16, batch_size=8, packing=False), pad_id=9)
    assert len(batches) == 1
    assert (batches[0]["segment_ids"].max(axis=1) == [1, 1, 1, 0, 0, 0, 0, 0]).all()
    assert not batches[0]["loss_mask"][3:].any()
    assert (batches[0]["tokens"][3:] == 9).all()
    assert eval_batches([], CONFIG, pad_id=0) == []


def test_eval_batches_are_shared_by_the_processes():
    alone = eval_batches(EXAMPLES, CONFIG, pad_id=0)
    parts = [eval_batches(EXAMPLES, CONFIG, pad_id=0, process_index=p, process_count=2) for p in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in KEYS} for a, b in zip(*parts, strict=True)]
    assert_equal(joined, alone)


def test_too_little_data_for_a_batch_is_a_user_error(loader):
    config = DataConfig(path="few.jsonl", max_length=16, batch_size=8, packing=False)
    with pytest.raises(UserError, match=r"batch_size is 8.*'few.jsonl' make only 3 rows.*--config.data.batch_size=3"):
        loader(EXAMPLES[:3], config)
    assert len(take(loader(EXAMPLES[:8], config), 3)) == 3


def test_processes_that_do_not_share_a_batch_evenly_are_refused(loader):
    with pytest.raises(UserError, match=r"batch_size is 4.*3 processes.*--config.data.batch_size=6"):
        loader(process_count=3)
    with pytest.raises(UserError, match="3 processes"):
        eval_batches(EXAMPLES, CONFIG, pad_id=0, process_count=3)


def test_eval_batches_need_no_grain():
    code = (
        "import sys; sys.modules['grain'] = None; import numpy as np\n"
        "from jaxrm.data.config import DataConfig; from jaxrm.data.examples import Example\n"
        "from jaxrm.data.loader import eval_batches\n"
        "e = [Example(np.ones(3, np.int32), np.ones(3, bool), '')]\n"
        "print(len(eval_batches(e, DataConfig(max_length=4, batch_size=1), pad_id=0)))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == "1"


def make_mappings(count, seed=0):
    return [
        MappingExample(e.tokens, e.loss_mask, e.source, is_correction=i % 2 == 0)
        for i, e in enumerate(make_examples(count, seed))
    ]


def make_comparisons(count, seed=0):
    return [ComparisonExample(e.tokens, len(e.tokens) // 2, e.source) for e in make_examples(count, seed)]


OTHER_KINDS = {
    "mappings": (make_mappings(60), {"loss_mask": "bool", "is_correction": "bool"}),
    "comparisons": (make_comparisons(60), {"is_chosen_end": "bool", "rejected_offset": "int32"}),
}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_every_kind_of_example_is_batched_with_its_columns(loader, kind, packing):
    examples, columns = OTHER_KINDS[kind]
    config = DataConfig(path="f", max_length=16, batch_size=4, packing=packing)
    types = {"tokens": "int32", "segment_ids": "int32", "positions": "int32", **columns}
    for batch in (next(loader(examples, config)), *eval_batches(examples, config, pad_id=0)):
        assert {name: values.dtype.name for name, values in batch.items()} == types
        assert {values.shape for values in batch.values()} == {(4, 16)}
    rows = rows_per_epoch(examples, config)
    stream = [row for batch in take(loader(examples, config), rows) for row in contents(batch["tokens"])]
    assert sorted(example for row in stream[:rows] for example in row) == list(range(1, 61))
    for name in columns:
        held_out = np.concatenate([batch[name].ravel() for batch in eval_batches(examples, config, pad_id=0)])
        expected = np.concatenate([example.columns()[name] for example in examples])
        assert sorted(held_out[held_out != 0]) == sorted(expected[expected != 0])


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_process_whose_share_is_empty_rows_has_all_columns(kind):
    examples, columns = OTHER_KINDS[kind]
    config = DataConfig(max_length=16, batch_size=8, packing=False)
    (batch,) = eval_batches(examples[:3], config, pad_id=0, process_index=1, process_count=2)
    assert set(batch) == {"tokens", "segment_ids", "positions", *columns}
    assert not any(values.any() for values in batch.values())


def test_the_fingerprint_tells_data_and_batching_apart():
    """That of demonstrations is written down: with another one, no run of before could be continued."""
    known = [Example(np.arange(3, dtype=np.int32), np.array([False, False, True]), "f:1")]
    assert fingerprint(known, DataConfig(max_length=4, batch_size=1)).startswith("c7c864942ffdfca3")
    mappings, _ = OTHER_KINDS["mappings"]
    flipped = [MappingExample(e.tokens, e.loss_mask, e.source, not e.is_correction) for e in mappings]
    comparisons, _ = OTHER_KINDS["comparisons"]
    moved = [ComparisonExample(e.tokens, e.chosen_length + (len(e.tokens) > 4), e.source) for e in comparisons]
    smaller = DataConfig(path="f", max_length=16, batch_size=2)
    prints = [fingerprint(data, CONFIG) for data in (EXAMPLES, EXAMPLES[1:], mappings, flipped, comparisons, moved)]
    prints += [
        fingerprint(EXAMPLES, smaller),
        fingerprint(EXAMPLES, DataConfig(max_length=16, batch_size=4, packing=False)),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(make_mappings(60), DataConfig(path="elsewhere", max_length=16, batch_size=4)) == prints[2]


@pytest.mark.parametrize("num_batches", [0, 1, 9])
def test_warm_up_gives_n_batches_of_one_kind_and_then_the_other(loader, num_batches):
    mappings, _ = OTHER_KINDS["mappings"]
    identity = [example for example in mappings if not example.is_correction]
    stream = take(warm_up(loader(identity), num_batches, loader(mappings)), 30)
    assert_equal(stream, take(loader(identity), num_batches) + take(loader(mappings), 30 - num_batches))
    assert [bool(batch["is_correction"].any()) for batch in stream] == [i >= num_batches for i in range(30)]


@pytest.mark.parametrize("position", [0, 1, 4, 5, 6, 17])
def test_a_warm_up_goes_on_from_a_saved_position(loader, position):
    def build():
        mappings, _ = OTHER_KINDS["mappings"]
        identity = [example for example in mappings if not example.is_correction]
        return warm_up(loader(identity), 5, loader(mappings))

    unbroken = take(build(), position + 20)
    iterator = build()
    take(iterator, position)
    state = json.loads(json.dumps(iterator.get_state()))
    assert_equal(take(iterator, 9), unbroken[position : position + 9])
    fresh = build()
    fresh.set_state(state)
    assert_equal(take(fresh, 20), unbroken[position:])
    iterator.set_state(state)  # from behind the warm-up back into it
    assert_equal(take(iterator, 20), unbroken[position:])
    assert iterator.get_state() == fresh.get_state()
