"""What a shift has to write: for each token of each target, where `W_out` reads and what for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.predictions import target_ranks
from backward_lens_tl.editing.fact_contexts import FactToken
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.models import Host

TargetTokens = Literal["all", "first"]

_NEARLY_ONE = -1e-12
"""Largest log-probability; rounding may give 0, whose log-odds are infinite."""


@dataclass(frozen=True)
class Cells:
    """One outer product each: the input of `W_out` at one position, for one token of a target.

    The model reads a target's own tokens before each (teacher forcing), so every token of a target
    is predicted at a position of its own.

    Attributes:
        asked: The prompts with their targets.
        requests: Index of each cell's request.
        positions: Where `W_out` reads, in the request's prompt and target.
        columns: Where its token is predicted, among `asked.answers`.
    """

    asked: Continuations
    requests: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]
    columns: Int[Tensor, "n"]

    @classmethod
    def of(
        cls,
        host: Host,
        requests: Sequence[TokenizedRequest],
        tokens: TargetTokens,
        fact_token: FactToken = "last",
    ) -> Cells:
        """Find the cells of requests.

        Args:
            host: The model.
            requests: The requests.
            tokens: Which tokens of each target are written.
            fact_token: Where the matrix is edited: at the position that predicts each token, the
                prompt's last for the first one; or at the subject's last token for all of them.

        Returns:
            The cells, request by request.

        Raises:
            EditError: If the subject's last token is edited, and a request has no subject.
        """
        targets = [each.target if tokens == "all" else each.target[:1] for each in requests]
        asked = Continuations.of(host, [each.prompt for each in requests], targets)
        width = asked.answers.shape[1]
        places = []
        for index, (request, target) in enumerate(zip(requests, targets, strict=True)):
            for at in range(len(target)):
                there = len(request.prompt) - 1 + at
                if fact_token == "subject_last":
                    there = request.needed_subject
                places.append((index, there, width - len(target) + at))
        columns = torch.tensor(places, device=asked.answers.device).unbind(1)
        return cls(asked, *columns)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def targets(self) -> list[list[int]]:
        """The tokens that are written for each request."""
        pairs = zip(self.asked.answers, self.asked.mask, strict=True)
        return [answers[mask].tolist() for answers, mask in pairs]

    @property
    def tokens(self) -> Int[Tensor, "n"]:
        """The token of each cell."""
        return self.asked.answers[self.requests, self.columns]

    def at_position(self, values: Float[Tensor, "batch pos d"]) -> Float[Tensor, "n d"]:
        """Select what is at each cell's position."""
        return values[self.requests, self.positions]

    def predicted(self, values: Float[Tensor, "batch m d"]) -> Float[Tensor, "n d"]:
        """Select what predicts each cell's token, from values for all answers."""
        return values[self.requests, self.columns]

    def by_request(self, values: Num[Tensor, "n"]) -> list[list[float]]:
        """Numbers of the cells of each request."""
        lists: list[list[float]] = [[] for _ in range(len(self.asked.answers))]
        for request, value in zip(self.requests.tolist(), values.tolist(), strict=True):
            lists[request].append(float(value))
        return lists


@dataclass(frozen=True)
class Standing:
    """How the token of each cell stands among all tokens.

    Attributes:
        margins: Logit of the token minus the largest other logit: positive where it is the most
            probable token.
        ranks: Number of more probable tokens.
        log_probs: Log-probability in nats.
    """

    margins: Float[Tensor, "n"]
    ranks: Int[Tensor, "n"]
    log_probs: Float[Tensor, "n"]

    @classmethod
    def of(cls, logits: Float[Tensor, "n d_vocab"], tokens: Int[Tensor, "n"]) -> Standing:
        """Compare tokens with all others.

        Args:
            logits: One row per cell.
            tokens: The token of each cell.

        Returns:
            How they stand.
        """
        own = logits.gather(-1, tokens[:, None])
        others = logits.scatter(-1, tokens[:, None], -torch.inf).max(-1).values
        log_probs = (own - logits.logsumexp(-1, keepdim=True))[:, 0]
        return cls(own[:, 0] - others, target_ranks(logits, tokens), log_probs)

    @property
    def leads(self) -> Bool[Tensor, "n"]:
        """Whether each token is the only most probable one."""
        return self.margins > 0

    def surplus(self, probability: float | None) -> Float[Tensor, "n"]:
        """What each token has in excess of what it needs: positive where an edit is large enough.

        Args:
            probability: The probability that it needs; `None` if it only has to lead.

        Returns:
            The margin, or the log-odds above those of the probability if these are less.
        """
        if probability is None:
            return self.margins
        own = self.log_probs.double().clamp_max(_NEARLY_ONE)
        odds = own - torch.log(-torch.expm1(own)) - math.log(probability / (1 - probability))
        return torch.minimum(self.margins.double(), odds).to(self.margins)
