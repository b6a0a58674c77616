import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from jaxrm.data.config import DataConfig
from jaxrm.data.examples import Example
from jaxrm.data.loader import build_loader, eval_batches, rows_per_epoch
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
        assert batch.keys() == other.keys() == KEYS
        for key in KEYS:
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
