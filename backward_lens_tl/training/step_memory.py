"""The memory that a watched step takes, estimated while its forward passes run.

The factors of a matrix are kept as the model computes them, `rows * (d_in + d_out)` numbers, until
the step ends; inputs that matrices share are kept once. They are then joined in at least float32,
matrix by matrix, and the kept ones are freed. So a step takes the larger of the two for every
matrix, one matrix twice more, and the copies of the weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

_FLOAT32 = 4


@dataclass(frozen=True)
class Held:
    """What one matrix keeps of one forward pass.

    Attributes:
        key: The matrix.
        kept: Bytes as the model computes them.
        joined: Bytes in at least float32.
    """

    key: object
    kept: int
    joined: int


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
    def kept(self) -> int:
        """Bytes of the factors as the model computes them."""
        return self._kept.total()

    @property
    def needed(self) -> int:
        """Bytes at the moment when most are in memory, as far as is known."""
        factors = sum(max(kept, self._joined[key]) for key, kept in self._kept.items())
        return self._fixed + factors + 2 * max(self._joined.values(), default=0)

    def add(self, key: object, *factors: Tensor) -> Held:
        """Count the factors of one matrix in one forward pass.

        Args:
            key: The matrix.
            *factors: Its inputs, unless they are counted already, and its outputs, which have the
                size of `delta`.

        Returns:
            What was added.
        """
        held = Held(
            key,
            sum(each.numel() * each.element_size() for each in factors),
            sum(each.numel() * max(_FLOAT32, each.element_size()) for each in factors),
        )
        self._kept[key] += held.kept
        self._joined[key] += held.joined
        self.is_exceeded |= self.budget is not None and self.needed > self.budget
        return held

    def remove(self, held: Held) -> None:
        """Stop counting factors that were freed without a backward pass.

        Args:
            held: What `add` returned.
        """
        self._kept[held.key] -= held.kept
        self._joined[held.key] -= held.joined
