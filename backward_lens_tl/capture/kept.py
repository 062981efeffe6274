"""What hooks keep: the values of inputs, and the places of outputs in the autograd graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.errors import ModelStateError
from backward_lens_tl.models.precision import at_least_float32

_T = TypeVar("_T")


class Copies:
    """Copies of tensors that may be written into later.

    Args:
        shared: Whether hooks that see the same tensor share a copy. They may not if a caller's hook
            may write into its `data`, which does not change the tensor's version.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._made: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """A copy; an existing one if the tensor has not been written into since."""
        if made := self._made.get(id(tensor)):
            seen, version, copy = made
            if seen() is tensor and version == tensor._version:
                return copy
        copy = tensor.detach().clone()
        if self._shared:
            self._made[id(tensor)] = weakref.ref(tensor), tensor._version, copy
        return copy


class Values:
    """Tensors that a hook saw, detached.

    Args:
        name: What they belong to, for messages.
        copies: Makes copies, if the tensors may be written into later.
    """

    def __init__(self, name: str, copies: Copies | None = None) -> None:
        self._name, self._copies = name, copies
        self.seen: list[Tensor] = []

    def keep(self, tensor: Tensor) -> None:
        """Keep one."""
        self.seen.append(tensor.detach() if self._copies is None else self._copies.of(tensor))

    @property
    def only(self) -> Tensor:
        """The single tensor."""
        return _only(self.seen, self._name)


class Edges:
    """Places in the autograd graph of tensors that a hook saw.

    Args:
        name: What they belong to, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.seen: list[tuple[GradientEdge, Tensor]] = []

    def keep(self, tensor: Tensor) -> Tensor | None:
        """Keep the place of a tensor, and start the graph here if it has not started yet.

        Args:
            tensor: The tensor.

        Returns:
            An equal tensor to replace it, or `None` if no replacement is needed.
        """
        # On a frozen model nothing below the lowest hook needs a gradient.
        source = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        # The model or a caller's hook may write into it later. The edge stays that of the
        # unchanged tensor, except for views, whose node changes. Leaves may not be written into.
        kept = source.clone() if source.is_leaf or source._is_view() else source
        # Expanded zeros, so that the tensor itself is not kept in memory.
        zeros = kept.detach().new_zeros(()).expand(kept.shape)
        self.seen.append((get_gradient_edge(kept), zeros))
        return None if kept is tensor else kept

    @property
    def edge(self) -> GradientEdge:
        """The single place."""
        return _only(self.seen, self._name)[0]

    def vjp(self, found: Tensor | None) -> Tensor:
        """The VJP at the single place.

        Args:
            found: The gradient that autograd returned for `edge`; `None` if the loss does not
                depend on it, as under a patch of everything after it.

        Returns:
            The VJP; zeros for `None`.
        """
        return _only(self.seen, self._name)[1].clone() if found is None else found


def clean_rows(factor: Float[Tensor, "*shape"], batch: PromptBatch) -> Float[Tensor, "*shape"]:
    """Widen a factor, move it to the device of the tokens, and zero it at padding.

    Args:
        factor: A value per prompt and position, its first two axes.
        batch: The prompts.

    Returns:
        The factor.
    """
    factor = at_least_float32(factor).to(batch.mask.device)
    if not batch.is_padded:
        return factor
    padding = ~batch.mask.reshape(*batch.mask.shape, *(1,) * (factor.ndim - 2))
    return factor.masked_fill(padding, 0)


def _only(seen: Sequence[_T], name: str) -> _T:
    if len(seen) != 1:
        raise ModelStateError(
            f"{name} was used {len(seen)} times in the forward pass, but a gradient is captured "
            "only if it is used exactly once"
        )
    return seen[0]
