"""Slow searches of ROME and MEMIT: one row at a time, Adam written out.

Of the package only the module names of a case are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from models import Case
from torch import Tensor, nn

from backward_lens_tl.editing import EditRequest, SecondMoments, second_moments

REQUEST = EditRequest("Messi plays for", " the king", "Messi")
OTHER = EditRequest("The capital of France is", " Rome", "France")


def ids(case: Case, text: str, bos: bool) -> list[int]:
    tokens: list[int] = case.model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [case.model.tokenizer.bos_token_id] * bos + tokens


def last_token_of(case: Case, text: str, end: int, bos: bool) -> int:
    """The last token with a character before `end`."""
    offsets = case.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return bos + max(
        at for at, (left, right) in enumerate(offsets["offset_mapping"]) if left < end <= right
    )


def contexts(
    case: Case, request: EditRequest, prefixes: Sequence[str], fact_token: str, bos: bool
) -> tuple[list[list[int]], list[int]]:
    """Rows and the fact's position in each."""
    rows, places = [], []
    for prefix in ("", *prefixes):
        row = ids(case, prefix + request.prompt, bos)
        end = len(prefix) + request.prompt.index(request.subject or "") + len(request.subject or "")
        rows.append(row)
        is_last = fact_token == "last"
        at = len(row) - 1 if is_last else last_token_of(case, prefix + request.prompt, end, bos)
        places.append(at)
    return rows, places


def w_out(case: Case, layer: int) -> nn.Module:
    return case.outputs["W_out", layer]


def block(case: Case, layer: int) -> nn.Module:
    """A module of the reference whose output is the residual stream after a layer."""
    for name, module in _reference(case).named_modules():
        if name.endswith((f"blocks.{layer}", f"h.{layer}", f"layers.{layer}")):
            return module
    raise LookupError(layer)


def _reference(case: Case) -> nn.Module:
    """The model that `case.logits` runs."""
    names = case.logits.__code__.co_freevars
    cells = dict(zip(names, case.logits.__closure__ or (), strict=True))
    module: nn.Module = cells["raw" if "raw" in cells else "reference"].cell_contents
    return module


@contextmanager
def watched(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Change a module's output, and return its original value."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        seen.append(own.detach())
        new = change(own)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def output_at(case: Case, module: nn.Module, row: Sequence[int], at: int) -> Tensor:
    with torch.no_grad(), watched(module, lambda own: own) as seen:
        case.logits(torch.tensor([row]))
    return seen[0][0, at]


def key_at(case: Case, layer: int, row: Sequence[int], at: int) -> Tensor:
    """The input of W_out, from TransformerLens's hook point."""
    name = f"blocks.{layer}.mlp.hook_post"
    with torch.no_grad():
        cache = case.model.run_with_cache(torch.tensor([row]), names_filter=lambda own: own == name)
    return cache[1][name][0, at].detach().clone()


def _logits(
    case: Case, module: nn.Module, row: Sequence[int], at: int, delta: Tensor | None
) -> Tensor:
    def add(own: Tensor) -> Tensor:
        if delta is None:
            return own
        new = own.clone()
        new[0, at] = new[0, at] + delta
        return new

    with watched(module, add) if delta is not None else nullcontext():
        return case.logits(torch.tensor([row]))[0]


def search(
    case: Case,
    module: nn.Module,
    request: EditRequest,
    prefixes: Sequence[str],
    *,
    fact_token: str = "subject_last",
    bos: bool = False,
    steps: int,
    lr: float,
    weight_decay: float,
    kl_factor: float,
    clamp: float,
) -> Tensor:
    """The vector to be added, by the formulas."""
    rows, places = contexts(case, request, prefixes, fact_token, bos)
    target = ids(case, str(request.target), False)
    start = output_at(case, module, rows[0], places[0])
    about = None
    if request.subject is not None:
        text = f"{request.subject} is a"
        row = ids(case, text, bos)
        is_last = fact_token == "last"
        at = len(row) - 1 if is_last else last_token_of(case, text, len(request.subject), bos)
        with torch.no_grad():
            before = torch.log_softmax(_logits(case, module, row, at, None)[at], -1)
        about = row, at, before

    def loss(delta: Tensor, *, at_zero: bool) -> Tensor:
        # At 0 the norm has no gradient; that of the published code is 0.
        total = torch.zeros((), dtype=start.dtype)
        if not at_zero:
            total = weight_decay * (delta * delta).sum().sqrt() / (start * start).sum()
        for row, at in zip(rows, places, strict=True):
            logits = _logits(case, module, [*row, *target[:-1]], at, delta)
            for place, token in enumerate(target):
                own = logits[len(row) - 1 + place]
                total = total + (torch.logsumexp(own, -1) - own[token]) / len(target) / len(rows)
        if about is not None:
            row, at, before = about
            after = torch.log_softmax(_logits(case, module, row, at, delta)[at], -1)
            total = total + kl_factor * (after.exp() * (after - before)).sum()
        return total

    delta = torch.zeros_like(start)
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        leaf = delta.clone().requires_grad_()
        value = loss(leaf, at_zero=step == 1)
        if float(value.detach()) < 0.05 or step == steps:
            break
        (grad,) = torch.autograd.grad(value, leaf)
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * grad**2
        hat = (square / (1 - 0.999**step)).sqrt()
        delta = delta - lr * mean / (1 - 0.9**step) / (hat + 1e-8)
        if delta.norm() > clamp * start.norm():
            delta = delta * clamp * start.norm() / delta.norm()
    return delta


def packed(moments: Tensor) -> Tensor:
    """The upper triangle, row by row."""
    return torch.cat([moments[row, row:] for row in range(len(moments))])


def random_moments(size: int, seed: int = 0) -> Tensor:
    """A symmetric positive matrix whose eigenvalues differ by a factor of about a hundred."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, 3 * size, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.1, 1, size, dtype=torch.float64)[:, None]
    return (scale * mixing) @ (scale * mixing).T / (3 * size)


def with_moments(case: Case, layers: Sequence[int], moments: Sequence[Tensor]) -> SecondMoments:
    """Statistics of a model with given numbers."""
    known = second_moments(case.model, ["The capital of France"], layers=layers, progress=False)
    return replace(known, moments=tuple(map(packed, moments)), n_tokens=10_000)
