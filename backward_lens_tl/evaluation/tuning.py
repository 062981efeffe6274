"""Search for settings of a method, on records that the benchmark does not use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from backward_lens_tl._checks import listed, shown, truncated
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.run import evaluate
from backward_lens_tl.evaluation.summary import harmonic_mean
from backward_lens_tl.runs.distributed import this_process

if TYPE_CHECKING:
    import pandas as pd

ACCURACIES = ("efficacy", "paraphrase", "neighborhood")
"""The paper's metrics: whether the answer is the most probable one."""

SUCCESSES = ("efficacy", "paraphrase_success", "neighborhood_success")
"""For models that rarely know a neighbor's answer: which of two answers is more probable there."""


_RATES = (*dict.fromkeys((*ACCURACIES, *SUCCESSES)), "free_efficacy", "kept")
"""Metrics for which more is better, so that their harmonic mean can rank candidates."""


@dataclass(frozen=True)
class Search:
    """The results of a search.

    Attributes:
        candidates: The methods that were tried, by name.
        table: One row per candidate, in their order: `name`, the means of `efficacy` and of the
            metrics in percent (by default `efficacy`, `paraphrase` and `neighborhood`: the answer
            is the most probable one), the metrics' harmonic mean `score`, `seconds` per edit,
            `failed` edits.
        best_name: The name of the best candidate.
    """

    candidates: Mapping[str, EditMethod]
    table: pd.DataFrame
    best_name: str

    @property
    def best(self) -> EditMethod:
        """The best candidate."""
        return self.candidates[self.best_name]


def search(
    model: nn.Module,
    candidates: Mapping[str, EditMethod],
    data: Any,
    rows: Sequence[int],
    *,
    least_efficacy: float = 95.0,
    metrics: Sequence[str] = ACCURACIES,
    prepend_bos: bool | None = False,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Search:
    """Try methods, or one method with several settings, on a tuning split.

    Chooses the candidate with the largest harmonic mean of the metrics among those whose efficacy
    is at least `least_efficacy`, or, if there are none, among those of the largest efficacy. The
    mean leaves out metrics that the data have no prompts for.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        candidates: The methods by name.
        data: What `read_records` reads.
        rows: Rows of the data to try them on, which should not be evaluated later.
        least_efficacy: In percent.
        metrics: `ACCURACIES`, `SUCCESSES`, or other rates.
        prepend_bos: Whether prompts get a BOS token when they are edited and scored; as in
            `EvaluationConfig`.
        folder: Where results are kept, so that the same call resumes a search that was stopped; a
            temporary folder by default.
        progress: Whether to show a progress bar.

    Returns:
        The best candidate and the results of all.

    Raises:
        EvaluationError: If there is no candidate, row or metric, or a metric is not a rate.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.evaluation.tuning import search
        >>> candidates = {
        ...     f"c={size}": blt.editing.ForwardPassShift(layer=6, size=size, key="plain")
        ...     for size in (1.0, 40.0)
        ... }
        >>> model = blt.load_facts_model()
        >>> search(model, candidates, "facts", range(200, 201), progress=False).best_name
        'c=40.0'
    """
    if not candidates:
        raise EvaluationError("candidates is empty; pass methods by name")
    chosen = listed(metrics)
    if not chosen or not set(chosen) <= set(_RATES):
        raise EvaluationError(
            f"metrics is {truncated(shown(metrics))}; pass some of {', '.join(_RATES)}"
        )
    config = EvaluationConfig(
        rows=tuple(rows), generation_length=0, n_texts=0, prepend_bos=prepend_bos
    )
    with nullcontext(folder) if folder is not None else _shared_folder() as out:
        found = evaluate(model, data, out, candidates, config, progress=progress)
        table = found.summary()
    # A folder of an earlier search has the order of that one.
    table = table.set_index("method").loc[list(candidates)].rename_axis("name").reset_index()
    table["score"] = [harmonic_mean(row[~np.isnan(row)]) for row in table[chosen].to_numpy()]
    columns = dict.fromkeys(("name", "efficacy", *chosen, "score", "seconds", "failed"))
    table = table[list(columns)].reset_index(drop=True)
    efficacy = table["efficacy"]
    good = table[efficacy >= min(least_efficacy, efficacy.max())]
    return Search(candidates, table, str(good.loc[good["score"].idxmax(), "name"]))


@contextmanager
def _shared_folder() -> Iterator[str]:
    """A temporary folder that all processes share."""
    from accelerate.utils import broadcast_object_list

    state = this_process()
    [folder] = broadcast_object_list([tempfile.mkdtemp() if state.is_main_process else ""])
    try:
        yield folder
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
