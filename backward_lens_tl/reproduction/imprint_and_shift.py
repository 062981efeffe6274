"""Lemma 5.2 and figures 1 and 3: what one step changes, predicted and measured."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.analysis.steps import step_changes
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, part
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_FEWEST_PROMPTS, _MOST_PROMPTS = 2, 20
_MOST_STEPS = 400
_ROUNDINGS = 10
_CLOSE = 0.1
_MOSTLY = 0.5


def imprint_and_shift(evidence: Evidence) -> Finding:
    """One step of gradient descent on each matrix alone (lemma 5.2, figures 1 and 3)."""
    # Each step of each prompt is a forward pass.
    affordable = _MOST_STEPS // (2 * evidence.n_layers)
    prompts = evidence.prompts.head(max(_FEWEST_PROMPTS, min(_MOST_PROMPTS, affordable)))
    table = step_changes(
        evidence.model,
        prompts["text"].tolist(),
        prompts["target_id"].tolist(),
        prepend_bos=evidence.prepend_bos,
    )
    return Finding(
        (_outputs(table), _losses(table), _shift(table, evidence), _imprint(table)),
        {"steps": table},
        {"change of the loss": partial(figures.step_changes, table)},
        notes=(
            f"Of {len(prompts)} prompts; each step is of a size that should lower the loss by 1 %.",
        ),
    )


def _outputs(table: pd.DataFrame) -> Check:
    exact = int((table["output_error"] <= _ROUNDINGS * table["rounding"]).sum())
    return Check(
        "the step changes the layer's output by -eta sum_i (x . x_i) delta_i, up to ten times the "
        "rounding of the model's numbers",
        exact == len(table),
        f"for {part(exact, len(table))} steps; the largest relative error is "
        f"{table['output_error'].max():.1e}",
    )


def _losses(table: pd.DataFrame) -> Check:
    error = (table["loss_change"] / table["predicted_loss_change"] - 1).abs()
    close = int((error < _CLOSE).sum())
    return Check(
        "to first order the loss falls by eta times the squared norm of the gradient: within a "
        "tenth of it for nine steps of ten",
        close >= 0.9 * len(table),
        f"for {part(close, len(table))} steps; the loss falls in "
        f"{part(int((table['loss_change'] < 0).sum()), len(table))}",
    )


def _shift(table: pd.DataFrame, evidence: Evidence) -> Check:
    shifts = table[table["shift_target_rank"].notna()]
    led = int((shifts["shift_target_rank"] <= evidence.near_end).sum())
    return Check(
        "W_out's output shifts towards the target: the measured change at the last token has it "
        "among its most probable 1 %, in more than half of the steps",
        led > len(shifts) / 2,
        f"for {part(led, len(shifts))} steps",
    )


def _imprint(table: pd.DataFrame) -> Check:
    own = table.loc[table["matrix"] == "W_in", "self_imprint"]
    mostly = int((own > _MOSTLY).sum())
    return Check(
        "W_in imprints the input that it just saw: at the last token, in more than half of the "
        f"steps, its output changes along its own term ||x||^2 delta (a cosine above {_MOSTLY})",
        mostly > len(own) / 2,
        f"for {part(mostly, len(own))} steps; the median cosine is {own.median():.2f}",
    )
