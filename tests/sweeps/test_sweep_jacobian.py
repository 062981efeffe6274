"""Sweeps that also read through a Jacobian Lens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jacobian_cases import random_lens, slow_jacobians
from models import HAS_BRIDGE, Case, build
from sweep_cases import ROWS

import backward_lens_tl as blt
from backward_lens_tl.errors import JacobianLensError, SweepError
from backward_lens_tl.jacobians.loading import load_jacobians
from backward_lens_tl.sweeps import measuring

pytestmark = pytest.mark.usefixtures("as_for_a_user")


@pytest.fixture(scope="module")
def case() -> Case:
    return build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2")


@pytest.fixture(scope="module")
def fits(case: Case, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of two fits on different texts, and of another model."""
    folder, files = tmp_path_factory.mktemp("fits"), []
    for seed in (0, 1):
        lens = slow_jacobians(case.model, case.tokens(12, seed=seed), skip=2)
        files.append(written(folder / f"{seed}.pt", lens.jacobians, corpus=f"text {seed}"))
    return [*files, written(folder / "other.pt", random_lens(case.model).jacobians)]


def written(file: Path, jacobians: Any, **metadata: Any) -> Path:
    held = {"J": jacobians, "n_prompts": 1, "d_model": len(jacobians[1]), "metadata": metadata}
    torch.save(held, file)
    return file


@pytest.fixture
def swept(case: Case, tmp_path: Path) -> Callable[..., blt.Sweep]:
    def run(lens: Path, folder: str = "out", **settings: Any) -> blt.Sweep:
        config = blt.SweepConfig(jacobian=str(lens), shard_size=2, **settings)
        return blt.sweep(case.model, ROWS, tmp_path / folder, config, progress=False)

    return run


def test_each_projection_has_rows_through_the_jacobians(
    swept: Callable[..., blt.Sweep], case: Case, fits: list[Path]
) -> None:
    found = swept(fits[0], projection=["logit_lens", "normalized"])
    rows = found.positions(["target_rank"])
    names = ["logit_lens", "normalized", "jacobian_lens", "jacobian_lens_normalized"]
    assert sorted(rows["projection"].unique()) == sorted(names)
    keys = ["prompt", "matrix", "layer", "position"]
    for prompt, row in enumerate(ROWS):
        result = blt.backward_lens(
            case.model, row["prompt"], row["target"], projection=["logit_lens", str(fits[0])]
        )
        for name in result.projections:
            expected = result.under(name).to_df().assign(prompt=prompt)
            own = rows[(rows["prompt"] == prompt) & (rows["projection"] == name)]
            own = own.merge(expected, on=keys)
            assert len(own) == len(expected) > 0
            assert own["target_rank_x"].equals(own["target_rank_y"])


def test_run_json_identifies_the_fit(swept: Callable[..., blt.Sweep], fits: list[Path]) -> None:
    found = swept(fits[0], layers=0)
    about = json.loads((found.folder / "run.json").read_text())
    fit = load_jacobians(fits[0]).provenance
    assert about["jacobian"] == fit
    assert (fit["corpus"], fit["n_prompts"], len(fit["sha256"])) == ("text 0", 1, 64)
    assert found.config.jacobian == str(fits[0])


def test_only_the_same_fit_is_resumed(
    swept: Callable[..., blt.Sweep],
    fits: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = Path(shutil.copy(fits[0], tmp_path / "lens.pt"))
    real = measuring.backward_lens
    calls: list[Any] = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["projection"])
        shutil.copy(fits[2], file)  # the lens of another model, during the run
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(measuring, "backward_lens", stopped)
    with pytest.raises(KeyboardInterrupt):
        swept(file, layers=0)
    monkeypatch.setattr(measuring, "backward_lens", real)
    shutil.copy(fits[1], file)
    with pytest.raises(
        SweepError, match=r"other settings \(jacobian\): .*sha256 was .*Resume it with the orig"
    ):
        swept(file, layers=0)
    shutil.copy(fits[0], file)
    resumed = swept(file, layers=0)
    assert resumed.is_complete
    whole = swept(file, "whole", layers=0)
    assert resumed.positions().equals(whole.positions())


@pytest.mark.parametrize("lens", ["other", "missing", "partial"])
def test_lenses_that_cannot_read_the_model_are_refused_at_once(
    swept: Callable[..., blt.Sweep], fits: list[Path], tmp_path: Path, lens: str
) -> None:
    partial = load_jacobians(fits[0]).matrices
    files = {
        "other": (fits[2], "does not belong to"),
        "missing": (tmp_path / "none.pt", "does not exist"),
        "partial": (
            written(tmp_path / "partial.pt", {1: partial[1]}),
            r"no matrix for layers \[0\]",
        ),
    }
    file, message = files[lens]
    with pytest.raises(JacobianLensError, match=message):
        swept(file)
    assert not (tmp_path / "out").exists()


def test_a_path_is_a_text() -> None:
    with pytest.raises(SweepError, match="jacobian is 3; it should be a valid string, or None"):
        blt.SweepConfig(jacobian=3)  # type: ignore[arg-type]
