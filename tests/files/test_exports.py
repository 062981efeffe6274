"""Exports of a result: CSV, Parquet, safetensors with metadata, and tables of gradients."""

from __future__ import annotations

import csv
import json
import math
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch
from models import HAS_BRIDGE, build
from safetensors import safe_open
from view_cases import NASTY, make_result

from backward_lens_tl.errors import InputError, ResultFileError
from backward_lens_tl.files.exports import write_csv
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.result import BackwardLensResult

LIST_COLUMNS = ("top_tokens", "top_scores", "bottom_tokens", "bottom_scores")
PROMPTS = ["Messi plays for", "The capital of France is"]


@pytest.fixture(scope="module")
def result() -> BackwardLensResult:
    """From one model class only, since results do not depend on it."""
    model = build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2").model
    return backward_lens(model, PROMPTS, [" Paris", " the"], k=3)


# -------------------------------------------------------------------------------- CSV and Parquet


@pytest.mark.parametrize("tokens", ["ordinary", "nasty"])
def test_csv_has_the_table_for_any_tokens(
    result: BackwardLensResult, tmp_path: Path, tokens: str
) -> None:
    # pandas refuses lone surrogates, which no tokenizer has.
    nasty = tuple(token for token in NASTY if token != "\ud800")
    chosen = result if tokens == "ordinary" else make_result(pos=len(nasty), vocab=nasty)
    chosen.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = chosen.to_df()
    assert list(rows[0]) == list(table.columns)
    for found, row in zip(rows, table.itertuples(index=False), strict=True):
        assert float(found["norm"]) == pytest.approx(row.norm, rel=1e-15)
        assert found["token"] == row.token
        rank = "" if pd.isna(row.target_rank) else str(row.target_rank)
        assert found["target_rank"] == rank
        for name in LIST_COLUMNS:
            assert json.loads(found[name]) == getattr(row, name)


def test_parquet_has_the_table(result: BackwardLensResult, tmp_path: Path) -> None:
    result.to_parquet(tmp_path / "table.parquet", subject=["Messi", "France"])
    found = pd.read_parquet(tmp_path / "table.parquet")
    wanted = result.to_df(subject=["Messi", "France"])
    assert list(found.columns) == list(wanted.columns)
    for name in LIST_COLUMNS:
        assert [list(cell) for cell in found.pop(name)] == list(wanted.pop(name))
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False)
    assert found["target_rank"].isna().tolist() == wanted["target_rank"].isna().tolist()


def test_the_suffix_selects_compression(result: BackwardLensResult, tmp_path: Path) -> None:
    result.to_csv(tmp_path / "table.csv.gz")
    assert (tmp_path / "table.csv.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert len(pd.read_csv(tmp_path / "table.csv.gz")) == len(result.to_df())


def test_infinite_scores_are_strings_in_json(tmp_path: Path) -> None:
    table = pd.DataFrame({"bottom_scores": [[-math.inf, 1.5], []]})
    write_csv(table, tmp_path / "table.csv")
    found = pd.read_csv(tmp_path / "table.csv")["bottom_scores"]
    assert [json.loads(cell) for cell in found] == [["-inf", 1.5], []]


def test_parquet_without_pyarrow_says_what_to_install(
    result: BackwardLensResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pyarrow(self: pd.DataFrame, path: Path, index: bool) -> None:
        raise ImportError("no engine")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", no_pyarrow)
    with pytest.raises(ResultFileError, match=r"pip install .*parquet"):
        result.to_parquet(tmp_path / "table.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["to_csv", "to_parquet", "save_html", "save"])
def test_files_that_cannot_be_written(
    result: BackwardLensResult, tmp_path: Path, method: str, as_for_a_user: None
) -> None:
    with pytest.raises(
        ResultFileError, match=r"cannot be written: folder .*nowhere.* does not exist"
    ):
        getattr(result, method)(tmp_path / "nowhere" / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResultFileError, match=r"folder' cannot be written: it is a folder"):
        getattr(result, method)(tmp_path / "folder")
    with pytest.raises(ResultFileError, match="path"):
        getattr(result, method)(None)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("method", ["to_csv", "to_parquet", "save_html", "save"])
def test_a_failed_write_keeps_the_old_file(
    result: BackwardLensResult, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ResultFileError, match="no space left"):
        getattr(result, method)(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------ the segments


def test_segments_in_the_table(result: BackwardLensResult) -> None:
    table = result.to_df(subject=["Messi", "France"])
    plain = result.to_df()
    assert table.drop(columns="segment").equals(plain)
    assert list(table.columns)[5] == "segment"
    for prompt, subject in enumerate(["Messi", "France"]):
        own = table.query(f"prompt == {prompt} and matrix == 'W_out' and layer == 0")
        of_subject = own[own["segment"].str.contains("subject token")]
        assert "".join(of_subject["token"]).strip() == subject
        assert own["segment"].iloc[-1] == "last token"
    with pytest.raises(InputError, match="Rome"):
        result.to_df(subject="Rome")


# ------------------------------------------------------------------------- gradients and neurons


def test_gradients_as_a_table(result: BackwardLensResult) -> None:
    table = result.capture.gradient_df()
    assert len(table) == len(PROMPTS) * len(result.matrices) * len(result.layers)
    for row in table.itertuples():
        dense = result.capture[row.matrix, row.layer].dense(row.prompt)
        assert row.norm == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-9)
        assert row.rank == int(torch.linalg.matrix_rank(dense, rtol=1e-9))


def test_neurons_as_a_table(result: BackwardLensResult) -> None:
    table = result.capture.neuron_df("W_out", -1, batch=1)
    last = result.layers[-1]
    dense = result.capture["W_out", last].dense(1)
    norms = table.drop_duplicates("neuron")["neuron_norm"]
    wanted = torch.linalg.vector_norm(dense, dim=1)
    torch.testing.assert_close(torch.tensor(norms.to_numpy()), wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match=r"\('W_Q', 0\) was not captured"):
        result.capture.neuron_df("W_Q", 0)
    with pytest.raises(InputError, match="layer 7 does not exist"):
        result.capture.neuron_df("W_out", 7)
    with pytest.raises(InputError, match="prompt 2 does not exist"):
        result.capture.neuron_df("W_out", 0, batch=2)


# ---------------------------------------------------------------------------------- the saved file


def test_a_saved_result_has_the_same_table_under_every_lens(
    result: BackwardLensResult, tmp_path: Path
) -> None:
    result.save(tmp_path / "result")
    loaded = BackwardLensResult.load(tmp_path / "result")
    assert loaded.projections == result.projections == ("logit_lens", "normalized")
    for lens in result.projections:
        assert loaded.under(lens).to_df().equals(result.under(lens).to_df())
        assert loaded.under(lens)._repr_html_() == result.under(lens)._repr_html_()


def test_the_metadata_can_be_read_without_this_package(
    result: BackwardLensResult, tmp_path: Path
) -> None:
    result.save(tmp_path / "result")
    with safe_open(tmp_path / "result", framework="pt") as file:
        about = json.loads(file.metadata()["backward_lens_tl"])
    for name in ("backward-lens-tl", "transformer-lens", "torch"):
        assert about[name.replace("-", "_")] == version(name)
    assert about["model"] == result.capture.model_name
    for prompt, own in zip(about["prompts"], PROMPTS, strict=True):
        assert prompt.endswith(own)
    assert about["objective"] == result.capture.objective
