"""Hooks that take the factors of one matrix in the backward passes of somebody else's training.

A forward hook puts a hook on the output's gradient. Where autograd does not go, nothing is taken:
an evaluation without gradients, and whichever of the two forward passes of gradient checkpointing
does not belong to the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backward_lens_tl.capture.recorders import Hook
from backward_lens_tl.training.step_memory import StepMemory
from backward_lens_tl.training.trained_matrices import TrainedMatrix
from backward_lens_tl.training.weight_change import WeightBefore, WeightChange


@dataclass(frozen=True)
class Pair:
    """The factors of one backward pass.

    Attributes:
        x: The inputs, as the model multiplied them.
        delta: The gradient at the outputs.
        versions: The versions of both when they were taken, which writing into them changes.
    """

    x: Tensor
    delta: Tensor
    versions: tuple[int, int]

    @property
    def is_intact(self) -> bool:
        """Whether nobody has written into the factors since."""
        return (self.x._version, self.delta._version) == self.versions

    @property
    def rows(self) -> torch.Size:
        """Batch and position, or their product in modules that flatten them."""
        return self.x.shape[:2] if self.x.ndim > 2 else self.x.shape[:1]


class FactorRecorder:
    """Takes the factors of one matrix during one step.

    Args:
        matrix: The matrix.
        memory: Counts what the factors of the step take.
        copies_weight: Whether to copy the weight before the step changes it.

    Attributes:
        matrix: The matrix.
        pairs: The factors so far.
        had_no_gradient: Whether nothing that the output depends on was trained.
        before: The weight at the first forward pass of the step, if it is copied.
        is_paused: Whether the hooks do nothing.
    """

    def __init__(
        self, matrix: TrainedMatrix, memory: StepMemory, *, copies_weight: bool = False
    ) -> None:
        self.matrix = matrix
        self.pairs: list[Pair] = []
        self.had_no_gradient = False
        self.before: WeightBefore | None = None
        self.is_paused = False
        self._memory, self._copies_weight = memory, copies_weight
        self._x: Tensor | None = None

    def hooks(self) -> Iterator[Hook]:
        """`x` after the user's hooks, and `y` before them."""
        yield self.matrix.site.input, self._keep_input, False
        yield self.matrix.site.output, self._keep_output, True

    def _keep_input(self, x: Tensor) -> None:
        if self.is_paused or self._memory.is_exceeded:
            return
        self._x = x
        if self._copies_weight and self.before is None and torch.is_grad_enabled():
            self.before = WeightBefore(self.matrix)

    def _keep_output(self, y: Tensor) -> None:
        x, self._x = self._x, None
        if x is None:
            return
        if not y.requires_grad:
            self.had_no_gradient |= torch.is_grad_enabled()
            return
        # Under autocast the model multiplies by a rounded copy of `x`.
        own = x.detach().to(y.dtype)
        self._memory.add(self.matrix.key, own, self.matrix.own_columns(y))
        version = own._version

        def keep(delta: Tensor) -> None:
            if not self._memory.is_exceeded:
                self.pairs.append(Pair(own, delta.detach(), (version, delta._version)))

        y.register_hook(keep)


def weight_changes(recorders: Sequence[FactorRecorder]) -> dict[tuple[str, int], WeightChange]:
    """Subtract the copies of the weights from the weights as they are now.

    Args:
        recorders: Those of one step; their copies are freed.

    Returns:
        The changes that are known.
    """
    found: dict[tuple[str, int], WeightChange] = {}
    for each in recorders:
        before, each.before = each.before, None
        change = None if before is None else before.change()
        if change is not None:
            found[each.matrix.key] = change
    return found
