"""Lemma 5.2 and figures 1 and 3: what one gradient step changes, predicted and measured."""

from __future__ import annotations

from functools import partial

from backward_lens_tl.analysis.steps import step_changes
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Finding, count_check, count_of
from backward_lens_tl.views import figures

_FEWEST_PROMPTS, _MOST_PROMPTS = 2, 20
_MOST_STEPS = 400


def imprint_and_shift(evidence: Evidence) -> Finding:
    """One step of gradient descent on each matrix alone (lemma 5.2, figures 1 and 3)."""
    affordable = _MOST_STEPS // (2 * evidence.n_layers)  # each step of a prompt is a forward pass
    prompts = evidence.prompts.head(max(_FEWEST_PROMPTS, min(_MOST_PROMPTS, affordable)))
    table = step_changes(
        evidence.model,
        prompts["text"].tolist(),
        prompts["target_id"].tolist(),
        prepend_bos=evidence.prepend_bos,
    )
    loss_error = (table["loss_change"] / table["predicted_loss_change"] - 1).abs()
    n_lower = int((table["loss_change"] < 0).sum())
    shifts = table.loc[table["shift_target_rank"].notna(), "shift_target_rank"]
    imprint = table.loc[table["matrix"] == "W_in", "self_imprint"]
    checks = (
        count_check(
            "the step changes the layer's output by -eta sum_i (x . x_i) delta_i, to within ten "
            "times the model's rounding error",
            table["output_error"] <= 10 * table["rounding"],
            f"steps; the largest relative error is {table['output_error'].max():.1e}",
            at_least=1.0,
        ),
        count_check(
            "the loss falls by eta times the squared gradient norm, to within 10 %, in at least "
            "90 % of the steps",
            loss_error < 0.1,
            f"steps; the loss falls in {count_of(n_lower, len(table))}",
            at_least=0.9,
        ),
        count_check(
            "W_out's output shifts towards the target: the measured change at the last token has "
            "the target among its most probable 1 %, in more than half of the steps",
            shifts <= evidence.near_end,
            "steps",
        ),
        count_check(
            "W_in imprints its own input: the output for the last token changes along the term "
            "||x||^2 delta, with a cosine above 0.5, in more than half of the steps",
            imprint > 0.5,
            f"steps; the median cosine is {imprint.median():.2f}",
        ),
    )
    return Finding(
        checks,
        {"steps": table},
        {"change of the loss": partial(figures.step_changes, table)},
        notes=(f"{len(prompts)} prompts. Each step should lower the loss by 1 %, to first order.",),
    )
