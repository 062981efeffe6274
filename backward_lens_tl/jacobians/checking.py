"""Refuse a Jacobian Lens that was fitted on another model."""

from __future__ import annotations

from backward_lens_tl.errors import JacobianLensError
from backward_lens_tl.jacobians.average import Jacobians
from backward_lens_tl.models import Host


def check_fits(jacobians: Jacobians, host: Host) -> None:
    """Refuse a lens that was fitted on another model.

    Args:
        jacobians: The matrices of the lens.
        host: The model.

    Raises:
        JacobianLensError: If the lens has another width, a layer that the model lacks, or another
            last layer, or records another model.
    """
    check_sizes(jacobians, host)
    _check_name(jacobians, host)


def check_sizes(jacobians: Jacobians, host: Host) -> None:
    """Refuse a lens that cannot be applied to a model.

    Args:
        jacobians: The matrices of the lens.
        host: The model.

    Raises:
        JacobianLensError: If the lens has another width, a layer that the model lacks, or another
            last layer.
    """
    if jacobians.d_model != host.d_model:
        raise JacobianLensError(
            f"the Jacobian Lens was fitted on a model of width {jacobians.d_model}, but "
            f"{host.name!r} has width {host.d_model}; pass the lens of this model"
        )
    last = host.n_layers - 1
    outside = [layer for layer in jacobians.layers if not 0 <= layer < max(last, 1)]
    if outside:
        raise JacobianLensError(
            f"the Jacobian Lens has matrices for layers {outside}, but {host.name!r} has layers 0 "
            f"to {last}, the last of which needs none; pass the lens of this model"
        )
    target = jacobians.metadata.get("target_layer", last)
    if target != last:
        raise JacobianLensError(
            f"the Jacobian Lens maps to the output of layer {target!r}, but the final norm of "
            f"{host.name!r} reads that of layer {last}; fit it without a target layer of its own"
        )


def _check_name(jacobians: Jacobians, host: Host) -> None:
    recorded = jacobians.metadata.get("model_name")
    if isinstance(recorded, str) and _short(recorded) != _short(host.name):
        raise JacobianLensError(
            f"the Jacobian Lens was fitted on {recorded!r}, but the model is {host.name!r}; pass "
            "the lens of this model, or jacobian_lens(..., check=False) if it is the same model "
            "under another name"
        )


def _short(name: str) -> str:
    """A model's name without the folder or the organisation, as HookedTransformer writes it."""
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].casefold()
