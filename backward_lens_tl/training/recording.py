"""Hooks that take the factors of one matrix in the backward passes of somebody else's training.

A forward hook puts a hook on the output's gradient. Where autograd does not go, nothing is taken:
an evaluation without gradients, and whichever of the two forward passes of gradient checkpointing
does not belong to the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import Tensor, nn

from backward_lens_tl.capture.recorders import Hook
from backward_lens_tl.training.step_memory import StepMemory
from backward_lens_tl.training.trained_matrices import TrainedMatrix
from backward_lens_tl.training.weight_change import CurrentWeights, WeightBefore, WeightChange


@dataclass(frozen=True)
class Pair:
    """The factors of one backward pass.

    Attributes:
        x: The inputs, as the model multiplied them.
        delta: The gradient at the outputs.
        forward_pass: Number of the module's forward pass in this step.
        versions: The versions of both when they were taken, which writing into them changes.
    """

    x: Tensor
    delta: Tensor
    forward_pass: int
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
        pairs: The factors so far, in the order of backward passes.
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
        self._x: dict[int, Tensor] = {}  # by thread
        self._n_forward_passes = 0

    @property
    def ordered(self) -> list[Pair]:
        """The pairs in the order of forward passes: one backward pass may cover several."""
        return sorted(self.pairs, key=lambda pair: pair.forward_pass)

    def hooks(self) -> Iterator[Hook]:
        """`x` after the user's hooks, and `y` before them."""
        yield self.matrix.site.input, self._keep_input, False
        yield self.matrix.site.output, self._keep_output, True

    def _keep_input(self, x: Tensor) -> None:
        if self.is_paused or self._memory.is_exceeded:
            return
        self._x[get_ident()] = x
        if self._copies_weight and self.before is None and torch.is_grad_enabled():
            self.before = WeightBefore(self.matrix)

    def _keep_output(self, y: Tensor) -> None:
        x = self._x.pop(get_ident(), None)
        if x is None:
            return
        if not y.requires_grad:
            self.had_no_gradient |= torch.is_grad_enabled()
            return
        # Under autocast the model multiplies by a rounded copy of `x`.
        own = x.detach().to(y.dtype)
        self._memory.add(self.matrix.key, own, self.matrix.own_columns(y))
        version, number = own._version, self._n_forward_passes
        self._n_forward_passes += 1

        def keep(delta: Tensor) -> None:
            if not self._memory.is_exceeded:
                self.pairs.append(Pair(own, delta.detach(), number, (version, delta._version)))

        y.register_hook(keep)


def weight_changes(
    recorders: Sequence[FactorRecorder], model: nn.Module
) -> dict[tuple[str, int], WeightChange]:
    """Subtract the copies of the weights from the weights as they are now.

    Args:
        recorders: Those of one step; their copies are freed.
        model: The model, which may have other modules or parameters since it is watched.

    Returns:
        The changes that are known.
    """
    found: dict[tuple[str, int], WeightChange] = {}
    current = CurrentWeights(model)
    for each in recorders:
        before, each.before = each.before, None
        is_known = before is not None and current.are_of(each.matrix)
        change = before.change() if before is not None and is_known else None
        if change is not None:
            found[each.matrix.key] = change
    return found
