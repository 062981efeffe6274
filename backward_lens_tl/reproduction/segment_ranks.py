"""Figures 7 and 18 to 21: ranks of the target and of the model's own answer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Literal

from backward_lens_tl.analysis.by_segment import token_ranks_by_segment
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import (
    Check,
    Draw,
    Finding,
    count_check,
    count_of,
)
from backward_lens_tl.views import figures
from backward_lens_tl.views.text import counted

if TYPE_CHECKING:
    import pandas as pd

_GRADUAL = -0.8


def target_by_segment(evidence: Evidence) -> Finding:
    """The target's rank for `W_out`'s VJPs, by segment (figure 7)."""
    table = token_ranks_by_segment(_cells(evidence, "W_out"))
    raw = table[(table["projection"] == "logit_lens") & (table["segment"] != "last token")]
    return Finding(
        (
            _last_token_at_the_far_end(table, evidence),
            count_check(
                "the VJPs of the other tokens behave alike: in most layers, their median rank of "
                "the target is in the least probable quarter of the vocabulary",
                raw["median"].dropna() >= 0.75 * (evidence.d_vocab - 1),
                "segments and layers",
            ),
        ),
        {"target rank by segment": table},
        _figures(table, "W_out", "target"),
        notes=(
            "Zero vectors, such as all but one in the last layer, are omitted: their ranks are "
            "those of the final norm's bias. The paper includes them, which is why its lines meet "
            "in the last layer.",
        ),
    )


def target_at_last_token(evidence: Evidence) -> Finding:
    """The target's rank for the VJP of the last token (figure 18)."""
    table = token_ranks_by_segment(_cells(evidence, "W_out"))
    table = table[table["segment"] == "last token"]
    ranks = _at_last_token(table)
    first, rest = ranks.iloc[0], ranks.iloc[1:]
    others = f"{rest.median():.0f} in the others" if len(rest) else "the only one"
    return Finding(
        (
            _last_token_at_the_far_end(table, evidence),
            Check(
                "the target is less far down in the first layer than in the others",
                bool(first < rest.median()),
                f"median rank {first:.0f} in layer 0, {others}",
            ),
        ),
        {"target rank at the last token": table},
        _figures(table, "W_out", "target"),
    )


def answer_by_segment(evidence: Evidence) -> Finding:
    """The rank of the model's own answer for `W_out`'s VJPs (figure 19)."""
    cells, layers = _cells(evidence, "W_out"), list(evidence.layers(0.75, 1.0))
    table = token_ranks_by_segment(cells, of="answer")
    answer = _at_last_token(table)[layers]
    target = evidence.d_vocab - 1 - _at_last_token(token_ranks_by_segment(cells))[layers]
    return Finding(
        (
            Check(
                "in the last quarter of the layers, the last token's VJP has the model's own "
                "answer among the most probable tenth of the vocabulary, so the update demotes it",
                bool((answer < 0.1 * (evidence.d_vocab - 1)).all()),
                f"median ranks {_text(answer)} of {evidence.d_vocab}",
            ),
            Check(
                "it is demoted more smoothly than the target is promoted: in these layers, it is "
                "farther from the top than the target is from the bottom",
                bool((answer > target).all()),
                f"median ranks from the top {_text(answer)}; of the target, from the bottom "
                f"{_text(target)}",
            ),
        ),
        {"answer rank by segment": table},
        _figures(table, "W_out", "answer"),
    )


def answer_in_inputs(evidence: Evidence) -> Finding:
    """The rank of the model's own answer for `W_in`'s inputs (figure 20)."""
    cells = _cells(evidence, "W_in")
    table = token_ranks_by_segment(cells, of="answer")
    last = _at_last_token(table)
    trend = last.rank().corr(last.index.to_series().rank())
    checks = [
        Check(
            "the model's answer builds up in the inputs: its rank at the last token falls from "
            f"layer to layer, with a Spearman's coefficient of at most {_GRADUAL}",
            bool(trend <= _GRADUAL),
            f"coefficient {trend:.2f}; median ranks {_text(last)}",
        )
    ]
    tables, drawn = {"all prompts": table}, _figures(table, "W_in", "answer")
    every = set(cells.loc[cells["segment"].notna(), "prompt"])
    correct = [prompt for prompt in evidence.correct_prompts if prompt in every]
    if 0 < len(correct) < len(every):
        own = token_ranks_by_segment(cells, of="answer", prompts=correct)
        tables["prompts answered correctly"] = own
        drawn |= {
            f"{name}, answered correctly": draw
            for name, draw in _figures(own, "W_in", "answer").items()
        }
        ours, theirs = _at_last_token(own).mean(), last.mean()
        checks.append(
            Check(
                "it is more visible where the model answers correctly: its median rank, averaged "
                "over the layers, is no worse there",
                bool(ours <= theirs),
                f"{ours:.1f} for the {counted(len(correct), 'prompt')} answered correctly, "
                f"{theirs:.1f} for all prompts",
            )
        )
    note = "The data have no original answers to compare the model's answers with."
    if evidence.prompts["is_correct"].notna().any():
        answered = count_of(len(correct), len(every))
        note = f"{answered} prompts are answered correctly, judged by the answer's first token."
    return Finding(tuple(checks), tables, drawn, notes=(note,))


def target_in_inputs(evidence: Evidence) -> Finding:
    """The rank of the target for `W_in`'s inputs (figure 21)."""
    cells = _cells(evidence, "W_in")
    table = token_ranks_by_segment(cells)
    target, answer = (
        _at_last_token(table),
        _at_last_token(token_ranks_by_segment(cells, of="answer")),
    )
    check = count_check(
        "an input contains only what the forward pass itself predicts: in all layers, the model's "
        "own answer has a better rank than the target",
        target > answer,
        f"layers; median ranks of the target {_text(target)}; of the answer {_text(answer)}",
        at_least=1.0,
    )
    return Finding((check,), {"target rank by segment": table}, _figures(table, "W_in", "target"))


def _cells(evidence: Evidence, matrix: str) -> pd.DataFrame:
    return evidence.positions[evidence.positions["matrix"] == matrix]


def _at_last_token(table: pd.DataFrame) -> pd.Series[float]:
    """Median ranks under the Logit Lens, by layer."""
    own = table[(table["projection"] == "logit_lens") & (table["segment"] == "last token")]
    return own.set_index("layer")["median"].sort_index()


def _last_token_at_the_far_end(table: pd.DataFrame, evidence: Evidence) -> Check:
    last = _at_last_token(table)
    return count_check(
        "in three quarters of the layers, the last token's VJP has the target among the least "
        "probable 1 % of the vocabulary, by the median over prompts",
        last >= evidence.far_end,
        f"layers; median ranks {_text(last)} of {evidence.d_vocab}",
        at_least=0.75,
    )


def _text(ranks: Iterable[float]) -> str:
    return ", ".join(f"{rank:.0f}" for rank in ranks)


def _figures(table: pd.DataFrame, matrix: str, of: Literal["target", "answer"]) -> dict[str, Draw]:
    return {
        f"rank of the {of}, {matrix}, {lens}": partial(
            figures.token_ranks_by_segment,
            table,
            matrix=matrix,
            of=of,
            projection=lens,
            scale="linear",
        )
        for lens in table["projection"].unique()
    }
