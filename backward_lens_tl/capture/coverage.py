"""The parameters of a model whose gradients a capture holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import MatrixName, Site


@dataclass(frozen=True)
class Coverage:
    """The parameters whose gradients a capture holds.

    Attributes:
        covered: Parameters whose gradient follows from the captured factors.
        not_covered: All other parameters of the model.
        parameters: `"processed"` if TransformerLens changed matrices of attention or MLPs when it
            loaded them, with `fold_ln` or `center_writing_weights`: the factors belong to those,
            not to the raw model's. Otherwise `"raw"`. It is determined from the weights.
        differing: The captured matrices that differ from the raw model's.
    """

    covered: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    parameters: Literal["raw", "processed"] = "raw"
    differing: tuple[MatrixName, ...] = ()

    def __repr__(self) -> str:
        differing = f", not the raw model's: {', '.join(self.differing)}" if self.differing else ""
        return (
            f"Coverage({len(self.covered)} parameters, {len(self.not_covered)} not covered, "
            f"{self.parameters} weights{differing})"
        )


def coverage_of(host: Host, sites: Sequence[Site]) -> Coverage:
    """The coverage of a capture of some matrices."""
    covered = {id(tensor) for site in sites for tensor in (*site.weights, *site.biases)}
    named = host.parameters()
    processed = host.processed_matrices
    captured = dict.fromkeys(site.matrix for site in sites)
    return Coverage(
        covered=tuple(name for name, parameter in named.items() if id(parameter) in covered),
        not_covered=tuple(
            name for name, parameter in named.items() if id(parameter) not in covered
        ),
        parameters="processed" if processed else "raw",
        differing=tuple(matrix for matrix in captured if matrix in processed),
    )
