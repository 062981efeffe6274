"""Processes that a test lets die."""

from __future__ import annotations

import os
from collections.abc import Callable


def in_child(action: Callable[[], object]) -> int:
    """The exit status of a process of its own: negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
