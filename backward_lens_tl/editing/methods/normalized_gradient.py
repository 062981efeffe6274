"""One step of gradient descent on the standardised pairs that span a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.pair_method import PairMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class NormalizedGradient(PairMethod):
    """An edit `dW = -lr sum_i outer(x_i', delta_i')` of standardised pairs, without training.

    This is MEND before training, when its network is the identity. `statistics` are those of all
    positions. `matrices` and `layers` are explained in
    [`PairMethod`][backward_lens_tl.editing.PairMethod].

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

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """Compute the changes, one outer product per position of each request."""
        pairs = self.statistics.standardized_pairs(
            host, requests, "all", self.matrices, self.layers
        )
        return [
            MatrixDelta(own.matrix, own.layer, left=own.inputs.T, right=-self.lr * own.vjps)
            for own in pairs
        ]
