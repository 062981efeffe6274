"""Figures 5, 11 to 15, 22 and 23: the tokens that the gradients of single prompts add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, count_check, count_of
from backward_lens_tl.result import BackwardLensResult

_MORE_PROMPTS = 5


def example_table(evidence: Evidence) -> Finding:
    """The layers x tokens table of the paper's own prompt (figure 5)."""
    return _tables([evidence.example], "logit_lens")


def more_tables(evidence: Evidence) -> Finding:
    """The tables of other prompts (figures 11 to 15)."""
    shown = evidence.prompts.head(_MORE_PROMPTS)
    rows = zip(shown["text"].tolist(), shown["target_id"].tolist(), strict=True)
    return _tables([evidence.result(text, target) for text, target in rows], "logit_lens")


def normalized_table(evidence: Evidence) -> Finding:
    """The paper's own prompt under the Normalized Logit Lens (figures 22 and 23)."""
    cells = evidence.positions
    cells = cells[(cells["matrix"] == "W_out") & ~cells["is_zero"]]
    is_far = cells["target_rank"] >= evidence.far_end
    raw, normalized = (is_far[cells["projection"] == lens] for lens in ("logit_lens", "normalized"))
    n_raw, n_normalized, total = int(raw.sum()), int(normalized.sum()), len(raw)
    found = _tables([evidence.example], "normalized")
    checks = (
        count_check(
            "with normalization, more than half of W_out's VJPs have the target among the least "
            "probable 1 % of the vocabulary",
            normalized,
            "VJPs",
        ),
        Check(
            "normalization makes the target more visible: at least 1 % more of the VJPs have it "
            "there",
            n_normalized - n_raw >= 0.01 * total,
            f"{count_of(n_normalized, total)} VJPs with normalization, {count_of(n_raw, total)} "
            "without",
        ),
    )
    return replace(found, checks=(*checks, *found.checks))


def _tables(results: Sequence[BackwardLensResult], lens: str) -> Finding:
    shown: dict[str, BackwardLensResult] = {}
    for result in results:
        name = f"{result.capture.prompt(0)} → {result.target()}"
        shown[f"{name} (again)" if name in shown else name] = result.under(lens)
    return Finding(
        (_target_leads(shown), _last_token_is_longest(shown)),
        {name: result.to_df() for name, result in shown.items()},
        results=shown,
        notes=(
            "W_out is shown as -delta_i, which the update adds. The paper shows the least probable "
            "tokens of delta_i, which are the same up to the bias of the final norm.",
        ),
    )


def _target_leads(results: Mapping[str, BackwardLensResult]) -> Check:
    return count_check(
        "in more than half of the layers, the target is the most probable token of what the update "
        "adds to W_out for the last token",
        [
            result.cell("W_out", layer, -1).target_leads
            for result in results.values()
            for layer in result.layers
        ],
        "layers",
    )


def _last_token_is_longest(results: Mapping[str, BackwardLensResult]) -> Check:
    is_longest = []
    for result in results.values():
        norms = result.norms("W_out")[-max(2, len(result.layers) // 4) : -1, 0]
        is_longest += (norms.argmax(-1) == norms.shape[-1] - 1).tolist()
    return count_check(
        "in the last quarter of the layers, the last token has the largest VJP (not counting the "
        "last layer, where all other VJPs are zero)",
        is_longest,
        "of these layers",
        at_least=1.0,
    )
