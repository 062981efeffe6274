"""What a watch takes, and of which model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from backward_lens_tl.models import host_of_trained
from backward_lens_tl.training.own_readout import OwnReadout
from backward_lens_tl.training.reference import Reference
from backward_lens_tl.training.trained_matrices import TrainedMatrix
from backward_lens_tl.training.weight_change import copied_bytes


@dataclass(frozen=True)
class WatchSettings:
    """What a watch takes, and of which model.

    Attributes:
        model: The model.
        matrices: Its matrices.
        every: The first step is watched, and every step after this many others.
        budget: Bytes that a watched step may take; `None` sets no limit.
        changes: Whether the optimizer's change of each matrix is measured.
        reference: A prompt whose gradients are taken too.
        readout: Reads vectors with the model's weights.
    """

    model: nn.Module
    matrices: Sequence[TrainedMatrix]
    every: int
    budget: int | None
    changes: bool
    reference: Reference | None
    readout: OwnReadout | None

    @property
    def fixed_bytes(self) -> int:
        """Bytes that a watched step takes whatever its batch is."""
        each_copy = [copied_bytes(each) for each in self.matrices] if self.changes else [0]
        # A change is next to its copy until that is freed, one matrix at a time.
        copies = sum(each_copy) + max(each_copy)
        rows = 0 if self.reference is None else self.reference.n_tokens
        return copies + 4 * rows * sum(each.site.width for each in self.matrices)

    def about(self) -> dict[str, Any]:
        """What identifies the run, for the head of a record."""
        host = host_of_trained(self.model)
        config = getattr(self.model, "config", None)
        sites = [each.site for each in self.matrices]
        return {
            "model": {
                "name": host.name if host else str(getattr(config, "_name_or_path", "")),
                "class": type(self.model).__name__,
                "parameters": sum(each.numel() for each in self.model.parameters()),
            },
            "matrices": list(dict.fromkeys(site.matrix for site in sites)),
            "layers": sorted({site.layer for site in sites}),
            "every": self.every,
            "changes": self.changes,
            "reference": None if self.reference is None else asdict(self.reference),
        }
