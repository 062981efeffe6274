"""Which prompts and layers go through the model together.

Prompts of similar length share a pass, so that little of it is padding. Under a memory budget a
pass has fewer prompts, or fewer layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch

from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import ATTENTION_MATRICES, Site

_MAX_PADDING = 0.2
"""Padded positions of a pass, as a part of its real ones."""

_FLOAT32 = 4

_GRAPH_WIDTHS = 18
_GRAPH_MLP_WIDTHS = 6
_GRAPH_PATTERNS = 3
"""Numbers that a block takes in a forward and backward pass: per token, in units of `d_model` and,
for each matrix that the MLP reads with, of `d_mlp`; and per head and pair of tokens. Measured."""

_USUAL_PASS = 256 * 2**20
"""What passes take on a CPU if nobody says: with more prompts they are no faster."""


@dataclass(frozen=True)
class Pass:
    """A part of the work that is one forward and one backward pass.

    Attributes:
        prompts: Indices of the prompts.
        layers: The layers.
    """

    prompts: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class PassSize:
    """What passes over a model take, in bytes.

    Attributes:
        per_token: What autograd keeps for the backward pass, per token and block.
        per_pair: Likewise per pair of tokens of a prompt and block.
        per_prompt: Logits and their gradient.
        factors: Numbers in the factors of each layer asked for, per token.
        n_blocks: Blocks from the lowest layer asked for to the last.
        device: Where the model is.
        patterns: Gradients at attention patterns that are kept, per pair of tokens of a prompt.
        itemsize: Bytes of a factor's number, as it is computed.
    """

    per_token: int
    per_pair: int
    per_prompt: int
    factors: Mapping[int, int]
    n_blocks: int
    device: torch.device
    patterns: int = 0
    itemsize: int = 4

    def of(self, n_prompts: int, length: int, layers: Sequence[int]) -> int:
        """Estimate one pass.

        Args:
            n_prompts: Number of prompts.
            length: Tokens of the longest.
            layers: The layers whose factors are captured.

        Returns:
            Bytes.
        """
        block = length * self.per_token + length * length * self.per_pair
        factors = length * sum(self.factors[layer] for layer in layers) * self.itemsize
        return n_prompts * (self.n_blocks * block + factors + self.per_prompt)

    def kept(self, n_prompts: int, length: int, memory: Memory) -> int:
        """What the factors of all passes take beside a pass.

        Args:
            n_prompts: Number of prompts.
            length: Tokens of the longest.
            memory: How they are kept.

        Returns:
            Bytes on the model's device.
        """
        if memory.device_for(self.device) != self.device:
            return 0
        itemsize = self.itemsize if memory.factor_dtype is None else memory.factor_dtype.itemsize
        factors = length * sum(self.factors.values()) * itemsize
        return n_prompts * (factors + length * length * self.patterns)


def pass_size(host: Host, sites: Sequence[Site], n_read: int | None, longest: int) -> PassSize:
    """Estimate passes from the sizes of a model.

    Args:
        host: The model.
        sites: The matrices.
        n_read: Positions of each prompt that the logits are needed of; `None` for all.
        longest: Tokens of the longest prompt.

    Returns:
        The estimate.
    """
    factors: dict[int, int] = {}
    for site in sites:
        joined = 0 if site.joins is None else host.d_model
        factors[site.layer] = factors.get(site.layer, 0) + site.width + joined
    itemsize = host.model.W_U.element_size()
    wide = max(_FLOAT32, itemsize)
    attention = {site.layer for site in sites if site.matrix in ATTENTION_MATRICES}
    mlp = host.d_mlp * (2 if host.is_gated else 1)
    return PassSize(
        per_token=itemsize * (_GRAPH_WIDTHS * host.d_model + _GRAPH_MLP_WIDTHS * mlp),
        per_pair=itemsize * _GRAPH_PATTERNS * host.n_heads,
        # The logits, their log-softmax, and the gradient of both.
        per_prompt=4 * wide * (n_read or longest) * host.d_vocab_out,
        factors=factors,
        n_blocks=host.n_layers - min(factors),
        device=host.device,
        patterns=wide * host.n_heads * len(attention),
        itemsize=wide,
    )


def plan_passes(
    lengths: Sequence[int],
    layers: Sequence[int],
    size: PassSize,
    memory: Memory,
    *,
    in_one: bool,
    by_prompt: bool,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[Pass]:
    """Divide the work into passes.

    Args:
        lengths: Number of tokens of each prompt.
        layers: The layers.
        size: What passes take.
        memory: The caller's limits.
        in_one: Whether there may be only one, because somebody looks on.
        by_prompt: Whether prompts of one length need not stay together, if there is no budget.
        groups: Prompts that may share a pass, if not all may.

    Returns:
        The passes; together they cover every prompt and layer once.

    Raises:
        InputError: If the budget is too small for any pass.
    """
    all_layers, longest = tuple(layers), max(lengths)
    everything = size.of(len(lengths), longest, all_layers)
    if in_one:
        kept = 0 if memory.keeps_as_computed else size.kept(len(lengths), longest, memory)
        _check_one_pass(everything + kept, memory.budget)
        return [Pass(tuple(range(len(lengths))), all_layers)]
    buckets = [
        tuple(prompts[at] for at in bucket)
        for prompts in groups or [range(len(lengths))]
        for bucket in length_buckets([lengths[prompt] for prompt in prompts])
    ]
    if memory.budget is None and by_prompt:
        return _usual_passes(buckets, all_layers, lengths, size)
    if memory.budget is None:
        return [Pass(bucket, all_layers) for bucket in buckets]
    # What one pass alone computes is kept as it is, and takes no more.
    is_kept = len(buckets) == 1 and memory.keeps_as_computed
    if is_kept and everything <= memory.budget:
        return [Pass(buckets[0], all_layers)]
    kept = size.kept(len(lengths), longest, memory)
    return [
        part
        for bucket in buckets
        for part in _passes(bucket, all_layers, lengths, size, memory.budget, kept)
    ]


def _check_one_pass(takes: int, budget: int | None) -> None:
    if budget is not None and takes > budget:
        raise InputError(
            f"this takes about {_shown(takes)} in one pass, and the budget is {_shown(budget)}; "
            "with hooks on the model, or hook_points, all goes in one pass: pass fewer prompts or "
            "layers, or a larger budget"
        )


def _usual_passes(
    buckets: Sequence[tuple[int, ...]],
    layers: tuple[int, ...],
    lengths: Sequence[int],
    size: PassSize,
) -> list[Pass]:
    """Passes that take about as much as is worth while, with one prompt at least."""
    most = _free_cuda_memory(size.device) // 4 if size.device.type == "cuda" else _USUAL_PASS
    return [
        Pass(part, layers)
        for bucket in buckets
        for longest in [max(lengths[prompt] for prompt in bucket)]
        for part in _smaller(bucket, max(1, most // size.of(1, longest, layers)), lengths)
    ]


def _passes(
    bucket: tuple[int, ...],
    layers: tuple[int, ...],
    lengths: Sequence[int],
    size: PassSize,
    budget: int,
    kept: int,
) -> list[Pass]:
    """Passes over prompts of similar length, within a budget."""
    longest, room = max(lengths[prompt] for prompt in bucket), budget - kept
    if n_prompts := max(0, room) // size.of(1, longest, layers):
        return [Pass(part, layers) for part in _smaller(bucket, n_prompts, lengths)]
    largest = max(layers, key=size.factors.__getitem__)
    sizes = [size.of(1, longest, [largest] * n) for n in range(1, len(layers) + 1)]
    n_layers = sum(of_some <= room for of_some in sizes)
    if not n_layers:
        raise InputError(
            f"a pass over one layer and one prompt of {longest} tokens takes about "
            f"{_shown(kept + sizes[0])}, of which {_shown(kept)} are the factors of all, and the "
            f"budget is {_shown(budget)}; allow more, pass fewer or shorter prompts, or keep the "
            "factors in less with factor_dtype or elsewhere with factor_device"
        )
    return [Pass((prompt,), part) for prompt in bucket for part in _parts(layers, n_layers)]


def _free_cuda_memory(device: torch.device) -> int:
    """Bytes that torch could take, those that it holds and does not use included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _smaller(bucket: tuple[int, ...], most: int, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Batches of at most so many prompts, with no more padding."""
    by_length = tuple(sorted(bucket, key=lengths.__getitem__, reverse=True))
    return [
        tuple(sorted(part[index] for index in batch))
        for part in _parts(by_length, most)
        for batch in length_buckets([lengths[prompt] for prompt in part])
    ]


def length_buckets(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Divide prompts into batches in which padding adds at most a fifth to the real tokens.

    Args:
        lengths: Number of tokens of each prompt.

    Returns:
        Indices of the prompts of each batch, in their own order; the longest prompts come first.
        Prompts of one length stay together.
    """
    of_length: dict[int, list[int]] = {}
    for prompt, length in enumerate(lengths):
        of_length.setdefault(length, []).append(prompt)
    buckets: list[list[int]] = []
    longest = real = 0
    for length, prompts in sorted(of_length.items(), reverse=True):
        count = len(buckets[-1]) + len(prompts) if buckets else 0
        if not buckets or count * longest > (1 + _MAX_PADDING) * (real + length * len(prompts)):
            buckets.append([])
            longest, real = length, 0
        buckets[-1] += prompts
        real += length * len(prompts)
    return [tuple(sorted(bucket)) for bucket in buckets]


def _parts(items: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Cut into as few parts as possible, all about equally long."""
    step = ceil(len(items) / ceil(len(items) / most))
    return [items[start : start + step] for start in range(0, len(items), step)]


def _shown(n_bytes: int) -> str:
    return f"{n_bytes:,} bytes" if n_bytes < 2**20 else f"{n_bytes / 2**20:,.0f} MiB"
