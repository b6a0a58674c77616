"""What a path and a split mean: the files that their names promise, or one line with the choices."""

import json
import os
import shlex

import pytest

from jaxrm.data import split_names
from jaxrm.data.config import DataConfig
from jaxrm.data.readers import read_records
from jaxrm.errors import UserError


def make(folder, *names):
    """Files of ten records each; a record's prompt begins with the name of its file."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"{name} {i}?", "chosen": "a", "rejected": "b"} for i in range(10)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def names(path, held_out=False, **settings):
    """The files that records come from."""
    records, _ = read_records(DataConfig(path=str(path), **settings), held_out=held_out)
    return list(dict.fromkeys(record.prompt[0].content.split()[0] for record in records))


def refused(path, held_out=False, **settings):
    with pytest.raises(UserError) as error:
        read_records(DataConfig(path=str(path), **settings), held_out=held_out)
    assert "\n" not in str(error.value) and "e.g. --config.data." in str(error.value)
    return str(error.value)


def typed(message):
    """The field and the value that a message says to type."""
    first = shlex.split(message[message.index("e.g. --config.data.") + 5 :].replace(", or", " or"))[0]
    return dict([first.removeprefix("--config.data.").split("=")])


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["hh_train.jsonl", "hh_test.jsonl"], ["hh_train.jsonl"], ["hh_test.jsonl"]),
        (["train/part-0.jsonl", "test/part-0.jsonl"], ["train/part-0.jsonl"], ["test/part-0.jsonl"]),
        (["data/hhTrain.jsonl", "data/hhTest.jsonl"], ["data/hhTrain.jsonl"], ["data/hhTest.jsonl"]),
        (["TRAIN.jsonl", "Test.jsonl", "dev.jsonl"], ["TRAIN.jsonl"], ["Test.jsonl"]),
        (["split=train/0.jsonl", "split=test/0.jsonl"], ["split=train/0.jsonl"], ["split=test/0.jsonl"]),
        (["trainset.jsonl", "evaluation.jsonl"], ["trainset.jsonl"], ["evaluation.jsonl"]),
        (["a/train.jsonl", "b/train.jsonl", "b/test.jsonl"], ["a/train.jsonl", "b/train.jsonl"], ["b/test.jsonl"]),
        (["train.jsonl", "test.jsonl", "extra.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"], ["test/a.jsonl"]),
        (
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            ["data/test-00000-of-00001.jsonl"],
        ),
    ],
)
def test_names_of_files_and_folders_say_the_split(tmp_path, files, train, test):
    path = make(tmp_path, *files)
    assert names(path, eval_split="test") == train == names(path)
    assert names(path, held_out=True, eval_split="test") == test


def test_another_word_for_a_split_is_understood(tmp_path):
    path = make(tmp_path, "train.jsonl", "valid.jsonl", "test.jsonl")
    assert names(path, held_out=True, eval_split="validation") == ["valid.jsonl"]
    assert names(path, held_out=True, eval_split="dev") == ["valid.jsonl"]
    assert names(path, held_out=True, eval_split="eval") == ["test.jsonl"]


@pytest.mark.parametrize(
    "files",
    [
        ["train.jsonl", "train_backup.jsonl"],
        ["train.jsonl", "old_train.jsonl"],
        ["train.jsonl", "train.jsonl.gz"],
        ["train.jsonl", "train (1).jsonl"],
        ["train_v1.jsonl", "train_v2.jsonl"],
        ["train.jsonl", "train-00000-of-00001.jsonl"],
        ["train.jsonl", "train/part-0.jsonl"],
        ["train.jsonl", "archive/train.jsonl"],
        ["a/train.jsonl", "a_backup/train.jsonl"],
        ["train_prefs.jsonl", "train_sft.jsonl"],
        ["pairs.jsonl", "pairs_backup.jsonl"],
        ["pairs.jsonl", "pairs.csv"],
        ["pairs.jsonl", "pairs.json"],
        ["train_1k.jsonl", "train_10k.jsonl"],
    ],
)
def test_a_folder_that_gives_two_answers_is_refused(tmp_path, files):
    """What the message says to type works."""
    path = make(tmp_path, *files)
    message = refused(path)
    assert all(name in message for name in files)
    chosen = typed(message)["path"]
    if chosen.endswith("jsonl"):
        assert len(names(chosen, eval_share=1e-9)) == 1


def test_the_same_file_under_two_names_is_refused(tmp_path):
    path = make(tmp_path, "a.jsonl", "b.jsonl")
    assert names(path, eval_share=1e-9) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert "several files that may be its data: a.jsonl, b.jsonl" in refused(path)


def test_the_file_that_is_proposed_goes_with_the_side(tmp_path):
    path = make(tmp_path, "train.jsonl", "validation.jsonl")
    assert typed(refused(path, held_out=True, eval_split="test"))["eval_path"].endswith("validation.jsonl")
    assert typed(refused(path, split="sft"))["path"].endswith("train.jsonl")


@pytest.mark.parametrize(
    "files",
    [
        ["hh_test.jsonl"],
        ["hh.jsonl", "hh_test.jsonl"],
        ["test/a.jsonl", "val/a.jsonl"],
        ["dev.jsonl"],
        ["train_test.jsonl"],
    ],
)
def test_nothing_that_is_called_held_out_is_trained_on(tmp_path, files):
    path = make(tmp_path, *files)
    message = refused(path)
    assert "there is no file of split 'train'" in message and all(name in message for name in files)
    explicit = f"{path}/{files[0]}"
    assert len(names(explicit, eval_share=1e-9)) == 1  # it was named


def test_a_lost_part_of_a_split_is_named(tmp_path):
    path = make(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    message = refused(path)
    assert "has no 'train-00001-of-00003.jsonl'" in message
    pattern = typed(message)["path"]
    assert names(pattern, eval_share=1e-9) == ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"]


def test_a_pattern_names_files_itself(tmp_path):
    path = make(tmp_path, "a_train.jsonl", "b_train.jsonl", "b_test.jsonl", "pairs.jsonl", "pairs_more.jsonl")
    assert names(f"{path}/*.jsonl", eval_share=1e-9) == ["a_train.jsonl", "b_train.jsonl"]
    assert names(f"{path}/*.jsonl", held_out=True, eval_split="test") == ["b_test.jsonl"]
    assert names(f"{path}/pairs*", eval_share=1e-9) == ["pairs.jsonl", "pairs_more.jsonl"]
    assert names(f"{path}/*test*.jsonl", eval_share=1e-9) == ["b_test.jsonl"]
    assert names(f"{path[:-1]}?/**/a_*.jsonl", eval_share=1e-9)[0].endswith("a_train.jsonl")
    assert "no file that ends in .jsonl" in refused(f"{path}/none*.jsonl")


@pytest.mark.parametrize("field", ["split", "eval_split"])
def test_a_split_of_one_file_selects_by_its_field_or_is_refused(tmp_path, field):
    """Fifty records were trained on and the same fifty held out."""
    path = make(tmp_path, "pairs.jsonl") + "/pairs.jsonl"
    held_out = field == "eval_split"
    message = refused(path, held_out=held_out, **{field: "test"})
    assert f"config.data.{field} is 'test', but config.data.path" in message and "is one file" in message
    refused(path, **{field: "test"})
    rows = [
        {"prompt": f"{s} {i}?", "chosen": "a", "rejected": "b", "split": s} for i in range(10) for s in ("train", "dev")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert names(path, eval_split="validation") == ["train"]
    assert names(path, held_out=True, eval_split="validation") == ["dev"]
    assert names(path, split="dev") == ["dev"]
    assert "no usable records" in refused(path, split="test")
    _, report = read_records(DataConfig(path=path))
    assert ("train, dev" in str(report.rows())) or ("dev, train" in str(report.rows()))


def test_the_same_records_on_both_sides_are_refused(tmp_path):
    path = make(tmp_path, "train.jsonl", "test.jsonl")
    for settings in ({"eval_path": path, "eval_split": "train"}, {"eval_split": "train"}, {"eval_split": "training"}):
        assert "would be trained on and held out" in refused(path, **settings)
    link = tmp_path / "elsewhere.jsonl"
    link.symlink_to(tmp_path / "train.jsonl")
    for file in (f"{path}/train.jsonl", str(link)):
        _, report = read_records(DataConfig(path=path, eval_path=file))
        assert ("prompts that are held out too", 10, "train.jsonl:1") in report.rows()


def test_prompts_on_both_sides_of_given_files_are_counted(tmp_path):
    path = make(tmp_path, "train.jsonl")
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[2:5]).replace("?", "? "))
    _, report = read_records(DataConfig(path=f"{path}/train.jsonl", eval_path=f"{path}/other.jsonl"))
    assert ("prompts that are held out too", 3, "train.jsonl:3") in report.rows()
    assert report.used == 10


def test_a_folder_of_held_out_records_needs_no_split(tmp_path):
    path = make(tmp_path, "train.jsonl", "held/part-0.jsonl", "held/part-1.jsonl", "both/train.jsonl", "both/dev.jsonl")
    settings = {"held_out": True, "eval_path": f"{path}/held"}
    assert len(names(f"{path}/train.jsonl", **settings)) == 2
    message = refused(f"{path}/train.jsonl", held_out=True, eval_path=f"{path}/both")
    assert "has several splits: dev.jsonl, train.jsonl" in message and typed(message)["eval_path"].endswith("dev.jsonl")


def test_metadata_beside_the_data_is_not_read(tmp_path):
    path = make(tmp_path, "pairs.json")
    for name in ("dataset_info.json", "dataset_infos.json", "config.json"):
        (tmp_path / name).write_text('{"features": {}, "splits": {}}')
    (tmp_path / "README.md").write_text("# pairs")
    assert names(path) == ["pairs.json"]


def test_links_are_followed_once(tmp_path):
    path = make(tmp_path / "data", "part-0.jsonl")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again.jsonl").symlink_to(tmp_path / "data" / "part-0.jsonl")
    make(tmp_path / "far", "part-1.jsonl")
    (tmp_path / "data" / "far").symlink_to(tmp_path / "far")
    records, _ = read_records(DataConfig(path=path, eval_share=1e-9))
    assert len(records) == 20
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.jsonl is a link to a file that is not there"):
        read_records(DataConfig(path=path))


@pytest.mark.parametrize(
    "path", ["~nobody-of-this-name/a.jsonl", "a\0b.jsonl", "x" * 5000, "[", "**a/*.jsonl", "a/**b"]
)
def test_a_path_that_cannot_be_looked_up_is_one_line(path):
    with pytest.raises(UserError, match=r"config\.data\.path|there is no file") as error:
        read_records(DataConfig(path=path))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_the_right_to_look_is_one_line(tmp_path):
    make(tmp_path, "a/b.jsonl")
    (tmp_path / "a").chmod(0)
    assert "cannot be read" in refused(tmp_path)


def test_a_revision_goes_with_the_hub_alone(tmp_path):
    path = make(tmp_path, "pairs.jsonl")
    assert "config.data.revision is 'main', but config.data.path" in refused(path, revision="main")


def test_saved_data_sets_are_read_by_their_splits(tmp_path):
    datasets = pytest.importorskip("datasets")

    def rows(name):
        return datasets.Dataset.from_list(
            [{"prompt": f"{name} {i}?", "chosen": "a", "rejected": "b"} for i in range(9)]
        )

    splits = {name: rows(name) for name in ("train", "validation", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "dict"))
    assert names(tmp_path / "dict") == ["train"]
    assert names(tmp_path / "dict", held_out=True, eval_split="test") == ["test"]
    assert names(tmp_path / "dict", held_out=True, eval_split="dev") == ["validation"]
    assert "has the splits train, validation, test" in refused(tmp_path / "dict", eval_split="heldout")
    assert names(tmp_path / "dict" / "test", eval_share=1e-9) == ["test"]
    rows("all").save_to_disk(str(tmp_path / "one"), num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"left over")
    records, _ = read_records(DataConfig(path=str(tmp_path / "one"), eval_share=1e-9))
    assert len(records) == 9
    assert "is one saved split" in refused(tmp_path / "one", held_out=True, eval_split="test")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        read_records(DataConfig(path=str(tmp_path / "one")))


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "seen*.jsonl"
  - split: test
    path: ["unseen.jsonl"]
---
# Pairs
"""


def test_the_splits_that_a_readme_declares_are_those_read(tmp_path):
    path = make(tmp_path, "seen_1.jsonl", "seen_2.jsonl", "unseen.jsonl", "more_train.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    assert names(path) == ["seen_1.jsonl", "seen_2.jsonl"] == names(path, eval_split="test")
    assert names(path, held_out=True, eval_split="test") == ["unseen.jsonl"]
    assert "has the splits train, test" in refused(path, held_out=True, eval_split="dev")
    for card in ("# no front matter", "---\na: [\n---\n", "---\nconfigs: 3\n---\n", CARD.replace("unseen", "gone")):
        (tmp_path / "README.md").write_text(card)
        assert names(path) == ["more_train.jsonl"]


def test_names_are_taken_apart_into_words():
    assert split_names.words("hhTest-01.v2") == ("hh", "test", "01", "v", "2")
    assert split_names.words("held_out_pairs") == ("heldout", "pairs")
    for name, expected in (
        ("latest", ()),
        ("contest", ()),
        ("pretrain", ()),
        ("trainer", ()),
        ("dev", ("validation",)),
    ):
        assert split_names.splits(name) == set(expected)


@pytest.mark.parametrize(
    ("fields", "records"),
    [({"split": "test"}, "prompts"), ({"revision": "main"}, "prompts"), ({"eval_split": "test"}, "pairs")],
)
def test_fields_that_a_task_does_not_have_are_refused(fields, records):
    from jaxrm.inference.task_files import task_files

    name = next(iter(fields))
    with (
        pytest.raises(UserError, match=rf"config\.data\.{name} is .*leave it out, e\.g\. --config\.data\.{name}="),
        task_files(DataConfig(path="task:safety", **fields), 0, records=records),
    ):
        pass


def test_other_held_out_records_of_a_task_keep_their_split(tmp_path):
    from jaxrm.inference.task_files import task_files

    config = DataConfig(path="task:safety", eval_path=str(tmp_path), eval_split="dev")
    with task_files(config, 0, records="prompts") as data:
        assert (data.eval_path, data.eval_split) == (str(tmp_path), "dev")
