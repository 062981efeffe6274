"""One forward and one backward pass that keep `x_i` and `delta_i` of some matrices.

Only activations are differentiated: no weight gradient is computed, no `.grad` is written, and
autograd keeps nothing for layers below the first one requested. The cost is one forward pass and
the activation half of one backward pass; logits are computed only where the objective reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from backward_lens_tl.capture.bound_objectives import BoundObjective
from backward_lens_tl.capture.forward import read_logits
from backward_lens_tl.capture.hook_point_recorders import (
    HookPointRecorder,
    PatternRecorder,
    VjpRecorder,
)
from backward_lens_tl.capture.hook_points import AttentionGradient, HookPointGradient
from backward_lens_tl.capture.interventions import requiring_grad
from backward_lens_tl.capture.kept import Copies, clean_rows
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.predictions import Predictions
from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.capture.recorders import (
    MatrixRecorders,
    Recorder,
    recorder_of,
    recording,
)
from backward_lens_tl.errors import ModelStateError, ObjectiveError, UnsupportedModelError
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_sites
from backward_lens_tl.models.sites import ATTENTION_MATRICES, HookPointSite, Site


@dataclass(frozen=True)
class Recorded:
    """The results of one forward and backward pass, for its own prompts and layers.

    Attributes:
        gradients: By matrix and layer, in model order.
        loss: Loss of each prompt.
        targets: The token that each position is compared with, if the objective has any.
        predictions: What the model predicts after each prompt.
        hook_gradients: Activations and gradients at hook points, by name.
        attention: The backward pass through attention patterns, by layer.
    """

    gradients: Mapping[tuple[str, int], MatrixGradient]
    loss: Float[Tensor, "batch"]
    targets: Int[Tensor, "batch pos"] | None
    predictions: Predictions
    hook_gradients: Mapping[str, HookPointGradient]
    attention: Mapping[int, AttentionGradient]


def record(
    host: Host,
    batch: PromptBatch,
    objective: BoundObjective,
    sites: Sequence[Site],
    points: Sequence[HookPointSite] = (),
    *,
    may_skip_points: bool = False,
) -> Recorded:
    """Run the model forwards and backwards once.

    Args:
        host: The model.
        batch: The prompts.
        objective: What is differentiated.
        sites: The matrices.
        points: Hook points whose activations and gradients are kept too.
        may_skip_points: Whether hook points that never fire are skipped instead of an error.

    Returns:
        Factors and losses.

    Raises:
        ModelStateError: If a weight is used a second time, or values are not finite.
        ObjectiveError: If a loss is not finite, or does not depend on the logits.
    """
    run = _Run(host, sites, points)
    # Without gradients of parameters the graph begins at the lowest matrix requested. The caller's
    # own code (hooks and objectives) has to see the model unchanged.
    is_alone = objective.looks_at == "prompt" and not host.hooked_modules
    frozen = host.trained() if is_alone else []
    with (
        torch.enable_grad(),
        host.own_precision(),
        requiring_grad(run.tracked_weights, among=frozen),
        recording(run.recorders),
    ):
        logits = read_logits(host, batch, objective.n_read(batch), points)
        losses = objective.losses(logits, batch)
        _check_finite(losses, batch)
        _check_uses(logits, run.matrices)
        run.drop_unseen(points=may_skip_points)
        found = _vjps(losses, logits, run.recorders)
    predictions = objective.predictions(logits.detach(), batch)
    return Recorded(
        gradients=run.gradients(found, batch),
        loss=losses.detach(),
        targets=objective.targets(predictions.answers, batch),
        predictions=predictions,
        hook_gradients={
            point.site.name: point.gradient(found[point], batch) for point in run.points
        },
        attention={
            layer: pattern.gradient(found[pattern], batch, host.d_head)
            for layer, pattern in run.patterns.items()
        },
    )


class _Run:
    """All recorders of one forward and backward pass."""

    def __init__(self, host: Host, sites: Sequence[Site], points: Sequence[HookPointSite]) -> None:
        copies = Copies(shared=not host.hooked_modules)
        self.matrices = [recorder_of(site, copies) for site in sites]
        self.points = [HookPointRecorder(point) for point in points]
        self.joins = {
            (site.matrix, site.layer): VjpRecorder(site.joins)
            for site in sites
            if site.joins is not None
        }
        layers = dict.fromkeys(site.layer for site in sites if site.matrix in ATTENTION_MATRICES)
        self.patterns = {layer: PatternRecorder(host.pattern(layer)) for layer in layers}
        self.tracked_weights = [weight for site in sites for weight in site.weights]
        for layer, pattern in self.patterns.items():
            if not pattern.site.is_replaceable:
                # Such a pattern has to be in the graph already.
                self.tracked_weights += find_sites(host, "W_Q", layer)[0].weights

    @property
    def recorders(self) -> list[Recorder]:
        """All of them."""
        return [*self.matrices, *self.points, *self.joins.values(), *self.patterns.values()]

    def drop_unseen(self, *, points: bool) -> None:
        """Drop patterns and joins that the model does not expose and, if allowed, hook points.

        Raises:
            UnsupportedModelError: If a hook point that is left did not fire exactly once.
        """
        self.patterns = {layer: kept for layer, kept in self.patterns.items() if kept.n_seen == 1}
        self.joins = {key: join for key, join in self.joins.items() if join.n_seen == 1}
        if points:
            self.points = [point for point in self.points if point.n_seen == 1]
        for point in self.points:
            if point.n_seen != 1:
                raise UnsupportedModelError(
                    f"hook point {point.site.name!r} fired {point.n_seen} times with a gradient in "
                    "this run, but is kept only if it fires once (some show indices or a copy, "
                    "which have none)"
                )

    def gradients(
        self, found: Mapping[Recorder, Sequence[Tensor | None]], batch: PromptBatch
    ) -> dict[tuple[str, int], MatrixGradient]:
        """The gradient of every matrix."""
        gradients: dict[tuple[str, int], MatrixGradient] = {}
        for recorder in self.matrices:
            key = (recorder.site.matrix, recorder.site.layer)
            gradient = recorder.gradient(found[recorder], batch)
            join = self.joins.get(key)
            if join is not None:
                gradient = _joined(gradient, join.vjp(found[join], batch), batch)
            _check_factors(gradient, batch)
            before = (other for other in gradients.values() if other.layer == gradient.layer)
            gradients[key] = _sharing_inputs(gradient, before)
        return gradients


def _joined(gradient: MatrixGradient, vjps: Tensor, batch: PromptBatch) -> MatrixGradient:
    """The gradient with the VJPs at the residual stream, if these differ from `vjps`."""
    joined = clean_rows(vjps.reshape(*batch.mask.shape, -1), batch)
    same = joined.shape == gradient.vjps.shape and bool(torch.equal(joined, gradient.vjps))
    return gradient if same else replace(gradient, joined_vjps=joined)


def _sharing_inputs(gradient: MatrixGradient, others: Iterable[MatrixGradient]) -> MatrixGradient:
    """The gradient sharing its inputs with another matrix that reads the same values."""
    for other in others if gradient.reads_residual else ():
        inputs = other.inputs
        if inputs.shape == gradient.inputs.shape and bool(torch.equal(inputs, gradient.inputs)):
            return replace(gradient, inputs=inputs)
    return gradient


def _check_uses(logits: Tensor, recorders: Sequence[MatrixRecorders]) -> None:
    """Raise if the model uses a weight somewhere else too, where no hook records it."""
    uses = _uses(logits)
    for recorder in recorders:
        others = recorder.other_uses(uses)
        if others > 0:
            raise ModelStateError(
                f"{recorder.site.matrix} of layer {recorder.site.layer} was used {others + 1} "
                f"times in the forward pass, {others} of them where nothing can be captured, so "
                "its gradient would be incomplete; remove the hook or module that uses it again"
            )


def _uses(logits: Tensor) -> dict[Tensor, int]:
    """How often each leaf enters the autograd graph."""
    uses: dict[Tensor, int] = {}
    seen, waiting = set(), [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for parent, _ in node.next_functions:
            if (leaf := getattr(parent, "variable", None)) is not None:
                uses[leaf] = uses.get(leaf, 0) + 1
            waiting.append(parent)
    return uses


def _check_factors(gradient: MatrixGradient, batch: PromptBatch) -> None:
    for name, factor in (("input", gradient.inputs), ("VJP", gradient.vjps)):
        finite = factor.isfinite().flatten(1).all(1)
        if not finite.all():
            prompt = int(batch.prompts[finite.int().argmin()])
            raise ModelStateError(
                f"the {name} of {gradient.matrix} in layer {gradient.layer} is not finite in "
                f"prompt {prompt}; check the weights and the objective for NaN and infinities, and "
                "in half precision load the model in float32"
            )


def _check_finite(losses: Float[Tensor, "batch"], batch: PromptBatch) -> None:
    for prompt, loss in zip(batch.prompts.tolist(), losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise ObjectiveError(
                f"the loss of prompt {prompt} is {loss}; check the objective and the model's "
                "weights for NaN and infinities, and in half precision load the model in float32"
            )


def _vjps(
    losses: Float[Tensor, "batch"],
    logits: Float[Tensor, "batch pos d_vocab"],
    recorders: Sequence[Recorder],
) -> dict[Recorder, list[Tensor | None]]:
    """`delta` at every edge, from the summed loss: prompts do not depend on each other."""
    edges = [(recorder, recorder.edges) for recorder in recorders]
    flat = [edge for _, own in edges for edge in own]
    found: Sequence[Tensor | None] = [None] * len(flat)
    if logits.requires_grad:
        at_logits, *found = torch.autograd.grad(
            losses.sum(), [get_gradient_edge(logits), *flat], allow_unused=True
        )
        if at_logits is None:
            raise ObjectiveError(
                "the objective's losses do not depend on the logits; compute them from its first "
                "argument"
            )
    left = iter(found)
    return {recorder: list(islice(left, len(own))) for recorder, own in edges}
