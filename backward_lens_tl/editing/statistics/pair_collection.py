"""Collecting mean and standard deviation of the pairs `(x_i, delta_i)` of requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_choice
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_requests
from backward_lens_tl.editing.spanning_pairs import Positions, pair_batches
from backward_lens_tl.editing.statistics.provenance import PROBE_TOKENS, last_inputs
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixName

EDITED_MATRICES: tuple[MatrixName, ...] = ("W_in", "W_out")
EDITED_LAYERS = (-3, -2, -1)
"""Matrices that MEND edits as published: both of the MLPs of the last three layers."""


@raised_as(EditError)
def pair_statistics(
    model: nn.Module,
    requests: Iterable[EditRequest],
    *,
    matrices: str | Sequence[str] = EDITED_MATRICES,
    layers: int | Sequence[int] = EDITED_LAYERS,
    positions: Positions = "all",
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> PairStatistics:
    """Collect mean and standard deviation of the pairs `(x_i, delta_i)` of requests.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        requests: A few hundred requests similar to the later edits, but not those themselves.
        matrices: Names of matrices of the MLP, or `"mlp"` for all of them.
        layers: Their layers, negative ones from the end.
        positions: `"all"` positions that the model reads (MEND), or `"answer"`, only those at which
            a token of the target is predicted (UltraEdit).
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.
        progress: Whether to show a progress bar.

    Returns:
        The statistics.

    Raises:
        EditError: If there are fewer than two pairs, or a request, matrix or layer is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> records = blt.read_records("facts").rows[:3]
        >>> requests = [blt.editing.EditRequest.of(record) for record in records]
        >>> statistics = blt.editing.pair_statistics(model, requests, layers=[-1], progress=False)
        >>> statistics.places, statistics.n_requests
        ((('W_in', 7), ('W_out', 7)), 3)
    """
    host = host_of(model)
    check_choice("positions", positions, ("all", "answer"), EditError)
    sites = find_editable(host, matrices, layers, mlp_only=True)
    tokenized = tokenize_requests(host, requests, prepend_bos)
    running = [_Running() for _ in sites]
    with (
        torch.no_grad(),
        host.own_precision(),
        tqdm(total=len(tokenized), unit="request", disable=not progress) as bar,
    ):
        for batch in pair_batches(host, tokenized, sites, positions):
            for own, pairs in zip(running, batch, strict=True):
                own.add(torch.cat(pairs.rows, dim=1))
            bar.update(len(batch[0].mask))
    for site, own in zip(sites, running, strict=True):
        if own.n < 2:
            raise EditError(
                f"{site.matrix} of layer {site.layer} has {own.n} pairs in {len(tokenized)} "
                "requests, but a standard deviation needs two; pass more requests"
            )
    probe = tokenized[0].prompt[:PROBE_TOKENS]
    return PairStatistics(
        model=host.fingerprint(),
        name=host.name,
        prepend_bos=prepend_bos,
        probe=probe,
        probe_inputs=last_inputs(host, sites[:1], probe),
        places=tuple((site.matrix, site.layer) for site in sites),
        mean=tuple(own.mean.to(own.dtype) for own in running),
        std=tuple(own.std.to(own.dtype) for own in running),
        n_inputs=tuple(site.shape[0] for site in sites),
        n_pairs=tuple(own.n for own in running),
        n_requests=len(tokenized),
        positions=positions,
        requests=requests_digest(tokenized),
    )


def requests_digest(requests: Sequence[TokenizedRequest]) -> str:
    """SHA-256 of requests' tokens in their order, in hexadecimal."""
    tokens = [[each.prompt, each.target] for each in requests]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class _Running:
    """Mean and sum of squared deviations of the vectors so far, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self._deviations = torch.zeros((), dtype=torch.float64)
        self.dtype = torch.float32

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Include vectors (Chan, Golub and LeVeque, 1979)."""
        if not len(rows):
            return
        self.dtype, own = rows.dtype, rows.cpu().double()
        n, mean = self.n + len(own), own.mean(0)
        apart = mean - self.mean
        self._deviations = (
            self._deviations
            + (own - mean).square().sum(0)
            + apart.square() * (self.n * len(own) / n)
        )
        self.mean = self.mean + apart * (len(own) / n)
        self.n = n

    @property
    def std(self) -> Float[Tensor, "d"]:
        return (self._deviations / (self.n - 1)).sqrt()
