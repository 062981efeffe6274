"""Forward passes: activations, and logits where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models import Host
from backward_lens_tl.models.hooks import hooked
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import HookPointSite, MatrixSite


@dataclass(frozen=True)
class Activations:
    """What one forward pass computed.

    Activations are `[batch, pos, d]`, or what `keep` returned for that, in the order in which
    they were requested.

    Attributes:
        inputs: `x` of each matrix.
        outputs: `x @ W + b` of each matrix.
        points: Values at hook points.
        logits: Logits at the last position of each prompt.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    points: tuple[Tensor, ...]
    logits: Float[Tensor, "batch d_vocab"]


@torch.no_grad()
def forward_pass(
    host: Host,
    batch: PromptBatch,
    *,
    inputs: Sequence[MatrixSite] = (),
    outputs: Sequence[MatrixSite] = (),
    points: Sequence[HookPointSite] = (),
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Activations:
    """Run a model once and keep activations.

    Args:
        host: The model.
        batch: The prompts; activations at padding are arbitrary.
        inputs: Matrices whose inputs are kept, after every edit by the caller's hooks.
        outputs: Matrices whose outputs are kept, before any such edit.
        points: Hook points whose values are kept, after every edit.
        keep: What is kept of each activation `[batch, pos, d]`; by default a copy on the device
            of the prompts, because the model or a hook may write into the tensor later.

    Returns:
        The activations, in the model's own precision.

    Raises:
        UnsupportedModelError: If a matrix or hook point is not used exactly once.
    """
    shape = batch.mask.shape
    keep = keep or partial(Tensor.to, device=batch.mask.device, copy=True)
    kept: list[list[Tensor]] = []

    def keeping() -> Callable[[Tensor], None]:
        own: list[Tensor] = []
        kept.append(own)
        # Some MLPs run over all positions of all prompts as one list.
        return lambda values: own.append(keep(values.reshape(*shape, -1)))

    with ExitStack() as hooks, host.own_precision():
        for site in inputs:
            hooks.enter_context(hooked(site.input, keeping()))
        for site in outputs:
            hooks.enter_context(hooked(site.output, keeping(), before_others=True))
        for point in points:
            hooks.enter_context(hooked(point.tap, keeping()))
        logits = read_logits(host, batch, n_read=1, points=points)[:, -1]
    names = [f"{site.matrix} of layer {site.layer}" for site in (*inputs, *outputs)]
    for name, own in zip([*names, *(point.name for point in points)], kept, strict=True):
        if len(own) != 1:
            raise UnsupportedModelError(
                f"{name} was used {len(own)} times in the forward pass; activations are kept only "
                "where it is used exactly once"
            )
    found = [own[0] for own in kept]
    n_inputs, n_outputs = len(inputs), len(inputs) + len(outputs)
    return Activations(
        tuple(found[:n_inputs]),
        tuple(found[n_inputs:n_outputs]),
        tuple(found[n_outputs:]),
        logits,
    )


def read_logits(
    host: Host, batch: PromptBatch, n_read: int | None, points: Sequence[HookPointSite] = ()
) -> Float[Tensor, "batch read d_vocab"]:
    """Compute the logits at the last positions of each prompt, and no others if possible.

    Args:
        host: The model.
        batch: The prompts.
        n_read: The number of positions at each prompt's end; `None` for all positions.
        points: Hook points that must fire in this pass.

    Returns:
        The logits, in at least float32, on the device of the tokens.

    Raises:
        InputError: If the prompts may not share a pass.
    """
    select = _unchanged if n_read is None else partial(batch.ends, n=n_read)
    return selected_logits(host, batch, select, points)


def selected_logits(
    host: Host,
    batch: PromptBatch,
    select: Callable[[Tensor], Tensor],
    points: Sequence[HookPointSite] = (),
) -> Float[Tensor, "rows read d_vocab"]:
    """Compute the logits at chosen positions, and no others if possible.

    Args:
        host: The model.
        batch: The prompts.
        select: Maps a value per position, `[batch, pos, d]`, to the positions that are needed,
            `[rows, read, d]`.
        points: Hook points that must fire in this pass.

    Returns:
        The logits, in at least float32, on the device of the tokens.

    Raises:
        InputError: If the prompts may not share a pass.
    """
    if len(host.length_groups(batch.lengths.tolist())) > 1:
        raise InputError(
            "some prompts are longer than the model's original context and others are not; its "
            "rotary angles differ between the two, and all prompts of a forward pass share one. "
            "Pass them in separate calls"
        )
    if host.are_in_blocks([*host.hooked_modules, *(point.tap.module for point in points)]):
        logits = host.logits_of(batch.tokens, select)
    else:  # a hook at the unembedding, or near it, must see all positions
        logits = select(host.logits(batch.tokens))
    # On a model that is spread over devices the logits are on the last one.
    return at_least_float32(logits).to(batch.tokens.device)


def _unchanged(values: Tensor) -> Tensor:
    return values
