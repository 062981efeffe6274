"""Training loops as people write them: loaders, padding, skipped steps, evaluation, checkpoints.

The reference is `.grad` when the optimizer steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import LLAMA_MODULES, N_LAYERS, hf_model
from dense_gradients import joined
from models import relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from trainers import trainer_settings
from transformers import Trainer, TrainerCallback

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.training import BackwardLensCallback, StepGradient, watch

TOLERANCE = 1e-12
"""Rounding in float64, as in test_watching.py."""

ROUNDING = 1e-5
"""Of a product in float32, about 100 times its eps."""

Gradients = dict[tuple[str, int], Tensor]


def own_gradients(model: Any) -> Gradients:
    """`.grad` of every matrix, `[d_in, d_out]`."""
    return {
        (matrix, index): layer.get_submodule(name).weight.grad.T.clone()
        for index, layer in enumerate(model.model.layers)
        for matrix, name in LLAMA_MODULES.items()
        if layer.get_submodule(name).weight.grad is not None
    }


def errors(step: StepGradient, expected: Gradients) -> list[float]:
    """Of every matrix that is watched."""
    return [
        relative_error(joined(gradient.dense(), gradient.matrix), expected[key])
        for key, gradient in step.gradients.items()
    ]


class Texts(Dataset[dict[str, Any]]):
    """Sequences of different lengths; the first tokens are a prompt without labels."""

    def __init__(self, number: int, *, same_length: bool = False) -> None:
        self._number, self._same_length = number, same_length

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = 6 if self._same_length else 4 + index % 3
        ids = [3 + (7 * index + 5 * at) % 80 for at in range(length)]
        return {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}


def padded(rows: list[dict[str, Any]], *, left: bool = False) -> dict[str, Tensor]:
    """A batch as a collator makes it."""
    width = max(len(row["input_ids"]) for row in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        missing = width - len(row["input_ids"])
        for name, values, filler in (
            ("input_ids", row["input_ids"], 2),
            ("labels", row["labels"], -100),
            ("attention_mask", [1] * len(row["input_ids"]), 0),
        ):
            blank = [filler] * missing
            columns[name].append(blank + values if left else values + blank)
    return {name: torch.tensor(values) for name, values in columns.items()}


# ------------------------------------------------------------------------------------- plain loops


def test_epochs_of_a_loader() -> None:
    """Shuffled batches of several lengths, with one that is smaller at the end."""
    torch.manual_seed(0)
    model = hf_model("llama", torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    expected: list[Gradients] = []
    optimizer.register_step_pre_hook(lambda *_: expected.append(own_gradients(model)))
    loader = DataLoader(Texts(7), batch_size=2, shuffle=True, collate_fn=padded)
    steps = []
    with watch(model, "all", every=3) as watched:
        for _ in range(2):
            for inputs in loader:
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if (step := watched.step()) is not None:
                    steps.append(step)
    assert [step.step for step in steps] == [1, 4, 7]
    assert len(expected) == 8
    for step in steps:
        assert max(errors(step, expected[step.step - 1])) < TOLERANCE
        assert min(errors(step, expected[step.step])) > 0.1  # the next step's are others


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_left_padding(dtype: torch.dtype) -> None:
    model = hf_model("llama", dtype)
    model.set_attn_implementation("sdpa")
    inputs = padded([Texts(3)[index] for index in (2, 0, 1)], left=True)
    assert inputs["attention_mask"][:, 0].tolist() == [1, 0, 0]
    with watch(model, "all") as watched:
        model(**inputs).loss.backward()
        step = watched.step()
    assert step is not None
    assert max(errors(step, own_gradients(model))) < (1e-12 if dtype == torch.float64 else 1e-5)
    places = list(zip(step.sequences.tolist(), step.positions.tolist(), strict=True))
    # Six, four and five tokens end at the last place, which predicts nothing.
    assert places == [(row, at) for row, start in enumerate((0, 2, 1)) for at in range(start, 5)]


def test_nan_is_not_hidden() -> None:
    """Rows that are NaN count as gradients, as in `.grad`."""
    model = hf_model("llama", torch.float64)
    with watch(model, "all") as watched:
        inputs = padded([Texts(1)[0]])
        (model(**inputs).loss * float("nan")).backward()
        step = watched.step()
    assert step is not None
    for key, expected in own_gradients(model).items():
        assert expected.isnan().any()
        assert step[key].dense().isnan().any()


def test_a_step_that_the_scaler_skips() -> None:
    """Its gradient is not finite, and the next one is that of the scaled loss."""
    model = hf_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    inputs, found = padded([Texts(2)[0], Texts(2)[1]]), []
    weights = [each.detach().clone() for each in model.parameters()]
    with watch(model, "all", every=1) as watched:
        for factor in (float("inf"), 1.0):
            scaler.scale(factor * model(**inputs).loss).backward()
            scale, expected = scaler.get_scale(), own_gradients(model)
            scaler.step(optimizer)
            if factor != 1:
                assert all(map(torch.equal, model.parameters(), weights))
            found.append(watched.step(loss_scale=scale))
            scaler.update()
            optimizer.zero_grad()
    skipped, taken = found
    assert skipped is not None
    assert not any(bool(gradient.dense().isfinite().all()) for gradient in skipped)
    assert taken is not None
    assert scale == 2.0
    unscaled = {key: each / scale for key, each in expected.items()}
    assert max(errors(taken, unscaled)) < ROUNDING


# ------------------------------------------------------------------------------------ torch.compile


@pytest.mark.usefixtures("as_for_a_user")
def test_compiled_models_are_refused() -> None:
    model = hf_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule.*torch\.compile around it"):
        watch(torch.compile(model, backend="eager")).__enter__()


# ------------------------------------------------------------------------------ mixtures of experts


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_in_one_parameter_are_refused(family: str) -> None:
    """Shared experts beside them are not taken for the MLP."""
    model = hf_model(family)
    for matrices in ("mlp", "W_in", "W_out"):
        with pytest.raises(UnsupportedModelError, match=r"recognised: .*Mixtures of experts and"):
            watch(model, matrices).__enter__()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_attention_beside_experts(family: str) -> None:
    model = hf_model(family, torch.float64)
    with watch(model, "attn") as watched:
        model(**padded([Texts(1)[0]])).loss.backward()
        step = watched.step()
    assert step is not None
    assert len(step) == 4 * N_LAYERS
    for gradient in step:
        linear = model.model.layers[gradient.layer].get_submodule(LLAMA_MODULES[gradient.matrix])
        found = joined(gradient.dense(), gradient.matrix)
        assert relative_error(found, linear.weight.grad.T) < TOLERANCE


def test_a_dense_layer_beside_experts() -> None:
    model = hf_model("qwen3_moe", torch.float64)
    with pytest.raises(UnsupportedModelError, match="no W_in in layer 1 that can be recognised"):
        watch(model, "mlp").__enter__()
    with watch(model, "mlp", layers=0) as watched:
        model(**padded([Texts(1)[0]])).loss.backward()
        step = watched.step()
    assert step is not None
    for gradient in step:
        linear = model.model.layers[0].get_submodule(LLAMA_MODULES[gradient.matrix])
        assert relative_error(gradient.dense(), linear.weight.grad.T) < TOLERANCE


# ------------------------------------------------------------------------------------------ Trainer


class KeptGradients(TrainerCallback):
    """`.grad` when the optimizer steps, by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, Gradients] = {}
        self.n_evaluations = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.by_step[state.global_step + 1] = own_gradients(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.n_evaluations += 1


def trained(
    model: nn.Module, folder: Path, resume: str | None = None, **options: Any
) -> tuple[list[StepGradient], KeptGradients]:
    """A training with two microbatches in each step."""
    pytest.importorskip("accelerate")
    steps: list[StepGradient] = []
    kept = KeptGradients()
    with watch(model, "all", every=1) as watched:
        trainer = Trainer(
            model,
            trainer_settings(folder, **options),
            train_dataset=Texts(10, same_length=True),
            eval_dataset=Texts(3, same_length=True),
            callbacks=[kept, BackwardLensCallback(watched, steps.append)],
        )
        trainer.train(resume_from_checkpoint=resume)
    return steps, kept


def test_last_group_of_an_epoch(tmp_path: Path) -> None:
    """Five batches: two steps of two microbatches, and one of one."""
    steps, kept = trained(hf_model("llama"), tmp_path, num_train_epochs=2)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [int(step.backward_passes.max()) + 1 for step in steps] == [2, 2, 1, 2, 2, 1]
    for step in steps:
        assert max(errors(step, kept.by_step[step.step])) < ROUNDING


def test_evaluation_during_training(tmp_path: Path) -> None:
    steps, kept = trained(
        hf_model("llama"), tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1
    )
    assert kept.n_evaluations == 3
    for step in steps:
        assert len(step.positions) == (2 if step.step == 3 else 4) * 5
        assert max(errors(step, kept.by_step[step.step])) < ROUNDING


def test_resuming_from_a_checkpoint(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    steps, _ = trained(hf_model("llama"), tmp_path, **options)
    again, kept = trained(hf_model("llama"), tmp_path, str(tmp_path / "checkpoint-2"), **options)
    assert [step.step for step in again] == [3, 4]
    for step, same in zip(again, steps[2:], strict=True):
        assert max(errors(step, kept.by_step[step.step])) < ROUNDING
        dense = {key: joined(each.dense(), key[0]) for key, each in same.gradients.items()}
        assert max(errors(step, dense)) < ROUNDING
