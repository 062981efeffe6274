"""Pairs of a TransformerLens model and its Hugging Face original, for edits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import architectures
import pytest
import torch
from architectures import NotAvailable, build_model, hf_model
from models import CORPUS, hf_matrices
from torch import Tensor

from backward_lens_tl.editing import (
    SecondMoments,
    second_moments,
)

LAYER = 1


EITHER = "bridge" if architectures.HAS_BRIDGE else "hooked"


PROMPTS = ("Messi plays for", "Rome is in", "The dog of the king runs to", "A river runs")


# Rounding inside TransformerLens: HookedTransformer's RMS norms and rotary angles and
# Hugging Face's RMS norms compute in float32.
FAMILIES = {"gpt2": 1e-11, "llama": 3e-6, "gpt_neox": 3e-6, "gemma2": 3e-6}


@dataclass(frozen=True)
class Pair:
    """A TransformerLens model and a raw Hugging Face model of the same weights.

    Attributes:
        model: The model that is edited.
        raw: The independent model.
        exact: Tolerance between their results.
    """

    model: Any
    raw: Any
    exact: float

    def ids(self, text: str) -> list[int]:
        return self.model.tokenizer(text, add_special_tokens=False)["input_ids"]

    def first(self, target: str) -> int:
        return self.ids(target)[0]

    def embedding(self, target: str) -> Tensor:
        """The target's row of the decoding matrix."""
        return self.raw.get_output_embeddings().weight[self.first(target)].detach()

    def reads(self, ids: Sequence[int], layer: int = LAYER) -> Tensor:
        """Input of FF2 at each position."""
        return through(self.raw, ids, layer)[0]

    def moments(self) -> SecondMoments:
        return second_moments(self.model, TEXTS, layers=LAYER, prepend_bos=False, progress=False)


# More tokens than d_mlp, none of them special.
TEXTS = [f"{one} {other}" for one in CORPUS for other in CORPUS]


def tied_hf_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """As `hf_model`, with tied embedding and unembedding."""
    model = hf_model(family, dtype)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    return model


@functools.cache
def pair(family: str, kind: str, *, tied: bool = False) -> Pair:
    """A pair of float64 models; skips where TransformerLens lacks one."""
    make = tied_hf_model if tied else hf_model
    try:
        with patch.object(architectures, "hf_model", make):
            model = build_model(family, kind, torch.float64)
    except NotAvailable as error:
        pytest.skip(str(error))
    raw = make(family, torch.float64)
    tokens = torch.tensor([model.tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]])
    # A bridge registers its own hooks at the first forward pass of each kind.
    model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    return Pair(model, raw, FAMILIES.get(family, 3e-6) if "-" not in kind else 3e-5)


@contextmanager
def edited(raw: Any, change: Tensor, layer: int = LAYER) -> Iterator[Any]:
    """A Hugging Face model whose FF2 temporarily has another weight."""
    module = hf_matrices(raw)["W_out", layer]
    before = module.weight.detach().clone()
    is_linear = isinstance(module, torch.nn.Linear)
    with torch.no_grad():
        module.weight += change.T if is_linear else change
    yield raw
    with torch.no_grad():
        module.weight.copy_(before)


def through(raw: Any, ids: Sequence[int], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output of FF2 in a Hugging Face model, and logits: one row per position."""
    module, seen = hf_matrices(raw)["W_out", layer], []
    handle = module.register_forward_hook(
        lambda _, args, output: seen.append((args[0].detach().clone(), output.detach().clone()))
    )
    with torch.no_grad():
        logits = raw(torch.tensor([list(ids)])).logits[0]
    handle.remove()
    [(reads, writes)] = seen
    return reads[0], writes[0], logits


def tl_logits(model: Any, ids: Sequence[int]) -> Tensor:
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        return model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))[0]
