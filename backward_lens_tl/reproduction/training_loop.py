"""A short training run of the MLPs' matrices, with the change and the gradient of each of them.

The weights never change: as in `FineTuning`, what is trained is the change `D` of each matrix,
which is added to its output as `x @ D`. It is either the matrix itself, of any rank, or a product
of two factors as in LoRA. What the optimizer sees is `D^T`, or `A` and `B` with `D^T = B A`: torch
stores the weights of linear layers as `[out, in]`, and Muon scales its steps by `sqrt(out / in)`
where that is larger than one. The gradient of the weight is `X^T Delta` in both cases, with what
the matrix read and the gradients at its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.interventions import adding, requiring_grad
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.steps import Optimizer
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixSite
from backward_lens_tl.reproduction.training_facts import TaughtFacts

TrainedWeights = Literal["full", "lora"]
"""Whether the change of a matrix has any rank, or is a product of two factors."""

FIRST_DECREASES: dict[TrainedWeights, float] = {"full": 0.1, "lora": 0.01}
"""The share of the loss by which the first step lowers it, to first order.

The first step of LoRA moves one of its factors only. With a tenth, later steps of SGD and Muon
diverged.
"""


class TrainedChange:
    """The change of one matrix during training.

    Args:
        site: The matrix.
        rank: The rank of LoRA's factors, which begin as PEFT's do: `A` uniform within
            `1 / sqrt(d_in)`, `B` zero. `None` for a change of any rank, which begins at zero.
        generator: The source of random numbers.
    """

    def __init__(self, site: MatrixSite, rank: int | None, generator: torch.Generator) -> None:
        self.site = site
        d_in, d_out = site.shape
        parameter = site.weight.parameter
        dtype = at_least_float32(parameter[:0]).dtype
        if rank is None:
            starts = [torch.zeros(d_out, d_in)]
        else:
            width = min(rank, d_in, d_out)
            uniform = 2 * torch.rand(width, d_in, generator=generator) - 1
            starts = [uniform / math.sqrt(d_in), torch.zeros(d_out, width)]
        self.leaves = [start.to(parameter.device, dtype).requires_grad_() for start in starts]
        self._inputs: Tensor | None = None
        self._vjps: Tensor | None = None

    def added(self, inputs: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """What the change adds to the matrix's output; keeps the factors of its gradient."""
        written = inputs.to(self.leaves[0].dtype)
        self._inputs = written.detach().flatten(0, -2)
        for leaf in self.leaves:
            written = written @ leaf.T
        if written.requires_grad:
            written.register_hook(self._keep)
        return written

    def _keep(self, vjps: Tensor) -> None:
        self._vjps = vjps.detach().flatten(0, -2)

    def delta(self) -> MatrixDelta:
        """The change as it is now."""
        parts = [leaf.detach().T.clone() for leaf in self.leaves]
        about = (self.site.matrix, self.site.layer)
        if len(parts) == 1:
            return MatrixDelta(*about, values=parts[0])
        return MatrixDelta(*about, *parts)

    def gradient(self) -> MatrixDelta:
        """The gradient of the weight in the last backward pass, `X^T Delta`, as factors."""
        if self._inputs is None or self._vjps is None:
            raise InputError("no backward pass went through the matrix")
        about = (self.site.matrix, self.site.layer)
        return MatrixDelta(*about, self._inputs.T, self._vjps)


@dataclass(frozen=True)
class ChangeAt:
    """The change of one matrix after some steps.

    Attributes:
        change: `W_n - W_0`.
        step: `W_n - W_{n-1}`.
        gradient: The gradient of step `n`.
        descent: What gradient descent would have written on the same path: the sum over steps of
            minus the learning rate times the gradient.
    """

    change: MatrixDelta
    step: MatrixDelta
    gradient: MatrixDelta
    descent: Float[Tensor, "d_in d_out"]


@dataclass(frozen=True)
class Checkpoint:
    """A training run after some steps.

    Attributes:
        step: The number of steps.
        rate: The learning rate of the first step.
        loss: Mean negative log-likelihood of the answers of all facts, in nats per token.
        learned: The fraction of facts whose answer is the most probable one.
        changes: The change of each matrix.
    """

    step: int
    rate: float
    loss: float
    learned: float
    changes: tuple[ChangeAt, ...]


def train(
    host: Host,
    facts: TaughtFacts,
    sites: Sequence[MatrixSite],
    optimizer: Optimizer,
    *,
    rate_of: TaughtFacts,
    rank: int | None,
    steps: Sequence[int],
    batch_size: int,
    seed: int,
) -> Generator[Checkpoint, None, None]:
    """Train the changes of matrices of the MLPs on facts.

    The model has hooks until the generator ends: close it if not all of it is used.

    The loss is the mean over the batch of the negative log-likelihood of the answer's tokens.
    Learning rates fall linearly to zero. The first one is such that a step on all facts of
    `rate_of` would lower their loss by a given share to first order, the same for every optimizer.

    Args:
        host: The model; its weights stay as they are.
        facts: The facts.
        sites: The matrices.
        optimizer: An optimizer of torch, with its default settings and without weight decay.
        rate_of: The facts that give the learning rate.
        rank: The rank of LoRA's factors; `None` for changes of any rank.
        steps: Numbers of steps, ascending; the last one ends the run.
        batch_size: Number of facts in a step. Every fact is used once before any is used again.
        seed: Seed of the order of the facts and of LoRA's factors.

    Yields:
        The run after each of the numbers of steps.

    Raises:
        InputError: If this version of torch has no such optimizer.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = [TrainedChange(site, rank, generator) for site in sites]
    leaves = [leaf for change in changes for leaf in change.leaves]
    everything, matched = (each.batch(host, range(len(each))) for each in (facts, rate_of))
    descents = [change.leaves[0].new_zeros(change.site.shape) for change in changes]
    order: list[int] = []
    with ExitStack() as hooks, torch.enable_grad():
        hooks.enter_context(host.own_precision())
        hooks.enter_context(requiring_grad((), among=host.trained()))
        for change in changes:
            hooks.enter_context(adding(change.site, change.added))
        loss = matched.nll(matched.logits(host)).mean()
        decrease = FIRST_DECREASES["full" if rank is None else "lora"]
        first_rate = matched_rate(optimizer, leaves, loss, decrease)
        stepping = _optimizer(optimizer)(leaves, lr=first_rate)
        for step in range(1, steps[-1] + 1):
            if not order:
                order = torch.randperm(len(facts), generator=generator).tolist()
            batch, order = facts.batch(host, order[:batch_size]), order[batch_size:]
            rate = first_rate * (1 - (step - 1) / steps[-1])
            for group in stepping.param_groups:
                group["lr"] = rate
            stepping.zero_grad()
            batch.nll(batch.logits(host)).mean().backward(inputs=leaves)
            gradients = [change.gradient() for change in changes]
            for descent, gradient in zip(descents, gradients, strict=True):
                descent.sub_(gradient.dense(), alpha=rate)
            before = [change.delta() for change in changes] if step in steps else []
            stepping.step()
            if before:
                with torch.no_grad():
                    logits = everything.logits(host)
                own = zip(changes, before, gradients, descents, strict=True)
                yield Checkpoint(
                    step,
                    first_rate,
                    float(everything.nll(logits).mean()),
                    float(everything.are_said(logits).double().mean()),
                    tuple(_change_at(*each) for each in own),
                )


def _change_at(
    change: TrainedChange, before: MatrixDelta, gradient: MatrixDelta, descent: Tensor
) -> ChangeAt:
    now = change.delta()
    return ChangeAt(now, now + before.scale(-1), gradient, descent.clone())


def matched_rate(
    optimizer: Optimizer, leaves: Sequence[Tensor], loss: Float[Tensor, ""], share: float
) -> float:
    """The learning rate at which one step lowers the loss by a share of it, to first order.

    Steps are proportional to the learning rate, so one of rate 1 on copies tells: the decrease is
    minus the inner product of gradient and step.

    Args:
        optimizer: The optimizer.
        leaves: What is trained.
        loss: The loss, connected to the autograd graph.
        share: The share.

    Returns:
        The rate.

    Raises:
        InputError: If the loss has no gradient here, or torch no such optimizer.
    """
    gradients = torch.autograd.grad(loss, leaves)
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    for copy, gradient in zip(copies, gradients, strict=True):
        copy.grad = gradient
    _optimizer(optimizer)(copies, lr=1.0).step()
    decrease = -sum(
        float((gradient.double() * (copy.detach() - leaf.detach())).sum())
        for copy, leaf, gradient in zip(copies, leaves, gradients, strict=True)
    )
    if not decrease > 0:
        raise InputError(
            "the loss of the facts does not depend on the trained matrices: a step of "
            f"{optimizer} changes it by {-decrease:.3g} to first order; pass other data"
        )
    return share * float(loss.detach()) / decrease


def _optimizer(name: Optimizer) -> Callable[..., Any]:
    if name == "sgd":
        return torch.optim.SGD
    if name == "adam":
        return torch.optim.Adam
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise InputError(
            f"torch {torch.__version__} has no torch.optim.Muon; install torch 2.9 or newer"
        )
    return partial(muon, weight_decay=0.0)
