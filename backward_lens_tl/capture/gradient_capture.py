"""The gradients that a capture holds, as factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from backward_lens_tl.capture.batch_gradient import BatchGradient
from backward_lens_tl.capture.captured import Captured
from backward_lens_tl.capture.hook_points import (
    AttentionGradient,
    HookFunction,
    attention_patch,
    attribution,
)
from backward_lens_tl.capture.similarity import USUAL_BUDGET, By, Similarity, similarity
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.matrix_selection import resolve_layer
from backward_lens_tl.models.sites import ATTENTION_MATRICES

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class GradientCapture(Captured):
    """The gradients of several weight matrices, as factors.

    `capture["W_out", 5]` is one of them; iteration is in model order. Negative layers count from
    the model's last layer.

    Attributes:
        gradients: By matrix and layer, in model order.
        tokens: Token ids, continuations included, 0 at padding.
        mask: False at padding, which is on the right.
        str_tokens: Text of each real token of each prompt.
        loss: Loss of each prompt.
        targets: The token that each position is compared with, -1 where there is none and at
            padding. For `target_nll` and `logit_difference` it is one token at all positions; for
            `sequence_nll` the answer's first token at all positions of the prompt, and then its
            following tokens; for `next_token_loss` the next token of the text, and none at the last
            position. `None` for a caller's own loss without a target.
        target_texts: Text of each prompt's target, or of its whole answer for `sequence_nll`;
            `None` if the objective wants no particular tokens after the prompt.
        predictions: What the model predicts after each prompt, before any update.
        prompt_lengths: Number of tokens of each prompt before an appended answer.
        n_layers: Number of layers of the model.
        objective: Name of the objective, with its arguments.
        model_name: Name of the model.
        coverage: Which parameters these gradients belong to.
        hook_gradients: Activations and gradients at the requested hook points, by name.
        attention: The backward pass through the attention pattern, by layer, for each layer whose
            attention matrices were captured.
        prompts: Text of each prompt as the caller wrote it, continuation included. For a prompt
            given as ids, the decoded text without special tokens. Unlike `str_tokens`, it does not
            split characters that span several tokens.
        spans: Where each real token is in that text, as half-open spans of characters; empty for
            special tokens.
        turns: The turn of each real token of a chat: the role of its message, or `"template"`. An
            appended answer is the assistant's. Empty for other prompts.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> loss = blt.target_nll(" Paris")
        >>> capture = blt.capture_gradients(model, "Lionel Messi plays for", loss)
        >>> capture.str_tokens[0]
        ('<|endoftext|>', 'Li', 'onel', ' Messi', ' plays', ' for')
        >>> capture["W_out", 6]
        MatrixGradient(W_out of layer 6, x [1, 6, 512], delta [1, 6, 128])
        >>> [gradient.layer for gradient in capture if gradient.matrix == "W_in"]
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def attention_of(self, layer: int) -> AttentionGradient:
        """The backward pass through one layer's attention pattern.

        Args:
            layer: The layer, negative from the end of the model.

        Returns:
            The gradient at the scores, and Reversed Attention.

        Raises:
            InputError: If no attention matrix of the layer was captured, or the model does not
                expose its pattern.

        Examples:
            >>> prompt, loss = "Lionel Messi plays for", blt.target_nll(" Paris")
            >>> capture = blt.capture_gradients(model, prompt, loss, matrices="attn")
            >>> capture.attention_of(5)  # [batch, head, query, key]
            AttentionGradient([1, 4, 6, 6])
        """
        layer = resolve_layer(layer, self.n_layers)
        if layer in self.attention:
            return self.attention[layer]
        if layer in self.layers and set(self.matrices) & set(ATTENTION_MATRICES):
            raise InputError(
                f"the attention pattern of layer {layer} did not pass hook_pattern with a gradient "
                "(attn_implementation='eager' shows it)"
            )
        raise InputError(
            f"there is no Reversed Attention for layer {layer}; capture its attention matrices, "
            "for example with matrices='attn'"
        )

    def reversed_attention(self, layer: int) -> Float[Tensor, "batch head query key"]:
        """Reversed Attention, the attention map of the backward pass.

        `RA = A * (E - rowsum(A * E)) / sqrt(d_head)` with the pattern `A` and `E = delta_z V^T`
        (Katz and Wolf, NAACL 2025, arXiv 2412.17019): the gradient at the inputs of the softmax,
        divided by `sqrt(d_head)`.

        Args:
            layer: The layer, negative from the end of the model.

        Returns:
            The map; zero where attention is masked.

        Raises:
            InputError: If no attention matrix of the layer was captured, or the model does not
                expose its pattern.

        Examples:
            >>> prompt, loss = "Lionel Messi plays for", blt.target_nll(" Paris")
            >>> capture = blt.capture_gradients(model, prompt, loss, matrices="attn")
            >>> attention = capture.reversed_attention(5)  # [batch, head, query, key]
            >>> attention.shape, bool(attention.triu(1).any())  # no position looks ahead
            (torch.Size([1, 4, 6, 6]), False)
        """
        return self.attention_of(layer).reversed_attention

    def attention_patch(self, layer: int, scale: float) -> tuple[str, HookFunction]:
        """A hook that adds Reversed Attention to the attention pattern of a forward pass.

        A negative `scale` lowers the loss: to first order the loss changes by `scale` times the
        inner product of Reversed Attention and the gradient at the pattern.

        Args:
            layer: The layer, negative from the end of the model.
            scale: Factor of Reversed Attention.

        Returns:
            The name of the hook point and the hook. The hook takes a pattern of the same prompts,
            or, for a capture of one prompt, of any number of copies.

        Raises:
            InputError: If no attention matrix of the layer was captured; from the hook, if the
                pattern is of other prompts.
            UnsupportedModelError: If the model ignores what a hook returns at its pattern, as
                GPT-Neo, GPT-J and OPT do as a TransformerBridge.

        Examples:
            >>> prompt, loss = "Lionel Messi plays for", blt.target_nll(" Paris")
            >>> capture = blt.capture_gradients(model, prompt, loss, matrices="attn")
            >>> with model.hooks(fwd_hooks=[capture.attention_patch(5, scale=-10.0)]):
            ...     patched = blt.capture_gradients(model, prompt, loss)
            >>> bool(patched.loss < capture.loss)
            True
        """
        index = resolve_layer(layer, self.n_layers)
        return attention_patch(self.attention_of(layer), index, scale)

    def to_cache(self, model: object = None) -> ActivationCache:
        """The captured activations and gradients as TransformerLens's `ActivationCache`.

        Args:
            model: The model, for those of the cache's own methods that need it.

        Returns:
            Activations under the name of their hook point, and gradients under that name and
            `_grad`: for every matrix those that have a hook point, and everything that
            `hook_points` requested. If a caller's hook is at the same point, the gradient of a
            matrix is the one before it, and that of `hook_points` the one after it. Entries of
            matrices are zero at padding.

        Examples:
            >>> cache = capture.to_cache(model)
            >>> torch.equal(cache["blocks.6.hook_mlp_out_grad"], capture["W_out", 6].vjps)
            True
        """
        entries: dict[str, Tensor] = {}
        for gradient in self:
            if gradient.input_hook is not None:
                entries[gradient.input_hook] = gradient.inputs
            if gradient.output_hook is not None:
                at_output = gradient.vjps if gradient.reads_residual else gradient.resid_vjps
                entries[f"{gradient.output_hook}_grad"] = at_output
        for layer, attention in self.attention.items():
            if attention.is_patchable:
                entries[f"blocks.{layer}.attn.hook_attn_scores_grad"] = attention.scores_vjp
        for name, point in self.hook_gradients.items():
            entries |= {name: point.value, f"{name}_grad": point.vjp}
        return ActivationCache(entries, model)

    def attribution(self, other: GradientCapture) -> dict[str, Float[Tensor, "batch *shape"]]:
        """Attribution patching: how a patch of each hook point would change this run's loss.

        To first order, patching this run's activation with the other's changes the loss by
        `(x_other - x) . delta`, with the gradient `delta` of this run. Captured on the corrupt
        prompt and given the clean one's, this is the usual `(x_clean - x_corrupt) . delta`.

        Args:
            other: A capture of the same hook points on prompts of the same lengths.

        Returns:
            The change by hook point, summed over the last axis: `[batch, pos]` for the residual
            stream, `[batch, pos, head]` for `hook_z`.

        Raises:
            InputError: If nothing was captured at hook points, or prompts differ in shape.

        Examples:
            >>> point, loss = "blocks.0.hook_resid_post", blt.target_nll(" Paris")
            >>> italy, france = (
            ...     blt.capture_gradients(model, prompt, loss, hook_points=point)
            ...     for prompt in ("The capital of Italy is", "The capital of France is")
            ... )
            >>> change = italy.attribution(france)[point]  # [batch, pos]
            >>> italy.str_tokens[0][int(change[0].argmin())]  # to be patched for " Paris"
            ' Italy'
        """
        if not isinstance(other, GradientCapture):
            raise InputError(
                f"{other!r} is a {type(other).__name__}; pass the GradientCapture of the other run"
            )
        shared = [name for name in self.hook_gradients if name in other.hook_gradients]
        if not shared:
            raise InputError(
                "both captures need the same hook points; pass them, for example "
                "hook_points=['blocks.0.hook_mlp_out']"
            )
        if not torch.equal(self.mask, other.mask):
            raise InputError(
                f"prompts have lengths {self.mask.sum(1).tolist()} here and "
                f"{other.mask.sum(1).tolist()} there; attribution compares them position "
                "by position"
            )
        pairs = ((self.hook_gradients[name], other.hook_gradients[name]) for name in shared)
        return {here.name: attribution(here, there) for here, there in pairs}

    def total(self) -> BatchGradient:
        """The gradients of the batch's summed loss, one per matrix, still as factors.

        Returns:
            The gradients. `total["W_out", 5]` has the positions of all prompts.

        Examples:
            >>> loss = blt.target_nll(" Paris")
            >>> prompts = ["Lionel Messi plays for", "The capital of France is"]
            >>> total = blt.capture_gradients(model, prompts, loss).total()
            >>> main = total["W_out", 6].principal_directions(1)
            >>> blt.read_vectors(model, -main.resid, k=2).top_tokens  # what this batch writes
            [[' Paris', ' France']]
        """
        return BatchGradient(self)

    def similarity(
        self,
        other: GradientCapture | None = None,
        by: By = "all",
        *,
        budget: int = USUAL_BUDGET,
    ) -> Similarity:
        """Inner products and cosines of the prompts' weight gradients.

        Exact, from the factors: `<G_a, G_b> = (X_a X_b^T * D_a D_b^T).sum()`, summed over the
        captured matrices. Biases are not included. Products are computed in the precision of the
        factors, at least float32, and summed in float64.

        Args:
            other: The gradients of the prompts `b`, of the same matrices; these by default.
            by: `"all"` for one number per pair of prompts, `"matrix"` for one per matrix, summed
                over layers, or `"layer"` for one per layer, summed over matrices.
            budget: Bytes for the products that are computed at a time, in addition to the result.

        Returns:
            `.inner` and `.cosine`, each `[a, b]`, or `[part, a, b]`. The cosine is NaN where a
            gradient is zero.

        Raises:
            InputError: If `other` is of other matrices, layers or weights, or `by` is unknown.

        Examples:
            >>> loss = blt.target_nll(" Paris")
            >>> prompts = ["The capital of France is", "The capital of Italy is", "Messi plays for"]
            >>> similarity = blt.capture_gradients(model, prompts, loss).similarity()
            >>> bool(similarity.cosine[0, 1] > similarity.cosine[0, 2])
            True
            >>> query = blt.capture_gradients(model, "Rome is the capital of", loss)
            >>> blt.capture_gradients(model, prompts, loss).similarity(query, by="matrix")
            Similarity([2, 3, 1] by matrix)
        """
        return similarity(self, other, by, budget)

    def gradient_df(
        self, *, matrix: str | Sequence[str] | None = None, batch: int | None = None
    ) -> pd.DataFrame:
        """Each gradient as a whole, one row per prompt, matrix and layer.

        Each row takes singular value decompositions of matrices of at most `n x n`.

        Args:
            matrix: Only the rows of this matrix, or of these; `None` for all.
            batch: Only the rows of this prompt; `None` for all.

        Returns:
            Columns `prompt`, `matrix`, `layer`, `is_last_layer` (of the model), `n_tokens` (of the
            prompt), `n_writing` (positions that add something), `loss`, `rank` (paper, figure 4),
            `largest_rank` (`min(n_writing, d_in, d_out)`, lemma 4.1), `input_rank` and `vjp_rank`
            (of each factor alone), `norm` (Frobenius norm), `top_energy` (fraction of the squared
            norm in the largest singular value), `rank_99` (number of singular values that hold
            99 % of it) and `singular_values` (a list, largest first). If heads or experts have
            separate factors, `rank` and everything derived from it is missing and the list is
            empty.

        Raises:
            InputError: If there is no such matrix or prompt.

        Examples:
            >>> gradients = capture.gradient_df(matrix="W_out")
            >>> gradients[["layer", "n_tokens", "rank"]].tail(2).values.tolist()
            [[6, 6, 6], [7, 6, 1]]
        """
        from backward_lens_tl.capture.tables import gradient_table

        return gradient_table(self, matrix, batch)

    def neuron_df(self, matrix: str, layer: int, batch: int = 0) -> pd.DataFrame:
        """The neurons of one gradient and their similarity to its spanning vectors.

        Args:
            matrix: Name of the matrix.
            layer: The layer, negative from the end of the model.
            batch: Which prompt.

        Returns:
            One row per neuron and position (paper, figures 8 to 10): `neuron`, `neuron_norm`,
            `norm_order` (0 for the longest neuron; ties in the order of their index), `position`,
            `token` and `similarity` (cosine of the neuron and the position's spanning vector,
            missing where one of them is zero).

        Raises:
            InputError: If the matrix was not captured, or heads or experts have separate factors.

        Examples:
            >>> neurons = capture.neuron_df("W_out", layer=6)
            >>> longest = neurons[neurons["norm_order"] == 0].set_index("token")
            >>> longest["similarity"].idxmax()
            ' for'
        """
        from backward_lens_tl.capture.tables import neuron_table

        return neuron_table(self, matrix, layer, batch)

    def __repr__(self) -> str:
        return (
            f"GradientCapture({', '.join(self.matrices)} of layers "
            f"{self.layers[0]} to {self.layers[-1]}, {len(self.mask)} prompts of up to "
            f"{self.mask.shape[1]} tokens, {self.objective}, model {self.model_name!r})"
        )
