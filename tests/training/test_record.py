"""The record of a watched run: its numbers, its tokens, its folder, and runs that are killed."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from architectures import N_LAYERS, hf_model
from child_process import in_child
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models.loading import load_facts_model
from backward_lens_tl.readout.vectors import read_vectors
from backward_lens_tl.training import StepGradient, TrainingRecord, watch
from backward_lens_tl.training.change_numbers import cosine

FACTS_FOLDER = Path(__file__).parents[2] / "backward_lens_tl" / "facts_model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FACTS_FOLDER)


def backward(model: Any, seed: int = 0) -> None:
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()


def one_step(model: nn.Module, matrices: Any = "mlp", **options: Any) -> StepGradient:
    with watch(model, matrices, **options) as watched:
        backward(model)
        step = watched.step()
    assert step is not None
    return step


def test_numbers_are_those_of_the_dense_gradient(tmp_path: Path) -> None:
    model = hf_model("llama", torch.float64)
    step = one_step(model, "all")
    rows = TrainingRecord(tmp_path, k=2).add(step)
    assert list(zip(rows.matrix, rows.layer, strict=True)) == list(step.gradients)
    assert set(rows.positions) == {10}
    for gradient, row in zip(step, rows.itertuples(), strict=True):
        values = torch.linalg.svdvals(gradient.dense().flatten(-1))
        if gradient.n_heads is not None:
            continue  # dense() is by head
        squares = values.square()
        assert row.norm == pytest.approx(float(gradient.dense().norm()), rel=1e-12)
        assert row.energy == pytest.approx((squares[:2] / squares.sum()).tolist(), rel=1e-10)
        expected = float(squares.sum().square() / squares.square().sum())
        assert row.effective_rank == pytest.approx(expected, rel=1e-10)
        assert row.top_tokens == row.bottom_tokens == []  # neither a tokenizer nor a reader


def test_tokens_are_read_with_the_weights_after_the_step(tmp_path: Path) -> None:
    model: Any = load_facts_model()
    record = TrainingRecord(tmp_path, k=3)
    with watch(model, ["W_in", "W_out"], layers=[5, 6]) as watched:
        model(model.to_tokens("Lionel Messi plays for Paris"), return_type="loss").backward()
        with torch.no_grad():  # a step that exchanges tokens
            for weight in model.parameters():
                if tuple(weight.shape) == (3072, 128):
                    weight.copy_(weight.flip(0).clone())
        step = watched.step()
    assert step is not None
    rows = record.add(step)
    for gradient, row in zip(step, rows.itertuples(), strict=True):
        read = read_vectors(model, -gradient.principal_directions(3).resid, k=3)
        assert row.top_tokens == read.top_tokens
        assert row.bottom_tokens == read.bottom_tokens


def test_tokens_by_a_reader_and_by_the_model_itself(tmp_path: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(FACTS_FOLDER)
    reader: Any = load_facts_model()
    rows = []
    for name, options, arguments in (
        ("own", {"tokenizer": tokenizer}, {}),
        ("reader", {}, {"reader": reader}),
    ):
        step = one_step(model, "W_out", layers=[5, 6], **options)
        rows.append(TrainingRecord(tmp_path / name, **arguments).add(step))
    own, read = rows
    assert own.top_tokens.tolist() == read.top_tokens.tolist()
    assert own.bottom_tokens.tolist() == read.bottom_tokens.tolist()
    assert [len(each) for each in own.top_tokens[0]] == [3, 3, 3]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gptj", "phi3", "opt"])
def test_own_readout_is_the_last_residual_stream(family: str, tokenizer: Any) -> None:
    """The final residual stream of a pass reads as the tokens that the model ranks first."""
    model = hf_model(family, torch.float64)
    try:
        matrix = "W_O" if family == "phi3" else "W_out"
        step = one_step(model, matrix, layers=0, tokenizer=tokenizer)
    except UnsupportedModelError:
        step = one_step(model, "W_O", layers=0, tokenizer=tokenizer)
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
        norm = step.readout._reads.norm
        kept: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        logits = model(ids).logits[0]
        handle.remove()
    assert kept[0].shape == found.hidden_states[-1].shape
    read = step.read(kept[0][0], k=4)
    assert torch.equal(read.top_ids, logits.topk(4).indices)


def test_models_whose_readout_is_unknown(tmp_path: Path, tokenizer: Any) -> None:
    model = hf_model("llama")
    head = model.lm_head
    head.register_forward_hook(lambda _, args, output: -output)  # not the product alone
    step = one_step(model, "W_out", tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match="do not rank tokens as it does; pass a model"):
        TrainingRecord(tmp_path).add(step)
    with pytest.raises(InputError, match="has no tokenizer; pass watch"):
        one_step(hf_model("llama"), "W_out").read(torch.ones(1, 24))


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    model = hf_model("llama")
    record = TrainingRecord(tmp_path)
    with watch(model, "W_out") as watched:
        ids = torch.tensor([[3, 4, 5]])
        (model(ids, labels=ids).loss * float("inf")).backward()
        rows = record.add(watched.step())  # type: ignore[arg-type]
    assert rows.norm.isna().all()
    assert rows.energy.tolist() == [[]] * N_LAYERS


def test_a_step_whose_loss_is_constant(tmp_path: Path) -> None:
    model = hf_model("llama")
    with watch(model, ["W_Q", "W_out"], changes=True, reference=([5], 6)) as watched:
        (model(torch.tensor([[3, 4, 5]])).logits * 0).sum().backward()
        step = watched.step()
    assert step is not None
    rows = TrainingRecord(tmp_path).add(step)
    assert rows.norm.tolist() == rows.positions.tolist() == [0, 0, 0, 0]
    assert rows.reference_cosine.isna().all()


def test_references_that_are_not_finite(tmp_path: Path) -> None:
    model = hf_model("llama")
    step = one_step(model, "W_out", reference=([5], 6))
    for each in step.references.values():
        each.vjps.fill_(float("nan"))
    assert TrainingRecord(tmp_path).add(step).reference_cosine.isna().all()
    assert all(map(math.isnan, (cosine(math.nan, 1.0), cosine(1.0, math.inf), cosine(0.0, 0.0))))


def test_columns_and_types(tmp_path: Path) -> None:
    from backward_lens_tl.training.record_columns import ROWS

    record = TrainingRecord(tmp_path)
    written = record.add(one_step(hf_model("llama"), "W_out"))
    read = TrainingRecord.load(tmp_path).to_dataframe()
    assert read.columns.tolist() == written.columns.tolist() == [each.name for each in ROWS]
    for name in ("energy", "top_tokens", "bottom_tokens", "change_tokens"):
        assert read[name].tolist() == written[name].tolist()
        assert isinstance(read[name][0], list)
    assert read.change_norm.isna().all()
    assert read.reference_cosine.isna().all()
    assert record.to_dataframe(["norm"]).columns.tolist()[-1] == "norm"
    about = json.loads((tmp_path / "process-0" / "run.json").read_text())
    assert about["model"]["class"] == "LlamaForCausalLM"
    assert (about["matrices"], about["layers"], about["every"]) == (["W_out"], [0, 1], 10)
    assert repr(record).endswith("1 watched steps of 1 processes; read it with .to_dataframe())")


def training(folder: Path, *, after: int = 0, stop: Callable[[int], object] = int) -> None:
    """Six steps of SGD with momentum, of which the first ones are those of a checkpoint."""
    model = hf_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def optimize(number: int) -> None:
        backward(model, seed=number)
        optimizer.step()
        optimizer.zero_grad()

    for number in range(after):
        optimize(number)
    record = TrainingRecord(folder, k=2)
    with watch(model, "W_out", every=2, changes=True) as watched:
        watched.resume(after)
        for number in range(after, 6):
            optimize(number)
            if (step := watched.step()) is not None:
                record.add(step)
            stop(number)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["between steps", "while a shard is written"])
def test_a_killed_run_loses_no_step_and_resumes(tmp_path: Path, when: str) -> None:
    """SIGKILL after the fourth step, or while the third watched step, the fifth, is written."""
    out = tmp_path / "killed"

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        if when == "between steps":
            training(out, stop=lambda number: kill() if number == 3 else None)
        real, calls = pq.write_table, iter(range(9))

        def half_written(table: Any, file: Path) -> None:
            if next(calls) == 2:
                file.write_bytes(b"half of a file")
                kill()
            real(table, file)

        pq.write_table = half_written
        training(out)

    assert in_child(killed) == -signal.SIGKILL
    assert sorted(set(TrainingRecord.load(out).to_dataframe().step)) == [1, 3]
    training(out, after=2)  # the last checkpoint; step 3 is repeated
    training(tmp_path / "whole")
    found, whole = (
        TrainingRecord.load(folder).to_dataframe() for folder in (out, tmp_path / "whole")
    )
    assert sorted(set(found.step)) == [1, 3, 5]
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    assert len([*(out / "process-0" / "rows").iterdir()]) == 3  # no temporary file is left


def test_a_repeated_step_replaces_its_rows(tmp_path: Path) -> None:
    record = TrainingRecord(tmp_path)
    step = one_step(hf_model("llama"), "W_out")
    record.add(step)
    record.add(step)
    assert len(record.to_dataframe()) == N_LAYERS


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = one_step(hf_model("llama"), "W_out")
    for process in (1, 0, 10):
        monkeypatch.setattr("backward_lens_tl.training.record.process_index", lambda at=process: at)
        TrainingRecord(tmp_path).add(step)
    assert TrainingRecord.load(tmp_path).to_dataframe().process.tolist() == [0, 0, 1, 1, 10, 10]


@pytest.mark.usefixtures("as_for_a_user")
def test_refusals(tmp_path: Path) -> None:
    step = one_step(hf_model("llama"), "W_out")
    with pytest.raises(InputError, match="is not the folder of a training record: there is no"):
        TrainingRecord.load(tmp_path)
    with pytest.raises(InputError, match=r"nothing is written to .* yet; add a watched step"):
        TrainingRecord(tmp_path).to_dataframe()
    record = TrainingRecord(tmp_path)
    record.add(step)
    with pytest.raises(InputError, match="step is None; pass StepGradient"):
        record.add(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no column 'norms'; it has step, process"):
        record.to_dataframe(["norms"])
    with pytest.raises(InputError, match="k is 0; pass an integer of at least 1"):
        TrainingRecord(tmp_path, k=0)
    with pytest.raises(
        InputError, match=r"of other settings \(config\): k was 3, is 2\. Resume it with"
    ):
        TrainingRecord(tmp_path, k=2).add(step)
    other = one_step(hf_model("llama"), "W_out", every=3)
    with pytest.raises(InputError, match=r"of other settings \(every\): was 10, is 3"):
        TrainingRecord(tmp_path).add(other)
    shard = tmp_path / "process-0" / "rows" / "shard-000001.parquet"
    shard.write_bytes(b"not a table")
    with pytest.raises(InputError, match="is damaged"):
        record.to_dataframe()


def test_an_abandoned_branch_is_deleted(tmp_path: Path) -> None:
    """Five steps, and then two from the beginning: no row of the first run is left."""
    for seed, n_steps in ((0, 5), (9, 2)):
        model, record = hf_model("llama"), TrainingRecord(tmp_path)
        with watch(model, "W_out", layers=0, every=1) as watched:
            for number in range(n_steps):
                backward(model, seed + number)
                step = watched.step()
                assert step is not None
                written = record.add(step)
    rows = record.to_dataframe()
    assert rows.step.tolist() == [1, 2]
    assert rows.norm.tolist()[-1] == written.norm.tolist()[-1]


def test_a_checkpoint_that_is_loaded_from_another_folder(tmp_path: Path) -> None:
    for name in ("start", "out/checkpoint-500"):
        hf_model("llama").save_pretrained(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        record = TrainingRecord(tmp_path / "record")
        record.add(one_step(model, "W_out"))
    assert len(record.to_dataframe()) == N_LAYERS


def test_several_processes_change_the_weights_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change follows from the gradients of all of them, and each one knows its own."""
    model = hf_model("llama")
    with watch(model, "W_out", changes=True) as watched:
        backward(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        step = watched.step()
    assert step is not None
    alone = TrainingRecord(tmp_path / "alone").add(step)
    monkeypatch.setattr("backward_lens_tl.training.record.n_processes", lambda: 2)
    rows = TrainingRecord(tmp_path / "two").add(step)
    assert rows.change_norm.tolist() == alone.change_norm.tolist()
    assert rows.change_cosine.isna().all()
    assert rows.change_outside.isna().all()
    with pytest.raises(InputError, match=r"of other settings \(processes\): was 1, is 2"):
        TrainingRecord(tmp_path / "alone").add(step)


def test_changes_of_matrices_without_a_gradient(tmp_path: Path) -> None:
    """A step that is not finite, and a frozen matrix."""
    model = hf_model("llama")
    model.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    with watch(model, "W_out", changes=True) as watched:
        ids = torch.tensor([[3, 4, 5]])
        (model(ids, labels=ids).loss * float("inf")).backward()
        step = watched.step()  # the optimizer's was skipped
    assert step is not None
    rows = TrainingRecord(tmp_path).add(step)
    assert sorted(rows.layer) == [0, 1]
    assert rows.change_norm.tolist() == [0, 0]
    assert rows.norm.isna().all()
