"""One step of gradient descent on the pairs that span a gradient, each brought to one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backward_lens_tl._checks import check_kind, check_number
from backward_lens_tl.editing.delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class NormalizedGradient(EditMethod):
    """An edit `dW = -lr sum_i outer(x_i', delta_i')` of standardised pairs, without training.

    This is MEND before it has learned anything: its network is the identity at the start.

    Attributes:
        statistics: Mean and standard deviation of the pairs at the matrices to edit, of all
            positions (`pair_statistics`).
        lr: The size of the step.
        matrices: Only those of these names; `None` for all that there are statistics of.
        layers: Only those of these layers, negative ones from the end; `None` likewise.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> requests = [
        ...     blt.editing.EditRequest("Obama grew up in", " Paris"),
        ...     blt.editing.EditRequest("Lionel Messi plays for", " Rome"),
        ... ]
        >>> statistics = blt.editing.pair_statistics(model, requests, layers=[-1], progress=False)
        >>> blt.editing.NormalizedGradient(statistics, lr=1e-3)(model, requests[0])
        WeightDelta(NormalizedGradient, W_in of layer 7, W_out of layer 7)
    """

    statistics: PairStatistics
    lr: float = 1e-3
    matrices: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        made = "pair_statistics(model, requests)"
        check_kind("statistics", self.statistics, PairStatistics, made, EditError)

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """What is added to each matrix: an outer product per position of each request.

        Args:
            host: The model.
            requests: What it is to be taught.

        Returns:
            The changes, as factors.
        """
        check_number("lr", self.lr, zero=False, error=EditError)
        pairs = self.statistics.standardized_pairs(
            host, requests, "all", self.matrices, self.layers
        )
        return [
            MatrixDelta(own.matrix, own.layer, left=own.inputs.T, right=-self.lr * own.vjps)
            for own in pairs
        ]
