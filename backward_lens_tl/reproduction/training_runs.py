"""Training runs with every optimizer, as a folder of tables that resumes.

One shard is one training run, or the controls that need no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from backward_lens_tl.data.records import Record, Records
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.steps import Optimizer
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_request
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import Host
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixName, MatrixSite
from backward_lens_tl.reproduction.training_facts import TaughtFacts
from backward_lens_tl.reproduction.training_loop import ChangeAt, TrainedWeights, train
from backward_lens_tl.reproduction.training_measures import (
    cosine,
    effective_rank,
    energy,
    share_outside,
    stable_rank,
)
from backward_lens_tl.reproduction.training_readings import Reader
from backward_lens_tl.reproduction.training_relations import relations
from backward_lens_tl.runs.columns import Column, Tables, key_column
from backward_lens_tl.runs.config import Config
from backward_lens_tl.runs.run import Job, Plan, Run
from backward_lens_tl.runs.shards import Rows
from backward_lens_tl.settings import Count

if TYPE_CHECKING:
    import pandas as pd

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
WEIGHTS: tuple[TrainedWeights, ...] = get_args(TrainedWeights)

Answers = Literal["taught", "shuffled", "none"]
"""What a run is trained on; controls are not trained."""

TRAINED: tuple[Answers, ...] = ("taught", "shuffled")
"""What runs are trained on, in this order."""

RANDOM, UNTRAINED = "random", "untrained"
"""What stands in the place of an optimizer in the rows of controls: a random change, and the
matrix itself."""

ENERGIES = (1, 10, 100)
"""Numbers of directions whose share in the squared norm is measured."""

_KEYS = (
    key_column("optimizer", "string", f"sgd, adam or muon; {RANDOM} or {UNTRAINED} for controls"),
    key_column("weights", "string", "full, or lora for a product of two factors"),
    key_column("answers", "string", "taught, shuffled, or none for controls"),
    key_column("step", "int32", "number of steps; 0 for controls"),
)

_number = partial(Column, dtype="float64")

CHANGES = (
    *_KEYS,
    key_column("matrix", "string", "the matrix"),
    key_column("layer", "int32", "the layer, from 0"),
    _number("norm", meaning="Frobenius norm of the change W_n - W_0"),
    _number("relative_norm", meaning="this norm in units of the norm of W_0"),
    _number("rank", meaning="number of its singular values above rounding"),
    _number("effective_rank", meaning="exponential of the entropy of its singular values"),
    _number("stable_rank", meaning="its squared norm over its largest squared singular value"),
    *(
        _number(f"energy_{k}", meaning=f"share of its {k} largest directions in its squared norm")
        for k in ENERGIES
    ),
    _number("gradient_rank", meaning="rank of the gradient of step n"),
    _number("gradient_effective_rank", meaning="effective rank of the gradient of step n"),
    _number("gradient_energy_1", meaning="share of its largest direction"),
    _number("gradient_energy_10", meaning="share of its ten largest directions"),
    _number("cosine", meaning="of the change and what gradient descent would have written"),
    _number("step_cosine", meaning="of the step W_n - W_(n-1) and minus its gradient"),
    _number("step_outside", meaning="share of the step outside of its gradient's spaces"),
    _number("peak", meaning="largest score of a direction, in standard deviations"),
    _number("answers_found", meaning="taught answers among the directions' tokens"),
    _number("unseen_found", meaning="other answers among them, neither taught nor true before"),
    _number("taught_near", meaning="facts whose answer the change promotes"),
    _number("permuted_near", meaning="facts for which it promotes the permuted answer"),
)
"""One row per run, step, matrix and layer."""

LOSSES = (
    *_KEYS,
    _number("rate", meaning="learning rate of the first step"),
    _number("loss", meaning="nll of the answers that are taught, in nats per token"),
    _number("learned", meaning="fraction of facts whose taught answer is the most probable one"),
)
"""One row per run and step."""

TABLES: Tables = {"losses": LOSSES, "changes": CHANGES}
"""The changes come last, so that a run is finished once they are written."""


@dataclass(frozen=True)
class TrainingConfig(Config):
    """The settings of training runs.

    Attributes:
        facts: Number of facts to teach, the first in the data that can be shuffled within their
            relation.
        steps: Numbers of steps after which changes are measured, ascending.
        batch_size: Number of facts in a step.
        rank: Rank of LoRA's factors.
        layers: Largest number of layers, evenly spaced from the first to the last one.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's default.
        seed: Seed of orders, factors, permutations and random changes.
    """

    facts: Count = 20
    steps: Sequence[Count] = (1, 10, 100, 200)
    batch_size: Count = 2
    rank: Count = 8
    layers: Count = 8
    prepend_bos: bool | None = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps or list(self.steps) != sorted(set(self.steps)):
            raise InputError(f"steps is {self.steps}; pass ascending numbers, at least one")


@dataclass(frozen=True)
class TrainedRun:
    """One training run, which is one shard; without an optimizer it is the controls."""

    optimizer: Optimizer | None
    weights: TrainedWeights
    answers: Answers

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, repr=False)
class TrainingRuns(Run):
    """The folder of training runs, complete or not.

    Attributes:
        folder: Where it is.
        about: The contents of `run.json`.
    """

    NOUN = "set of training runs"
    UNIT = "run"
    TABLES = TABLES
    READ_BY = ("losses", "changes")
    CONFIG = TrainingConfig

    @property
    def config(self) -> TrainingConfig:
        """The settings."""
        return TrainingConfig.from_json(self.about["config"])

    def losses(self) -> pd.DataFrame:
        """Read one row per run and step."""
        return self._table("losses")

    def changes(self) -> pd.DataFrame:
        """Read one row per run, step, matrix and layer."""
        return self._table("changes")


def training_runs(
    model: nn.Module, data: Records, out: str | Path, config: TrainingConfig, *, progress: bool
) -> TrainingRuns:
    """Train with every optimizer, on the facts and on shuffled answers, and measure the changes.

    Args:
        model: The model, which does not change.
        data: The data with the facts.
        out: The folder. It resumes there, run by run.
        config: The settings.
        progress: Whether to show a progress bar.

    Returns:
        The complete runs.

    Raises:
        InputError: If no relation of the data has two facts with different answers.
        UnsupportedModelError: If the MLPs cannot be trained one matrix at a time.
    """
    return TrainingRuns._perform(model, data, out, config, _plan, progress=progress)


@dataclass(frozen=True)
class _Setup:
    """What all runs share."""

    host: Host
    config: TrainingConfig
    sites: tuple[MatrixSite, ...]
    facts: TaughtFacts
    shuffled: TaughtFacts
    reader: Reader
    norms: Mapping[tuple[MatrixName, int], float]

    def measure(self, run: TrainedRun) -> Rows:
        """The rows of one shard."""
        if run.optimizer is None:
            return {"losses": [], "changes": self._controls()}
        losses: list[dict[str, Any]] = []
        changes: list[dict[str, Any]] = []
        checkpoints = train(
            self.host,
            self.shuffled if run.answers == "shuffled" else self.facts,
            self.sites,
            run.optimizer,
            rate_of=self.facts,
            rank=self.config.rank if run.weights == "lora" else None,
            steps=self.config.steps,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
        )
        # After an interruption, the traceback would keep the generator and its hooks alive.
        with closing(checkpoints):
            for found in checkpoints:
                keys = {
                    "optimizer": run.optimizer,
                    "weights": run.weights,
                    "answers": run.answers,
                    "step": found.step,
                }
                losses.append(
                    {**keys, "rate": found.rate, "loss": found.loss, "learned": found.learned}
                )
                changes.extend({**keys, **self._of_training(each)} for each in found.changes)
        return {"losses": losses, "changes": changes}

    def _of_training(self, found: ChangeAt) -> dict[str, Any]:
        gradient = found.gradient.singular_values()
        return {
            **self._of_change(found.change),
            "gradient_rank": found.gradient.rank(),
            "gradient_effective_rank": effective_rank(gradient),
            "gradient_energy_1": energy(gradient, 1),
            "gradient_energy_10": energy(gradient, 10),
            "cosine": cosine(found.change.dense(), found.descent),
            "step_cosine": cosine(found.step.dense(), -found.gradient.dense()),
            "step_outside": share_outside(found.step, found.gradient),
        }

    def _of_change(self, change: MatrixDelta) -> dict[str, Any]:
        u, values, vh = change.svd()
        return {
            "matrix": change.matrix,
            "layer": change.layer,
            "norm": float(values.norm()),
            "relative_norm": float(values.norm()) / self.norms[change.matrix, change.layer],
            "rank": len(values),
            "effective_rank": effective_rank(values),
            "stable_rank": stable_rank(values),
            **{f"energy_{k}": energy(values, k) for k in ENERGIES},
            **self.reader.directions(change, u, vh),
            **self.reader.responses(change),
        }

    def _controls(self) -> list[dict[str, Any]]:
        """Random changes of either kind, and the matrices themselves."""
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = []
        for site in self.sites:
            d_in, d_out = site.shape
            width = min(self.config.rank, d_in, d_out)
            own = _weight(site)
            full, left, right = (
                torch.randn(size, generator=generator).to(own.device)
                for size in ((d_in, d_out), (d_in, width), (width, d_out))
            )
            about = (site.matrix, site.layer)
            for kind, weights, change in (
                (RANDOM, "full", MatrixDelta(*about, values=full)),
                (RANDOM, "lora", MatrixDelta(*about, left, right)),
                (UNTRAINED, "full", MatrixDelta(*about, values=own)),
            ):
                keys = {"optimizer": kind, "weights": weights, "answers": "none", "step": 0}
                rows.append({**keys, **self._of_change(change)})
        return rows


def _plan(job: Job[TrainingConfig]) -> Plan[TrainedRun]:
    host, config = job.host, job.config
    sites = find_editable(host, "mlp", _spread(host.n_layers, config.layers), mlp_only=True)
    own = [row for row in job.records.rows if isinstance(row, Record)]
    requests = [_tokenized(host, EditRequest.of(row), config) for row in own]
    usable = [(row, request) for row, request in zip(own, requests, strict=True) if request]
    records = [record for record, _ in usable]
    every = TaughtFacts.of(
        [request for _, request in usable],
        relations(records),
        [_before(host, record, config) for record in records],
    )
    facts = every.first(config.facts)
    if len(facts) < 2:
        raise InputError(
            "training needs two or more facts of one relation with different answers: "
            f"{len(usable)} of the {len(job.records)} rows of {job.records.name!r} can be taught, "
            f"and at most {config.facts} of them are used; pass more prompts or other data"
        )
    shuffled = facts.shuffled(config.seed)
    # Training suppresses the answers of before.
    known = {*facts.first_tokens, *facts.before}
    unseen = [token for token in dict.fromkeys(every.first_tokens) if token not in known]
    reader = Reader.of(host, facts, shuffled, unseen[: len(set(facts.first_tokens))], sites)
    norms = {(site.matrix, site.layer): float(_weight(site).norm()) for site in sites}
    setup = _Setup(host, config, tuple(sites), facts, shuffled, reader, norms)
    shards = [
        TrainedRun(None, "full", "none"),
        *(
            TrainedRun(optimizer, weights, answers)
            for answers, weights, optimizer in product(TRAINED, WEIGHTS, OPTIMIZERS)
        ),
    ]
    about = {"trained": [f"{site.matrix} of layer {site.layer}" for site in sites]}
    return Plan(shards, setup.measure, [*facts.prompts, *facts.answers, unseen], about)


def _before(host: Host, record: Record, config: TrainingConfig) -> int | None:
    """The first token of a record's answer; `None` if it is not known."""
    if record.answer is None:
        return None
    found = _tokenized(host, EditRequest(record.prompt, record.answer), config)
    return found.target[0] if found else None


def _weight(site: MatrixSite) -> Tensor:
    return site.joined(site.weight.in_out(site.weight.parameter.detach())).float()


def _tokenized(host: Host, request: EditRequest, config: TrainingConfig) -> TokenizedRequest | None:
    """A tokenized request; `None` for one that does not fit the model."""
    try:
        return tokenize_request(host, request, config.prepend_bos)
    except InputError:
        return None


def _spread(n_layers: int, most: int) -> list[int]:
    """At most this many layers, evenly spaced, with the first and the last one."""
    n = min(n_layers, most)
    return sorted({round(at * (n_layers - 1) / max(1, n - 1)) for at in range(n)})
