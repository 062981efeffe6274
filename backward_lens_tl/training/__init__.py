"""Watch what a training run writes: the factors of the user's own backward passes, and a record."""

from __future__ import annotations

from backward_lens_tl.training.record import TrainingRecord
from backward_lens_tl.training.step_gradient import StepGradient, WatchedGradient
from backward_lens_tl.training.trainer_callback import BackwardLensCallback
from backward_lens_tl.training.watching import TrainingWatch, watch
from backward_lens_tl.training.weight_change import WeightChange

__all__ = [
    "BackwardLensCallback",
    "StepGradient",
    "TrainingRecord",
    "TrainingWatch",
    "WatchedGradient",
    "WeightChange",
    "watch",
]
