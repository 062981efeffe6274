"""How near the average Jacobians of a lens are to the exact effects of updates.

``python -m benchmarks.lens_exactness --data COUNTERFACT --jacobian LENS`` prints the table of
docs/analysis.md: for each layer, the mean cosine over prompts of `J_l v` and the exact change of
the last residual stream, both at the last token, for `v = -delta` of `W_out` and of `W_O`. For
`W_O` also with the Jacobian of the block before, which has the block's own MLP in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from backward_lens_tl.capture.first_order import AddedVector, first_order_changes
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Record
from backward_lens_tl.jacobians.average import Jacobians
from backward_lens_tl.jacobians.checking import check_fits
from backward_lens_tl.jacobians.loading import load_jacobians
from backward_lens_tl.models import host_of
from backward_lens_tl.models.loading import load_model
from backward_lens_tl.models.matrix_selection import find_editable
from benchmarks.report import table

MATRICES = ("W_out", "W_O")
BEFORE = "W_O, J of the block before"
LAYERS = (0, 5, 8, 11, 14, 17, 20, 23, 27, 29)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the cosines and print them as a Markdown table.

    Args:
        arguments: Command-line arguments; `None` for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True, help="CounterFact, or what read_records reads")
    parser.add_argument("--jacobian", required=True, help="the model's Jacobian Lens")
    parser.add_argument("--number", type=int, default=10, help="number of prompts (default: 10)")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    options = parser.parse_args(arguments)
    rows = [row for row in read_records(options.data).rows if isinstance(row, Record)]
    model, jacobians = load_model(options.model), load_jacobians(options.jacobian)
    check_fits(jacobians, host_of(model))
    found = cosines(model, jacobians, rows[: options.number], options.layers)
    body = [
        [name, *("" if layer not in own else f"{own[layer]:.2f}" for layer in options.layers)]
        for name, own in found.items()
    ]
    sys.stdout.write(table(["layer", *map(str, options.layers)], body))


def cosines(
    model: Any, jacobians: Jacobians, records: Sequence[Record], layers: Sequence[int]
) -> Mapping[str, Mapping[int, float]]:
    """Compare `J_l v` with the exact change.

    Args:
        model: The model.
        jacobians: Its lens.
        records: Prompts with the answers whose gradients are taken.
        layers: Layers of the updates.

    Returns:
        The mean cosine by name of the row and layer.
    """
    host = host_of(model)
    by_row: dict[tuple[str, int], list[float]] = {}
    for record in records:  # one by one, so that nothing is padded
        loss = target_nll(record.target, "first")
        capture = capture_gradients(model, record.prompt, loss, matrices=MATRICES, layers=layers)
        batch = pad_prompts(host, capture.tokens.tolist())
        last = capture.tokens.shape[1] - 1
        added = [
            AddedVector(site, 0, last, last, -capture[matrix, site.layer].vjps[0, last])
            for matrix in MATRICES
            for site in find_editable(host, matrix, layers)
        ]
        for changes in first_order_changes(host, batch, added, Memory()):
            for index, exact in zip(changes.indices, changes.stream, strict=True):
                site, vector = added[index].site, added[index].vector
                estimates: dict[str, int] = {site.matrix: site.layer}
                if site.matrix == "W_O" and site.layer:
                    estimates[BEFORE] = site.layer - 1
                for name, at in estimates.items():
                    # The Jacobian of the last block is the identity, and is not stored.
                    is_last = at == host.n_layers - 1
                    moved = vector if is_last else jacobians.times(vector, at)
                    cosine = float(torch.cosine_similarity(moved, exact, dim=0))
                    by_row.setdefault((name, site.layer), []).append(cosine)
    return {
        name: {layer: fmean(own) for (row, layer), own in by_row.items() if row == name}
        for name in (*MATRICES, BEFORE)
    }


if __name__ == "__main__":
    main()
