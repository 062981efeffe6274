"""Trying changes of one `W_out`: what a model predicts with them, without changing a parameter.

The layers below the edited one compute the same with every change. They run once.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.interventions import adding
from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models import Host
from backward_lens_tl.models.hooks import Tap, hooked
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.resumption import can_start_at, keeping_start, started_at
from backward_lens_tl.models.sites import MatrixSite


class Trials:
    """Forward passes of some prompts, with changes of one matrix.

    The first pass, without a change, is of all layers. The others start at the matrix's layer,
    unless the model does not allow it.

    Args:
        host: The model.
        site: The matrix.
        asked: The prompts with their answers.

    Attributes:
        n_passes: Number of forward passes so far, the first one included.
        inputs: What the matrix reads.
        logits: The logits that predict the answers, without a change.
        stream: The last residual stream where they are predicted.
    """

    def __init__(self, host: Host, site: MatrixSite, asked: Continuations) -> None:
        self._host, self._site, self._asked = host, site, asked
        self.n_passes = 1
        self._start: object = None
        reads: list[Tensor] = []
        streams: list[Tensor] = []
        n_read = asked.answers.shape[1]
        self._is_resumed = can_start_at(host, site.layer)
        with ExitStack() as hooks, host.own_precision():
            hooks.enter_context(hooked(site.input, lambda values: reads.append(values.clone())))
            hooks.enter_context(hooked(_last_stream(host), lambda values: streams.append(values)))
            kept = (
                hooks.enter_context(keeping_start(host, site.layer)) if self._is_resumed else [None]
            )
            self.logits: Float[Tensor, "batch n d_vocab"] = asked.logits(host)
        if len(reads) != 1:
            raise UnsupportedModelError(
                f"{site.matrix} of layer {site.layer} was used {len(reads)} times in the forward "
                "pass; an edit is only computed where it is used exactly once"
            )
        [self._start] = kept
        device, shape = asked.batch.mask.device, asked.batch.mask.shape
        self.inputs: Float[Tensor, "batch pos d_in"] = at_least_float32(
            reads[0].reshape(*shape, -1)
        ).to(device)
        stream = streams[0].reshape(*shape, -1).to(device)
        self.stream: Float[Tensor, "batch n d_model"] = asked.batch.ends(stream, n_read)

    def logits_with(
        self, left: Float[Tensor, "d_in n"], right: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "batch n d_vocab"]:
        """The logits that predict the answers if `left @ right` is added to the matrix.

        Args:
            left: Input directions.
            right: What is written for each.

        Returns:
            The logits.
        """

        def written(reads: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
            return reads.to(left) @ left @ right

        self.n_passes += 1
        with ExitStack() as context, self._host.own_precision(), torch.no_grad():
            context.enter_context(adding(self._site, written))
            if self._is_resumed:
                context.enter_context(started_at(self._host, self._site.layer, self._start))
            return self._asked.logits(self._host)


def _last_stream(host: Host) -> Tap:
    """The last residual stream; without a final norm, the output of the last block."""
    if host.unembedding.norm is not None:
        return host.unembedding.input
    return host.hook_points[f"blocks.{host.n_layers - 1}.hook_resid_post"].tap
