"""The memory that a watched step takes, estimated while its forward passes run.

The factors of a matrix are kept as the model computes them, `rows * (d_in + d_out)` numbers, until
the step ends. They are then joined in at least float32, matrix by matrix, and the kept ones are
freed. So a step takes the larger of the two for every matrix, one matrix twice more, and the copies
of the weights.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

_FLOAT32 = 4


class StepMemory:
    """Adds up what the factors of a step take.

    Args:
        budget: The most that they may take, in bytes; `None` for no limit.
        fixed: Bytes that do not depend on the batch: copies of weights.

    Attributes:
        budget: The most that they may take.
        is_exceeded: Whether they took more.
    """

    def __init__(self, budget: int | None, fixed: int) -> None:
        self.budget, self.is_exceeded = budget, False
        self._fixed = fixed
        self._kept: Counter[object] = Counter()
        self._joined: Counter[object] = Counter()

    @property
    def needed(self) -> int:
        """Bytes at the moment when most are in memory, as far as is known."""
        factors = sum(max(kept, self._joined[key]) for key, kept in self._kept.items())
        return self._fixed + factors + 2 * max(self._joined.values(), default=0)

    def add(self, key: object, x: Tensor, y: Tensor) -> None:
        """Count the factors of one matrix in one forward pass.

        Args:
            key: The matrix.
            x: Its inputs.
            y: Its outputs, which have the size of `delta`.
        """
        for factor in (x, y):
            self._kept[key] += factor.numel() * factor.element_size()
            self._joined[key] += factor.numel() * max(_FLOAT32, factor.element_size())
        self.is_exceeded |= self.budget is not None and self.needed > self.budget
