"""Hooks that record the factors of a matrix's gradient during a forward pass.

A recorder keeps the inputs `x`, and only the place of the outputs `y` in the autograd graph. After
the backward pass it builds the gradient from both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backward_lens_tl.capture.experts import stacked_factors
from backward_lens_tl.capture.kept import Copies, Edges, Values, clean_rows
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.hooks import Tap, hooked
from backward_lens_tl.models.sites import (
    READING_MATRICES,
    ExpertsSite,
    MatrixSite,
    Site,
    StackedExpertsSite,
)

Hook = tuple[Tap, Callable[[Any], Tensor | None], bool]
"""A tap, the function to call there, and whether it runs before existing hooks."""


@runtime_checkable
class HasHooks(Protocol):
    """What `recording` registers: anything with hooks."""

    def hooks(self) -> Iterator[Hook]:
        """The hooks."""


class Recorder(ABC):
    """Records the tensors at one site during a forward pass."""

    @abstractmethod
    def hooks(self) -> Iterator[Hook]:
        """The hooks that the recorder needs."""

    @property
    @abstractmethod
    def edges(self) -> list[GradientEdge]:
        """Where to differentiate the loss; known after the forward pass."""

    def other_uses(self, uses: Mapping[Tensor, int]) -> int:
        """Number of uses of the weight that are not recorded, as far as they can be counted.

        Args:
            uses: How often every leaf enters the autograd graph.

        Returns:
            The number.
        """
        del uses
        return 0


class MatrixRecorder(Recorder):
    """One matrix, used once, between `x` and `y`.

    The weight requires gradients during the run, so that the autograd graph shows every other use
    of it, but not between these two hooks: there autograd would keep `x` for the weight's gradient,
    and a caller's hook that writes into `x` would raise.

    Args:
        site: Where it is.
        copies: Makes copies.
        name: For messages, if the site's own name is not enough.
    """

    def __init__(self, site: MatrixSite, copies: Copies, name: str = "") -> None:
        self.site = site
        name = name or f"{site.matrix} of layer {site.layer}"
        # Matrices that read the residual stream share their input, and a caller's hook on a later
        # one may write into it.
        self.x = Values(name, copies if site.matrix in READING_MATRICES else None)
        self.y = Edges(name)

    def hooks(self) -> Iterator[Hook]:
        """`x` after the caller's hooks, and `y` before them."""
        yield self.site.input, self._keep_input, False
        yield self.site.output, self._keep_output, True

    @property
    def edges(self) -> list[GradientEdge]:
        """The edge at `y`."""
        return [self.y.edge]

    def other_uses(self, uses: Mapping[Tensor, int]) -> int:
        """Uses of the weight elsewhere."""
        return uses.get(self.site.weight.parameter, 0)

    def _keep_input(self, tensor: Tensor) -> None:
        self.x.keep(tensor)
        self._require_grad(False)

    def _keep_output(self, tensor: Tensor) -> Tensor | None:
        self._require_grad(True)
        return self.y.keep(tensor)

    def _require_grad(self, wanted: bool) -> None:
        if self.site.weight.parameter.is_leaf:  # not if a parametrization computes it
            self.site.weight.parameter.requires_grad_(wanted)

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> MatrixGradient:
        """Build the gradient.

        Args:
            found: The gradients that autograd returned for `edges`.
            batch: The prompts.

        Returns:
            The gradient.
        """
        site, rows = self.site, batch.mask.shape
        x, y = self.x.only, self.y.vjp(found[0])
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
        self._experts = [
            MatrixRecorder(expert, copies, f"{name} {index}")
            for index, expert in enumerate(site.experts)
        ]
        self._chosen = Values(f"the routing of layer {site.layer}", copies)

    def hooks(self) -> Iterator[Hook]:
        """Every expert's input and output, and the routing."""
        for expert in self._experts:
            yield from expert.hooks()
        yield self.site.chosen, self._chosen.keep, False

    @property
    def edges(self) -> list[GradientEdge]:
        """The edges at `y` of the experts that were used."""
        return [expert.y.edge for expert in self._experts if expert.y.seen]

    def other_uses(self, uses: Mapping[Tensor, int]) -> int:
        """Uses of any expert's weight elsewhere."""
        return max(expert.other_uses(uses) for expert in self._experts)

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> MatrixGradient:
        """Build the gradient, slot by slot.

        Args:
            found: The gradients that autograd returned for `edges`.
            batch: The prompts.

        Returns:
            The gradient.

        Raises:
            UnsupportedModelError: If an expert saw tokens other than those routed to it.
        """
        chosen = self._chosen.only
        factors: list[Tensor | None] = [None, None]
        left = iter(found)
        for index, expert in enumerate(self._experts):
            if not expert.y.seen:
                continue
            # Every implementation processes an expert's tokens slot by slot.
            slots, tokens = torch.eq(chosen.T, index).nonzero(as_tuple=True)
            for side, rows in enumerate((expert.x.only, expert.y.vjp(next(left)))):
                if len(rows) != len(tokens):
                    raise UnsupportedModelError(
                        f"expert {index} of layer {self.site.layer} saw {len(rows)} tokens, but "
                        f"{len(tokens)} were routed there, so its tokens cannot be identified; "
                        "pass matrices='attn'"
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
        self._inputs, self._chosen, self._weights, self._outputs = (
            Values(name, copies) for _ in range(4)
        )
        self._y = Edges(name)

    def hooks(self) -> Iterator[Hook]:
        """Inputs, routing and output of the whole stack."""
        module = self.site.stack.module
        for position, kept in enumerate((self._inputs, self._chosen, self._weights)):
            yield Tap(module, "input", argument=position), kept.keep, False
        yield Tap(module, "output"), self._keep_output, True

    def _keep_output(self, tensor: Tensor) -> Tensor | None:
        self._outputs.keep(tensor)
        return self._y.keep(tensor)

    @property
    def edges(self) -> list[GradientEdge]:
        """The edge at the stack's output."""
        return [self._y.edge]

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> MatrixGradient:
        """Derive the experts' factors.

        Args:
            found: The gradients that autograd returned for `edges`.
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


MatrixRecorders = MatrixRecorder | ExpertsRecorder | StackedExpertsRecorder


def recorder_of(site: Site, copies: Copies) -> MatrixRecorders:
    """The recorder for a matrix.

    Args:
        site: Where the matrix is.
        copies: Makes copies; recorders of the same tensor share one.

    Returns:
        The recorder.
    """
    if isinstance(site, MatrixSite):
        return MatrixRecorder(site, copies)
    if isinstance(site, ExpertsSite):
        return ExpertsRecorder(site, copies)
    return StackedExpertsRecorder(site, copies)


@contextmanager
def recording(recorders: Sequence[HasHooks]) -> Iterator[None]:
    """Register the hooks of all recorders inside the context.

    Args:
        recorders: The recorders.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for recorder in recorders:
            for tap, hook, before_others in recorder.hooks():
                stack.enter_context(hooked(tap, hook, before_others=before_others))
        yield


def _check_rows(x: Float[Tensor, "*rows d"], site: MatrixSite, batch: PromptBatch) -> None:
    has_head_axis = site.input_heads is not None and x.ndim == 4
    n_vectors = x[..., 0, 0].numel() if has_head_axis else x[..., 0].numel()
    if n_vectors != batch.mask.numel():
        raise UnsupportedModelError(
            f"{site.matrix} of layer {site.layer} saw {n_vectors} vectors for "
            f"{batch.mask.numel()} tokens; only models with one vector per token are supported"
        )


def _by_slot(
    site: ExpertsSite | StackedExpertsSite,
    inputs: Float[Tensor, "tokens *slot d_in"],
    vjps: Float[Tensor, "tokens *slot_ d_out"],
    chosen: Int[Tensor, "tokens slot"],
    batch: PromptBatch,
) -> MatrixGradient:
    """A gradient whose factors are laid out by prompt, position and slot."""
    rows = batch.mask.shape
    # All experts of a token read the same vector, unless a caller's hook changes it.
    if inputs.ndim == 3 and site.matrix in READING_MATRICES and inputs.eq(inputs[:, :1]).all():
        inputs = inputs[:, 0].contiguous()  # a view would keep the copies in memory
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
