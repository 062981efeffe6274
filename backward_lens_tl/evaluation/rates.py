"""The least learning rate at which one step makes the target the answer (paper, appendix G.1).

A step on one `W_out` is a direction times a rate. For each layer and kind of step, all rates of a
grid are tried in one forward pass, with one row per rate, without changing a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_choice, checked_number, listed
from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.interventions import Addition, adding
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.methods.steps import GradientStep, Optimizer
from backward_lens_tl.editing.requests import EditRequest, tokenize_requests
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.perplexity import perplexity, read_texts
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import find_editable, select_layers

if TYPE_CHECKING:
    import pandas as pd

STEPS = ("sgd", "adam", "shift")
"""Steps of two optimizers, and the forward pass shift, whose rate is `eta`."""

RATES = tuple(10 ** (exponent / 4) for exponent in range(-16, 13))
"""Learning rates from 1e-4 to 1e3, four per power of ten."""


@torch.no_grad()
def least_rates(
    model: nn.Module,
    requests: EditRequest | Sequence[EditRequest],
    *,
    steps: Sequence[str] = STEPS,
    layers: int | Sequence[int] | None = None,
    rates: Sequence[float] = RATES,
    config: EvaluationConfig | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Find the least rate that makes the target the most probable token, and the perplexity then.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`; it is left unchanged.
        requests: The facts to edit. Only the first token of a target is used.
        steps: A selection of `STEPS`.
        layers: Layers whose `W_out` is edited, one at a time; `None` for all.
        rates: The grid, in ascending order.
        config: Settings, of which only `prepend_bos` and those of the texts for perplexity are
            used. `n_texts=0` skips perplexity.
        progress: Whether to show a progress bar.

    Returns:
        One row per request, layer and step: `request`, `layer`, `step`, `rate` (missing if no rate
        of the grid suffices) and `perplexity` of all texts together after that edit.

    Raises:
        EvaluationError: If a step is unknown, or the grid is not ascending and positive.
        EditError: If a request cannot be used with this model.
    """
    import pandas as pd

    settings = config or EvaluationConfig()
    for step in steps:
        check_choice("steps", step, STEPS, EvaluationError)
    grid: list[float] = list(listed(rates))
    for rate in grid:
        checked_number("rates", rate, is_positive=True, error=EvaluationError)
    if not grid or sorted(set(grid)) != grid:
        raise EvaluationError(
            "rates is not an ascending list of positive numbers, such as (0.1, 1.0, 10.0)"
        )
    host = host_of(model)
    chosen = select_layers(layers, host)
    texts = read_texts(host, settings).tokens(host, settings)
    rows = []
    tokenized = tokenize_requests(host, requests, settings.prepend_bos)
    for index, asked in enumerate(tqdm(tokenized, disable=not progress)):
        first = EditRequest(asked.request.prompt, asked.target[0])
        for step in steps:
            for delta in _directions(model, first, step, chosen, settings.prepend_bos):
                rate = _least(host, delta, asked.prompt, asked.target[0], grid)
                after = math.nan
                if texts and not math.isnan(rate):
                    with WeightDelta((delta.scale(rate),), {}).applied(model):
                        after = perplexity(host, texts, settings.denominator).corpus
                rows.append((index, delta.layer, step, rate, after))
    return pd.DataFrame(rows, columns=["request", "layer", "step", "rate", "perplexity"])


def least_rates_by_layer(table: pd.DataFrame, unedited: float) -> pd.DataFrame:
    """Summarize least rates by step and layer.

    Args:
        table: A table from `least_rates`.
        unedited: Perplexity of the unedited model.

    Returns:
        One row per step and layer: `step`, `layer`, `n` requests, `missing` (requests without a
        sufficient rate), median `rate` with its quartiles `rate_low` and `rate_high`, `spread`
        (standard deviation of the rate's decimal logarithm), mean `perplexity` after the edits of
        those requests for which every step has a rate in this layer, and `unedited`.
    """
    import numpy as np
    import pandas as pd

    # Steps are compared on the same requests, because some requests are harder for all steps.
    is_shared = table["rate"].notna().groupby([table["request"], table["layer"]]).transform("all")
    groups = table.assign(
        logarithm=np.log10(table["rate"]), shared=table["perplexity"].where(is_shared)
    ).groupby(["step", "layer"], sort=False)
    rate = groups["rate"]
    columns = {
        "n": groups.size(),
        "missing": groups.size() - rate.count(),
        "rate": rate.median(),
        "rate_low": rate.quantile(0.25),
        "rate_high": rate.quantile(0.75),
        "spread": groups["logarithm"].std(ddof=0),
        "perplexity": groups["shared"].mean(),
    }
    return pd.DataFrame(columns).assign(unedited=unedited).reset_index()


def _directions(
    model: nn.Module,
    request: EditRequest,
    step: str,
    layers: Sequence[int],
    prepend_bos: bool | None,
) -> Iterator[MatrixDelta]:
    """The step at rate 1 for each layer."""
    if step == "shift":
        for layer in layers:
            shift = ForwardPassShift.paper(layer, 1.0, prepend_bos=prepend_bos)
            yield from shift(model, request)
    else:
        optimizer = cast(Optimizer, step)
        method = GradientStep(optimizer, lr=1.0, layers=layers, prepend_bos=prepend_bos)
        yield from method(model, request)


def _least(
    host: Host, delta: MatrixDelta, prompt: Sequence[int], target: int, rates: Sequence[float]
) -> float:
    """The least rate that makes `target` the most probable token; NaN if none does."""
    [site] = find_editable(host, delta.matrix, delta.layer)
    scales = torch.tensor(rates, device=host.device, dtype=torch.float64)
    with adding(site, _scaled(delta, scales)):
        logits = forward_pass(host, pad_prompts(host, [prompt] * len(rates))).logits
    enough = (logits.argmax(-1) == target).nonzero()
    return rates[int(enough[0])] if len(enough) else math.nan


def _scaled(delta: MatrixDelta, scales: Float[Tensor, "rate"]) -> Addition:
    factors = delta.factors if delta.values is None else (delta.values,)

    def added(reads: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        # Some MLPs see all positions of all prompts along one axis.
        rows = reads.to(factors[0]).reshape(len(scales), -1, reads.shape[-1])
        written = rows
        for factor in factors:
            written = written @ factor
        return (scales.to(written)[:, None, None] * written).reshape(*reads.shape[:-1], -1)

    return added
