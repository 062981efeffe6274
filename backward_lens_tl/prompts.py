"""Prompts as a batch: token ids, padded on the right, with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backward_lens_tl.arguments import check_choice, check_text, listed, plain
from backward_lens_tl.errors import InputError
from backward_lens_tl.host import Host

Prompts = str | Sequence[str] | Int[Tensor, "batch pos"]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one forward pass.

    Padding is always on the right, whatever the tokenizer's habit: in a causal model no real
    token sees it, so a prompt in a batch gives the same numbers as the prompt alone.

    Attributes:
        tokens: Token ids; 0 at padding.
        mask: False at padding.
        prompts: Index of each prompt among all that the caller gave.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    prompts: Int[Tensor, "batch"]

    @property
    def is_padded(self) -> bool:
        """Whether any prompt is shorter than the longest."""
        return not bool(self.mask.all())

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Number of real tokens of each prompt."""
        return self.mask.sum(dim=1)

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """Index of the last real token of each prompt."""
        return self.lengths - 1

    def part(self, prompts: Int[Tensor, "part"]) -> PromptBatch:
        """Some of the prompts, padded to the longest of them.

        Args:
            prompts: Their indices in this batch.

        Returns:
            The smaller batch.
        """
        longest = int(self.lengths[prompts].max())
        return PromptBatch(
            self.tokens[prompts, :longest], self.mask[prompts, :longest], self.prompts[prompts]
        )

    def to(self, device: torch.device) -> PromptBatch:
        """The same on a device."""
        return PromptBatch(self.tokens.to(device), self.mask.to(device), self.prompts.to(device))

    def ends(self, values: Float[Tensor, "batch pos d"], n: int) -> Float[Tensor, "batch n d"]:
        """What lies at the last `n` positions of each prompt.

        Args:
            values: Something per prompt and position.
            n: How many positions, at most as many as the longest prompt has.

        Returns:
            The values, so that `[:, -1]` is the last token's. For a prompt of fewer positions the
            first is repeated in front.
        """
        back = torch.arange(1 - n, 1, device=values.device)
        last = self.last.to(values.device)[:, None]
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, (last + back).clamp_min(0)]


def tokenize_prompts(host: Host, prompts: Prompts, prepend_bos: bool | None) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        host: The model.
        prompts: A text, several, or token ids (taken as they are, all of them real).
        prepend_bos: Whether texts get a BOS token; `None` is the model's own default.

    Returns:
        One list of ids per prompt.

    Raises:
        InputError: If a prompt is empty or not a text, there is no prompt, or ids have the wrong
            shape or dtype, lie outside the vocabulary, or come with `prepend_bos`.
    """
    if isinstance(prompts, Tensor):
        return _checked_ids(host, prompts, prepend_bos)
    check_choice("prepend_bos", prepend_bos, (True, False, None))
    texts = listed(prompts)
    if not texts:
        raise InputError("there is no prompt in the list; pass at least one")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"prompt {index} is {text!r}, a {type(text).__name__}; pass texts, or one tensor "
                "of token ids of shape [batch, pos]"
            )
        check_text(f"prompt {index},", text)
    rows = [host.tokenize(text, prepend_bos) if text else [] for text in texts]
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if not row:
            raise InputError(
                f"prompt {index}, {text!r}, is empty; a gradient needs at least one token: pass a "
                "text, or the BOS token's id"
            )
    return rows


def _checked_ids(host: Host, ids: Tensor, prepend_bos: bool | None) -> list[list[int]]:
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
            f"token ids run from {lowest} to {highest}; allowed are 0 to {host.d_vocab - 1}"
        )
    return rows


def pad_prompts(host: Host, rows: Sequence[Sequence[int]]) -> PromptBatch:
    """Put token ids of different lengths into one batch.

    Args:
        host: The model, for its context length and device.
        rows: Token ids of each prompt.

    Returns:
        The batch, on the model's device.

    Raises:
        InputError: If a prompt is longer than the model's context.
    """
    longest = max(len(row) for row in rows)
    for index, row in enumerate(rows):
        if len(row) > host.n_ctx:
            raise InputError(
                f"prompt {index} has {len(row)} tokens (answer included); the model's context "
                f"holds {host.n_ctx}. Shorten it, or pass a part of it"
            )
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return PromptBatch(tokens, mask, torch.arange(len(rows))).to(host.device)
