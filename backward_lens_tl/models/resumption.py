"""Forward passes of some blocks only: from a block on, or up to one.

Neither class of model can start at a block in all versions: a `TransformerBridge` leaves the loop
over blocks to Hugging Face. So the other blocks do not compute anything: each returns what another
block returned, in whatever form the model's loop expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from backward_lens_tl.models.host import Host
from backward_lens_tl.models.probing import logit_error, probe_tokens

_ROUNDINGS = 1e3
"""Largest error of a pass that starts at a block, in `eps` of the logits' dtype."""

_MOST_ERROR = 0.05
"""The same in half precision, relative to the spread of the logits."""

_FAITHFUL: WeakKeyDictionary[nn.Module, tuple[object, dict[int, bool]]] = WeakKeyDictionary()
"""What was found for each layer, and the state of the model then."""


@contextmanager
def keeping_start(host: Host, layer: int) -> Iterator[list[object]]:
    """Keep what the block before a layer returns, for `started_at`.

    Args:
        host: The model.
        layer: The layer that later passes start at, from 1.

    Yields:
        A list that gets the value in the forward pass inside the context.
    """
    kept: list[object] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        kept.append(_copied(output))

    handle = host.model.blocks[layer - 1].register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def started_at(host: Host, layer: int, start: object) -> Iterator[None]:
    """Start forward passes at a layer.

    Args:
        host: The model.
        layer: The layer, from 1.
        start: What `keeping_start` kept in a pass over the same tokens.

    Yields:
        Nothing; inside the context, the blocks before the layer do not run.
    """

    def returning(*args: object, **kwargs: object) -> object:
        return _copied(start)  # later blocks may write into it

    with ExitStack() as as_before:
        for block in host.model.blocks[:layer]:
            as_before.enter_context(_calling(block, returning))
        yield


class RepeatedPasses:
    """Forward passes over the same tokens: the first of all blocks, later ones from a layer on.

    They are all whole where the model does not allow it (`can_start_at`).

    Args:
        host: The model.
        layer: The layer, from 0, below which the passes do not differ.
    """

    def __init__(self, host: Host, layer: int) -> None:
        self._host, self._layer = host, layer
        self._is_resumed = can_start_at(host, layer)
        self._start: list[object] = []

    @contextmanager
    def next(self) -> Iterator[None]:
        """The context of the next pass; what it computes below the layer gets no gradients."""
        if not self._is_resumed:
            yield
        elif self._start:
            with started_at(self._host, self._layer, self._start[0]):
                yield
        else:
            with keeping_start(self._host, self._layer) as self._start:
                yield


@contextmanager
def stopped_after(host: Host, layer: int) -> Iterator[None]:
    """Run no block after a layer; the logits of such a pass have no meaning.

    With hooks of the caller on the model, all blocks run.

    Args:
        host: The model.
        layer: The last layer that is needed.

    Yields:
        Nothing.
    """
    blocks = host.model.blocks
    if host.hooked_modules or layer == len(blocks) - 1:
        yield
        return
    returned: list[object] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        returned[:] = [output]

    def returning(*args: object, **kwargs: object) -> object:
        return returned[0]

    with ExitStack() as as_before:
        as_before.callback(blocks[layer].register_forward_hook(keep).remove)
        for block in blocks[layer + 1 :]:
            as_before.enter_context(_calling(block, returning))
        yield


@torch.no_grad()
def can_start_at(host: Host, layer: int) -> bool:
    """Whether a pass that starts at a layer computes the model's own logits.

    It does not where later blocks use more of an earlier one than its output, such as its keys and
    values, or where hooks of the caller have to see every pass. Checked on the model once per
    layer, with a few tokens.

    Args:
        host: The model.
        layer: The layer, from 0.

    Returns:
        Whether it does; false for the first layer, where there is nothing to leave out.
    """
    if host.hooked_modules or layer == 0:
        return False
    # Users may cast the model, or replace what its blocks compute.
    forwards = [vars(block).get("forward") for block in host.model.blocks]
    dtype = next(host.model.parameters()).dtype
    state = [host.attention_implementation, dtype, *forwards]
    if host.model not in _FAITHFUL or _FAITHFUL[host.model][0] != state:
        _FAITHFUL[host.model] = state, {}
    known = _FAITHFUL[host.model][1]
    if layer not in known:
        known[layer] = _is_faithful(host, layer)
    return known[layer]


def _is_faithful(host: Host, layer: int) -> bool:
    tokens = probe_tokens(host.d_vocab, host.n_ctx, host.vocabulary.special_ids).to(host.device)
    with host.own_precision():
        with keeping_start(host, layer) as kept:
            whole = host.logits(tokens)
        if len(kept) != 1:
            return False
        with started_at(host, layer, kept[0]):
            partial = host.logits(tokens)
    error = logit_error(partial.flatten(0, 1), whole.flatten(0, 1))
    return error <= min(_MOST_ERROR, _ROUNDINGS * torch.finfo(whole.dtype).eps)


@contextmanager
def _calling(module: nn.Module, function: Callable[..., object]) -> Iterator[None]:
    """Replace what a module computes; its hooks still run."""
    before = vars(module).get("forward")
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _copied(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(_copied(each) for each in value)
    return value
