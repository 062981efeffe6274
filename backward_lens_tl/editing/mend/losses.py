"""What MEND is trained to minimise, through the edited forward pass.

    L = c_edit NLL(target | outer prompt, edited) + c_locality KL(original || edited)

The outer prompt is the request's own or a paraphrase; the divergence is the mean over all positions
of prompts that the edit should leave unchanged. Both are differentiated through
`x @ W + x @ dW`, while the pairs that `dW` is computed from are held fixed. The model's parameters
do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.forward import selected_logits
from backward_lens_tl.capture.interventions import adding, requiring_grad
from backward_lens_tl.capture.prompts import PromptBatch, pad_prompts
from backward_lens_tl.editing.mend.data import DrawnEdit
from backward_lens_tl.editing.mend.hypernetwork import MENDEditor
from backward_lens_tl.editing.spanning_pairs import SpanningPairs, spanning_pairs
from backward_lens_tl.models import Host
from backward_lens_tl.models.resumption import RepeatedPasses
from backward_lens_tl.models.sites import MatrixSite


def edit_losses(
    host: Host, sites: Sequence[MatrixSite], editor: MENDEditor, drawn: Sequence[DrawnEdit]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute both losses, the mean over several edits.

    All edits' prompts go through the model together, each under its own edit.

    Args:
        host: The model.
        sites: The matrices that are edited.
        editor: The editor; the losses are differentiable in its parameters.
        drawn: The edits, each with the same number of locality prompts.

    Returns:
        The negative log-likelihood of the outer examples, and the divergence from the unedited
        model on the locality prompts, in nats.
    """
    pairs = spanning_pairs(host, [each.request for each in drawn], sites)
    outer = Continuations.of(
        host, [each.outer.prompt for each in drawn], [each.outer.target for each in drawn]
    )
    # In a separate pass: there are many locality prompts, and they are often shorter.
    others = pad_prompts(host, [row for each in drawn for row in each.locality])
    passes = RepeatedPasses(host, min(site.layer for site in sites))
    with torch.no_grad(), passes.next():
        before = _real_logits(host, others).log_softmax(-1)
    with requiring_grad((), among=host.trained()), edited(editor, pairs, sites):
        nll = outer.nll(outer.logits(host)).mean()
        with passes.next():
            after = _real_logits(host, others).log_softmax(-1)
    return nll, _divergence(before, after, others.mask, len(drawn))


@contextmanager
def edited(
    editor: MENDEditor, pairs: Sequence[SpanningPairs], sites: Sequence[MatrixSite]
) -> Iterator[None]:
    """Edit a model for passes whose prompts belong to several edits, with equally many for each.

    Args:
        editor: The editor.
        pairs: The pairs that span the gradients of the edits' requests, at each matrix.
        sites: The matrices.

    Yields:
        Nothing; the model is edited inside the context.
    """
    with ExitStack() as hooks:
        for own, site in zip(pairs, sites, strict=True):
            hooks.enter_context(adding(site, partial(_addition, *editor.factors(own))))
        yield


def _addition(
    left: Float[Tensor, "edit pair d_in"],
    right: Float[Tensor, "edit pair d_out"],
    inputs: Float[Tensor, "*rows d_in"],
) -> Float[Tensor, "*rows d_out"]:
    """`x @ dW` with the edit of each prompt."""
    by_edit = inputs.reshape(len(left), -1, inputs.shape[-1]).to(left)
    added = (by_edit @ left.mT) @ right
    return added.reshape(*inputs.shape[:-1], -1)


def _real_logits(host: Host, batch: PromptBatch) -> Float[Tensor, "n d_vocab"]:
    """The logits at all positions of all prompts in one list, without padding."""

    def real(values: Tensor) -> Tensor:
        return values[batch.mask.to(values.device)][None]

    return selected_logits(host, batch, real)[0]


def _divergence(
    before: Float[Tensor, "n d_vocab"],
    after: Float[Tensor, "n d_vocab"],
    mask: Bool[Tensor, "row pos"],
    n_edits: int,
) -> Float[Tensor, ""]:
    """`KL(before || after)` of log-probabilities, the mean over an edit's positions, then edits."""
    lengths = mask.reshape(n_edits, -1).sum(1)
    own = (before.exp() * (before - after)).sum(-1).split(lengths.tolist())
    return torch.stack([each.mean() for each in own]).mean()
