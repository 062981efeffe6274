"""What a training run writes: how low-rank the change of SGD, Adam and Muon is, and how readable.

The claims and their bounds were written before anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Check, Finding, listed_values
from backward_lens_tl.reproduction.training_loop import FIRST_DECREASES
from backward_lens_tl.reproduction.training_readings import DIRECTIONS, TOKENS
from backward_lens_tl.reproduction.training_runs import (
    OPTIMIZERS,
    RANDOM,
    TRAINED,
    UNTRAINED,
    WEIGHTS,
    TrainingConfig,
    training_runs,
)
from backward_lens_tl.views import figures

if TYPE_CHECKING:
    import pandas as pd

_MOST_FACTS = 20
_LOW_RANK = 0.5
_OUTSIDE = {"sgd": (0.0, 0.01), "adam": (0.5, 1.0), "muon": (0.0, 0.25)}
_ALIGNED = 0.5
_OVER_RANDOM = 3
_OVER_UNSEEN = 2
_NEAR = 0.5
_SAME = 0.1
_KEYS = ["optimizer", "weights", "answers", "step"]


def training_changes(evidence: Evidence) -> Finding:
    """Train with three optimizers, in full and with LoRA, on facts and on shuffled answers."""
    found = training_runs(
        evidence.model,
        evidence.records,
        evidence.folder / "training",
        TrainingConfig(
            facts=min(_MOST_FACTS, evidence.n_prompts),
            prepend_bos=evidence.prepend_bos,
            seed=evidence.seed,
        ),
        progress=evidence.progress,
    )
    config, trained = found.config, found.about["trained"]
    note = described(config, trained)
    return finding_of(found.losses(), found.changes(), note)


def described(config: TrainingConfig, trained: Sequence[str]) -> str:
    """What was trained, for the reader.

    Args:
        config: The settings.
        trained: Names of the matrices.

    Returns:
        A few sentences.
    """
    return (
        f"Up to {config.facts} facts are taught, {config.batch_size} per step. "
        f"{len(trained)} matrices are trained, from {trained[0]} to {trained[-1]}; all other "
        f"weights are frozen. LoRA has rank {config.rank}, so its changes have {config.rank} "
        "directions. Learning rates are matched: to first order, a first step on all facts lowers "
        f"their loss by {100 * FIRST_DECREASES['full']:.0f} %, and by "
        f"{100 * FIRST_DECREASES['lora']:.0f} % with LoRA. Runs on shuffled answers have "
        "the rates of those on the taught ones. Rates fall linearly to zero."
    )


def finding_of(losses: pd.DataFrame, changes: pd.DataFrame, note: str) -> Finding:
    """Check the claims.

    Args:
        losses: The table of losses of `TrainingRuns`.
        changes: Its table of changes.
        note: What was trained, for the reader.

    Returns:
        The finding.
    """
    first, last = int(losses["step"].min()), int(losses["step"].max())
    full = _Means(changes, weights="full", answers="taught")
    checks = (
        _concentration(full, sorted(losses["step"].unique())),
        _low_rank(full, last),
        _outside(full, first),
        _alignment(full, last),
        _more_than_random(changes, last),
        _more_than_unseen(changes, last),
        _responses(full, last),
        _shuffled(changes, last),
    )
    ends = changes[changes["step"].isin([0, last]) & (changes["matrix"] == "W_out")]
    ends = ends[ends["answers"] != "shuffled"]
    ends = ends.assign(change=ends["optimizer"] + ", " + ends["weights"])
    of_full = ends[ends["weights"] == "full"]
    trained = ends[~ends["optimizer"].isin([RANDOM, UNTRAINED])]
    drawn = {
        "effective rank": (of_full, "effective_rank", "effective rank"),
        "ten directions": (of_full, "energy_10", "share of ten directions in the squared norm"),
        "answers among the tokens": (of_full, "answers_found", "fraction of the taught answers"),
        "responses": (trained, "taught_near", "fraction of the facts"),
    }
    steps = f"W_out's change after {last} steps"
    return Finding(
        checks,
        {"means": means_by_matrix(changes), "losses": losses, "by layer": changes},
        {
            name: partial(
                figures.layer_lines, table, values, "change", title=f"{steps}: {name}", unit=unit
            )
            for name, (table, values, unit) in drawn.items()
        },
        notes=(
            note,
            f"Readings are those of the cosine lens: the {TOKENS} tokens at either end of the "
            f"{DIRECTIONS} largest singular directions, and what the change of W_out adds at the "
            "last token of a fact's prompt. Random changes are Gaussian, or products of two "
            "Gaussian factors for LoRA; the untrained matrix is read in the same way.",
            "Facts learned after the last step: "
            + "; ".join(
                f"{weights}, {answers}: "
                + listed_values(
                    (100 * _by_optimizer(losses, "learned", weights, answers, last)).items(),
                    ".0f",
                    " %",
                )
                for weights in WEIGHTS
                for answers in TRAINED
            ),
        ),
    )


def means_by_matrix(changes: pd.DataFrame) -> pd.DataFrame:
    """Means over layers.

    Args:
        changes: The table of changes of `TrainingRuns`.

    Returns:
        One row per run, step and matrix.
    """
    numbers = [name for name in changes.columns if name not in (*_KEYS, "matrix", "layer")]
    return changes.groupby([*_KEYS, "matrix"], sort=False)[numbers].mean().reset_index()


class _Means:
    """Means over matrices and layers, by optimizer."""

    def __init__(self, changes: pd.DataFrame, *, weights: str, answers: str) -> None:
        self._changes, self._weights, self._answers = changes, weights, answers

    def of(self, column: str, step: int) -> pd.Series[float]:
        return _by_optimizer(self._changes, column, self._weights, self._answers, step)


def _by_optimizer(
    table: pd.DataFrame, column: str, weights: str, answers: str, step: int
) -> pd.Series[float]:
    own = table[
        (table["weights"] == weights) & (table["answers"] == answers) & (table["step"] == step)
    ]
    return own.groupby("optimizer")[column].mean()[list(OPTIMIZERS)]


def _concentration(full: _Means, steps: Sequence[int]) -> Check:
    shares = {step: full.of("energy_10", step) for step in steps}
    return Check(
        "with full fine-tuning, SGD's change has a larger share of its squared norm in ten "
        "directions than Adam's and Muon's, after every number of steps",
        all(bool(own["sgd"] > own[["adam", "muon"]].max()) for own in shares.values()),
        "; ".join(
            f"{step}: {listed_values((100 * own).items(), '.0f', ' %')}"
            for step, own in shares.items()
        ),
    )


def _low_rank(full: _Means, last: int) -> Check:
    shares, ranks = full.of("energy_10", last), full.of("effective_rank", last)
    return Check(
        f"after {last} steps, ten directions have at least {100 * _LOW_RANK:.0f} % of the squared "
        f"norm of SGD's change, and less than {100 * _LOW_RANK:.0f} % of Adam's and of Muon's",
        bool(shares["sgd"] >= _LOW_RANK and (shares[["adam", "muon"]] < _LOW_RANK).all()),
        f"{listed_values((100 * shares).items(), '.0f', ' %')}; effective rank "
        + listed_values(ranks.items(), ".0f"),
    )


def _outside(full: _Means, first: int) -> Check:
    shares = full.of("step_outside", first)
    return Check(
        f"the share of step {first} outside its gradient's row and column spaces is at most 1 % "
        "for SGD, more than half for Adam, and less than a quarter for Muon, which rounds to "
        "bfloat16",
        all(low <= round(float(shares[name]), 6) <= high for name, (low, high) in _OUTSIDE.items()),
        listed_values((100 * shares).items(), ".1f", " %"),
    )


def _alignment(full: _Means, last: int) -> Check:
    cosines = full.of("cosine", last)
    return Check(
        f"after {last} steps, the cosine of the change and what gradient descent would have "
        f"written on the same path is below {_ALIGNED} for Adam and Muon",
        bool((cosines[["adam", "muon"]] < _ALIGNED).all()),
        listed_values(cosines.items(), ".2f"),
    )


def _more_than_random(changes: pd.DataFrame, last: int) -> Check:
    writing = changes[changes["matrix"] == "W_out"]
    untrained = _control(writing, "answers_found", UNTRAINED, "full")
    found, random = {}, {}
    for weights in WEIGHTS:
        found[weights] = _by_optimizer(writing, "answers_found", weights, "taught", last)
        random[weights] = _control(writing, "answers_found", RANDOM, weights)
    return Check(
        f"W_out's ten largest directions after {last} steps show at least {_OVER_RANDOM} times as "
        "many of the taught answers as random ones, for every optimizer, with full fine-tuning and "
        "with LoRA",
        all(bool((found[each] >= _OVER_RANDOM * random[each]).all()) for each in WEIGHTS),
        "; ".join(
            f"{each}: {listed_values((100 * found[each]).items(), '.0f', ' %')}, random "
            f"{100 * random[each]:.0f} %"
            for each in WEIGHTS
        )
        + f"; the untrained matrix {100 * untrained:.0f} %",
    )


def _more_than_unseen(changes: pd.DataFrame, last: int) -> Check:
    writing = changes[changes["matrix"] == "W_out"]
    pairs = {
        weights: [
            _by_optimizer(writing, column, weights, "taught", last)
            for column in ("answers_found", "unseen_found")
        ]
        for weights in WEIGHTS
    }
    return Check(
        f"they show at least {_OVER_UNSEEN} times as many of the taught answers as of answers to "
        "other facts, which were not taught",
        all(bool((taught >= _OVER_UNSEEN * unseen).all()) for taught, unseen in pairs.values()),
        "; ".join(
            f"{weights}, not taught: {listed_values((100 * unseen).items(), '.0f', ' %')}"
            for weights, (_, unseen) in pairs.items()
        ),
    )


def _responses(full: _Means, last: int) -> Check:
    taught, permuted = full.of("taught_near", last), full.of("permuted_near", last)
    return Check(
        f"after {last} steps of full fine-tuning, W_out's change promotes a fact's answer to the "
        "most probable 1 % of what it adds for that fact in more than half of the layers and "
        "facts, and the answer of another fact of the same relation at most half as often",
        bool((taught > _NEAR).all() and (permuted <= taught / 2).all()),
        f"{listed_values((100 * taught).items(), '.0f', ' %')}; of another fact "
        + listed_values((100 * permuted).items(), ".0f", " %"),
    )


def _shuffled(changes: pd.DataFrame, last: int) -> Check:
    own = [
        _by_optimizer(changes, column, "full", answers, last)
        for column, answers in (("taught_near", "taught"), ("permuted_near", "shuffled"))
    ]
    unlearned = _by_optimizer(changes, "taught_near", "full", "shuffled", last)
    shown = [
        _by_optimizer(changes[changes["matrix"] == "W_out"], "answers_found", "full", each, last)
        for each in ("taught", "shuffled")
    ]
    return Check(
        "control: trained on answers that are shuffled within relations, the change promotes each "
        "fact's shuffled answer as often as it promoted the taught one, within "
        f"{100 * _SAME:.0f} points, and the taught one at most half as often",
        bool(((own[0] - own[1]).abs() <= _SAME).all() and (unlearned <= own[1] / 2).all()),
        f"shuffled {listed_values((100 * own[1]).items(), '.0f', ' %')}; taught "
        f"{listed_values((100 * unlearned).items(), '.0f', ' %')}; answers among the directions' "
        f"tokens {listed_values((100 * shown[1]).items(), '.0f', ' %')}",
    )


def _control(table: pd.DataFrame, column: str, kind: str, weights: str) -> float:
    own = table[(table["optimizer"] == kind) & (table["weights"] == weights)]
    return float(own[column].mean())
