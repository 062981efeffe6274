"""The callback in a `transformers.Trainer`, and called as a trainer calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import hf_model
from trainers import SGD, Sequences, trainer_settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerControl,
    TrainerState,
)

from backward_lens_tl.training import BackwardLensCallback, StepGradient, TrainingRecord, watch

FACTS_FOLDER = Path(__file__).parents[2] / "backward_lens_tl" / "facts_model"


def trainer(model: Any, folder: Path, *, bf16: bool = False, **options: Any) -> Trainer:
    pytest.importorskip("accelerate")
    settings = trainer_settings(folder, max_steps=4, bf16=bf16, **SGD)
    return Trainer(model, settings, train_dataset=Sequences(16), **options)


def test_trainer(tmp_path: Path) -> None:
    """A step of SGD changes a weight by its gradient, and by nothing else."""
    model, plain = hf_model("llama"), hf_model("llama")
    down = model.model.layers[1].mlp.down_proj
    steps: list[StepGradient] = []
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []

    def on_step(step: StepGradient) -> None:
        steps.append(step)
        after.append(down.weight.detach().T.clone())

    down.register_forward_pre_hook(lambda *_: before.append(down.weight.detach().T.clone()))
    with watch(model, "W_out", every=2) as watched:
        trainer(model, tmp_path, callbacks=[BackwardLensCallback(watched, on_step)]).train()
    trainer(plain, tmp_path).train()
    assert [step.step for step in steps] == [1, 3]
    starts = before[0], before[4]  # two microbatches in each step
    for step, start, end in zip(steps, starts, after, strict=True):
        assert len(step.positions) == 4 * 5
        expected = (start - end) / 1e-2
        # The difference of two float32 weights has few digits.
        assert torch.allclose(step["W_out", 1].dense(), expected, atol=1e-4)
        assert float(expected.abs().max()) > 1e-2
    assert not any(module._forward_hooks for module in model.modules())
    same = plain.state_dict()
    assert all(torch.equal(same[name], each) for name, each in model.state_dict().items())


def test_a_record_of_a_trainer(tmp_path: Path) -> None:
    """With dropout, Adam and clipping, the training is the same as without it."""
    weights: list[dict[str, torch.Tensor]] = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        model = hf_model("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        record = TrainingRecord(tmp_path / "record")
        options = {"reference": ([5, 6], 7), "changes": True} if is_watched else {}
        with watch(model, "W_out", every=2, **options) as watched:
            callbacks = [BackwardLensCallback(watched, record.add)] if is_watched else []
            own = trainer(model, tmp_path, callbacks=callbacks)
            own.args.optim, own.args.max_grad_norm = "adamw_torch", 0.1
            own.train()
        weights.append(model.state_dict())
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())
    rows = record.to_dataframe()
    assert rows.step.tolist() == [1, 1, 3, 3]
    assert rows.reference_cosine.between(-1, 1).all()
    assert (rows.change_norm > 0).all()
    assert rows.change_cosine.between(0.01, 0.99).all()


@pytest.mark.usefixtures("as_for_a_user")
def test_resumed_runs_keep_the_trainers_steps() -> None:
    model = hf_model("llama")
    steps: list[int] = []
    ids = torch.tensor([[3, 4, 5]])
    with watch(model, "W_out", every=2) as watched:
        callback = BackwardLensCallback(watched, lambda step: steps.append(step.step))
        state, control = TrainerState(global_step=5), TrainerControl()
        arguments: Any = None
        callback.on_train_begin(arguments, state, control)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            callback.on_step_end(arguments, state, control)
    assert steps == [7]


class Scaler:
    """Accelerate's, whose scale changes when the optimizer steps."""

    scale = 64.0

    def get_scale(self) -> float:
        return self.scale


class Optimizer:
    scaler = Scaler()


@pytest.mark.usefixtures("as_for_a_user")
def test_losses_scaled_by_the_trainer() -> None:
    model = hf_model("llama").half()
    found: list[StepGradient] = []
    arguments: Any = None
    state, control, optimizer = TrainerState(), TrainerControl(), Optimizer()
    with watch(model, "W_out", layers=0) as watched:
        callback = BackwardLensCallback(watched, found.append)
        callback.on_train_begin(arguments, state, control)
        x = torch.ones(1, 3, 52, dtype=torch.float16)
        (model.model.layers[0].mlp.down_proj(x).sum() * 64).backward()
        callback.on_pre_optimizer_step(arguments, state, control, optimizer=optimizer)
        optimizer.scaler.scale = 32.0
        callback.on_step_end(arguments, state, control)
    assert bool((found[0]["W_out", 0].vjps == 1).all())


def test_mixed_precision(tmp_path: Path) -> None:
    """Accelerate puts autocast into `forward`. The readout and the reference run without it."""
    model = AutoModelForCausalLM.from_pretrained(FACTS_FOLDER)
    plain = AutoModelForCausalLM.from_pretrained(FACTS_FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FACTS_FOLDER)
    record, steps = TrainingRecord(tmp_path / "record"), []
    dtypes: list[torch.dtype] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))

    def on_step(step: StepGradient) -> None:
        steps.append(step)
        record.add(step)

    reference = "The capital of France is", " Paris"
    options: Any = {"tokenizer": tokenizer, "reference": reference}
    with watch(model, "W_out", every=2, changes=True, **options) as watched:
        own = trainer(
            model, tmp_path, bf16=True, callbacks=[BackwardLensCallback(watched, on_step)]
        )
        own.train()
    assert set(dtypes) == {torch.bfloat16, torch.float32}
    rows = record.to_dataframe()
    assert rows.step.tolist() == [1] * 8 + [3] * 8
    assert rows.top_tokens.map(len).eq(3).all()
    assert rows.change_cosine.between(0.9, 1).all()  # SGD
    with watch(plain, "W_out", **options) as watched:
        ids = torch.tensor([[3, 4, 5]])
        plain(ids, labels=ids).loss.backward()
        expected = watched.step()
    assert expected is not None
    for key, gradient in expected.references.items():
        assert torch.equal(steps[0].references[key].vjps, gradient.vjps)


@pytest.mark.usefixtures("as_for_a_user")
def test_float16_without_a_scale(tmp_path: Path) -> None:
    """A trainer without a scaler does not scale the loss."""
    model = hf_model("llama").half()
    found: list[StepGradient] = []
    arguments: Any = None
    state, control = TrainerState(), TrainerControl()
    optimizer = Optimizer()
    optimizer.scaler = None  # type: ignore[assignment]
    with watch(model, "W_out", layers=0) as watched:
        callback = BackwardLensCallback(watched, found.append)
        callback.on_train_begin(arguments, state, control)
        x = torch.ones(1, 3, 52, dtype=torch.float16)
        model.model.layers[0].mlp.down_proj(x).sum().backward()
        callback.on_pre_optimizer_step(arguments, state, control, optimizer=optimizer)
        callback.on_step_end(arguments, state, control)
    assert bool((found[0]["W_out", 0].vjps == 1).all())
