"""What the package needs from a TransformerLens model of either class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models.caller_hooks import with_callers_hooks
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.holders import Holders
from backward_lens_tl.models.hooks import Tap
from backward_lens_tl.models.own_passes import own_passes
from backward_lens_tl.models.sites import ATTENTION_MATRICES, HookPointSite, MatrixName, Site
from backward_lens_tl.models.state import check_deterministic, check_gradients_exist
from backward_lens_tl.models.unembedding import Unembedding
from backward_lens_tl.models.vocabulary import Vocabulary

_SAMPLE = 4096
"""Number of tokens compared to decide whether embedding and unembedding are one matrix."""

_TIED = 0.9
"""Mean correlation above which they are; that of independent matrices is near 0."""


class Host(ABC):
    """A TransformerLens model, reduced to the operations that the package needs.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. It is never changed.

    Attributes:
        model: The model.
        name: The model's name, for titles and saved results.
        stored_as: For a GGUF file, how many tensors of each name are stored as which type.
        n_layers: Number of transformer blocks.
        n_heads: Number of query heads.
        d_head: Width of a head.
        d_model: Width of the residual stream.
        d_mlp: Width of an MLP's hidden layer; `4 * d_model` if the config does not say.
        is_gated: Whether MLPs have a `W_gate`.
        n_ctx: Longest prompt that the model accepts, in tokens.
        tokenizer: The model's Hugging Face tokenizer, or `None`.
        unembedding: The final norm and `W_U`.
    """

    unembedding_type: ClassVar[type[Unembedding]]

    def __init__(self, model: Any) -> None:
        cfg = model.cfg
        self.model = model
        self.name = str(getattr(cfg, "model_name", None) or type(model).__name__)
        self.stored_as: dict[str, dict[str, int]] | None = getattr(cfg, "stored_as", None)
        self.n_layers, self.n_heads = int(cfg.n_layers), int(cfg.n_heads)
        self.d_head, self.d_model = int(cfg.d_head), int(cfg.d_model)
        self.d_mlp = int(getattr(cfg, "d_mlp", None) or 4 * self.d_model)
        self.is_gated = bool(getattr(cfg, "gated_mlp", False))
        self.n_ctx = int(cfg.n_ctx)
        self.tokenizer = model.tokenizer
        self.unembedding = self.unembedding_type(model)

    @property
    def d_vocab(self) -> int:
        """Number of token ids that the model accepts."""
        return len(self.model.W_E)

    @property
    def d_vocab_out(self) -> int:
        """Number of logits; differs from `d_vocab` if one of the two matrices is padded."""
        return int(self.model.W_U.shape[1])

    @property
    def device(self) -> torch.device:
        """The device that tokens are sent to."""
        device: torch.device = next(self.model.parameters()).device
        return device

    # --- lengths of prompts ------------------------------------------------------------------

    def length_kind(self, length: int) -> Hashable:
        """What prompts must have in common to share a forward pass.

        Args:
            length: Tokens of a prompt.

        Returns:
            The same value for all lengths, unless rotary angles depend on the longest prompt of the
            pass.

        Raises:
            InputError: If rotary angles would depend on earlier passes.
        """
        del length
        return None

    def length_groups(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """Divide prompts into groups that may share a forward pass.

        Args:
            lengths: Number of tokens of each prompt.

        Returns:
            Indices of the prompts of each group, in their own order.
        """
        groups: dict[Hashable, list[int]] = {}
        for prompt, length in enumerate(lengths):
            groups.setdefault(self.length_kind(length), []).append(prompt)
        return [tuple(group) for group in groups.values()]

    # --- tokens ------------------------------------------------------------------------------

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer, as targets and readouts need it."""
        return Vocabulary(self.tokenizer, self.d_vocab_out)

    def tokenize(self, prompt: str, prepend_bos: bool | None) -> list[int]:
        """Token ids of one prompt by the model's own `to_tokens`, never truncated.

        Args:
            prompt: The text.
            prepend_bos: Whether to prepend a BOS token; `None` is the model's own default, without
                a second BOS if the text already begins with one.

        Returns:
            The ids, including BOS if there is one.

        Raises:
            InputError: If the model has no tokenizer, or a token has no row in the embedding.
        """
        if self.tokenizer is None:
            raise InputError(
                f"prompt {prompt!r} is text, but the model has no tokenizer; pass token ids of "
                "shape [batch, pos], or set a tokenizer on the model"
            )
        if prepend_bos is None and self.vocabulary.begins_with_bos(prompt):
            prepend_bos = False
        tokens = self.model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)
        ids: list[int] = tokens[0].tolist()
        for token_id in ids:
            if not 0 <= token_id < self.d_vocab:
                raise InputError(
                    f"the tokenizer returns token {token_id} ({self.vocabulary.text(token_id)!r}) "
                    f"for {prompt!r}, but the model's embedding has rows 0 to {self.d_vocab - 1}; "
                    "resize it before the model is wrapped "
                    "(hf_model.resize_token_embeddings(len(tokenizer))), leave the token out, or "
                    "pass prepend_bos=False if it is the BOS"
                )
        return ids

    # --- the forward pass --------------------------------------------------------------------

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "rows read d_vocab"]:
        """Run the model with the caller's hooks.

        Args:
            tokens: Token ids, padded on the right.

        Returns:
            The logits of every position that reaches the unembedding, connected to the autograd
            graph.
        """
        # No mask: in a causal model no real token attends to padding on its right, and a mask would
        # leave padded positions with nothing to attend to under a sliding window (NaN gradients).
        logits: Tensor = self.model(tokens, return_type="logits")
        return logits

    @abstractmethod
    def logits_of(
        self, tokens: Int[Tensor, "batch pos"], select: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "rows read d_vocab"]:
        """Run the model, and multiply by `W_U` at some positions only.

        Hooks at the unembedding see those positions only, or do not run.

        Args:
            tokens: Token ids, padded on the right.
            select: Maps a value per position, `[batch, pos, d]`, to the values at the positions
                that are needed, `[rows, read, d]`.

        Returns:
            The logits of those positions, connected to the autograd graph.
        """

    @contextmanager
    def own_precision(self) -> Iterator[None]:
        """Disable a caller's autocast, for passes that are the package's own.

        Yields:
            Nothing.
        """
        with torch.autocast(self.device.type, enabled=False), own_passes():
            yield

    # --- the embedding -----------------------------------------------------------------------

    def embedding_vector(self, token_id: int) -> Float[Tensor, "d_model"]:
        """A token's row of the embedding matrix, without the scale that some models apply."""
        row: Tensor = self.model.W_E[token_id].detach().clone()
        return row

    @cached_property
    def is_tied(self) -> bool:
        """Whether embedding and unembedding are one matrix, or were before weights were processed.

        Processing scales and centers each dimension of a tied unembedding, so over the vocabulary
        every dimension still correlates with the embedding's, up to the sign.
        """
        embed, unembed = self.model.W_E.detach(), self.model.W_U.detach().T
        n = min(len(embed), len(unembed), _SAMPLE)
        some = [each[:n].to(self.device, torch.float32) for each in (embed, unembed)]
        pairs = [each - each.mean(0) for each in some]
        norms = pairs[0].norm(dim=0) * pairs[1].norm(dim=0)
        cosines = (pairs[0] * pairs[1]).sum(0) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return bool(cosines.abs().mean() > _TIED)

    # --- the matrices ------------------------------------------------------------------------

    @abstractmethod
    def _attention_sites(self, layer: int) -> dict[MatrixName, Site]:
        """The attention matrices of a layer."""

    @abstractmethod
    def _mlp_sites(self, layer: int) -> dict[MatrixName, Site]:
        """The MLP matrices of a layer."""

    def matrices(self, group: Literal["attn", "mlp"]) -> tuple[MatrixName, ...]:
        """Names of the attention or MLP matrices of the model's first layer.

        Args:
            group: Which of the two.

        Returns:
            The names, in the order in which a layer uses them.
        """
        return tuple(self._attention_sites(0) if group == "attn" else self._mlp_sites(0))

    @property
    def has_mlp(self) -> bool:
        """Whether the model's first layer has an MLP."""
        return getattr(self.model.blocks[0], "mlp", None) is not None

    def sites(self, layer: int, matrices: Sequence[MatrixName]) -> list[Site]:
        """The sites of matrices of one layer.

        Args:
            layer: The layer, from 0.
            matrices: Their names.

        Returns:
            The sites, with their weights, in the order of `matrices`.

        Raises:
            InputError: If the layer has no such matrix.
        """
        found: dict[MatrixName, Site] = {}
        if any(matrix in ATTENTION_MATRICES for matrix in matrices):
            found |= self._attention_sites(layer)
        if any(matrix not in ATTENTION_MATRICES for matrix in matrices):
            found |= self._mlp_sites(layer)
        for matrix in matrices:
            if matrix not in found:
                raise InputError(
                    f"layer {layer} of this model has no {matrix}; it has {', '.join(found)}"
                )
        return [found[matrix] for matrix in matrices]

    # --- hook points and the caller's hooks --------------------------------------------------

    @cached_property
    def hook_points(self) -> Mapping[str, HookPointSite]:
        """TransformerLens's hook points by name, including aliases."""
        return {name: self._hook_point(name, point) for name, point in self.model.hook_dict.items()}

    def _hook_point(self, name: str, point: Any) -> HookPointSite:
        conversion = getattr(point, "hook_conversion", None)
        as_hooked = _unchanged if conversion is None else conversion.convert
        return HookPointSite(name, Tap(point, "output"), as_hooked)

    def pattern(self, layer: int) -> HookPointSite:
        """Where a layer's attention pattern leaves the softmax, before the caller's hooks."""
        site = self.hook_points[f"blocks.{layer}.attn.hook_pattern"]
        return replace(site, tap=Tap(site.tap.module, "input"))

    @cached_property
    def hooked_modules(self) -> list[nn.Module]:
        """Modules, including hook points, that have hooks of the caller."""
        return with_callers_hooks(module for _, module in self._modules)

    def are_in_blocks(self, modules: Sequence[nn.Module]) -> bool:
        """Whether all of these modules are inside the transformer blocks."""
        inside = {id(module) for module in self.model.blocks.modules()} if modules else set()
        return all(id(module) in inside for module in modules)

    # --- parameters --------------------------------------------------------------------------

    def trained(self) -> list[Tensor]:
        """Parameters that require gradients."""
        return [
            parameter
            for _, module in self._modules
            for parameter in module._parameters.values()
            if parameter is not None and parameter.requires_grad
        ]

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the forward pass uses, by name."""

    @property
    @abstractmethod
    def processed_matrices(self) -> frozenset[MatrixName]:
        """Matrices that TransformerLens's weight processing changed, judging by the weights."""

    def fingerprint(self) -> str:
        """A checksum of the parameters and their names; it takes a few seconds for a large model.

        Names and shapes are those of the model's class, so the same weights in another class or
        version of TransformerLens may have another checksum. What is kept under it is then computed
        again, or refused; it is never used for other weights.

        Returns:
            SHA-256, in hexadecimal.
        """
        return tensors_digest(self.parameters())

    def holders(self, weight: Tensor) -> tuple[str, ...]:
        """Names under which modules hold a parameter; more than one if it is shared."""
        return self._holders.of(weight)

    @cached_property
    def _holders(self) -> Holders:
        return Holders(self._modules)

    def _roots(self) -> list[nn.Module]:
        """Modules that together contain every module of the forward pass."""
        return [self.model]

    @property
    def modules(self) -> list[nn.Module]:
        """Every module of the forward pass, some of them more than once."""
        return [module for _, module in self._modules]

    @cached_property
    def _modules(self) -> list[tuple[str, nn.Module]]:
        """Every module, by its name under its root."""
        return list(chain.from_iterable(root.named_modules() for root in self._roots()))

    # --- checks ------------------------------------------------------------------------------

    @property
    def attention_implementation(self) -> str | None:
        """Which attention implementation the model uses, if it has several."""
        return None

    @property
    def causality_advice(self) -> str:
        """What to do about a model that turns out not to be causal, for a message."""
        return ""

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether the model claims that tokens attend only to earlier ones."""

    def check_state(self) -> None:
        """Raise if the model is not a causal decoder, or its gradients would be wrong.

        Raises:
            UnsupportedModelError: If it is not causal, or has no blocks.
            ModelStateError: Inside `torch.inference_mode()`, if a parameter was created in it or is
                on the meta device, or if dropout or gradient checkpointing is active.
        """
        if not self.is_causal or not hasattr(self.model, "blocks"):
            raise UnsupportedModelError(
                f"{self.name!r} is not a causal decoder with a stack of blocks; pass a model such "
                "as GPT-2 or Llama"
            )
        check_gradients_exist(self.model)
        check_deterministic(self._modules)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def is_centered(weight: Float[Tensor, "*rows d_model"]) -> bool:
    """Whether every row has mean zero, as after TransformerLens's weight processing.

    Args:
        weight: The matrix, with `d_model` as its last axis.

    Returns:
        Whether the means are much smaller than in a random matrix, about `size / sqrt(d_model)`.
    """
    weight = weight.detach().float()
    means, size = weight.mean(-1).abs().max(), weight.abs().mean()
    return bool(means <= 0.01 * size / math.sqrt(weight.shape[-1]))
