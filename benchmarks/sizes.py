"""Random models with the sizes of well-known models, and random prompts.

Speed and memory do not depend on the weights, so nothing is downloaded.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

N_CTX = 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_BOS = 0


@dataclass(frozen=True)
class Size:
    """Size and architecture of a model.

    Attributes:
        name: The model with this size.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        n_heads: Number of attention heads.
        d_mlp: Width of the MLP.
        d_vocab: Number of tokens.
        n_key_value_heads: Heads of keys and values, if there are fewer than `n_heads`. A model with
            them is a Llama (gated SiLU, RMS norms, rotary positions); one without is a GPT-2.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    d_vocab: int
    n_key_value_heads: int | None = None

    @property
    def is_llama(self) -> bool:
        """Whether the architecture is Llama rather than GPT-2."""
        return self.n_key_value_heads is not None

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads


SMALL = Size("gpt2-small", 12, 768, 12, 3072, 50257)

MEDIUM = Size("gpt2-medium", 24, 1024, 16, 4096, 50257)

XL = Size("gpt2-xl", 48, 1600, 25, 6400, 50257)

LLAMA = Size("llama-1b", 16, 2048, 32, 8192, 128256, n_key_value_heads=8)

SIZES = {size.name: size for size in (SMALL, MEDIUM, XL, LLAMA)}


def shrunk(size: Size) -> Size:
    """A tiny size with the same name and architecture.

    Args:
        size: The size to replace.

    Returns:
        The tiny size.
    """
    n_key_value_heads = 2 if size.is_llama else None
    return Size(size.name, 2, 48, 4, 96, 100, n_key_value_heads)


@dataclass(frozen=True)
class Question:
    """Prompts of equal length, and a target.

    Attributes:
        ids: Token ids; every prompt begins with BOS.
        target: Id of the target.
    """

    ids: Int[Tensor, "batch pos"]
    target: int

    @property
    def texts(self) -> list[str]:
        """The prompts as texts, without BOS, which the tokenizer of `bridge` adds."""
        return [" ".join(map(_word, row)) for row in self.ids[:, 1:].tolist()]

    @property
    def target_text(self) -> str:
        """The target as a text."""
        return _word(self.target)


def question(size: Size, batch: int, positions: int, device: str) -> Question:
    """Random prompts.

    Args:
        size: Size of the model, for the vocabulary.
        batch: Number of prompts.
        positions: Prompt length in tokens, including BOS.
        device: The model's device.

    Returns:
        The question, the same for each call.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_BOS + 1, size.d_vocab, (batch, positions), generator=generator)
    ids[:, 0] = _BOS
    return Question(ids.to(device), target=size.d_vocab // 2)


def hooked(size: Size, device: str, dtype: str = "float32") -> Any:
    """Create a `HookedTransformer` whose parameters require gradients, as in a newly loaded model.

    Args:
        size: The size.
        device: The device, where the weights are drawn too, because a GPU is faster.
        dtype: Name of the dtype.

    Returns:
        The model, without a tokenizer. Its biases are zero.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    family: dict[str, Any] = {"act_fn": "gelu_new", "normalization_type": "LN"}
    if size.is_llama:
        family = {
            "act_fn": "silu",
            "gated_mlp": True,
            "n_key_value_heads": size.n_key_value_heads,
            "normalization_type": "RMS",
            "positional_embedding_type": "rotary",
            "rotary_dim": size.d_head,
        }
    config = HookedTransformerConfig(
        n_layers=size.n_layers,
        d_model=size.d_model,
        n_heads=size.n_heads,
        d_head=size.d_head,
        d_mlp=size.d_mlp,
        d_vocab=size.d_vocab,
        n_ctx=N_CTX,
        model_name=size.name,
        seed=0,
        device=device,
        dtype=DTYPES[dtype],
        **family,
    )
    with warnings.catch_warnings(), torch.device(device):
        # The class is deprecated in TransformerLens 3.9.
        warnings.simplefilter("ignore", DeprecationWarning)
        return HookedTransformer(config).eval()


def bridge(size: Size, device: str, dtype: str = "float32") -> Any:
    """Create a raw GPT-2 `TransformerBridge`, which TransformerLens's own tool needs.

    Args:
        size: A size of GPT-2.
        device: The device.
        dtype: Name of the dtype.

    Returns:
        The model, with a tokenizer of one word per token.

    Raises:
        ValueError: If the architecture is Llama.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if size.is_llama:
        raise ValueError(f"{size.name} is a Llama; a bridge is made of GPT-2's sizes only")
    settings: dict[str, Any] = {
        "n_layer": size.n_layers,
        "n_embd": size.d_model,
        "n_head": size.n_heads,
        "n_inner": size.d_mlp,
        "vocab_size": size.d_vocab,
        "n_positions": N_CTX,
        "bos_token_id": _BOS,
        "eos_token_id": _BOS,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    with torch.device(device):
        own: Any = GPT2LMHeadModel(GPT2Config(**settings))
    # TransformerLens loads the tokenizer again, from the folder that it came from.
    with tempfile.TemporaryDirectory() as folder:
        _word_tokenizer(size.d_vocab).save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            "gpt2",
            hf_model=own.to(DTYPES[dtype]).eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device=device,
            dtype=DTYPES[dtype],
        ).eval()


def _word(token: int) -> str:
    return f"w{token}"


def _word_tokenizer(d_vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the words `w0` (BOS), `w1`, ... as tokens."""
    words = {_word(token): token for token in range(d_vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=_word(_BOS)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _word(_BOS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
