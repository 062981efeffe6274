"""Table 1 (and 6, 7): the forward pass shift compared with other editing methods."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.models.loading import FACTS_MODEL
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, listed_values
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_SUCCESSFUL = 95.0
_HARMLESS = 0.01
"""Relative change of fluency and perplexity up to which an edit does no harm."""

_LONG, _SHORT = 100, 20
"""Tokens of a generation, prompt included: as published, and for the facts model."""

_SHOWN = (
    *("method", "records", "failed", "efficacy", "efficacy_std", "paraphrase", "paraphrase_std"),
    *("neighborhood", "neighborhood_std", "ngram_entropy", "ngram_entropy_std"),
    *("perplexity", "perplexity_std", "corpus_perplexity", "corpus_perplexity_std"),
    *("free_efficacy", "score", "seconds"),
)
_PUBLISHED_COLUMNS = (
    *("method", "efficacy", "paraphrase", "neighborhood"),
    *("ngram_entropy", "perplexity"),
)
PUBLISHED = (
    (NONE, 0.4, 0.4, 11.21, 626.94, 93.56),
    ("ft_first", 96.37, 7.46, 10.12, 618.81, 199.84),
    ("ft_late", 100.0, 46.1, 5.59, 618.5, 103.42),
    ("mend", 71.4, 17.6, 7.73, 623.94, 94.96),
    ("rome", 99.4, 71.9, 10.91, 622.78, 137.38),
    ("memit", 79.4, 40.7, 10.98, 627.18, 93.6),
    ("shift", 99.4, 41.55, 6.02, 622.45, 93.66),
)
"""GPT-2 xl on 1000 records of CounterFact (table 1 of the paper)."""


def editing_methods(evidence: Evidence) -> Finding:
    """Every preset on the first records of the data (tables 1, 6 and 7)."""
    import pandas as pd

    length = _SHORT if evidence.model_name == FACTS_MODEL else _LONG
    found = evidence.evaluation("methods", evidence.presets(), generation_length=length)
    summary = found.summary()
    measured = summary.set_index("method")
    checks = {
        "efficacy": _efficacy,
        "ngram_entropy": _fluency,
        "neighborhood": _neighborhood,
        "paraphrase": _paraphrase,
    }
    missing = [
        metric for metric in checks if metric != "efficacy" and measured[metric].isna().any()
    ]
    return Finding(
        tuple(check(measured) for metric, check in checks.items() if metric not in missing),
        {
            "methods": summary[list(_SHOWN)],
            "published, GPT-2 xl": pd.DataFrame(PUBLISHED, columns=list(_PUBLISHED_COLUMNS)),
        },
        {"scores": partial(figures.edit_scores, found)},
        notes=(
            "Each edit changes one record, starting from the unedited weights. The numbers are "
            "means and standard deviations over records. Efficacy, paraphrase and neighborhood are "
            "the percentage of prompts whose intended answer is the most probable one.",
            f"Generations have {length} tokens. Perplexity is measured on "
            f"{found.about['texts']['n']} texts of {found.about['texts']['name']!r}: the mean over "
            "the texts, which a single text can dominate, and the perplexity of all of them "
            "together, which the check uses.",
            *(
                f"The data have no prompts for {metric}, so it is not checked."
                for metric in missing
            ),
        ),
    )


def _efficacy(measured: pd.DataFrame) -> Check:
    efficacy = measured["efficacy"]
    return Check(
        "with the forward pass shift, the target is the model's answer in at least "
        f"{_SUCCESSFUL:.0f} % of the records",
        bool(efficacy["shift"] >= _SUCCESSFUL),
        listed_values(efficacy.drop(NONE).items(), unit=" %"),
    )


def _fluency(measured: pd.DataFrame) -> Check:
    entropy, perplexity = measured["ngram_entropy"], measured["corpus_perplexity"]
    kept = entropy["shift"] / entropy[NONE]
    growth = perplexity["shift"] / perplexity[NONE] - 1
    return Check(
        "its edits keep 99 % of the n-gram entropy of generations, and perplexity grows by less "
        "than 1 %",
        bool(kept >= 1 - _HARMLESS and growth < _HARMLESS),
        f"{100 * kept:.1f} % of the entropy; perplexity {perplexity[NONE]:.3f} before, "
        f"{perplexity['shift']:.3f} after",
    )


def _neighborhood(measured: pd.DataFrame) -> Check:
    own = measured["neighborhood"]
    return Check(
        "it preserves fewer neighborhood prompts than ROME and MEMIT",
        bool(own["shift"] < min(own["rome"], own["memit"])),
        _percentages(own, ("shift", "rome", "memit")),
    )


def _paraphrase(measured: pd.DataFrame) -> Check:
    own = measured["paraphrase"]
    return Check(
        "it generalizes to more paraphrases than fine-tuning the first MLP, and to fewer than ROME",
        bool(own["ft_first"] < own["shift"] < own["rome"]),
        _percentages(own, ("ft_first", "shift", "rome")),
    )


def _percentages(values: pd.Series[float], methods: Sequence[str]) -> str:
    return listed_values(values[list(methods)].items(), unit=" %")
