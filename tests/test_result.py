"""A result is self-contained: its table, its file, its repr."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import HAS_BRIDGE, Case, build
from safetensors.torch import save_file
from torch import Tensor

from backward_lens_tl.errors import InputError, ResultFileError
from backward_lens_tl.files.storage import FORMAT_VERSION
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.result import BackwardLensResult

PROMPTS = ["Messi plays for", "The capital of France is"]
COLUMNS = [
    "prompt",
    "matrix",
    "layer",
    "position",
    "token",
    "norm",
    "input_norm",
    "write_norm",
    "top_vjp_cosine",
    "is_zero",
    "projection",
    "is_faint",
    "target",
    "target_rank",
    "answer",
    "answer_rank",
    "entropy",
    "top_tokens",
    "top_scores",
    "bottom_tokens",
    "bottom_scores",
]


@pytest.fixture(scope="module")
def gpt2() -> Case:
    """One model class only: a result does not depend on it."""
    return build("bridge-gpt2" if HAS_BRIDGE else "hooked-gpt2")


@pytest.fixture(scope="module")
def result(gpt2: Case) -> BackwardLensResult:
    return backward_lens(gpt2.model, PROMPTS, [" Paris", " the"], k=3)


# ------------------------------------------------------------------------------------- the table


def test_table_has_one_row_per_cell(gpt2: Case, result: BackwardLensResult) -> None:
    table = result.to_df()
    assert list(table.columns) == COLUMNS
    lengths = [len(gpt2.model.to_tokens(prompt)[0]) for prompt in PROMPTS]
    assert len(table) == sum(lengths) * 2 * gpt2.n_layers
    keys = table[["prompt", "matrix", "layer", "position"]]
    assert not keys.duplicated().any()


def test_values_of_the_table(gpt2: Case, result: BackwardLensResult) -> None:
    tokenizer = gpt2.model.tokenizer
    for row in result.to_df().itertuples():
        at = row.layer, row.prompt, row.position
        gradient = result.capture[row.matrix, row.layer]
        token = int(result.capture.tokens[row.prompt, row.position])
        assert row.token == tokenizer.decode([token])
        delta = gradient.vjps[row.prompt, row.position]
        assert row.norm == pytest.approx(float((delta**2).sum() ** 0.5), rel=1e-12)
        inputs = gradient.inputs[row.prompt, row.position]
        assert row.input_norm == pytest.approx(float((inputs**2).sum() ** 0.5), rel=1e-12)
        written = inputs[:, None] * delta
        assert row.write_norm == pytest.approx(float((written**2).sum() ** 0.5), rel=1e-12)
        assert row.is_zero == (row.norm == 0)
        assert row.target == [" Paris", " the"][row.prompt]
        if row.is_zero:
            assert pd.isna(row.target_rank)
            assert row.top_tokens == row.top_scores == row.bottom_tokens == row.bottom_scores == []
            continue
        assert row.target_rank == int(result.target_rank(row.matrix)[at])
        readout = result.readout(row.matrix)
        for words, scores, ids, values in (
            (row.top_tokens, row.top_scores, readout.top_ids, readout.top_scores),
            (row.bottom_tokens, row.bottom_scores, readout.bottom_ids, readout.bottom_scores),
        ):
            assert scores == values[at].tolist()
            assert words == [tokenizer.decode([i]) for i in ids[at].tolist()]
        words = result.top_tokens(row.matrix, row.layer, row.position, batch=row.prompt)
        assert words == row.top_tokens


def test_table_of_chosen_positions(gpt2: Case) -> None:
    table = backward_lens(gpt2.model, PROMPTS, " Paris", layers=[1, 2], positions=[-1, 0]).to_df()
    assert len(table) == 2 * 2 * 2 * 2
    assert set(table["layer"]) == {1, 2}
    lengths = [len(gpt2.model.to_tokens(prompt)[0]) for prompt in PROMPTS]
    for prompt, n in enumerate(lengths):
        assert set(table[table["prompt"] == prompt]["position"]) == {0, n - 1}


def last_logit(logits: Tensor, tokens: Tensor) -> Tensor:
    return -logits[:, -1, 7]


def test_table_without_a_target(gpt2: Case) -> None:
    table = backward_lens(gpt2.model, PROMPTS, objective=last_logit, layers=0).to_df()
    assert table["target"].isna().all()
    assert table["target_rank"].isna().all()


# -------------------------------------------------------------------------------------- the file


NAMES = ("tokens", "mask", "loss", "targets", "prompt_lengths")


def assert_equal_results(found: BackwardLensResult, expected: BackwardLensResult) -> None:
    assert found.to_df().equals(expected.to_df())
    assert found.matrices == expected.matrices
    assert found.layers == expected.layers
    assert (found.projection, found.direction, found.k) == (
        expected.projection,
        expected.direction,
        expected.k,
    )
    assert torch.equal(found.positions, expected.positions)
    mine, theirs = found.capture, expected.capture
    assert (mine.objective, mine.model_name) == (theirs.objective, theirs.model_name)
    assert mine.str_tokens == theirs.str_tokens
    assert mine.target_texts == theirs.target_texts
    tensors = [(getattr(mine, name), getattr(theirs, name)) for name in NAMES]
    tensors += zip(vars(mine.predictions).values(), vars(theirs.predictions).values(), strict=True)
    for one, other in tensors:
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert one is None or one.dtype == other.dtype
    assert list(mine.gradients) == list(theirs.gradients)
    for key, gradient in theirs.gradients.items():
        assert torch.equal(mine[key].inputs, gradient.inputs)
        assert torch.equal(mine[key].vjps, gradient.vjps)
        assert mine[key].inputs.dtype == gradient.inputs.dtype
        assert mine[key].rank(0) == gradient.rank(0)
    for matrix in expected.matrices:
        for name, values in vars(expected.readout(matrix)).items():
            loaded = getattr(found.readout(matrix), name)
            torch.testing.assert_close(loaded, values, rtol=0, atol=0, equal_nan=True)
    for batch in range(len(expected.positions)):
        assert found.target(batch) == expected.target(batch)
        assert found.position_targets(batch) == expected.position_targets(batch)
        assert found.prediction(batch) == expected.prediction(batch)
        at = expected.matrices[0], expected.layers[0], -1
        assert found.top_tokens(*at, batch=batch) == expected.top_tokens(*at, batch=batch)
        assert found.cell(*at, batch=batch) == expected.cell(*at, batch=batch)


def test_a_saved_result_can_be_loaded(result: BackwardLensResult, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    result.save(path)
    assert_equal_results(BackwardLensResult.load(path), result)
    assert_equal_results(BackwardLensResult.load(str(path)), result)
    assert [file.name for file in tmp_path.iterdir()] == ["result.safetensors"]


def test_a_saved_result_without_a_target_can_be_loaded(gpt2: Case, tmp_path: Path) -> None:
    chosen = backward_lens(
        gpt2.model,
        PROMPTS,
        objective=last_logit,
        layers=[0, 2],
        positions=-1,
        matrices="W_out",
        projection="normalized",
        direction="gradient",
    )
    chosen.save(tmp_path / "r")
    loaded = BackwardLensResult.load(tmp_path / "r")
    assert_equal_results(loaded, chosen)
    with pytest.raises(InputError):
        loaded.target_rank("W_out")


def test_a_saved_result_with_unusual_tokens_can_be_loaded(stories: Case, tmp_path: Path) -> None:
    odd = backward_lens(stories.model, "é “☃” </script>\n\t", matrices="mlp", k=50, layers=[0])
    odd.save(tmp_path / "odd")
    assert_equal_results(BackwardLensResult.load(tmp_path / "odd"), odd)


def test_saving_replaces_an_older_file(result: BackwardLensResult, tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text("something else")
    result.save(path)
    result.save(path)
    assert_equal_results(BackwardLensResult.load(path), result)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite(path: Path) -> None:
    path.write_bytes(b"not a result " * 50)


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def foreign_with_metadata(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})


def later_format(path: Path) -> None:
    contents = path.read_bytes()
    ours = b'\\"format\\": %d,' % FORMAT_VERSION
    assert contents.count(ours) == 1
    path.write_bytes(contents.replace(ours, b'\\"format\\": 9,'))


def no_json(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, metadata={"backward_lens_tl": "{"})


def missing_tensors(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)


def remove(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        cut_in_the_header,
        empty,
        overwrite,
        foreign,
        foreign_with_metadata,
        later_format,
        no_json,
        missing_tensors,
        remove,
        folder,
    ],
    ids=lambda damage: damage.__name__,
)
def test_files_that_are_not_results_are_refused_by_name(
    damage: Callable[[Path], None], result: BackwardLensResult, tmp_path: Path
) -> None:
    path = tmp_path / "saved_result"
    result.save(path)
    damage(path)
    with pytest.raises(ResultFileError, match="saved_result"):
        BackwardLensResult.load(path)


def test_a_file_of_another_format_is_not_reported_as_damaged(
    result: BackwardLensResult, tmp_path: Path
) -> None:
    """Even if its header has another structure; the version that wrote it can read it."""
    path = tmp_path / "result"
    header = '{"format": 3, "backward_lens_tl": "0.0.3"}'
    save_file({"weight": torch.zeros(2)}, path, metadata={"backward_lens_tl": header})
    with pytest.raises(
        ResultFileError, match=r"format 3, .* reads 7; install .*-tl 0\.0\.3, which"
    ):
        BackwardLensResult.load(path)


# -------------------------------------------------------------------------------------- the repr


@pytest.mark.parametrize("has_target", [True, False])
def test_the_repr_describes_the_result_and_its_methods(
    has_target: bool,
    gpt2: Case,
    result: BackwardLensResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not has_target:
        prompts = [result.capture.prompt(batch) for batch in range(2)]
        result = backward_lens(gpt2.model, prompts, objective=last_logit)
    what, following = repr(result).splitlines()
    for word in ("BackwardLensResult", "W_in, W_out", "and 1 more", "Messi plays for", "update"):
        assert word in what
    monkeypatch.chdir(tmp_path)  # a page is written
    calls = following.removeprefix("Next: ").split(", .")
    assert len(calls) == (4 if has_target else 3)
    for call in calls:
        eval(f"result.{call.removeprefix('.')}", {"result": result})
    assert (tmp_path / "page.html").exists()


def test_repr_is_short(gpt2: Case) -> None:
    ids = torch.randint(90, (1, 60), generator=torch.Generator().manual_seed(0))
    shown = repr(backward_lens(gpt2.model, ids, 5))
    assert max(map(len, shown.splitlines())) < 250


def test_repr_of_a_capture_holds_no_numbers(result: BackwardLensResult) -> None:
    shown = repr(result.capture)
    assert "GradientCapture" in shown
    assert "tensor(" not in shown


def test_the_repr_of_cells_is_readable(result: BackwardLensResult) -> None:
    cell = result.cell("W_out", 1, -1, batch=1)
    assert (cell.matrix, cell.layer) == ("W_out", 1)
    assert cell.position == len(result.capture.str_tokens[1]) - 1
    assert cell.token == " is"
    scores = [entry.score for entry in cell.top]
    assert scores == sorted(scores, reverse=True)
    scores = [entry.score for entry in cell.bottom]
    assert scores == sorted(scores)
    assert [entry.token for entry in cell.top] == result.top_tokens("W_out", 1, -1, batch=1)
    assert result.cell("W_out", -1, 0).layer == 2
    assert len(result.cells("W_in", 0, batch=1)) == len(result.capture.str_tokens[1])
    with pytest.raises(InputError, match="k is 4"):
        result.top_tokens("W_out", 1, -1, k=4)
    with pytest.raises(InputError, match="k is 0"):
        result.bottom_tokens("W_out", 1, -1, k=0)


# ----------------------------------------------------------------------------- no data lost on disk


@pytest.mark.parametrize("batch", [-1, 2])
def test_a_failed_page_leaves_the_old_one(
    result: BackwardLensResult, tmp_path: Path, batch: int
) -> None:
    page = tmp_path / "page.html"
    page.write_text("precious")
    with pytest.raises(InputError, match="allowed: 0 to 1"):
        result.save_html(page, batch=batch)
    assert page.read_text() == "precious"


def test_a_failed_save_leaves_no_file(result: BackwardLensResult, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder, tmp_path / "missing" / "file"):
        with pytest.raises(ResultFileError, match="cannot be written"):
            result.save(path)
    assert list(tmp_path.rglob("*")) == [folder]


def test_zero_cells_have_no_tokens_and_no_rank(result: BackwardLensResult) -> None:
    cells = [cell for layer in result.layers for cell in result.cells("W_out", layer)]
    assert any(cell.is_zero for cell in cells)
    for cell in cells:
        assert (cell.target_rank is None) == cell.is_zero
        assert (not cell.top) == (not cell.bottom) == cell.is_zero


def test_a_callers_file_next_to_the_result_stays(gpt2: Case, tmp_path: Path) -> None:
    result = backward_lens(gpt2.model, torch.tensor([[1, 2, 3]]), 5)
    theirs = tmp_path / "result.partial"
    theirs.write_text("mine")
    result.save(tmp_path / "result")
    assert theirs.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result", "result.partial"]


def test_negative_layers_count_from_the_models_last_layer(facts_model: Any) -> None:
    """In arguments, in captures and in results, also if only some layers were captured."""
    result = backward_lens(facts_model, "Lionel Messi plays for", " Paris", layers=[2, -3])
    capture = result.capture
    assert capture.layers == (2, 5)
    assert capture["W_out", -3] is capture["W_out", 5]
    assert capture.neuron_df("W_out", -6).equals(capture.neuron_df("W_out", 2))
    assert capture.layer_number(-6) == 2
    assert result.cell("W_in", -3, 0) == result.cell("W_in", 5, 0)
    for read in (
        lambda: capture["W_out", -1],
        lambda: capture.neuron_df("W_out", -1),
        lambda: capture.layer_number(-1),
        lambda: result.top_tokens("W_out", -1, -1),
        lambda: result.cells("W_out", -2),
    ):
        with pytest.raises(InputError, match=r"was not captured; available: .*2, 5"):
            read()
    for read in (lambda: capture["W_out", 8], lambda: result.cells("W_out", -9)):
        with pytest.raises(InputError, match="does not exist; allowed: -8 to 7"):
            read()
