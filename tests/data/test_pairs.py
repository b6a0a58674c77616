import copy
import math

import numpy as np
import pytest

from jaxrm.data.config import DataConfig
from jaxrm.data.cutting import cut_prompt
from jaxrm.data.examples import ComparisonExample, tokenize_demonstrations
from jaxrm.data.loader import eval_batches
from jaxrm.data.named_templates import TEMPLATES
from jaxrm.data.pair_examples import comparison_examples, mapping_examples
from jaxrm.data.pairs import MappingConfig, TokenPair, correction_request, tokenize_pairs
from jaxrm.data.readers import read_records
from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, PromptRecord
from jaxrm.data.tasks import write_task
from jaxrm.data.templates import bos_id, encode_prompt, encode_response, end_ids
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError

INSTRUCTION = MappingConfig().instruction


MODELS = [
    ("gemma", "gemma"),
    ("gemma", "hh"),
    ("gemma", "plain"),
    ("llama", "llama2"),
    ("llama", "hh"),
    ("llama", "plain"),
    ("chatml", "auto"),
    ("chatml", "chatml"),
    ("chatml", "hh"),
    ("llama3", "llama3"),
    ("task", "auto"),
    ("task", "hh"),
]


def record(chosen, rejected, *prompt, source="f:1"):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(prompt or ("what 12?",)))
    return PreferenceRecord(messages, chosen, rejected, source)


def settings(**fields):
    return DataConfig(**{"path": "f", "max_length": 256, "max_bad_share": 1.0, **fields})


@pytest.fixture(scope="session")
def task_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    write_task("safety", folder, seed=0)
    return load_tokenizer(str(folder / "tokenizer"))


@pytest.fixture(scope="session")
def llama3_tokenizer(chatml_tokenizer):
    """The byte-level tokenizer with the turn tokens of Llama 3 added."""
    tokenizer = copy.deepcopy(chatml_tokenizer)
    turns = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    return tokenizer


@pytest.fixture(params=MODELS, ids="-".join)
def model(request):
    """A tokenizer and a template that it can write."""
    family, template = request.param
    if family in ("gemma", "llama"):
        return load_tokenizer(str(request.getfixturevalue(f"{family}_folder"))), template
    return request.getfixturevalue(f"{family}_tokenizer"), template


def test_every_named_template_is_tried():
    assert {template for _, template in MODELS} == {"auto", *TEMPLATES}


RECORDS = [
    record("good. bad.", "never; a  quiet stone", source="f:1"),
    record(" river ", "river stone\n", "why", "because", "how (maybe)", source="f:2"),
    record("\u00bc naïve 😀", "x" * 30, "please answer", source="f:3"),
    record("a </s> <|im_end|> b", "thank you <eos>", "<s> what", source="f:4"),
]


def test_sides_and_prompts_are_the_ids_that_generation_has(model):
    tokenizer, template = model
    pairs, report = tokenize_pairs(RECORDS, tokenizer, settings(template=template))
    assert [pair.source for pair in pairs] == ["f:1", "f:2", "f:3", "f:4"]
    for pair, read in zip(pairs, RECORDS, strict=True):
        assert pair.prompt.tolist() == encode_prompt(tokenizer, read.prompt, template)
        assert pair.chosen.tolist() == encode_response(tokenizer, read.chosen, template)
        assert pair.rejected.tolist() == encode_response(tokenizer, read.rejected, template)
        assert {pair.chosen[-1], pair.rejected[-1]} <= end_ids(tokenizer, template)
        assert {array.dtype for array in (pair.prompt, pair.chosen, pair.rejected)} == {np.dtype(np.int32)}
    assert (report.total, report.used, report.bad) == (4, 4, {})


@pytest.mark.parametrize("instruction", ["", INSTRUCTION, "a <|im_end|> </s> <eos> b"])
def test_a_mapping_is_the_dialogue_that_the_template_writes(model, instruction):
    """Joined piece by piece, and yet what the whole dialogue of four turns is tokenized to."""
    tokenizer, template = model
    config = settings(template=template, max_length=500)
    pairs, _ = tokenize_pairs(RECORDS, tokenizer, config)
    request = correction_request(tokenizer, template, instruction)
    examples, report = mapping_examples(pairs, request, config, first_id=bos_id(tokenizer, template))
    assert [e.is_correction for e in examples] == [True, False] * len(pairs)
    dialogues = []
    for read in RECORDS:
        for source in (read.rejected, read.chosen):
            turns = (Message("assistant", source), Message("user", instruction), Message("assistant", read.chosen))
            dialogues.append(DemonstrationRecord((*read.prompt, *turns), read.source))
    whole, _ = tokenize_demonstrations(dialogues, tokenizer, config)
    for example, expected in zip(examples, whole, strict=True):
        np.testing.assert_array_equal(example.tokens, expected.tokens)
        np.testing.assert_array_equal(example.loss_mask, expected.loss_mask)
        assert example.source == expected.source
    assert (report.total, report.used, report.bad, report.cut_prompts) == (4, 4, {}, 0)


def test_the_request_is_the_template_text_between_two_answers(
    gemma_folder, llama_folder, chatml_tokenizer, llama3_tokenizer, task_tokenizer
):
    gemma, llama = load_tokenizer(str(gemma_folder)), load_tokenizer(str(llama_folder))
    expected = [
        (gemma, "gemma", "\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"),
        (gemma, "plain", "{}"),
        (llama, "llama2", "<s> [INST] {} [/INST]"),
        (llama, "hh", "\n\nHuman: {}\n\nAssistant:"),
        (chatml_tokenizer, "auto", "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
        (
            llama3_tokenizer,
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ]
    for tokenizer, template, written in expected:
        for instruction in ("", "why not"):
            request = correction_request(tokenizer, template, instruction)
            assert tokenizer.decode(request) == written.format(instruction), template
    assert correction_request(gemma, "plain", "") == []
    pieces = task_tokenizer.convert_ids_to_tokens(correction_request(task_tokenizer, "auto", ""))
    assert pieces == ["<|user|>", "<|assistant|>"]


def test_the_request_of_a_real_chat_template(smollm2_tokenizer):
    request = correction_request(smollm2_tokenizer, "auto", INSTRUCTION)
    assert smollm2_tokenizer.decode(request) == (
        f"\n<|im_start|>user\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_refuses_the_request_is_a_user_error(chatml_tokenizer):
    strict = copy.copy(chatml_tokenizer)
    strict.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + (
        chatml_tokenizer.chat_template
    )
    with pytest.raises(UserError, match="one turn only"):
        correction_request(strict, "auto", "")
    with pytest.raises(UserError, match="'vicuna'"):
        correction_request(chatml_tokenizer, "vicuna", "")


def test_pairs_that_teach_nothing_are_dropped_and_counted(chatml_tokenizer):
    records = [
        record("good.", "bad.", source="f:1"),
        record("good.", " good.\n", source="f:2"),  # the same once the white space around it is gone
        record("", "bad.", source="f:3"),
        record("good.", " \n ", source="f:4"),
        record("bad.", "bad.", source="f:6"),
    ]
    pairs, report = tokenize_pairs(records, chatml_tokenizer, settings())
    assert [pair.source for pair in pairs] == ["f:1"]
    counts = {reason: (found.count, found.first) for reason, found in report.bad.items()}
    assert counts == {"both responses are the same": (2, "f:2"), "a response is empty": (2, "f:3")}
    assert (report.total, report.used) == (5, 1)
    with pytest.raises(UserError, match=r"4 of 5 records are unusable.*a response is empty \(2, first at f:3\)"):
        tokenize_pairs(records, chatml_tokenizer, settings(max_bad_share=0.5))
    with pytest.raises(UserError, match="none is left"):
        tokenize_pairs(records[1:2], chatml_tokenizer, settings())


def test_sides_that_become_the_same_tokens_are_equal(task_tokenizer):
    """A tokenizer of whole lower-case words does not tell "How are you?" from "how are you ?"."""
    records = [record("How are you?", "how are you ?"), record("how", "are")]
    pairs, report = tokenize_pairs(records, task_tokenizer, settings())
    assert (len(pairs), report.bad["both responses are the same"].count) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [
        DemonstrationRecord((Message("user", "a"), Message("assistant", "b")), "f:9"),
        PromptRecord((Message("user", "a"),), "f:9"),
    ],
)
def test_a_record_that_is_no_pair_is_named(chatml_tokenizer, other):
    with pytest.raises(UserError, match=r"^f:9: .*--config.data.schema=preference"):
        tokenize_pairs([record("good.", "bad."), other], chatml_tokenizer, settings())


def test_dialogues_that_the_template_refuses_are_counted(chatml_tokenizer):
    strict = copy.copy(chatml_tokenizer)
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + strict.chat_template
    )
    system = PreferenceRecord((Message("system", "be good"), Message("user", "how")), "a", "b", "f:7")
    pairs, report = tokenize_pairs([RECORDS[0], system, RECORDS[1]], strict, settings())
    assert [pair.source for pair in pairs] == ["f:1", "f:2"]
    ((reason, found),) = report.bad.items()
    assert "no system turns" in reason
    assert (found.count, found.first) == (1, "f:7")


def test_batches_of_pairs_change_nothing(chatml_tokenizer, monkeypatch):
    records = [record(f"good. {i}", f"bad. {i}", source=f"f:{i}") for i in range(13)]
    together, _ = tokenize_pairs(records, chatml_tokenizer, settings())
    monkeypatch.setattr("jaxrm.data.pairs._CHUNK", 5)
    seen = []
    apart, _ = tokenize_pairs(records, chatml_tokenizer, settings(), lambda done, total: seen.append((done, total)))
    assert seen == [(5, 13), (10, 13), (13, 13)]
    for one, other in zip(together, apart, strict=True):
        assert one.source == other.source
        for name in ("prompt", "chosen", "rejected"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# Token pairs by hand: BOS is 1, a prompt counts up from 10, chosen tokens are 50 and more, rejected ones 70 and more,
# and every response ends with 2.
def token_pair(prompt, chosen, rejected, source="f:1", bos=True):
    x = np.r_[[1] if bos else [], 10 : 10 + prompt - bos].astype(np.int32)
    sides = (np.r_[first : first + count - 1, 2].astype(np.int32) for first, count in ((50, chosen), (70, rejected)))
    return TokenPair(x, *sides, source)


def test_mappings_of_a_pair_worked_by_hand():
    (correction, identity), report = mapping_examples([token_pair(3, 2, 3)], [8, 9], settings(), first_id=1)
    assert correction.tokens.tolist() == [1, 10, 11, 70, 71, 2, 8, 9, 50, 2]
    assert correction.loss_mask.tolist() == [False] * 8 + [True, True]
    assert correction.columns()["is_correction"].tolist() == [False] * 8 + [True, True]
    assert identity.tokens.tolist() == [1, 10, 11, 50, 2, 8, 9, 50, 2]
    assert identity.loss_mask.tolist() == [False] * 7 + [True, True]
    assert not identity.columns()["is_correction"].any()
    assert (correction.is_correction, identity.is_correction) == (True, False)
    assert correction.tokens.dtype == identity.tokens.dtype == np.int32
    assert report.rows() == [("read", 1, ""), ("used", 1, "")]


def test_edits_of_a_correction_worked_by_hand():
    """Of the target ``50 51 52 53 2`` the source ``51 70 53 2`` has 51, 53 and 2; an identity has no edits."""
    pair = TokenPair(*(np.array(x, np.int32) for x in ([1, 10], [50, 51, 52, 53, 2], [51, 70, 53, 2])), "f:1")
    (correction, identity), _ = mapping_examples([pair], [8], settings(), first_id=1, marks_edits=True)
    assert correction.columns()["is_edit"].tolist() == [False] * 7 + [True, False, True, False, False]
    assert identity.columns()["is_edit"].tolist() == [False] * len(identity.tokens)


def test_the_identity_mapping_can_be_left_out():
    (only,), report = mapping_examples([token_pair(3, 2, 3)], [8, 9], settings(), first_id=1, identity=False)
    assert only.is_correction
    assert report.used == 1


def test_a_comparison_worked_by_hand():
    (example,), report = comparison_examples([token_pair(3, 2, 3)], settings(), first_id=1)
    assert example.tokens.tolist() == [1, 10, 11, 50, 2, 1, 10, 11, 70, 71, 2]
    assert example.segment_lengths == (5, 6)
    columns = example.columns()
    assert columns["is_chosen_end"].tolist() == [False] * 4 + [True] + [False] * 6
    assert columns["rejected_offset"].tolist() == [0] * 4 + [6] + [0] * 6
    assert (columns["is_chosen_end"].dtype, columns["rejected_offset"].dtype) == (bool, np.int32)
    assert example.tokens.dtype == np.int32
    assert report.used == 1


def test_the_left_of_a_long_prompt_goes_and_bos_stays():
    pair = token_pair(30, 3, 5)
    (correction, identity), report = mapping_examples([pair], [8], settings(max_length=20), first_id=1)
    assert correction.tokens.tolist() == [1, *range(29, 39), *pair.rejected, 8, *pair.chosen]
    assert identity.tokens.tolist() == [1, *range(27, 39), *pair.chosen, 8, *pair.chosen]
    rows = [("prompts whose beginning was cut", 1, ""), ("of them without their system text or first header", 1, "")]
    assert report.rows() == [("read", 1, ""), ("used", 1, ""), *rows]
    (example,), report = comparison_examples([pair], settings(max_length=21), first_id=1)
    cut = [1, *range(34, 39)]
    assert example.tokens.tolist() == [*cut, *pair.chosen, *cut, *pair.rejected]
    assert report.cut_prompts == 1


def test_a_cut_prompt_keeps_its_end():
    prompt = np.array([1, 5, 6, 7], np.int32)
    cuts = {room: cut_prompt(prompt, room, 1).tolist() for room in (1, 2, 3, 4, 9)}
    assert cuts == {1: [1], 2: [1, 7], 3: [1, 6, 7], 4: [1, 5, 6, 7], 9: [1, 5, 6, 7]}
    assert cut_prompt(prompt, 2, None).tolist() == [6, 7]
    assert cut_prompt(prompt[1:], 2, 1).tolist() == [6, 7]  # BOS is not in front
    assert cut_prompt(prompt, 2, 1).dtype == np.int32


def test_a_pair_that_does_not_fit_is_dropped_whole_and_counted():
    long_source, long_both = token_pair(4, 3, 9, "f:1"), token_pair(4, 9, 3, "f:2")
    fits = token_pair(4, 3, 3, "f:3")
    config = settings(max_length=14)  # request 1: rejected 9 + 1 + 3 leaves 1 for the prompt; chosen twice does not fit
    examples, report = mapping_examples([long_source, long_both, fits], [8], config, first_id=1)
    assert [e.source for e in examples] == ["f:1", "f:1", "f:3", "f:3"]
    assert report.bad["source, request and target longer than config.data.max_length 14"].first == "f:2"
    assert (report.total, report.used, report.cut_prompts) == (3, 2, 1)
    examples, _ = mapping_examples([long_both], [8], config, first_id=1, identity=False)
    assert len(examples) == 1
    examples, report = mapping_examples([long_source, fits], [8], settings(max_length=13), first_id=1)
    assert [e.source for e in examples] == ["f:3", "f:3"]

    examples, report = comparison_examples([long_source, fits], settings(max_length=13), first_id=1)
    assert [e.source for e in examples] == ["f:3"]
    assert report.bad["the two responses longer than config.data.max_length 13"].count == 1
    assert len(comparison_examples([long_source], config, first_id=1)[0]) == 1


def test_pairs_that_do_not_fit_name_the_length_that_holds_them():
    """600 and 600 tokens do not fit 1024; the length that is named holds them."""
    pairs = [token_pair(9, 600, 600, f"f:{i}") for i in range(124)]
    message = (
        r"^f: 124 of 124 records are unusable and none is left; most often: the two responses longer than "
        r"config\.data\.max_length 1024 \(124, first at f:0\); e\.g\. --config\.data\.max_length=1202 holds all$"
    )
    with pytest.raises(UserError, match=message):
        comparison_examples(pairs, settings(max_length=1024), first_id=1)
    assert comparison_examples(pairs, settings(max_length=1202), first_id=1)[1].used == 124
    with pytest.raises(UserError, match=r"--config\.data\.max_length=1202 holds all$"):
        mapping_examples(pairs, [8], settings(max_length=1201), first_id=1)
    assert mapping_examples(pairs, [8], settings(max_length=1202), first_id=1)[1].used == 124


def test_the_share_of_pairs_that_are_too_long_is_said():
    """A shorter length for all but one in a hundred is named beside the one for all."""
    short = [token_pair(9, 20, 20, f"f:{i}") for i in range(390)]
    long = [token_pair(9, 100 + i, 100, f"f:{390 + i}") for i in range(10)]
    _, report = comparison_examples(short + long, settings(max_length=128), first_id=1)
    reason = "the two responses longer than config.data.max_length 128: 2.5 % of them; "
    assert report.rows()[2:] == [(reason + "--config.data.max_length=211 holds all (207 holds 99%)", 10, "f:390")]
    assert comparison_examples(short + long, settings(max_length=207), first_id=1)[1].used == 396
    with pytest.raises(
        UserError, match=r"=211 holds all \(207 holds 99%\), or --config\.data\.max_bad_share=0\.04 to go on"
    ):
        comparison_examples(short + long, settings(max_length=128, max_bad_share=0.02), first_id=1)


def test_a_pair_that_does_not_fit_is_an_error_if_so_configured():
    pair = token_pair(4, 3, 9, "f:8")
    for length in (8, 13):
        config = settings(max_length=length, too_long="error")
        message = r"^f:8: .* 14 tokens, but a row has .*--config.data.max_length=14"
        with pytest.raises(UserError, match=message):
            mapping_examples([pair], [8], config, first_id=1)
        with pytest.raises(UserError, match=message):
            comparison_examples([pair], config, first_id=1)
    enough = settings(max_length=14, too_long="error")
    assert len(mapping_examples([pair], [8], enough, first_id=1)[0]) == 2
    assert len(comparison_examples([pair], enough, first_id=1)[0]) == 1


def test_too_many_pairs_that_do_not_fit_stop_the_run():
    pairs = [token_pair(4, 3, 9, f"f:{i}") for i in range(9)] + [token_pair(4, 3, 3, "f:9")]
    config = settings(max_length=13, max_bad_share=0.05)
    for make in (
        lambda: mapping_examples(pairs, [8], config, first_id=1),
        lambda: comparison_examples(pairs, config, first_id=1),
    ):
        with pytest.raises(UserError, match=r"9 of 10 records are unusable.*max_length 13 \(9, first at f:0\)"):
            make()


def random_pairs(seed, count):
    rng = np.random.default_rng(seed)
    return [
        token_pair(*(int(n) for n in rng.integers((1, 1, 1), (40, 26, 26))), source=f"f:{i}", bos=bool(i % 2))
        for i in range(count)
    ]


def segments_of(batches):
    """The tokens of every segment, and the same stretch of every other array."""
    for batch in batches:
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            for segment in range(1, ids.max() + 1):
                (where,) = np.nonzero(ids == segment)
                assert (np.diff(where) == 1).all()
                yield {name: values[row][where] for name, values in batch.items()}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_batches_hold_every_mapping_once_and_cut_only_prompts(seed, packing):
    pairs = random_pairs(seed, 60)
    config = settings(max_length=48, batch_size=4, packing=packing)
    examples, report = mapping_examples(pairs, [8, 9], config, first_id=1)
    batches = eval_batches(examples, config, pad_id=0)
    found = []
    for segment in segments_of(batches):
        assert segment["positions"].tolist() == list(range(len(segment["tokens"])))
        (targets,) = np.nonzero(segment["loss_mask"])
        target = segment["tokens"][targets].tolist()
        before = segment["tokens"][: targets[0]].tolist()
        assert targets[-1] == len(segment["tokens"]) - 1
        correction = segment["is_correction"]
        assert not correction.any() or (correction == segment["loss_mask"]).all()
        found.append((before, target, bool(correction.any())))
    expected = []
    for pair in pairs:
        mappings = [(pair.rejected.tolist(), True), (pair.chosen.tolist(), False)]
        rests = [[*source, 8, 9] for source, _ in mappings]
        rooms = [48 - len(rest) - len(pair.chosen) for rest in rests]
        if min(rooms) < 1:
            continue
        for rest, room, (_, is_correction) in zip(rests, rooms, mappings, strict=True):
            prompt = pair.prompt.tolist()
            while len(prompt) > room:
                del prompt[1 if prompt[0] == 1 and len(prompt) > 1 else 0]
            expected.append((prompt + rest, pair.chosen.tolist(), is_correction))
    assert sorted(found) == sorted(expected)
    assert 0 < report.cut_prompts < report.used < report.total
    for batch in batches:
        padding = batch["segment_ids"] == 0
        for name in ("tokens", "positions", "loss_mask", "is_correction"):
            assert not batch[name][padding].any()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_offsets_lead_to_the_last_tokens_of_both_packed_sides(seed, packing):
    pairs = random_pairs(seed, 60)
    config = settings(max_length=48, batch_size=4, packing=packing)
    examples, report = comparison_examples(pairs, config, first_id=1)
    batches = eval_batches(examples, config, pad_id=0)
    found = []
    for batch in batches:
        assert {name: (values.shape, values.dtype.name) for name, values in batch.items()} == {
            "tokens": ((4, 48), "int32"),
            "segment_ids": ((4, 48), "int32"),
            "positions": ((4, 48), "int32"),
            "is_chosen_end": ((4, 48), "bool"),
            "rejected_offset": ((4, 48), "int32"),
        }
        assert ((batch["rejected_offset"] > 0) == batch["is_chosen_end"]).all()
        for row, end in zip(*np.nonzero(batch["is_chosen_end"]), strict=True):
            ids, tokens = batch["segment_ids"][row], batch["tokens"][row]
            rejected_end = end + batch["rejected_offset"][row, end]
            sides = []
            for last in (end, rejected_end):
                (where,) = np.nonzero(ids == ids[last])
                assert where[-1] == last
                assert batch["positions"][row][where].tolist() == list(range(len(where)))
                sides.append(tokens[where].tolist())
            assert ids[rejected_end] == ids[end] + 1
            found.append(tuple(sides))
        segments = [len(np.unique(ids[ids > 0])) for ids in batch["segment_ids"]]
        assert segments == (2 * batch["is_chosen_end"].sum(axis=1)).tolist()
        assert packing or max(segments) == 2
    expected = []
    for pair in pairs:
        prompt, responses = pair.prompt.tolist(), len(pair.chosen) + len(pair.rejected)
        if responses + 2 > 48:
            continue
        while 2 * len(prompt) + responses > 48:
            del prompt[1 if prompt[0] == 1 and len(prompt) > 1 else 0]
        expected.append((prompt + pair.chosen.tolist(), prompt + pair.rejected.tolist()))
    assert sorted(found) == sorted(expected)
    assert 0 < report.cut_prompts <= report.used == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["pandalm_pairs.jsonl", "hh_harmless_base_test.jsonl.gz"])
def test_real_pairs_become_both_kinds_of_example(shared_data, file, smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    config = settings(path=str(shared_data / file), max_length=512, max_bad_share=0.05)
    records, _ = read_records(config)
    pairs, report = tokenize_pairs(records, tokenizer, config)
    assert report.used == len(pairs) > 0.99 * len(records)
    by_source = {read.source: read for read in records}
    for pair in pairs[::97]:
        read = by_source[pair.source]
        assert pair.prompt.tolist() == encode_prompt(tokenizer, read.prompt, "auto")
        assert pair.chosen.tolist() == encode_response(tokenizer, read.chosen, "auto")
        assert pair.rejected.tolist() == encode_response(tokenizer, read.rejected, "auto")
    request = correction_request(tokenizer, "auto", INSTRUCTION)
    mappings, report = mapping_examples(pairs, request, config, first_id=None)
    assert len(mappings) == 2 * report.used > 1.9 * len(pairs)
    comparisons, _ = comparison_examples(pairs, config, first_id=None)
    for example in [*mappings, *comparisons]:
        assert len(example.tokens) <= 512
        assert example.tokens[-1] == tokenizer.eos_token_id
    rows = {
        "mapping": eval_batches(mappings, config, pad_id=0),
        "comparison": eval_batches(comparisons, config, pad_id=0),
    }
    targets = sum(int(batch["loss_mask"].sum()) for batch in rows["mapping"])
    assert targets == sum(int(example.loss_mask.sum()) for example in mappings)
    assert sum(int(batch["is_chosen_end"].sum()) for batch in rows["comparison"]) == len(comparisons)


def test_pairs_of_the_built_in_task_fit_without_an_instruction(task_tokenizer, tmp_path):
    write_task("safety", tmp_path, seed=0)
    config = settings(path=str(tmp_path / "pairs.jsonl"), max_length=128, max_records=300, max_bad_share=0.0)
    records, _ = read_records(config)
    pairs, report = tokenize_pairs(records, task_tokenizer, config)
    request = correction_request(task_tokenizer, "auto", "")
    first_id = bos_id(task_tokenizer, "auto")
    examples, report = mapping_examples(pairs, request, config, first_id=first_id)
    assert (len(examples), report.cut_prompts) == (2 * len(records), 0)
    assert not any((example.tokens == task_tokenizer.unk_token_id).any() for example in examples)


def test_a_comparison_is_the_same_however_its_sides_are_long():
    """The offset counts tokens of the rejected side, whatever the chosen side has."""
    for chosen, rejected in ((1, 1), (1, 9), (9, 1)):
        example = ComparisonExample(np.arange(chosen + rejected, dtype=np.int32), chosen, "f:1")
        columns = example.columns()
        (end,) = np.flatnonzero(columns["is_chosen_end"])
        assert (end, columns["rejected_offset"][end]) == (chosen - 1, rejected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"correction_weight": 0.0}, r"MappingConfig.correction_weight is 0.0.*correction_weight=1.0$"),
        ({"correction_weight": math.nan}, "correction_weight is nan"),
        ({"identity_weight": -1.0}, r"identity_weight is -1.0.*identity=False"),
        ({"identity_weight": math.inf}, "identity_weight is inf"),
        ({"identity_warmup_steps": -1}, r"identity_warmup_steps is -1.*at least 0"),
        ({"identity": False, "identity_warmup_steps": 5}, r"is 5; it must be 0 where MappingConfig.identity is False"),
    ],
)
def test_bad_mapping_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        MappingConfig(**fields)
    assert "\n" not in str(error.value)


def test_good_mapping_settings_are_kept():
    config = MappingConfig(instruction="", identity=False, correction_weight=2)
    assert (config.instruction, config.identity, config.correction_weight) == ("", False, 2)
    assert MappingConfig(identity_warmup_steps=3).identity
