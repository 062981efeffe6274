"""Reading vectors as tokens with the weights of a model that is being trained.

A model of TransformerLens knows its own final norm and unembedding. In a transformers model the
norm is found in a forward pass over a few tokens, as the last one before the output embeddings, and
both together must rank the tokens as the model's logits do. A softcap or a scale of the logits does
not change the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models import Host, host_of_trained, probe, probe_tokens
from backward_lens_tl.models.hooks import Tap, hooked
from backward_lens_tl.models.vocabulary import Vocabulary
from backward_lens_tl.readout.topk import checked_k, extremes
from backward_lens_tl.readout.vectors import VectorReadout
from backward_lens_tl.training.undisturbed import undisturbed

_ROUNDINGS = 64
"""Rounding error of a logit, in `eps` of the largest one."""

_LONGEST = 8
"""Most tokens of the pass that checks a model."""

_IN_LIST = re.compile(r"\.\d+\.")
"""In the name of a module that belongs to a layer."""


class OwnReadout:
    """Reads vectors with the current weights of a model.

    Args:
        model: The model.
        tokenizer: The tokenizer of a transformers model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    @cached_property
    def _reads(self) -> _HostScores | _Head:
        host = host_of_trained(self._model)
        with undisturbed(self._model):
            if host is not None:
                return _HostScores(host)
            return _head_of(self._model, self._tokenizer)

    @torch.no_grad()
    def read(self, vectors: Float[Tensor, "n d_model"], k: int) -> VectorReadout:
        """Read vectors.

        Args:
            vectors: The vectors.
            k: Number of tokens at either end.

        Returns:
            The readout, without targets.

        Raises:
            InputError: If the vectors have another width, or `k` is not positive.
            UnsupportedModelError: If the model's final norm and unembedding are not recognised.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self._reads.d_model:
            raise InputError(
                f"vectors has shape {tuple(vectors.shape)}; pass vectors of the residual stream, "
                f"[n, {self._reads.d_model}]"
            )
        with torch.autocast(vectors.device.type, enabled=False):
            scores = self._reads.scores(vectors)
        k = checked_k(k, scores.shape[1])
        top, bottom = (extremes(scores, k, largest=largest) for largest in (True, False))
        ids = torch.cat([top.ids, bottom.ids]).unique().tolist()
        texts = self._reads.vocabulary
        return VectorReadout(
            top_ids=top.ids,
            top_scores=top.scores,
            bottom_ids=bottom.ids,
            bottom_scores=bottom.scores,
            targets=None,
            target_rank=None,
            token_texts={token: texts.text(token) for token in ids},
        )


class _HostScores:
    """A model of TransformerLens.

    Args:
        host: The model.

    Raises:
        UnsupportedModelError: If its unembedding does not give its logits.
    """

    def __init__(self, host: Host) -> None:
        if (seen := probe(host)) is not None:
            seen.check_readout(host)
        self._host = host
        self.vocabulary, self.d_model = host.vocabulary, host.d_model

    def scores(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """The logits."""
        return self._host.unembedding.logits(vectors)


@dataclass(frozen=True)
class _Head:
    """The final norm and the output embeddings of a transformers model."""

    norm: nn.Module
    unembed: nn.Module
    vocabulary: Vocabulary
    d_model: int

    def scores(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """The logits before a softcap or a scale."""
        weight: Any = self.norm.weight
        like = vectors.to(device=weight.device, dtype=weight.dtype)
        # Without the hooks of the training.
        scores: Tensor = self.unembed.forward(self.norm.forward(like))
        return scores


def _head_of(model: Any, tokenizer: Any) -> _Head:
    """Find the final norm and the unembedding, and check them."""
    unembed = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(unembed, nn.Module):
        raise _unknown(model, "it has no output embeddings")
    embedding = model.get_input_embeddings().weight
    tokens = probe_tokens(len(embedding), _LONGEST, ())[:1].to(embedding.device)
    with _norms(model) as ran, torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
    if not ran:
        raise _unknown(model, "no norm comes after its layers")
    name, norm, x = ran[-1]
    head = _Head(norm, unembed, Vocabulary(tokenizer, logits.shape[-1]), x.shape[-1])
    with torch.no_grad():
        scores = head.scores(x.reshape(-1, x.shape[-1]))
    # Of a model that is spread over devices, the logits may be on another one.
    if scores.shape != logits.shape or not _rank_alike(scores, logits.to(scores.device)):
        raise _unknown(model, f"{name} and the output embeddings do not rank tokens as it does")
    return head


@contextmanager
def _norms(model: nn.Module) -> Iterator[list[tuple[str, nn.Module, Tensor]]]:
    """Record norms outside of the layers as they run: name, module and input."""
    ran: list[tuple[str, nn.Module, Tensor]] = []

    def keep(name: str, module: nn.Module) -> Callable[[Tensor], None]:
        return lambda x: ran.append((name, module, x.detach()))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1 and not _IN_LIST.search(name):
                hooks.enter_context(hooked(Tap(module, "input"), keep(name, module)))
        yield ran


def _rank_alike(scores: Float[Tensor, "n d_vocab"], logits: Float[Tensor, "n d_vocab"]) -> bool:
    """Whether the logits never increase along falling scores, apart from rounding."""
    along = logits.take_along_dim(scores.argsort(1, descending=True), 1)
    rounding = _ROUNDINGS * torch.finfo(logits.dtype).eps * logits.abs().max()
    return bool((along.diff(dim=1) <= rounding).all())  # NaN fails


def _unknown(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the tokens that a {type(model).__name__} reads in its residual stream are not known: "
        f"{reason}; pass a model of TransformerLens as reader, such as load_model(folder) returns"
    )
