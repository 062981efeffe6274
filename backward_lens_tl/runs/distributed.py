"""The processes of one launch, as Accelerate sees them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

_LONGEST_WAIT = timedelta(days=30)


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
