"""Rows that are added block by block."""

from jaxrm.runtime.row_log import RowLog


def test_a_row_that_was_cut_short_is_written_again(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    log = RowLog(path)
    log.append([{"n": 0}, {"n": 1}])
    with path.open("ab") as file:
        file.write(b'{"n": 2, "te')
    again = RowLog(path)
    assert again.rows == [{"n": 0}, {"n": 1}]
    again.append([{"n": 2}])
    assert path.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n' and RowLog(path).rows == again.rows


def test_a_first_row_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n"')
    RowLog(path).append([{"n": 0}])
    assert path.read_text() == '{"n": 0}\n'
