"""Hooks that note, during a forward pass, what a matrix's gradient is made of.

A recorder keeps the inputs `x` and, of the output `y`, only its place in the autograd graph. After
the backward pass it puts both factors together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backward_lens_tl.capture.experts import stacked_factors
from backward_lens_tl.capture.hook_points import AttentionGradient, HookPointGradient
from backward_lens_tl.capture.hooks import (
    Copies,
    Edges,
    Values,
    clean_rows,
)
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import (
    READING_MATRICES,
    ExpertsSite,
    HookPointSite,
    MatrixSite,
    Site,
    StackedExpertsSite,
)
from backward_lens_tl.models.taps import Tap, hooked

Watched = tuple[Tap, Callable[[Any], Tensor | None], bool]


class OwnUse:
    """The use of a weight in its own place, between `x` and `y`.

    The weight requires gradients during the run, so that the autograd graph shows every other use
    of it, but not between these two: there autograd would keep `x` for the weight's gradient, and a
    caller's hook that writes into `x` would raise.

    Args:
        site: The matrix.
        name: Whose it is, for messages.
        copies: Makes copies.
    """

    def __init__(self, site: MatrixSite, name: str, copies: Copies) -> None:
        self.site = site
        # Matrices that read the residual stream share their input, and a caller's hook on one that
        # comes later may write into it.
        self.x = Values(name, copies if site.matrix in READING_MATRICES else None)
        self.y = Edges(name)

    def watched(self) -> Iterator[Watched]:
        """`x` is what the caller's hooks made of it; `y` is what the matrix gave, before theirs."""
        yield self.site.input, self._keep_input, False
        yield self.site.output, self._keep_output, True

    def others(self, uses: Mapping[Tensor, int]) -> int:
        """How often the weight was used elsewhere, by its uses in the autograd graph."""
        return uses.get(self.site.weight.parameter, 0)

    def _keep_input(self, tensor: Tensor) -> None:
        self.x.keep(tensor)
        self._let_require_grad(False)

    def _keep_output(self, tensor: Tensor) -> Tensor | None:
        self._let_require_grad(True)
        return self.y.keep(tensor)

    def _let_require_grad(self, wanted: bool) -> None:
        if self.site.weight.parameter.is_leaf:  # not if it is made of others, by a parametrization
            self.site.weight.parameter.requires_grad_(wanted)


class Recorder(ABC):
    """What passes the taps of one site during a forward pass."""

    @abstractmethod
    def watched(self) -> Iterator[Watched]:
        """Taps, what sees the tensors there, and whether it comes before hooks already there."""

    @property
    @abstractmethod
    def edges(self) -> list[GradientEdge]:
        """Where the loss has to be differentiated; known after the forward pass."""

    def other_uses(self, uses: Mapping[Tensor, int]) -> int:
        """How often a weight was used elsewhere in the forward pass, where that can be counted.

        Args:
            uses: How often every leaf enters the autograd graph.

        Returns:
            The number of uses that nothing captures.
        """
        del uses
        return 0


class MatrixRecorder(Recorder):
    """One matrix, used once.

    Args:
        site: Where it is.
        copies: Makes copies.
    """

    def __init__(self, site: MatrixSite, copies: Copies) -> None:
        self.site = site
        self._use = OwnUse(site, f"{site.matrix} of layer {site.layer}", copies)

    def watched(self) -> Iterator[Watched]:
        """Its input and its output."""
        return self._use.watched()

    @property
    def edges(self) -> list[GradientEdge]:
        """At `y`."""
        return [self._use.y.edge]

    def other_uses(self, uses: Mapping[Tensor, int]) -> int:
        """Uses of the weight elsewhere."""
        return self._use.others(uses)

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> MatrixGradient:
        """Put the factors together.

        Args:
            found: What autograd gave for `edges`.
            batch: The prompts.

        Returns:
            The gradient.
        """
        site, rows = self.site, batch.mask.shape
        x, y = self._use.x.only, self._use.y.vjp(found[0])
        _check_rows(x, site, batch)
        return MatrixGradient(
            matrix=site.matrix,
            layer=site.layer,
            inputs=clean_rows(site.by_head(x, "input", rows), batch),
            vjps=clean_rows(site.by_head(y, "output", rows), batch),
            mask=batch.mask,
            input_hook=site.input_hook,
            output_hook=site.output_hook,
        )


class ExpertsRecorder(Recorder):
    """One matrix of every expert of a layer, each used at most once.

    Args:
        site: Where they are.
        copies: Makes copies.
    """

    def __init__(self, site: ExpertsSite, copies: Copies) -> None:
        self.site = site
        name = f"{site.matrix} of layer {site.layer}, expert"
        self._uses = [
            OwnUse(expert, f"{name} {index}", copies) for index, expert in enumerate(site.experts)
        ]
        self._chosen = Values(f"the routing of layer {site.layer}", copies)

    def watched(self) -> Iterator[Watched]:
        """Every expert's own input and output, and who was routed where."""
        for use in self._uses:
            yield from use.watched()
        yield self.site.chosen, self._chosen.keep, False

    @property
    def edges(self) -> list[GradientEdge]:
        """At `y` of the experts that were used."""
        return [use.y.edge for use in self._uses if use.y.seen]

    def other_uses(self, uses: Mapping[Tensor, int]) -> int:
        """Uses of any expert's weight elsewhere."""
        return max(use.others(uses) for use in self._uses)

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
        for expert, use in enumerate(self._uses):
            if not use.y.seen:
                continue
            # Every implementation walks through an expert's tokens slot by slot.
            slots, tokens = torch.eq(chosen.T, expert).nonzero(as_tuple=True)
            for side, rows in enumerate((use.x.only, use.y.vjp(next(left)))):
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
        copies: Makes copies.
    """

    def __init__(self, site: StackedExpertsSite, copies: Copies) -> None:
        self.site = site
        name = f"the experts of layer {site.layer}"
        self._inputs, self._outputs = Values(name, copies), Values(name, copies)
        self._chosen, self._weights = Values(name, copies), Values(name, copies)
        self._y = Edges(name)

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
        # Indices of experts pass hook points too; some norms show theirs a copy, outside the graph.
        if not tensor.is_floating_point() or not torch.is_grad_enabled():
            return None
        # The tensor may go other ways past the hook point as well, the residual stream does: a node
        # of its own has the gradient of this way alone, which is the one that a patch here has.
        own = tensor.clone()
        replaced = self._edge.keep(own)
        return own if replaced is None else replaced

    @property
    def n_seen(self) -> int:
        """How often something that has a gradient passed."""
        return len(self._edge.seen)

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
        self._value = Values(f"hook point {site.name}", Copies(shared=False))
        if not site.is_replaceable:
            raise UnsupportedModelError(
                f"hook point {site.name!r} of this architecture shows a copy of the pattern that "
                "the model does not go on with; ask for matrices='attn', which gives "
                "reversed_attention"
            )

    def _keep(self, tensor: Tensor) -> Tensor | None:
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
        self._pattern = Values(f"hook point {site.name}")

    def watched(self) -> Iterator[Watched]:
        """What the softmax gave, before the caller's hooks."""
        yield self.site.tap, self._keep, True

    def _keep(self, tensor: Tensor) -> Tensor | None:
        self._pattern.keep(tensor)
        if self.site.is_replaceable:
            return super()._keep(tensor)
        # Where nothing may take the pattern's place, its graph has to be there already.
        return self._edge.keep(tensor) if tensor.requires_grad else None

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


def recorder_of(site: Site, copies: Copies) -> MatrixRecorders:
    """A recorder for a matrix.

    Args:
        site: Where the matrix is.
        copies: Makes copies, one for several recorders that keep the same.

    Returns:
        The recorder of its kind.
    """
    if isinstance(site, MatrixSite):
        return MatrixRecorder(site, copies)
    if isinstance(site, ExpertsSite):
        return ExpertsRecorder(site, copies)
    return StackedExpertsRecorder(site, copies)


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


def _check_rows(x: Float[Tensor, "*rows d"], site: MatrixSite, batch: PromptBatch) -> None:
    has_head_axis = site.input_heads is not None and x.ndim == 4
    n_vectors = x[..., 0, 0].numel() if has_head_axis else x[..., 0].numel()
    if n_vectors != batch.mask.numel():
        raise UnsupportedModelError(
            f"{site.matrix} of layer {site.layer} saw {n_vectors} vectors for "
            f"{batch.mask.numel()} tokens; the lens needs one for each"
        )


def _by_slot(
    site: ExpertsSite | StackedExpertsSite,
    inputs: Float[Tensor, "tokens *slot d_in"],
    vjps: Float[Tensor, "tokens *slot_ d_out"],
    chosen: Int[Tensor, "tokens slot"],
    batch: PromptBatch,
) -> MatrixGradient:
    """Lay factors out by prompt, position and slot."""
    rows = batch.mask.shape
    # All experts of a token read the same, unless a caller's hook comes in between.
    if inputs.ndim == 3 and site.matrix in READING_MATRICES and inputs.eq(inputs[:, :1]).all():
        inputs = inputs[:, 0].contiguous()  # a view would hold on to the copies
    experts = chosen.reshape(*rows, chosen.shape[-1]).to(batch.mask.device)
    return MatrixGradient(
        matrix=site.matrix,
        layer=site.layer,
        inputs=clean_rows(inputs.reshape(*rows, *inputs.shape[1:]), batch),
        vjps=clean_rows(vjps.reshape(*rows, *vjps.shape[1:]), batch),
        mask=batch.mask,
        experts=experts.masked_fill(~batch.mask[..., None], -1),
        n_experts=site.n_experts,
    )
