"""Figures 5, 11 to 15, 22 and 23: what single prompts write, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, part
from backward_lens_tl.result import BackwardLensResult

_MORE_PROMPTS = 5
_MAGNIFIED = 0.01


def example_table(evidence: Evidence) -> Finding:
    """The layers x tokens table of the paper's own prompt (figure 5)."""
    return _tables([evidence.example], "logit_lens")


def normalized_table(evidence: Evidence) -> Finding:
    """The same under the Normalized Logit Lens (figures 22 and 23)."""
    found = _tables([evidence.example], "normalized")
    return replace(found, checks=(*_normalized(evidence), *found.checks))


def more_tables(evidence: Evidence) -> Finding:
    """The tables of other prompts (figures 11 to 15)."""
    shown = evidence.prompts.head(_MORE_PROMPTS)
    rows = zip(shown["text"].tolist(), shown["target_id"].tolist(), strict=True)
    return _tables([evidence.result(text, target) for text, target in rows], "logit_lens")


def _tables(results: Sequence[BackwardLensResult], lens: str) -> Finding:
    shown: dict[str, BackwardLensResult] = {}
    for result in results:
        name = f"{result.capture.prompt(0)} → {result.target()}"
        # Data may have a prompt twice.
        shown[f"{name} (again)" if name in shown else name] = result.under(lens)
    return Finding(
        (_target_is_written(shown), _last_token_writes(shown)),
        {name: result.to_df() for name, result in shown.items()},
        results=shown,
        notes=(
            "W_out is read as -delta_i, which the update adds. The paper reads delta_i and looks "
            "at its least probable tokens, which are the same up to the final norm's bias.",
        ),
    )


def _target_is_written(results: dict[str, BackwardLensResult]) -> Check:
    cells = [
        result.cell("W_out", layer, -1) for result in results.values() for layer in result.layers
    ]
    led = sum(cell.target_leads for cell in cells)
    return Check(
        "in more than half of the layers, what the update adds to W_out at the last token has the "
        "target as its most probable token",
        led > len(cells) / 2,
        f"in {part(led, len(cells))} layers",
    )


def _last_token_writes(results: dict[str, BackwardLensResult]) -> Check:
    counted = strongest = 0
    for result in results.values():
        # In the very last layer no other token can write.
        top_quarter = result.norms("W_out")[-max(2, len(result.layers) // 4) : -1, 0]
        counted += len(top_quarter)
        strongest += int((top_quarter.argmax(-1) == top_quarter.shape[-1] - 1).sum())
    return Check(
        "in the last quarter of the layers the last token writes the most (the very last layer, "
        "where no other can, is left out)",
        0 < counted == strongest,
        f"it has the largest VJP in {part(strongest, counted)} of these layers",
    )


def _normalized(evidence: Evidence) -> tuple[Check, ...]:
    cells = evidence.positions
    cells = cells[(cells["matrix"] == "W_out") & ~cells["is_zero"]]
    (raw, of), (normalized, _) = (
        (int((own["target_rank"] >= evidence.far_end).sum()), len(own))
        for own in (cells[cells["projection"] == lens] for lens in ("logit_lens", "normalized"))
    )
    return (
        Check(
            "when normalized, more than half of W_out's VJPs have the target among the least "
            "probable 1 % of the vocabulary",
            normalized > of / 2,
            f"{part(normalized, of)} of them",
        ),
        Check(
            "normalizing magnifies the target: at least 1 % more of the VJPs have it there",
            normalized - raw >= _MAGNIFIED * of,
            f"{part(normalized, of)} of the VJPs when normalized, {part(raw, of)} as they are",
        ),
    )
