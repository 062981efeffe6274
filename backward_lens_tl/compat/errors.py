"""Errors that also derive from the built-in errors that TransformerLens's own tool raised."""

from __future__ import annotations

from backward_lens_tl.errors import BackwardLensError, ModelStateError


class ArgumentTypeError(BackwardLensError, TypeError):
    """An argument has the wrong type."""


class AnalysisError(ModelStateError, ValueError):
    """The model is in a state in which the answer would be wrong; also a `ValueError`."""


class LayerNotAnalyzedError(BackwardLensError, KeyError):
    """A result does not have the requested layer."""

    __str__ = Exception.__str__  # KeyError shows its message in quotes


def check_type(name: str, value: object, kind: type) -> None:
    """Refuse a value of the wrong type; `True` does not count as an integer.

    Args:
        name: The argument.
        value: Its value.
        kind: The type that it must have.

    Raises:
        ArgumentTypeError: If it has the wrong type.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ArgumentTypeError(
            f"{name} is {value!r}, a {type(value).__name__}; pass a {kind.__name__}"
        )
