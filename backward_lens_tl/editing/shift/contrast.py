"""What `W_out` reads for other subjects in the same prompt, where an edit shall write little.

The neighbors that an edit disturbs most are the same prompt with other subjects. One batch of such
prompts shows what the matrix reads for them, at the edited position and everywhere else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.data.segments import subject_at, subject_span
from backward_lens_tl.editing.fact_contexts import FactToken
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_request
from backward_lens_tl.editing.shift.keys import Solve, with_low_rank
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
        others: Inputs at all positions.
        n_prompts: Number of prompts.
    """

    inputs: Float[Tensor, "z d_in"]
    shares: Float[Tensor, "z"]
    others: Float[Tensor, "tokens d_in"]
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
        places: list[tuple[int, int]] = []
        shares: list[float] = []
        for asked, target in zip(requests, targets, strict=True):
            names = _chosen(asked.request, subjects, n_subjects)
            for other in names:
                prompt = _about(asked.request, other)
                if fact_token == "last":
                    prompt = replace(prompt, subject=None, subject_start=None)
                found = tokenize_request(host, prompt, prepend_bos)
                last = len(found.prompt) - 1
                at = [last + k for k in range(len(target))]
                if fact_token == "subject_last":
                    at = [found.needed_subject]
                places += [(len(rows), position) for position in at]
                shares += [1 / len(names)] * len(at)
                rows.append((*found.prompt, *target[:-1]))
        if not places:
            raise EditError(
                "contrast has no name of a subject other than the request's own; pass several, "
                "such as those of other records"
            )
        batch = pad_prompts(host, rows)
        with stopped_after(host, site.layer):
            seen = at_least_float32(forward_pass(host, batch, inputs=[site]).inputs[0])
        index, positions = torch.tensor(places, device=seen.device).unbind(1)
        inputs = seen[index, positions]
        others = seen[batch.mask.to(seen.device)]
        return cls(inputs, torch.tensor(shares).to(inputs), others, len(rows))

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
        weighted = (_WEIGHT * self.shares[:, None].double()).sqrt() * self.inputs.double()
        if moments is not None:
            statistics = moments
            return with_low_rank(lambda keys: statistics.solve(layer, keys, ridge), weighted)
        if ridge < _LEAST_RIDGE:
            raise EditError(
                f"ridge is {ridge}; the contrast key needs at least {_LEAST_RIDGE:g} without "
                "moments, because its prompts leave most directions unused"
            )
        usual = self.others.double() / len(self.others) ** 0.5
        shift = ridge * float(usual.square().sum()) / usual.shape[1]
        rows = torch.cat([usual, weighted])
        if len(rows) < rows.shape[1]:
            return with_low_rank(lambda keys: keys / shift, rows)
        dense = rows.T @ rows
        dense.diagonal().add_(shift)
        factor = torch.linalg.cholesky(dense)
        return lambda keys: torch.cholesky_solve(keys, factor)


def _chosen(request: EditRequest, subjects: Sequence[str], n: int) -> list[str]:
    """Names other than the request's own, the same for every call."""
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
