"""Refuse a Jacobian Lens that was fitted on another model."""

from __future__ import annotations

from importlib.metadata import version
from weakref import WeakKeyDictionary

from torch import nn

from backward_lens_tl.errors import JacobianLensError, warn
from backward_lens_tl.jacobians.agreement import agreement
from backward_lens_tl.jacobians.average import WEIGHTS, Jacobians
from backward_lens_tl.models import Host

_CHECKED: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Jacobians, None]] = WeakKeyDictionary()


def check_fits(jacobians: Jacobians, host: Host) -> None:
    """Refuse a lens that was fitted on another model; each pair of both is checked once.

    While hooks of the caller are on the model, which would see the text of the probe, only the
    sizes and the recorded name are compared, with a warning.

    Args:
        jacobians: The matrices of the lens.
        host: The model.

    Raises:
        JacobianLensError: If the lens has another width, a layer that the model lacks, or another
            last layer, records another model, or does not agree with the model's Jacobians.
    """
    check_sizes(jacobians, host)
    checked = _CHECKED.setdefault(host.model, WeakKeyDictionary())
    if jacobians in checked:
        return
    _check_name(jacobians, host)
    if host.hooked_modules:
        warn(
            f"the Jacobian Lens was not compared with {host.name!r}, because hooks are on the "
            "model; read a vector with this lens once before they are added"
        )
        return
    if host.n_layers > 1:
        agreement(jacobians, host).check(host.name)
    _check_weights(jacobians, host)
    checked[jacobians] = None


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


def _check_weights(jacobians: Jacobians, host: Host) -> None:
    """Warn if the model has other weights than those that a fit recorded."""
    recorded = jacobians.metadata.get(WEIGHTS)
    # A fit is made on a bridge with raw weights. Other classes, dtypes and processed weights have
    # other fingerprints, and so do other versions of TransformerLens, whose bridges add biases of
    # zeros or do not.
    installed = version("transformer-lens")
    fitted_as = (
        jacobians.metadata.get("fit_dtype"),
        jacobians.metadata.get("model_system"),
        jacobians.metadata.get("transformer_lens_version", installed),
    )
    dtype = str(host.model.W_U.dtype).removeprefix("torch.")
    own = dtype, type(host.model).__name__, installed
    if recorded is None or fitted_as != own or host.processed_matrices:
        return
    if recorded != host.fingerprint():
        warn(
            f"the Jacobian Lens was fitted on {host.name!r} with other weights, such as before an "
            "edit or fine-tuning; its averages may be slightly off"
        )
