"""Taps: places in the forward pass where hooks can be attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Tap:
    """A place in the forward pass: an input of a module, or its output.

    Attributes:
        module: The module.
        side: Input or output.
        argument: Which input, by position or keyword.
    """

    module: nn.Module
    side: Literal["input", "output"]
    argument: int | str = 0


@contextmanager
def hooked(
    tap: Tap, hook: Callable[[Tensor], Tensor | None], *, before_others: bool = False
) -> Iterator[None]:
    """Call a function with every tensor at a tap.

    Args:
        tap: Where.
        hook: Gets the tensor; returns its replacement, or `None` to keep it.
        before_others: Whether it runs before the hooks that are already there.

    Yields:
        Nothing; the hook exists inside the context.
    """

    def at_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(tap.argument, str):
            replaced = hook(kwargs[tap.argument])
            return None if replaced is None else (args, kwargs | {tap.argument: replaced})
        replaced = hook(args[tap.argument])
        if replaced is None:
            return None
        return (*args[: tap.argument], replaced, *args[tap.argument + 1 :]), kwargs

    def at_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return hook(output)

    if tap.side == "input":
        handle = tap.module.register_forward_pre_hook(
            at_input, prepend=before_others, with_kwargs=True
        )
    else:
        handle = tap.module.register_forward_hook(at_output, prepend=before_others)
    try:
        yield
    finally:
        handle.remove()
