"""The package's own errors, and its warning.

Every message names the value, what is allowed and what to do. All errors derive from
[`BackwardLensError`][backward_lens_tl.errors.BackwardLensError] and from the built-in error that a
caller would expect, so `except ValueError` works too. A traceback ends with the address of the page
that lists causes and fixes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

DOCUMENTATION = "https://backward-lens-tl.readthedocs.io/en/latest/"
"""Address of the documentation."""


def one_line(error: Exception) -> str:
    """An error as the command line reports it: in one line, with the address of its documentation.

    Args:
        error: Any error.

    Returns:
        The line.
    """
    page = f" (see {error.documentation})" if isinstance(error, BackwardLensError) else ""
    return " ".join(str(error).splitlines()) + page


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty.

    Args:
        error: Any error.

    Returns:
        The line.
    """
    return next(iter(str(error).splitlines()), type(error).__name__)


class BackwardLensError(Exception):
    """Base class of the package's errors."""

    def __new__(cls, *args: object, **options: object) -> BackwardLensError:
        """Create the error and add its documentation as a note."""
        error = super().__new__(cls, *args, **options)
        # Like Python 3.11's `add_note`: tracebacks show it, and the message does not change.
        error.__notes__ = [f"See {error.documentation}"]
        return error

    @property
    def documentation(self) -> str:
        """Address of the page that lists causes and fixes."""
        package = __name__.partition(".")[0]
        own = next(kind for kind in type(self).__mro__ if kind.__module__.startswith(package))
        return f"{DOCUMENTATION}errors/#{own.__name__.lower()}"


class InputError(BackwardLensError, ValueError):
    """An argument is invalid: prompt, matrix, layer, position, `k`, projection, ..."""


class TargetError(InputError):
    """A target is not one token of the model's vocabulary."""


class ObjectiveError(InputError):
    """An objective did not return one differentiable loss per prompt."""


class ModelNotFoundError(InputError):
    """There is no model of that name: no folder, no readable GGUF file, nothing on the hub."""


class ModelStateError(BackwardLensError, RuntimeError):
    """The model, or torch itself, is in a state in which the result would be wrong."""


class UnsupportedModelError(BackwardLensError, NotImplementedError):
    """The model has a structure that cannot be analysed exactly."""


class ValidationError(BackwardLensError, ArithmeticError):
    """Captured factors do not reproduce autograd's weight gradient."""


class WidgetError(BackwardLensError, RuntimeError):
    """The installed circuitsvis renders its widgets in an unknown way."""


class SweepError(InputError):
    """A sweep's folder or settings do not match the call."""


class EditError(InputError):
    """An edit does not match the model, the request or its statistics."""


class EvaluationError(InputError):
    """An evaluation's folder or settings do not match the call."""


class JacobianLensError(InputError):
    """A Jacobian Lens cannot be read or fitted, or does not belong to the model."""


class ResultFileError(BackwardLensError, ValueError):
    """A file is not a saved result, or this version cannot read it."""


class BackwardLensWarning(UserWarning):
    """A call works, but probably does not do what was meant."""


def warn(message: str) -> None:
    """Warn at the line that called the package.

    Args:
        message: What happened, and what was probably meant.
    """
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, BackwardLensWarning, stacklevel=level)


@contextmanager
def raised_as(kind: type[InputError]) -> Iterator[None]:
    """Raise every `InputError` of a block as a more specific one.

    Args:
        kind: The error to raise.

    Yields:
        Nothing.
    """
    try:
        yield
    except kind:
        raise
    except InputError as error:
        raise kind(str(error)) from error
