"""The neurons of all layers that an update changes most, next to their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import check_choice, checked_count
from backward_lens_tl.analysis.neurons import capture_of
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import ATTENTION_MATRICES, MATRIX_NAMES
from backward_lens_tl.readout.cells import cosines
from backward_lens_tl.readout.requested import ProjectionLike
from backward_lens_tl.readout.vectors import read_vectors
from backward_lens_tl.result import BackwardLensResult

if TYPE_CHECKING:
    import pandas as pd

_MLP_MATRICES = [matrix for matrix in MATRIX_NAMES if matrix not in ATTENTION_MATRICES]


def top_neurons(
    model: nn.Module,
    capture: GradientCapture | BackwardLensResult,
    k: int = 10,
    *,
    matrix: str = "W_out",
    batch: int = 0,
    n_tokens: int = 5,
    projection: ProjectionLike = "logit_lens",
) -> pd.DataFrame:
    """The neurons of all captured layers whose gradient is largest (paper, equations 9 and 10).

    A neuron of the MLP has a row in `W_out`, which it adds to the residual stream, and a column in
    `W_in` and `W_gate`, which it responds to. Its gradient is the same row or column of the
    matrix's gradient; the update is the negative gradient, and a step of gradient descent adds it
    times the learning rate.

    The sign of an update has to be read together with the neuron's activation. Where the activation
    is negative, the neuron subtracts its row of `W_out`, so the tokens at the bottom of the update
    are added to its output. `effect` says which end it is.

    Args:
        model: The model that the gradients belong to.
        capture: The gradients, or a result of `backward_lens`, also a loaded one.
        k: Number of neurons; fewer if fewer have a gradient.
        matrix: `"W_out"`, `"W_in"` or `"W_gate"`.
        batch: Which prompt.
        n_tokens: Number of tokens at either end of a reading.
        projection: One projection, as in `backward_lens`.

    Returns:
        One row per neuron, the largest gradient first:

        - `layer` and `neuron`, its index in the hidden layer;
        - `norm` of the neuron's gradient, and `relative_norm`, the same divided by the norm of its
          weights: a step with learning rate `lr` changes them by `lr` times this fraction;
        - `cosine` of the update and the weights: positive if the update makes them longer;
        - `position` and `token` of the position that contributes most to the gradient, and the
          neuron's `activation` there (what `W_out` reads; missing unless `W_out` was captured);
        - `effect` of the update at this position. For `W_out`, `"adds update_top"` or `"adds
          update_bottom"`: the tokens that the neuron's output gains. For `W_in` and `W_gate`,
          `"responds more"` or `"responds less"`: whether the matrix's output for this neuron grows;
        - `weight_top`, `weight_bottom`, `update_top` and `update_bottom`: tokens of the neuron's
          weights and of its update, lists of texts, best and smallest first.

    Raises:
        InputError: If an argument is not usable, the gradients come from a model of another size,
            or experts have separate factors.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> neurons = blt.analysis.top_neurons(model, result, k=3)
        >>> neurons[["layer", "neuron", "token", "effect"]].values.tolist()[0]
        [0, 43, ' for', 'adds update_top']
        >>> neurons["update_top"][0][0]
        ' Paris'
    """
    import pandas as pd

    found, host = capture_of(capture, model), host_of(model)
    check_choice("matrix", matrix, _MLP_MATRICES)
    k, n_tokens = checked_count("k", k), checked_count("n_tokens", n_tokens)
    tables = []
    for layer, neurons in _largest(found, matrix, batch, k).items():
        updates = _updates(found[matrix, layer], batch, neurons)
        weights = _weights(host, found[matrix, layer], neurons)
        read = partial(
            read_vectors, model, projection=projection, layer=layer, matrix=matrix, k=n_tokens
        )
        own, changed = read(weights), read(updates)
        columns = _numbers(found, found[matrix, layer], batch, neurons, updates, weights) | {
            "weight_top": own.top_tokens,
            "weight_bottom": own.bottom_tokens,
            "update_top": changed.top_tokens,
            "update_bottom": changed.bottom_tokens,
        }
        tables.append(pd.DataFrame(columns))
    if not tables:
        raise InputError(
            f"the gradient of {matrix} is zero in all captured layers; pass another matrix"
        )
    table = pd.concat(tables, ignore_index=True)
    return table.sort_values("norm", ascending=False, kind="stable", ignore_index=True)


def _largest(capture: GradientCapture, matrix: str, batch: int, k: int) -> dict[int, list[int]]:
    """The neurons with the `k` largest gradients that are not zero, by layer."""
    own = [gradient for gradient in capture if gradient.matrix == matrix]
    gradients = own or [capture[matrix, capture.layers[0]]]  # an error if there is none
    norms = [gradient.neuron_norms(batch).cpu() for gradient in gradients]
    places = [
        (gradient.layer, neuron)
        for gradient, lengths in zip(gradients, norms, strict=True)
        for neuron in range(len(lengths))
    ]
    flat = torch.cat(norms)
    found: dict[int, list[int]] = {}
    for index in flat.argsort(descending=True, stable=True)[:k].tolist():
        if flat[index] > 0:
            layer, neuron = places[index]
            found.setdefault(layer, []).append(neuron)
    return found


def _updates(
    gradient: MatrixGradient, batch: int, neurons: Sequence[int]
) -> Float[Tensor, "k d_model"]:
    """The negative gradient of each neuron."""
    return -at_least_float32(torch.stack([gradient.neuron(each, batch) for each in neurons]))


def _weights(
    host: Host, gradient: MatrixGradient, neurons: Sequence[int]
) -> Float[Tensor, "k d_model"]:
    """The model's own weights of each neuron."""
    [site] = find_editable(host, gradient.matrix, gradient.layer)
    weight = site.weight.in_out(site.weight.parameter.detach())
    rows = weight.T if gradient.reads_residual else weight
    factor = gradient.vjps if gradient.reads_residual else gradient.inputs
    if len(rows) != factor.shape[-1]:
        raise InputError(
            f"the gradients are of a model with {factor.shape[-1]} neurons per layer, but this "
            f"one, {host.name!r}, has {len(rows)}; pass the model that they were captured on"
        )
    return at_least_float32(rows[list(neurons)].to(factor.device))


def _numbers(
    capture: GradientCapture,
    gradient: MatrixGradient,
    batch: int,
    neurons: Sequence[int],
    updates: Float[Tensor, "k d_model"],
    weights: Float[Tensor, "k d_model"],
) -> dict[str, list[Any]]:
    """The columns of the table that hold no reading."""
    reads, real = gradient.reads_residual, gradient.mask[batch]
    vectors = gradient.spanning_set[batch, real].double()
    coefficients = (gradient.vjps if reads else gradient.inputs)[batch, real][:, list(neurons)]
    terms = coefficients.double().abs() * vectors.norm(dim=1, keepdim=True)  # [pos, k]
    places = terms.argmax(0).tolist()
    norms = updates.double().norm(dim=1)
    activations = _activations(capture, gradient.layer, batch, neurons, places)
    if reads:  # the change of the matrix's output for this neuron
        growth = (updates.double() * vectors[places]).sum(1).tolist()
        effects = ["responds more" if change > 0 else "responds less" for change in growth]
    else:
        effects = [f"adds update_{'top' if value > 0 else 'bottom'}" for value in activations]
    return {
        "layer": [gradient.layer] * len(neurons),
        "neuron": list(neurons),
        "norm": norms.tolist(),
        "relative_norm": (norms / weights.double().norm(dim=1)).tolist(),
        "cosine": cosines(updates, weights).tolist(),
        "position": places,
        "token": [capture.str_tokens[batch][place] for place in places],
        "activation": activations,
        "effect": effects,
    }


def _activations(
    capture: GradientCapture,
    layer: int,
    batch: int,
    neurons: Sequence[int],
    places: Sequence[int],
) -> list[float]:
    """What `W_out` reads of each neuron at one position each; NaN if it was not captured."""
    written = capture.gradients.get(("W_out", layer))
    if written is None:
        return [math.nan] * len(neurons)
    hidden = written.inputs[batch, written.mask[batch]]
    values: list[float] = hidden[list(places), list(neurons)].tolist()
    return values
