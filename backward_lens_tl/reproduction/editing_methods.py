"""Table 1 (and 6, 7): the forward pass shift beside other methods of editing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.models.loading import FACTS_MODEL
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, pick
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_SUCCESSFUL = 95.0
_LASTING = 0.99
"""Part of the unedited model's fluency that an edit leaves, if it does no harm."""

_LONG = 100
"""Tokens of a generation, prompt included, in the published tables."""

_SHORT = 20
"""Those of the facts model, which knows short sentences alone."""

_SHOWN = (
    "method",
    "records",
    "failed",
    "efficacy",
    "efficacy_std",
    "paraphrase",
    "paraphrase_std",
    "neighborhood",
    "neighborhood_std",
    "ngram_entropy",
    "ngram_entropy_std",
    "perplexity",
    "perplexity_std",
    "corpus_perplexity",
    "corpus_perplexity_std",
    "free_efficacy",
    "score",
    "seconds",
)

_PUBLISHED_COLUMNS = (
    "method",
    "efficacy",
    "paraphrase",
    "neighborhood",
    "ngram_entropy",
    "perplexity",
)
_PUBLISHED = (
    (NONE, 0.4, 0.4, 11.21, 626.94, 93.56),
    ("ft_first", 96.37, 7.46, 10.12, 618.81, 199.84),
    ("ft_late", 100.0, 46.1, 5.59, 618.5, 103.42),
    ("mend", 71.4, 17.6, 7.73, 623.94, 94.96),
    ("rome", 99.4, 71.9, 10.91, 622.78, 137.38),
    ("memit", 79.4, 40.7, 10.98, 627.18, 93.6),
    ("shift", 99.4, 41.55, 6.02, 622.45, 93.66),
)
"""GPT-2 xl, 1000 records of CounterFact (table 1 of the paper)."""


def editing_methods(evidence: Evidence) -> Finding:
    """Every preset on the first records of the data (tables 1, 6 and 7)."""
    import pandas as pd

    length = _SHORT if evidence.model_name == FACTS_MODEL else _LONG
    found = evidence.evaluation("methods", evidence.presets(), generation_length=length)
    summary = found.summary()
    published = pd.DataFrame(_PUBLISHED, columns=list(_PUBLISHED_COLUMNS))
    checks = [_efficacy(summary)]
    lacking = []
    for metric, check in (
        ("ngram_entropy", _fluency),
        ("neighborhood", _neighborhood),
        ("paraphrase", _paraphrase),
    ):
        if summary[metric].notna().all():
            checks.append(check(summary))
        else:
            lacking.append(f"The data have no prompts for {metric}, and nothing is said of it.")
    return Finding(
        tuple(checks),
        {"methods": summary[list(_SHOWN)], "published, GPT-2 xl": published},
        {"scores": partial(figures.edit_scores, found)},
        notes=(
            "An edit of one record at a time, each from the unedited weights; means and standard "
            "deviations over records. Efficacy, paraphrase and neighborhood count prompts whose "
            "wanted answer is the most probable one.",
            f"Generations are of {length} tokens. Perplexity is that of "
            f"{found.run['texts']['n']} texts of {found.run['texts']['name']!r}: the "
            "mean of the texts' own, which a single odd text may rule, and that of all together, "
            "which the check takes.",
            *lacking,
        ),
    )


def _efficacy(summary: pd.DataFrame) -> Check:
    shift = pick(summary, "method", "shift")
    return Check(
        f"the forward pass shift makes the target the answer in at least {_SUCCESSFUL:.0f} % of "
        "the records",
        shift["efficacy"] >= _SUCCESSFUL,
        ", ".join(
            f"{row['method']} {row['efficacy']:.1f} %"
            for row in summary.to_dict("records")
            if row["method"] != NONE
        ),
    )


def _fluency(summary: pd.DataFrame) -> Check:
    shift, none = (pick(summary, "method", name) for name in ("shift", NONE))
    kept = shift["ngram_entropy"] / none["ngram_entropy"]
    growth = shift["corpus_perplexity"] / none["corpus_perplexity"]
    return Check(
        "its edits leave 99 % of the generations' n-gram entropy, and perplexity grows by less "
        "than 1 %",
        kept >= _LASTING and growth < 2 - _LASTING,
        f"{100 * kept:.1f} % of the entropy; perplexity {none['corpus_perplexity']:.3f} "
        f"before, {shift['corpus_perplexity']:.3f} after",
    )


def _neighborhood(summary: pd.DataFrame) -> Check:
    shift, *others = (pick(summary, "method", name) for name in ("shift", "rome", "memit"))
    return Check(
        "it leaves fewer neighbors alone than ROME and MEMIT do",
        all(shift["neighborhood"] < other["neighborhood"] for other in others),
        ", ".join(f"{row['method']} {row['neighborhood']:.1f} %" for row in (shift, *others)),
    )


def _paraphrase(summary: pd.DataFrame) -> Check:
    shift, rome, first = (pick(summary, "method", name) for name in ("shift", "rome", "ft_first"))
    return Check(
        "it holds in more paraphrases than fine-tuning of the first MLP, and in fewer than ROME",
        first["paraphrase"] < shift["paraphrase"] < rome["paraphrase"],
        ", ".join(f"{row['method']} {row['paraphrase']:.1f} %" for row in (first, shift, rome)),
    )
