"""When do a gradient's largest neurons copy one vector, and is gating the reason if not?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import (
    Check,
    Finding,
    count_of,
    listed_values,
    spearman,
)
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_MOST_PROMPTS = 20
_COPY, _GROUP = 0.9, 0.01
_ALONE, _RELATED = 0.9, 0.8
_CLOSE = 0.1


def gated_neurons(evidence: Evidence) -> Finding:
    """The largest neurons of many gradients, and how much of each the last token writes."""
    import pandas as pd

    rows = evidence.prompts.iloc[:: max(1, len(evidence.prompts) // _MOST_PROMPTS)]
    table = pd.DataFrame(_rows(evidence, rows.head(_MOST_PROMPTS)))
    if table.empty:
        raise InputError("the model has one layer, whose gradient is one vector")
    means = table.groupby(["matrix", "layer"], sort=False).mean(numeric_only=True).reset_index()
    by_layer = {
        matrix: spearman(own["share"], own["copies"]) for matrix, own in means.groupby("matrix")
    }
    centred = table.groupby(["matrix", "layer"])[["share", "copies"]].transform("mean")
    within = (table["share"] - centred["share"]).corr(table["copies"] - centred["copies"])
    averages = means.groupby("matrix", sort=False)[["copies", "without_first"]].mean()
    copies, without_first = (
        dict(zip(averages.index, averages[column], strict=True)) for column in averages
    )
    is_alone = table["share"] >= _ALONE
    alone, others = (float(table.loc[rows, "copies"].mean()) for rows in (is_alone, ~is_alone))
    checks = [
        Check(
            "the largest 1 % of the neurons are copies, at least 90 % of them, where the position "
            f"holds at least {100 * _ALONE:.0f} % of the squared write norms, and fewer elsewhere",
            alone >= _ALONE > others,
            f"{100 * alone:.0f} % in {count_of(int(is_alone.sum()), len(table))} gradients, and "
            f"{100 * others:.0f} % in the others",
        ),
        Check(
            "over the layers, the share of the squared write norms and the fraction of copies have "
            f"a Spearman's coefficient of at least {_RELATED}",
            all(value >= _RELATED for value in by_layer.values()),
            f"coefficients {listed_values(by_layer.items(), '.2f')}; copies, averaged over the "
            f"layers: {_percent(copies)}",
        ),
        Check(
            "also from prompt to prompt in the same layer, where depth is no confounder: the "
            "correlation after subtraction of each layer's mean is at least 0.5",
            bool(within >= 0.5),
            f"correlation {within:.2f}",
        ),
    ]
    if "ungated" in table:
        ungated = float(table["ungated"].mean())
        checks.append(
            Check(
                "the gate makes little difference: without its factor in the inputs of W_out, the "
                f"fraction of copies changes by less than {_CLOSE}",
                abs(ungated - copies["W_out"]) < _CLOSE,
                f"W_out {100 * copies['W_out']:.0f} %, without the gate {100 * ungated:.0f} %",
            )
        )
    checks.append(
        Check(
            "position 0 makes little difference: without it, the fraction of copies changes by "
            f"less than {_CLOSE}",
            all(abs(without_first[name] - copies[name]) < _CLOSE for name in copies),
            f"without it: {_percent(without_first)}",
        )
    )
    return Finding(
        tuple(checks),
        {"by layer": means},
        {
            f"copies in {matrix}": partial(
                figures.layer_lines,
                _lines(means[means["matrix"] == matrix]),
                "fraction",
                "of",
                title=f"The largest neurons of {matrix}, {table['prompt'].nunique()} prompts",
                unit="fraction",
            )
            for matrix in means["matrix"].unique()
        },
        notes=(
            f"{table['prompt'].nunique()} prompts, all layers but the last. A copy has a cosine "
            f"above {_COPY}, up to the sign: with the last token's VJP in W_out (figure 8), with "
            "any of the inputs in W_in and W_gate (figure 10). The position is the last token in "
            "W_out, and the one with the largest share in the others.",
        ),
    )


def _percent(fractions: Mapping[str, float]) -> str:
    return listed_values(((name, 100 * value) for name, value in fractions.items()), ".0f", " %")


def _rows(evidence: Evidence, prompts: pd.DataFrame) -> Iterator[dict[str, Any]]:
    pairs = zip(prompts["text"], prompts["target_id"], strict=True)
    for index, (text, target) in enumerate(pairs):
        capture = capture_gradients(
            evidence.model,
            text,
            target_nll(int(target)),
            matrices="mlp",
            prepend_bos=evidence.prepend_bos,
        )
        for gradient in capture:
            if gradient.layer == evidence.n_layers - 1:
                continue
            row: dict[str, Any] = {
                "prompt": index,
                "matrix": gradient.matrix,
                "layer": gradient.layer,
            }
            row |= _measured(gradient)
            if gradient.matrix == "W_out" and "W_gate" in capture.matrices:
                hidden = _without_gate(evidence.model, capture, gradient.layer)
                row["ungated"] = _copies(hidden, gradient.vjps[0], is_last=True)
            yield row


def _measured(gradient: MatrixGradient) -> dict[str, float]:
    squares = (gradient.norms[0] * gradient.input_norms[0]).double() ** 2
    hidden = (gradient.vjps if gradient.reads_residual else gradient.inputs)[0]
    vectors, is_last = gradient.spanning_set[0], not gradient.reads_residual
    shares = squares / squares.sum()
    return {
        "share": float(shares[-1] if is_last else shares.max()),
        "first_share": float(shares[0]),
        "copies": _copies(hidden, vectors, is_last),
        "without_first": _copies(hidden[1:], vectors[1:], is_last),
    }


def _copies(
    hidden: Float[Tensor, "pos d_hidden"], vectors: Float[Tensor, "pos d_model"], is_last: bool
) -> float:
    """Fraction of the largest 1 % of the neurons that copy the last vector, or any vector."""
    neurons = hidden.double().T @ vectors.double()
    largest = neurons.norm(dim=-1).topk(max(1, round(_GROUP * len(neurons)))).indices
    cosines = torch.cosine_similarity(neurons[largest, None], vectors.double(), dim=-1)
    is_copy = cosines.abs() > _COPY
    return float((is_copy[:, -1] if is_last else is_copy.any(-1)).double().mean())


def _without_gate(
    model: nn.Module, capture: GradientCapture, layer: int
) -> Float[Tensor, "pos d_mlp"]:
    """What `W_out` would read if the gate did not multiply it: the output of `W_in`."""
    [site] = find_editable(host_of(model), "W_in", layer)
    weight = site.weight.in_out(site.weight.parameter.detach())
    hidden = capture["W_in", layer].inputs[0] @ weight
    return hidden if site.bias is None else hidden + site.bias.detach()


def _lines(means: pd.DataFrame) -> pd.DataFrame:
    """The fractions of one matrix as one table with a row per line and layer."""
    import pandas as pd

    names = {"copies": "copies", "share": "share of the squared write norms"}
    return pd.concat(
        [
            pd.DataFrame({"layer": means["layer"], "fraction": means[column], "of": name})
            for column, name in names.items()
        ],
        ignore_index=True,
    )
