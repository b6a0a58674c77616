"""Rows, files and folders that nobody thought of: used with all of their text, counted with a reason, or one line."""

import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import fuzz

from jaxrm.data.config import SCHEMAS, DataConfig
from jaxrm.data.examples import tokenize_demonstrations
from jaxrm.data.pair_examples import comparison_examples, mapping_examples
from jaxrm.data.pairs import correction_request, tokenize_pairs
from jaxrm.data.prompts import tokenize_prompts
from jaxrm.data.readers import read_records
from jaxrm.data.records import DemonstrationRecord, PreferenceRecord, as_demonstration
from jaxrm.data.schemas import BadRecordError, parse, recognize
from jaxrm.errors import UserError

WORDS = ["why", "oui", "salut", "stone", "{", "[INST]", "<|im_end|>", "é", "日本", "\u200b", "\x00", "\ud800", "Human:"]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
spaces = st.sampled_from(["", " ", "\n", "\r\n", "\t", "\u00a0"])
texts = st.one_of(words, st.tuples(spaces, words, spaces).map("".join), spaces, st.text(max_size=12))
turns = st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), texts), max_size=4)
transcripts = turns.map(lambda pairs: "".join(f"\n\n{name}: {text}" for name, text in pairs))
roles = st.sampled_from(["system", "user", "assistant", "tool", "", None])
parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": texts}), max_size=2)
message = st.fixed_dictionaries({"role": roles, "content": st.one_of(texts, parts, st.none())})
dialogues = st.lists(message, max_size=4)
alternating = st.lists(words, min_size=1, max_size=4).map(
    lambda contents: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
)
history = st.lists(st.lists(st.one_of(words, st.none()), max_size=3), max_size=3)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
values = st.one_of(words, texts, transcripts, alternating, dialogues, history, json_values)
NAMES = [
    *("prompt", "question", "instruction", "input", "system", "system_prompt", "history", "context", "messages"),
    *("chosen", "rejected", "response", "completion", "output", "response_0", "response_1", "better_response_id"),
    *("info", "summaries", "choice", "tools", "images", "documents", "id", "source", "split", "score"),
]
REQUIRED = [
    *(("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("messages",), ("prompt", "response"), ("prompt",)),
    *(("instruction", "output"), ("question", "chosen", "rejected"), ("prompt", "response_0", "response_1")),
]
CONTEXT = ("prompt", "question", "instruction", "input", "system", "system_prompt", "history", "context", "documents")
RESPONSES = {
    "preference": ("chosen", "rejected"),
    "hh": ("chosen", "rejected"),
    "ultrafeedback": ("chosen", "rejected"),
    "messages": ("messages",),
    "pku_safe_rlhf": ("response_0", "response_1"),
}


@st.composite
def rows(draw):
    """A row near one of the schemas: its required fields, perhaps some others, of values that often fit."""
    names = [*draw(st.sampled_from(REQUIRED)), *draw(st.lists(st.sampled_from(NAMES), max_size=2))]
    kind = draw(st.sampled_from([words, words, transcripts, alternating, values]))
    row = {name: draw(kind if name not in ("history", "system") else values) for name in names}
    return row | ({"better_response_id": draw(st.sampled_from([0, 1, "1", 2]))} if "response_0" in row else {})


def leaves(value, *, is_content=True):
    """Texts in a value, without roles and types."""
    if isinstance(value, str):
        return [value] if is_content else []
    if isinstance(value, list):
        return [text for part in value for text in leaves(part)]
    if isinstance(value, dict):
        return [text for name, part in value.items() for text in leaves(part, is_content=name not in ("role", "type"))]
    return []


def all_text(record):
    messages = record.messages if isinstance(record, DemonstrationRecord) else record.prompt
    sides = (record.chosen, record.rejected) if isinstance(record, PreferenceRecord) else ()
    return "\n".join([*(message.content for message in messages), *sides])


@fuzz
@given(st.one_of(rows(), st.dictionaries(st.sampled_from(NAMES), values, max_size=5), json_values))
def test_fuzz_rows_are_used_with_all_their_text(row):
    """Every word of a field that a schema reads is in the record."""
    recognized = recognize(row) if isinstance(row, dict) else None
    for schema in SCHEMAS[1:]:
        try:
            record = parse(schema, row, "f:1", "better_response_id")
        except BadRecordError as error:
            assert str(error) and "\n" not in str(error)
            continue
        all_text(record).encode("utf-8")
        written = " ".join(all_text(record).split())
        for name in (*CONTEXT, *RESPONSES.get(schema, ())):
            for text in leaves(row.get(name)):
                for word in re.sub(r"(Human|Assistant):", " ", text).split():
                    assert word in written, (schema, name)
        assert record.prompt and all(message.content.strip() for message in record.prompt)
    assert recognized is None or recognized in SCHEMAS


def written(folder, rows):
    file = Path(folder) / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), errors="surrogatepass")
    return str(file)


def accounted(report):
    return report.total == report.used + report.other_side + sum(entry.count for entry in report.bad.values())


GOOD = [{"prompt": f"why {i}?", "chosen": "oui", "rejected": "salut"} for i in range(4)]


@fuzz
@given(st.lists(st.one_of(rows(), json_values), max_size=6), st.sampled_from(SCHEMAS))
def test_fuzz_rows_go_through_every_stage(tmp_path_factory, chatml_tokenizer, odd, schema):
    """A reader, then the tokenization of each kind of stage: values, or one line."""
    path = written(tmp_path_factory.getbasetemp(), [*GOOD, *odd, *GOOD[:1]])
    config = DataConfig(path=path, schema=schema, max_length=64, max_bad_share=1.0, eval_share=0.3)
    for held_out in (False, True):
        try:
            records, report = read_records(config, held_out=held_out)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert accounted(report)
        prompts, report = tokenize_prompts(records, chatml_tokenizer, "auto", 40)
        assert len(prompts) == report.used and accounted(report)
        try:
            demonstrations = [as_demonstration(record) for record in records]
            assert accounted(tokenize_demonstrations(demonstrations, chatml_tokenizer, config)[1])
            pairs, report = tokenize_pairs(records, chatml_tokenizer, config)
            assert len(pairs) == report.used and accounted(report)
            request = correction_request(chatml_tokenizer, "auto", "better")
            assert accounted(mapping_examples(pairs, request, config, first_id=None)[1])
            assert accounted(comparison_examples(pairs, config, first_id=None)[1])
        except UserError as error:
            assert "\n" not in str(error)


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", content)
    return buffer.getvalue()


def of_columns(name):
    """The same rows in a format of Arrow."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    if name.endswith(".zst"):
        return pyarrow.Codec("zstd").compress(LINES, asbytes=True)
    table, sink = pyarrow.Table.from_pylist(GOOD * 4), pyarrow.BufferOutputStream()
    if name.endswith(".parquet"):
        parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


LINES = "".join(json.dumps(row) + "\n" for row in GOOD * 4).encode()
TABLE = b"prompt,chosen,rejected\n" + b'why?,"o, ui",salut\n' * 9
KINDS = {
    "a.jsonl": LINES,
    "a.json": json.dumps(GOOD, indent=1).encode(),
    "b.json": json.dumps({"data": GOOD}).encode(),
    "c.json": json.dumps({name: [row[name] for row in GOOD] for name in GOOD[0]}).encode(),
    "a.csv": TABLE,
    "a.tsv": TABLE.replace(b",", b"\t"),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.csv.bz2": bz2.compress(TABLE),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.zip": zipped(LINES),
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "a.parquet": None,
    "a.arrow": None,
    "a.jsonl.zst": None,
}
edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "insert", "drop"]), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=5,
)


@fuzz
@given(st.sampled_from(sorted(KINDS)), edits, st.one_of(st.none(), st.binary(max_size=300)))
def test_fuzz_bytes_of_files_never_crash(tmp_path_factory, name, edits, instead):
    content = bytearray(of_columns(name) if KINDS[name] is None else KINDS[name])
    for where, edit, change in edits:
        place = int(where * len(content))
        if edit == "flip" and place < len(content):
            content[place : place + len(change)] = bytes(
                a ^ b for a, b in zip(content[place : place + len(change)], change, strict=False)
            )
        elif edit == "cut":
            del content[place:]
        elif edit == "insert":
            content[place:place] = change
        else:
            del content[place : place + len(change)]
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(instead if instead is not None else bytes(content))
    try:
        records, report = read_records(DataConfig(path=str(file), max_bad_share=1.0, eval_share=1e-9))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(records) == report.used and accounted(report)


HELD_OUT = ["test", "testing", "eval", "evaluation", "valid", "validation", "val", "dev", "heldout"]
name_words = st.sampled_from(["train", "training", "pairs", "backup", "old", "a", "0", "v2", "data", *HELD_OUT])
file_names = st.tuples(
    st.lists(name_words, max_size=1), st.lists(name_words, min_size=1, max_size=3), st.sampled_from(["_", "-", "."])
).map(lambda parts: "/".join([*parts[0], parts[2].join(parts[1]) + ".jsonl"]))


@fuzz
@given(st.lists(file_names, min_size=1, max_size=4, unique=True), st.sampled_from(["test", "validation", "train_a"]))
def test_fuzz_folders_never_train_on_what_is_held_out(tmp_path_factory, names, eval_split):
    folder = tmp_path_factory.mktemp("folder")
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": f"{number} {name}", "chosen": "a", "rejected": "b"}
        file.write_text(json.dumps(row) + "\n")
    for settings in ({"eval_share": 1e-9}, {"eval_split": eval_split}):
        sides = []
        for held_out in (False, True):
            try:
                records, _ = read_records(DataConfig(path=str(folder), **settings), held_out=held_out)
            except UserError as error:
                assert "\n" not in str(error)
            else:
                sides.append([record.prompt[0].content.split()[1] for record in records])
                if not held_out:
                    used = {word for name in sides[0] for word in re.findall(r"[a-z]+", name.removesuffix(".jsonl"))}
                    assert not used & set(HELD_OUT)
        if len(sides) == 2 and "eval_split" in settings:
            assert not set(sides[0]) & set(sides[1])
