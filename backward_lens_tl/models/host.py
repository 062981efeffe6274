"""What the lens needs from a TransformerLens model of either class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from backward_lens_tl.errors import InputError, ModelStateError, UnsupportedModelError
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.sites import (
    ATTENTION_MATRICES,
    HookPointSite,
    MatrixName,
    Site,
    Tap,
)
from backward_lens_tl.models.unembedding import product
from backward_lens_tl.models.vocabulary import Vocabulary

_FINE = 1e-6
_ROUNDINGS = 32
"""What a norm's own rounding may make of two vectors of one direction, in `eps` of the largest."""

_PIECE = 64
"""Vectors that are multiplied at a time beside the scores of all others, to save memory."""

_CLOSE = 0.1
"""Nearer to a norm's bias than this part of the way, a vector does not tell its direction well:
going on to the whole way multiplies rounding by its inverse."""

_SAMPLE = 4096
"""Tokens by which it is told whether embedding and unembedding are one matrix."""

_TIED = 0.9
"""Mean correlation above which they are; independent matrices have next to none."""

_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)
"""torch's own collections of the hooks that act on every module."""

_LIBRARIES = ("transformer_lens", "transformers", "accelerate")
_WIRING = "transformer_lens.model_bridge"


class Host(ABC):
    """A TransformerLens model, seen through the operations that the lens needs.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`. It is never changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    # --- sizes -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The model's name, for titles and saved results."""
        return str(getattr(self.model.cfg, "model_name", None) or type(self.model).__name__)

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def n_heads(self) -> int:
        """Number of attention heads; there may be fewer key-value heads."""
        return int(self.model.cfg.n_heads)

    @property
    def d_head(self) -> int:
        """Width of an attention head."""
        return int(self.model.cfg.d_head)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.cfg.d_model)

    @property
    def d_mlp(self) -> int:
        """Width of an MLP's hidden layer; four times `d_model` where the model does not say."""
        return int(getattr(self.model.cfg, "d_mlp", None) or 4 * self.d_model)

    @property
    def is_gated(self) -> bool:
        """Whether MLPs read the residual stream with two matrices."""
        return bool(getattr(self.model.cfg, "gated_mlp", False))

    @property
    def itemsize(self) -> int:
        """Bytes of one of the model's numbers."""
        return int(self.model.W_U.element_size())

    @property
    def n_ctx(self) -> int:
        """Longest prompt, in tokens, that the model accepts."""
        return int(self.model.cfg.n_ctx)

    @property
    def d_vocab(self) -> int:
        """Number of token ids that the model reads."""
        return len(self.model.W_E)

    @property
    def d_vocab_out(self) -> int:
        """Number of logits; with padded embeddings not the same."""
        return int(self.model.W_U.shape[1])

    @property
    def device(self) -> torch.device:
        """The device that tokens are sent to."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def length_kind(self, length: int) -> Hashable:
        """What prompts have to have in common to share a pass.

        Args:
            length: Tokens of a prompt.

        Returns:
            Its kind; the same for all lengths unless positions are rotated by the length of the
            whole pass.

        Raises:
            InputError: If prompts of this length have no numbers of their own.
        """
        del length
        return None

    def length_groups(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """Divide prompts into those that may share a pass.

        Args:
            lengths: Number of tokens of each.

        Returns:
            Indices of the prompts of each group, in their own order.
        """
        groups: dict[Hashable, list[int]] = {}
        for prompt, length in enumerate(lengths):
            groups.setdefault(self.length_kind(length), []).append(prompt)
        return [tuple(group) for group in groups.values()]

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Refuse prompts that may not share a pass.

        Args:
            lengths: Number of tokens of each.

        Raises:
            InputError: If they are of several kinds, or one of them of none.
        """
        if len(self.length_groups(lengths)) > 1:
            raise InputError(
                "some prompts are longer than the context that the model was first trained with "
                "and others are not; it rotates positions of both differently, and all prompts of "
                "a pass alike. Pass them in separate calls"
            )

    # --- tokens ----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, or `None`."""
        return self.model.tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer, as far as targets and readouts need it."""
        return Vocabulary(self.tokenizer, self.d_vocab_out)

    def tokenize(self, prompt: str, prepend_bos: bool | None) -> list[int]:
        """Token ids of one prompt, by the model's own `to_tokens`, never truncated.

        Args:
            prompt: The text.
            prepend_bos: Whether a BOS token goes in front; `None` is the model's own default, and
                no second one where the text already begins with it.

        Returns:
            The ids, BOS included where there is one.

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
        ids = [int(token) for token in tokens[0]]
        rows = self.d_vocab
        for token_id in ids:
            if not 0 <= token_id < rows:
                raise InputError(
                    f"the tokenizer makes token {token_id} ({self.vocabulary.text(token_id)!r}) of "
                    f"{prompt!r}, and the model's embedding has the rows 0 to {rows - 1}; "
                    "resize it before the model is wrapped "
                    "(hf_model.resize_token_embeddings(len(tokenizer))), leave the token out, or "
                    "pass prepend_bos=False if it is the BOS"
                )
        return ids

    # --- the forward pass --------------------------------------------------------------------

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "rows read d_vocab"]:
        """Run the model, with whatever hooks there are on it.

        Args:
            tokens: Token ids, padded on the right.

        Returns:
            The logits of every position that reaches the unembedding, connected to the autograd
            graph.
        """
        # In a causal model no real token sees padding on its right, so nothing is masked. A mask
        # that hides the padding would leave padded positions with nothing to see under a sliding
        # window, and NaN in their gradients.
        logits: Tensor = self.model(tokens, return_type="logits")
        return logits

    @abstractmethod
    def logits_of(
        self, tokens: Int[Tensor, "batch pos"], select: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "rows read d_vocab"]:
        """Run the model, and multiply by `W_U` only where it is needed.

        Hooks at the unembedding itself do not see all positions, or do not run.

        Args:
            tokens: Token ids, padded on the right.
            select: From something per position, `[batch, pos, d]`, to that at the positions that
                are needed, `[rows, read, d]`.

        Returns:
            The logits of those positions, connected to the autograd graph.
        """

    def own_precision(self) -> torch.autocast:
        """Keep a caller's autocast from rounding what the model computes."""
        return torch.autocast(self.device.type, enabled=False)

    # --- the vocabulary ----------------------------------------------------------------------

    def unembed(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """Read vectors as the model reads its last residual stream.

        `ln_final(v) @ W_U + b_U` and then the model's own softcap or scale; the norm's
        statistics are those of each `v`. The caller's hooks do not run here.

        Args:
            vectors: Vectors of the residual stream's width.

        Returns:
            Logits, in the dtype of `W_U`; of many vectors, those of one token lie side by side in
            memory.
        """
        weight = self.model.W_U
        with self.own_precision():
            normed = self._final_norm(vectors.to(device=weight.device, dtype=weight.dtype))
            return self._decoded(normed)

    def unembed_both(
        self, vectors: Float[Tensor, "n d_model"], directions: Float[Tensor, "n d_model"]
    ) -> Iterator[Float[Tensor, "n d_vocab"]]:
        """Read vectors as `unembed` does, and then others of the same direction and another length.

        A norm takes both to the line through its bias: `ln(v) = r ln(u) + (1 - r) ln(0)` for a `v`
        along `u`, with a number `r` for each vector. So do the logits lie on a line, and where `r`
        is not so small that rounding would be magnified, one product gives both.

        Args:
            vectors: Vectors of the residual stream's width.
            directions: The same, each times a positive number.

        Yields:
            Logits of the vectors, and then, perhaps in the same memory, those of the directions.
        """
        weight = self.model.W_U
        with self.own_precision():
            own, along, nothing = (
                self._final_norm(each.to(device=weight.device, dtype=weight.dtype))
                for each in (vectors, directions, torch.zeros_like(vectors[:1]))
            )
            part = _part_of_the_way(nothing, along, own)
            if part is None:
                yield self._decoded(own)
                yield self._decoded(along)
                return
            # The line is that of the products: a bias of the unembedding may be infinite.
            products = product(own, weight)
            yield self._finished(products)
            close = part[:, 0] < _CLOSE
            beyond = 1 / part.masked_fill(close[:, None], 1)
            torch.lerp(product(nothing, weight), products, beyond, out=products)
            for rows in close.nonzero()[:, 0].split(_PIECE):
                products[rows] = product(along[rows], weight)
            yield self._finished(products)

    def _decoded(self, normed: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """What the model makes of vectors behind its final norm."""
        return self._finished(product(normed, self.model.W_U))

    def _finished(self, products: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        """Logits of the vectors' products with `W_U`."""
        bias = self.model.b_U
        # Most models have no bias here, and adding zeros is a pass over all logits.
        return self._output_transform(products + bias if bool(bias.any()) else products)

    def embedding_vector(self, token_id: int) -> Float[Tensor, "d_model"]:
        """A token's row of the embedding matrix, without a scale that belongs to no weight."""
        row: Tensor = self.model.W_E[token_id].detach().clone()
        return row

    def unembedding_vector(self, token_id: int) -> Float[Tensor, "d_model"]:
        """A token's column of the unembedding matrix."""
        column: Tensor = self.model.W_U[:, token_id].detach().clone()
        return column

    @cached_property
    def is_tied(self) -> bool:
        """Whether embedding and unembedding are one matrix, or were before weights were processed.

        Processing scales each dimension of a tied unembedding, and centers it, so that over the
        vocabulary every dimension is still correlated with the embedding's, up to the sign.
        """
        embed, unembed = self.model.W_E.detach(), self.model.W_U.detach().T
        n = min(len(embed), len(unembed), _SAMPLE)
        some = [each[:n].to(self.device, torch.float32) for each in (embed, unembed)]
        pairs = [each - each.mean(0) for each in some]
        norms = pairs[0].norm(dim=0) * pairs[1].norm(dim=0)
        cosines = (pairs[0] * pairs[1]).sum(0) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return bool(cosines.abs().mean() > _TIED)

    @property
    def faint_norm(self) -> float:
        """Length below which the final norm's `eps` outweighs a vector, `sqrt(d_model * eps)`.

        A shorter vector is not scaled up to the usual size, and what is read of it is more and
        more the bias of the norm and of the unembedding. Where there is neither, as with most
        RMSNorms, length does not change the order of scores; then, and without a final norm, this
        is 0.
        """
        if self._norm_module() is None or not self._has_readout_bias:
            return 0.0
        return math.sqrt(self.model.cfg.d_model * self.model.cfg.eps)

    @cached_property
    def _has_readout_bias(self) -> bool:
        """Whether reading a zero vector tells tokens apart."""
        nothing = torch.zeros_like(self.model.W_U[:, 0])[None]
        with torch.no_grad(), self.own_precision():
            return bool(self._final_norm(nothing).any()) or bool(self.model.b_U.any())

    @property
    def last_resid(self) -> Tap:
        """Where the last residual stream passes, before the final norm if there is one."""
        norm = self._norm_module()
        return Tap(self.model.unembed if norm is None else norm, "input")

    @abstractmethod
    def _norm_module(self) -> Any:
        """The final norm, or `None` if there is none."""

    @abstractmethod
    def _final_norm(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]: ...

    @abstractmethod
    def _output_transform(
        self, logits: Float[Tensor, "n d_vocab"]
    ) -> Float[Tensor, "n d_vocab"]: ...

    # --- the matrices ------------------------------------------------------------------------

    @abstractmethod
    def _attention_sites(self, layer: int) -> dict[MatrixName, Site]:
        """The attention matrices that a layer has."""

    @abstractmethod
    def _mlp_sites(self, layer: int) -> dict[MatrixName, Site]:
        """The MLP matrices that a layer has."""

    def matrices(self, group: Literal["attn", "mlp"]) -> tuple[MatrixName, ...]:
        """Names of the matrices of attention or MLP that the model's first layer has.

        Args:
            group: Which of the two.

        Returns:
            The names, in the order in which a layer uses them.
        """
        return tuple(self._attention_sites(0) if group == "attn" else self._mlp_sites(0))

    @property
    def has_mlp(self) -> bool:
        """Whether the model's first layer has an MLP beside its attention."""
        return getattr(self.model.blocks[0], "mlp", None) is not None

    def sites(self, layer: int, matrices: Sequence[MatrixName]) -> list[Site]:
        """Where matrices of one layer meet their inputs and their outputs.

        Args:
            layer: The layer, from 0.
            matrices: Their names.

        Returns:
            The sites, with their weights, in the order asked for.

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

    # --- hook points -------------------------------------------------------------------------

    @cached_property
    def hook_points(self) -> Mapping[str, HookPointSite]:
        """TransformerLens's hook points by name, aliases included."""
        return {name: self._hook_point(name, point) for name, point in self.model.hook_dict.items()}

    def _hook_point(self, name: str, point: Any) -> HookPointSite:
        conversion = getattr(point, "hook_conversion", None)
        as_hooked = _unchanged if conversion is None else conversion.convert
        return HookPointSite(name, Tap(point, "output"), as_hooked)

    def pattern(self, layer: int) -> HookPointSite:
        """Where a layer's attention pattern comes out of the softmax, before the caller's hooks.

        Args:
            layer: The layer, from 0.

        Returns:
            The place.
        """
        site = self.hook_points[f"blocks.{layer}.attn.hook_pattern"]
        return replace(site, tap=Tap(site.tap.module, "input"))

    # --- the caller's hooks --------------------------------------------------------------------

    @cached_property
    def hooked_modules(self) -> list[nn.Module]:
        """Modules, hook points among them, that carry hooks of the caller."""
        on_all = any(_GLOBAL_HOOKS)
        return [
            module
            for _, module in self._modules
            if on_all or any(_is_callers(hook, module) for hook in _hooks(module))
        ]

    def are_in_blocks(self, modules: Sequence[nn.Module]) -> bool:
        """Whether modules are parts of the transformer blocks.

        Args:
            modules: Modules of the model.

        Returns:
            Whether all of them are.
        """
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
        """The parameters that take part in the forward pass, by name."""

    @property
    @abstractmethod
    def processed_matrices(self) -> frozenset[MatrixName]:
        """Matrices that TransformerLens's weight processing changed, as far as the model shows."""

    def fingerprint(self) -> str:
        """A checksum of the parameters; it takes some seconds for a large model."""
        return tensors_digest(self.parameters())

    def holders(self, weight: Tensor) -> tuple[str, ...]:
        """Names under which modules hold a parameter, more than one if it is shared."""
        return tuple(self._holders.get(id(weight), {}).values())

    @cached_property
    def _holders(self) -> dict[int, dict[tuple[int, str], str]]:
        found: dict[int, dict[tuple[int, str], str]] = {}
        for name, module in self._modules:
            for own, parameter in module._parameters.items():
                place = f"{name}.{own}".removeprefix(".")
                found.setdefault(id(parameter), {}).setdefault((id(module), own), place)
        return found

    # --- states in which the answer would be wrong ---------------------------------------------

    @property
    def attention_implementation(self) -> str | None:
        """Which of several implementations of attention the model runs, if it has several."""
        return None

    @property
    def causality_advice(self) -> str:
        """What to do about a model that turns out not to be causal, for a message."""
        return ""

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether every token sees only those before it."""

    def _roots(self) -> list[nn.Module]:
        """Modules under which every module of the forward pass is found."""
        return [self.model]

    @cached_property
    def _modules(self) -> list[tuple[str, nn.Module]]:
        """Every module, by its name under its root."""
        return list(chain.from_iterable(root.named_modules() for root in self._roots()))

    def check_state(self) -> None:
        """Refuse a model that is no causal decoder, and states in which gradients would be wrong.

        Raises:
            UnsupportedModelError: If tokens see those after them, or there are no blocks.
            ModelStateError: Inside `torch.inference_mode()`, if a parameter was made in it or is
                on the meta device, or if dropout or gradient checkpointing is active.
        """
        if not self.is_causal or not hasattr(self.model, "blocks"):
            raise UnsupportedModelError(
                f"{self.name!r} is not a causal decoder with a stack of blocks; the lens knows "
                "GPT-2, Llama and their like"
            )
        if torch.is_inference_mode_enabled():
            raise ModelStateError(
                "gradients do not exist inside torch.inference_mode(); leave it, or use "
                "torch.no_grad(), which this package can work under"
            )
        for name, parameter in self.model.named_parameters():
            if parameter.is_inference():
                raise ModelStateError(
                    f"parameter {name!r} was created in torch.inference_mode(), so autograd cannot "
                    "run through it; load the model outside inference mode"
                )
            if parameter.is_meta:
                raise ModelStateError(
                    f"parameter {name!r} is on the meta device and has no values; load the weights"
                )
        for name, module in self._modules:
            if module.training and getattr(module, "gradient_checkpointing", False):
                raise ModelStateError(
                    f"gradient checkpointing is on in {name!r} (the model is in train mode), which "
                    "runs layers a second time where nothing is captured; call model.eval(), or "
                    "gradient_checkpointing_disable() on the Hugging Face model"
                )
            if module.training and _drops_values(module):
                raise ModelStateError(
                    f"dropout is active in {name!r} (the model is in train mode), so the gradient "
                    "would be a random one; call model.eval() first"
                )


def _part_of_the_way(
    start: Float[Tensor, "1 d"], end: Float[Tensor, "n d"], between: Float[Tensor, "n d"]
) -> Float[Tensor, "n 1"] | None:
    """How far each vector is from one point to another, if all lie on these lines.

    Args:
        start: Where all lines begin.
        end: Where each one leads.
        between: The vectors.

    Returns:
        0 at the start and 1 at the end; `None` if a vector is beside its line, or in half
        precision, where that cannot be told.
    """
    if torch.finfo(between.dtype).eps > _FINE:
        return None
    way = end - start
    length = (way * way).sum(-1, keepdim=True)
    part = ((between - start) * way).sum(-1, keepdim=True) / length.masked_fill(length == 0, 1)
    beside = (between - torch.lerp(start, end, part)).abs().amax(-1)
    roundings = _ROUNDINGS * torch.finfo(between.dtype).eps * between.abs().amax(-1)
    return part if bool((beside <= roundings).all()) else None


def _drops_values(module: nn.Module) -> bool:
    """Whether a module would drop values in train mode, as a layer or by an attribute."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any(
        "dropout" in name and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )


def _hooks(module: nn.Module) -> Iterator[object]:
    return chain(
        module._forward_hooks.values(),
        module._forward_pre_hooks.values(),
        module._backward_hooks.values(),
        module._backward_pre_hooks.values(),
    )


def _is_callers(hook: object, module: nn.Module) -> bool:
    """Whether a hook is not one of those that libraries put on their own modules."""
    if isinstance(module, HookPoint):
        # Of the functions that TransformerLens hooks, its bridges' own wiring alone is nobody's:
        # those of run_with_cache look at the caller's run.
        return not _module_of(_hooked_function(hook)).startswith(_WIRING)
    return _module_of(hook).partition(".")[0] not in _LIBRARIES


def _hooked_function(hook: object) -> object:
    """The function that a hook point calls through a wrapper of its own."""
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    cells = getattr(hook, "__closure__", None) or ()
    return next(
        (cell.cell_contents for name, cell in zip(names, cells, strict=True) if name == "hook"),
        hook,
    )


def _module_of(function: object) -> str:
    return str(getattr(function, "__module__", ""))


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def is_centered(weight: Float[Tensor, "*rows d_model"]) -> bool:
    """Whether every row of a matrix has mean zero, as TransformerLens's processing makes it.

    Args:
        weight: The matrix, with `d_model` as its last axis.

    Returns:
        Whether the means are much smaller than chance makes them, about `size / sqrt(d_model)`.
    """
    weight = weight.detach().float()
    means, size = weight.mean(-1).abs().max(), weight.abs().mean()
    return bool(means <= 0.01 * size / math.sqrt(weight.shape[-1]))
