"""Files in the shapes, encodings and compressions that programs write: read whole, or one line on what to do."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import zipfile

import pytest

from jaxrm.data import files
from jaxrm.data.config import DataConfig
from jaxrm.data.readers import read_records
from jaxrm.errors import UserError

ROWS = [{"prompt": f'why {i},\n"so"; é?', "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


def table(delimiter, **settings):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, **settings)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def read(file, content=None, **settings):
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    records, report = read_records(DataConfig(path=str(file), **{"eval_share": 1e-9, **settings}))
    return [(r.prompt[-1].content, r.chosen, r.rejected) for r in records], report


def refused(file, content=None, **settings):
    with pytest.raises(UserError) as error:
        read(file, content, **settings)
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    return str(error.value)


SHAPES = {
    "lines": LINES,
    "blank lines": LINES.replace("\n", "\n\n \n"),
    "line ends of Windows": LINES.replace("\n", "\r\n"),
    "no end of the last line": LINES.rstrip(),
    "a list": json.dumps(ROWS),
    "a pretty list": json.dumps(ROWS, indent=4),
    "a list of lines": "[\n" + LINES.strip().replace("\n", ",\n") + "\n]\n",
    "objects in a row": PRETTY,
    "objects with commas": PRETTY.replace("}\n{", "},\n{"),
    "under data": json.dumps({"data": ROWS}),
    "under data, pretty": json.dumps({"version": "1", "data": ROWS}, indent=1),
    "under train": json.dumps({"train": ROWS, "test": ROWS[:3]}),
    "rows of the viewer": json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]}),
    "columns": json.dumps(COLUMNS),
    "columns, pretty": json.dumps(COLUMNS, indent=2),
    "columns of pandas": json.dumps({k: {str(i): v for i, v in enumerate(c)} for k, c in COLUMNS.items()}),
    "split of pandas": json.dumps({"columns": list(COLUMNS), "index": [], "data": [list(r.values()) for r in ROWS]}),
    "table of pandas": json.dumps({"schema": {"fields": [{"name": "prompt"}]}, "data": ROWS}),
    "by id": json.dumps({f"id-{i}": row for i, row in enumerate(ROWS)}),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_json_gives_the_same_records(tmp_path, shape, suffix):
    records, report = read(tmp_path / f"a{suffix}", SHAPES[shape])
    assert records == EXPECTED and not report.bad and report.total == 30


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("shape", ["lines", "a pretty list", "objects in a row", "columns"])
def test_encodings_with_a_mark_are_read(tmp_path, shape, encoding):
    assert read(tmp_path / "a.jsonl", SHAPES[shape].encode(encoding))[0] == EXPECTED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table(",")),
        ("a.csv", table(";")),
        ("a.csv", table(",", lineterminator="\n").replace("\n\"so", "\r\n\"so").replace("\r", "")),
        ("a.tsv", table("\t")),
        ("a.csv", table(",").encode("utf-8-sig")),
        ("a.csv", table(",").encode("utf-16")),
        ("a.csv.gz", gzip.compress(table(",").encode())),
        ("A.CSV.GZ", gzip.compress(table(",").encode())),
    ],
)  # fmt: skip
def test_tables_of_text_are_read(tmp_path, name, content):
    assert read(tmp_path / name, content)[0] == EXPECTED


def test_cells_of_a_table_may_hold_messages(tmp_path):
    dialogue = [[{"role": "user", "content": "why?"}, {"role": "assistant", "content": a}] for a in ("good", "bad")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["chosen", "rejected", "system"], [json.dumps(side) for side in dialogue] + [""]])
    assert read(tmp_path / "a.csv", text.getvalue())[0] == [("why?", "good", "bad")]
    pku = "prompt,response_0,response_1,better_response_id\nwhy?,bad,[good],1\n"
    assert read(tmp_path / "b.csv", pku)[0] == [("why?", "[good]", "bad")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('prompt,chosen,rejected\n"why?,a,b\nc,d,e\n', "no CSV"),
        ('prompt,chosen,rejected\n"why"?,a,b\n', "no CSV"),
        ("prompt,chosen,prompt\nwhy?,a,b\n", "names a column twice"),
        ("prompt,chosen,rejected\nwhy?,a\n", "another number of cells than the header"),
        ("why?,a,b\nhow?,c,d\n", "no known schema: its fields are 'why?', 'a', 'b'"),
        ("", "no usable records"),
    ],
)
def test_a_table_that_is_none_is_one_line(tmp_path, content, message):
    """An open quote swallows the rest of the file otherwise."""
    assert message in refused(tmp_path / "a.csv", content)


def packed(name, content):
    if name.endswith(".zip"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("folder/a.jsonl", content)
            archive.writestr("__MACOSX/folder/._a.jsonl", b"x")
            archive.writestr("README.md", b"x")
        return buffer.getvalue()
    if name.endswith(".zst"):
        pyarrow = pytest.importorskip("pyarrow")
        return pyarrow.Codec("zstd").compress(content, asbytes=True)
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[name.rpartition(".")[2]](content)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.zip", "a.json.gz"])
def test_compressed_files_are_read(tmp_path, name):
    content = (json.dumps(ROWS) if ".json." in name else LINES).encode()
    assert read(tmp_path / name, packed(name, content))[0] == EXPECTED
    assert read(tmp_path / "plain.jsonl", packed(name, content))[0] == EXPECTED  # its first bytes say it
    assert "a." in refused(tmp_path / name, packed(name, content)[:-12])


def test_arrow_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    data = pyarrow.Table.from_pylist(ROWS)
    for name, opener in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with opener(str(tmp_path / name), data.schema) as writer:
            writer.write_table(data)
        assert read(tmp_path / name)[0] == EXPECTED
    assert "not a readable table" in refused(tmp_path / "stream.arrow", (tmp_path / "stream.arrow").read_bytes()[:300])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a pointer of Git LFS"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        ("a.xlsx", b"PK\x03\x04", "is a workbook; save its sheet as a table of text, e.g. pairs.csv"),
        ("a.jsonl", "<!DOCTYPE html>\n<html></html>", "is a web page"),
        ("a.jsonl", "prompt,chosen\na,b\n", "invalid JSON (2, first at a.jsonl:1); write one JSON object a line"),
        ("a.jsonl", "caf\xe9\n".encode("latin1"), "e.g. iconv -f latin1 -t utf-8"),
        ("a.jsonl", '"a"\n"b"\n', "not an object with fields"),
        ("a.json", '{"train": [{"prompt": "a"}], "dev": [{"prompt": "a"}]', "invalid JSON (1, first at a.json:1)"),
        ("a.json", '{"preferences": [{"a": 1}], "comments": [{"a": 1}]}', "records under 'preferences', 'comments'"),
        ("a.json", '{"test": [{"prompt": "a"}]}', "records under 'test', and none is the split 'train'"),
        ("a.json", '[{"prompt": "a"}, {"prompt": "b"', "invalid JSON in record 2"),
        ("a.json", '[{"prompt": "a"},', "the list breaks off after 1 records"),
        ("a.json", "[" * 100_000, "invalid JSON"),
        ("a.jsonl", "{'prompt': 'a'}\n{'prompt': 'b'}\n", "invalid JSON"),
        ("a.zip", packed("a.zip", b"").replace(b"README.md", b"ab.jsonl_"), ""),
    ],
)
def test_a_file_of_another_shape_says_what_to_do(tmp_path, name, content, message):
    assert message in refused(tmp_path / name, content)


def test_a_split_inside_a_file_is_chosen_by_its_name(tmp_path):
    content = json.dumps({"train": ROWS, "validation": ROWS[:4]})
    (tmp_path / "a.json").write_text(content)
    config = DataConfig(path=str(tmp_path / "a.json"), eval_split="validation")
    assert len(read_records(config)[0]) == 30
    assert len(read_records(config, held_out=True)[0]) == 4
    assert "none is the split 'test'" in refused(tmp_path / "a.json", split="test")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.csv.gz", "a.zip", "a.jsonl"])
def test_a_record_has_a_limit_of_its_own(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 2**20)
    monkeypatch.setattr(files, "_MAX_VALUE_BYTES", 2**20)
    row = json.dumps({**ROWS[0], "chosen": "x" * 2**21})
    content = {"a.json.gz": f"[{row}]", "a.csv.gz": f"prompt,chosen,rejected\nwhy,{'x' * 2**21},no\n"}.get(name, row)
    content = content.encode() if name == "a.jsonl" else packed(name, content.encode())
    assert "has more than 1 MiB" in refused(tmp_path / name, content)


def test_a_record_of_a_table_of_columns_has_a_limit(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 2**20)
    rows = [*ROWS[:7], {**ROWS[7], "chosen": "x" * 2**21}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert "record 8 has more than 1 MiB" in refused(tmp_path / "a.parquet")


def test_little_memory_is_enough_for_a_packed_bomb(tmp_path):
    """A gigabyte of one line in a megabyte."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b'{"prompt": "')
        for _ in range(256):
            file.write(b"x" * 2**22)
    code = (
        "import resource, sys\n"
        "from jaxrm.data.config import DataConfig\nfrom jaxrm.data.readers import read_records\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_records(DataConfig(path=sys.argv[1]))\n"
        "except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl.gz")]
    message, used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "line 1 has more than 16 MiB" in message
    assert int(used) < 150 * 1024  # KiB


def test_a_file_that_vanishes_or_is_a_folder_is_one_line(tmp_path):
    from jaxrm.data.sources import DataFile, Place

    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be read to its end"):
            list(files.file_rows(DataFile(path, path.name), Place(str(path), None)))
