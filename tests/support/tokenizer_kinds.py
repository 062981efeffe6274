"""Tokenizers of all common kinds, each trained here on a few sentences."""

from __future__ import annotations

import functools
import json
import tempfile
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = (
    "Once upon a time, there was a cat. She saw two cats, and they were happy!",
    "Rome is old. The largest square of Rome is called Piazza Navona.",
    "Zoë and José met in São Paulo; the café costs 3.50 or 12 reais.",
    "Lionel Messi plays for Barcelona, and Paris is the capital of France.",
    "The numbers 1, 2, 10 and 2024 are written\nwithout any letters.",
    "An apple, a banana: 'quotes' (and brackets) are unhappily retokenised.",
)
SPECIAL = ["<bos>", "<eos>", "<unk>", "<pad>"]
SIZE = 320


def _byte_level(size: int = SIZE + 100, normalizer: Any = None) -> Tokenizer:
    """As in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """As in Llama: a space before every text, bytes for unknown characters, and its own BOS."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE + 160, special_tokens=[*SPECIAL, *pieces], show_progress=False
    )
    words = [word for line in CORPUS for word in line.split()]
    trained.train_from_iterator([*words, *CORPUS], trainer)
    learnt = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=learnt["vocab"],
            merges=[tuple(merge) for merge in learnt["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def _wordpiece() -> Tokenizer:
    """As in BERT: words and their continuations."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _normalising() -> Tokenizer:
    """A tokenizer that normalises text: compatibility forms and lower case."""
    both = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return _byte_level(SIZE + 60, both)


def _with_added_tokens() -> Tokenizer:
    """As in a chat model: markers of turns among the byte-level tokens."""
    tokenizer = _byte_level()
    tokenizer.add_special_tokens(["<|user|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("Piazza Navona", normalized=False)])
    return tokenizer


_KINDS = {
    "byte-level": _byte_level,
    "sentencepiece": _sentencepiece,
    "wordpiece": _wordpiece,
    "normalising": _normalising,
    "added tokens": _with_added_tokens,
}
KINDS = tuple(_KINDS)


@functools.cache
def _folder(kind: str) -> tempfile.TemporaryDirectory[str]:
    """TransformerLens reloads a tokenizer from its folder."""
    folder = tempfile.TemporaryDirectory()
    PreTrainedTokenizerFast(
        tokenizer_object=_KINDS[kind](),
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    ).save_pretrained(folder.name)
    return folder


def tokenizer_of(kind: str) -> Any:
    """A new tokenizer of the given kind."""
    return AutoTokenizer.from_pretrained(_folder(kind).name)
