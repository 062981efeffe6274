"""Several facts in one edit, which the paper leaves open: the shift beside MEMIT."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.errors import InputError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, pick
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

SIZES = (1, 10, 50)
_SUCCESSFUL = 95.0
_ONCE, _ITERATED, _WHITENED, _SUM = "shift once", "shift iterated", "shift whitened", "shift summed"
_MEMIT = "MEMIT"


def several_facts(evidence: Evidence) -> Finding:
    """1, 10 and 50 facts at once, with one step and iterated, against MEMIT."""
    import pandas as pd

    n_records = len(evidence.requests)
    sizes = [size for size in SIZES if size <= n_records]
    if len(sizes) < 2:
        raise InputError(
            f"{n_records} records cannot be compared with several at once; pass {SIZES[1]} prompts "
            "at least"
        )
    methods = _methods(evidence)
    tables = []
    for size in sizes:
        found = evidence.evaluation(
            f"{size}-at-once",
            methods,
            records=n_records // size * size,  # each block is a whole one
            edits_at_once=size,
            generation_length=0,
        )
        own = found.summary()
        tables.append(own[own["method"] != NONE].assign(edits_at_once=size))
    table = pd.concat(tables, ignore_index=True)
    columns = [
        "method",
        "edits_at_once",
        "efficacy",
        "paraphrase",
        "neighborhood",
        "corpus_perplexity",
    ]
    return Finding(
        (_efficacy(table), _iterating(table), _neighborhood(table)),
        {"several facts": table[[*columns, "score", "norm", "rank", "seconds"]]},
        {
            "several facts": partial(
                figures.edit_curves, table, "edits_at_once", title="Several facts in one edit"
            )
        },
        notes=(
            "All records of a block are edited with one delta, and each is scored under it.",
            "The shift that is not iterated has one size for all facts; iterated, each fact gets "
            "the least multiple of a small size that makes its target the answer.",
        ),
    )


def _methods(evidence: Evidence) -> dict[str, EditMethod]:
    summed, iterated, whitened = (
        evidence.shift_preset(name) for name in ("shift", "shift_iterated", "shift_whitened")
    )
    # As large as most facts need.
    whole = iterated.size * 8
    return {
        _ONCE: replace(iterated, iterations=1, size=whole),
        _ITERATED: iterated,
        _WHITENED: whitened,
        # Only the paper's form is a sum; without a size of its own for a model it is no preset.
        **({_SUM: summed} if summed.form == "paper" else {}),
        _MEMIT: evidence.presets(("memit",))["memit"],
    }


def _at(table: pd.DataFrame, size: int) -> pd.DataFrame:
    return table[table["edits_at_once"] == size]


def _efficacy(table: pd.DataFrame) -> Check:
    largest = int(table["edits_at_once"].max())
    own = _at(table, largest)
    best = pick(own, "method", _ITERATED)["efficacy"]
    return Check(
        f"{largest} facts at once are shifted with an efficacy of at least {_SUCCESSFUL:.0f} %, "
        "when sizes are found fact by fact",
        best >= _SUCCESSFUL,
        _listed(own, "efficacy"),
    )


def _iterating(table: pd.DataFrame) -> Check:
    pairs = [
        (size, *(pick(_at(table, size), "method", name)["efficacy"] for name in (_ITERATED, _ONCE)))
        for size in table["edits_at_once"].unique().tolist()
    ]
    return Check(
        "with one size for all facts never more are learned than with sizes that are found, and "
        f"fewer at {pairs[-1][0]} facts",
        all(iterated >= once for _, iterated, once in pairs) and pairs[-1][1] > pairs[-1][2],
        "; ".join(f"{size}: iterated {one:.1f} %, once {two:.1f} %" for size, one, two in pairs),
    )


def _neighborhood(table: pd.DataFrame) -> Check:
    largest = int(table["edits_at_once"].max())
    own = _at(table, largest)
    shift, memit = (pick(own, "method", name)["neighborhood"] for name in (_WHITENED, _MEMIT))
    return Check(
        f"at {largest} facts MEMIT leaves more of the neighborhood alone than the whitened shift",
        memit > shift,
        _listed(own, "neighborhood"),
    )


def _listed(table: pd.DataFrame, column: str) -> str:
    return ", ".join(f"{row['method']} {row[column]:.1f} %" for row in table.to_dict("records"))
