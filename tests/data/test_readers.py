import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import unicodedata

import pytest

from jaxrm.data.config import DataConfig
from jaxrm.data.readers import ReadReport, is_held_out, read_records
from jaxrm.data.records import Message, PromptRecord
from jaxrm.errors import UserError

ROWS = [{"prompt": f"why {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return str(path)


def read(path, held_out=False, **settings):
    return read_records(DataConfig(path=str(path), **settings), held_out=held_out)


def read_all(path, **settings):
    settings = {"max_eval_records": None, **settings}
    return sorted(
        (record.prompt[0].content, record.chosen)
        for held_out in (False, True)
        for record in read(path, held_out, **settings)[0]
    )


EXPECTED = sorted((row["prompt"], row["chosen"]) for row in ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "bom.jsonl"])
def test_every_text_format_gives_the_same_records(tmp_path, name):
    content = json.dumps(ROWS, indent=1).encode() if name == "a.json" else as_lines(ROWS)
    if name == "bom.jsonl":
        content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\r\n")
    assert read_all(write(tmp_path / name, content), eval_share=0.2) == EXPECTED


def test_parquet_gives_the_same_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def dialogue(row, name):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]

    messages = [{name: dialogue(row, name) for name in ("chosen", "rejected")} for row in ROWS]
    for name, rows in (("flat.parquet", ROWS), ("nested.parquet", messages)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        assert read_all(tmp_path / name, eval_share=0.2) == EXPECTED
    records, _ = read(tmp_path / "flat.parquet", eval_share=0.01)
    assert records[0].source == "flat.parquet:1"


def test_a_folder_is_all_its_data_files(tmp_path):
    write(tmp_path / "b.jsonl.gz", as_lines(ROWS[:10]))
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "a.jsonl", as_lines(ROWS[10:]))
    write(tmp_path / "README.md", b"# not data")
    write(tmp_path / "dataset_infos.json", b'{"default": {}}')
    write(tmp_path / ".hidden.jsonl", as_lines(ROWS))
    assert read_all(tmp_path, eval_share=0.2) == EXPECTED
    records, _ = read(tmp_path, eval_share=0.01)
    assert records[0].source == "b.jsonl.gz:1"


def test_files_of_a_folder_are_chosen_by_their_split(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", as_lines(ROWS[:10]))
    write(tmp_path / "train-00001-of-00002.jsonl", as_lines(ROWS[10:20]))
    write(tmp_path / "heldout.jsonl", as_lines(ROWS[20:]))
    train, _ = read(tmp_path, eval_split="heldout")
    held_out, _ = read(tmp_path, held_out=True, eval_split="heldout")
    assert [record.prompt[0].content for record in train] == [row["prompt"] for row in ROWS[:20]]
    assert [record.prompt[0].content for record in held_out] == [row["prompt"] for row in ROWS[20:]]
    with pytest.raises(UserError, match=r"no file of split 'validation'.*heldout\.jsonl"):
        read(tmp_path, held_out=True, eval_split="validation")


def test_a_held_out_file_is_read_whole(tmp_path):
    config = {"eval_path": write(tmp_path / "h.jsonl", as_lines(ROWS[:5])), "max_eval_records": 3}
    path = write(tmp_path / "t.jsonl", as_lines(ROWS))
    train, report = read(path, **config)
    held_out, held_out_report = read(path, held_out=True, **config)
    assert (len(train), report.other_side) == (40, 0)
    assert ([r.source for r in held_out], held_out_report.used) == (["h.jsonl:1", "h.jsonl:2", "h.jsonl:3"], 3)


def test_a_prompt_is_never_on_both_sides(tmp_path):
    rows = [{**ROWS[i % 13], "chosen": f"good {i}"} for i in range(100)]
    path = write(tmp_path / "a.jsonl", as_lines(rows))
    train, report = read(path, eval_share=0.3)
    held_out, other = read(path, held_out=True, eval_share=0.3, max_eval_records=None)
    assert len(train) + len(held_out) == 100
    assert (report.other_side, other.other_side) == (len(held_out), len(train))
    assert not {record.prompt for record in train} & {record.prompt for record in held_out}


@pytest.mark.parametrize(
    "other", ["{}\n", " {}", "{}\r\n", "\ufeff{}", "{}  ", "why  so {}", "Why so {}", "why\nso {}"]
)
def test_spellings_of_a_prompt_are_on_one_side(tmp_path, other):
    """The second spelling of a prompt goes with the first, which stays where it was."""
    names = [f"why so caf\u00e9 {i}?" for i in range(200)]
    twins = [other.format(name.removeprefix("why so ") if "so" in other else name) for name in names]
    twins[::2] = [unicodedata.normalize("NFD", twin) for twin in twins[::2]]
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in (*names, *twins)]
    train, _ = read(write(tmp_path / "a.jsonl", as_lines(rows)), eval_share=0.3)
    held_out, _ = read(tmp_path / "a.jsonl", held_out=True, eval_share=0.3, max_eval_records=None)
    alone, _ = read(write(tmp_path / "b.jsonl", as_lines(rows[:200])), eval_share=0.3)
    numbers = [{re.search(r"\d+", record.prompt[0].content)[0] for record in side} for side in (train, held_out)]
    assert len(train) + len(held_out) == 400 and not numbers[0] & numbers[1]
    assert [r.prompt for r in train[: len(alone)]] == [r.prompt for r in alone]


def test_the_split_of_plain_prompts_never_moves():
    """Fixed by value: runs that were begun earlier go on with the same records."""
    texts = ["why?", "two  spaces", "a\n\nb", "Caf\u00e9", "x" * 300]
    sides = [
        [is_held_out(PromptRecord((Message("user", t),), ""), s) for s in (0.1, 0.3, 0.5, 0.7, 0.9)] for t in texts
    ]
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    assert sides == [[int.from_bytes(d[:8], "big") < s * 2**64 for s in (0.1, 0.3, 0.5, 0.7, 0.9)] for d in digests]


def test_the_held_out_side_is_the_same_in_every_process():
    """Fixed by value: Python's own hash differs from process to process."""
    sides = [is_held_out(PromptRecord((Message("user", f"why {i}?"),), ""), 0.25) for i in range(20)]
    code = (
        "from jaxrm.data.readers import is_held_out; from jaxrm.data.records import *;"
        "print([is_held_out(PromptRecord((Message('user', f'why {i}?'),), ''), 0.25) for i in range(20)])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert fresh.stdout.strip() == str(sides)
    shares = [is_held_out(PromptRecord((Message("user", str(i)),), ""), 0.25) for i in range(4000)]
    assert 0.22 < sum(shares) / 4000 < 0.28


def test_the_first_records_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", as_lines(ROWS))
    everything, _ = read(path)
    first, report = read(path, max_records=7)
    assert first == everything[:7]
    assert report.used == 7


def test_bad_records_are_counted_by_reason_with_the_first_place(tmp_path):
    lines = as_lines(ROWS).splitlines(keepends=True)
    lines[3:3] = [b"{not json\n", b"\xff\xfe\n", b'{"prompt": "a", "chosen": "b"}\n', b"null\n", b"\n"]
    lines[20:20] = [
        b"[" * 100_000 + b"\n",
        b'{"prompt": ' + b"9" * 5000 + b"}\n",
        b'{"prompt":"a","chosen":"b","rejected":" "}\n',
    ]
    path = write(tmp_path / "a.jsonl", b"".join(lines))
    records, report = read(path, max_bad_share=0.5, eval_share=1e-9)
    found = {reason: (count.count, count.first) for reason, count in report.bad.items()}
    assert found == {
        "invalid JSON": (3, "a.jsonl:4"),
        "not UTF-8": (1, "a.jsonl:5"),
        "missing field 'rejected'": (1, "a.jsonl:6"),
        "not an object with fields": (1, "a.jsonl:7"),
        "'rejected' is empty": (1, "a.jsonl:23"),
    }
    assert (report.total, report.used, len(records)) == (47, 40, 40)
    assert ("invalid JSON", 3, "a.jsonl:4") in report.rows()
    with pytest.raises(UserError, match=r"7 of 47 records are unusable.*invalid JSON \(3, first at a.jsonl:4\)"):
        read(path, max_bad_share=0.1)


def test_reports_of_two_stages_merge():
    reading = ReadReport(total=100, used=90, other_side=5)
    reading.add_bad("invalid JSON", "a:1", 5)
    later = ReadReport(total=90, used=80, cut_prompts=4)
    later.add_bad("too long", "a:9", 10)
    merged = reading.merge(later)
    assert (merged.total, merged.used, merged.other_side, merged.cut_prompts) == (100, 80, 5, 4)
    assert {reason: c.count for reason, c in merged.bad.items()} == {"invalid JSON": 5, "too long": 10}
    merged.check(0.15, "a")
    with pytest.raises(UserError, match=r"15 of 100.*too long \(10, first at a:9\).*max_bad_share=0.16"):
        merged.check(0.14, "a")


def test_an_unknown_schema_names_the_fields_and_the_schemas(tmp_path):
    path = write(tmp_path / "a.jsonl", b"oops\n" + as_lines([{"question": "a", "reply": "b"}] * 300))
    with pytest.raises(UserError, match=r"fields are 'question', 'reply'.*preference \(prompt, chosen, rejected\).*hh"):
        read(path)


def test_the_schema_is_that_of_most_records_not_of_the_first(tmp_path):
    spoiled = [{"prompt": "a", "chosen": "b"}, {"chosen": "c", "rejected": "d"}]
    records, report = read(write(tmp_path / "a.jsonl", as_lines(spoiled + ROWS)), eval_share=1e-9)
    assert len(records) == 40
    assert [(count.count, count.first) for count in report.bad.values()] == [(1, "a.jsonl:1"), (1, "a.jsonl:2")]


def test_a_schema_that_is_named_is_not_guessed(tmp_path):
    path = write(tmp_path / "a.jsonl", as_lines(ROWS))
    records, _ = read(path, schema="prompt")
    assert isinstance(records[0], PromptRecord)
    with pytest.raises(UserError, match="missing field 'messages'"):
        read(path, schema="messages")


@pytest.mark.parametrize(
    "path", ["", "no/such/file.jsonl", "missing.parquet", "/nowhere", "a b c", "../x", "task:safety", "x.jsonl:y"]
)
def test_a_path_that_is_nothing_is_one_line(path):
    with pytest.raises(UserError, match=r"config\.data\.path") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_hub_data_set_that_cannot_be_had_is_one_line():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"'someorg/somedata'.*network") as error:
        read("someorg/somedata")
    assert "\n" not in str(error.value)


def test_hub_names_carry_configuration_and_folder(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, _ = read("org/data", split="test", eval_share=0.01)
    read("org/data:pairs")
    read("org/data/harmless-base")
    assert records[0].source == "org/data[test]:0"
    assert asked == [
        (("org/data", None), {"data_dir": None, "split": "test"}),
        (("org/data", "pairs"), {"data_dir": None, "split": "train"}),
        (("org/data", None), {"data_dir": "harmless-base", "split": "train"}),
    ]


def damaged(name):
    content = as_lines(ROWS)
    return {
        "cut.jsonl.gz": gzip.compress(content)[:-20],
        "wrong.jsonl.gz": content,
        "flipped.jsonl.gz": gzip.compress(content)[:40] + b"\x00" * 40 + gzip.compress(content)[80:],
        "empty.jsonl.gz": b"",
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \n",
        "empty.json": b"",
        "list.json": b"[]",
        "open.json": json.dumps(ROWS).encode()[:-9],
        "scalars.json": b"[1, 2, null]",
        "binary.jsonl": random.Random(0).randbytes(5000),
        "binary.json": b"[" + random.Random(0).randbytes(5000),
        "empty.parquet": b"",
        "binary.parquet": b"PAR1" + random.Random(0).randbytes(500) + b"PAR1",
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *("cut.jsonl.gz", "wrong.jsonl.gz", "flipped.jsonl.gz", "empty.jsonl.gz", "empty.jsonl", "blank.jsonl"),
        *("empty.json", "list.json", "open.json", "scalars.json", "binary.jsonl", "binary.json"),
        *("empty.parquet", "binary.parquet"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(damaged(name))
    with pytest.raises(UserError, match=name.split(".")[0]) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no file that ends in \.jsonl"):
        read(tmp_path)


def test_random_bytes_in_a_file_never_crash(tmp_path):
    rng = random.Random(1)
    content = as_lines(ROWS * 3)
    for _ in range(150):
        spoiled = bytearray(content)
        for _ in range(rng.randint(1, 30)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        records, report = read(write(tmp_path / "a.jsonl", bytes(spoiled)), max_bad_share=1.0)
        bad = sum(count.count for count in report.bad.values())
        assert report.total == len(records) + report.other_side + bad


def test_real_transcripts_are_read(shared_data):
    config = DataConfig(path=str(shared_data / "hh_harmless_base_test.jsonl.gz"), max_eval_records=None)
    train, report = read_records(config)
    held_out, _ = read_records(config, held_out=True)
    assert report.total == 2312
    assert len(train) + len(held_out) == 2303
    assert {reason: count.count for reason, count in report.bad.items()} == {
        "a turn of the transcript is empty": 4,
        "the transcripts differ before the last turn": 5,
    }
    assert 0.03 < len(held_out) / 2303 < 0.07
    for record in train + held_out:
        assert record.prompt[-1].role == "user"
        assert "\n\nHuman:" not in record.chosen + record.rejected


def test_real_pairs_are_read(shared_data):
    for name, count in (("pandalm_pairs.jsonl", 836), ("realsumm_pairs.jsonl.gz", 2817)):
        config = DataConfig(path=str(shared_data / name), max_eval_records=None)
        train, report = read_records(config)
        held_out, _ = read_records(config, held_out=True)
        assert (len(train) + len(held_out), report.total, report.bad) == (count, count, {})
        assert not {record.prompt for record in train} & {record.prompt for record in held_out}


def test_real_prompts_survive_the_tokenizer(shared_data, smollm2_tokenizer):
    from jaxrm.data.templates import encode_prompt

    config = DataConfig(path=str(shared_data / "hh_harmless_base_test.jsonl.gz"), max_records=200)
    for record in read_records(config)[0]:
        text = smollm2_tokenizer.decode(encode_prompt(smollm2_tokenizer, record.prompt, "auto"))
        expected = "".join(f"<|im_start|>{m.role}\n{m.content.strip()}<|im_end|>\n" for m in record.prompt)
        assert text.endswith(expected + "<|im_start|>assistant\n")


def test_the_data_path_needs_no_jax_torch_grain_or_datasets():
    code = "import sys, pkgutil, importlib, jaxrm.data\n"
    code += "for m in pkgutil.walk_packages(jaxrm.data.__path__, 'jaxrm.data.'): importlib.import_module(m.name)\n"
    code += "assert 'jaxrm.data.loader' in sys.modules\n"
    code += "print([m for m in ('jax', 'torch', 'grain', 'datasets', 'transformers', 'pyarrow') if m in sys.modules])"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "openai/summarize_from_feedback:comparisons",
            RuntimeError("Dataset scripts are no longer supported, but found summarize_from_feedback.py"),
            "is made by a loading script, .* e.g. --config.data.path=openai/summarize_from_feedback/comparisons "
            "--config.data.revision=refs/convert/parquet, or its files, e.g. --config.data.path=pairs.jsonl",
        ),
        (
            "org/data",
            ValueError("Unknown split \"train\". Should be one of ['validation', 'test']."),
            "has no split 'train', but 'validation', 'test'; .* e.g. --config.data.split=validation",
        ),
        (
            "org/data",
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
            r"has several configurations .*\['a', 'b'\].* e.g. --config.data.path=org/data:a$",
        ),
    ],
)
def test_what_the_hub_refuses_says_what_to_give_instead(monkeypatch, path, error, message):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=message) as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def test_a_revision_is_handed_to_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append(kwargs)
        rows = [{**row, "prompt": f"{kwargs['split']} {row['prompt']}"} for row in ROWS]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, _ = read("org/data", revision="1.0", eval_split="test")
    assert [(call["split"], call["revision"]) for call in asked] == [("test", "1.0"), ("train", "1.0")]
    assert len(train) == 40
    with pytest.raises(UserError, match="would be trained on and held out"):
        read("org/data", eval_split="train")


def test_fields_that_are_not_read_are_named_once(tmp_path):
    odd = {"passage": "a long text about rivers", "source": "a name of many words", "id": "x y z w v", "notes": "short"}
    rows = [{**row, **odd, "echo": f" {row['prompt']}"} for row in ROWS]
    _, report = read(write(tmp_path / "a.jsonl", as_lines(rows)))
    assert ("fields with text that is not read", 1, "passage") in report.rows()
    _, report = read(write(tmp_path / "b.jsonl", as_lines(ROWS)))
    assert report.notes == {}
    _, report = read(write(tmp_path / "c.jsonl", as_lines([{**row, "system": "be brief"} for row in ROWS])))
    assert report.rows()[-1] == ("fields read as system text or earlier turns", 1, "system")


def test_many_files_are_named_by_their_number_and_first(tmp_path):
    write(tmp_path / "part-0.jsonl", as_lines(ROWS[:20]))
    write(tmp_path / "part-1.jsonl", as_lines(ROWS[20:]))
    _, report = read(tmp_path)
    assert report.rows()[-1] == ("files", 2, "part-0.jsonl")


def test_unwanted_responses_of_a_table_are_counted(tmp_path):
    path = write(tmp_path / "labels.csv", b"prompt,completion,label\nhi,good,True\nhi,bad,False\nhi,ugly,?\n")
    config = DataConfig(path=path, eval_path=path, max_bad_share=1.0)
    records, report = read_records(config, held_out=True)
    assert [record.response for record in records] == ["good"]
    assert [(reason[:24], bad.first) for reason, bad in report.bad.items()] == [
        ("'label' is False: its re", "labels.csv:3"),
        ("'label' is not true or f", "labels.csv:4"),
    ]
