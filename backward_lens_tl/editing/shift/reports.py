"""From sizes and standings to what a delta reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

from backward_lens_tl.editing.outcomes import EditOutcome
from backward_lens_tl.editing.requests import TokenizedRequest
from backward_lens_tl.editing.shift.cells import Cells
from backward_lens_tl.editing.shift.sizes import Sized


def shift_outcomes(
    requests: Sequence[TokenizedRequest],
    cells: Cells,
    tried: Sequence[Sized],
    chosen: Sized,
    probability: float | None,
) -> tuple[EditOutcome, ...]:
    """Report the targets of each request.

    Args:
        requests: The requests.
        cells: What was written for them.
        tried: All sizes that were tried, the unedited model first.
        chosen: Those of the edit.
        probability: What the targets had to reach.

    Returns:
        One outcome per request.
    """
    sizes = cells.by_request(chosen.sizes)
    curves: list[list[tuple[float, float]]] = [[] for _ in requests]
    for sized in tried[1:]:
        if sized.standing is None:
            continue
        tried_sizes = cells.by_request(sized.sizes)
        found = cells.by_request(sized.standing.margins)
        for curve, own, margins in zip(curves, tried_sizes, found, strict=True):
            curve.append((max(own, key=abs), min(margins)))
    asked = [request.request for request in requests]
    if chosen.standing is None:
        return tuple(
            EditOutcome(each.prompt, each.target, tuple(own), None, None, None, None)
            for each, own in zip(asked, sizes, strict=True)
        )
    standing = chosen.standing
    columns = (
        standing.margins,
        standing.ranks,
        standing.log_probs.double(),
        standing.surplus(probability),
    )
    by_request = zip(*(cells.by_request(column) for column in columns), strict=True)
    return tuple(
        EditOutcome(
            prompt=each.prompt,
            target=each.target,
            sizes=tuple(own),
            margin=min(margins),
            rank=int(max(ranks)),
            probability=math.exp(sum(log_probs)),
            is_reached=min(surplus) > 0,
            tried=tuple(curve),
        )
        for each, own, curve, (margins, ranks, log_probs, surplus) in zip(
            asked, sizes, curves, by_request, strict=True
        )
    )
