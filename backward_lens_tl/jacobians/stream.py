"""Where in the residual stream the weight matrices read and write."""

from __future__ import annotations

from contextlib import ExitStack
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from backward_lens_tl.models import Host, probe_tokens
from backward_lens_tl.models.hooks import hooked
from backward_lens_tl.models.sites import ATTENTION_MATRICES, READING_MATRICES, MatrixSite

_SAME_DIRECTION = 0.999
"""Cosine of a matrix's output and what joins the stream; it is 1 if only a scale comes between."""


def block_of(host: Host, matrix: str, layer: int) -> int:
    """The block whose Jacobian carries a matrix's inputs or outputs to the last layer.

    Args:
        host: The model.
        matrix: The matrix: its inputs if it reads the residual stream, else its outputs.
        layer: Its layer.

    Returns:
        The first block whose output the residual stream passes at that point or later; -1 for the
        embedding.
    """
    is_read = matrix in READING_MATRICES
    reads_before = matrix in ATTENTION_MATRICES or is_parallel(host)
    return layer - 1 if is_read and reads_before else layer


def is_parallel(host: Host) -> bool:
    """Whether attention and MLP read the same point of the residual stream."""
    return bool(getattr(host.model.cfg, "parallel_attn_mlp", False))


_POST_NORMS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_post_norms(host: Host) -> bool:
    """Whether a norm comes between the matrices that write and the residual stream.

    Args:
        host: The model.

    Returns:
        Whether what `W_O` of the first layer writes reaches the stream in another direction. It is
        measured once; false while hooks of the caller are on the model, which would see the tokens.
    """
    if host.model not in _POST_NORMS:
        if host.hooked_modules:
            return False
        _POST_NORMS[host.model] = _measured(host)
    return _POST_NORMS[host.model]


@torch.no_grad()
def _measured(host: Host) -> bool:
    [site] = host.sites(0, ["W_O"])
    if not isinstance(site, MatrixSite) or site.joins is None:
        return False
    seen: list[Tensor] = []
    tokens = probe_tokens(host.d_vocab, host.n_ctx, host.vocabulary.special_ids).to(host.device)
    with ExitStack() as stack, host.own_precision():
        for tap in (site.output, site.joins.tap):
            stack.enter_context(hooked(tap, seen.append))
        host.logits_of(tokens, lambda values: values[:, -1:])
    rows = [
        each.reshape(-1, host.d_model).float() for each in seen if each.shape[-1] == host.d_model
    ]
    if len(rows) != 2 or rows[0].shape != rows[1].shape:
        return False  # the outputs of heads, or a point that the model does not expose
    cosines = torch.cosine_similarity(rows[0], rows[1])
    return bool(cosines.min() < _SAME_DIRECTION)
