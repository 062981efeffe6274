"""The claims about many prompts under other conditions: which of them changes a verdict?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from backward_lens_tl.data.records import Record, Records, fingerprint
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.reproduction import segment_norms, segment_ranks, single_prompts
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding

if TYPE_CHECKING:
    import pandas as pd

CLAIMS: Mapping[str, Callable[[Evidence], Finding]] = {
    "fig6": segment_norms.norms_of_shifts,
    "fig7": segment_ranks.target_by_segment,
    "fig17": segment_norms.norms_of_inputs,
    "fig18": segment_ranks.target_at_last_token,
    "fig19": segment_ranks.answer_by_segment,
    "fig20": segment_ranks.answer_in_inputs,
    "fig21": segment_ranks.target_in_inputs,
    "fig22": single_prompts.normalized_table,
}
"""The experiments that read the table of positions."""

_SOME, _FEWEST = 15, 2
_HUGE = 10
_ALL, _FEW = "as in the paper", "as in the paper, fewer prompts"


def sinks(evidence: Evidence) -> Finding:
    """Attention sinks: the claims without position 0, and with a BOS token there."""
    some = _some(evidence)
    conditions = {
        _ALL: evidence,
        "without position 0": _selected(evidence, lambda cells: cells["position"] > 0),
        _FEW: some,
        "with BOS": replace(some, folder=evidence.folder / "with-bos", prepend_bos=True),
    }
    table = _verdicts(conditions)
    layer, ratio, share = _sink(evidence)
    checks = (
        _restores(table, "without position 0", _ALL),
        _restores(table, "with BOS", _FEW),
        Check(
            "there is a sink: in some layer, the input of W_out at position 0 is more than "
            f"{_HUGE} times as long as the longest other one, by the median over prompts",
            ratio > _HUGE,
            f"{ratio:.1f} times in layer {layer}, where position 0 holds {100 * share:.0f} % of "
            "the squared write norms",
        ),
    )
    return Finding(checks, {"verdicts": table}, notes=(_about(some),))


def prompt_forms(evidence: Evidence) -> Finding:
    """Chat prompts, targets of one token, and prompts that are answered correctly."""
    some = _some(evidence)
    prompts = evidence.prompts
    conditions = {_ALL: evidence}
    whole = prompts[[_is_whole(evidence, row) for row in prompts.itertuples()]]
    subsets = {
        "targets of one token": whole["prompt"].tolist(),
        "answered correctly": evidence.correct_prompts,
    }
    for name, rows in subsets.items():
        if _FEWEST <= len(rows) < len(prompts):
            conditions[name] = _of_prompts(evidence, rows)
    chat = _as_chat(evidence, some)
    if chat is not None:
        conditions |= {_FEW: some, "as a chat": chat}
    names = [name for name in conditions if name not in (_ALL, _FEW)]
    if not names:
        raise InputError(
            "all prompts are alike: none or all are answered correctly, all targets or none have "
            "one token, and the tokenizer has no chat template"
        )
    table = _verdicts(conditions)
    checks = tuple(_restores(table, name, _FEW if name == "as a chat" else _ALL) for name in names)
    sizes = [f"{name}: {len(rows)} of {len(prompts)} prompts" for name, rows in subsets.items()]
    return Finding(checks, {"verdicts": table}, notes=(f"{', '.join(sizes)}.", _about(some)))


def _verdicts(conditions: Mapping[str, Evidence]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for condition, evidence in conditions.items():
        for name, measure in CLAIMS.items():
            try:
                finding = measure(evidence)
            except InputError:  # no prompt with a subject is left
                continue
            rows.append(
                {
                    "condition": condition,
                    "experiment": name,
                    "prompts": len(evidence.prompts),
                    "holds": finding.checks[0].holds,
                    "found": finding.checks[0].found,
                }
            )
    return pd.DataFrame(rows)


def _restores(table: pd.DataFrame, condition: str, reference: str) -> Check:
    """Whether a condition makes at least half of the failing claims hold."""
    holds = {
        name: dict(zip(own["experiment"], own["holds"], strict=True))
        for name, own in table.groupby("condition")
    }
    shared = [name for name in holds.get(reference, {}) if name in holds.get(condition, {})]
    failing = [name for name in shared if not holds[reference][name]]
    restored = [name for name in failing if holds[condition][name]]
    broken = [name for name in shared if holds[reference][name] and not holds[condition][name]]
    return Check(
        f"{condition}, at least half of the main claims that fail hold",
        bool(failing) and 2 * len(restored) >= len(failing),
        f"of {len(shared)} claims, {len(failing)} fail {reference}; {condition}, "
        f"{_named(restored)} hold{'s' if len(restored) == 1 else ''}, and "
        f"{_named(broken)} no longer {'does' if len(broken) == 1 else 'do'}",
    )


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) or "none of these"


def _sink(evidence: Evidence) -> tuple[int, float, float]:
    """The layer with the largest ratio of input norms, the ratio, and the share written there."""
    cells = evidence.positions
    cells = cells[(cells["matrix"] == "W_out") & (cells["projection"] == "logit_lens")]
    cells = cells.assign(square=(cells["norm"] * cells["input_norm"]) ** 2)
    keys = ["layer", "prompt"]
    first = cells[cells["position"] == 0].set_index(keys)
    rest = cells[cells["position"] > 0].groupby(keys)["input_norm"].max()
    ratios = (first["input_norm"] / rest).groupby("layer").median()
    shares = (first["square"] / cells.groupby(keys)["square"].sum()).groupby("layer").mean()
    layer = max(ratios.index, key=lambda each: float(ratios[each]))
    return int(layer), float(ratios[layer]), float(shares[layer])


def _some(evidence: Evidence) -> Evidence:
    """The evidence of a few of the prompts, evenly chosen from the shortest to the longest."""
    rows = evidence.prompts["prompt"].tolist()
    chosen = rows[:: max(1, len(rows) // _SOME)][:_SOME]
    return _of_prompts(evidence, chosen)


def _of_prompts(evidence: Evidence, rows: Sequence[int]) -> Evidence:
    return _selected(evidence, lambda cells: cells["prompt"].isin(rows))


def _selected(evidence: Evidence, keep: Callable[[pd.DataFrame], Any]) -> Evidence:
    """The same evidence from some of its cells; new sweeps use the prompts that are left."""
    cells, prompts = evidence.positions, evidence.prompts
    positions = cells[keep(cells)]
    kept = prompts[prompts["prompt"].isin(positions["prompt"])]
    rows = tuple(evidence.records.rows[row] for row in kept["prompt"])
    records = Records(evidence.records.name, rows, fingerprint(rows))
    found = copy.copy(evidence)
    found.records = records
    vars(found).update(
        positions=positions,
        prompts=kept,
        correct_prompts=[row for row in evidence.correct_prompts if row in set(kept["prompt"])],
    )
    return found


def _is_whole(evidence: Evidence, row: Any) -> bool:
    target = getattr(evidence.records.rows[row.prompt], "target", None)
    return not isinstance(target, str) or target == row.target


def _as_chat(evidence: Evidence, some: Evidence) -> Evidence | None:
    """The prompts as questions in the tokenizer's chat template, which the answer continues."""
    tokenizer = host_of(evidence.model).tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    rows = tuple(_chat(tokenizer, row) for row in some.records.rows if isinstance(row, Record))
    records = Records(f"{some.records.name} as a chat", rows, fingerprint(rows))
    return replace(some, records=records, folder=evidence.folder / "chat", prepend_bos=False)


def _chat(tokenizer: Any, row: Record) -> Record:
    question = {"role": "user", "content": f"Complete this sentence: {row.prompt}"}
    opening: str = tokenizer.apply_chat_template(
        [question], tokenize=False, add_generation_prompt=True
    )
    start = None if row.subject is None else len(opening) + row.prompt.rfind(row.subject)
    return replace(row, prompt=f"{opening}{row.prompt}", subject_start=start)


def _about(some: Evidence) -> str:
    return (
        f"Conditions that need other prompts use {len(some.prompts)} of them, and are compared "
        "with the same prompts as in the paper. Only the main claims of experiments that read "
        "many prompts are repeated."
    )
