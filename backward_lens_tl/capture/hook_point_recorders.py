"""Recorders of activations and their gradients at hook points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backward_lens_tl.capture.hook_points import AttentionGradient, HookPointGradient
from backward_lens_tl.capture.kept import Copies, Edges, Values
from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.capture.recorders import Hook, Recorder
from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import HookPointSite


class VjpRecorder(Recorder):
    """The gradient at one hook point.

    Args:
        site: The hook point.
    """

    def __init__(self, site: HookPointSite) -> None:
        self.site = site
        self._name = f"hook point {site.name}"
        self._edge = Edges(self._name)

    def hooks(self) -> Iterator[Hook]:
        """After the caller's hooks, as the rest of the model sees the activation."""
        yield self.site.tap, self._keep, False

    def _keep(self, tensor: Tensor) -> Tensor | None:
        # Some hook points show indices of experts; some norms show a copy outside the graph.
        if not tensor.is_floating_point() or not torch.is_grad_enabled():
            return None
        # The tensor may be used elsewhere too, as the residual stream is. A separate node has the
        # gradient through this hook point alone, which is that of a patch here.
        own = tensor.clone()
        replaced = self._edge.keep(own)
        return own if replaced is None else replaced

    @property
    def n_seen(self) -> int:
        """How often the hook point fired with a tensor that has a gradient."""
        return len(self._edge.seen)

    @property
    def edges(self) -> list[GradientEdge]:
        """The edge at the hook point."""
        return [self._edge.edge]

    def vjp(self, found: Sequence[Tensor | None], batch: PromptBatch) -> Tensor:
        """The gradient, in the layout that a hook sees.

        Args:
            found: The gradients that autograd returned for `edges`.
            batch: The prompts.

        Returns:
            The gradient.
        """
        return self._as_hooked(self._edge.vjp(found[0]), batch)

    def _as_hooked(self, tensor: Tensor, batch: PromptBatch) -> Tensor:
        return at_least_float32(self.site.as_hooked(tensor)).to(batch.mask.device)


class HookPointRecorder(VjpRecorder):
    """The activation at one hook point, and its gradient.

    Args:
        site: The hook point.

    Raises:
        UnsupportedModelError: If the model does not use what hooks return there.
    """

    def __init__(self, site: HookPointSite) -> None:
        super().__init__(site)
        self._value = Values(self._name, Copies(shared=False))
        if not site.is_replaceable:
            raise UnsupportedModelError(
                f"hook point {site.name!r} of this architecture shows a copy of the pattern that "
                "the model does not use; pass matrices='attn' and use reversed_attention"
            )

    def _keep(self, tensor: Tensor) -> Tensor | None:
        self._value.keep(tensor)
        return super()._keep(tensor)

    def gradient(self, found: Sequence[Tensor | None], batch: PromptBatch) -> HookPointGradient:
        """The activation and its gradient.

        Args:
            found: The gradients that autograd returned for `edges`.
            batch: The prompts.

        Returns:
            Both.
        """
        value = self._as_hooked(self._value.only, batch)
        return HookPointGradient(self.site.name, value, self.vjp(found, batch))


class PatternRecorder(VjpRecorder):
    """The attention pattern of one layer, and its gradient.

    Args:
        site: Where it is.
    """

    def __init__(self, site: HookPointSite) -> None:
        super().__init__(site)
        self._pattern = Values(self._name)

    def hooks(self) -> Iterator[Hook]:
        """Before the caller's hooks: the output of the softmax."""
        yield self.site.tap, self._keep, True

    def _keep(self, tensor: Tensor) -> Tensor | None:
        self._pattern.keep(tensor)
        if self.site.is_replaceable:
            return super()._keep(tensor)
        # A pattern that cannot be replaced has to be in the graph already.
        return self._edge.keep(tensor) if tensor.requires_grad else None

    def gradient(
        self, found: Sequence[Tensor | None], batch: PromptBatch, d_head: int
    ) -> AttentionGradient:
        """Differentiate the softmax.

        Args:
            found: The gradients that autograd returned for `edges`.
            batch: The prompts.
            d_head: Width of a head.

        Returns:
            The gradient at the scores.
        """
        pattern, at_pattern = self._as_hooked(self._pattern.only, batch), self.vjp(found, batch)
        weighted = pattern * at_pattern
        at_scores = weighted - pattern * weighted.sum(-1, keepdim=True)
        return AttentionGradient(at_scores, d_head, self.site.is_replaceable)
