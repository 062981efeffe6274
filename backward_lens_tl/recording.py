"""Hooks that note, during a forward pass, what a matrix's gradient is made of.

A recorder keeps the inputs `x` and, of the output `y`, only its place in the autograd graph. After
the backward pass it puts both factors together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backward_lens_tl.errors import ModelStateError, UnsupportedModelError
from backward_lens_tl.experts import stacked_factors
from backward_lens_tl.gradients import AttentionGradient, HookPointGradient, MatrixGradient
from backward_lens_tl.prompts import PromptBatch
from backward_lens_tl.sites import (
    READING_MATRICES,
    ExpertsSite,
    HookPointSite,
    MatrixSite,
    Site,
    StackedExpertsSite,
    Tap,
)

_T = TypeVar("_T")
Watched = tuple[Tap, Callable[[Any], Tensor | None], bool]


class Values:
    """Tensors that pass a tap, detached.

    Args:
        name: Whose they are, for messages.
        copy: Whether somebody may write into them after they have passed.
    """

    def __init__(self, name: str, *, copy: bool) -> None:
        self._name, self._copy = name, copy
        self.seen: list[Tensor] = []

    def keep(self, tensor: Tensor) -> None:
        """Keep one."""
        kept = tensor.detach()
        self.seen.append(kept.clone() if self._copy else kept)

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


class Recorder(ABC):
    """What passes the taps of one site during a forward pass."""

    @abstractmethod
    def watched(self) -> Iterator[Watched]:
        """Taps, what sees the tensors there, and whether it comes before hooks already there."""

    @property
    @abstractmethod
    def edges(self) -> list[GradientEdge]:
        """Where the loss has to be differentiated; known after the forward pass."""

    def captured_uses(self) -> list[tuple[Tensor, int]]:
        """Parameters whose uses can be counted, and how many of them were seen."""
        return []


class MatrixRecorder(Recorder):
    """One matrix, used once.

    Args:
        site: Where it is.
    """

    def __init__(self, site: MatrixSite) -> None:
        self.site = site
        name = f"{site.matrix} of layer {site.layer}"
        # Matrices that read the residual stream share their input, and a caller's hook on one that
        # comes later may write into it.
        self._x = Values(name, copy=site.matrix in READING_MATRICES)
        self._y = Edges(name)

    def watched(self) -> Iterator[Watched]:
        """`x` is what the caller's hooks made of it; `y` is what the matrix gave, before theirs."""
        yield self.site.input, self._x.keep, False
        yield self.site.output, self._y.keep, True

    @property
    def edges(self) -> list[GradientEdge]:
        """At `y`."""
        return [self._y.edge]

    def captured_uses(self) -> list[tuple[Tensor, int]]:
        """The one use of the weight."""
        return [(self.site.weight.parameter, 1)]

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> MatrixGradient:
        """Put the factors together.

        Args:
            found: What autograd gave for `edges`.
            batch: The prompts.

        Returns:
            The gradient.
        """
        site, rows = self.site, batch.mask.shape
        y = self._y.vjp(found[0])
        _check_rows(self._x.only, site, batch)
        return MatrixGradient(
            matrix=site.matrix,
            layer=site.layer,
            inputs=_clean(site.by_head(self._x.only, "input", rows), batch),
            vjps=_clean(site.by_head(y, "output", rows), batch),
            mask=batch.mask,
            input_hook=site.input_hook,
            output_hook=site.output_hook,
        )


class ExpertsRecorder(Recorder):
    """One matrix of every expert of a layer, each used at most once.

    Args:
        site: Where they are.
    """

    def __init__(self, site: ExpertsSite) -> None:
        self.site = site
        self._x, self._y = [], []
        for number, expert in enumerate(site.experts):
            name = f"{expert.matrix} of layer {expert.layer}, expert {number}"
            self._x.append(Values(name, copy=False))
            self._y.append(Edges(name))
        self._chosen = Values(f"the routing of layer {site.layer}", copy=True)

    def watched(self) -> Iterator[Watched]:
        """Every expert's own input and output, and who was routed where."""
        for expert, x, y in zip(self.site.experts, self._x, self._y, strict=True):
            yield expert.input, x.keep, False
            yield expert.output, y.keep, True
        yield self.site.chosen, self._chosen.keep, False

    @property
    def edges(self) -> list[GradientEdge]:
        """At `y` of the experts that were used."""
        return [y.edge for y in self._y if y.seen]

    def captured_uses(self) -> list[tuple[Tensor, int]]:
        """Those of every expert's weight."""
        pairs = zip(self.site.weights, self._y, strict=True)
        return [(weight, len(y.seen)) for weight, y in pairs]

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> MatrixGradient:
        """Put the factors together, slot by slot.

        Args:
            found: What autograd gave for `edges`.
            batch: The prompts.

        Returns:
            The gradient.

        Raises:
            UnsupportedModelError: If an expert saw other tokens than were routed to it.
        """
        chosen = self._chosen.only
        factors: list[Tensor | None] = [None, None]
        left = iter(found)
        for expert, (x, y) in enumerate(zip(self._x, self._y, strict=True)):
            if not y.seen:
                continue
            # Every implementation walks through an expert's tokens slot by slot.
            slots, tokens = torch.eq(chosen.T, expert).nonzero(as_tuple=True)
            for side, rows in enumerate((x.only, y.vjp(next(left)))):
                if len(rows) != len(tokens):
                    raise UnsupportedModelError(
                        f"expert {expert} of layer {self.site.layer} saw {len(rows)} tokens, and "
                        f"{len(tokens)} were routed there; the lens cannot tell which they are"
                    )
                laid_out = factors[side]
                if laid_out is None:
                    laid_out = factors[side] = rows.new_zeros(*chosen.shape, rows.shape[-1])
                laid_out[tokens, slots] = rows
        inputs, vjps = (factor for factor in factors if factor is not None)
        return _by_slot(self.site, inputs, vjps, chosen, batch)


class StackedExpertsRecorder(Recorder):
    """One matrix of every expert of a layer, stacked in one parameter.

    Args:
        site: Where it is.
    """

    def __init__(self, site: StackedExpertsSite) -> None:
        self.site = site
        name = f"the experts of layer {site.layer}"
        self._inputs = Values(name, copy=True)
        self._chosen, self._weights = Values(name, copy=True), Values(name, copy=True)
        self._outputs, self._y = Values(name, copy=True), Edges(name)

    def watched(self) -> Iterator[Watched]:
        """What the whole stack reads, how it routes, and what it writes."""
        module = self.site.stack.module
        for position, kept in enumerate((self._inputs, self._chosen, self._weights)):
            yield Tap(module, "input", argument=position), kept.keep, False
        yield Tap(module, "output"), self._keep_output, True

    def _keep_output(self, tensor: Tensor) -> Tensor | None:
        self._outputs.keep(tensor)
        return self._y.keep(tensor)

    @property
    def edges(self) -> list[GradientEdge]:
        """At the stack's output."""
        return [self._y.edge]

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> MatrixGradient:
        """Derive the experts' factors.

        Args:
            found: What autograd gave for `edges`.
            batch: The prompts.

        Returns:
            The gradient.
        """
        chosen = self._chosen.only
        inputs, vjps = stacked_factors(
            self.site,
            self._inputs.only,
            chosen,
            self._weights.only,
            self._outputs.only,
            self._y.vjp(found[0]),
        )
        return _by_slot(self.site, inputs, vjps, chosen, batch)


class VjpRecorder(Recorder):
    """The gradient at one hook point.

    Args:
        site: Which.
    """

    def __init__(self, site: HookPointSite) -> None:
        self.site = site
        self._edge = Edges(f"hook point {site.name}")

    def watched(self) -> Iterator[Watched]:
        """What the rest of the model sees, after the caller's hooks."""
        yield self.site.tap, self._keep, False

    def _keep(self, tensor: Tensor) -> Tensor | None:
        # Indices of experts pass hook points too, and have no gradient.
        return self._edge.keep(tensor) if tensor.is_floating_point() else None

    @property
    def has_seen(self) -> bool:
        """Whether anything that has a gradient passed."""
        return bool(self._edge.seen)

    @property
    def edges(self) -> list[GradientEdge]:
        """At the hook point."""
        return [self._edge.edge]

    def vjp(self, found: Sequence[Tensor | None], batch: PromptBatch) -> Tensor:
        """The gradient, laid out as a hook would see it.

        Args:
            found: What autograd gave for `edges`.
            batch: The prompts.

        Returns:
            The gradient.
        """
        return self._as_hooked(self._edge.vjp(found[0]), batch)

    def _as_hooked(self, tensor: Tensor, batch: PromptBatch) -> Tensor:
        return at_least_float32(self.site.as_hooked(tensor)).to(batch.mask.device)


class HookPointRecorder(VjpRecorder):
    """The activation at one hook point, with its gradient.

    Args:
        site: Which.

    Raises:
        UnsupportedModelError: If the model does not go on with what passes there.
    """

    def __init__(self, site: HookPointSite) -> None:
        super().__init__(site)
        self._value = Values(f"hook point {site.name}", copy=True)
        if not site.is_replaceable:
            raise UnsupportedModelError(
                f"hook point {site.name!r} of this architecture shows a copy of the pattern that "
                "the model does not go on with; ask for matrices='attn', which gives "
                "reversed_attention"
            )

    def _keep(self, tensor: Tensor) -> Tensor | None:
        if tensor.is_floating_point():
            self._value.keep(tensor)
        return super()._keep(tensor)

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> HookPointGradient:
        """Put activation and gradient together.

        Args:
            found: What autograd gave for `edges`.
            batch: The prompts.

        Returns:
            Both.
        """
        value = self._as_hooked(self._value.only, batch)
        return HookPointGradient(self.site.name, value, self.vjp(found, batch))


class PatternRecorder(VjpRecorder):
    """The attention pattern of one layer, with its gradient.

    Args:
        site: Where it is.
    """

    def __init__(self, site: HookPointSite) -> None:
        super().__init__(site)
        self._pattern = Values(f"hook point {site.name}", copy=True)

    def watched(self) -> Iterator[Watched]:
        """What the softmax gave, before the caller's hooks."""
        yield self.site.tap, self._keep, True

    def _keep(self, tensor: Tensor) -> Tensor | None:
        # Where nothing may take the pattern's place, its graph has to be there already.
        if not self.site.is_replaceable and not tensor.requires_grad:
            return None
        self._pattern.keep(tensor)
        return super()._keep(tensor)

    def gradient(
        self, found: Sequence[Tensor | None], batch: PromptBatch, d_head: int
    ) -> AttentionGradient:
        """Go back through the softmax.

        Args:
            found: What autograd gave for `edges`.
            batch: The prompts.
            d_head: Width of an attention head.

        Returns:
            The gradient at the scores.
        """
        pattern, at_pattern = self._as_hooked(self._pattern.only, batch), self.vjp(found, batch)
        weighted = pattern * at_pattern
        at_scores = weighted - pattern * weighted.sum(-1, keepdim=True)
        return AttentionGradient(at_scores, d_head, self.site.is_replaceable)


MatrixRecorders = MatrixRecorder | ExpertsRecorder | StackedExpertsRecorder


def recorder_of(site: Site) -> MatrixRecorders:
    """A recorder for a matrix.

    Args:
        site: Where the matrix is.

    Returns:
        The recorder of its kind.
    """
    if isinstance(site, MatrixSite):
        return MatrixRecorder(site)
    return ExpertsRecorder(site) if isinstance(site, ExpertsSite) else StackedExpertsRecorder(site)


@contextmanager
def recording(recorders: Sequence[Recorder]) -> Iterator[None]:
    """Hooks of every recorder, taken off again whatever happens.

    Args:
        recorders: The recorders.

    Yields:
        Nothing; the hooks are there inside the context.
    """
    with ExitStack() as hooks:
        for recorder in recorders:
            for tap, see, before_others in recorder.watched():
                hooks.enter_context(hooked(tap, see, before_others=before_others))
        yield


@contextmanager
def hooked(
    tap: Tap, see: Callable[[Tensor], Tensor | None], *, before_others: bool = False
) -> Iterator[None]:
    """Show every tensor that passes a tap to a function, which may replace it.

    Args:
        tap: Where.
        see: Gets the tensor; returns what takes its place, or `None` to leave it.
        before_others: Whether the function comes before the hooks that are there already.

    Yields:
        Nothing; the hook is there inside the context.
    """
    if tap.side == "input":
        handle = tap.module.register_forward_pre_hook(
            partial(_see_input, see, tap.argument), prepend=before_others, with_kwargs=True
        )
    else:
        handle = tap.module.register_forward_hook(partial(_see_output, see), prepend=before_others)
    try:
        yield
    finally:
        handle.remove()


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Widen half precision to float32; leave float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _see_input(
    see: Callable[[Tensor], Tensor | None],
    argument: int | str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if isinstance(argument, str):
        replaced = see(kwargs[argument])
        return None if replaced is None else (args, kwargs | {argument: replaced})
    replaced = see(args[argument])
    if replaced is None:
        return None
    return (*args[:argument], replaced, *args[argument + 1 :]), kwargs


def _see_output(
    see: Callable[[Tensor], Tensor | None],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> Tensor | None:
    return see(output)


def _only(seen: Sequence[_T], name: str) -> _T:
    if len(seen) != 1:
        raise ModelStateError(
            f"{name} was used {len(seen)} times in the forward pass, and a gradient is captured "
            "only where it is used exactly once"
        )
    return seen[0]


def _check_rows(x: Float[Tensor, "*rows d"], site: MatrixSite, batch: PromptBatch) -> None:
    has_head_axis = site.input_heads is not None and x.shape[-2] == site.input_heads
    n_vectors = x[..., 0, 0].numel() if has_head_axis else x[..., 0].numel()
    if n_vectors != batch.mask.numel():
        raise UnsupportedModelError(
            f"{site.matrix} of layer {site.layer} saw {n_vectors} vectors for "
            f"{batch.mask.numel()} tokens; the lens needs one for each"
        )


def _by_slot(
    site: ExpertsSite | StackedExpertsSite,
    inputs: Float[Tensor, "*rows d_in"],
    vjps: Float[Tensor, "*rows d_out"],
    chosen: Int[Tensor, "tokens slot"],
    batch: PromptBatch,
) -> MatrixGradient:
    """Lay factors out by prompt, position and slot."""
    rows = batch.mask.shape
    # All experts of a token read the same, unless a caller's hook comes in between.
    if inputs.ndim == 3 and site.matrix in READING_MATRICES and inputs.eq(inputs[:, :1]).all():
        inputs = inputs[:, 0]
    experts = chosen.reshape(*rows, chosen.shape[-1]).to(batch.mask.device)
    return MatrixGradient(
        matrix=site.matrix,
        layer=site.layer,
        inputs=_clean(inputs.reshape(*rows, *inputs.shape[1:]), batch),
        vjps=_clean(vjps.reshape(*rows, *vjps.shape[1:]), batch),
        mask=batch.mask,
        experts=experts.masked_fill(~batch.mask[..., None], -1),
        n_experts=site.n_experts,
    )


def _clean(factor: Float[Tensor, "*shape"], batch: PromptBatch) -> Float[Tensor, "*shape"]:
    """Widen, bring layers that lie on other devices together, and put zeros at padding."""
    factor = at_least_float32(factor).to(batch.mask.device)
    if not batch.is_padded:
        return factor
    padding = ~batch.mask.reshape(*batch.mask.shape, *(1,) * (factor.ndim - 2))
    return factor.masked_fill(padding, 0)
