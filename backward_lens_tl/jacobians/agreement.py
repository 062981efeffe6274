"""Compare the matrices of a Jacobian Lens with the Jacobians of a model.

Files of lenses need not say which model they belong to. The fit's estimator, on one short text and
for a few random directions `u`,

    u^T J_l = mean over t of d (sum over t' >= t of u . h_final[t']) / d h_l[t]

gives rows that agree with those of the lens up to the difference between one text and the average
over many. The multiple of `u` in them is left out: along the residual stream, every model passes
most of `u` on. What remains correlates by 0.7 to 0.97 in late layers and, for fits on few texts, by
0.1 to 0.8 in early ones; with the lens of an unrelated model, by less than 0.05.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backward_lens_tl.errors import InputError, JacobianLensError
from backward_lens_tl.jacobians.average import Jacobians
from backward_lens_tl.models import Host
from backward_lens_tl.models.hooks import hooked

_TEXT = (
    "The old town lies on a river, between two hills that are covered with woods. In the year 1872 "
    "a bridge was built there, and since then people from many other places have come to live and "
    "work in it."
)
_N_TOKENS = 40
_SKIP = 16
"""Positions at the start that fits leave out; a third of the tokens if there are few."""

_FEWEST_TOKENS = 8

_FEWEST_DIRECTIONS = 8
_ENTRIES = 4096
"""Narrow models get more directions, up to this many entries in all."""

_AGREEMENT, _ERRORS = 0.1, 6
"""A lens is unrelated to the model if no layer correlates by 0.1, or by this number of standard
errors, `1 / sqrt(entries)`. Lenses of other models and of a permuted residual stream reach 0.05
with 4096 entries, and 0.17 with the 576 of a model of width 24; fits on as few as four texts have
0.4 or more in some layer."""

_ORDER = 0.025
"""Mean over layers of what the best matrix of any layer correlates more than the layer's own.
It is at most 0.015 for fits on four texts, and at least 0.03 if all layers are one off."""

_TINY = 1e-5
"""Size, relative to `u`, of rows that are a multiple of `u` up to rounding."""


@dataclass(frozen=True)
class Agreement:
    """How well a lens agrees with a model on a probe.

    Attributes:
        layers: The layers of the lens.
        correlations: Correlation of the model's own rows of each layer (first axis) and those of
            each of the lens's matrices (second axis).
        transposed: Correlation with the layer's own matrix if it is transposed.
        n_entries: Number of entries that were correlated.
    """

    layers: tuple[int, ...]
    correlations: Float[Tensor, "layer layer"]
    transposed: Float[Tensor, "layer"]
    n_entries: int

    @property
    def own(self) -> Float[Tensor, "layer"]:
        """Correlation of each layer with its own matrix."""
        return self.correlations.diagonal()

    def check(self, name: str) -> None:
        """Refuse a lens of another model.

        Args:
            name: The model's name.

        Raises:
            JacobianLensError: If the matrices are unrelated to the model, transposed, or in another
                order.
        """
        advice = (
            "pass the lens of this model, or jacobian_lens(..., check=False) to read it through "
            "another's on purpose"
        )
        own, transposed = float(self.own.mean()), float(self.transposed.mean())
        least = max(_AGREEMENT, _ERRORS / math.sqrt(self.n_entries))
        if transposed > max(own, least):
            raise JacobianLensError(
                f"the matrices of the Jacobian Lens are transposed: on a short text, the Jacobians "
                f"of {name!r} correlate with them by {own:.2f}, and with their transposes by "
                f"{transposed:.2f}; J_l[a, b] must be d h_final[a] / d h_l[b]"
            )
        if not float(self.own.max()) >= least:  # NaN fails
            raise JacobianLensError(
                f"the Jacobian Lens does not belong to {name!r}: on a short text, the model's own "
                f"Jacobians correlate with its matrices by {float(self.own.max()):.2f} at most, "
                f"and with those of a fit by {least:.2f} or more; {advice}"
            )
        best = self.correlations.max(1)
        if float((best.values - self.own).mean()) > _ORDER:
            worst = int((best.values - self.own).argmax())
            layer, other = self.layers[worst], self.layers[int(best.indices[worst])]
            raise JacobianLensError(
                f"the layers of the Jacobian Lens are not those of {name!r}: on a short text, the "
                f"model's Jacobian of layer {layer} correlates with the lens's by "
                f"{float(self.own[worst]):.2f}, but with its matrix of layer {other} by "
                f"{float(best.values[worst]):.2f}; {advice}"
            )


def agreement(jacobians: Jacobians, host: Host) -> Agreement:
    """Compare a lens with the model's own Jacobians on a short text.

    It takes a forward and a backward pass over a batch of 8 times 40 tokens, or more in models that
    are narrower than 512.

    Args:
        jacobians: The matrices of the lens.
        host: The model, without hooks of the caller.

    Returns:
        The correlations.
    """
    directions = _directions(host.d_model)
    rows = _own_rows(host, jacobians.layers, directions)
    own = _normed([_beyond(directions, rows[layer]) for layer in jacobians.layers])
    matrices = [jacobians.matrices[layer].float() for layer in jacobians.layers]
    theirs, turned = (
        _normed([_beyond(directions, directions @ matrix) for matrix in each])
        for each in (matrices, [matrix.T for matrix in matrices])
    )
    return Agreement(jacobians.layers, own @ theirs.T, (own * turned).sum(1), directions.numel())


def _directions(d_model: int) -> Float[Tensor, "n d_model"]:
    """Random directions of mean 0, which a model with centered weights passes on, too."""
    count = max(_FEWEST_DIRECTIONS, min(d_model, _ENTRIES // d_model))
    found = torch.randn(count, d_model, generator=torch.Generator().manual_seed(0))
    return found - found.mean(1, keepdim=True)


def _beyond(
    directions: Float[Tensor, "n d_model"], rows: Float[Tensor, "n d_model"]
) -> Float[Tensor, "entries"]:
    """Rows without their multiple of the directions; zeros if nothing else is left."""
    size = directions.square().sum()
    rest = rows - (rows * directions).sum() / size * directions
    rest = rest - rest.mean(1, keepdim=True)
    is_tiny = rest.norm() <= _TINY * size.sqrt()
    return torch.zeros_like(rest).flatten() if bool(is_tiny) else rest.flatten()


def _normed(vectors: list[Tensor]) -> Float[Tensor, "layer entries"]:
    """Vectors of length 1, with a further entry that is 1 for a zero vector and else 0."""
    stacked = torch.stack(vectors)
    norms = stacked.norm(dim=1, keepdim=True)
    is_zero = norms == 0
    return torch.cat([stacked / norms.masked_fill(is_zero, 1), is_zero.float()], dim=1)


def _own_rows(
    host: Host, layers: tuple[int, ...], directions: Float[Tensor, "n d_model"]
) -> dict[int, Float[Tensor, "n d_model"]]:
    """`u^T J_l` of the model itself, on one text."""
    tokens = _probe_tokens(host)
    n_tokens = tokens.shape[1]
    valid = slice(min(_SKIP, n_tokens // 3), max(n_tokens - 1, 1))
    streams: dict[int, Tensor] = {}

    def keep(layer: int, stream: Tensor) -> Tensor:
        if not streams:
            stream = stream.detach().requires_grad_()
        streams[layer] = stream
        return stream

    last = host.n_layers - 1
    with ExitStack() as stack, torch.enable_grad(), host.own_precision():
        for layer in (*layers, last):
            tap = host.hook_points[f"blocks.{layer}.hook_resid_post"].tap
            stack.enter_context(hooked(tap, partial(keep, layer)))
        host.logits_of(tokens.expand(len(directions), -1), lambda values: values[:, -1:])
    target = streams.pop(last)
    upstream = torch.zeros_like(target)
    upstream[:, valid] = directions[:, None].to(target)
    found = torch.autograd.grad(target, list(streams.values()), upstream)
    return {
        layer: gradient[:, valid].float().mean(1).cpu()
        for layer, gradient in zip(streams, found, strict=True)
    }


def _probe_tokens(host: Host) -> Int[Tensor, "1 pos"]:
    """A short text; random tokens for a model without a tokenizer, or with another's."""
    wanted = min(_N_TOKENS, host.n_ctx)
    ids: list[int] = []
    with suppress(InputError):  # no tokenizer, or one with tokens that the embedding lacks
        ids = host.tokenize(_TEXT, None)[:wanted]
    if len(ids) < min(_FEWEST_TOKENS, wanted):
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(host.d_vocab, (wanted,), generator=random).tolist()
    return torch.tensor([ids], device=host.device)
