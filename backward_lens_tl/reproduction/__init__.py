"""The paper's experiments on any model, each with its figure, its table and a report.

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
from backward_lens_tl.files.storage import replacing
from backward_lens_tl.models.loading import FACTS_MODEL, load_model
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.experiments import EXPERIMENTS, Experiment, select_experiments
from backward_lens_tl.reproduction.finding import Check, Finding
from backward_lens_tl.reproduction.folder import read_findings, write_finding
from backward_lens_tl.reproduction.page import render_report

__all__ = ["COUNTERFACT", "EXPERIMENTS", "Check", "Finding", "reproduce"]

_BOS = {False: "without BOS", True: "with BOS", None: "BOS as the model has it"}

COUNTERFACT = "NeelNanda/counterfact-tracing"
"""CounterFact on the Hugging Face hub, which the paper's prompts come from."""

COUNTERFACT_RECORDS = "azhx/counterfact"
"""The same with the prompts that edits are tested on."""


def reproduce(
    model: nn.Module | str,
    data: Any,
    out: str | Path,
    names: str | Sequence[str],
    *,
    prompts: int = 100,
    seed: int = 0,
    prepend_bos: bool | None = False,
    progress: bool = True,
) -> dict[str, Finding]:
    """Run experiments of the paper, and write their tables, their figures and a report.

    The report, `report.html`, has all experiments that are in the folder, also those of earlier
    calls. Experiments share one sweep over the prompts, which lies in the folder as well and is
    gone on with if it was stopped.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, or a name as `load_model` takes it.
        data: What `read_records` reads; `None` for the facts model's own records with `"facts"`,
            and CounterFact from the hub with other models. Editing takes the first rows, the others
            any.
        out: The folder; it is made if it is not there.
        names: Figures and tables, such as `"fig4"` or `["fig6", "table2"]`; `"gradients"`,
            `"editing"` (which takes minutes), or `"all"`.
        prompts: How many prompts are taken from the data.
        seed: Of their choice.
        prepend_bos: Whether prompts get a BOS token; the paper's had none. `None` is the model's
            own default.
        progress: Whether bars show how far it is.

    Returns:
        What each experiment found, by its name. Of several, one that the data or the model do not
        allow says so in its notes.

    Raises:
        InputError: If there is no such experiment, none of the prompts can be analysed, or the only
            experiment cannot be measured with these data.
        UnsupportedModelError: If the only experiment cannot be measured on this model.
        SweepError: If the folder holds the sweep of something else.

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
    loaded = load_model(model) if isinstance(model, str) else model
    chosen = default_data(model, experiments) if data is None else data
    records = chosen if isinstance(chosen, Records) else read_records(chosen)
    folder = Path(out)
    evidence = Evidence(
        loaded,
        records,
        folder,
        prompts=prompts,
        seed=seed,
        prepend_bos=prepend_bos,
        progress=progress,
    )
    if any(experiment.group == "gradients" for experiment in experiments):
        _check_prompts(evidence)
    found = {}
    for experiment in tqdm(experiments, unit="experiment", disable=not progress):
        began = time.perf_counter()
        try:
            finding = experiment.measure(evidence)
        except (InputError, UnsupportedModelError) as error:
            # One that these data or this model do not allow keeps no other from being measured.
            if len(experiments) == 1:
                raise
            finding = Finding((), notes=(f"It could not be measured: {error}.",))
        seconds = time.perf_counter() - began
        write_finding(folder, experiment, finding, _about(experiment, evidence, seconds))
        with replacing(folder / "report.html") as partial:
            partial.write_text(render_report(read_findings(folder)), encoding="utf-8")
        found[experiment.name] = finding
    return found


def default_data(model: nn.Module | str, experiments: Sequence[Experiment]) -> str:
    """What prompts are taken from if nobody says.

    Args:
        model: The model, or its name.
        experiments: What is measured.

    Returns:
        `"facts"` for the facts model by its name, CounterFact's name on the hub for others.
    """
    if isinstance(model, str) and model == FACTS_MODEL:
        return FACTS_RECORDS
    is_editing = any(experiment.group == "editing" for experiment in experiments)
    return COUNTERFACT_RECORDS if is_editing else COUNTERFACT


def _check_prompts(evidence: Evidence) -> None:
    if len(evidence.prompts) == 0:
        problem = evidence.sweep.rejects()["problem"].iloc[0]
        raise InputError(f"none of the prompts can be analysed; the first: {problem}")


def _about(experiment: Experiment, evidence: Evidence, seconds: float) -> dict[str, Any]:
    # Editing takes the first rows of the data and reads no gradients of the others.
    is_editing = experiment.group == "editing"
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
