"""The package's own errors.

Every refusal names the value, what is allowed and the way out. All of them derive from
[`BackwardLensError`][backward_lens_tl.errors.BackwardLensError]; each also derives from the
built-in that a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations


class BackwardLensError(Exception):
    """Base class of everything that this package raises on purpose."""


class InputError(BackwardLensError, ValueError):
    """An argument is not usable: prompt, matrix, layer, position, `k`, projection, ..."""


class TargetError(InputError):
    """A target is not one token of the model's vocabulary."""


class ObjectiveError(InputError):
    """An objective did not return one differentiable loss per prompt."""


class ModelNotFoundError(InputError):
    """A model name is neither `facts`, nor a local folder, nor reachable on the hub."""


class ModelStateError(BackwardLensError, RuntimeError):
    """The model, or torch itself, is in a state in which the answer would be wrong."""


class UnsupportedModelError(BackwardLensError, NotImplementedError):
    """The model has a structure that cannot be analysed exactly."""


class ValidationError(BackwardLensError, ArithmeticError):
    """Captured factors do not reproduce autograd's weight gradient."""


class WidgetError(BackwardLensError, RuntimeError):
    """The installed circuitsvis renders its widgets in a way that is not known here."""


class SweepError(InputError):
    """A sweep's folder or settings do not fit what is asked of it."""


class EditError(InputError):
    """An edit does not fit the model, the request or the statistics that it is computed from."""


class EvaluationError(InputError):
    """An evaluation's folder or settings do not fit what is asked of it."""


class ResultFileError(BackwardLensError, ValueError):
    """A file is not a saved result, or one that this version cannot read."""
