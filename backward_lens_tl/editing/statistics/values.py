"""The search for a value: what is to be added at one token, so that the target is said.

Gradient descent on a vector `delta` that is added to what a model computes at the fact's token,
all weights frozen (ROME, equation 4, in the form of the published code; MEMIT, equation 16).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_number, is_integer, shown
from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.hooks import requiring_grad
from backward_lens_tl.editing.statistics.activations import adding_at
from backward_lens_tl.editing.statistics.keys import FactContexts
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.taps import Tap


@dataclass(frozen=True)
class ValueSearch:
    """Settings of the search.

    Its loss is the mean over contexts of the target's negative log-likelihood (the mean over its
    tokens, in nats), `kl_factor` times the divergence `KL(edited || original)` of what is predicted
    at the fact's token of `"<subject> is a"`, and `weight_decay * ||delta|| / ||v0||^2`.

    Attributes:
        steps: Times that the loss is computed; the last one is followed by no step.
        lr: Learning rate of Adam.
        weight_decay: Weight of the penalty on `delta`.
        kl_factor: Weight of the divergence; without a subject there is none.
        clamp: `delta` gets no longer than so many times `||v0||`.
    """

    steps: int
    lr: float
    weight_decay: float
    kl_factor: float
    clamp: float

    GOOD_ENOUGH: ClassVar[float] = 0.05
    """A loss below which the search ends."""

    def __post_init__(self) -> None:
        if not is_integer(self.steps) or int(self.steps) < 1:
            raise EditError(f"steps is {shown(self.steps)}; pass an integer from 1 on")
        for name in ("lr", "clamp"):
            check_number(name, getattr(self, name), zero=False, error=EditError)
        for name in ("weight_decay", "kl_factor"):
            check_number(name, getattr(self, name), zero=True, error=EditError)

    def find(
        self, host: Host, tap: Tap, fact: FactContexts, start: Float[Tensor, "d"]
    ) -> Float[Tensor, "d"]:
        """Search for what is to be added.

        The model computes in its own precision, all else is in float32 at least.

        Args:
            host: The model; it is left as it was.
            tap: Where it is added.
            fact: The request.
            start: `v0`, what passes the tap at the fact's token of the bare prompt.

        Returns:
            `delta`.

        Raises:
            EditError: If the loss is not finite.
        """
        delta = torch.zeros_like(start, requires_grad=True)
        most = self.clamp * start.norm()
        adam = torch.optim.Adam([delta], lr=self.lr)
        loss = _Loss(self, host, tap, fact, start)
        with torch.enable_grad(), host.own_precision(), requiring_grad((), among=host.trained()):
            for step in range(1, int(self.steps) + 1):
                value = loss(delta)
                now = float(value.detach())
                if not math.isfinite(now):
                    raise EditError(
                        f"the loss is {now} in step {step} of the search for a value; "
                        "take a smaller lr or clamp, or a model in higher precision"
                    )
                if now < self.GOOD_ENOUGH or step == self.steps:
                    break
                (delta.grad,) = torch.autograd.grad(value, delta)
                adam.step()
                with torch.no_grad():
                    length = delta.norm()
                    if length > most:
                        delta.mul_(most / length)
        return delta.detach()


class _Loss:
    """The loss as a function of `delta`.

    Args:
        search: The settings.
        host: The model.
        tap: Where `delta` is added.
        fact: The request.
        start: `v0`.
    """

    def __init__(
        self,
        search: ValueSearch,
        host: Host,
        tap: Tap,
        fact: FactContexts,
        start: Float[Tensor, "d"],
    ) -> None:
        self._search, self._host, self._tap = search, host, tap
        self._penalty = search.weight_decay / start.square().sum()
        rows, answers = list(fact.rows), [fact.target] * len(fact.rows)
        self._positions = list(fact.positions)
        self._has_essence = fact.essence is not None
        if fact.essence is not None:
            # Its answer is not looked at: the logits at its end are what is wanted.
            rows, answers = [*rows, fact.essence], [*answers, fact.target[:1]]
            self._positions.append(len(fact.essence) - 1)
        self._asked = Continuations.of(host, rows, answers)
        self._original: Tensor | None = None

    def __call__(self, delta: Float[Tensor, "d"]) -> Float[Tensor, ""]:
        """The loss; the first call, with zeros, keeps what the model says of the subject."""
        batch = self._asked.batch
        added = delta.expand(len(self._positions), -1)
        with adding_at(self._tap, batch, self._positions, added):
            logits = self._asked.logits(self._host)
        nll = self._asked.nll(logits)
        n_contexts = len(nll) - self._has_essence
        loss: Tensor = nll[:n_contexts].mean() + self._penalty * delta.norm()
        if not self._has_essence:
            return loss
        edited = logits[-1, -1].log_softmax(-1)
        if self._original is None:
            self._original = edited.detach()
        divergence: Tensor = (edited.exp() * (edited - self._original)).sum()
        return loss + self._search.kl_factor * divergence
