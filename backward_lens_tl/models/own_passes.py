"""Passes that the package itself runs through somebody's model.

Hooks that stay on a model while its owner trains it must not take them for passes of the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# By thread: a pass of the package in one does not hide a training in another.
_IS_RUNNING: ContextVar[bool] = ContextVar("_IS_RUNNING", default=False)


@contextmanager
def own_passes() -> Iterator[None]:
    """Mark the forward passes inside the context as the package's own.

    Yields:
        Nothing.
    """
    before = _IS_RUNNING.get()
    _IS_RUNNING.set(True)
    try:
        yield
    finally:
        _IS_RUNNING.set(before)


def is_own_pass() -> bool:
    """Whether this thread runs a pass of the package."""
    return _IS_RUNNING.get()
