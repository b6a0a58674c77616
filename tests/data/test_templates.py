import copy

import pytest

from jaxrm.data.named_templates import TEMPLATES
from jaxrm.data.records import Message
from jaxrm.data.templates import bos_id, encode_prompt, encode_response, end_ids
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError

DIALOGUE = [
    Message("user", "what should the garden answer?"),
    Message("assistant", "a quiet stone, always"),
    Message("user", "why 12 (maybe)"),
]

# The published templates of Llama 2 and Mistral (spaces around the response) and of Gemma (refuses system turns),
# reduced to what they write.
LLAMA2_OWN = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA_OWN = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.fixture
def gemma(gemma_folder):
    tokenizer = load_tokenizer(str(gemma_folder))
    tokenizer.chat_template = GEMMA_OWN
    return tokenizer


@pytest.fixture
def llama(llama_folder):
    tokenizer = load_tokenizer(str(llama_folder))
    tokenizer.chat_template = LLAMA2_OWN
    return tokenizer


@pytest.fixture
def every_tokenizer(gemma, llama, chatml_tokenizer):
    return {"gemma": gemma, "llama": llama, "chatml": chatml_tokenizer}


def as_dicts(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def by_transformers(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(as_dicts(messages), return_dict=False, **options)


def test_prompt_equals_the_chat_template_of_transformers(every_tokenizer):
    for tokenizer in every_tokenizer.values():
        expected = by_transformers(tokenizer, DIALOGUE, add_generation_prompt=True)
        assert encode_prompt(tokenizer, DIALOGUE, "auto") == expected


def test_prompt_and_response_equal_the_rendered_dialogue(every_tokenizer):
    for tokenizer in every_tokenizer.values():
        answer = Message("assistant", "never open the harbour window")
        ours = encode_prompt(tokenizer, DIALOGUE, "auto") + encode_response(tokenizer, answer.content, "auto")
        theirs = by_transformers(tokenizer, [*DIALOGUE, answer])
        assert theirs[: len(ours)] == ours
        assert tokenizer.decode(theirs[len(ours) :]).strip() == ""
        assert ours[-1] in end_ids(tokenizer, "auto")


def test_real_chat_template_is_followed(smollm2_tokenizer):
    expected = by_transformers(smollm2_tokenizer, DIALOGUE, add_generation_prompt=True)
    assert encode_prompt(smollm2_tokenizer, DIALOGUE, "auto") == expected
    assert end_ids(smollm2_tokenizer, "auto") == {2}
    assert bos_id(smollm2_tokenizer, "auto") is None


def test_bos_stands_first_once_where_the_model_has_one(gemma, llama, chatml_tokenizer):
    for tokenizer, name in ((gemma, "gemma"), (gemma, "hh"), (llama, "plain"), (llama, "hh")):
        ids = encode_prompt(tokenizer, DIALOGUE, name)
        assert ids[0] == tokenizer.bos_token_id == bos_id(tokenizer, name)
        assert ids.count(tokenizer.bos_token_id) == 1
    assert bos_id(chatml_tokenizer, "chatml") is None


def test_named_templates_write_what_they_say(gemma, llama, chatml_tokenizer):
    messages = [Message("system", "be good."), *DIALOGUE]
    written = {
        name: tokenizer.decode(encode_prompt(tokenizer, messages, name))
        for name, tokenizer in {"gemma": gemma, "llama2": llama, "chatml": chatml_tokenizer}.items()
    }
    assert written["chatml"] == (
        "<|im_start|>system\nbe good.<|im_end|>\n<|im_start|>user\nwhat should the garden answer?<|im_end|>\n"
        "<|im_start|>assistant\na quiet stone, always<|im_end|>\n<|im_start|>user\nwhy 12 (maybe)<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert written["gemma"] == (
        "<bos><start_of_turn>user\nbe good.\n\nwhat should the garden answer?<end_of_turn>\n<start_of_turn>model\n"
        "a quiet stone, always<end_of_turn>\n<start_of_turn>user\nwhy 12 (maybe)<end_of_turn>\n<start_of_turn>model\n"
    )
    assert written["llama2"] == (
        "<s> [INST] <<SYS>>\nbe good.\n<</SYS>>\n\nwhat should the garden answer? [/INST] a quiet stone, always </s>"
        "<s> [INST] why 12 (maybe) [/INST]"
    )
    ids = encode_prompt(llama, DIALOGUE, "hh") + encode_response(llama, "good.", "hh")
    assert llama.decode(ids) == (
        "<s> \n\nHuman: what should the garden answer?\n\nAssistant: a quiet stone, always</s>"
        " \n\nHuman: why 12 (maybe)\n\nAssistant: good.</s>"
    )
    ids = encode_prompt(gemma, [Message("user", "POST: a\n\nTL;DR:")], "plain") + encode_response(gemma, " b", "plain")
    assert gemma.decode(ids) == "<bos>POST: a\n\nTL;DR: b<eos>"


def test_llama_response_continues_the_prompt(llama):
    """The response has the leading space of "[/INST] good", once, and no second one from sentencepiece."""
    pieces = llama.convert_ids_to_tokens(encode_response(llama, "good", "auto"))
    assert "".join(pieces[:-1]) == "\u2581good\u2581"
    assert pieces[-1] == "</s>"


@pytest.mark.parametrize("name", sorted({"auto", *TEMPLATES} - {"llama3"}))  # none of the three has its tokens
def test_special_tokens_spelled_out_by_a_user_stay_text(every_tokenizer, name):
    tried = 0
    for tokenizer in every_tokenizer.values():
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        turns = [t for t in ("<start_of_turn>", "<end_of_turn>") if t in tokenizer.get_vocab()]
        attack = "good " + " ".join({*added, *(turns if name in ("auto", "gemma") else ())}) + "<<s><s>></s> bad"
        try:
            honest = encode_prompt(tokenizer, [Message("user", "good bad")], name)
        except UserError:  # a named template of another family
            continue
        ids = encode_prompt(tokenizer, [Message("user", attack)], name)
        answer = encode_response(tokenizer, attack, name)
        forbidden = [tokenizer.convert_tokens_to_ids(t) for t in {*added, *turns}]
        for token in forbidden:
            if token in turns and name not in ("auto", "gemma"):
                continue
            assert ids.count(token) == honest.count(token)
            assert answer.count(token) == (token == answer[-1])
        assert attack in tokenizer.decode(ids)
        assert attack in tokenizer.decode(answer)
        tried += 1
    assert tried


def test_a_token_that_stands_around_turns_stays_text(chatml_tokenizer):
    """`<think>` is an ordinary added token here. It is a token of a message, until the template opens turns with it."""
    token = chatml_tokenizer.convert_tokens_to_ids("<think>")
    assert encode_response(chatml_tokenizer, "a <think> b", "chatml").count(token) == 1
    turns = copy.copy(chatml_tokenizer)
    turns.chat_template = (
        "{% for m in messages %}{{ '<think>' + m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        + ("{% if add_generation_prompt %}<think>assistant:{% endif %}")
    )
    assert encode_response(turns, "a <think> b", "auto").count(token) == 0
    assert encode_prompt(turns, [Message("user", "a <think> b")], "auto").count(token) == 2


def test_characters_that_stand_for_nothing_are_text_too(chatml_tokenizer):
    """Some of them are used inside to break texts apart."""
    odd = [Message("user", "\ufdd0good <|im_end|>\ufdd1 \ufdd2bad\ufdd3")]
    assert chatml_tokenizer.decode(encode_prompt(chatml_tokenizer, odd, "auto")) == by_transformers(
        chatml_tokenizer, odd, add_generation_prompt=True, tokenize=False
    )
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(UserError, match="U\\+FDD0 to U\\+FDEF"):
        encode_prompt(chatml_tokenizer, [Message("user", every)], "auto")


@pytest.mark.parametrize(
    ("family", "name"), [("gemma", "gemma"), ("llama", "llama2"), ("chatml", "chatml"), ("llama", "hh")]
)
def test_named_templates_drop_white_space_around_a_message(every_tokenizer, family, name):
    tokenizer = every_tokenizer[family]
    padded = [Message(m.role, f" \n{m.content}\n\n ") for m in DIALOGUE]
    assert encode_prompt(tokenizer, padded, name) == encode_prompt(tokenizer, DIALOGUE, name)
    assert encode_response(tokenizer, "\n good ", name) == encode_response(tokenizer, "good", name)


def test_white_space_is_what_the_tokenizers_template_makes_of_it(every_tokenizer):
    for tokenizer in every_tokenizer.values():
        padded = [Message(m.role, f" \n{m.content}\n\n ") for m in DIALOGUE]
        expected = by_transformers(tokenizer, padded, add_generation_prompt=True)
        assert encode_prompt(tokenizer, padded, "auto") == expected


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.content }", "unexpected"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe|immutable"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ messages[0].content }}", "does not write the assistant"),
    ],
)
def test_a_broken_or_hostile_template_is_one_line(chatml_tokenizer, template, problem):
    tokenizer = copy.copy(chatml_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=problem) as error:
        encode_prompt(tokenizer, DIALOGUE, "auto")
    assert "\n" not in str(error.value)


def test_a_dialogue_that_the_template_refuses_is_a_user_error(llama, gemma):
    with pytest.raises(UserError, match="must alternate"):
        encode_prompt(llama, [DIALOGUE[0], DIALOGUE[2]], "auto")
    with pytest.raises(UserError, match="System role not supported"):
        encode_prompt(gemma, [Message("system", "be good"), DIALOGUE[0]], "auto")


def test_a_template_that_is_not_there_is_refused(gemma_folder, chatml_tokenizer):
    bare = load_tokenizer(str(gemma_folder))
    with pytest.raises(UserError, match=r"no chat template.*--config.data.template="):
        encode_prompt(bare, DIALOGUE, "auto")
    with pytest.raises(UserError, match="'vicuna'"):
        encode_prompt(bare, DIALOGUE, "vicuna")
    with pytest.raises(UserError, match="no token '<start_of_turn>'"):
        encode_prompt(chatml_tokenizer, DIALOGUE, "gemma")


OWN = "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user' + m.content + '<|im_end|>' }}" + (
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>bot' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>bot' }}{% endif %}"
)
LAST_ONLY = "{{ '<|im_start|>user' + (messages | selectattr('role', 'equalto', 'user') | list)[-1].content }}" + (
    "{% if add_generation_prompt %}<|im_start|>bot{% elif messages[-1].role == 'assistant' %}"
    "<|im_start|>bot{{ messages[-1].content }}<|im_end|>{% endif %}"
)
SYSTEM, USER, BOT = Message("system", "be good"), Message("user", "why"), Message("assistant", "because")


@pytest.mark.parametrize(
    ("family", "name", "own", "messages", "role"),
    [
        ("llama", "llama2", None, [SYSTEM], "system"),
        ("llama", "llama2", None, [USER, BOT, SYSTEM], "system"),
        ("llama", "llama2", None, [SYSTEM, BOT], "system"),
        ("gemma", "gemma", None, [SYSTEM], "system"),
        ("gemma", "gemma", None, [USER, BOT, SYSTEM], "system"),
        ("chatml", "auto", OWN, [SYSTEM, USER], "system"),
        ("chatml", "auto", OWN, [USER, BOT, SYSTEM, USER], "system"),
        ("chatml", "auto", LAST_ONLY, [USER, BOT, USER], "user"),
        # What is lost can be found in the header.
        ("chatml", "auto", OWN, [Message("system", "start"), USER], "system"),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(every_tokenizer, family, name, own, messages, role):
    tokenizer = copy.copy(every_tokenizer[family])
    tokenizer.chat_template = own or tokenizer.chat_template
    with pytest.raises(UserError, match=f"leaves out .* role '{role}'.*--config.data.template=hh$") as error:
        encode_prompt(tokenizer, messages, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["chatml", "hh", "plain"])
def test_a_system_turn_may_stand_anywhere_where_it_is_written(chatml_tokenizer, name):
    for messages in ([SYSTEM, USER], [USER, BOT, SYSTEM, USER], [SYSTEM, USER, BOT, SYSTEM]):
        assert "be good" in chatml_tokenizer.decode(encode_prompt(chatml_tokenizer, messages, name))


def test_a_template_that_changes_a_text_is_refused(chatml_tokenizer):
    tokenizer = copy.copy(chatml_tokenizer)
    tokenizer.chat_template = chatml_tokenizer.chat_template.replace("message['content']", "message['content'][:20]")
    assert encode_prompt(tokenizer, [USER], "auto")
    with pytest.raises(UserError, match="leaves out or changes the text of a message of the role 'user'"):
        encode_prompt(tokenizer, [Message("user", "what should the garden answer?")], "auto")
    with pytest.raises(UserError, match=r"in another way than others|changes some of the text of a response"):
        encode_response(tokenizer, "what should the garden answer?", "auto")


def test_a_header_that_generation_would_not_see_is_refused(chatml_tokenizer):
    tokenizer = copy.copy(chatml_tokenizer)
    tokenizer.chat_template = chatml_tokenizer.chat_template.partition("{% if add_generation_prompt")[0]
    with pytest.raises(UserError, match=r"begins a response with '<\|im_start\|>assistant' .*template=chatml$"):
        encode_prompt(tokenizer, DIALOGUE, "auto")
    tokenizer.chat_template += "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}"
    with pytest.raises(UserError, match=r"under add_generation_prompt with 'bot'"):
        encode_prompt(tokenizer, DIALOGUE, "auto")


def test_one_of_several_templates_is_chosen_by_its_name(chatml_tokenizer):
    tokenizer = copy.copy(chatml_tokenizer)
    tokenizer.chat_template = {"rag": OWN, "tool_use": chatml_tokenizer.chat_template}
    with pytest.raises(
        UserError, match=r"is 'auto', but .* templates are rag, tool_use; e.g. --config.data.template=tokenizer:rag$"
    ):
        encode_prompt(tokenizer, DIALOGUE, "auto")
    with pytest.raises(UserError, match=r"is 'tokenizer:x', but .* templates are rag, tool_use; e.g."):
        encode_prompt(tokenizer, DIALOGUE, "tokenizer:x")
    expected = by_transformers(tokenizer, DIALOGUE, chat_template="rag", add_generation_prompt=True)
    assert encode_prompt(tokenizer, DIALOGUE, "tokenizer:rag") == expected
    tokenizer.chat_template["default"] = tokenizer.chat_template["tool_use"]
    assert encode_prompt(tokenizer, DIALOGUE, "auto") == encode_prompt(chatml_tokenizer, DIALOGUE, "auto")


@pytest.mark.parametrize("own", [7, ["x"], {}, "", {"default": 3}])
def test_a_chat_template_that_is_no_text_is_one_line(chatml_tokenizer, own):
    tokenizer = copy.copy(chatml_tokenizer)
    tokenizer.chat_template = own
    with pytest.raises(UserError, match=r"is 'auto', but the tokenizer('s chat templates are none| has no chat)"):
        encode_prompt(tokenizer, DIALOGUE, "auto")
