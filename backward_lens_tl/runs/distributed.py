"""The processes of one launch, as Accelerate sees them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch

from backward_lens_tl.errors import InputError, one_line

if TYPE_CHECKING:
    from accelerate import PartialState

_LONGEST_WAIT = timedelta(days=30)

_Result = TypeVar("_Result")


def this_process() -> PartialState:
    """Return Accelerate's state of this process, which knows the others of its launch."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # By default, Accelerate sees several processes only where each has an accelerator.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Processes wait for each other at the end, and their shards may take days.
    return PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)


def own_device(state: PartialState) -> str | None:
    """Return the accelerator of this process, such as `"cuda:1"`.

    Args:
        state: This process.

    Returns:
        The device; `None` leaves the choice to `load_model`, where there is no accelerator, or it
        is Apple's, which TransformerLens itself decides whether to use.
    """
    return None if state.device.type in ("cpu", "mps") else str(state.device)


def in_turn(action: Callable[[], _Result], error: type[InputError]) -> _Result:
    """Call a function in the first process of the launch, and then in the others.

    Args:
        action: A function that writes files which the others read.
        error: The error to raise in the others.

    Returns:
        What it returns in this process.

    Raises:
        InputError: In the other processes, if it failed in the first one.
    """
    from accelerate.utils import broadcast_object_list

    # Not Accelerate's `main_process_first`: if the first process failed, the others would wait.
    if this_process().is_main_process:
        try:
            result = action()
        except Exception as failed:
            broadcast_object_list([one_line(failed)])
            raise
        broadcast_object_list([None])
        return result
    (failure,) = broadcast_object_list([None])
    if failure is not None:
        raise error(f"the first process failed: {failure}")
    return action()
