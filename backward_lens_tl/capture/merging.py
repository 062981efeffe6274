"""Merge what several microbatches recorded into the gradients of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from backward_lens_tl.capture.forward_backward import Recorded
from backward_lens_tl.capture.hook_points import AttentionGradient
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.predictions import Predictions
from backward_lens_tl.capture.prompts import PromptBatch


class Merger:
    """Merges microbatches and keeps factors in the requested dtype and on the requested device.

    Args:
        batch: All prompts, on the device where factors are kept.
        memory: How factors are kept.
    """

    def __init__(self, batch: PromptBatch, memory: Memory) -> None:
        self._batch, self._memory = batch, memory
        self._merged: Recorded | None = None

    @property
    def merged(self) -> Recorded:
        """Everything that was added; at least one microbatch."""
        if self._merged is None:
            raise LookupError("nothing was added")
        return self._merged

    def add(self, part: Recorded, prompts: Sequence[int]) -> None:
        """Add one microbatch.

        Args:
            part: What it recorded.
            prompts: The indices of its prompts.
        """
        before = self._merged
        if len(prompts) < len(self._batch.mask) or not self._memory.keeps_as_computed:
            part = _Placer(self._batch, self._memory, prompts).place(before, part)
        if before is not None:
            gradients = {**before.gradients, **part.gradients}
            part = replace(
                part, gradients=gradients, attention={**before.attention, **part.attention}
            )
        self._merged = part


class _Placer:
    """Writes what one microbatch recorded into tensors for all prompts.

    Args:
        batch: All prompts.
        memory: How factors are kept.
        prompts: The indices of the microbatch's prompts.
    """

    def __init__(self, batch: PromptBatch, memory: Memory, prompts: Sequence[int]) -> None:
        self._batch, self._memory = batch, memory
        self._device = batch.mask.device
        self._prompts = torch.tensor(prompts, device=self._device)
        # Keyed by ids of tensors that outlive this object.
        self._written: dict[tuple[int | None, int], Tensor] = {}

    def place(self, whole: Recorded | None, part: Recorded) -> Recorded:
        """Write a microbatch into the tensors of all prompts, in place where they exist.

        Args:
            whole: The microbatches merged so far.
            part: What the microbatch recorded.

        Returns:
            The microbatch's matrices and layers, with tensors for all prompts.
        """
        gradients = {} if whole is None else whole.gradients
        attention = {} if whole is None else whole.attention
        targets = part.targets
        if targets is not None:
            kept = None if whole is None else whole.targets
            targets = self._put(kept, targets, by_position=(1,), fill=-1)
        return Recorded(
            gradients={
                key: self._gradient(gradients.get(key), gradient)
                for key, gradient in part.gradients.items()
            },
            loss=self._put(None if whole is None else whole.loss, part.loss),
            targets=targets,
            predictions=self._predictions(
                None if whole is None else whole.predictions, part.predictions
            ),
            # With hook points there is only one microbatch.
            hook_gradients={
                name: replace(
                    point, value=point.value.to(self._device), vjp=point.vjp.to(self._device)
                )
                for name, point in part.hook_gradients.items()
            },
            attention={
                layer: self._attention(attention.get(layer), pattern)
                for layer, pattern in part.attention.items()
            },
        )

    def _gradient(self, whole: MatrixGradient | None, part: MatrixGradient) -> MatrixGradient:
        experts = part.experts
        if experts is not None:
            kept = None if whole is None else whole.experts
            experts = self._put(kept, experts, by_position=(1,), fill=-1)
        # Before the VJPs themselves are written; it may start as a copy of them.
        joined = self._joined(whole, part)
        return replace(
            part,
            inputs=self._shared_inputs(None if whole is None else whole.inputs, part.inputs),
            vjps=self._factor(None if whole is None else whole.vjps, part.vjps),
            mask=self._batch.mask,
            experts=experts,
            joined_vjps=joined,
        )

    def _shared_inputs(self, whole: Tensor | None, part: Tensor) -> Tensor:
        """Matrices with the same inputs keep sharing one tensor."""
        key = (None if whole is None else id(whole), id(part))
        if key not in self._written:
            if whole is not None and any(before == id(whole) for before, _ in self._written):
                whole = whole.clone()  # their inputs differ from this microbatch on
            self._written[key] = self._factor(whole, part)
        return self._written[key]

    def _joined(self, whole: MatrixGradient | None, part: MatrixGradient) -> Tensor | None:
        """VJPs at the residual stream; `None` if they equal the matrix's own."""
        if part.joined_vjps is None and (whole is None or whole.joined_vjps is None):
            return None
        kept = None if whole is None else whole.joined_vjps
        if kept is None and whole is not None:
            kept = whole.resid_vjps.clone()
        return self._factor(kept, part.resid_vjps)

    def _predictions(self, whole: Predictions | None, part: Predictions) -> Predictions:
        return Predictions(
            **{
                field.name: self._put(
                    None if whole is None else getattr(whole, field.name),
                    getattr(part, field.name),
                )
                for field in fields(Predictions)
            }
        )

    def _attention(
        self, whole: AttentionGradient | None, part: AttentionGradient
    ) -> AttentionGradient:
        kept = None if whole is None else whole.scores_vjp
        return replace(part, scores_vjp=self._put(kept, part.scores_vjp, by_position=(2, 3)))

    def _factor(self, whole: Tensor | None, part: Tensor) -> Tensor:
        dtype = self._memory.factor_dtype
        return self._put(whole, part, by_position=(1,), dtype=dtype)

    def _put(
        self,
        whole: Tensor | None,
        part: Tensor,
        *,
        by_position: tuple[int, ...] = (),
        fill: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Write a tensor into that of all prompts, which is allocated on first use."""
        if whole is None:
            n_prompts, n_positions = self._batch.mask.shape
            shape = [
                n_positions if axis in by_position else size for axis, size in enumerate(part.shape)
            ]
            shape[0] = n_prompts
            whole = part.new_full(shape, fill, dtype=dtype, device=self._device)
        cells: tuple[Tensor | slice, ...] = (self._prompts, *map(slice, part.shape[1:]))
        whole[cells] = part.to(self._device, whole.dtype)
        return whole
