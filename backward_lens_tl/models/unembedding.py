"""From the last residual stream to logits: the final norm, `W_U`, and what follows them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.models.hooks import Tap
from backward_lens_tl.models.precision import at_least_float32

_HALF_PRECISION_EPS = 1e-6
"""`eps` above which a dtype is too coarse to tell whether two normed vectors are on one line."""

_ROUNDINGS = 32
"""Rounding error that a norm may add to two vectors of one direction, in `eps` of the largest."""

_PIECE = 64
"""Vectors multiplied at a time while the scores of all others are in memory."""

_CLOSE = 0.1
"""Below this fraction of the way from the norm's bias to the unit vector's image, extrapolating
would multiply rounding errors by more than 10."""

_FEW = 16

_COLUMNS = 2048
"""Tokens whose terms are summed in float32; the sums are added in float64."""


@dataclass(frozen=True)
class Columns:
    """The columns of `W_U` as seen before the final norm.

    A norm maps a vector `v` of root mean square 1 to `g * C v + b`, where `C` subtracts the mean
    (LayerNorm) or is the identity (RMSNorm). Up to a term that all tokens share, the logit of token
    `t` is `v . e_t` with `e_t = C (g * (w_t - mean_s w_s))`.

    Attributes:
        mean: `mean_s w_s`.
        lengths: `|e_t|` of each token.
    """

    mean: Float[Tensor, "d_model"]
    lengths: Float[Tensor, "d_vocab"]


class Unembedding(ABC):
    """Reads vectors as the model reads its last residual stream, without running its hooks.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    @abstractmethod
    def norm(self) -> Any:
        """The final norm, or `None`."""

    @abstractmethod
    def normed(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Vectors after the final norm."""

    @abstractmethod
    def transformed(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        """Logits after the model's softcap or scale."""

    @property
    def input(self) -> Tap:
        """The last residual stream: the input of the final norm if there is one."""
        return Tap(self._model.unembed if self.norm is None else self.norm, "input")

    def column(self, token_id: int) -> Float[Tensor, "d_model"]:
        """A token's column of `W_U`."""
        column: Tensor = self._model.W_U[:, token_id].detach().clone()
        return column

    def logits(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """Compute `ln_final(v) @ W_U + b_U`, then the model's softcap or scale.

        Args:
            vectors: Vectors of the residual stream's width; the norm uses each vector's own
                statistics.

        Returns:
            Logits in the dtype of `W_U`. For many vectors the memory layout is token-major.
        """
        weight = self._model.W_U
        with torch.autocast(weight.device.type, enabled=False):
            return self.finished(product(self._normed_like(weight, vectors), weight))

    def logits_of_both(
        self, vectors: Float[Tensor, "n d_model"], directions: Float[Tensor, "n d_model"]
    ) -> Iterator[Float[Tensor, "n d_vocab"]]:
        """Read vectors as `logits` does, then the same vectors at another length.

        A norm maps both to the line through its bias: `ln(v) = r ln(u) + (1 - r) ln(0)` for `v`
        along `u`, with one number `r` per vector. The logits are on a line too, so one product
        gives both unless `r` is so small that rounding would be magnified.

        Args:
            vectors: Vectors of the residual stream's width.
            directions: The same vectors, each times a positive number.

        Yields:
            Logits of the vectors, then those of the directions, possibly in the same memory.
        """
        weight = self._model.W_U
        with torch.autocast(weight.device.type, enabled=False):
            own, along, nothing = (
                self._normed_like(weight, each)
                for each in (vectors, directions, torch.zeros_like(vectors[:1]))
            )
            fraction = _fraction_of_the_way(nothing, along, own)
            if fraction is None:
                yield self.finished(product(own, weight))
                yield self.finished(product(along, weight))
                return
            # Extrapolate the products, not the logits: b_U may be infinite.
            products = product(own, weight)
            yield self.finished(products)
            close = fraction[:, 0] < _CLOSE
            beyond = 1 / fraction.masked_fill(close[:, None], 1)
            torch.lerp(product(nothing, weight), products, beyond, out=products)
            for rows in close.nonzero()[:, 0].split(_PIECE):
                products[rows] = product(along[rows], weight)
            yield self.finished(products)

    @torch.no_grad()
    def columns(self) -> Columns:
        """The columns of `W_U` as seen before the final norm, at least in float32."""
        weight = self._model.W_U
        with torch.autocast(weight.device.type, enabled=False):
            mean = at_least_float32(weight).mean(1)
            lengths = [
                self.before_norm(at_least_float32(columns).T - mean).norm(dim=1)
                for columns in weight.split(_COLUMNS, dim=1)
            ]
        return Columns(mean, torch.cat(lengths))

    @torch.no_grad()
    def before_norm(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Sums of columns of `W_U` as seen before the final norm, in at least float32.

        Args:
            vectors: Vectors `w` that are multiplied with the norm's output.

        Returns:
            `C (g * w)`: the product of each with a vector of root mean square 1 before the norm is
            that of `w` after it, apart from the norm's bias.
        """
        gain, subtracts_mean = self._linear_norm
        seen = gain * at_least_float32(vectors)
        return seen - seen.mean(-1, keepdim=True) if subtracts_mean else seen

    @property
    def _linear_norm(self) -> tuple[Float[Tensor, "d_model"], bool]:
        """The norm's gain, and whether it subtracts the mean."""
        weight = self._model.W_U
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            # Both kinds of norm map a vector of mean 0 to its product with the gain.
            uneven = _uneven(weight[:, 0])
            probes = torch.stack([torch.zeros_like(uneven), torch.ones_like(uneven), uneven])
            of_zero, of_ones, of_uneven = at_least_float32(self.normed(probes))
            return (of_uneven - of_zero) / uneven, torch.allclose(of_ones, of_zero)

    def cosines(
        self, directions: Float[Tensor, "n d_model"], columns: Columns
    ) -> Float[Tensor, "n d_vocab"]:
        """Cosine of each vector and each token's column of `W_U`, seen before the final norm.

        Args:
            directions: Vectors of length 1; a zero vector has cosine 0 with all tokens.
            columns: What `columns` returned.

        Returns:
            The cosines. Biases, a softcap and a scale have no effect.
        """
        weight = self._model.W_U
        length = math.sqrt(weight.shape[0])  # a root mean square of 1
        with torch.autocast(weight.device.type, enabled=False):
            of_zero = self._normed_like(weight, torch.zeros_like(directions[:1]))
            normed = self._normed_like(weight, length * directions) - of_zero
            scores = at_least_float32(product(normed, weight))
            scores -= (at_least_float32(normed) @ columns.mean)[:, None]
            scores /= length * columns.lengths.masked_fill(columns.lengths == 0, 1)
        return scores

    def finished(self, products: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
        """Logits from the vectors' products with `W_U`."""
        bias = self._model.b_U
        # Most models have no bias here, and adding zeros is a pass over all logits.
        return self.transformed(products + bias if bool(bias.any()) else products)

    @cached_property
    def faint_norm(self) -> float:
        """Length below which the final norm's `eps` outweighs a vector, `sqrt(d_model * eps)`.

        A shorter vector is not scaled up to the usual size, so its readout is mostly the bias of
        the norm and of the unembedding. 0 without a final norm, and where neither has a bias, as
        with most RMSNorms: there, length does not change the order of scores.
        """
        if self.norm is None:
            return 0.0
        zero = torch.zeros_like(self._model.W_U[:, 0])[None]
        with torch.no_grad(), torch.autocast(zero.device.type, enabled=False):
            has_bias = bool(self.normed(zero).any()) or bool(self._model.b_U.any())
        return math.sqrt(self._model.cfg.d_model * self._model.cfg.eps) if has_bias else 0.0

    def _normed_like(self, weight: Tensor, vectors: Tensor) -> Tensor:
        return self.normed(vectors.to(device=weight.device, dtype=weight.dtype))


def _uneven(like: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
    """A vector of mean 0 and root mean square 1 without zeros."""
    entries = torch.ones_like(like)
    entries[1::2] = -1
    if len(entries) % 2:
        entries[1] = -2
    return entries / entries.square().mean().sqrt()


def product(
    vectors: Float[Tensor, "n d_model"], weight: Float[Tensor, "d_model d_vocab"]
) -> Float[Tensor, "n d_vocab"]:
    """`vectors @ weight`, in the order that BLAS computes faster.

    Args:
        vectors: Inputs of the unembedding.
        weight: `W_U`.

    Returns:
        The product.
    """
    # On a CPU the transposed product is 1.5 times as fast for 200 vectors or more, and 5 times
    # slower for two.
    return vectors @ weight if len(vectors) < _FEW else (weight.T @ vectors.T).T


def connected(
    vectors: Float[Tensor, "*rows d_model"],
    logits: Float[Tensor, "*rows d_vocab"],
    weight: Float[Tensor, "d_model d_vocab"],
) -> Float[Tensor, "*rows d_vocab"]:
    """Connect logits to the vectors that they were computed from, with a more accurate VJP.

    The VJP sums over the vocabulary. A CPU sums all terms in float32, sequentially for few rows:
    at 49,152 tokens that loses a digit, and many more where `p - onehot` is small. Here it is a sum
    of short sums.

    Args:
        vectors: Inputs of the unembedding.
        logits: `vectors @ weight`, plus a bias if there is one.
        weight: `W_U`.

    Returns:
        The logits.
    """
    apply: Callable[..., Tensor] = _Connected.apply
    return apply(vectors, logits.detach(), weight.detach())


def needs_digits(vectors: Float[Tensor, "*rows d_model"]) -> bool:
    """Whether torch's own VJP of the product with `W_U` would lose digits."""
    is_cpu = vectors.device.type == "cpu" and vectors.dtype == torch.float32
    return is_cpu and vectors.requires_grad and torch.is_grad_enabled()


class _Connected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [weight], [gradient] = ctx.saved_tensors, gradients
        shape = (*gradient.shape[:-1], len(weight))
        total = gradient.new_zeros(shape, dtype=torch.float64)
        some = zip(gradient.split(_COLUMNS, -1), weight.split(_COLUMNS, -1), strict=True)
        for upstream, columns in some:
            total += upstream @ columns.T
        return total.to(gradient.dtype), None, None


def _fraction_of_the_way(
    start: Float[Tensor, "1 d"], end: Float[Tensor, "n d"], between: Float[Tensor, "n d"]
) -> Float[Tensor, "n 1"] | None:
    """How far each vector is from `start` (0) to `end` (1), if all are on these lines.

    Returns:
        The fractions; `None` if a vector is off its line, or in half precision, where rounding
        hides that.
    """
    if torch.finfo(between.dtype).eps > _HALF_PRECISION_EPS:
        return None
    way = end - start
    length = (way * way).sum(-1, keepdim=True)
    fraction = ((between - start) * way).sum(-1, keepdim=True) / length.masked_fill(length == 0, 1)
    off = (between - torch.lerp(start, end, fraction)).abs().amax(-1)
    roundings = _ROUNDINGS * torch.finfo(between.dtype).eps * between.abs().amax(-1)
    return fraction if bool((off <= roundings).all()) else None
