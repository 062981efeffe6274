"""One forward and one backward pass that keep `x_i` and `delta_i` of every matrix asked for.

Only activations are differentiated: no weight gradient is computed and no `.grad` is written. The
cost is one forward pass and the activation half of one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backward_lens_tl.errors import ModelStateError, ObjectiveError, UnsupportedModelError
from backward_lens_tl.gradients import GradientCapture, MatrixGradient
from backward_lens_tl.host import Host, host_of
from backward_lens_tl.objectives import LossFunction, Objective, as_objective, bind_to_prompts
from backward_lens_tl.prompts import PromptBatch, Prompts
from backward_lens_tl.selection import select_layers, select_matrices
from backward_lens_tl.sites import READING_MATRICES, MatrixSite, Tap

_T = TypeVar("_T")


def capture_gradients(
    model: nn.Module,
    prompts: Prompts,
    objective: Objective | LossFunction,
    *,
    matrices: str | Sequence[str] = ("W_in", "W_out"),
    layers: int | Sequence[int] | None = None,
    prepend_bos: bool | None = None,
) -> GradientCapture:
    """Capture the gradients of weight matrices as factors.

    Works on frozen models and under `torch.no_grad()`. Hooks that the caller has on the model act
    on this run: under an activation patch, the gradients are those of the patched model.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        prompts: A text, several of any lengths, or token ids `[batch, pos]`.
        objective: What is differentiated, for example `target_nll(" Paris")`.
        matrices: Names among `W_in`, `W_gate`, `W_out`, or `"mlp"`.
        layers: Layers, negative ones from the end; `None` for all.
        prepend_bos: Whether texts get a BOS token; `None` is the model's own default.

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
    names = select_matrices(matrices, host)
    sites = [host.site(name, layer) for layer in select_layers(layers, host) for name in names]
    _check_distinct(sites)
    bound, batch = bind_to_prompts(objective, host, prompts, prepend_bos)

    with torch.enable_grad(), in_own_precision(host), _recording(sites) as recorders:
        logits = at_least_float32(host.logits(batch.tokens))
        losses = bound.losses(logits, batch)
        _check_finite(losses)
        vjps = _vjps(losses, logits, recorders)
    gradients = [
        _gradient(recorder, vjp, batch) for recorder, vjp in zip(recorders, vjps, strict=True)
    ]
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
    )


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Widen half precision to float32; leave float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def in_own_precision(host: Host) -> torch.autocast:
    """Keep a caller's autocast from rounding what the model computes."""
    return torch.autocast(host.device.type, enabled=False)


def _gradient(recorder: _Recorder, vjp: Tensor, batch: PromptBatch) -> MatrixGradient:
    """The factors of one site, checked."""
    matrix, layer = recorder.site.matrix, recorder.site.layer
    factors = [_by_prompt(factor, batch) for factor in (recorder.x, vjp)]
    for name, factor in zip(("input", "VJP"), factors, strict=True):
        finite = factor.isfinite().all(-1).all(-1)
        if not finite.all():
            raise ModelStateError(
                f"the {name} of {matrix} in layer {layer} is not finite in prompt "
                f"{int(finite.int().argmin())}; check the weights and the objective for NaN and "
                "infinities, and in half precision load the model in float32"
            )
    return MatrixGradient(matrix, layer, factors[0], factors[1], batch.mask)


def _by_prompt(
    factor: Float[Tensor, "*rows d"], batch: PromptBatch
) -> Float[Tensor, "batch pos d"]:
    """Lay a factor out by prompt and position, with zeros at padding."""
    if factor[..., 0].numel() != batch.mask.numel():
        raise UnsupportedModelError(
            f"a matrix saw {factor[..., 0].numel()} vectors for {batch.mask.numel()} tokens; the "
            "lens needs one for each"
        )
    # Some MLPs, OPT's for one, run over all positions of all prompts as one list.
    factor = at_least_float32(factor).reshape(*batch.mask.shape, factor.shape[-1])
    return factor.masked_fill(~batch.mask[..., None], 0) if batch.is_padded else factor


def _check_distinct(sites: Sequence[MatrixSite]) -> None:
    """Refuse a weight that two sites share, whose gradient is the sum of both."""
    seen: dict[int, MatrixSite] = {}
    for site in sites:
        other = seen.setdefault(id(site.weight), site)
        if other is not site:
            raise UnsupportedModelError(
                f"{site.matrix} of layer {site.layer} and {other.matrix} of layer {other.layer} "
                "are one weight, whose gradient is the sum of both; ask for one of the two layers "
                "to see its part"
            )


class _Recorder:
    """What passes the taps of one site during a forward pass."""

    def __init__(self, site: MatrixSite) -> None:
        self.site = site
        self._inputs: list[Tensor] = []
        self._outputs: list[tuple[GradientEdge, Tensor]] = []

    def keep_input(self, tensor: Tensor) -> None:
        """Keep `x`."""
        kept = tensor.detach()
        # Matrices that read the residual stream share their input, and a caller's hook on one that
        # comes later may write into it.
        self._inputs.append(kept.clone() if self.site.matrix in READING_MATRICES else kept)

    def keep_output(self, tensor: Tensor) -> Tensor | None:
        """Keep the place of `y` in the graph, and start the graph here if it has not begun.

        Args:
            tensor: `y`.

        Returns:
            What takes the place of `y`, equal to it, or `None` if it can stay.
        """
        # On a frozen model nothing below the lowest matrix needs a gradient: begin with y.
        source = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        # The model or a caller's hook may write into y. The edge kept here is that of y before
        # then, but a view leaves its old node, and a leaf may not be written into: copy those.
        kept = source.clone() if source.is_leaf or source._is_view() else source
        # One number that stands for zeros of y's shape, so that y itself is not held in memory.
        zeros = kept.detach().new_zeros(()).expand(kept.shape)
        self._outputs.append((get_gradient_edge(kept), zeros))
        return None if kept is tensor else kept

    @property
    def x(self) -> Tensor:
        return self._only(self._inputs)

    @property
    def edge(self) -> GradientEdge:
        return self._only(self._outputs)[0]

    @property
    def zero_vjp(self) -> Tensor:
        """The VJP where the loss does not depend on `y`, as under a patch of all that follows."""
        return self._only(self._outputs)[1].clone()

    def _only(self, seen: list[_T]) -> _T:
        if len(seen) != 1:
            raise ModelStateError(
                f"{self.site.matrix} of layer {self.site.layer} was used {len(seen)} times in the "
                "forward pass, and a gradient is captured only where a matrix is used exactly once"
            )
        return seen[0]


@contextmanager
def _recording(sites: Sequence[MatrixSite]) -> Iterator[list[_Recorder]]:
    """Hooks on every site, taken off again whatever happens."""
    recorders = [_Recorder(site) for site in sites]
    with ExitStack() as hooks:
        for recorder in recorders:
            # x is what the caller's hooks made of it, so its hook comes after theirs; y is what
            # the matrix gave, before theirs.
            hooks.enter_context(hooked(recorder.site.input, recorder.keep_input))
            hooks.enter_context(
                hooked(recorder.site.output, recorder.keep_output, before_others=True)
            )
        yield recorders


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
    recorders: Sequence[_Recorder],
) -> list[Tensor]:
    """`delta` of every site; prompts do not see each other, so the sum of their losses has it."""
    edges = [recorder.edge for recorder in recorders]
    found: Sequence[Tensor | None] = [None] * len(edges)
    if logits.requires_grad:
        at_logits, *found = torch.autograd.grad(
            losses.sum(), [get_gradient_edge(logits), *edges], allow_unused=True
        )
        if at_logits is None:
            raise ObjectiveError(
                "the objective's losses do not depend on the logits; compute them from its first "
                "argument"
            )
    return [
        recorder.zero_vjp if vjp is None else vjp
        for recorder, vjp in zip(recorders, found, strict=True)
    ]


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
            partial(_see_input, see), prepend=before_others
        )
    else:
        handle = tap.module.register_forward_hook(partial(_see_output, see), prepend=before_others)
    try:
        yield
    finally:
        handle.remove()


def _see_input(
    see: Callable[[Tensor], Tensor | None], module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    replaced = see(args[0])
    return None if replaced is None else (replaced, *args[1:])


def _see_output(
    see: Callable[[Tensor], Tensor | None],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> Tensor | None:
    return see(output)
