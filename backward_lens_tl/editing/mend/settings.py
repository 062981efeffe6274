"""Settings of the training of MEND's networks."""

from __future__ import annotations

from dataclasses import dataclass

from backward_lens_tl.errors import EditError
from backward_lens_tl.settings import Checked, Count, NonNegative, Positive


@dataclass(frozen=True)
class MENDTraining(Checked):
    """Settings of a training run.

    Attributes:
        steps: Updates of the networks.
        edits_per_step: Number of edits whose mean loss an update lowers.
        lr: Adam's learning rate for the networks. The published 1e-6 is for models of a few billion
            parameters and a million edits.
        rate_lr: Adam's learning rate for the learning rates of the edits.
        initial_rate: The learning rate of every matrix at the start.
        edit_weight: `c_edit`.
        locality_weight: `c_locality`.
        n_locality: Locality prompts per edit; half of them neighbors, if the record has enough.
        n_statistics: Maximum number of requests for the statistics that standardise pairs.
        clip_norm: Largest norm of the gradient; a longer one is scaled down.
        save_every: Save after this many steps, if `out` is passed.

    Examples:
        >>> import backward_lens_tl as blt
        >>> training = blt.editing.MENDTraining(steps=500, edits_per_step=5)
        >>> training.steps, training.lr
        (500, 0.0003)
    """

    ERROR = EditError

    steps: Count = 200
    edits_per_step: Count = 10
    lr: Positive = 3e-4
    rate_lr: Positive = 1e-4
    initial_rate: Positive = 1e-3
    edit_weight: NonNegative = 0.1
    locality_weight: NonNegative = 1.0
    n_locality: Count = 8
    n_statistics: Count = 300
    clip_norm: Positive = 100.0
    save_every: Count = 50
