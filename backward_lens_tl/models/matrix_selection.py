"""Find weight matrices: names and layers, resolved and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from backward_lens_tl._checks import is_index, listed, shown
from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import (
    ATTENTION_MATRICES,
    MATRIX_NAMES,
    MatrixName,
    MatrixSite,
    Site,
)


@runtime_checkable
class HasMatrices(Protocol):
    """A model whose matrices can be selected, such as a `Host`."""

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""

    @property
    def has_mlp(self) -> bool:
        """Whether the model's first layer has an MLP."""

    def matrices(self, group: Literal["attn", "mlp"]) -> tuple[MatrixName, ...]:
        """Names of the attention or MLP matrices."""

    def holders(self, weight: Tensor) -> tuple[str, ...]:
        """Names under which modules hold a parameter; more than one if it is shared."""


def select_matrices(matrices: str | Sequence[str], host: HasMatrices) -> tuple[MatrixName, ...]:
    """Resolve the `matrices` argument.

    Args:
        matrices: Names among `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`, `W_out`, or the groups
            `"attn"`, `"mlp"` (those that the model has) and `"all"`, alone or in a sequence.
        host: The model.

    Returns:
        Names without repeats, in the order in which a layer uses them.

    Raises:
        InputError: If a name is unknown, or no matrix is given.
    """
    asked = listed(matrices)
    wanted: set[str] = set()
    for name in asked:
        if not isinstance(name, str) or name not in (*MATRIX_NAMES, "attn", "mlp", "all"):
            raise InputError(
                f"unknown matrix {name!r}; allowed: {', '.join(MATRIX_NAMES)} and the groups "
                "'attn', 'mlp' and 'all'"
            )
        if name in ("attn", "all"):
            wanted.update(host.matrices("attn"))
        if name == "mlp" or (name == "all" and host.has_mlp):
            wanted.update(host.matrices("mlp"))
        wanted.add(name)
    if not wanted:
        raise InputError("matrices is empty; name one, for example matrices=('W_out',)")
    return tuple(name for name in MATRIX_NAMES if name in wanted)


def select_layers(layers: int | Sequence[int] | None, host: HasMatrices) -> tuple[int, ...]:
    """Resolve the `layers` argument.

    Args:
        layers: Indices, negative ones from the end, or `None` for all.
        host: The model.

    Returns:
        Indices from 0, ascending, without repeats.

    Raises:
        InputError: If an index is out of range, or no layer is given.
    """
    if layers is None:
        return tuple(range(host.n_layers))
    wanted = {resolve_layer(layer, host.n_layers) for layer in listed(layers)}
    if not wanted:
        raise InputError("layers is empty; omit it to select all of them")
    return tuple(sorted(wanted))


def resolve_layer(layer: int, n_layers: int) -> int:
    """Resolve the index of a layer; negative ones count from the model's last layer everywhere.

    Args:
        layer: The index.
        n_layers: Number of layers of the model.

    Returns:
        The index from 0.

    Raises:
        InputError: If the model has no such layer.
    """
    if not is_index(layer, n_layers):
        raise InputError(
            f"layer {shown(layer)} does not exist; allowed: {-n_layers} to {n_layers - 1}"
        )
    return int(layer) % n_layers


def find_sites(
    host: Host, matrices: str | Sequence[str], layers: int | Sequence[int] | None
) -> list[Site]:
    """Find weight matrices.

    Args:
        host: The model.
        matrices: Names or groups, as in `select_matrices`.
        layers: Indices, or `None` for all, as in `select_layers`.

    Returns:
        The sites, each once, in the order of a forward pass.
    """
    names = select_matrices(matrices, host)
    return [site for layer in select_layers(layers, host) for site in host.sites(layer, names)]


def check_sharing(host: HasMatrices, sites: Sequence[Site]) -> None:
    """Refuse a weight that several modules share.

    Its gradient is the sum over all of them, and an edit changes them all.

    Args:
        host: The model.
        sites: The matrices.

    Raises:
        UnsupportedModelError: If there is one.
    """
    for site in sites:
        for weight in site.weights:
            holders = host.holders(weight)
            if len(holders) > 1:
                raise UnsupportedModelError(
                    f"{site.matrix} of layer {site.layer} is one weight with {len(holders)} "
                    f"uses ({', '.join(holders)}): a gradient is the sum over them, and an edit "
                    "changes them all; untie it (give each module a copy)"
                )


def find_editable(
    host: Host,
    matrices: str | Sequence[str],
    layers: int | Sequence[int] | None,
    *,
    mlp_only: bool = False,
) -> list[MatrixSite]:
    """Find weight matrices that can be changed: what the model computes then changes with them.

    Args:
        host: The model.
        matrices: As in `find_sites`.
        layers: As in `find_sites`.
        mlp_only: Whether matrices of attention are refused.

    Returns:
        The sites, each once, in the order of a forward pass.

    Raises:
        InputError: If a matrix of attention is refused.
        UnsupportedModelError: If a matrix belongs to a mixture of experts, is recomputed from other
            parameters at each use, serves several heads of its output, or is shared by modules.
    """
    sites = find_sites(host, matrices, layers)
    for site in sites:
        if mlp_only and site.matrix in ATTENTION_MATRICES:
            raise InputError(
                f"{site.matrix} is a matrix of attention; allowed: those of the MLP, "
                f"{', '.join(host.matrices('mlp'))}"
            )
    editable = [_editable(host, site) for site in sites]
    check_sharing(host, editable)
    return editable


def _editable(host: Host, site: Site) -> MatrixSite:
    name = f"{site.matrix} of layer {site.layer}"
    if not isinstance(site, MatrixSite):
        raise UnsupportedModelError(
            f"{name} belongs to a mixture of {site.n_experts} experts and cannot be edited; choose "
            "a matrix that is a single weight, such as those of attention (matrices='attn')"
        )
    (again,) = host.sites(site.layer, (site.matrix,))
    if again.weights[0] is not site.weight.parameter:
        raise UnsupportedModelError(
            f"{name} is computed from other parameters, as by a parametrization, and cannot be "
            "edited; remove the parametrization"
        )
    if site.heads_per_weight > 1:
        raise UnsupportedModelError(
            f"{name} has one weight for {site.heads_per_weight} heads of its output; switch off "
            "ungroup_grouped_query_attention"
        )
    return site
