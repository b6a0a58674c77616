"""Chat templates that do what published ones do, written anew from what they do, and tokenizers with their tokens."""

import functools
import random
from dataclasses import dataclass

_TEXT = "please answer in french hello what is the river stone good bad think why because 12 you are a helpful"
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Published:
    """A family's template.

    Attributes:
      template: Jinja.
      special: its special tokens; the last one ends a turn, and is EOS unless ``eos`` says otherwise.
      added: further tokens that are not special.
      bos: or None.
      eos: or None where it is the last special token.
    """

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None


_CHATML_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
_CHATML_HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}"
)
_FIRST_SYSTEM = (
    "{% set system = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set turns = messages[1:] %}{% endif %}"
)


def _default_system(text: str) -> str:
    return (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n"
        + text
        + "<|im_end|>\n' }}{% endif %}"
        + _CHATML_TURNS
        + _CHATML_HEADER
    )


def _llama3(today: str) -> str:
    """Llama 3.1 and 3.2, which differ in where the day is from."""
    return (
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = " + today + " %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{{ 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
        "+ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )


def _mistral(opens: str, before_response: str) -> str:
    """Mistral 7B v0.3 and Nemo: the system text goes into the last turn of the user, if it is the last turn of all."""
    return (
        _FIRST_SYSTEM
        + "{{ bos_token }}{% for m in turns %}"
        + _ALTERNATE
        + "{% if m.role == 'user' %}{% if loop.last and system %}{{ '"
        + opens
        + "' + system + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '"
        + opens
        + "' + m.content + '[/INST]' }}{% endif %}{% else %}{{ '"
        + before_response
        + "' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
    )


_GEMMA_TURN = (
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + first + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_QWEN3 = (
    "{% if messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
_R1 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
    "{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA_TOKENS = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")

PUBLISHED = {
    "llama2": Published(
        _FIRST_SYSTEM + "{% for m in turns %}" + _ALTERNATE + "{% set content = m.content %}"
        "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        bos="<s>",
    ),
    "llama3": Published(
        "{% for m in messages %}{% set turn = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' %}{% if loop.first %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        _LLAMA3_TOKENS,
        bos="<|begin_of_text|>",
    ),
    "llama3.1": Published(_llama3("'26 Jul 2024'"), _LLAMA3_TOKENS, bos="<|begin_of_text|>"),
    "llama3.2": Published(_llama3("strftime_now('%d %b %Y')"), _LLAMA3_TOKENS, bos="<|begin_of_text|>"),
    "mistral_v0.3": Published(_mistral("[INST] ", " "), ("<s>", "[INST]", "[/INST]", "</s>"), bos="<s>"),
    "mistral_nemo": Published(_mistral("[INST]", ""), ("<s>", "[INST]", "[/INST]", "</s>"), bos="<s>"),
    "qwen2.5": Published(
        _default_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), _CHATML_TOKENS
    ),
    "qwen3": Published(_QWEN3, _CHATML_TOKENS, added=("<think>", "</think>")),
    "gemma1": Published(
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% set first = '' %}{% for m in messages %}" + _ALTERNATE + _GEMMA_TURN,
        _GEMMA_TOKENS,
        bos="<bos>",
        eos="<eos>",
    ),
    "gemma3": Published(
        _FIRST_SYSTEM
        + "{{ bos_token }}{% for m in turns %}"
        + _ALTERNATE
        + "{% set first = system + '\n\n' if loop.first "
        "and system else '' %}" + _GEMMA_TURN,
        _GEMMA_TOKENS,
        bos="<bos>",
        eos="<eos>",
    ),
    "smollm2": Published(
        _default_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), _CHATML_TOKENS
    ),
    "r1_distill": Published(
        _R1,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
    ),
    "chatml": Published(_CHATML_TURNS + _CHATML_HEADER, _CHATML_TOKENS),
}


@functools.cache
def published_tokenizer(name: str):
    """A small byte-level tokenizer with the tokens and the chat template of a family."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    family = PUBLISHED[name]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(family.special),
        show_progress=False,
    )
    rng = random.Random(0)
    backend.train_from_iterator([" ".join(rng.choices(_WORDS, k=9)) for _ in range(200)], trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos or family.special[-1],
        chat_template=family.template,
    )
