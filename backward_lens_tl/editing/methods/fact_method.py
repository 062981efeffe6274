"""What ROME and MEMIT share: contexts of a fact, whitened keys, and the search for a value.

A value is found by gradient descent on a vector `delta` that is added to an activation at the
edited token, with all weights frozen (ROME, equation 4, as in the published code; MEMIT,
equation 16).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_kind
from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.interventions import adding_at, requiring_grad
from backward_lens_tl.editing.fact_contexts import FactContexts, FactToken, sampled_prefixes
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.statistics.moments import RIDGE, SecondMoments
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.hooks import Tap
from backward_lens_tl.models.resumption import RepeatedPasses
from backward_lens_tl.settings import Count, NonNegative, Positive

SEARCH_VERSION = 1
"""Increased when a search finds other values, so that older ones are not used."""

_PATIENCE = 30.0
"""Seconds after which searches of several values show a progress bar, on a terminal."""

_GOOD_ENOUGH = 0.05
"""The search stops at a loss below this."""


@dataclass(frozen=True, kw_only=True)
class FactMethod(EditMethod):
    """Base class of ROME and MEMIT, with the settings that both have.

    The search lowers the mean over contexts of the target's negative log-likelihood (the mean over
    its tokens, in nats), plus `kl_factor` times the divergence `KL(edited || original)` of the
    prediction at the edited token of `"<subject> is a"`, plus
    `weight_decay * ||delta|| / ||v0||^2`, with `v0` the activation in the bare prompt.

    Attributes:
        moments: Second moments of the inputs of `W_out`; `"identity"` leaves keys unwhitened, which
            damages other facts.
        fact_token: The edited token: the last token of the subject, or of the prompt.
        steps: Number of times that a search computes its loss; no step follows the last one.
        lr: Adam's learning rate in the search.
        weight_decay: Weight of the penalty on `delta`.
        kl_factor: Weight of the divergence, which needs a subject.
        clamp: `||delta||` is at most this multiple of `||v0||`.
        seed: Seed of the sampled prefixes.
        ridge: Fraction of the mean variance that is added to the diagonal of `C`.

    Examples:
        >>> import backward_lens_tl as blt
        >>> method = blt.editing.MEMIT(layers=(0, 1), moments=blt.editing.facts_moments())
        >>> isinstance(method, blt.editing.FactMethod), method.steps, method.clamp
        (True, 20, 0.75)
    """

    moments: SecondMoments | Literal["identity"] | None = None
    fact_token: FactToken = "subject_last"
    steps: Count = 20
    lr: Positive = 0.5
    weight_decay: NonNegative = 0.5
    kl_factor: NonNegative = 0.0625
    clamp: Positive = 4.0
    seed: int = 0
    ridge: NonNegative = RIDGE

    def _contexts(
        self,
        host: Host,
        requests: Sequence[TokenizedRequest],
        starts: Sequence[str],
        lengths: Sequence[int],
    ) -> list[FactContexts]:
        prefixes = sampled_prefixes(host, starts, lengths, self.seed)
        return [
            FactContexts.of(host, asked, prefixes, self.fact_token, self.prepend_bos)
            for asked in requests
        ]

    def _check_moments(self, host: Host, layers: Sequence[int]) -> None:
        moments, listed = self.moments, ", ".join(map(str, layers))
        if moments is None:
            raise EditError(
                "second moments are needed to whiten keys; collect them with "
                f"second_moments(model, texts, layers=[{listed}]), pass facts_moments() for the "
                "facts model, or moments='identity' to leave keys unwhitened, which damages other "
                "facts"
            )
        if moments == "identity":
            return
        if isinstance(moments, str):
            raise EditError(f"moments is {moments!r}; pass SecondMoments, or 'identity'")
        check_kind("moments", moments, SecondMoments, "second_moments(model, texts)", EditError)
        moments.check(host, layers, matrix="W_out")

    def _whitened(self, layer: int, keys: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_in n"]:
        """`C^-1 K` in float64."""
        if isinstance(self.moments, SecondMoments):
            return self.moments.solve(layer, keys, self.ridge)
        return keys.double()

    def _find_value(
        self, host: Host, layer: int, tap: Tap, fact: FactContexts, start: Float[Tensor, "d"]
    ) -> Float[Tensor, "d"]:
        """Search for the vector that makes a model predict the target.

        The layers below run once, because they compute the same with every vector. The model
        computes in its own precision; everything else is in at least float32.

        Args:
            host: The model; it does not change.
            layer: The layer of the activation.
            tap: The activation to which the vector is added.
            fact: The request.
            start: `v0`, the activation at the edited token of the bare prompt.

        Returns:
            `delta`.

        Raises:
            EditError: If the loss is not finite.
        """
        delta = torch.zeros_like(start, requires_grad=True)
        longest = self.clamp * start.norm()
        adam = torch.optim.Adam([delta], lr=self.lr)
        loss = _Loss(self, host, layer, tap, fact, start)
        with torch.enable_grad(), host.own_precision(), requiring_grad((), among=host.trained()):
            for step in range(1, int(self.steps) + 1):
                value = loss(delta)
                now = float(value.detach())
                if not math.isfinite(now):
                    raise EditError(
                        f"the loss is {now} in step {step} of the search for a value; "
                        "use a smaller lr or clamp, or a model in higher precision"
                    )
                if now < _GOOD_ENOUGH or step == self.steps:
                    break
                (delta.grad,) = torch.autograd.grad(value, delta)
                adam.step()
                with torch.no_grad():
                    length = delta.norm()
                    if length > longest:
                        delta.mul_(longest / length)
        return delta.detach()


def with_progress(facts: Sequence[FactContexts]) -> Iterable[FactContexts]:
    """Iterate over facts whose values are searched for, with a progress bar if that takes long.

    Args:
        facts: The facts.

    Returns:
        The facts.
    """
    is_hidden = True if len(facts) == 1 else None  # None: hidden unless on a terminal
    shown: Iterable[FactContexts] = tqdm(
        facts, unit="fact", delay=_PATIENCE, leave=False, disable=is_hidden
    )
    return shown


class _Loss:
    """The loss of a search as a function of `delta`."""

    def __init__(
        self,
        method: FactMethod,
        host: Host,
        layer: int,
        tap: Tap,
        fact: FactContexts,
        start: Float[Tensor, "d"],
    ) -> None:
        self._method, self._host, self._tap = method, host, tap
        self._penalty = method.weight_decay / start.square().sum()
        rows, answers = list(fact.rows), [fact.target] * len(fact.rows)
        self._positions = list(fact.positions)
        self._n_contexts = len(rows)
        if fact.essence is not None:
            # Only the logits at its end are used, and not its answer.
            rows, answers = [*rows, fact.essence], [*answers, fact.target[:1]]
            self._positions.append(len(fact.essence) - 1)
        self._asked = Continuations.of(host, rows, answers)
        self._original: Tensor | None = None
        self._passes = RepeatedPasses(host, layer)

    def __call__(self, delta: Float[Tensor, "d"]) -> Float[Tensor, ""]:
        """The loss; the first call, with zeros, keeps the original prediction of the essence."""
        added = delta.expand(len(self._positions), -1)
        edited = adding_at(self._tap, self._asked.batch, self._positions, added)
        with edited, self._passes.next():
            logits = self._asked.logits(self._host)
        nll = self._asked.nll(logits)[: self._n_contexts]
        loss: Tensor = nll.mean() + self._penalty * delta.norm()
        if len(self._positions) == self._n_contexts:
            return loss
        after = logits[-1, -1].log_softmax(-1)
        if self._original is None:
            self._original = after.detach()
        divergence: Tensor = (after.exp() * (after - self._original)).sum()
        return loss + self._method.kl_factor * divergence
