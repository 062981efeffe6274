"""The paper's experiments on any model, with tables, figures and a report.

model + data ── evidence ──▶ experiments ──▶ findings ── folder, page ──▶ report.html
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_path
from backward_lens_tl.data.readers import FACTS_RECORDS, read_records
from backward_lens_tl.data.records import Records
from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.files.storage import write_text
from backward_lens_tl.models.loading import FACTS_MODEL, load_model
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.experiments import EXPERIMENTS, Experiment, select_experiments
from backward_lens_tl.reproduction.finding import Check, Finding
from backward_lens_tl.reproduction.folder import read_findings, write_finding
from backward_lens_tl.reproduction.page import render_report

__all__ = ["COUNTERFACT", "EXPERIMENTS", "Check", "Finding", "reproduce"]

_BOS = {False: "without BOS", True: "with BOS", None: "with the default BOS"}

COUNTERFACT = "NeelNanda/counterfact-tracing"
"""CounterFact on the Hugging Face hub, the source of the paper's prompts."""

COUNTERFACT_RECORDS = "azhx/counterfact"
"""CounterFact with the prompts that edits are evaluated on."""


def reproduce(
    model: nn.Module | str,
    data: Any,
    out: str | Path,
    names: str | Sequence[str],
    *,
    prompts: int = 100,
    seed: int = 0,
    prepend_bos: bool | None = False,
    jacobian: Any = None,
    statistics: str | Path | Sequence[str] | None = None,
    texts: str | None = None,
    progress: bool = True,
) -> dict[str, Finding]:
    """Run experiments of the paper, and write their tables, figures and a report.

    The report, `report.html`, covers all experiments in the folder, including those of earlier
    calls. The experiments share one sweep over the prompts. It is in the folder too, and resumes if
    it was interrupted.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, or a name for `load_model`.
        data: Data for `read_records`; `None` for the records of the facts model with `"facts"`, and
            CounterFact from the hub with other models. Editing uses the first rows, the other
            experiments a random sample.
        out: The output folder, created if needed.
        names: Figures and tables, such as `"fig4"` or `["fig6", "table2"]`; `"gradients"`,
            `"explanations"`, `"editing"` (which takes minutes), or `"all"`.
        prompts: Number of prompts to use.
        seed: Seed for choosing them.
        prepend_bos: Whether prompts get a BOS token; the paper's had none. `None` is the model's
            default.
        jacobian: A Jacobian Lens of the model for `"early_layers"` and edits, as for
            `jacobian_lens`, or several fits on different numbers of prompts, of which the largest
            is used and the others are compared with it; `None` for the one of the facts model, and
            for none with other models.
        statistics: Texts of the second moments that edits need; see `texts` of `preset_methods`.
        texts: Texts of perplexity, as in `EvaluationConfig`.
        progress: Whether to show progress bars.

    Returns:
        What each experiment found, by name. If there are several experiments, one that the data or
        the model do not support is reported in its notes.

    Raises:
        InputError: If there is no such experiment, no prompt can be analysed, or the only
            experiment cannot be measured on these data.
        UnsupportedModelError: If the only experiment cannot be measured on this model.
        SweepError: If the folder contains a sweep of something else.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> out = tempfile.mkdtemp()
        >>> found = blt.reproduce("facts", "facts", out, "fig4", prompts=2, progress=False)
        >>> found["fig4"].verdict
        'holds'
    """
    experiments = select_experiments(names)
    check_path(out, InputError)
    if data is None:
        data = default_data(model, experiments)
    records = data if isinstance(data, Records) else read_records(data)
    loaded = load_model(model) if isinstance(model, str) else model
    folder = Path(out)
    evidence = Evidence(
        loaded,
        records,
        folder,
        prompts,
        seed,
        prepend_bos,
        progress,
        jacobian,
        statistics,
        texts,
    )
    if any(experiment.group != "editing" for experiment in experiments):
        _check_prompts(evidence)
    found = {}
    for experiment in tqdm(experiments, unit="experiment", disable=not progress):
        began = time.perf_counter()
        try:
            finding = experiment.measure(evidence)
        except (InputError, UnsupportedModelError) as error:
            if len(experiments) == 1:
                raise
            finding = Finding((), notes=(f"It could not be measured: {error}.",))
        seconds = time.perf_counter() - began
        write_finding(folder, experiment, finding, _about(experiment, evidence, seconds))
        write_text(folder / "report.html", render_report(read_findings(folder)))
        found[experiment.name] = finding
    return found


def default_data(model: nn.Module | str, experiments: Sequence[Experiment]) -> str:
    """The data that `reproduce` uses by default.

    Args:
        model: The model or its name.
        experiments: The experiments.

    Returns:
        `"facts"` for the facts model, otherwise the name of CounterFact on the hub.
    """
    if isinstance(model, str) and model == FACTS_MODEL:
        return FACTS_RECORDS
    is_editing = any(experiment.group == "editing" for experiment in experiments)
    return COUNTERFACT_RECORDS if is_editing else COUNTERFACT


def _check_prompts(evidence: Evidence) -> None:
    if evidence.prompts.empty:
        problem = evidence.sweep.rejects()["problem"].iloc[0]
        raise InputError(f"none of the prompts can be analysed; the first: {problem}")


def _about(experiment: Experiment, evidence: Evidence, seconds: float) -> dict[str, Any]:
    is_editing = experiment.group == "editing"  # which uses no sweep
    return {
        "model": evidence.model_name,
        "n_layers": evidence.n_layers,
        "d_vocab": evidence.d_vocab,
        "data": evidence.records.name,
        "prompts": len(evidence.requests) if is_editing else len(evidence.prompts),
        "rejected": 0 if is_editing else len(evidence.sweep.rejects()),
        "cut": 0 if is_editing else evidence.n_cut_targets,
        "bos": _BOS[evidence.prepend_bos],
        "seconds": seconds,
    }
