"""One forward and one backward pass that keep `x_i` and `delta_i` of every matrix asked for.

Only activations are differentiated: no weight gradient is computed and no `.grad` is written. The
cost is one forward pass and the activation half of one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from backward_lens_tl.captured import Coverage, GradientCapture
from backward_lens_tl.errors import ModelStateError, ObjectiveError, UnsupportedModelError
from backward_lens_tl.gradients import MatrixGradient
from backward_lens_tl.host import Host, host_of
from backward_lens_tl.objectives import LossFunction, Objective, as_objective, bind_to_prompts
from backward_lens_tl.prompts import PromptBatch, Prompts
from backward_lens_tl.recording import (
    HookPointRecorder,
    MatrixRecorders,
    PatternRecorder,
    Recorder,
    VjpRecorder,
    at_least_float32,
    clean_rows,
    recorder_of,
    recording,
    requiring_grad,
)
from backward_lens_tl.selection import select_hook_points, select_layers, select_matrices
from backward_lens_tl.sites import ATTENTION_MATRICES, HookPointSite, Site


def capture_gradients(
    model: nn.Module,
    prompts: Prompts,
    objective: Objective | LossFunction,
    *,
    matrices: str | Sequence[str] = ("W_in", "W_out"),
    layers: int | Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    hook_points: str | Sequence[str] | Callable[[str], bool] | None = None,
) -> GradientCapture:
    """Capture the gradients of weight matrices as factors.

    Works on frozen models and under `torch.no_grad()`. Hooks that the caller has on the model act
    on this run: under an activation patch, the gradients are those of the patched model.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        prompts: A text, several of any lengths, or token ids `[batch, pos]`.
        objective: What is differentiated, for example `target_nll(" Paris")`.
        matrices: Names among `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`, `W_out`, or the groups
            `"attn"`, `"mlp"`, `"all"`.
        layers: Layers, negative ones from the end; `None` for all.
        prepend_bos: Whether texts get a BOS token; `None` is the model's own default.
        hook_points: TransformerLens's hook points whose activations and gradients are kept as
            well: a name, several, or a function of the name, as in `run_with_cache`.

    Returns:
        The captured gradients, in float32, or in float64 if the model computes in it; a caller's
        autocast does not act on them.

    Example:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> capture = blt.capture_gradients(model, "Obama grew up in", blt.target_nll(" Paris"))
        >>> gradient = capture["W_out", 3]
        >>> gradient.inputs.shape, gradient.vjps.shape
        (torch.Size([1, 6, 512]), torch.Size([1, 6, 128]))
        >>> gradient.rank(), capture["W_out", 7].rank()
        (6, 1)
    """
    host = host_of(model)
    objective = as_objective(objective)
    names, chosen = select_matrices(matrices, host), select_layers(layers, host)
    sites = [site for layer in chosen for site in host.sites(layer, names)]
    _check_sharing(host, sites)
    run = _Run(host, sites, select_hook_points(hook_points, host))
    bound, batch = bind_to_prompts(objective, host, prompts, prepend_bos)

    with (
        torch.enable_grad(),
        host.own_precision(),
        requiring_grad([weight for site in sites for weight in site.weights]),
        recording(run.recorders),
    ):
        # On a model that is spread over devices the logits come out on the last one.
        logits = at_least_float32(host.logits(batch.tokens)).to(batch.tokens.device)
        losses = bound.losses(logits, batch)
        _check_finite(losses)
        _check_uses(logits, run.matrices)
        # As in run_with_cache, a function of the name may name hook points that never fire.
        run.forget_unseen(points=callable(hook_points))
        run.check_points()
        found = _vjps(losses, logits, run.recorders)

    gradients = [run.gradient(recorder, found, batch) for recorder in run.matrices]
    for gradient in gradients:
        _check_factors(gradient)
    return GradientCapture(
        gradients={(gradient.matrix, gradient.layer): gradient for gradient in gradients},
        tokens=batch.tokens,
        mask=batch.mask,
        str_tokens=tuple(
            host.vocabulary.texts(row[real].tolist())
            for row, real in zip(batch.tokens, batch.mask, strict=True)
        ),
        loss=losses.detach(),
        targets=bound.targets(logits.detach(), batch),
        objective=objective.name,
        model_name=host.name,
        coverage=_coverage(host, sites),
        hook_points={point.site.name: point.gradient(found[point], batch) for point in run.points},
        attention={
            layer: pattern.gradient(found[pattern], batch, host.d_head)
            for layer, pattern in run.patterns.items()
        },
    )


class _Run:
    """Everything that is recorded in one forward and backward pass.

    Args:
        host: The model.
        sites: The matrices asked for.
        points: The hook points asked for.
    """

    def __init__(self, host: Host, sites: Sequence[Site], points: Sequence[HookPointSite]) -> None:
        self.matrices = [recorder_of(site) for site in sites]
        self.points = [HookPointRecorder(point) for point in points]
        self.joins = {
            (site.matrix, site.layer): VjpRecorder(site.joins)
            for site in sites
            if site.joins is not None
        }
        layers = dict.fromkeys(site.layer for site in sites if site.matrix in ATTENTION_MATRICES)
        self.patterns = {layer: PatternRecorder(host.pattern(layer)) for layer in layers}

    @property
    def recorders(self) -> list[Recorder]:
        """All of them."""
        return [*self.matrices, *self.points, *self.joins.values(), *self.patterns.values()]

    def forget_unseen(self, *, points: bool) -> None:
        """Drop what never passed: what the model keeps to itself, and hook points.

        Args:
            points: Whether hook points may be dropped as well.
        """
        self.patterns = {layer: kept for layer, kept in self.patterns.items() if kept.n_seen == 1}
        self.joins = {key: join for key, join in self.joins.items() if join.n_seen == 1}
        if points:
            self.points = [point for point in self.points if point.n_seen == 1]

    def check_points(self) -> None:
        """Refuse hook points whose gradient cannot be had.

        Raises:
            UnsupportedModelError: If one did not pass exactly once, as a part of the graph.
        """
        for point in self.points:
            if point.n_seen != 1:
                raise UnsupportedModelError(
                    f"hook point {point.site.name!r} fired {point.n_seen} times with a gradient in "
                    "this run, and is kept only where it fires once (some show indices or a copy, "
                    "which have none)"
                )

    def gradient(
        self,
        recorder: MatrixRecorders,
        found: Mapping[Recorder, Sequence[Tensor | None]],
        batch: PromptBatch,
    ) -> MatrixGradient:
        """One matrix's factors, with the VJPs where it joins the residual stream."""
        factors = recorder.gradient(found[recorder], batch)
        join = self.joins.get((factors.matrix, factors.layer))
        if join is None:
            return factors
        joined = clean_rows(join.vjp(found[join], batch).reshape(*batch.mask.shape, -1), batch)
        same = joined.shape == factors.vjps.shape and bool(torch.equal(joined, factors.vjps))
        return factors if same else replace(factors, joined_vjps=joined)


def _check_sharing(host: Host, sites: Sequence[Site]) -> None:
    """Refuse a weight that several modules hold, whose gradient is the sum over all of them."""
    for site in sites:
        for weight in site.weights:
            holders = host.holders(weight)
            if len(holders) > 1:
                raise UnsupportedModelError(
                    f"{site.matrix} of layer {site.layer} is one weight with {len(holders)} "
                    f"uses ({', '.join(holders)}), and its gradient is the sum over them; untie "
                    "it (give each module a copy) to see its parts"
                )


def _check_uses(logits: Tensor, recorders: Sequence[MatrixRecorders]) -> None:
    """Refuse a weight that the model also uses past its own place, unseen by our hooks.

    Raises:
        ModelStateError: If there is such a use.
    """
    uses = _uses(logits)
    for recorder in recorders:
        others = recorder.other_uses(uses)
        if others > 0:
            raise ModelStateError(
                f"{recorder.site.matrix} of layer {recorder.site.layer} was used {others + 1} "
                f"times in the forward pass, {others} of them past its own place, where nothing "
                "can be captured; its gradient would be incomplete"
            )


def _uses(logits: Tensor) -> dict[Tensor, int]:
    """How often every leaf of the autograd graph enters it."""
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


def _check_factors(gradient: MatrixGradient) -> None:
    for name, factor in (("input", gradient.inputs), ("VJP", gradient.vjps)):
        finite = factor.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ModelStateError(
                f"the {name} of {gradient.matrix} in layer {gradient.layer} is not finite in "
                f"prompt {int(finite.int().argmin())}; check the weights and the objective for NaN "
                "and infinities, and in half precision load the model in float32"
            )


def _coverage(host: Host, sites: Sequence[Site]) -> Coverage:
    covered = {id(tensor) for site in sites for tensor in (*site.weights, *site.biases)}
    named = host.parameters()
    processed = host.processed_matrices
    captured = dict.fromkeys(site.matrix for site in sites)
    return Coverage(
        covered=tuple(name for name, parameter in named.items() if id(parameter) in covered),
        not_covered=tuple(
            name for name, parameter in named.items() if id(parameter) not in covered
        ),
        parameters="processed" if processed else "raw",
        differing=tuple(matrix for matrix in captured if matrix in processed),
    )


def _check_finite(losses: Float[Tensor, "batch"]) -> None:
    for prompt, loss in enumerate(losses.tolist()):
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
    """`delta` at every edge; prompts do not see each other, so the sum of their losses has it."""
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
