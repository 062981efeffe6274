"""Saved files are read by the class that wrote them, and refused by others."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.mend.hypernetwork import MENDCheckpoint, MENDEditor
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.editing.statistics.moments import SecondMoments, facts_moments
from backward_lens_tl.editing.statistics.pair_collection import pair_statistics
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import ResultFileError
from backward_lens_tl.files.storage import Saved, write
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.result import BackwardLensResult

KINDS = (BackwardLensResult, WeightDelta, SecondMoments, PairStatistics, MENDEditor)


@pytest.fixture(scope="module")
def files(facts_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file per class, by class name."""
    requests = [EditRequest("Obama grew up in", " Paris"), EditRequest("Messi plays for", " Rome")]
    statistics = pair_statistics(facts_model, requests, layers=[-1], progress=False)
    editor = MENDEditor.untrained(statistics)
    squares = tuple(each.square() for each in editor.parameters)
    saved: list[BackwardLensResult | Saved] = [
        backward_lens(facts_model, "Lionel Messi plays for", " Paris", layers=[6]),
        WeightDelta((MatrixDelta("W_in", 1, left=torch.ones(4, 2), right=torch.ones(2, 3)),), {}),
        facts_moments(),
        statistics,
        editor,
        MENDCheckpoint(editor, tuple(editor.parameters), squares),
    ]
    folder = tmp_path_factory.mktemp("files")
    found = {type(each).__name__: folder / f"{type(each).__name__}.file" for each in saved}
    for each in saved:
        each.save(found[type(each).__name__])
    return found


@pytest.mark.parametrize("kind", [*KINDS, MENDCheckpoint])
def test_each_class_reads_its_own_file(kind: type, files: dict[str, Path]) -> None:
    assert type(kind.load(files[kind.__name__])) is kind


@pytest.mark.parametrize(("held", "kind"), [*itertools.permutations(KINDS, 2)])
def test_files_of_other_classes_are_refused(held: type, kind: type, files: dict[str, Path]) -> None:
    path, own = files[held.__name__], held.__name__
    message = f"{str(path)!r} holds a {own}, not a {kind.__name__}; read it with {own}.load\n"
    with pytest.raises(ResultFileError, match=f"^{re.escape(message)}"):
        kind.load(path)


def test_a_checkpoint_restores_the_state_of_training(files: dict[str, Path]) -> None:
    found = MENDCheckpoint.load(files["MENDCheckpoint"])
    editor = MENDEditor.load(files["MENDEditor"])
    for own, mean, square, expected in zip(
        found.editor.parameters, found.means, found.squares, editor.parameters, strict=True
    ):
        assert torch.equal(own, expected)
        assert torch.equal(mean, expected)
        assert torch.equal(square, expected.square())


def test_an_unknown_dataclass_in_a_file(tmp_path: Path) -> None:
    @dataclass
    class Odd:
        size: int

    write(tmp_path / "delta", WeightDelta((), {"odd": Odd(1)}), {})
    with pytest.raises(ResultFileError, match=r"is damaged: KeyError\('Odd'\)"):
        WeightDelta.load(tmp_path / "delta")
