"""`transformer_lens.HookedTransformer`: TransformerLens's own modules, weights `[d_in, d_out]`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.hooks import Tap
from backward_lens_tl.models.host import Host, is_centered
from backward_lens_tl.models.linear import float_parameter, linear_site
from backward_lens_tl.models.sites import (
    READING_MATRICES,
    WRITING_MATRICES,
    ExpertsSite,
    MatrixName,
    MatrixSite,
    Site,
    Stored,
)
from backward_lens_tl.models.unembedding import Unembedding, connected, needs_digits, product


class _HookedUnembedding(Unembedding):
    @property
    def norm(self) -> Any:
        cfg = self._model.cfg
        return None if cfg.normalization_type is None else self._model.ln_final

    def normed(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        # The module itself cannot be called here: its hook points would run the caller's hooks.
        kind, norm = self._model.cfg.normalization_type, self.norm
        if norm is None:
            return vectors
        shape = vectors.shape[-1:]
        weight, bias, eps = getattr(norm, "w", None), getattr(norm, "b", None), norm.eps
        if kind in ("LN", "LNPre"):
            return nn.functional.layer_norm(vectors, shape, weight, bias, eps)
        if kind in ("RMS", "RMSPre"):
            return nn.functional.rms_norm(vectors, shape, weight, eps)
        raise UnsupportedModelError(
            f"the final norm is {kind!r}; supported: LN, LNPre, RMS, RMSPre and None"
        )

    def transformed(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        cap = getattr(self._model.cfg, "output_logits_soft_cap", -1.0)
        return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits


class HookedTransformerHost(Host):
    """A `HookedTransformer` of TransformerLens 2 or 3."""

    unembedding_type = _HookedUnembedding

    @property
    def is_causal(self) -> bool:
        """Whether the config says that attention is causal."""
        return bool(self.model.cfg.attention_dir == "causal")

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "rows read d_vocab"]:
        """Run the model with the caller's hooks."""
        # Without a mask it infers one from the pad token if its tokenizer pads on the left.
        logits: Tensor = self.model(
            tokens, return_type="logits", attention_mask=torch.ones_like(tokens)
        )
        return logits

    def logits_of(
        self, tokens: Int[Tensor, "batch pos"], select: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "rows read d_vocab"]:
        """Run the model, and multiply by `W_U` at some positions only."""
        if not self._has_usual_forward:
            return select(self.logits(tokens))
        # Its own unembedding copies all of W_U in every forward pass, so stop before it.
        resid = self.model(
            tokens, attention_mask=torch.ones_like(tokens), stop_at_layer=self.n_layers
        )
        norm, weight = self.unembedding.norm, self.model.W_U
        normed = select(resid if norm is None else norm(resid)).to(weight.device)
        rows = normed.flatten(0, 1)
        if needs_digits(rows):
            products = connected(rows, product(rows.detach(), weight), weight)
        else:
            products = product(rows, weight)
        logits: Tensor = self.unembedding.finished(products).unflatten(0, normed.shape[:2])
        return logits

    @property
    def _has_usual_forward(self) -> bool:
        """Whether neither the model's forward pass nor its unembedding's was replaced."""
        return (
            type(self.model).forward.__qualname__ == "HookedTransformer.forward"
            and type(self.model.unembed).forward.__qualname__ == "Unembed.forward"
            and not {"forward"} & (vars(self.model).keys() | vars(self.model.unembed).keys())
        )

    def embedding_vector(self, token_id: int) -> Float[Tensor, "d_model"]:
        """A token's row of the embedding matrix, without the scale that some models apply."""
        row = super().embedding_vector(token_id)
        # Gemma scales embeddings in the forward pass; TransformerLens scales the matrix instead.
        is_gemma = str(getattr(self.model.cfg, "original_architecture", "")).startswith("Gemma")
        return row / math.sqrt(self.d_model) if is_gemma else row

    # --- the matrices ------------------------------------------------------------------------

    def _attention_sites(self, layer: int) -> dict[MatrixName, Site]:
        at = f"blocks.{layer}.attn"
        attn = self.model.blocks[layer].attn
        sites: dict[MatrixName, Site] = {
            "W_Q": self._reading_heads("W_Q", layer, attn.W_Q, attn.b_Q, "query_input"),
            "W_K": self._reading_heads("W_K", layer, *_grouped(attn, "K"), "key_input"),
            "W_V": self._reading_heads("W_V", layer, *_grouped(attn, "V"), "value_input"),
        }
        # With use_attn_result each head's output has a hook point, where a caller may edit it.
        by_head = self.model.cfg.use_attn_result
        sites["W_O"] = MatrixSite(
            "W_O",
            layer,
            input=Tap(attn.hook_z, "output"),
            output=Tap(attn.hook_result, "input") if by_head else Tap(attn, "output"),
            weight=Stored(float_parameter(attn.W_O, "W_O", layer), "in_out"),
            bias=attn.b_O,
            input_heads=self.n_heads,
            output_heads=self.n_heads if by_head else None,
            input_hook=f"{at}.hook_z",
            output_hook=f"blocks.{layer}.hook_attn_out",
            joins=self.hook_points[f"blocks.{layer}.hook_attn_out"],
        )
        return sites

    def _reading_heads(
        self, matrix: MatrixName, layer: int, weight: Tensor, bias: Tensor, argument: str
    ) -> MatrixSite:
        """`W_Q`, `W_K` or `W_V`, `[head, d_model, d_head]`."""
        cfg, attn = self.model.cfg, self.model.blocks[layer].attn
        point = f"hook_{matrix[-1].lower()}"
        stored = len(weight)
        # Grouped queries can be ungrouped, so that every query head has its own key.
        ungrouped = stored < self.n_heads and cfg.ungroup_grouped_query_attention
        heads = self.n_heads if ungrouped else stored
        split = cfg.use_split_qkv_input or cfg.use_attn_in
        return MatrixSite(
            matrix,
            layer,
            input=Tap(attn, "input", argument),
            output=Tap(getattr(attn, point), "input"),
            weight=Stored(float_parameter(weight, matrix, layer), "in_out"),
            bias=bias,
            input_heads=heads if split else None,
            output_heads=heads,
            heads_per_weight=heads // stored,
            output_hook=None if ungrouped else f"blocks.{layer}.attn.{point}",
        )

    def _mlp_sites(self, layer: int) -> dict[MatrixName, Site]:
        mlp = getattr(self.model.blocks[layer], "mlp", None)
        if isinstance(experts := getattr(mlp, "experts", None), nn.ModuleList):
            return self._experts_sites(layer, mlp, experts)
        if mlp is None or not isinstance(getattr(mlp, "W_out", None), nn.Parameter):
            raise UnsupportedModelError(
                f"layer {layer} has no dense or gated MLP "
                f"({'attention only' if mlp is None else type(mlp).__name__})"
            )
        gated, at = hasattr(mlp, "W_gate"), f"blocks.{layer}.mlp"
        # In a gated MLP, mlp.hook_pre is the gate's output.
        points: dict[MatrixName, str] = {"W_in": "hook_pre"}
        if gated:
            points = {"W_in": "hook_pre_linear", "W_gate": "hook_pre"}
        sites: dict[MatrixName, Site] = {
            matrix: MatrixSite(
                matrix,
                layer,
                input=Tap(mlp, "input"),
                output=Tap(getattr(mlp, point), "input"),
                weight=Stored(float_parameter(getattr(mlp, matrix), matrix, layer), "in_out"),
                bias=None if gated else mlp.b_in,  # a gated MLP adds b_in after the product
                output_hook=f"{at}.{point}",
            )
            for matrix, point in points.items()
        }
        sites["W_out"] = MatrixSite(
            "W_out",
            layer,
            input=Tap(mlp.hook_post, "output"),
            output=Tap(mlp, "output"),
            weight=Stored(float_parameter(mlp.W_out, "W_out", layer), "in_out"),
            bias=mlp.b_out,
            input_hook=f"{at}.hook_post",
            output_hook=f"blocks.{layer}.hook_mlp_out",
            joins=self.hook_points[f"blocks.{layer}.hook_mlp_out"],
        )
        return sites

    def _experts_sites(
        self, layer: int, moe: Any, experts: nn.ModuleList
    ) -> dict[MatrixName, Site]:
        joins = self.hook_points[f"blocks.{layer}.hook_mlp_out"]
        matrices: tuple[MatrixName, ...] = ("W_in", "W_gate", "W_out")
        return {
            matrix: ExpertsSite(
                matrix,
                layer,
                tuple(linear_site(matrix, layer, getattr(each, matrix)) for each in experts),
                chosen=Tap(moe.hook_expert_indices, "output"),
                joins=joins if matrix == "W_out" else None,
            )
            for matrix in matrices
        }

    # --- parameters --------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters, by name."""
        return dict(self.model.named_parameters())

    @property
    def processed_matrices(self) -> frozenset[MatrixName]:
        """Matrices that TransformerLens's weight processing changed, judging by the weights."""
        found: set[MatrixName] = set()
        norm, block = str(self.model.cfg.normalization_type), self.model.blocks[0]
        # fold_ln also centers what reads after a LayerNorm; a model may be built with LNPre.
        centered = norm.startswith("LN") and is_centered(block.attn.W_Q.transpose(1, 2))
        gain = getattr(block.ln1, "w", None)
        no_gain = norm.startswith("RMS") and (gain is None or bool((gain == gain[0]).all()))
        if centered or no_gain:
            found.update(READING_MATRICES)
        if is_centered(self.model.blocks[0].attn.W_O):  # center_writing_weights
            found.update(WRITING_MATRICES)
        return frozenset(found)


def _grouped(attn: Any, letter: str) -> tuple[Tensor, Tensor]:
    """Stored weight and bias of keys or values, by key-value head."""
    is_grouped = hasattr(attn, f"_W_{letter}")
    prefix = "_" if is_grouped else ""
    return getattr(attn, f"{prefix}W_{letter}"), getattr(attn, f"{prefix}b_{letter}")
