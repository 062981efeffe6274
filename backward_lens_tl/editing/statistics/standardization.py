"""The distribution of the pairs `(x_i, delta_i)` of requests, and pairs standardised by it.

Gradients of language models differ in size by orders of magnitude between layers, coordinates and
prompts; MEND and UltraEdit first standardise every coordinate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import listed
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.spanning_pairs import Positions, joined_pairs
from backward_lens_tl.editing.statistics.provenance import ModelStatistics
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixName, MatrixSite

EPS = 1e-7
"""Added to every standard deviation, as published."""


@dataclass(frozen=True)
class StandardizedPairs:
    """The pairs of several requests at one matrix.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer.
        raw_inputs: `x_i`, not standardised.
        inputs: `x_i`, standardised.
        vjps: `delta_i`, standardised.
    """

    matrix: MatrixName
    layer: int
    raw_inputs: Float[Tensor, "n d_in"]
    inputs: Float[Tensor, "n d_in"]
    vjps: Float[Tensor, "n d_out"]


@dataclass(frozen=True, repr=False)
class PairStatistics(ModelStatistics):
    """Mean and standard deviation of the pairs `(x, delta)` at some matrices.

    `pair_statistics` collects them. `probe` and `probe_inputs`, those of the first matrix, identify
    the model.

    Attributes:
        places: The matrices with their layers, in the order of a forward pass.
        mean: Mean of the concatenated `(x, delta)` over all pairs of each matrix.
        std: Their standard deviation, with `n - 1` in the denominator.
        n_inputs: Width of `x` at each matrix.
        n_pairs: Number of pairs of each matrix.
        n_requests: Number of requests.
        positions: Which positions the pairs come from.
        requests: SHA-256 of the requests' tokens in their order.

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

    @cached_property
    def fingerprint(self) -> str:
        """Requests, model and a checksum in one line, for the settings of a method."""
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
    ) -> tuple[Float[Tensor, "*rows d_in"], Float[Tensor, "*rows d_out"]]:
        """Standardise pairs.

        Args:
            place: The matrix and its layer.
            inputs: `x_i`.
            vjps: `delta_i`.

        Returns:
            `((x, delta) - mean) / (std + 1e-7)`; 0 at coordinates that were the same in all
            requests, because their scale is unknown.

        Examples:
            >>> own = capture["W_out", 7]
            >>> inputs, vjps = statistics.standardized(("W_out", 7), own.inputs, own.vjps)
            >>> inputs.shape, vjps.shape  # [batch, pos, d_in], [batch, pos, d_out]
            (torch.Size([1, 6, 512]), torch.Size([1, 6, 128]))
        """
        at = self.places.index((place[0], place[1]))
        mean, std = (each[at].to(inputs.device, inputs.dtype) for each in (self.mean, self.std))
        pairs = torch.cat((inputs, vjps), dim=-1)
        standard = ((pairs - mean) / (std + EPS)).masked_fill(std == 0, 0)
        n = self.n_inputs[at]
        return standard[..., :n], standard[..., n:]

    def standardized_pairs(
        self,
        host: Host,
        requests: Sequence[TokenizedRequest],
        positions: Positions,
        matrices: Sequence[str] | None = None,
        layers: int | Sequence[int] | None = None,
    ) -> Iterator[StandardizedPairs]:
        """Capture and standardise the pairs of requests at each matrix.

        Args:
            host: The model.
            requests: The requests.
            positions: Which positions to use; those of the statistics.
            matrices: As in `sites`.
            layers: As in `sites`.

        Yields:
            The pairs of each matrix, in the order of a forward pass.

        Raises:
            EditError: If the statistics are of other positions, or as for `sites`.

        Examples:
            >>> from backward_lens_tl.editing.requests import tokenize_requests
            >>> from backward_lens_tl.models import host_of
            >>> host = host_of(model)
            >>> tokenized = tokenize_requests(host, request, None)
            >>> for pairs in statistics.standardized_pairs(host, tokenized, "all"):
            ...     pairs.matrix, pairs.layer, pairs.inputs.shape
            ('W_in', 7, torch.Size([1, 128]))
            ('W_out', 7, torch.Size([1, 512]))
        """
        self.check_positions(positions)
        sites = self.sites(host, matrices, layers)
        for site, pairs in zip(sites, joined_pairs(host, requests, sites, positions), strict=True):
            place = (site.matrix, site.layer)
            yield StandardizedPairs(*place, pairs[0], *self.standardized(place, *pairs))

    def sites(
        self,
        host: Host,
        matrices: Sequence[str] | None = None,
        layers: int | Sequence[int] | None = None,
    ) -> list[MatrixSite]:
        """Find the matrices of the statistics in a model.

        Args:
            host: The model.
            matrices: Only matrices of these names; `None` for all.
            layers: Only matrices of these layers; `None` for all.

        Returns:
            The matrices, in the order of a forward pass.

        Raises:
            EditError: If the statistics are of another model, or there are none for a matrix.

        Examples:
            >>> from backward_lens_tl.models import host_of
            >>> [(site.matrix, site.layer) for site in statistics.sites(host_of(model), "W_out")]
            [('W_out', 7)]
        """
        matrix, layer = self.places[0]
        self._check_model(host, matrix, [layer], "pair_statistics(model, requests)")
        names = [name for name, _ in self.places] if matrices is None else listed(matrices)
        at = [layer for _, layer in self.places] if layers is None else listed(layers)
        sites = find_editable(host, names, at, mlp_only=True)
        if matrices is None and layers is None:
            sites = [site for site in sites if (site.matrix, site.layer) in self.places]
        for site in sites:
            if (site.matrix, site.layer) not in self.places:
                held = ", ".join(f"{name} of layer {layer}" for name, layer in self.places)
                raise EditError(
                    f"there are no statistics of {site.matrix} in layer {site.layer}, but of "
                    f"{held}; collect them with pair_statistics(model, requests, "
                    f"matrices=[{site.matrix!r}], layers=[{site.layer}])"
                )
        return sites

    def check_positions(self, positions: Positions) -> None:
        """Refuse statistics of positions other than those that an editor uses.

        Args:
            positions: The positions that it uses.

        Raises:
            EditError: If the statistics are of others.

        Examples:
            >>> statistics.positions
            'all'
            >>> statistics.check_positions("all")  # raises for others
        """
        if self.positions != positions:
            raise EditError(
                f"these statistics are of positions {self.positions!r}, but the editor uses "
                f"{positions!r}; collect them with pair_statistics(..., positions={positions!r})"
            )

    def __repr__(self) -> str:
        places = ", ".join(f"{matrix} of layer {layer}" for matrix, layer in self.places)
        return f"PairStatistics({self.fingerprint}; {places})"
