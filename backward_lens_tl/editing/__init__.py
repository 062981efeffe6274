"""Editing facts: methods that compute what to add to a model's weights.

    requests ── method(model, requests) ──▶ WeightDelta ── applied, apply_/revert_ ──▶ edited model
                                                        ── save, to_lora, gradient()

An edit is an object. It changes a model for a while, or until it is reverted, and puts back every
bit; it can be scaled, added, saved, and looked at through the lens.
"""

from backward_lens_tl.editing.delta import MatrixDelta, WeightDelta
from backward_lens_tl.editing.fine_tuning import FineTuning
from backward_lens_tl.editing.method import EditMethod
from backward_lens_tl.editing.moments import SecondMoments, facts_moments, second_moments
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.editing.shift import ForwardPassShift

__all__ = [
    "EditMethod",
    "EditRequest",
    "FineTuning",
    "ForwardPassShift",
    "MatrixDelta",
    "SecondMoments",
    "WeightDelta",
    "facts_moments",
    "second_moments",
]
