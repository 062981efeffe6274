"""The main things that a batch writes into each layer, as tokens, neurons and prompts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import checked_count
from backward_lens_tl.analysis.neurons import capture_of
from backward_lens_tl.capture.directions import PrincipalDirections
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.readout.requested import ProjectionLike, as_projection
from backward_lens_tl.readout.vectors import VectorReadout, read_vectors
from backward_lens_tl.result import BackwardLensResult

if TYPE_CHECKING:
    import pandas as pd

_WHOLE = "whole"


def principal_directions(
    model: nn.Module,
    capture: GradientCapture | BackwardLensResult,
    k: int = 3,
    *,
    matrix: str = "W_out",
    n_tokens: int = 5,
    n_neurons: int = 5,
    projection: ProjectionLike = "logit_lens",
) -> pd.DataFrame:
    """The main directions of a batch's gradient in each layer, as tokens and neurons.

    The gradient of the summed loss is `sum_j s_j u_j^T v_j` with singular values `s_j`, unit
    vectors `u_j` in the space of the matrix's inputs and `v_j` in that of its outputs. A step of
    gradient descent adds `-s_j v_j` to the output for inputs along `u_j`. Signs are those for which
    `x_i . u_j` is positive at the position that contributes most.

    Args:
        model: The model that the gradients belong to.
        capture: The gradients of the batch, or a result of `backward_lens`.
        k: Number of directions in each layer; fewer if the gradient has a lower rank.
        matrix: Name of the matrix.
        n_tokens: Number of tokens at either end of a reading.
        n_neurons: Number of neurons.
        projection: One projection, as in `backward_lens`.

    Returns:
        One row per layer and direction, the largest direction of each layer first:

        - `matrix`, `layer`, and `part`, the expert or head that the direction belongs to, `"whole"`
          if the matrix is not divided;
        - `direction` (0 for the largest), its `singular_value`, and `energy`, its share of the
          squared norm of the gradient of the matrix;
        - `top_tokens` and `bottom_tokens`, lists of texts, best and smallest first. For `W_out`
          and `W_O`, of the update `-v_j`: what the output gains and loses for inputs along `u_j`.
          For other matrices, of `u_j`: which inputs the direction responds to;
        - `neurons` and `neuron_weights`, lists: the largest entries of the other side, `u_j` for
          `W_out` and `W_O` (which neurons write the tokens), `-v_j` for other matrices (which
          neurons respond more, or less if negative, to the tokens). Neurons of attention are
          numbered over concatenated heads;
        - `prompt_shares`, the fraction of the singular value that each prompt of the batch
          contributes, a list that sums to 1, with negative entries for prompts that weaken it;
        - `prompt`, `position`, `token` and `share` of the position that contributes most.

        A layer without a gradient has no rows.

    Raises:
        InputError: If an argument is not usable, the matrix was not captured or its gradient is
            zero in all layers, or the gradients come from a model of another width.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts, targets = ["Messi plays for", "Rome is in"], [" Paris", " Greece"]
        >>> result = blt.backward_lens(model, prompts, targets)
        >>> table = blt.analysis.principal_directions(model, result, k=2)
        >>> last = table[table["layer"] == 7]
        >>> [tokens[0] for tokens in last["top_tokens"]], last["prompt"].tolist()
        ([' Greece', ' Paris'], [1, 0])
    """
    import pandas as pd

    found = capture_of(capture, model)
    k, n_tokens = checked_count("k", k), checked_count("n_tokens", n_tokens)
    n_neurons = checked_count("n_neurons", n_neurons)
    lens = as_projection(projection, host_of(model))
    read = partial(read_vectors, model, projection=lens, matrix=matrix, k=n_tokens)
    rows: list[dict[str, Any]] = []
    for layer in [each.layer for each in found if each.matrix == matrix] or found.layers[:1]:
        total = found[matrix, layer].total()  # an error if it was not captured
        for place, main in enumerate(_largest(total, k)):
            rows.append(
                {
                    "matrix": matrix,
                    "layer": layer,
                    "part": main.part,
                    "direction": place,
                    "singular_value": main.value,
                    "energy": main.value**2 / main.square,
                    **_readings(read(main.resid, layer=layer)),
                    **_neurons(main, n_neurons),
                    **_carriers(found, main),
                }
            )
    if not rows:
        raise InputError(
            f"the gradient of {matrix} is zero in all captured layers; pass another matrix"
        )
    return pd.DataFrame(rows)


class _Direction(NamedTuple):
    """One direction of the gradient of a matrix, an expert or a head.

    Attributes:
        part: What it belongs to.
        value: Its singular value.
        square: The squared norm of the gradient of the matrix.
        resid: The side of width `d_model`, as an update reads.
        neurons: The other side.
        contributions: What each position of the batch contributes.
    """

    part: str
    value: float
    square: float
    resid: Float[Tensor, "d_model"]
    neurons: Float[Tensor, "d_hidden"]
    contributions: Float[Tensor, "n"]


def _largest(total: MatrixGradient, k: int) -> list[_Direction]:
    """The `k` largest directions of all parts; their singular vectors are those of the matrix."""
    parts = [
        (name, gradient.mask[0], gradient.principal_directions(k))
        for name, gradient in _parts(total)
    ]
    square = sum(_square(main) for _, _, main in parts)
    every = [
        _direction(name, main, place, square, mask)
        for name, mask, main in parts
        for place in range(len(main.values))
    ]
    return sorted(every, key=lambda direction: -direction.value)[:k]


def _parts(total: MatrixGradient) -> list[tuple[str, MatrixGradient]]:
    if total.has_joint_factors:
        return [(_WHOLE, total)]
    if total.n_experts is not None:
        return [(f"expert {index}", total.expert(index)) for index in range(total.n_experts)]
    return [(f"head {index}", total.head(index)) for index in range(total.n_heads or 0)]


def _square(main: PrincipalDirections) -> float:
    """The squared norm of the gradient; 0 if it has no directions."""
    return float((main.values.square() / main.energy)[:1].sum())


def _direction(
    part: str, main: PrincipalDirections, place: int, square: float, mask: Tensor
) -> _Direction:
    # The update is negative on one side: on that of the output.
    sign = 1 if main.reads_residual else -1
    contributions = main.contributions.new_zeros(len(mask))
    contributions[mask] = main.contributions[place]
    return _Direction(
        part,
        float(main.values[place]),
        square,
        sign * main.resid[place],
        -sign * main.neurons[place],
        contributions,
    )


def _readings(read: VectorReadout) -> dict[str, Any]:
    return {"top_tokens": read.top_tokens, "bottom_tokens": read.bottom_tokens}


def _neurons(main: _Direction, n: int) -> dict[str, Any]:
    chosen = main.neurons.abs().argsort(descending=True, stable=True)[:n]
    return {"neurons": chosen.tolist(), "neuron_weights": main.neurons[chosen].tolist()}


def _carriers(capture: GradientCapture, main: _Direction) -> dict[str, Any]:
    """Which prompts and which position contribute."""
    prompts, positions = capture.mask.nonzero(as_tuple=True)
    shares = main.contributions / main.value
    by_prompt = shares.new_zeros(len(capture.mask)).index_add_(0, prompts, shares)
    place = int(shares.argmax())
    prompt, position = int(prompts[place]), int(positions[place])
    return {
        "prompt": prompt,
        "position": position,
        "token": capture.str_tokens[prompt][position],
        "share": float(shares[place]),
        "prompt_shares": by_prompt.tolist(),
    }
