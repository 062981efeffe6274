"""What a vector that is added inside the model changes at its end, to first order.

Let `v` be added to the output of a matrix at position `i` of a prompt. The last residual stream and
the logits at a position `j >= i` then change by `J v` and an error of order `||v||^2`, where `J` is
the Jacobian of this prompt's own forward pass from the one place to the other: the norm after the
matrix if there is one, all later layers, and attention from `j` to `i`.

Forward-mode differentiation computes `J v` without `J`, exactly up to rounding. Every row of a
batch is a copy of a prompt with a vector of its own, so a vector costs about as much as three
forward passes of its prompt. Operators without a forward-mode formula are differentiated backwards
twice: `J^T u` is linear in `u`, and the VJP of this function of `u` with `v` is `J v`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from backward_lens_tl.capture.batching import microbatch_size, plan_microbatches
from backward_lens_tl.capture.forward import selected_logits
from backward_lens_tl.capture.interventions import adding_at, requiring_grad
from backward_lens_tl.capture.memory import Memory, is_lack_of_memory
from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.errors import ModelStateError, UnsupportedModelError
from backward_lens_tl.models import Host
from backward_lens_tl.models.hooks import hooked
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import HookPointSite, MatrixSite

_Outputs = tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_vocab"]]
_Run = Callable[[Float[Tensor, "row d_model"]], _Outputs]
_Mode = Callable[[_Run, Float[Tensor, "row d_model"]], tuple[_Outputs, _Outputs]]
_Pass = list[tuple[int, int | None]]
"""The rows of a forward pass: a prompt, and which vector is added to it, if any."""

_BLOCKS = 2
_GRAPHS = 1.25
"""Memory of a forward pass with tangents, and of a double backward pass, as measured: in units of
what autograd keeps of one block, and of all blocks."""

_TOLERANCE = 1e-4
_ROUNDINGS = 16
"""Errors of a product that may be rounding, relative to its factors and in `eps`."""

_NO_FORMULA = (
    "an operator in this forward pass has no formula for forward-mode differentiation and cannot "
    "be differentiated twice either; load the Hugging Face model with attn_implementation='eager', "
    "or remove hooks that use such an operator"
)


@dataclass(frozen=True, eq=False)
class AddedVector:
    """A vector that is added to the output of a matrix at one position of one prompt.

    Attributes:
        site: The matrix, one that writes to the residual stream.
        prompt: Index of the prompt in its batch.
        position: Where the vector is added.
        read_at: The position whose change is computed.
        vector: The vector. The changes are linear in it, so its length may be any.
    """

    site: MatrixSite
    prompt: int
    position: int
    read_at: int
    vector: Float[Tensor, "d_model"]


@dataclass(frozen=True, eq=False)
class FirstOrderChanges:
    """What some of the vectors change, at the position `read_at` of each.

    Attributes:
        indices: Which of the vectors.
        stream: `J v` at the last residual stream, before the final norm.
        logits: `J v` at the logits, after a softcap or scale.
        logits_before: The logits themselves.
    """

    indices: tuple[int, ...]
    stream: Float[Tensor, "row d_model"]
    logits: Float[Tensor, "row d_vocab"]
    logits_before: Float[Tensor, "row d_vocab"]


def first_order_changes(
    host: Host, batch: PromptBatch, added: Sequence[AddedVector], memory: Memory
) -> Iterator[FirstOrderChanges]:
    """Compute what vectors change at the end of the model.

    Hooks of the caller are active. They see the batch as it is, so there is one forward pass for
    the first vector of every prompt, one for the second, and so on; without them, vectors of
    different matrices and positions share a pass.

    Args:
        host: The model.
        batch: The prompts.
        added: The vectors, in any order.
        memory: The caller's limits.

    Yields:
        The changes pass by pass, each vector's once, in at least float32.

    Raises:
        ModelStateError: If a change is not finite.
        UnsupportedModelError: If an operator cannot be differentiated in either way.
    """
    if not added:
        return
    # Vectors of late layers share passes, in which the early layers have no tangents to compute.
    by_layer = sorted(range(len(added)), key=lambda index: added[index].site.layer)
    yield from _changes(host, batch, added, by_layer, memory, _forward_mode)


def _changes(
    host: Host,
    batch: PromptBatch,
    added: Sequence[AddedVector],
    indices: Sequence[int],
    memory: Memory,
    mode: _Mode,
) -> Iterator[FirstOrderChanges]:
    passes = _passes(host, batch, added, indices, memory, mode)
    for number, rows in enumerate(passes):
        try:
            found = _pass_changes(host, batch, added, rows, mode)
        except NotImplementedError:  # torch's, for an operator without a forward-mode formula
            if mode is _double_backward:
                raise
            left = [index for later in passes[number:] for _, index in later if index is not None]
            yield from _changes(host, batch, added, left, memory, _double_backward)
            return
        yield found


def _passes(
    host: Host,
    batch: PromptBatch,
    added: Sequence[AddedVector],
    indices: Sequence[int],
    memory: Memory,
    mode: _Mode,
) -> list[_Pass]:
    """Divide the vectors into forward passes."""
    sites = [added[index].site for index in indices]
    size = microbatch_size(host, sites, 1, batch.mask.shape[1])
    blocks = _BLOCKS if mode is _forward_mode else ceil(_GRAPHS * host.n_layers)
    size = replace(size, n_blocks=blocks, factors={0: 0})
    in_one = bool(host.hooked_modules)
    prompts = range(len(batch.mask)) if in_one else [added[index].prompt for index in indices]
    lengths = batch.lengths[list(prompts)].tolist()
    parts = plan_microbatches(
        lengths,
        (0,),
        size,
        memory,
        in_one=in_one,
        by_prompt=True,
        groups=host.length_groups(lengths),
    )
    if not in_one:
        chosen = ([indices[own] for own in part.prompts] for part in parts)
        return [[(added[index].prompt, index) for index in part] for part in chosen]
    own = [[index for index in indices if added[index].prompt == prompt] for prompt in prompts]
    return [list(enumerate(each)) for each in zip_longest(*own)]


def _pass_changes(
    host: Host, batch: PromptBatch, added: Sequence[AddedVector], rows: _Pass, mode: _Mode
) -> FirstOrderChanges:
    """The changes of one forward pass."""
    device = batch.mask.device
    part = batch.part(torch.tensor([prompt for prompt, _ in rows], device=device))
    own = [None if index is None else added[index] for _, index in rows]
    with_vector = [each for each in own if each is not None]
    nothing = torch.zeros_like(with_vector[0].vector)
    vectors = torch.stack([nothing if each is None else each.vector for each in own])
    trained = [] if host.hooked_modules else host.trained()
    with requiring_grad((), among=trained), host.own_precision():
        before, changes = mode(
            lambda extra: _outputs(host, part, own, extra), at_least_float32(vectors).to(device)
        )
    kept = torch.tensor([each is not None for each in own], device=device)
    stream, logits, logits_before = (at_least_float32(each[kept]) for each in (*changes, before[1]))
    # A padded vocabulary may have logits of minus infinity, which do not change.
    logits = logits.masked_fill(~logits_before.isfinite(), 0)
    _check_finite(with_vector, stream, logits)
    indices = tuple(index for _, index in rows if index is not None)
    return FirstOrderChanges(indices, stream, logits, logits_before)


def _check_finite(
    added: Sequence[AddedVector],
    stream: Float[Tensor, "row d_model"],
    logits: Float[Tensor, "row d_vocab"],
) -> None:
    finite = stream.isfinite().all(1) & logits.isfinite().all(1)
    for each, is_finite in zip(added, finite.tolist(), strict=True):
        if not is_finite:
            raise ModelStateError(
                f"what a vector at {each.site.matrix} of layer {each.site.layer}, position "
                f"{each.position} of prompt {each.prompt}, changes in the logits is not finite; "
                "check the weights for NaN and infinities, and in half precision load the model in "
                "float32"
            )


def _outputs(
    host: Host,
    part: PromptBatch,
    own: Sequence[AddedVector | None],
    extra: Float[Tensor, "row d_model"],
) -> _Outputs:
    """Run the model with the vectors added, and read the last stream and the logits."""
    positions = [0 if each is None else each.position for each in own]
    read_at = [0 if each is None else each.read_at for each in own]

    def select(values: Float[Tensor, "row pos d"]) -> Float[Tensor, "row 1 d"]:
        at = torch.arange(len(values)), torch.tensor(read_at)
        return values[tuple(each.to(values.device) for each in at)][:, None]

    sites = {(each.site.matrix, each.site.layer): each.site for each in own if each is not None}
    final = HookPointSite("the last residual stream", host.unembedding.input, _as_it_is)
    streams: list[Tensor] = []
    with ExitStack() as hooks:
        for site in sites.values():
            is_here = torch.tensor([each is not None and each.site is site for each in own])
            here = extra * is_here.to(extra)[:, None]
            hooks.enter_context(adding_at(site.output, part, positions, _by_head(here, site)))
        hooks.enter_context(hooked(final.tap, streams.append))
        # Without a final norm, the stream is read where only a full forward pass comes by.
        points = [final] if host.unembedding.norm is None else []
        logits = selected_logits(host, part, select, points)[:, 0]
    stream = select(streams[0].reshape(*part.mask.shape, -1))[:, 0]
    return stream.to(logits.device), logits


def _by_head(
    vectors: Float[Tensor, "row d_model"], site: MatrixSite
) -> Float[Tensor, "row head_d_model"]:
    """Vectors added to the sum over heads, as added to the heads' own outputs."""
    heads = site.output_heads
    return vectors if heads is None else (vectors / heads).repeat(1, heads)


# --- two ways to differentiate ---------------------------------------------------------------


def _forward_mode(run: _Run, vectors: Float[Tensor, "row d_model"]) -> tuple[_Outputs, _Outputs]:
    """The outputs without the vectors, and the product of the Jacobian and the vectors."""
    with torch.no_grad(), forward_ad.dual_level():
        outputs = run(forward_ad.make_dual(torch.zeros_like(vectors), vectors))
        pairs = [forward_ad.unpack_dual(output) for output in outputs]
    (stream, of_stream), (logits, of_logits) = (
        # Without a tangent where a hook of the caller cuts the connection.
        (each.primal, torch.zeros_like(each.primal) if each.tangent is None else each.tangent)
        for each in pairs
    )
    return (stream, logits), (of_stream, of_logits)


def _double_backward(run: _Run, vectors: Float[Tensor, "row d_model"]) -> tuple[_Outputs, _Outputs]:
    """The same, by differentiating twice."""
    with torch.enable_grad():
        extra = torch.zeros_like(vectors, requires_grad=True)
        outputs = run(extra)
        # The VJP is linear in what it is computed from, so any numbers do, zeros too. These show
        # whether its derivative is right.
        upstream = [_uneven(output).requires_grad_() for output in outputs]
        [vjp] = torch.autograd.grad(
            outputs, extra, upstream, create_graph=True, allow_unused=True, materialize_grads=True
        )
        changes = [torch.zeros_like(output) for output in outputs]
        if vjp.requires_grad:  # not where a hook of the caller cuts the connection
            try:
                changes = list(torch.autograd.grad(vjp, upstream, vectors))
            except RuntimeError as error:
                if is_lack_of_memory(error):
                    raise
                raise UnsupportedModelError(_NO_FORMULA) from error
    _check_twice(vjp.detach(), vectors, upstream, changes)
    (stream, logits), (of_stream, of_logits) = (output.detach() for output in outputs), changes
    return (stream, logits), (of_stream, of_logits)


def _uneven(like: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Numbers from `1/e` to `e`, without the symmetries of a norm."""
    return torch.linspace(-1, 1, like.shape[-1]).exp().to(like).expand(like.shape).clone()


def _check_twice(
    vjp: Float[Tensor, "row d_model"],
    vectors: Float[Tensor, "row d_model"],
    upstream: Sequence[Tensor],
    changes: Sequence[Tensor],
) -> None:
    """Raise unless `u . (J v) = (J^T u) . v`: autograd may drop what it can differentiate once."""
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(upstream[0].dtype).eps)
    found = sum((u.detach() * change).sum(-1) for u, change in zip(upstream, changes, strict=True))
    room = tolerance * vjp.norm(dim=-1) * vectors.norm(dim=-1)
    if bool(((found - (vjp * vectors).sum(-1)).abs() > room).any()):
        raise UnsupportedModelError(_NO_FORMULA)


def _as_it_is(values: Tensor) -> Tensor:
    return values
