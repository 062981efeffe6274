"""Prompts that are given as token ids: tensors, and the output of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor

from backward_lens_tl._checks import is_integer, is_token_id, listed, plain, shown
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host


def rows_of_mapping(
    host: Host, encoded: Mapping[str, Any], prepend_bos: bool | None
) -> list[list[int]]:
    """The tokens in a tokenizer's output.

    Args:
        host: The model.
        encoded: The output: `input_ids` and, optionally, an `attention_mask`.
        prepend_bos: The argument, which is for texts.

    Returns:
        One list per prompt, without padding.

    Raises:
        InputError: If it has no token ids, ids and mask do not match, or ids are not in the
            embedding.
    """
    if "input_ids" not in encoded:
        raise InputError(
            f"prompts is a {type(encoded).__name__} with {', '.join(map(repr, encoded)) or 'no'} "
            "keys; pass texts, a tokenizer's output, which has 'input_ids', or a list of chat "
            "messages"
        )
    ids = _rows("input_ids", encoded["input_ids"])
    mask = [[1] * len(row) for row in ids]
    if encoded.get("attention_mask") is not None:
        mask = _rows("attention_mask", encoded["attention_mask"])
    if list(map(len, mask)) != list(map(len, ids)):
        raise InputError(
            "input_ids and attention_mask have different shapes; pass both as the tokenizer "
            "returned them"
        )
    real = [_real(row, own) for row, own in zip(ids, mask, strict=True)]
    return [row for own in real for row in checked_ids(host, torch.tensor([own]), prepend_bos)]


def _rows(name: str, values: object) -> list[list[int]]:
    """One list per prompt; a tokenizer may return tensors or a single row."""
    rows = [] if is_integer(values) else [plain(row) for row in listed(values)]
    if rows and all(map(is_integer, rows)):
        rows = [rows]
    if not rows or not all(isinstance(row, list | tuple) for row in rows):
        raise InputError(f"{name} is {shown(values)}; pass lists or tensors of token ids")
    for row in rows:
        for value in row:
            if not is_token_id(value):
                raise InputError(f"{name} holds {shown(value)}; pass lists or tensors of token ids")
    return [[as_index(value) for value in row] for row in rows]


def _real(ids: list[int], mask: list[int]) -> list[int]:
    """The tokens of one prompt without its padding at one end."""
    real = [at for at, is_real in enumerate(mask) if is_real]
    if not real:
        raise InputError("input_ids contain a prompt without tokens; each needs at least one")
    if len(real) != real[-1] - real[0] + 1:
        raise InputError(
            f"attention_mask hides tokens inside a prompt ({mask}); remove them from input_ids "
            "if they do not belong to it"
        )
    return ids[real[0] : real[-1] + 1]


def checked_ids(host: Host, ids: Tensor, prepend_bos: bool | None) -> list[list[int]]:
    """Refuse token ids of another shape or dtype, or outside the embedding.

    Args:
        host: The model.
        ids: Token ids, `[batch, pos]`.
        prepend_bos: The argument, which is for texts.

    Returns:
        One list per prompt.

    Raises:
        InputError: If they are refused, or `prepend_bos` is given.
    """
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or ids.numel() == 0 or not is_integer:
        raise InputError(
            f"token ids have shape {tuple(ids.shape)} and dtype {ids.dtype}; pass integers of "
            "shape [batch, pos] with at least one prompt and one token (ids[None] adds the batch)"
        )
    if prepend_bos is not None:
        raise InputError(
            "prepend_bos is for texts; put the BOS id into the token ids yourself, or leave it out"
        )
    rows: list[list[int]] = plain(ids)
    lowest, highest = min(map(min, rows)), max(map(max, rows))
    if lowest < 0 or highest >= host.d_vocab:
        raise InputError(
            f"token ids run from {lowest} to {highest}; allowed: 0 to {host.d_vocab - 1}"
        )
    return rows
