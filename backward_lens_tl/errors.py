"""The package's own errors.

Every refusal names the value, what is allowed and the way out. All of them derive from
[`BackwardLensError`][backward_lens_tl.errors.BackwardLensError]; each also derives from the
built-in that a caller would expect, so `except ValueError` keeps working. A traceback ends with the
address of the page that has the usual causes and their fixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DOCUMENTATION = "https://backward-lens-tl.readthedocs.io/en/latest/"
"""Where the documentation is."""


def one_line(error: Exception) -> str:
    """An error as a command reports it, with the address of its documentation if it has one.

    Args:
        error: Any error.

    Returns:
        Its message and that address, without line breaks.
    """
    page = f" (see {error.documentation})" if isinstance(error, BackwardLensError) else ""
    return " ".join(str(error).splitlines()) + page


class BackwardLensError(Exception):
    """Base class of everything that this package raises on purpose."""

    def __new__(cls, *args: object, **options: object) -> BackwardLensError:
        """Make the error, also of a subclass that has an `__init__` of its own."""
        error = super().__new__(cls, *args, **options)
        # As Python 3.11's `add_note` does: a traceback shows it, and the message stays as it is.
        error.__notes__ = [f"See {error.documentation}"]
        return error

    @property
    def documentation(self) -> str:
        """The address of the page that has the usual causes and their fixes."""
        package = __name__.partition(".")[0]
        own = next(kind for kind in type(self).__mro__ if kind.__module__.startswith(package))
        return f"{DOCUMENTATION}errors/#{own.__name__.lower()}"


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
