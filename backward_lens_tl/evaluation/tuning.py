"""Settings of a method by trial: every candidate on records that the benchmark does not use."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.run import evaluate
from backward_lens_tl.files.distributed import this_process

if TYPE_CHECKING:
    import pandas as pd

_METRICS = ("efficacy", "paraphrase", "neighborhood")


@dataclass(frozen=True)
class Search:
    """What was tried, and what came of it.

    Attributes:
        candidates: The methods that were tried, by name.
        table: One row per candidate, in their order: `name`, mean `efficacy`, `paraphrase` and
            `neighborhood` in percent (the target is the most probable token), their harmonic mean
            `score`, `seconds` per edit, `failed` edits.
        best_name: The candidate that was chosen.
    """

    candidates: Mapping[str, EditMethod]
    table: pd.DataFrame
    best_name: str

    @property
    def best(self) -> EditMethod:
        """The method that was chosen."""
        return self.candidates[self.best_name]


def search(
    model: nn.Module,
    candidates: Mapping[str, EditMethod],
    data: Any,
    rows: Sequence[int],
    *,
    least_efficacy: float = 95.0,
    prepend_bos: bool | None = False,
    progress: bool = True,
) -> Search:
    """Try methods, or one method with several settings, on a tuning split.

    Among the candidates whose efficacy is at least `least_efficacy` the one with the largest
    harmonic mean of efficacy, paraphrase and neighborhood is chosen; where none is that good, among
    those of the largest efficacy. What the data have no prompts for has no part in the mean.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        candidates: The methods by name.
        data: What `read_records` reads.
        rows: Rows of the data to try them on. Keep them apart from those that are evaluated: what
            was chosen on a record says nothing about it.
        least_efficacy: In percent.
        prepend_bos: Whether prompts get a BOS token when they are edited and scored; as in
            `EvaluationConfig`.
        progress: Whether a bar shows how far it is.

    Returns:
        The choice, and all that was tried.

    Raises:
        EvaluationError: If there is no candidate, or no row.

    Examples:
        >>> import backward_lens_tl as blt
        >>> from backward_lens_tl.evaluation import search
        >>> candidates = {
        ...     f"c={size}": blt.editing.ForwardPassShift(layer=6, size=size, form="scale_free")
        ...     for size in (1.0, 40.0)
        ... }
        >>> model = blt.load_facts_model()
        >>> search(model, candidates, "facts", range(200, 201), progress=False).best_name
        'c=40.0'
    """
    if not candidates:
        raise EvaluationError("there is no candidate; pass methods by name")
    config = EvaluationConfig(
        rows=tuple(rows), generation_length=0, n_texts=0, prepend_bos=prepend_bos
    )
    with _shared_folder() as folder:
        found = evaluate(model, data, folder, candidates, config, progress=progress)
        table = found.summary()
    table = table[table["method"] != NONE].rename(columns={"method": "name"})
    table["score"] = [_harmonic_mean(row) for row in table[list(_METRICS)].to_numpy().tolist()]
    table = table[["name", *_METRICS, "score", "seconds", "failed"]].reset_index(drop=True)
    efficacy = table["efficacy"]
    good = table[efficacy >= min(least_efficacy, efficacy.max())]
    return Search(candidates, table, str(good.loc[good["score"].idxmax(), "name"]))


@contextmanager
def _shared_folder() -> Iterator[str]:
    """A folder for the time being, one for all processes, which share the work."""
    from accelerate.utils import broadcast_object_list

    state = this_process()
    [folder] = broadcast_object_list([tempfile.mkdtemp() if state.is_main_process else ""])
    try:
        yield folder
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def _harmonic_mean(rates: Sequence[float]) -> float:
    there = [rate for rate in rates if not math.isnan(rate)]
    return len(there) / sum(1 / rate for rate in there) if all(there) else 0.0
