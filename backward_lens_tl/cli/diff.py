"""`backward-lens diff`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backward_lens_tl.cli.adapter import ChangeCommand

if TYPE_CHECKING:
    from backward_lens_tl.editing.weight_delta import WeightDelta


@dataclass(frozen=True, kw_only=True)
class DiffCommand(ChangeCommand):
    """The tokens that fine-tuning wrote into a checkpoint, layer by layer.

    Attributes:
        base: The folder of the model before, facts, smollm2, or a name on the hub.
        tuned: The folder of the model after, or a name on the hub.
        rank: Singular vectors of each matrix that are kept.
    """

    POSITIONAL = ("base", "tuned")

    base: str
    tuned: str
    rank: int = 8

    def change(self) -> WeightDelta:
        """Compute the difference."""
        from backward_lens_tl.editing.weight_delta import WeightDelta

        return WeightDelta.between(self.base, self.tuned, self.rank)
