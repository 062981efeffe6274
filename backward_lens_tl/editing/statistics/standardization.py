"""How the pairs `(x_i, delta_i)` of requests are distributed, and pairs brought to one scale by it.

Gradients of language models differ in size by orders of magnitude between layers, coordinates and
prompts; MEND and UltraEdit take mean and standard deviation of every coordinate out first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_choice, listed
from backward_lens_tl.editing.requests import (
    EditRequest,
    TokenizedRequest,
    listed_requests,
    tokenize_request,
)
from backward_lens_tl.editing.statistics.probes import PROBE_TOKENS, is_alike, last_reads
from backward_lens_tl.editing.statistics.spanning import Positions, joined_pairs
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.files.storage import Saved
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.selection import find_editable
from backward_lens_tl.models.sites import MatrixName, MatrixSite

EDITED_MATRICES: tuple[MatrixName, ...] = ("W_in", "W_out")
EDITED_LAYERS = (-3, -2, -1)
"""What MEND edits as published: both matrices of the MLPs of the last three layers."""

EPS = 1e-7
"""Added to every standard deviation, as published."""

_BATCH = 16


@dataclass(frozen=True)
class StandardizedPairs:
    """The pairs of some requests at one matrix.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer.
        raw_inputs: `x_i` as they are.
        inputs: `x_i`, standardised.
        vjps: `delta_i`, standardised.
    """

    matrix: MatrixName
    layer: int
    raw_inputs: Float[Tensor, "n d_in"]
    inputs: Float[Tensor, "n d_in"]
    vjps: Float[Tensor, "n d_out"]


@dataclass(frozen=True, repr=False)
class PairStatistics(Saved):
    """Mean and standard deviation of the pairs at some matrices, and of which requests.

    Attributes:
        places: The matrices with their layers, in the order of a forward pass.
        mean: Mean of `(x, delta)`, side by side, over all pairs of each matrix.
        std: Their standard deviation, with `n - 1` in the denominator.
        n_inputs: The width of `x` at each matrix.
        n_pairs: How many pairs each matrix had.
        n_requests: Of how many requests.
        positions: At which positions.
        requests: SHA-256 of the requests' tokens, one after the other.
        model: SHA-256 of the model's parameters.
        name: The model's name.
        prepend_bos: Whether the prompts got a BOS token.
        probe: Token ids of a short prompt, by which the model is known again.
        probe_inputs: What the first of the matrices reads at its last position.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> requests = [
        ...     blt.editing.EditRequest("Obama grew up in", " Paris"),
        ...     blt.editing.EditRequest("Lionel Messi plays for", " Rome"),
        ... ]
        >>> statistics = blt.editing.pair_statistics(model, requests, layers=[-1], progress=False)
        >>> statistics.n_pairs
        (2, 2)
    """

    WHAT = "pair statistics"

    places: tuple[tuple[MatrixName, int], ...]
    mean: tuple[Float[Tensor, "d_pair"], ...]
    std: tuple[Float[Tensor, "d_pair"], ...]
    n_inputs: tuple[int, ...]
    n_pairs: tuple[int, ...]
    n_requests: int
    positions: Positions
    requests: str
    model: str
    name: str
    prepend_bos: bool | None
    probe: tuple[int, ...]
    probe_inputs: Float[Tensor, "d_in"]

    @cached_property
    def fingerprint(self) -> str:
        """What they are of, in one line, and a checksum, for the settings of a method."""
        held = {f"mean {place}": own for place, own in zip(self.places, self.mean, strict=True)}
        held |= {f"std {place}": own for place, own in zip(self.places, self.std, strict=True)}
        digest = tensors_digest(held, f"{self.positions} {self.prepend_bos}")
        return (
            f"{self.positions} positions of {self.n_requests} requests ({self.requests[:12]}), "
            f"{self.name} ({self.model[:12]}), {digest[:12]}"
        )

    def standardized(
        self,
        place: tuple[str, int],
        inputs: Float[Tensor, "*rows d_in"],
        vjps: Float[Tensor, "*rows d_out"],
    ) -> Float[Tensor, "*rows d_pair"]:
        """Pairs with mean and standard deviation taken out.

        Args:
            place: The matrix and its layer.
            inputs: `x_i`.
            vjps: `delta_i`.

        Returns:
            `((x, delta) - mean) / (std + 1e-7)`, side by side; 0 at coordinates that were the same
            in all requests, about whose scale nothing is known.

        Examples:
            >>> own = capture["W_out", 7]
            >>> pairs = statistics.standardized(("W_out", 7), own.inputs, own.vjps)
            >>> pairs.shape  # [batch, pos, d_in + d_out]
            torch.Size([1, 6, 640])
        """
        at = self.places.index((place[0], place[1]))
        mean, std = (each[at].to(inputs.device, inputs.dtype) for each in (self.mean, self.std))
        pairs = torch.cat((inputs, vjps), dim=-1)
        return ((pairs - mean) / (std + EPS)).masked_fill(std == 0, 0)

    def split(
        self, place: tuple[str, int], pairs: Float[Tensor, "*rows d_pair"]
    ) -> tuple[Float[Tensor, "*rows d_in"], Float[Tensor, "*rows d_out"]]:
        """Pairs that lie side by side, apart.

        Args:
            place: The matrix and its layer.
            pairs: As `standardized` gives them.

        Returns:
            What belongs to `x` and what to `delta`.

        Examples:
            >>> inputs, vjps = statistics.split(("W_out", 7), torch.zeros(6, 640))
            >>> inputs.shape, vjps.shape
            (torch.Size([6, 512]), torch.Size([6, 128]))
        """
        n = self.n_inputs[self.places.index((place[0], place[1]))]
        return pairs[..., :n], pairs[..., n:]

    def standardized_pairs(
        self,
        host: Host,
        requests: Sequence[TokenizedRequest],
        positions: Positions,
        matrices: Sequence[str] | None = None,
        layers: int | Sequence[int] | None = None,
    ) -> Iterator[StandardizedPairs]:
        """The pairs of requests at each matrix, as they are and standardised.

        Args:
            host: The model.
            requests: The requests.
            positions: Which positions' pairs; those that the statistics are of.
            matrices: As in `sites`.
            layers: As in `sites`.

        Yields:
            One for each matrix, in the order of a forward pass.

        Raises:
            EditError: If the statistics are of other positions, or as for `sites`.

        Examples:
            >>> from backward_lens_tl.editing.requests import tokenize_request
            >>> from backward_lens_tl.models import host_of
            >>> host = host_of(model)
            >>> tokenized = [tokenize_request(host, request, None)]
            >>> for pairs in statistics.standardized_pairs(host, tokenized, "all"):
            ...     pairs.matrix, pairs.layer, pairs.inputs.shape
            ('W_in', 7, torch.Size([1, 128]))
            ('W_out', 7, torch.Size([1, 512]))
        """
        self.check_positions(positions)
        sites = self.sites(host, matrices, layers)
        for site, pairs in zip(sites, joined_pairs(host, requests, sites, positions), strict=True):
            place = (site.matrix, site.layer)
            standard = self.split(place, self.standardized(place, *pairs))
            yield StandardizedPairs(*place, pairs[0], *standard)

    def sites(
        self,
        host: Host,
        matrices: Sequence[str] | None = None,
        layers: int | Sequence[int] | None = None,
    ) -> list[MatrixSite]:
        """Where the matrices are in the model that the statistics are of.

        Args:
            host: The model.
            matrices: Only those of these names; `None` for all.
            layers: Only those of these layers; `None` for all.

        Returns:
            The matrices, in the order of a forward pass.

        Raises:
            EditError: If it is another model, it lacks a matrix, or there are no statistics of one.

        Examples:
            >>> from backward_lens_tl.models import host_of
            >>> [(site.matrix, site.layer) for site in statistics.sites(host_of(model), "W_out")]
            [('W_out', 7)]
        """
        self.check(host)
        names = dict.fromkeys(name for name, _ in self.places) if matrices is None else matrices
        at = dict.fromkeys(layer for _, layer in self.places) if layers is None else layers
        with raised_as(EditError):
            wanted = find_editable(host, list(listed(names)), list(listed(at)), mlp_only=True)
        if matrices is None and layers is None:
            wanted = [site for site in wanted if (site.matrix, site.layer) in self.places]
        for site in wanted:
            if (site.matrix, site.layer) not in self.places:
                there = ", ".join(f"{name} of layer {layer}" for name, layer in self.places)
                raise EditError(
                    f"there are no statistics of {site.matrix} in layer {site.layer}, but of "
                    f"{there}; collect them with pair_statistics(model, requests, "
                    f"matrices=[{site.matrix!r}], layers=[{site.layer}])"
                )
        return wanted

    def check(self, host: Host) -> None:
        """Refuse a model that the statistics are not of.

        A model is known by what the first of the matrices reads in a short prompt: edits of these
        matrices do not change that, and TransformerLens's weight processing does where it changes
        the pairs.

        Args:
            host: The model.

        Raises:
            EditError: If the matrix reads something else there, or the model lacks it.

        Examples:
            >>> from backward_lens_tl.models import host_of
            >>> statistics.check(host_of(model))  # raises if they are another model's
        """
        with raised_as(EditError):
            [site] = find_editable(host, *self.places[0])
        if not any(token >= host.d_vocab for token in self.probe):
            [now] = last_reads(host, [site], self.probe)
            if is_alike(self.probe_inputs, now):
                return
        raise EditError(
            f"these statistics were collected with {self.name!r}, and {host.name!r} reads "
            "something else in the same prompt: it is another model, or its weights were processed "
            "otherwise. Collect them again with pair_statistics(model, requests)"
        )

    def check_positions(self, positions: Positions) -> None:
        """Refuse statistics of other positions than an editor looks at.

        Args:
            positions: Those that it looks at.

        Raises:
            EditError: If they are others.

        Examples:
            >>> statistics.positions
            'all'
            >>> statistics.check_positions("all")  # raises for others
        """
        if self.positions != positions:
            raise EditError(
                f"these statistics are of positions {self.positions!r}, and the editor looks at "
                f"{positions!r}; collect them with pair_statistics(..., positions={positions!r})"
            )

    def __repr__(self) -> str:
        places = ", ".join(f"{matrix} of layer {layer}" for matrix, layer in self.places)
        return f"PairStatistics({self.fingerprint}; {places})"


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
        requests: Requests like those that will be made, and not those themselves; some hundred.
        matrices: Names of matrices of the MLP, or `"mlp"` for all of them.
        layers: Their layers, negative ones from the end.
        positions: `"all"` that the model reads (MEND), or `"answer"`: those alone at which a token
            of the target is to be said (UltraEdit).
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.
        progress: Whether a bar shows how far it is.

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
    check_choice("prepend_bos", prepend_bos, (True, False, None), EditError)
    sites = find_editable(host, matrices, layers, mlp_only=True)
    asked = listed_requests(requests if isinstance(requests, EditRequest) else list(requests))
    tokenized = [tokenize_request(host, request, prepend_bos) for request in asked]
    running = [_Running() for _ in sites]
    left = iter(tokenized)
    with (
        torch.no_grad(),
        host.own_precision(),
        tqdm(total=len(tokenized), unit="request", disable=not progress) as bar,
    ):
        while some := list(islice(left, _BATCH)):
            for own, pairs in zip(running, joined_pairs(host, some, sites, positions), strict=True):
                own.add(torch.cat(pairs, dim=1))
            bar.update(len(some))
    for site, own in zip(sites, running, strict=True):
        if own.n < 2:
            raise EditError(
                f"{site.matrix} of layer {site.layer} has {own.n} pairs in {len(asked)} requests, "
                "and a standard deviation needs two; pass more requests"
            )
    probe = tokenized[0].prompt[:PROBE_TOKENS]
    return PairStatistics(
        places=tuple((site.matrix, site.layer) for site in sites),
        mean=tuple(own.mean.to(own.dtype) for own in running),
        std=tuple(own.std.to(own.dtype) for own in running),
        n_inputs=tuple(_width(site) for site in sites),
        n_pairs=tuple(own.n for own in running),
        n_requests=len(asked),
        positions=positions,
        requests=requests_digest(tokenized),
        model=host.fingerprint(),
        name=host.name,
        prepend_bos=prepend_bos,
        probe=probe,
        probe_inputs=last_reads(host, sites[:1], probe)[0],
    )


def requests_digest(requests: Sequence[TokenizedRequest]) -> str:
    """A checksum of requests' tokens, in their order.

    Args:
        requests: The requests.

    Returns:
        SHA-256, in hexadecimal.
    """
    tokens = [[each.prompt, each.target] for each in requests]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class _Running:
    """Mean and sum of squared deviations of the vectors seen so far, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self._deviations = torch.zeros((), dtype=torch.float64)
        self.dtype = torch.float32

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Take in some vectors (Chan, Golub and LeVeque, 1979)."""
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


def _width(site: MatrixSite) -> int:
    return int(site.weight.in_out(site.weight.parameter.detach()).shape[0])
