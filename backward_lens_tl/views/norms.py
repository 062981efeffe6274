"""The norms that views show, and what each means."""

from __future__ import annotations

from typing import Literal, get_args

from backward_lens_tl._checks import check_choice
from backward_lens_tl.views.text import SIZES

Quantity = Literal["norm", "write_norm", "input_norm"]
"""A norm of each cell, by its name in `Cell` and `to_df`."""

_SYMBOLS = {**SIZES, "input_norm": "‖x_i‖"}
_MEANINGS: dict[Quantity, str] = {
    "norm": "norm of the gradient at the output",
    "write_norm": "norm of each position's term of the gradient",
    "input_norm": "norm of the input",
}


def check_quantity(quantity: object) -> None:
    """Refuse anything but the name of a norm."""
    check_choice("quantity", quantity, get_args(Quantity))


def symbol(quantity: Quantity) -> str:
    """A norm as an axis or a colour bar names it."""
    return _SYMBOLS[quantity]


def meaning(quantity: Quantity) -> str:
    """A norm as a title names it: its symbol, and what it is."""
    return f"{_SYMBOLS[quantity]}, {_MEANINGS[quantity]}"
