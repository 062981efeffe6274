"""The layer of a shift whose caller names none."""

from __future__ import annotations

from backward_lens_tl.jacobians.average import Jacobians
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_sites
from backward_lens_tl.models.sites import MatrixSite

_DEPTH = 0.8
"""As a fraction of the layers. Further down, the layers above turn what is written into something
else; further up, the keys of different subjects are more alike."""


def usual_layer(host: Host, jacobians: Jacobians | None) -> int:
    """Choose the layer nearest to a usual depth, and not the last one.

    What the last layer writes is not transformed any more. It has to outweigh the rest of the
    stream there, and often cannot.

    Args:
        host: The model.
        jacobians: Average Jacobians; the layer is one of theirs.

    Returns:
        The layer, with a `W_out` that is a single matrix if there is one.
    """
    last = host.n_layers - 1
    wanted = min(last, round(_DEPTH * host.n_layers))
    found = [site.layer for site in find_sites(host, "W_out", None) if isinstance(site, MatrixSite)]
    below = [layer for layer in found if layer < last]
    if jacobians is not None:
        below = [layer for layer in below if layer in jacobians.layers]
    return min(below or found or [wanted], key=lambda layer: abs(layer - wanted))
