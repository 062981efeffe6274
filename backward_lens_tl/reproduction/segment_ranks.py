"""Figures 7 and 18 to 21: where target and answer stand in what gradients write."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from statistics import fmean, median
from typing import TYPE_CHECKING, Literal

from backward_lens_tl.analysis.by_segment import token_ranks_by_segment
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Draw, Finding, by_layer, part
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_IMPROBABLE = 0.75
_NEAR_TOP = 0.1
_MOST_LAYERS = 0.75
_GRADUAL = -0.8


def target_by_segment(evidence: Evidence) -> Finding:
    """The target's rank for `W_out`'s VJPs, by segment (figure 7)."""
    table = token_ranks_by_segment(_matrix(evidence, "W_out"))
    raw = table[(table["projection"] == "logit_lens") & (table["segment"] != "last token")]
    others = raw["median"].dropna().tolist()
    far = sum(rank >= _IMPROBABLE * (evidence.d_vocab - 1) for rank in others)
    return Finding(
        (
            _last_token_is_at_the_far_end(table, evidence),
            Check(
                "the other tokens' VJPs behave alike: in most layers their median rank of the "
                "target is in the least probable quarter",
                far > len(others) / 2,
                f"it is for {part(far, len(others))} segments and layers",
            ),
        ),
        {"target rank by segment": table},
        _rank_figures(table, "W_out", "target"),
        notes=(
            "Zero vectors, as all but one in the last layer, are left out: what is read of them is "
            "the final norm's bias. The paper has them in, which is why its lines meet there.",
        ),
    )


def target_at_last_token(evidence: Evidence) -> Finding:
    """The target's rank for the last token's VJP alone (figure 18)."""
    table = token_ranks_by_segment(_matrix(evidence, "W_out"))
    table = table[table["segment"] == "last token"]
    first, *rest = _at_last_token(table).values()
    return Finding(
        (
            _last_token_is_at_the_far_end(table, evidence),
            Check(
                "the first layer has it less far away than the others",
                bool(rest) and first < median(rest),
                f"median rank {first:.0f} in layer 0"
                + (f", {median(rest):.0f} in the others" if rest else ", the only one"),
            ),
        ),
        {"target rank at the last token": table},
        _rank_figures(table, "W_out", "target"),
    )


def answer_by_segment(evidence: Evidence) -> Finding:
    """The rank of the model's own answer for `W_out`'s VJPs (figure 19)."""
    cells, layers = _matrix(evidence, "W_out"), evidence.layers(0.75, 1.0)
    table = token_ranks_by_segment(cells, of="answer")
    answer, target = _at_last_token(table), _at_last_token(token_ranks_by_segment(cells))
    late = [answer[layer] for layer in layers]
    added = [evidence.d_vocab - 1 - target[layer] for layer in layers]
    bound = _NEAR_TOP * (evidence.d_vocab - 1)
    return Finding(
        (
            Check(
                "in the last quarter of the layers the last token's VJP has the model's own answer "
                "among the most probable tenth of the vocabulary, so that the update takes it away",
                all(rank < bound for rank in late),
                f"median ranks {_in_words(late)} of {evidence.d_vocab}",
            ),
            Check(
                "it is taken away more smoothly than the target is added: in these layers it is "
                "farther from the top than the target from the far end",
                all(own > other for own, other in zip(late, added, strict=True)),
                f"median ranks from the top {_in_words(late)}; the target's from the far end "
                f"{_in_words(added)}",
            ),
        ),
        {"answer rank by segment": table},
        _rank_figures(table, "W_out", "answer"),
    )


def answer_in_inputs(evidence: Evidence) -> Finding:
    """The rank of the model's own answer for `W_in`'s inputs (figure 20)."""
    cells = _matrix(evidence, "W_in")
    table = token_ranks_by_segment(cells, of="answer")
    every = set(cells.loc[cells["segment"].notna(), "prompt"].tolist())
    correct = [prompt for prompt in evidence.correct_prompts if prompt in every]
    tables, drawn = {"all prompts": table}, _rank_figures(table, "W_in", "answer")
    checks = [_builds_up(_at_last_token(table))]
    # Where all answers are correct there is nothing to compare.
    if 0 < len(correct) < len(every):
        own = token_ranks_by_segment(cells, of="answer", prompts=correct)
        tables["prompts answered correctly"] = own
        drawn |= {
            f"{name}, answered correctly": draw
            for name, draw in _rank_figures(own, "W_in", "answer").items()
        }
        checks.append(_shows_more(_at_last_token(own), _at_last_token(table), len(correct)))
    answered = part(len(correct), len(every))
    note = (
        f"{answered} prompts are answered correctly, as far as the answer's first token shows."
        if evidence.prompts["is_correct"].notna().any()
        else "The data have no original answers that prompts could be answered with."
    )
    return Finding(tuple(checks), tables, drawn, notes=(note,))


def target_in_inputs(evidence: Evidence) -> Finding:
    """The rank of the target for `W_in`'s inputs (figure 21)."""
    cells = _matrix(evidence, "W_in")
    table = token_ranks_by_segment(cells)
    target, answer = (
        _at_last_token(each) for each in (table, token_ranks_by_segment(cells, of="answer"))
    )
    behind = sum(target[layer] > answer[layer] for layer in target)
    return Finding(
        (
            Check(
                "an input only has the forward pass's own view of the target: in all layers the "
                "model's own answer is ranked better than the target",
                0 < behind == len(target),
                f"in {part(behind, len(target))} layers; median ranks of the target "
                f"{_in_words(target.values())}, of the answer {_in_words(answer.values())}",
            ),
        ),
        {"target rank by segment": table},
        _rank_figures(table, "W_in", "target"),
    )


# --- parts ---------------------------------------------------------------------------------------


def _matrix(evidence: Evidence, matrix: str) -> pd.DataFrame:
    return evidence.positions[evidence.positions["matrix"] == matrix]


def _at_last_token(table: pd.DataFrame) -> dict[int, float]:
    """Median ranks under the Logit Lens, by layer."""
    return by_layer(table, "median", projection="logit_lens", segment="last token")


def _last_token_is_at_the_far_end(table: pd.DataFrame, evidence: Evidence) -> Check:
    last = _at_last_token(table).values()
    far = sum(rank >= evidence.far_end for rank in last)
    return Check(
        "in three quarters of the layers the last token's VJP has the target among the least "
        "probable 1 % of the vocabulary (median of the prompts)",
        0 < _MOST_LAYERS * len(last) <= far,
        f"in {part(far, len(last))} layers; median ranks {_in_words(last)} of {evidence.d_vocab}",
    )


def _builds_up(last: dict[int, float]) -> Check:
    import pandas as pd

    trend = pd.Series(last).rank().corr(pd.Series(list(last), index=list(last)).rank())
    return Check(
        "the model's answer builds up in the inputs: its rank at the last token falls from layer "
        f"to layer (Spearman's coefficient at most {_GRADUAL})",
        bool(trend <= _GRADUAL),
        f"coefficient {trend:.2f}; median ranks {_in_words(last.values())}",
    )


def _shows_more(right: dict[int, float], every: dict[int, float], count: int) -> Check:
    ours, theirs = fmean(right.values()), fmean(every.values())
    return Check(
        "it shows more where the model answers correctly: its median rank there, over the layers, "
        "is no worse",
        ours <= theirs,
        f"mean over the layers {ours:.1f} of the {count} prompts answered correctly, {theirs:.1f} "
        "of all",
    )


def _in_words(ranks: Iterable[float]) -> str:
    return ", ".join(f"{rank:.0f}" for rank in ranks)


def _rank_figures(
    table: pd.DataFrame, matrix: str, of: Literal["target", "answer"]
) -> dict[str, Draw]:
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
