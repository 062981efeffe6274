"""Inner products and cosines of the weight gradients of many prompts.

The gradients of prompts `a` and `b` with respect to one matrix are `X_a^T D_a` and `X_b^T D_b`, so

    <G_a, G_b> = sum_ij (x_ai . x_bj) (delta_ai . delta_bj) = (X_a X_b^T * D_a D_b^T).sum()

with the elementwise product `*`. It is exact, and costs two products of thin matrices instead of
`d_in x d_out` numbers per prompt. Blocks of terms are multiplied at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_choice, checked_count
from backward_lens_tl.capture.captured import Captured
from backward_lens_tl.capture.factors import Factors
from backward_lens_tl.capture.terms import Block, terms_by_matrix
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixName

By = Literal["all", "matrix", "layer"]

USUAL_BUDGET = 2**26
"""Bytes for one pair of blocks. Larger ones are not faster on a CPU."""


@dataclass(frozen=True, repr=False)
class Similarity:
    """Inner products of the weight gradients of two sets of prompts.

    A step of gradient descent on prompt `b` with learning rate `lr` changes the loss of prompt `a`
    by `-lr * inner[a, b]` to first order, if it changes the same matrices.

    Attributes:
        inner: Inner products in float64, with a leading axis for `parts` if there are any.
        norms: Norms of the gradients of the prompts `a`.
        other_norms: Norms of the gradients of the prompts `b`.
        parts: Names of matrices for `by="matrix"`, numbers of layers for `by="layer"`; empty for
            `by="all"`.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts = ["The capital of France is", "The capital of Italy is", "Messi plays for"]
        >>> capture = blt.capture_gradients(model, prompts, blt.target_nll(" Paris"))
        >>> similarity = capture.similarity()
        >>> similarity
        Similarity([3, 3])
        >>> int(similarity.cosine[0, 1:].argmax())  # the other capital
        0
        >>> capture.similarity(by="layer")
        Similarity([8, 3, 3] by layer)
    """

    inner: Float[Tensor, "*part a b"]
    norms: Float[Tensor, "*part a"]
    other_norms: Float[Tensor, "*part b"]
    parts: tuple[MatrixName | int, ...] = ()

    @property
    def cosine(self) -> Float[Tensor, "*part a b"]:
        """Cosines of the gradients; NaN if one of the two is zero."""
        lengths = self.norms[..., :, None] * self.other_norms[..., None, :]
        return (self.inner / lengths).clamp(-1, 1)  # against rounding

    def __repr__(self) -> str:
        kind = "layer" if self.parts and isinstance(self.parts[0], int) else "matrix"
        return f"Similarity({list(self.inner.shape)}{f' by {kind}' if self.parts else ''})"


def similarity(capture: Captured, other: Captured | None, by: By, budget: int) -> Similarity:
    """`GradientCapture.similarity`."""
    check_choice("by", by, get_args(By))
    budget = checked_count("budget", budget)
    if other is not None:
        _check_comparable(capture, other)
    there = capture if other is None else other
    parts = {"all": (), "matrix": capture.matrices, "layer": capture.layers}[by]
    sizes = len(capture.mask), len(there.mask)
    inner = capture.loss.new_zeros(len(parts) or 1, *sizes, dtype=torch.float64)
    squares, other_squares = (inner.new_zeros(len(inner), size) for size in sizes)
    for (matrix, layer), gradient in capture.gradients.items():
        part = {"all": 0, "matrix": matrix, "layer": layer}[by]
        place = parts.index(part) if parts else 0
        compared = there.gradients[matrix, layer]
        inner[place] += inner_products(gradient, compared, budget).to(inner.device)
        if other is not None:
            squares[place] += squared_norms(gradient, budget).to(inner.device)
            other_squares[place] += squared_norms(compared, budget).to(inner.device)
    if other is None:
        squares = other_squares = inner.diagonal(dim1=1, dim2=2)
    # Where terms cancel, rounding may leave less than zero.
    norms, other_norms = (each.clamp(min=0).sqrt() for each in (squares, other_squares))
    if not parts:
        return Similarity(inner[0], norms[0], other_norms[0])
    return Similarity(inner, norms, other_norms, parts)


def stacked(parts: Sequence[Similarity], order: Sequence[int]) -> Similarity:
    """Join the similarities of several sets of prompts to the same others.

    Args:
        parts: The similarities, with the same prompts `b`.
        order: Which of the joined prompts `a` comes first, second and so on.

    Returns:
        The similarities of all prompts `a`, in this order.
    """
    inner = torch.cat([each.inner for each in parts], dim=-2)[..., list(order), :]
    norms = torch.cat([each.norms for each in parts], dim=-1)[..., list(order)]
    return replace(parts[0], inner=inner, norms=norms)


def inner_products(here: Factors, there: Factors, budget: int) -> Float[Tensor, "a b"]:
    """Inner products of the gradients of one weight matrix.

    Args:
        here: The gradients of the prompts `a`.
        there: Those of the prompts `b`; the same object if the prompts are the same.
        budget: Bytes for one pair of blocks.

    Returns:
        The inner products, in float64.
    """
    is_same = here is there
    size, dtype, device = _block_format(here, there, budget)
    found = torch.zeros(len(here.mask), len(there.mask), dtype=torch.float64, device=device)
    by_head = not (here.has_joint_factors and there.has_joint_factors)
    own = terms_by_matrix(here, by_head=by_head)
    others = own if is_same else terms_by_matrix(there, by_head=by_head)
    for rows_of, columns_of in zip(own, others, strict=True):
        for place, rows in enumerate(rows_of.blocks(size, dtype, device)):
            # Of two blocks of the same prompts, one order is the transpose of the other.
            after = columns_of.blocks(size, dtype, device, first=place if is_same else 0)
            for step, columns in enumerate(after):
                product = _product(rows, columns)
                _at(found, rows, columns).add_(product)
                if is_same and step:
                    _at(found, columns, rows).add_(product.T)
    return found


def squared_norms(gradient: Factors, budget: int) -> Float[Tensor, "batch"]:
    """Squared norms of the gradients of one weight matrix, in float64.

    Args:
        gradient: The gradients.
        budget: Bytes for one pair of blocks.

    Returns:
        The squared norm of each prompt's gradient.
    """
    size, dtype, device = _block_format(gradient, gradient, budget)
    found = torch.zeros(len(gradient.mask), dtype=torch.float64, device=device)
    for terms in terms_by_matrix(gradient, by_head=not gradient.has_joint_factors):
        for place, rows in enumerate(terms.blocks(size, dtype, device)):
            for step, columns in enumerate(terms.blocks(size, dtype, device, first=place)):
                shared = range(columns.among.start, rows.among.stop)
                if not shared:
                    break  # terms are in the order of prompts
                product = _product(rows, columns)[shared.start - rows.among.start :]
                found[shared.start : shared.stop] += product.diagonal() * (2 if step else 1)
    return found


def _product(rows: Block, columns: Block) -> Float[Tensor, "some_a some_b"]:
    """What the terms of two blocks contribute to the inner products of their prompts."""
    with torch.autocast(rows.inputs.device.type, enabled=False):
        products = rows.inputs @ columns.inputs.T
        products *= rows.vjps @ columns.vjps.T
    summed = products.new_zeros(len(rows.among), len(columns.prompts))
    summed.index_add_(0, rows.prompts - rows.among.start, products)
    turned = summed.new_zeros(len(columns.among), len(rows.among), dtype=torch.float64)
    turned.index_add_(0, columns.prompts - columns.among.start, summed.T.double())
    return turned.T * rows.scales[:, None] * columns.scales


def _at(found: Float[Tensor, "a b"], rows: Block, columns: Block) -> Float[Tensor, "some_a some_b"]:
    """The entries of the prompts of two blocks."""
    return found[rows.among.start : rows.among.stop, columns.among.start : columns.among.stop]


def _block_format(
    here: Factors, there: Factors, budget: int
) -> tuple[int, torch.dtype, torch.device]:
    """Number of terms of a block, its dtype and its device."""
    dtypes = (at_least_float32(each.vjps[:0]).dtype for each in (here, there))
    dtype = torch.promote_types(*dtypes)
    width = here.inputs[0, 0].numel() + here.vjps[0, 0].numel()
    # A pair of blocks of size n takes 3 n^2 numbers for products and 3 n width for factors.
    numbers = budget // dtype.itemsize
    size = int((sqrt(9 * width**2 + 12 * numbers) - 3 * width) / 6)
    return max(1, size), dtype, here.vjps.device


def _check_comparable(here: Captured, there: Captured) -> None:
    """Refuse gradients of other weights."""
    if not isinstance(there, Captured):
        raise InputError(
            f"other is a {type(there).__name__}; pass a GradientCapture, as returned by "
            "capture_gradients"
        )
    unshared = here.gradients.keys() ^ there.gradients.keys()
    if unshared:
        matrix, layer = min(unshared)
        where = "this" if (matrix, layer) in here.gradients else "the other"
        raise InputError(
            f"{matrix} of layer {layer} is only in {where} capture; capture the same matrices and "
            "layers in both"
        )
    if here.coverage.differing != there.coverage.differing:
        raise InputError(
            f"one capture is of {here.coverage.parameters} weights and the other of "
            f"{there.coverage.parameters} ones; load both models with the same processing"
        )
    for key, gradient in here.gradients.items():
        if _sizes(gradient) != _sizes(there.gradients[key]):
            raise InputError(
                f"{gradient} here and {there.gradients[key]} there are of models of different "
                "sizes; pass captures of the same model"
            )


def _sizes(gradient: Factors) -> tuple[int | None, ...]:
    """Sizes of the weight, the same whether its heads share factors or not."""
    widths = gradient.inputs.shape[-1], gradient.vjps.shape[-1]
    return *widths, gradient.n_heads, gradient.n_experts
