"""Second moments of the inputs of matrices: which directions a model uses, and how much.

`C = E[x x^T]` over the tokens of a text, uncentred. An edit along `C^-1 k` changes what is read
along `k`, and as little as possible of everything else that the text makes the matrix read (ROME,
equation 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import as_file, files

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.editing.statistics.provenance import ModelStatistics
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.sites import MatrixName

RIDGE = 1e-6
"""Fraction of the mean variance that is added to every direction, so that the inverse exists."""

FACTS_MOMENTS = "second_moments.safetensors"
"""Name of the file that ships with the facts model."""


@dataclass(frozen=True, repr=False)
class SecondMoments(ModelStatistics):
    """Uncentred second moments `E[x x^T]` of the inputs of one matrix per layer.

    `second_moments` collects them. `probe` and `probe_inputs` identify the model.

    Attributes:
        matrix: The matrix.
        layers: The layers.
        moments: The upper triangle of each layer's moments, row by row, in the order of `layers`.
        n_tokens: Number of tokens.
        n_texts: Number of texts.
        texts: SHA-256 of the texts in their order.

    Examples:
        >>> import backward_lens_tl as blt
        >>> moments = blt.editing.facts_moments()
        >>> moments.of(3).shape
        torch.Size([512, 512])
    """

    WHAT = "second moments"

    matrix: MatrixName
    layers: tuple[int, ...]
    moments: tuple[Float[Tensor, "triangle"], ...]
    n_tokens: int
    n_texts: int
    texts: str

    @cached_property
    def fingerprint(self) -> str:
        """Model, texts and a checksum in one line, for the settings of a method."""
        held = dict(zip(map(str, self.layers), self.moments, strict=True))
        digest = tensors_digest(held, f"{self.matrix} {self.layers} {self.prepend_bos}")
        return (
            f"{self.matrix} of {self.name} ({self.model[:12]}), {self.n_tokens} tokens of "
            f"{self.n_texts} texts ({self.texts[:12]}), {digest[:12]}"
        )

    def of(self, layer: int) -> Float[Tensor, "d_in d_in"]:
        """Return the moments of one layer.

        Args:
            layer: The layer, from 0.

        Returns:
            `E[x x^T]` in float64.

        Raises:
            EditError: If there are no statistics of the layer.

        Examples:
            >>> second = moments.of(5)
            >>> second.shape, torch.equal(second, second.T)
            (torch.Size([512, 512]), True)
        """
        self._check_layers([layer])
        packed = self.moments[self.layers.index(layer)].double()
        size = (math.isqrt(8 * len(packed) + 1) - 1) // 2
        upper = packed.new_zeros(size, size)
        upper[tuple(torch.triu_indices(size, size))] = packed
        return upper + upper.triu(1).T

    def solve(
        self, layer: int, keys: Float[Tensor, "d_in n"], ridge: float = RIDGE
    ) -> Float[Tensor, "d_in n"]:
        """Compute `C^-1 K` by a Cholesky factorisation in float64.

        Args:
            layer: The layer, from 0.
            keys: The keys, as columns.
            ridge: Fraction of the mean variance `tr(C) / d_in` that is added to the diagonal. With
                no more tokens than dimensions it determines the result, and must be passed.

        Returns:
            The solution in float64.

        Raises:
            EditError: If there are no statistics of the layer, or too few tokens for an inverse.

        Examples:
            >>> keys = gradient.inputs[0].T  # [d_in, n]
            >>> whitened = moments.solve(6, keys)
            >>> torch.allclose(moments.of(6) @ whitened, keys.double(), atol=1e-3)
            True
        """
        factor = self._factor(layer, float(ridge))
        if len(factor) != len(keys):
            raise EditError(
                f"the statistics have width {len(factor)}, but the keys of layer {layer} "
                f"have width {len(keys)}: they are from different models"
            )
        solution: Tensor = torch.cholesky_solve(keys.double().cpu(), factor).to(keys.device)
        return solution

    def _factor(self, layer: int, ridge: float) -> Float[Tensor, "d_in d_in"]:
        """The Cholesky factor of `C` with a ridge; the last one is kept for the next edit."""
        key = layer, ridge
        if key in self._factors:
            return self._factors[key]
        moments = self.of(layer)
        if self.n_tokens <= len(moments) and ridge <= RIDGE:
            raise EditError(
                f"the second moments of layer {layer} are of {self.n_tokens} tokens, but "
                f"{len(moments)} dimensions need more; collect more text, or pass a larger ridge"
            )
        moments.diagonal().add_(ridge * moments.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(moments)
        if int(info):
            raise EditError(
                f"the second moments of layer {layer} cannot be inverted ({self.n_tokens} tokens "
                f"for {len(moments)} dimensions); collect more text, or pass a larger ridge"
            )
        self._factors.clear()
        self._factors[key] = factor
        return self._factors[key]

    @cached_property
    def _factors(self) -> dict[tuple[int, float], Tensor]:
        return {}

    def check(self, host: Host, layers: Sequence[int], matrix: MatrixName | None = None) -> None:
        """Refuse a model, layers or a matrix that the statistics do not belong to.

        Args:
            host: The model.
            layers: The layers whose statistics are needed.
            matrix: The matrix whose statistics are needed; any by default.

        Raises:
            EditError: If the statistics are of another model, matrix or layer.

        Examples:
            >>> from backward_lens_tl.models import host_of
            >>> moments.check(host_of(model), layers=[5, 6])  # raises if they are another model's
        """
        if matrix not in (None, self.matrix):
            raise EditError(
                f"these statistics are of the inputs of {self.matrix}, but {matrix} is edited; "
                f"collect them with second_moments(model, texts, matrix={matrix!r}, "
                f"layers=[{', '.join(map(str, layers))}])"
            )
        self._check_layers(layers)
        self._check_model(host, self.matrix, self.layers, "second_moments(model, texts)")

    def _check_layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if layer not in self.layers:
                raise EditError(
                    f"these statistics are of layers {', '.join(map(str, self.layers))}, not of "
                    f"layer {layer}; collect them with second_moments(model, texts, "
                    f"layers=[{layer}])"
                )

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"SecondMoments({self.fingerprint}; layers {layers})"


def facts_moments() -> SecondMoments:
    """Load the second moments of `W_out`'s inputs in the facts model, which ship in the package.

    Returns:
        The statistics of all layers.

    Examples:
        >>> import backward_lens_tl as blt
        >>> moments = blt.editing.facts_moments()
        >>> moments.matrix, moments.layers
        ('W_out', (0, 1, 2, 3, 4, 5, 6, 7))
    """
    with as_file(files("backward_lens_tl") / "facts_model" / FACTS_MOMENTS) as path:
        return SecondMoments.load(path)
