"""Files that appear whole."""

import json

import pytest

from jaxrm import atomic


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.json"
    atomic.write_json(path, {"a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(path, {"a": 1, "b": float("nan")})
    assert json.loads(path.read_text()) == {"a": "ü"}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.txt"
    atomic.write_text(path, "old")
    with pytest.raises(KeyError), atomic.open_for_writing(path) as file:
        file.write("half")
        assert path.read_text() == "old" and any(atomic.is_unfinished(entry.name) for entry in tmp_path.iterdir())
        raise KeyError
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"] and path.read_text() == "old"


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "x.bin"
    with atomic.open_for_writing(path, "wb") as first:
        atomic.write_text(path, "second")
        first.write(b"first")
    assert path.read_bytes() == b"first"
