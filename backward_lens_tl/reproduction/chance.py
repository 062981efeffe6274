"""Is a layer in which the model's own answer does not lead an exception, or chance?"""

from __future__ import annotations

from math import comb

from backward_lens_tl.errors import InputError
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, count_check

_LEVEL = 0.01


def answers_by_chance(evidence: Evidence) -> Finding:
    """The answer against the target in `W_in`'s inputs, prompt by prompt, with a sign test."""
    import pandas as pd

    cells = evidence.positions
    cells = cells[
        (cells["matrix"] == "W_in")
        & (cells["projection"] == "logit_lens")
        & (cells["segment"] == "last token")
        & (cells["target_rank"] != cells["answer_rank"])
    ]
    if cells.empty:
        raise InputError("no prompt has a subject, and a target that differs from the answer")
    wins = (cells["answer_rank"] < cells["target_rank"]).groupby(cells["layer"])
    table = pd.DataFrame({"wins": wins.sum(), "prompts": wins.size()}).reset_index()
    table["p"] = [sign_test(int(k), int(n)) for k, n in table[["wins", "prompts"]].values.tolist()]
    is_clear = table["p"] < _LEVEL
    is_better = 2 * table["wins"] > table["prompts"]
    reversed_ = table[~is_better]
    fewest = table.assign(share=table["wins"] / table["prompts"]).nsmallest(1, "share")
    layer, wins_there, n_there, p = fewest[["layer", "wins", "prompts", "p"]].values.tolist()[0]
    return Finding(
        (
            Check(
                "no layer has the target ahead of the model's own answer in more prompts than "
                f"chance allows (two-sided sign test, p < {_LEVEL}), but some layer has it ahead",
                bool(len(reversed_) and not (is_clear & ~is_better).any()),
                f"the answer is ahead in {wins_there:.0f} of {n_there:.0f} prompts in layer "
                f"{layer:.0f}, p = {p:.2g}",
            ),
            count_check(
                "control: the same test finds the answer ahead in more than half of the layers",
                is_clear & is_better,
                "layers",
            ),
        ),
        {"answer ahead of the target": table},
    )


def sign_test(wins: int, n: int) -> float:
    """Two-sided exact sign test.

    Args:
        wins: Number of cases with a positive sign.
        n: Number of cases.

    Returns:
        The probability of a split at least as uneven if both signs are equally likely.
    """
    fewer = min(wins, n - wins)
    probability: float = 2 * sum(comb(n, at) for at in range(fewer + 1)) / 2**n
    return min(1.0, probability)
