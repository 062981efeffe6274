"""What a shift writes for a token: the output direction of its outer product.

    embedding    e_t, the token's row of the decoding matrix                 (paper, section 7)
    transported  J_l^T C (g * (w_t - sum_u p_u w_u))                         (this package's own)
    vjp          -delta, the gradient of log p_t at the output of `W_out`

`delta` is the model's own gradient. `J_l^T` carries a gradient from the last layer to layer `l`, on
average over other texts. `w_u` are the columns of `W_U`, `g` and `C` the gain and the centering of
the final norm, and `p` the model's own prediction: with its mean column subtracted, the direction
raises the token's logit above those of the others instead of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.shift.cells import Cells
from backward_lens_tl.editing.shift.trials import Trials
from backward_lens_tl.editing.spanning_pairs import spanning_pairs
from backward_lens_tl.errors import EditError
from backward_lens_tl.jacobians.average import Jacobians
from backward_lens_tl.models import Host
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixSite

TargetEmbedding = Literal["auto", "unembed", "embed"]


def embeddings(
    host: Host, tokens: Int[Tensor, "n"], kind: TargetEmbedding
) -> Float[Tensor, "n d_model"]:
    """Rows of the decoding matrix.

    Args:
        host: The model.
        tokens: The tokens.
        kind: Whether they are columns of the unembedding or rows of the embedding. `"auto"` uses
            the embedding where both are or were one matrix, because weight processing folds the
            final norm into the unembedding.

    Returns:
        The rows, in at least float32.
    """
    if kind == "auto":
        kind = "embed" if host.is_tied else "unembed"
    vector = host.embedding_vector if kind == "embed" else host.unembedding.column
    return at_least_float32(torch.stack([vector(token) for token in tokens.tolist()]))


def transported(
    host: Host, cells: Cells, trials: Trials, jacobians: Jacobians
) -> Float[Tensor, "n d_model"]:
    """Directions that raise each token's logit above the others', carried to a layer.

    Args:
        host: The model.
        cells: The tokens.
        trials: The edited layer, and what the model predicts without an edit.
        jacobians: The average Jacobians of the layers.

    Returns:
        The directions.

    Raises:
        EditError: If there is no Jacobian for the layer.
    """
    weight = at_least_float32(host.model.W_U)
    probs = trials.logits.softmax(-1).to(weight)
    centered = weight[:, cells.tokens.to(weight.device)].T - probs @ weight.T
    at_end = host.unembedding.before_norm(centered).to(cells.tokens.device)
    return trials.before_join(carried_back(jacobians, host, trials.layer, at_end))


def carried_back(
    jacobians: Jacobians, host: Host, layer: int, vectors: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_model"]:
    """Compute `J_l^T v` for gradients at the last layer; the identity for the last layer itself.

    Args:
        jacobians: The average Jacobians.
        host: The model.
        layer: The layer.
        vectors: The gradients.

    Returns:
        The estimated gradients at the output of the layer's block.

    Raises:
        EditError: If there is no Jacobian for the layer.
    """
    if layer == host.n_layers - 1:
        return vectors
    if layer not in jacobians.layers:
        listed = ", ".join(map(str, jacobians.layers))
        raise EditError(
            f"the Jacobian Lens has matrices for layers {listed}, not for layer {layer}, which is "
            "edited; edit one of these layers, or fit a lens on all of them"
        )
    return vectors @ jacobians.matrices[layer].to(vectors)


def carried_on(
    jacobians: Jacobians | None, host: Host, layer: int, vectors: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_model"]:
    """Compute `J_l v` for vectors that are written at a layer: what they add at the last one.

    Args:
        jacobians: The average Jacobians; `None` for the identity.
        host: The model.
        layer: The layer.
        vectors: The vectors.

    Returns:
        The estimated change of the last residual stream.
    """
    if jacobians is None or layer not in jacobians.layers:
        return vectors
    return jacobians.times(vectors, layer)


def vjps(
    host: Host, cells: Cells, site: MatrixSite, requests: Sequence[TokenizedRequest]
) -> Float[Tensor, "n d_out"]:
    """`-delta` of each cell, from one forward and one backward pass.

    Args:
        host: The model.
        cells: The tokens.
        site: The matrix.
        requests: The requests of the cells.

    Returns:
        The directions. With several tokens, those of a target's earlier tokens also serve the later
        ones.
    """
    written = [
        replace(each, target=tuple(target))
        for each, target in zip(requests, cells.targets, strict=True)
    ]
    [pairs] = spanning_pairs(host, written, [site])
    return -cells.at_position(pairs.vjps)
