"""MEND: networks that turn the pairs that span a request's gradient into an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backward_lens_tl._checks import check_kind
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.mend.hypernetwork import MENDEditor
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.spanning_pairs import SpanningPairs, joined_pairs
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class MEND(EditMethod):
    """MEND (Mitchell et al., ICLR 2022): `dW = -lr sum_i outer(x_i', delta_i')`, `lr` learned.

    A learned network computes `(x_i', delta_i')` from each standardised pair. The edits of several
    requests are added up.

    Attributes:
        editor: The networks, from `train_mend`.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> requests = [
        ...     blt.editing.EditRequest("Obama grew up in", " Paris"),
        ...     blt.editing.EditRequest("Lionel Messi plays for", " Rome"),
        ... ]
        >>> statistics = blt.editing.pair_statistics(model, requests, layers=[-1], progress=False)
        >>> editor = blt.editing.MENDEditor.untrained(statistics)  # or train_mend(model, records)
        >>> blt.editing.MEND(editor)(model, requests[0])
        WeightDelta(MEND, W_in of layer 7, W_out of layer 7)
    """

    editor: MENDEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("editor", self.editor, MENDEditor, "train_mend(model, records)", EditError)

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> list[MatrixDelta]:
        """Compute the changes, one outer product per position of each request."""
        sites = self.editor.statistics.sites(host)
        editor = self.editor.to(host.device)
        deltas = []
        for site, (inputs, vjps) in zip(sites, joined_pairs(host, requests, sites), strict=True):
            mask = torch.ones(1, len(inputs), dtype=torch.bool, device=inputs.device)
            own = SpanningPairs(site.matrix, site.layer, inputs[None], vjps[None], mask)
            left, right = editor.factors(own)
            deltas.append(MatrixDelta(site.matrix, site.layer, left[0].T, right[0]))
        return deltas
