"""Read the gradients of language models as tokens.

An implementation of "Backward Lens: Projecting Language Model Gradients into the Vocabulary Space"
(Katz et al., EMNLP 2024) on TransformerLens.

Names are imported on first use, so importing the package is fast.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backward_lens_tl import analysis as analysis
    from backward_lens_tl import editing as editing
    from backward_lens_tl import training as training
    from backward_lens_tl.capture.gradient_capture import GradientCapture as GradientCapture
    from backward_lens_tl.capture.matrix_gradient import MatrixGradient as MatrixGradient
    from backward_lens_tl.capture.memory import Memory as Memory
    from backward_lens_tl.capture.objectives import Objective as Objective
    from backward_lens_tl.capture.objectives import logit_difference as logit_difference
    from backward_lens_tl.capture.objectives import next_token_loss as next_token_loss
    from backward_lens_tl.capture.objectives import sequence_nll as sequence_nll
    from backward_lens_tl.capture.objectives import target_nll as target_nll
    from backward_lens_tl.capture.plan import capture_gradients as capture_gradients
    from backward_lens_tl.data.readers import read_records as read_records
    from backward_lens_tl.data.records import Records as Records
    from backward_lens_tl.errors import BackwardLensError as BackwardLensError
    from backward_lens_tl.evaluation.config import EvaluationConfig as EvaluationConfig
    from backward_lens_tl.evaluation.run import Evaluation as Evaluation
    from backward_lens_tl.evaluation.run import evaluate as evaluate
    from backward_lens_tl.jacobians.fitting import fit_jacobian_lens as fit_jacobian_lens
    from backward_lens_tl.lens import backward_lens as backward_lens
    from backward_lens_tl.models.loading import load_facts_model as load_facts_model
    from backward_lens_tl.models.loading import load_model as load_model
    from backward_lens_tl.readout.jacobian_projection import (
        JacobianProjection as JacobianProjection,
    )
    from backward_lens_tl.readout.jacobian_projection import jacobian_lens as jacobian_lens
    from backward_lens_tl.readout.projections import Projection as Projection
    from backward_lens_tl.readout.vectors import VectorReadout as VectorReadout
    from backward_lens_tl.readout.vectors import read_vectors as read_vectors
    from backward_lens_tl.reproduction import reproduce as reproduce
    from backward_lens_tl.result import BackwardLensResult as BackwardLensResult
    from backward_lens_tl.sweeps.config import SweepConfig as SweepConfig
    from backward_lens_tl.sweeps.run import Sweep as Sweep
    from backward_lens_tl.sweeps.run import sweep as sweep
    from backward_lens_tl.validation import ValidationReport as ValidationReport
    from backward_lens_tl.validation import validate as validate
    from backward_lens_tl.views import figures as figures
    from backward_lens_tl.views import widgets as widgets
    from backward_lens_tl.views.training.live import live_table as live_table

__version__ = version("backward-lens-tl")

_HOMES = {
    "analysis": ("analysis",),
    "capture.gradient_capture": ("GradientCapture",),
    "capture.matrix_gradient": ("MatrixGradient",),
    "capture.memory": ("Memory",),
    "capture.objectives": (
        "Objective",
        "logit_difference",
        "next_token_loss",
        "sequence_nll",
        "target_nll",
    ),
    "capture.plan": ("capture_gradients",),
    "data.readers": ("read_records",),
    "data.records": ("Records",),
    "editing": ("editing",),
    "errors": ("BackwardLensError",),
    "evaluation.config": ("EvaluationConfig",),
    "evaluation.run": ("Evaluation", "evaluate"),
    "jacobians.fitting": ("fit_jacobian_lens",),
    "lens": ("backward_lens",),
    "models.loading": ("load_facts_model", "load_model"),
    "readout.jacobian_projection": ("JacobianProjection", "jacobian_lens"),
    "readout.projections": ("Projection",),
    "readout.vectors": ("VectorReadout", "read_vectors"),
    "reproduction": ("reproduce",),
    "result": ("BackwardLensResult",),
    "sweeps.config": ("SweepConfig",),
    "sweeps.run": ("Sweep", "sweep"),
    "training": ("training",),
    "validation": ("ValidationReport", "validate"),
    "views.figures": ("figures",),
    "views.training.live": ("live_table",),
    "views.widgets": ("widgets",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOME_OF[name]}")
    value = home if _HOME_OF[name].rpartition(".")[2] == name else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
