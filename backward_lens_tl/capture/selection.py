"""Resolve and check the arguments that select hook points and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from backward_lens_tl._checks import is_index, listed, shown
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import HookPointSite


def select_hook_points(
    hook_points: str | Sequence[str] | Callable[[str], bool] | None, host: Host
) -> list[HookPointSite]:
    """Resolve the `hook_points` argument.

    Args:
        hook_points: A name, several, or a function of the name; `None` for none.
        host: The model.

    Returns:
        The hook points.

    Raises:
        InputError: If the model has no such hook point.
    """
    if hook_points is None:
        return []
    if callable(hook_points):
        return [site for name, site in host.hook_points.items() if hook_points(name)]
    asked = listed(hook_points)
    for name in asked:
        if not isinstance(name, str) or name not in host.hook_points:
            near = get_close_matches(str(name), host.hook_points, n=3)
            raise InputError(
                f"the model has no hook point {name!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "; model.hook_dict lists them")
            )
    return [host.hook_points[name] for name in dict.fromkeys(asked)]


def select_positions(
    positions: int | Sequence[int] | None, mask: Bool[Tensor, "batch pos"]
) -> Int[Tensor, "batch selected"]:
    """Resolve the `positions` argument, prompt by prompt.

    Args:
        positions: Indices into each prompt, negative ones from that prompt's own end, or `None`
            for all.
        mask: False at padding, which is on the right.

    Returns:
        Indices from 0, in the given order; if all positions are requested, -1 where a prompt is
        shorter.

    Raises:
        InputError: If a prompt has no such position, or none is given.
    """
    if positions is None:
        everywhere = torch.arange(mask.shape[1], device=mask.device)
        return torch.where(mask, everywhere, torch.full_like(everywhere, -1))
    asked = listed(positions)
    if not asked:
        raise InputError("positions is empty; omit it to select all of them")
    rows = [
        [position_index(position, int(length), prompt) for position in asked]
        for prompt, length in enumerate(mask.sum(dim=1))
    ]
    return torch.tensor(rows, device=mask.device)


def position_index(position: int, length: int, prompt: int) -> int:
    """Resolve one position of one prompt.

    Args:
        position: The index, negative from the end.
        length: Number of tokens of the prompt.
        prompt: Which prompt of the batch, for the message.

    Returns:
        The index from 0.

    Raises:
        InputError: If the prompt has no such position.
    """
    if not is_index(position, length):
        raise InputError(
            f"position {shown(position)} does not exist in prompt {prompt}, which has {length} "
            f"tokens; allowed: {-length} to {length - 1}"
        )
    return int(position) % length
