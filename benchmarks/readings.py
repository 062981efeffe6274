"""The command `python -m benchmarks.readings`: which tokens lead, under several readings.

`docs/looking/readings.json` holds its result on SmolLM2 and 100 prompts of CounterFact:

    python -m benchmarks.readings --model smollm2 --data counterfact.json --out docs/looking

With the logit lens a few tokens lead many unrelated cells. The same vectors are read as they are,
after subtracting each token's mean score, after dividing by its standard deviation too, and as
cosines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Records
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.loading import load_model
from backward_lens_tl.readout.projections import CosineLens, NormalizedLogitLens
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.plan import Item, plan_shards

if TYPE_CHECKING:
    import pandas as pd

MATRICES = ("W_in", "W_out")
"""`W_gate` reads the same inputs as `W_in`."""

_LEADERS = 10
_QUARTERS = 4
_Scores = Float[Tensor, "n d_vocab"]


@dataclass(frozen=True)
class _Cells:
    """The vectors of one prompt, as an update adds them, without those that are zero.

    Attributes:
        vectors: The vectors.
        is_written: Whether each is a VJP of `W_out`, otherwise an input of `W_in`.
        layers: Their layers.
        is_last: Whether they come from the last token.
        target: The target's id.
    """

    vectors: Float[Tensor, "n d_model"]
    is_written: Bool[Tensor, "n"]
    layers: Int[Tensor, "n"]
    is_last: Bool[Tensor, "n"]
    target: int


@torch.no_grad()
def compare_readings(
    model: nn.Module, records: Records, prompts: int = 100, seed: int = 0
) -> pd.DataFrame:
    """Compare readings by the tokens that lead their cells and by the ranks of the target.

    All readings start from the normalized logit lens, so that every vector counts the same in a
    mean. "Other prompts" are the other half of the prompts.

    Args:
        model: The model.
        records: The data.
        prompts: Number of prompts, at least two.
        seed: Seed for choosing them.

    Returns:
        One row per reading and matrix:

        - `reading`, `matrix`, and the number of `cells`;
        - `share_of_ten`: the fraction of cells led by the ten tokens that lead most of them;
        - `leaders`: the number of different tokens that lead a cell;
        - `most_frequent`: the texts of the five most frequent leaders;
        - `target_leads`: the fraction of the cells of the last token that the target leads;
        - `rank_1` to `rank_4`: the median rank of the target at the last token, by quarter of the
          layers.

    Raises:
        InputError: If fewer than two prompts can be analysed.
    """
    import pandas as pd

    host = host_of(model)
    config = SweepConfig(prompts=prompts, seed=seed, multi_token="first")
    entries = [entry for shard in plan_shards(host, records, config) for entry in shard]
    cells = [_cells(model, entry) for entry in entries if isinstance(entry, Item)]
    if len(cells) < 2:
        raise InputError(f"{len(cells)} prompts can be analysed; pass at least two")
    lens, cosine = NormalizedLogitLens(host), CosineLens(host)
    halves = [_moments(lens, cells[half::2]) for half in (0, 1)]
    found: dict[str, list[Tensor]] = {}
    for index, own in enumerate(cells):
        for name, scores in _readings(lens, cosine, own, halves[1 - index % 2]):
            target = scores[:, own.target, None]
            facts = torch.stack([scores.argmax(1), (scores > target).sum(1)], dim=1)
            found.setdefault(name, []).append(facts)
    is_written = torch.cat([own.is_written for own in cells])
    is_last = torch.cat([own.is_last for own in cells])
    quarters = torch.cat([own.layers for own in cells]) * _QUARTERS // host.n_layers
    rows = []
    for name, pieces in found.items():
        leaders, ranks = torch.cat(pieces).unbind(1)
        for matrix in MATRICES:
            here = is_written == (matrix == "W_out")
            row = _leaders(host, leaders[here]) | _ranks(
                ranks[here & is_last], quarters[here & is_last]
            )
            rows.append({"reading": name, "matrix": matrix, "cells": int(here.sum())} | row)
    return pd.DataFrame(rows)


def _cells(model: nn.Module, item: Item) -> _Cells:
    prompt, objective = item.record.prompt, target_nll(item.target)
    capture = capture_gradients(model, prompt, objective, matrices=MATRICES)
    vectors, written, layers, last = [], [], [], []
    for gradient in capture:
        own = gradient.spanning_set[0] * (1 if gradient.reads_residual else -1)
        [real] = (~gradient.is_zero[0]).nonzero(as_tuple=True)
        vectors.append(own[real])
        written += [not gradient.reads_residual] * len(real)
        layers += [gradient.layer] * len(real)
        last.append(real == len(own) - 1)
    device = vectors[0].device
    return _Cells(
        vectors=torch.cat(vectors),
        is_written=torch.tensor(written, device=device),
        layers=torch.tensor(layers, device=device),
        is_last=torch.cat(last),
        target=item.target,
    )


def _moments(
    lens: NormalizedLogitLens, cells: Sequence[_Cells]
) -> tuple[Float[Tensor, "d_vocab"], Float[Tensor, "d_vocab"]]:
    """Mean and standard deviation of each token's score over all vectors."""
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for own in cells:
        scores = lens.project(own.vectors, 0)
        total = scores.sum(0).double() + total.to(scores.device)
        squares = scores.square().sum(0).double() + squares.to(scores.device)
        count += len(scores)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).sqrt().float()


def _readings(
    lens: NormalizedLogitLens,
    cosine: CosineLens,
    cells: _Cells,
    others: tuple[Float[Tensor, "d_vocab"], Float[Tensor, "d_vocab"]],
) -> Iterator[tuple[str, _Scores]]:
    """Name and scores of each reading of one prompt's vectors."""
    mean, std = others
    scores = lens.project(cells.vectors, 0)
    yield "logit lens", scores
    yield "minus the mean over the prompt's own vectors", scores - scores.mean(0)
    centered = scores - mean
    yield "minus the mean over other prompts", centered
    yield "the same, divided by the standard deviation", centered / std
    yield "cosine", cosine.project(cells.vectors, 0)


def _leaders(host: Host, leaders: Int[Tensor, "n"]) -> dict[str, Any]:
    tokens, counts = leaders.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    texts = host.vocabulary.texts(tokens[order[:5]].tolist())
    return {
        "share_of_ten": float(counts[order[:_LEADERS]].sum() / len(leaders)),
        "leaders": len(tokens),
        "most_frequent": list(texts),
    }


def _ranks(ranks: Int[Tensor, "n"], quarters: Int[Tensor, "n"]) -> dict[str, Any]:
    medians = {
        f"rank_{quarter + 1}": float(ranks[quarters == quarter].float().quantile(0.5))
        for quarter in range(_QUARTERS)
    }
    return {"target_leads": float((ranks == 0).float().mean()), **medians}


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `docs/looking.md`."""
    lines = [
        "| reading | matrix | led by ten tokens | leaders | target leads | median rank |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ranks = " / ".join(f"{row[f'rank_{quarter}']:,.0f}" for quarter in range(1, 5))
        lines.append(
            f"| {row['reading']} | `{row['matrix']}` | {row['share_of_ten']:.1%} | "
            f"{row['leaders']:,} | {row['target_leads']:.1%} | {ranks} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readings", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a name, a folder or a file")
    parser.add_argument("--data", default="facts", help="facts, or a file of prompts")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--out", type=Path, help="folder for readings.json")
    options = parser.parse_args(arguments)
    model = load_model(options.model)
    table = compare_readings(model, read_records(options.data), options.prompts)
    rows = json.loads(table.to_json(orient="records"))
    sys.stdout.write(f"{as_markdown(rows)}\n")
    if options.out is not None:
        held = {"model": options.model, "prompts": options.prompts, "rows": rows}
        text = json.dumps(held, indent=1, ensure_ascii=False)
        (options.out / "readings.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
