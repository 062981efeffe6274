"""Hooks that take the factors of one matrix in the backward passes of somebody else's training.

A forward hook puts a hook on the output's gradient. Where autograd does not go, nothing is taken:
an evaluation without gradients, and whichever of the two forward passes of gradient checkpointing
does not belong to the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import get_ident
from weakref import ref

import torch
from torch import Tensor, nn

from backward_lens_tl.capture.recorders import Hook
from backward_lens_tl.models.own_passes import is_own_pass
from backward_lens_tl.training.step_memory import Held, StepMemory
from backward_lens_tl.training.trained_matrices import TrainedMatrix
from backward_lens_tl.training.weight_change import CurrentWeights, WeightBefore, WeightChange


@dataclass(frozen=True)
class Pair:
    """The factors of one backward pass.

    Attributes:
        x: The inputs, as the model multiplied them.
        delta: The gradient at the matrix's own outputs.
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


class SharedInputs:
    """The inputs of a step, cast once for consecutive matrices that read the same tensor."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[ref[Tensor], int, ref[Tensor]]] = {}  # by thread

    def of(self, x: Tensor, source: ref[Tensor], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """The inputs as the model multiplied them: under autocast, by a rounded copy of `x`.

        Args:
            x: The inputs, detached.
            source: The tensor that they were detached from.
            dtype: The precision of the product.

        Returns:
            The inputs, and whether another matrix has the same ones.
        """
        last = self._last.get(get_ident())
        if last is not None and last[0]() is source() is not None and last[1] == x._version:
            own = last[2]()
            if own is not None and own.dtype == dtype:
                return own, True
        own = x.to(dtype)
        self._last[get_ident()] = source, x._version, ref(own)
        return own, False


class _DeltaHook:
    """Keeps the gradient at one output. Its memory counts until the autograd graph is freed.

    A second forward pass of gradient checkpointing may have no backward pass, nor has one whose
    loss is not used.
    """

    def __init__(self, recorder: FactorRecorder, x: Tensor, held: Held, forward_pass: int) -> None:
        self._recorder, self._x, self._held = recorder, x, held
        self._version, self._forward_pass = x._version, forward_pass
        self._was_called = False

    def __call__(self, delta: Tensor) -> None:
        if self._recorder.memory.is_exceeded:
            return
        if self._was_called:  # the graph was kept for another backward pass
            self._recorder.memory.add(self._held.key, self._recorder.matrix.own_columns(delta))
        self._was_called = True
        # A copy of the matrix's own columns, if its module holds others too.
        own = self._recorder.matrix.own_columns(delta.detach()).contiguous()
        versions = self._version, own._version
        self._recorder.pairs.append(Pair(self._x, own, self._forward_pass, versions))

    def __del__(self) -> None:
        if not self._was_called:
            self._recorder.memory.remove(self._held)


class FactorRecorder:
    """Takes the factors of one matrix during one step.

    Args:
        matrix: The matrix.
        memory: Counts what the factors of the step take.
        inputs: The inputs that the matrices of the step share.
        copies_weight: Whether to copy the weight before the step changes it.

    Attributes:
        matrix: The matrix.
        memory: Counts what the factors take.
        pairs: The factors so far, in the order of backward passes.
        had_no_gradient: Whether nothing that the output depends on was trained.
        before: The weight at the first forward pass of the step, if it is copied.
    """

    def __init__(
        self,
        matrix: TrainedMatrix,
        memory: StepMemory,
        inputs: SharedInputs,
        *,
        copies_weight: bool = False,
    ) -> None:
        self.matrix = matrix
        self.pairs: list[Pair] = []
        self.had_no_gradient = False
        self.before: WeightBefore | None = None
        self.memory = memory
        self._inputs, self._copies_weight = inputs, copies_weight
        # By thread. Detached, because a pass that stops early would leave its graph in here.
        self._x: dict[int, tuple[Tensor, ref[Tensor]]] = {}
        self._n_forward_passes = 0

    @property
    def ordered(self) -> list[Pair]:
        """The pairs in the order of forward passes: one backward pass may cover several."""
        return sorted(self.pairs, key=lambda pair: pair.forward_pass)

    def hooks(self) -> Iterator[Hook]:
        """`x` after the user's hooks, and `y` before them."""
        yield self.matrix.site.input, self._keep_input, False
        yield self.matrix.site.output, self._keep_output, True

    @property
    def is_paused(self) -> bool:
        """Whether the hooks do nothing: the package's own passes are not the training's."""
        return is_own_pass()

    def _keep_input(self, x: Tensor) -> None:
        if self.is_paused or self.memory.is_exceeded:
            return
        self._x[get_ident()] = x.detach(), ref(x)
        if self._copies_weight and self.before is None and torch.is_grad_enabled():
            self.before = WeightBefore(self.matrix)

    def _keep_output(self, y: Tensor) -> None:
        found = self._x.pop(get_ident(), None)
        if found is None or self.is_paused:
            return
        if not y.requires_grad:
            self.had_no_gradient |= torch.is_grad_enabled()
            return
        own, is_shared = self._inputs.of(*found, y.dtype)
        outputs = self.matrix.own_columns(y)
        held = self.memory.add(self.matrix.key, *(() if is_shared else (own,)), outputs)
        y.register_hook(_DeltaHook(self, own, held, self._n_forward_passes))
        self._n_forward_passes += 1


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
