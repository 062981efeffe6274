"""Folders of shards as left by a killed process, produced within the test process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backward_lens_tl.files import storage
from backward_lens_tl.runs import shards
from backward_lens_tl.sweeps.columns import TABLES


class Killed(BaseException):
    """End a run where SIGKILL would."""


def digests(folder: Path, tables: Iterable[str] = TABLES) -> dict[str, str]:
    """Contents of every file of these tables, by default a sweep's, including hidden files."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for table in tables
        for file in sorted((folder / table).iterdir())
    }


def killed(action: Callable[[], object], moment: int, when: str) -> None:
    """Run something that is killed at a file, counted from 0, once it is "written" or "placed".

    A written file still has its hidden name, and is not removed.
    """
    real, left = storage.replacing, iter(range(moment))

    @contextmanager
    def replacing(path: Path) -> Iterator[Path]:
        is_last = next(left, None) is None
        if is_last and when == "written":
            yield path.with_name(f".0f.partial.{path.name}")
            raise Killed
        with real(path) as partial:
            yield partial
        if is_last:
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(storage, "replacing", replacing)
        patched.setattr(shards, "replacing", replacing)
        with pytest.raises(Killed):
            action()


def second_of_two() -> Any:
    """Simulate the second of two processes; the first one does not exist.

    `waits` records how often it waits for the other.
    """
    waits: list[None] = []

    return SimpleNamespace(
        process_index=1,
        num_processes=2,
        is_main_process=False,
        wait_for_everyone=lambda: waits.append(None),
        waits=waits,
    )
