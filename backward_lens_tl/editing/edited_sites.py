"""The matrices of a model that an edit changes, and checks that the edit is of this model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixSite


def editable_host(model: nn.Module) -> Host:
    """The host of an edited model, even in inference mode, since no gradient is needed."""
    with torch.inference_mode(mode=False):
        return host_of(model)


def check_weights(host: Host, changes: Iterable[MatrixDelta], about: Mapping[str, Any]) -> None:
    """Refuse a model whose weights TransformerLens has processed, for a change of raw weights.

    Args:
        host: The model.
        changes: The changes of its matrices.
        about: What they are of.

    Raises:
        EditError: If they are changes of a checkpoint's weights, and the model has others.
    """
    processed = {each.matrix for each in changes} & host.processed_matrices
    if about.get("weights") == "raw" and processed:
        raise EditError(
            "this is a change of the weights of a checkpoint, but TransformerLens has processed "
            f"{', '.join(sorted(processed))} of {host.name!r} (fold_ln or center_writing_weights); "
            "load the model without processing, as load_model does"
        )


def edited_site(host: Host, delta: MatrixDelta) -> MatrixSite:
    """Find the matrix that a delta changes.

    Args:
        host: The model.
        delta: The delta.

    Returns:
        The matrix.

    Raises:
        EditError: If the model lacks the matrix or a changed bias, or the matrix has another size.
        UnsupportedModelError: If it cannot be changed.
    """
    with raised_as(EditError):
        [site] = find_editable(host, delta.matrix, delta.layer)
    if site.shape != delta.shape:
        raise EditError(
            f"the edit changes {delta.name} with shape {delta.shape}; in {host.name!r} it has "
            f"shape {site.shape}: the edit is of another model"
        )
    if delta.bias is not None and (site.bias is None or site.bias.numel() != delta.bias.numel()):
        raise EditError(
            f"the edit changes the bias of {delta.matrix} in layer {delta.layer}, but "
            f"{host.name!r} has no bias of that size there"
        )
    return site
