"""Word-level tokenizers for the embedded tasks, saved in Hugging Face form."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from jaxrm import atomic

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT)

# A turn opens with its role's token; the assistant's ends with EOS, where generation stops.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns are known, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_WORD = re.compile(r"\w+|[^\w\s]+")


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of ``text`` in lower case: the tokens of the tokenizer."""
    return _WORD.findall(text.lower())


def write_tokenizer(folder: Path, texts: Iterable[str], *, max_length: int) -> None:
    """Write a word-level tokenizer that ``transformers.AutoTokenizer`` loads without a model beside it.

    Text is lowercased and split into words and punctuation marks. Decoding puts no space before a mark, so lowercase
    text in ordinary English spacing is restored. Ids are the special tokens (pad 0, bos 1, eos 2, unk 3, user 4,
    assistant 5), then the words in alphabetical order.

    Args:
      folder: the folder of ``tokenizer.json`` and ``tokenizer_config.json``; it is made if necessary.
      texts: texts with all words of the vocabulary.
      max_length: longest sequence of the task in tokens, stored as ``model_max_length``.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = sorted({word for text in texts for word in split_words(text)})
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Of the WordPiece decoder only the clean-up is wanted: no space before a punctuation mark. No word begins
    # with its prefix.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [USER, ASSISTANT],
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    atomic.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    atomic.write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
