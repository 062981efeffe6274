"""Several facts in one edit, which the paper leaves open: the shift compared with MEMIT."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.errors import InputError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, listed_values
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

SIZES = (1, 10, 50, 200)
_SUCCESSFUL = 95.0
_MOST_SIZED = 10
_ENOUGH = 1.5
_STEPS = 8
_ONCE, _ITERATED, _WHITENED, _SUM = "shift once", "shift iterated", "shift whitened", "shift summed"
_AUTO = "shift auto"
_MEMIT = "MEMIT"
_SHOWN = (
    *("method", "edits_at_once", "efficacy", "paraphrase", "neighborhood", "kept"),
    *("corpus_perplexity", "score", "norm", "rank", "seconds"),
)


def several_facts(evidence: Evidence) -> Finding:
    """1, 10, 50 and 200 facts at once, with one size and with one each, compared with MEMIT."""
    import pandas as pd

    n_records = len(evidence.requests)
    sizes = [size for size in SIZES if size <= n_records]
    if len(sizes) < 2:
        raise InputError(
            f"{n_records} records are too few to edit several at once; pass at least {SIZES[1]} "
            "prompts"
        )
    methods = _methods(evidence)
    tables = []
    for size in sizes:
        found = evidence.evaluation(
            f"{size}-at-once",
            methods,
            records=n_records // size * size,  # only full blocks
            edits_at_once=size,
            generation_length=0,
        )
        own = found.summary()
        tables.append(own[own["method"] != NONE].assign(edits_at_once=size))
    table = pd.concat(tables, ignore_index=True)
    draw = partial(figures.edit_curves, table, "edits_at_once", title="Several facts in one edit")
    return Finding(
        _checks(table),
        {"several facts": table[list(_SHOWN)]},
        {"several facts": draw},
        notes=(
            "All records of a block are edited with one weight delta, and each is evaluated with "
            "it.",
            f"{_ONCE!r} has the same size for all facts, which is enough for most of them alone. "
            f"{_ITERATED!r}, {_WHITENED!r} and {_AUTO!r} find the least size of each fact.",
            f"{_MEMIT} searches for the value of a fact once, in the edit of the fact alone; the "
            "time of edits of several is without it.",
        ),
    )


def _methods(evidence: Evidence) -> dict[str, EditMethod]:
    summed, iterated, whitened = (
        evidence.shift_preset(name) for name in ("shift", "shift_iterated", "shift_whitened")
    )
    return {
        _ONCE: replace(iterated, iterations=1, size=_usual_size(evidence, iterated)),
        _ITERATED: iterated,
        _WHITENED: whitened,
        _AUTO: evidence.shift_preset("shift_auto"),
        _SUM: summed,
        _MEMIT: evidence.memit_preset(),
    }


def _usual_size(evidence: Evidence, shift: ForwardPassShift) -> float:
    """A size that is enough for most facts, edited one at a time."""
    if shift.size != "auto":
        return _STEPS * shift.size
    edits = [shift(evidence.model, request) for request in evidence.requests[:_MOST_SIZED]]
    sizes = [abs(edit.outcomes[0].size) for edit in edits]
    return _ENOUGH * median([size for size in sizes if size] or [1.0])  # none if it is the answer


def _checks(table: pd.DataFrame) -> tuple[Check, ...]:
    efficacy = table.pivot(index="edits_at_once", columns="method", values="efficacy")
    iterated, once = efficacy[_ITERATED], efficacy[_ONCE]
    size = int(efficacy.index[-1])
    largest = table[table["edits_at_once"] == size].set_index("method")
    kept = largest["kept"]
    return (
        Check(
            f"{size} facts at once are edited with an efficacy of at least {_SUCCESSFUL:.0f} %, if "
            "each fact gets its own size",
            bool(iterated[size] >= _SUCCESSFUL),
            listed_values(largest["efficacy"].items(), unit=" %"),
        ),
        Check(
            "with one size for all facts, never more of them are learned than with a size for "
            f"each, and fewer of {size} facts",
            bool((iterated >= once).all() and iterated[size] > once[size]),
            "; ".join(
                f"{n}: iterated {iterated[n]:.1f} %, once {once[n]:.1f} %" for n in efficacy.index
            ),
        ),
        Check(
            f"with {size} facts, more neighborhood prompts keep their most probable token with "
            "MEMIT than with the whitened shift",
            bool(kept[_MEMIT] > kept[_WHITENED]),
            listed_values(kept.items(), unit=" %"),
        ),
    )
