"""What `W_out` reads for other subjects in the same prompt, where an edit shall write little.

The neighbors that an edit disturbs most are the same prompt with other subjects. Such prompts show
what the matrix reads for them, at the edited position and everywhere else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.batching import PASS_TOKENS, token_batches
from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.data.segments import subject_at, subject_span
from backward_lens_tl.editing.fact_contexts import FactToken
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_request
from backward_lens_tl.editing.shift.keys import Solve, fewer_rows, with_low_rank
from backward_lens_tl.editing.statistics.moments import SecondMoments
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.resumption import stopped_after
from backward_lens_tl.models.sites import MatrixSite
from backward_lens_tl.models.vocabulary import Span

_LEAST_RIDGE = 1e-8

_WEIGHT = 10.0
"""Weight of the inputs for the other subjects of one request, relative to ordinary text."""


@dataclass(frozen=True)
class Contrast:
    """Inputs of a matrix in prompts that an edit shall not change.

    Attributes:
        inputs: At the edited positions, `Z`.
        shares: One divided by the number of other subjects of the request, for each of them.
        others: Inputs at all positions, or fewer rows with the same sum of outer products.
        n_tokens: Number of positions.
        n_prompts: Number of prompts.
    """

    inputs: Float[Tensor, "z d_in"]
    shares: Float[Tensor, "z"]
    others: Float[Tensor, "rows d_in"]
    n_tokens: int
    n_prompts: int

    @classmethod
    def of(
        cls,
        host: Host,
        site: MatrixSite,
        requests: Sequence[TokenizedRequest],
        targets: Sequence[Sequence[int]],
        subjects: Sequence[str],
        *,
        n_subjects: int,
        fact_token: FactToken,
        prepend_bos: bool | None,
    ) -> Contrast:
        """Run the prompts of requests with other subjects, up to the edited layer.

        Args:
            host: The model.
            site: The matrix.
            requests: The requests; those without a subject are left out.
            targets: The tokens that are written for each.
            subjects: Names of other subjects.
            n_subjects: Number of them per request.
            fact_token: The token where the edit is made.
            prepend_bos: Whether prompts get a BOS token.

        Returns:
            What the matrix reads there.

        Raises:
            EditError: If there is no other subject.
        """
        rows: list[tuple[int, ...]] = []
        positions: list[list[int]] = []
        shares: list[float] = []
        for asked, target in zip(requests, targets, strict=True):
            names = chosen_names(asked.request, subjects, n_subjects)
            for other in names:
                prompt = _about(asked.request, other)
                if fact_token == "last":
                    prompt = replace(prompt, subject=None, subject_start=None)
                found = tokenize_request(host, prompt, prepend_bos)
                last = len(found.prompt) - 1
                at = [last + k for k in range(len(target))]
                if fact_token == "subject_last":
                    at = [found.needed_subject]
                positions.append(at)
                shares += [1 / len(names)] * len(at)
                rows.append((*found.prompt, *target[:-1]))
        if not rows:
            raise EditError(
                "contrast has no name of a subject other than the request's own; pass several, "
                "such as those of other records"
            )
        inputs, others = _read(host, site, rows, positions)
        n_tokens = sum(map(len, rows))
        return cls(inputs, torch.tensor(shares).to(inputs), others, n_tokens, len(rows))

    def solver(self, layer: int, moments: SecondMoments | None, ridge: float) -> Solve:
        """What computes `A^-1 K` for the contrast key.

        Args:
            layer: The layer.
            moments: Second moments on ordinary text; by default those of the prompts with other
                subjects.
            ridge: Fraction of the mean variance that is added in every direction.

        Returns:
            The function.

        Raises:
            EditError: If nothing is added in directions that the prompts do not use.
        """
        weighted = fewer_rows(
            (_WEIGHT * self.shares[:, None].double()).sqrt() * self.inputs.double()
        )
        if moments is not None:
            statistics = moments
            return with_low_rank(lambda keys: statistics.solve(layer, keys, ridge), weighted)
        if ridge < _LEAST_RIDGE:
            raise EditError(
                f"ridge is {ridge}; the contrast key needs at least {_LEAST_RIDGE:g} without "
                "moments, because its prompts leave most directions unused"
            )
        usual = self.others.double() / self.n_tokens**0.5
        shift = ridge * float(usual.square().sum()) / usual.shape[1]
        rows = torch.cat([usual, weighted])
        if len(rows) < rows.shape[1]:
            return with_low_rank(lambda keys: keys / shift, rows)
        dense = rows.T @ rows
        dense.diagonal().add_(shift)
        factor = torch.linalg.cholesky(dense)
        return lambda keys: torch.cholesky_solve(keys, factor)


def _read(
    host: Host,
    site: MatrixSite,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
) -> tuple[Float[Tensor, "z d_in"], Float[Tensor, "r d_in"]]:
    """What a matrix reads at some positions of prompts, and rows that stand for all positions."""
    found: dict[int, Tensor] = {}
    others: list[Tensor] = []
    for some in token_batches(host, list(map(len, rows)), PASS_TOKENS):
        batch = pad_prompts(host, [rows[each] for each in some])
        with stopped_after(host, site.layer):
            seen = at_least_float32(forward_pass(host, batch, inputs=[site]).inputs[0])
        found |= {each: own[list(positions[each])] for each, own in zip(some, seen, strict=True)}
        every = torch.cat([*others, seen[batch.mask.to(seen.device)]])
        # Far more rows than dimensions would take more memory than the model.
        others = [fewer_rows(every) if len(every) > 2 * every.shape[1] else every]
    return torch.cat([found[each] for each in range(len(rows))]), others[0]


def chosen_names(request: EditRequest, subjects: Sequence[str], n: int) -> list[str]:
    """Choose names other than the request's own, the same for every call.

    Args:
        request: The request.
        subjects: Names of other subjects.
        n: Number of names; fewer if there are not as many.

    Returns:
        The names; none without a subject.
    """
    if request.subject is None:
        return []
    own = request.subject.strip().casefold()
    others = [name for name in dict.fromkeys(subjects) if name.strip().casefold() != own]
    return random.Random(request.prompt).sample(others, min(n, len(others)))


def _about(request: EditRequest, other: str) -> EditRequest:
    """The request's prompt about another subject; its target is not used."""
    start, end = _span(request)
    prompt = request.prompt[:start] + other + request.prompt[end:]
    return EditRequest(prompt, 0, subject=other, subject_start=start)


def _span(request: EditRequest) -> Span:
    subject = str(request.subject)
    if request.subject_start is not None:
        found = subject_at(request.prompt, subject, request.subject_start)
        if found is not None:
            return found
    return subject_span(request.prompt, subject)
