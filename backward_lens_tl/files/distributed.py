"""This process among those that it was launched with, as Accelerate sees them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

_LONGEST_WAIT = timedelta(days=30)


def this_process() -> PartialState:
    """This process and those that it was launched with.

    Returns:
        Accelerate's view of them.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Left to itself it finds several processes only where each has an accelerator.
    alone = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Processes wait for each other at the end, and a share of the parts may take days.
    return PartialState(cpu=alone, timeout=_LONGEST_WAIT)


def own_device(state: PartialState) -> str | None:
    """Where this process's model goes.

    Args:
        state: This process.

    Returns:
        Its own accelerator, such as `"cuda:1"`; `None` leaves the choice to `load_model`, where
        there is none, or it is Apple's, which TransformerLens itself decides whether to trust.
    """
    return None if state.device.type in ("cpu", "mps") else str(state.device)
