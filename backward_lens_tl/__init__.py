"""What a language model's gradients write into its weights, in words.

An implementation of "Backward Lens: Projecting Language Model Gradients into the Vocabulary Space"
(Katz et al., EMNLP 2024) on TransformerLens.
"""

from importlib.metadata import version

from backward_lens_tl import analysis, editing
from backward_lens_tl.capture import capture_gradients
from backward_lens_tl.captured import GradientCapture
from backward_lens_tl.errors import BackwardLensError
from backward_lens_tl.evaluation import Evaluation, EvaluationConfig, evaluate
from backward_lens_tl.gradients import MatrixGradient
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.loading import load_facts_model, load_model
from backward_lens_tl.memory import Memory
from backward_lens_tl.objectives import (
    Objective,
    logit_difference,
    next_token_loss,
    sequence_nll,
    target_nll,
)
from backward_lens_tl.projection import Projection
from backward_lens_tl.records import Records, read_records
from backward_lens_tl.reproduce import reproduce
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sweep import Sweep, SweepConfig, sweep
from backward_lens_tl.validation import ValidationReport, validate
from backward_lens_tl.views import figures, widgets

__version__ = version("backward-lens-tl")

__all__ = [
    "BackwardLensError",
    "BackwardLensResult",
    "Evaluation",
    "EvaluationConfig",
    "GradientCapture",
    "MatrixGradient",
    "Memory",
    "Objective",
    "Projection",
    "Records",
    "Sweep",
    "SweepConfig",
    "ValidationReport",
    "analysis",
    "backward_lens",
    "capture_gradients",
    "editing",
    "evaluate",
    "figures",
    "load_facts_model",
    "load_model",
    "logit_difference",
    "next_token_loss",
    "read_records",
    "reproduce",
    "sequence_nll",
    "sweep",
    "target_nll",
    "validate",
    "widgets",
]
