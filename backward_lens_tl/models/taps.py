"""Hooks that see the tensors at a tap, and may replace them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from backward_lens_tl.models.sites import Tap


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
