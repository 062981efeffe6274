"""What NormalizedGradient and UltraEdit share: standardised pairs of the requests' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backward_lens_tl._checks import check_kind
from backward_lens_tl.editing.methods.method import EditMethod, Layers
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.errors import EditError
from backward_lens_tl.settings import Positive


@dataclass(frozen=True)
class PairMethod(EditMethod):
    """Base class of methods that transform standardised pairs `(x', delta')`.

    Attributes:
        statistics: Mean and standard deviation of the pairs at the matrices to edit, from
            `pair_statistics`.
        lr: The size of the step.
        matrices: Only matrices of these names; `None` for all that have statistics.
        layers: Only matrices of these layers, negative ones from the end; `None` for all.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> requests = [
        ...     blt.editing.EditRequest("Obama grew up in", " Paris"),
        ...     blt.editing.EditRequest("Lionel Messi plays for", " Rome"),
        ... ]
        >>> statistics = blt.editing.pair_statistics(model, requests, layers=[-1], progress=False)
        >>> method = blt.editing.NormalizedGradient(statistics, layers=[-1])
        >>> isinstance(method, blt.editing.PairMethod), method.layers
        (True, (-1,))
    """

    statistics: PairStatistics
    lr: Positive = 1e-3
    matrices: Sequence[str] | None = None
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        made = "pair_statistics(model, requests)"
        check_kind("statistics", self.statistics, PairStatistics, made, EditError)
