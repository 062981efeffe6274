r"""Rebuild a tokenizer from the metadata of a GGUF file.

transformers rebuilds tokenizers too, but not all texts become the tokens of the model's training:

- Where it does not know how a byte-level tokenizer splits a text (`tokenizer.ggml.pre`), it splits
  as GPT-2 does. SmolLM2 splits off each digit first, which changes `"\n\n1"`.
- It adds no space to a text that begins with one, as Llama's SentencePiece does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4
"""Types of tokens that are found in a text before it is split."""

_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Splits off each digit, then as GPT-2."""
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")
_QWEN2 = ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez")
"""Values of `tokenizer.ggml.pre`, by how llama.cpp splits a text for them."""

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens by transformers's names, and by those of GGUF."""


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether texts begin with a BOS token.

    Args:
        metadata: The file's metadata.

    Returns:
        What the file says, or llama.cpp's default for its kind of tokenizer.
    """
    way, kind = (metadata.get(f"tokenizer.ggml.{name}") for name in ("pre", "model"))
    return bool(metadata.get("tokenizer.ggml.add_bos_token", way in _LLAMA3 or kind == "llama"))


def byte_level_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild a byte-level tokenizer.

    Args:
        metadata: The file's metadata.

    Returns:
        The tokenizer.

    Raises:
        LookupError: If the metadata are incomplete, or name an unknown way to split texts.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    way = metadata.get("tokenizer.ggml.pre")
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=way in _LLAMA3))
    backend.pre_tokenizer = _split(way)
    if way in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    ids = {name: metadata.get(f"tokenizer.ggml.{own}_token_id") for name, own in _SPECIAL.items()}
    special = {f"{name}_token": tokens[at] for name, at in ids.items() if at is not None}
    if adds_bos(metadata):
        bos = special["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, ids["bos"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def with_llamas_spaces(tokenizer: Any, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Give a SentencePiece tokenizer the spaces that llama.cpp gives to a text.

    Args:
        tokenizer: The tokenizer as transformers rebuilds it.
        metadata: The file's metadata.

    Returns:
        The tokenizer.
    """
    backend = tokenizer.backend_tokenizer
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = None
    # A class of transformers's own for Llama would rebuild the splits when it is read again.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **{name: getattr(tokenizer, name) for name in (f"{each}_token" for each in _SPECIAL)},
    )


def _split(way: str | None) -> Any:
    """How a text is split before tokens are merged."""
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if way in _GPT2:
        return as_gpt2
    if way in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, as_gpt2])
    if way not in (*_LLAMA3, *_QWEN2):
        known = ", ".join(sorted((*_GPT2, *_DIGITS, *_LLAMA3, *_QWEN2)))
        raise LookupError(f"it splits texts as {way!r} (tokenizer.ggml.pre); known: {known}")
    numbers = r"\p{N}{1,3}" if way in _LLAMA3 else r"\p{N}"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN.format(numbers=numbers)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
