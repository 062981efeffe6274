"""Divide the work of a capture into microbatches.

Prompts of similar length share a microbatch, so that there is little padding. Under a memory budget
microbatches have fewer prompts, or fewer layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch

from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import ATTENTION_MATRICES, Site

_MAX_PADDING = 0.2
"""Padded positions of a microbatch, as a fraction of its real ones."""

_FLOAT32 = 4

_GRAPH_WIDTHS = 18
_GRAPH_MLP_WIDTHS = 6
_GRAPH_PATTERNS = 3
"""Values that autograd keeps per block, as measured: per token, in units of `d_model` and, for each
reading matrix of the MLP, of `d_mlp`; and per head and pair of tokens."""

PASS_TOKENS = 1024
"""Tokens of a forward pass of which little is kept, as `token_batches` counts them."""

_USUAL_SIZE = 256 * 2**20
"""Default size of a microbatch on a CPU, in bytes; larger ones are not faster."""


@dataclass(frozen=True)
class Microbatch:
    """A microbatch: the prompts and layers of one forward and one backward pass.

    Attributes:
        prompts: Indices of the prompts.
        layers: The layers.
    """

    prompts: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class MicrobatchSize:
    """An estimate of the memory that microbatches take, in bytes.

    Attributes:
        per_token: What autograd keeps for the backward pass, per token and block.
        per_pair: The same, per pair of tokens of a prompt and block.
        per_prompt: Logits and their gradient.
        factors: Number of values in the factors of each requested layer, per token.
        n_blocks: Number of blocks from the lowest requested layer to the last.
        device: The model's device.
        patterns: Gradients at attention patterns that are kept, per pair of tokens of a prompt.
        itemsize: Bytes per value of a factor, as it is computed.
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
        """Estimate one microbatch.

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
        """Estimate the factors that are kept of all microbatches.

        Args:
            n_prompts: Number of prompts.
            length: Tokens of the longest.
            memory: How factors are kept.

        Returns:
            Bytes on the model's device.
        """
        if memory.device_for(self.device) != self.device:
            return 0
        itemsize = self.itemsize if memory.factor_dtype is None else memory.factor_dtype.itemsize
        factors = length * sum(self.factors.values()) * itemsize
        return n_prompts * (factors + length * length * self.patterns)


def microbatch_size(
    host: Host, sites: Sequence[Site], n_read: int | None, longest: int
) -> MicrobatchSize:
    """Estimate memory from the sizes of a model.

    Args:
        host: The model.
        sites: The matrices.
        n_read: Number of positions of each prompt whose logits are needed; `None` for all.
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
    return MicrobatchSize(
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


def plan_microbatches(
    lengths: Sequence[int],
    layers: Sequence[int],
    size: MicrobatchSize,
    memory: Memory,
    *,
    in_one: bool,
    by_prompt: bool,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[Microbatch]:
    """Divide the work into microbatches.

    Args:
        lengths: Number of tokens of each prompt.
        layers: The layers.
        size: The estimate of memory.
        memory: The caller's limits.
        in_one: Whether there may be only one, because of a caller's hook or objective.
        by_prompt: Whether prompts of one length may be separated even without a budget.
        groups: Prompts that may share a microbatch; `None` if all may.

    Returns:
        The microbatches; together they cover every prompt and layer once.

    Raises:
        InputError: If the budget is too small.
    """
    all_layers, longest = tuple(layers), max(lengths)
    everything = size.of(len(lengths), longest, all_layers)
    if in_one:
        kept = 0 if memory.keeps_as_computed else size.kept(len(lengths), longest, memory)
        _check_single(everything + kept, memory.budget)
        return [Microbatch(tuple(range(len(lengths))), all_layers)]
    buckets = [
        tuple(prompts[at] for at in bucket)
        for prompts in groups or [range(len(lengths))]
        for bucket in length_buckets([lengths[prompt] for prompt in prompts])
    ]
    if memory.budget is None:
        if by_prompt:
            buckets = _of_usual_size(buckets, all_layers, lengths, size)
        return [Microbatch(bucket, all_layers) for bucket in buckets]
    # The factors of a single microbatch are kept as they are, and take no more memory.
    is_kept = len(buckets) == 1 and memory.keeps_as_computed
    if is_kept and everything <= memory.budget:
        return [Microbatch(buckets[0], all_layers)]
    kept = size.kept(len(lengths), longest, memory)
    return [
        part
        for bucket in buckets
        for part in _within_budget(bucket, all_layers, lengths, size, memory.budget, kept)
    ]


def _check_single(takes: int, budget: int | None) -> None:
    if budget is not None and takes > budget:
        raise InputError(
            f"this takes about {_shown(takes)} in one microbatch, but the budget is "
            f"{_shown(budget)}; with hooks on the model, or hook_points, there is only one "
            "microbatch; use fewer prompts or layers, or a larger budget"
        )


def _of_usual_size(
    buckets: Sequence[tuple[int, ...]],
    layers: tuple[int, ...],
    lengths: Sequence[int],
    size: MicrobatchSize,
) -> list[tuple[int, ...]]:
    """Batches of the default size, with at least one prompt each."""
    most = _free_cuda_memory(size.device) // 4 if size.device.type == "cuda" else _USUAL_SIZE
    return [
        part
        for bucket in buckets
        for longest in [max(lengths[prompt] for prompt in bucket)]
        for part in _smaller(bucket, max(1, most // size.of(1, longest, layers)), lengths)
    ]


def _within_budget(
    bucket: tuple[int, ...],
    layers: tuple[int, ...],
    lengths: Sequence[int],
    size: MicrobatchSize,
    budget: int,
    kept: int,
) -> list[Microbatch]:
    """Microbatches of prompts of similar length, within a budget."""
    longest, room = max(lengths[prompt] for prompt in bucket), budget - kept
    if n_prompts := max(0, room) // size.of(1, longest, layers):
        return [Microbatch(part, layers) for part in _smaller(bucket, n_prompts, lengths)]
    largest = max(layers, key=size.factors.__getitem__)
    sizes = [size.of(1, longest, [largest] * n) for n in range(1, len(layers) + 1)]
    n_layers = sum(of_some <= room for of_some in sizes)
    if not n_layers:
        raise InputError(
            f"a microbatch of one layer and one prompt of {longest} tokens takes about "
            f"{_shown(kept + sizes[0])}, including {_shown(kept)} for the factors of all prompts, "
            f"but the budget is {_shown(budget)}; increase it, pass fewer or shorter prompts, or "
            "set factor_dtype or factor_device"
        )
    return [Microbatch((prompt,), part) for prompt in bucket for part in _parts(layers, n_layers)]


def _free_cuda_memory(device: torch.device) -> int:
    """Bytes that torch could allocate, including its unused reserve."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _smaller(bucket: tuple[int, ...], most: int, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Batches of at most `most` prompts, without additional padding."""
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


def token_batches(host: Host, lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Divide prompts into forward passes that keep few values per token.

    Args:
        host: The model.
        lengths: Number of tokens of each prompt.
        most: Tokens of a pass with padding, unless a single prompt has more.

    Yields:
        Indices of the prompts of each pass, of similar length, so that little of it is padding.
    """
    for group in host.length_groups(lengths):
        batch: list[int] = []
        for prompt in sorted(group, key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[prompt] > most:
                yield batch
                batch = []
            batch.append(prompt)
        yield batch


def _parts(items: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Split into as few parts as possible, of about equal length."""
    step = ceil(len(items) / ceil(len(items) / most))
    return [items[start : start + step] for start in range(0, len(items), step)]


def _shown(n_bytes: int) -> str:
    return f"{n_bytes:,} bytes" if n_bytes < 2**20 else f"{n_bytes / 2**20:,.0f} MiB"
