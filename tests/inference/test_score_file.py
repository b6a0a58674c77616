"""Which records of a file are scored: those that a run held out are found as the run read them."""

import json

import pytest

from jaxrm.data.config import DataConfig
from jaxrm.data.readers import read_records
from jaxrm.inference import score_file
from jaxrm.inference.score_file import read_records_to_score

PAIRS = [{"prompt": f"why {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(60)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def check_sides(data, path):
    """The records that are scored are those that training held out, and none that it learned."""
    trained, expected = read_records(data)[0], read_records(data, held_out=True)[0]
    scored = read_records_to_score(path, data, True, None).records
    assert 0 < len(scored) < len(trained)
    assert [(record.prompt, record.chosen) for record in scored] == [(r.prompt, r.chosen) for r in expected]
    assert not {record.prompt for record in scored} & {record.prompt for record in trained}


def test_held_out_records_are_read_in_the_schema_of_the_run(tmp_path):
    """These rows are comparisons of summaries to `auto`, with prompts of another hash."""
    summaries = {"summaries": [{"text": "short"}, {"text": "long"}], "choice": 0}
    rows = [{**row, **summaries, "info": {"article": f"article {i}"}} for i, row in enumerate(PAIRS)]
    path = write(tmp_path / "pairs.jsonl", rows)
    check_sides(DataConfig(path=path, schema="preference", eval_share=0.3), path)


def test_held_out_records_are_of_the_split_of_the_run(tmp_path):
    """The side of a prompt is that of its first spelling, which here is of another split."""
    unlike = [{**row, "prompt": row["prompt"].upper(), "split": "train_gen"} for row in PAIRS]
    path = write(tmp_path / "pairs.jsonl", [*unlike, *({**row, "split": "train_sft"} for row in PAIRS)])
    data = DataConfig(path=path, split="train_sft", eval_share=0.3)
    check_sides(data, path)
    (tmp_path / "copies").mkdir()
    copy = tmp_path / "copies" / "copy.jsonl"
    copy.write_bytes((tmp_path / "pairs.jsonl").read_bytes())
    check_sides(data, str(copy))


def test_held_out_records_of_a_folder_are_of_its_split(tmp_path):
    write(tmp_path / "train_gen.jsonl", [{**row, "prompt": row["prompt"].upper()} for row in PAIRS])
    file = write(tmp_path / "train_sft.jsonl", PAIRS)
    data = DataConfig(path=str(tmp_path), split="train_sft", eval_share=0.3)
    check_sides(data, str(tmp_path))
    check_sides(data, file)  # which has no field that says its split


@pytest.mark.parametrize(("path", "revision"), [("org/name", "v1"), ("org/other", None)])
def test_held_out_records_of_the_hub_are_of_its_revision(monkeypatch, path, revision):
    sections = []
    monkeypatch.setattr(score_file, "read_records", lambda section, **_: (sections.append(section), None))
    data = DataConfig(path="org/name", revision="v1", split="train_prefs", schema="hh")
    read_records_to_score(path, data, True, 7)
    [section] = sections
    assert (section.revision, section.split, section.schema) == (revision, "train_prefs", "hh")
    assert (section.path, section.eval_path, section.max_eval_records) == (path, None, 7)


def test_a_whole_file_is_read_in_the_schema_of_its_own(tmp_path):
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    data = DataConfig(path="transcripts.jsonl", schema="hh", split="train_sft", revision="v1")
    assert len(read_records_to_score(path, data, False, None).records) == len(PAIRS)
