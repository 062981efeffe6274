"""The run-time checks of shapes and types that the complete test run installs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


@contextmanager
def type_checks_off() -> Iterator[None]:
    """Turn the checks off temporarily; does nothing in a run without them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
