"""The matrices of a fitted Jacobian Lens.

For each block `l` a lens has the average, over positions and prompts, of

    J_l = d h_final / d h_l

where `h_l` is the output of block `l` and `h_final` that of the last block, before the final norm.
A vector `v` that is added to `h_l` therefore changes `h_final` by `J_l v` on average. The matrix of
the last block is the identity and is not stored.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import is_integer
from backward_lens_tl.errors import JacobianLensError
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.precision import at_least_float32

WEIGHTS = "weights_fingerprint"
"""Entry of the metadata with the fingerprint of the weights that a lens was fitted on."""

_SHOWN_DIGITS = 8


@runtime_checkable
class FittedLens(Protocol):
    """TransformerLens's `JacobianLens`, or an object with these attributes of it."""

    @property
    def jacobians(self) -> Mapping[int, Tensor]:
        """`J_l` by layer, `[d_model, d_model]`."""

    @property
    def n_prompts(self) -> int:
        """Number of prompts that were averaged."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """How the lens was fitted; may be empty."""


@dataclass(frozen=True, eq=False, repr=False)
class Jacobians:
    """Average Jacobians, one per layer.

    Attributes:
        matrices: `J_l` by layer, on the CPU.
        n_prompts: Number of prompts that were averaged; 0 if unknown.
        d_model: Width of the residual stream.
        metadata: How the lens was fitted, as recorded in its file; may be empty.
    """

    matrices: Mapping[int, Float[Tensor, "d_model d_model"]]
    n_prompts: int
    d_model: int
    metadata: Mapping[str, Any]
    _placed: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False
    )

    def __repr__(self) -> str:
        return (
            f"Jacobians({len(self.matrices)} layers, d_model={self.d_model}, "
            f"n_prompts={self.n_prompts})"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a matrix, ascending."""
        return tuple(self.matrices)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What identifies the fit, as JSON: `sha256` of the matrices, `n_prompts`, the metadata."""
        named = {str(layer): matrix for layer, matrix in self.matrices.items()}
        recorded: dict[str, Any] = json.loads(json.dumps(dict(self.metadata), default=str))
        return recorded | {"n_prompts": self.n_prompts, "sha256": tensors_digest(named)}

    @cached_property
    def fit(self) -> str:
        """What identifies the fit, in a few words."""
        of_corpus = f" of {self.metadata['corpus']}" if "corpus" in self.metadata else ""
        checksum = self.provenance["sha256"][:_SHOWN_DIGITS]
        return f"fitted on {self.n_prompts} prompts{of_corpus}, SHA-256 {checksum}"

    def times(
        self, vectors: Float[Tensor, "*n d_model"], layer: int
    ) -> Float[Tensor, "*n d_model"]:
        """Compute `J_l v` for every vector, in float32, or in float64 for vectors in float64.

        Args:
            vectors: Vectors at the output of the layer's block.
            layer: A layer that has a matrix.

        Returns:
            The vectors at the output of the last block.
        """
        vectors = at_least_float32(vectors)
        key = layer, vectors.device, vectors.dtype
        if key not in self._placed:
            self._placed[key] = self.matrices[layer].to(vectors.device, vectors.dtype)
        with torch.autocast(vectors.device.type, enabled=False):
            return vectors @ self._placed[key].T


_Held = tuple[tuple[Any, Any, int], ...]
"""Layers, tensors and their versions; a tensor that is kept here cannot lose its identity."""

_KNOWN: WeakKeyDictionary[Hashable, tuple[_Held, Jacobians]] = WeakKeyDictionary()


def jacobians_of(lens: FittedLens) -> Jacobians:
    """The matrices of a lens, checked; the same object as before if the lens has not changed.

    Args:
        lens: TransformerLens's `JacobianLens`, or an object with its attributes.

    Returns:
        The matrices.

    Raises:
        JacobianLensError: If they are not square matrices of one width with finite entries.
    """
    held = tuple(
        (layer, each, getattr(each, "_version", 0)) for layer, each in lens.jacobians.items()
    )
    known = _KNOWN.get(lens) if isinstance(lens, Hashable) else None
    if known is not None and _are_same(known[0], held):
        return known[1]
    found = checked_jacobians(dict(lens.jacobians), lens.n_prompts, lens.d_model, lens.metadata)
    if isinstance(lens, Hashable):
        _KNOWN[lens] = held, found
    return found


def _are_same(held: _Held, others: _Held) -> bool:
    pairs = zip(held, others, strict=False)
    return len(held) == len(others) and all(
        layer == other and tensor is another and version == now
        for (layer, tensor, version), (other, another, now) in pairs
    )


def checked_jacobians(
    matrices: Mapping[Any, Any], n_prompts: object, d_model: object, metadata: object
) -> Jacobians:
    """Check the matrices of a lens.

    Args:
        matrices: `J_l` by layer.
        n_prompts: Number of prompts that were averaged.
        d_model: Width of the residual stream.
        metadata: How the lens was fitted, or `None`.

    Returns:
        The matrices, at least in float32.

    Raises:
        JacobianLensError: If they are not square matrices of one width with finite entries.
    """
    if not matrices:
        raise JacobianLensError("the lens has no matrices; fit it on at least one layer")
    for layer, matrix in matrices.items():
        name = f"the lens's matrix of layer {layer!r}"
        if not is_integer(layer) or not isinstance(matrix, Tensor):
            raise JacobianLensError(
                f"{name} is a {type(matrix).__name__}; a lens has one tensor per layer, by its "
                "number"
            )
        if matrix.shape != (d_model, d_model) or not matrix.is_floating_point():
            raise JacobianLensError(
                f"{name} has shape {tuple(matrix.shape)} and dtype {matrix.dtype}, but the lens "
                f"was fitted for a residual stream of width {d_model}; the file is damaged"
            )
        if not bool(matrix.isfinite().all()):
            raise JacobianLensError(f"{name} contains NaN or infinity; fit the lens again")
    return Jacobians(
        {
            int(layer): at_least_float32(matrices[layer].detach()).cpu()
            for layer in sorted(matrices)
        },
        int(n_prompts) if is_integer(n_prompts) else 0,
        next(iter(matrices.values())).shape[0],
        dict(metadata) if isinstance(metadata, Mapping) else {},
    )
