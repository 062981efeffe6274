"""Editing facts: methods that compute what to add to a model's weights.

    requests ── method(model, requests) ──▶ WeightDelta ── applied, apply_/revert_ ──▶ edited model
                                                        ── save, to_lora, gradient(), delta_tokens

An edit is an object. It changes a model inside a context, or until it is reverted, and restores
every bit. It can be scaled, added, saved, and read through the lens.
"""

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.mend.hypernetwork import MENDEditor
from backward_lens_tl.editing.mend.mend import MEND
from backward_lens_tl.editing.mend.settings import MENDTraining
from backward_lens_tl.editing.mend.training import train_mend
from backward_lens_tl.editing.methods.fact_method import FactMethod
from backward_lens_tl.editing.methods.fine_tuning import FineTuning
from backward_lens_tl.editing.methods.memit import MEMIT
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.normalized_gradient import NormalizedGradient
from backward_lens_tl.editing.methods.pair_method import PairMethod
from backward_lens_tl.editing.methods.presets import preset_methods, preset_settings
from backward_lens_tl.editing.methods.rome import ROME
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.methods.steps import GradientStep
from backward_lens_tl.editing.methods.ultraedit import UltraEdit
from backward_lens_tl.editing.outcomes import EditOutcome
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.editing.statistics.moment_collection import second_moments
from backward_lens_tl.editing.statistics.moments import SecondMoments, facts_moments
from backward_lens_tl.editing.statistics.pair_collection import pair_statistics
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.editing.tokens import compare_tokens, delta_tokens
from backward_lens_tl.editing.weight_delta import WeightDelta

__all__ = [
    "MEMIT",
    "MEND",
    "ROME",
    "EditMethod",
    "EditOutcome",
    "EditRequest",
    "FactMethod",
    "FineTuning",
    "ForwardPassShift",
    "GradientStep",
    "MENDEditor",
    "MENDTraining",
    "MatrixDelta",
    "NormalizedGradient",
    "PairMethod",
    "PairStatistics",
    "SecondMoments",
    "UltraEdit",
    "WeightDelta",
    "compare_tokens",
    "delta_tokens",
    "facts_moments",
    "pair_statistics",
    "preset_methods",
    "preset_settings",
    "second_moments",
    "train_mend",
]
