"""Trying changes of one `W_out`: what a model predicts with them, without changing a parameter.

The layers below the edited one compute the same with every change. They run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.interventions import adding, requiring_grad
from backward_lens_tl.editing.shift.cells import Cells
from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models import Host
from backward_lens_tl.models.hooks import Tap, hooked
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.resumption import RepeatedPasses
from backward_lens_tl.models.sites import MatrixSite

_CLOSE = 1e-3
"""Relative difference between what a matrix writes and what joins the residual stream, above which
there is a norm or a scale in between."""


class Trials:
    """Forward passes of some prompts, with changes of one matrix.

    The first pass, without a change, is of all layers. The others start at the matrix's layer,
    unless the model does not allow it.

    Args:
        host: The model.
        site: The matrix.
        cells: The prompts, and the positions where the matrix is edited.

    Attributes:
        n_passes: Number of forward passes so far, the first one included.
        reads: What the matrix reads at each cell.
        logits: The logits that predict each cell's token, without a change.
        stream: The last residual stream where it is predicted.
    """

    def __init__(self, host: Host, site: MatrixSite, cells: Cells) -> None:
        self._host, self._site, self._cells = host, site, cells
        self.n_passes = 1
        self._passes = RepeatedPasses(host, site.layer)
        with ExitStack() as hooks, host.own_precision():
            read = hooks.enter_context(_keeping(site.input))
            wrote = hooks.enter_context(_keeping(site.output, before_others=True))
            joined = hooks.enter_context(_keeping(site.joins.tap)) if site.joins else wrote
            streams = hooks.enter_context(_keeping(_last_stream(host)))
            hooks.enter_context(self._passes.next())
            self.logits: Float[Tensor, "n d_vocab"] = self._logits()
        if len(read) != 1:
            raise UnsupportedModelError(
                f"{site.matrix} of layer {site.layer} was used {len(read)} times in the forward "
                "pass; an edit is only computed where it is used exactly once"
            )
        reads, wrote_there, joined_there = (
            cells.at_position(self._by_position(each[0])) for each in (read, wrote, joined)
        )
        self.reads: Float[Tensor, "n d_in"] = reads
        self._is_direct = bool((joined_there - wrote_there).norm() <= _CLOSE * wrote_there.norm())
        ends = cells.asked.batch.ends(self._by_position(streams[0]), cells.asked.answers.shape[1])
        self.stream: Float[Tensor, "n d_model"] = cells.predicted(ends)

    @property
    def layer(self) -> int:
        """The matrix's layer."""
        return self._site.layer

    def logits_with(
        self, left: Float[Tensor, "d_in n"], right: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "n d_vocab"]:
        """The logits that predict each cell's token if `left @ right` is added to the matrix.

        Args:
            left: Input directions.
            right: What is written for each.

        Returns:
            The logits.
        """

        def written(reads: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
            return reads.to(left) @ left @ right

        with torch.no_grad(), adding(self._site, written):
            return self._again()

    def before_join(self, gradients: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_out"]:
        """Gradients at the output of the matrix, from those where it joins the residual stream.

        They differ in models with a norm or a scale in between; this takes another forward pass
        there.

        Args:
            gradients: Gradients at the stream, at each cell's position.

        Returns:
            The gradients at the matrix.
        """
        if self._is_direct or self._site.joins is None:
            return gradients
        leaves: list[Tensor] = []

        def begin(output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        nothing_else = requiring_grad((), among=self._host.trained())
        with (
            torch.enable_grad(),
            nothing_else,
            hooked(self._site.output, begin, before_others=True),
            _keeping(self._site.joins.tap, end=Tensor.detach) as joined,
        ):
            self._again()
            there = self._cells.at_position(self._by_position(joined[0]))
            [found] = torch.autograd.grad(there, leaves, gradients.to(there))
        return self._cells.at_position(self._by_position(found))

    def _again(self) -> Float[Tensor, "n d_vocab"]:
        self.n_passes += 1
        with self._host.own_precision(), self._passes.next():
            return self._logits()

    def _logits(self) -> Float[Tensor, "n d_vocab"]:
        return self._cells.predicted(self._cells.asked.logits(self._host))

    def _by_position(self, values: Tensor) -> Float[Tensor, "batch pos d"]:
        """Activations as `[batch, pos, d]`: some MLPs run over all positions as one list."""
        mask = self._cells.asked.batch.mask
        return at_least_float32(values.reshape(*mask.shape, -1)).to(mask.device)


@contextmanager
def _keeping(
    tap: Tap,
    *,
    end: Callable[[Tensor], Tensor | None] = lambda _: None,
    before_others: bool = False,
) -> Iterator[list[Tensor]]:
    """Keep copies of what passes a tap; `end` may replace it afterwards."""
    kept: list[Tensor] = []

    def keep(values: Tensor) -> Tensor | None:
        kept.append(values.clone())  # later operations may write into it
        return end(values)

    with hooked(tap, keep, before_others=before_others):
        yield kept


def _last_stream(host: Host) -> Tap:
    """The last residual stream; without a final norm, the output of the last block."""
    if host.unembedding.norm is not None:
        return host.unembedding.input
    return host.hook_points[f"blocks.{host.n_layers - 1}.hook_resid_post"].tap
