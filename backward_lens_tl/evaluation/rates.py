"""The least learning rate at which one step makes a model say the target (paper, appendix G.1).

A step on one `W_out` is a direction times a rate. For each layer and each kind of step all rates of
a grid are tried in one forward pass, one row per rate, without touching a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_choice, check_number, listed
from backward_lens_tl.editing.delta import MatrixDelta, WeightDelta
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.methods.steps import GradientStep, Optimizer
from backward_lens_tl.editing.requests import EditRequest, listed_requests, tokenize_request
from backward_lens_tl.editing.statistics.activations import Addition, activations, adding
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.perplexity import perplexity, read_texts
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.selection import find_editable, select_layers

if TYPE_CHECKING:
    import pandas as pd

STEPS = ("sgd", "adam", "shift")
"""Steps of the two optimizers, and the forward pass shift, whose rate is `eta`."""

_OPTIMIZERS: Mapping[str, Optimizer] = {"sgd": "sgd", "adam": "adam"}

RATES = tuple(10 ** (exponent / 4) for exponent in range(-16, 13))
"""From 1e-4 to 1e3, four in each power of ten."""


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
    """Find the least rate that makes the target the most probable token, and what it costs.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`; as before when this returns or raises.
        requests: What it is to be taught; of a target of several tokens the first.
        steps: Of `STEPS`.
        layers: Layers whose `W_out` is edited, one at a time; `None` for all.
        rates: The grid, ascending.
        config: Whether prompts get a BOS token (`prepend_bos`), and the texts that perplexity is
            measured on; no other setting counts. `n_texts=0` measures none.
        progress: Whether a bar shows how far it is.

    Returns:
        One row per request, layer and step: `request`, `layer`, `step`, `rate` (missing if no rate
        of the grid is enough) and `perplexity` of all texts together after that edit.

    Raises:
        EvaluationError: If the grid is not ascending and positive.
        EditError: If a request does not fit.
    """
    import pandas as pd

    settings = config or EvaluationConfig()
    for step in steps:
        check_choice("steps", step, STEPS, EvaluationError)
    grid: list[float] = list(listed(rates))
    for rate in grid:
        check_number("rates", rate, zero=False, error=EvaluationError)
    if not grid or sorted(set(grid)) != grid:
        raise EvaluationError("rates is not an ascending list of positive numbers")
    host = host_of(model)
    chosen = select_layers(layers, host)
    texts = read_texts(host, settings).tokens(host, settings)
    rows: list[dict[str, Any]] = []
    for place, request in enumerate(tqdm(listed_requests(requests), disable=not progress)):
        asked = tokenize_request(host, request, settings.prepend_bos)
        first = EditRequest(request.prompt, asked.target[0])
        for step in steps:
            for delta in _directions(model, first, step, chosen, settings.prepend_bos):
                rate = _least(host, delta, asked.prompt, asked.target[0], grid)
                after = math.nan
                if texts and not math.isnan(rate):
                    with WeightDelta((delta.scale(rate),), {}).applied(model):
                        after = perplexity(host, texts, settings.denominator).corpus
                rows.append(
                    {
                        "request": place,
                        "layer": delta.layer,
                        "step": step,
                        "rate": rate,
                        "perplexity": after,
                    }
                )
    return pd.DataFrame(rows)


def least_rates_by_layer(table: pd.DataFrame, unedited: float) -> pd.DataFrame:
    """What the least rates of many requests have in common.

    Args:
        table: What `least_rates` returned.
        unedited: Perplexity before any edit.

    Returns:
        One row per step and layer: `step`, `layer`, `n` requests, `missing` (no rate of the grid
        was enough), median `rate` with its quartiles `rate_low` and `rate_high`, `spread` (standard
        deviation of the rate's decimal logarithm), mean `perplexity` after the edits of those
        requests for which every step has a rate in this layer, and `unedited`.
    """
    import numpy as np
    import pandas as pd

    # Steps are compared on the same requests: those that need more may be harder for all.
    lacking = table.loc[table["rate"].isna(), ["request", "layer"]]
    pairs = table.set_index(["request", "layer"]).index
    is_shared = ~pairs.isin(list(lacking.itertuples(index=False, name=None)))
    shared = table["perplexity"].where(is_shared)
    rows = []
    for (step, layer), own in table.groupby(["step", "layer"], sort=False):
        rates = own["rate"].dropna()
        rows.append(
            {
                "step": step,
                "layer": layer,
                "n": len(own),
                "missing": len(own) - len(rates),
                "rate": rates.median(),
                "rate_low": rates.quantile(0.25),
                "rate_high": rates.quantile(0.75),
                "spread": float(np.log10(rates).std(ddof=0)),
                "perplexity": shared[own.index].mean(),
                "unedited": unedited,
            }
        )
    return pd.DataFrame(rows)


def _directions(
    model: nn.Module,
    request: EditRequest,
    step: str,
    layers: Sequence[int],
    prepend_bos: bool | None,
) -> Iterator[MatrixDelta]:
    """The step on each layer at rate 1."""
    if step == "shift":
        for layer in layers:
            shift = ForwardPassShift(layer=layer, size=1.0, prepend_bos=prepend_bos)
            yield from shift(model, request)
    else:
        optimizer = _OPTIMIZERS[step]
        yield from GradientStep(optimizer, lr=1.0, layers=layers, prepend_bos=prepend_bos)(
            model, request
        )


def _least(
    host: Host, delta: MatrixDelta, prompt: Sequence[int], target: int, rates: Sequence[float]
) -> float:
    """The least rate of the grid that makes a token the most probable one; NaN if none does."""
    [site] = find_editable(host, delta.matrix, delta.layer)
    scales = torch.tensor(rates, device=host.device, dtype=torch.float64)
    with adding(site, _scaled(delta, scales)):
        logits = activations(host, [prompt] * len(rates)).logits
    enough = (logits.argmax(-1) == target).nonzero()
    return rates[int(enough[0])] if len(enough) else math.nan


def _scaled(delta: MatrixDelta, scales: Float[Tensor, "rate"]) -> Addition:
    factors = delta.factors if delta.values is None else (delta.values,)

    def added(reads: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        # Some MLPs run over all positions of all prompts as one list.
        rows = reads.to(factors[0]).reshape(len(scales), -1, reads.shape[-1])
        written = rows
        for factor in factors:
            written = written @ factor
        return (scales.to(written)[:, None, None] * written).reshape(*reads.shape[:-1], -1)

    return added
