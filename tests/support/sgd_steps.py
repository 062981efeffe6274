"""Real steps of SGD on one weight of a reference model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from models import Case, nll
from torch import Tensor


@contextmanager
def step_of_sgd(
    case: Case, key: tuple[str, int], eta: float, tokens: Tensor, target: int
) -> Iterator[None]:
    """A real step on one weight of the reference, then undone."""
    weight = case.weights[key].tensor
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=eta)
    nll(target)(case.logits(tokens), tokens).sum().backward(inputs=[weight])
    optimizer.step()
    try:
        yield
    finally:
        weight.data.copy_(before)
        weight.grad = None


def output_and_loss(
    case: Case, key: tuple[str, int], tokens: Tensor, target: int
) -> tuple[Tensor, float]:
    """Output of a matrix of the reference, and the loss."""
    seen: list[Tensor] = []
    # A copy of the recorded output, from Hugging Face's modules or from hook points.
    handle = case.outputs[key].register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    with torch.no_grad():
        loss = nll(target)(case.logits(tokens), tokens)
    handle.remove()
    assert len(seen) == 1
    return seen[0][0], float(loss)
