"""Hooks that see the tensors at a tap, and what is kept of them.

Of an input its values are kept; of an output only its place in the autograd graph, where the VJP
comes from.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.errors import ModelStateError
from backward_lens_tl.models.precision import at_least_float32

_T = TypeVar("_T")


class Copies:
    """Copies of tensors that somebody may write into later.

    Args:
        shared: Whether taps that see the same tensor share one. If a hook of the caller may write
            into its `data`, which nothing takes note of, they may not.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._made: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """A copy, the one there is if nobody has written into the tensor since it was made."""
        if made := self._made.get(id(tensor)):
            seen, version, copy = made
            if seen() is tensor and version == tensor._version:
                return copy
        copy = tensor.detach().clone()
        if self._shared:
            self._made[id(tensor)] = weakref.ref(tensor), tensor._version, copy
        return copy


class Values:
    """Tensors that pass a tap, detached.

    Args:
        name: Whose they are, for messages.
        copies: Makes copies, if somebody may write into them after they have passed.
    """

    def __init__(self, name: str, copies: Copies | None = None) -> None:
        self._name, self._copies = name, copies
        self.seen: list[Tensor] = []

    def keep(self, tensor: Tensor) -> None:
        """Keep one."""
        self.seen.append(tensor.detach() if self._copies is None else self._copies.of(tensor))

    @property
    def only(self) -> Tensor:
        """The one tensor that passed."""
        return _only(self.seen, self._name)


class Edges:
    """Places in the autograd graph of tensors that pass a tap.

    Args:
        name: Whose they are, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.seen: list[tuple[GradientEdge, Tensor]] = []

    def keep(self, tensor: Tensor) -> Tensor | None:
        """Keep the place of a tensor, and start the graph here if it has not begun.

        Args:
            tensor: The tensor.

        Returns:
            What takes its place, equal to it, or `None` if it can stay.
        """
        # On a frozen model nothing below the lowest tap needs a gradient: begin here.
        source = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        # The model or a caller's hook may write into it. The edge kept here is that of the tensor
        # before then, but a view leaves its old node, and a leaf may not be written into: copy.
        kept = source.clone() if source.is_leaf or source._is_view() else source
        # One number that stands for zeros of its shape, so that it is not held in memory itself.
        zeros = kept.detach().new_zeros(()).expand(kept.shape)
        self.seen.append((get_gradient_edge(kept), zeros))
        return None if kept is tensor else kept

    @property
    def edge(self) -> GradientEdge:
        """The one place."""
        return _only(self.seen, self._name)[0]

    def vjp(self, found: Tensor | None) -> Tensor:
        """The VJP at the one place: zeros where the loss does not depend on it.

        Args:
            found: What autograd gave for `edge`; `None` as under a patch of all that follows.

        Returns:
            The VJP.
        """
        return _only(self.seen, self._name)[1].clone() if found is None else found


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], *, among: Iterable[Tensor]) -> Iterator[None]:
    """Let some parameters alone require gradients, and put everything back afterwards.

    Args:
        parameters: Those that do, frozen ones too.
        among: Those that do not, unless they are named before.

    Yields:
        Nothing; the parameters are so inside the context.
    """
    with ExitStack() as as_before:
        for wanted, tensors in ((False, among), (True, parameters)):
            for tensor in tensors:
                # Also if nothing changes here: a run that is broken off may leave it changed.
                as_before.callback(tensor.requires_grad_, tensor.requires_grad)
                tensor.requires_grad_(wanted)
        yield


def clean_rows(factor: Float[Tensor, "*shape"], batch: PromptBatch) -> Float[Tensor, "*shape"]:
    """Widen, bring layers that lie on other devices together, and put zeros at padding.

    Args:
        factor: Something per prompt and position, its first two axes.
        batch: The prompts.

    Returns:
        The same, on the device of the tokens.
    """
    factor = at_least_float32(factor).to(batch.mask.device)
    if not batch.is_padded:
        return factor
    padding = ~batch.mask.reshape(*batch.mask.shape, *(1,) * (factor.ndim - 2))
    return factor.masked_fill(padding, 0)


def _only(seen: Sequence[_T], name: str) -> _T:
    if len(seen) != 1:
        raise ModelStateError(
            f"{name} was used {len(seen)} times in the forward pass, and a gradient is captured "
            "only where it is used exactly once"
        )
    return seen[0]
