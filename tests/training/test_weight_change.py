"""The optimizer's change against the weights, dense singular vectors and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_table import matrices_of
from architectures import N_LAYERS, NotAvailable, build_model, hf_model
from dense_gradients import joined
from models import relative_error
from torch import Tensor, nn

from backward_lens_tl.models.loading import load_facts_model
from backward_lens_tl.training import (
    StepGradient,
    TrainingRecord,
    WatchedGradient,
    WeightChange,
    watch,
)
from backward_lens_tl.training.change_numbers import compare_change

ROUNDING = 1e-10
"""A step changes weights of about 0.1 by 1e-3, with the rounding of float64."""


def optimized(
    model: Any,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 1,
    matrices: Any = "all",
    before: Callable[[], object] = int,
    **options: Any,
) -> StepGradient:
    """The last of some steps, each of which is watched."""
    with watch(model, matrices, every=1, changes=True, **options) as watched:
        for seed in range(steps):
            if seed == steps - 1:
                before()
            ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(seed))
            loss = (
                model(input_ids=ids, labels=ids).loss
                if is_hf(model)
                else model(ids, return_type="loss")
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step = watched.step()
    assert step is not None
    return step


def is_hf(model: Any) -> bool:
    return not hasattr(model, "cfg")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_sgd_writes_the_gradient(family: str, tmp_path: Path) -> None:
    model = hf_model(family, torch.float64)
    step = optimized(model, sgd(model))
    assert list(step.changes) == list(step.gradients)
    for gradient in step:
        expected = -0.1 * joined(gradient.dense(), gradient.matrix)
        found = step.changes[gradient.matrix, gradient.layer].dense()
        assert relative_error(found, expected) < ROUNDING, gradient
    rows = TrainingRecord(tmp_path).add(step)
    assert (rows.change_cosine - 1).abs().max() < ROUNDING
    assert rows.change_outside.max() < ROUNDING
    assert (rows.change_norm - 0.1 * rows.norm).abs().max() < ROUNDING


@pytest.mark.parametrize("kind", ["momentum", "adam", "decay"])
def test_other_optimizers_write_something_else(kind: str, tmp_path: Path) -> None:
    model = hf_model("llama", torch.float64)
    optimizer = {
        "momentum": lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9),
        "adam": lambda own: torch.optim.Adam(own, lr=1e-3),
        "decay": lambda own: torch.optim.SGD(own, lr=0.1, weight_decay=0.1),
    }[kind](model.parameters())
    rows = TrainingRecord(tmp_path).add(optimized(model, optimizer, steps=2, matrices="mlp"))
    assert rows.change_cosine.between(-1, 0.999).all()
    assert rows.change_outside.min() > 1e-3


def test_numbers_against_dense_matrices(tmp_path: Path) -> None:
    """One step of Adam, whose change is compared with differences of the weights themselves."""
    model = hf_model("llama", torch.float64)
    names = {"W_in": "up_proj", "W_gate": "gate_proj", "W_out": "down_proj"}

    def weights() -> dict[tuple[str, int], Tensor]:
        return {
            (matrix, layer): getattr(block.mlp, name).weight.detach().T.clone()
            for layer, block in enumerate(model.model.layers)
            for matrix, name in names.items()
        }

    before = weights()
    step = optimized(model, torch.optim.Adam(model.parameters(), lr=1e-2), matrices="mlp")
    after = weights()
    rows = TrainingRecord(tmp_path).add(step)
    for row in rows.itertuples():
        key = row.matrix, row.layer
        change, gradient = after[key] - before[key], step[key].dense()
        assert torch.equal(step.changes[key].dense(), change)
        u, values, v = torch.linalg.svd(gradient, full_matrices=False)
        rank = int((values > 1e-10 * values[0]).sum())
        assert rank == 10 < min(gradient.shape)  # so that something can be outside
        u, v = u[:, :rank], v[:rank]
        inside = u @ u.T @ change @ v.T @ v
        outside = (change - inside).norm() ** 2 / change.norm() ** 2
        cosine = -(change * gradient).sum() / change.norm() / gradient.norm()
        assert row.change_norm == pytest.approx(float(change.norm()), rel=1e-12)
        assert row.change_cosine == pytest.approx(float(cosine), rel=1e-9)
        assert row.change_outside == pytest.approx(float(outside), rel=1e-9)
        assert row.change_outside > 0.1
        left, _, right = torch.linalg.svd(change)
        first = step.changes[key].first_direction()
        for found, expected in zip(first, (left[:, 0], right[0]), strict=True):
            assert abs(float(found @ expected)) == pytest.approx(1, rel=1e-9)


def of_many_positions(values: Tensor, n: int = 20_000) -> tuple[WatchedGradient, Tensor, Tensor]:
    """A gradient in float32 with given singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(0)

    def orthonormal(rows: int) -> Tensor:
        random = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(random).Q

    q, u, v = map(orthonormal, (n, 30, 25))
    gradient = WatchedGradient(
        matrix="W_out",
        layer=0,
        inputs=(q * values @ u.T)[None].float(),
        vjps=(q @ v.T)[None].float(),
        mask=torch.ones(1, n, dtype=torch.bool),
    )
    return gradient, u, v


def test_small_directions_of_many_positions_are_the_gradients() -> None:
    gradient, _, _ = of_many_positions(torch.tensor([1.0, *[1e-3] * 24], dtype=torch.float64))
    change = WeightChange("W_out", 0, -0.1 * gradient.dense(0).double())
    main = gradient.principal_directions(20_000)
    # Of the squared norm, 2e-5 is in the 24 directions. The dense gradient is in float32.
    assert compare_change(change, gradient, main).outside < 1e-9


def test_rounding_of_many_positions_is_not_the_gradients() -> None:
    gradient, u, v = of_many_positions(torch.ones(25, dtype=torch.float64) * (torch.arange(25) < 5))
    dense = torch.randn(30, 25, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    main = gradient.principal_directions(20_000)
    assert len(main.values) == 25  # inputs of rank 5 have every direction after rounding
    inside = (u[:, :5].T @ dense @ v[:, :5]).norm() / dense.norm()
    found = compare_change(WeightChange("W_out", 0, dense), gradient, main).outside
    assert found == pytest.approx(float(1 - inside**2), abs=1e-6)  # float32


def test_tokens_of_sgd_are_those_of_the_gradient(tmp_path: Path) -> None:
    """The first direction has the gradient's sign, whichever side is the residual stream's."""
    model: Any = load_facts_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = optimized(model, optimizer, matrices=["W_in", "W_out"], layers=[2, 6])
    rows = TrainingRecord(tmp_path).add(step)
    assert rows.change_tokens.tolist() == [each[0] for each in rows.top_tokens]


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_of_transformer_lens(family: str, kind: str) -> None:
    try:
        model = build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    step = optimized(model, sgd(model))
    assert len(step.changes) == len(matrices_of(family)) * N_LAYERS
    for gradient in step:
        expected = -0.1 * joined(gradient.dense(), gradient.matrix)
        found = step.changes[gradient.matrix, gradient.layer].dense()
        assert relative_error(found, expected) < ROUNDING, gradient


def adapted(family: str, *targets: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(targets), task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(hf_model(family, torch.float64), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("trains_base", [False, True])
def test_adapters_of_peft(trains_base: bool) -> None:
    """The change of the effective weight, by PEFT's own product of the factors."""
    model = adapted("gpt2", "c_attn", fan_in_fan_out=True, use_rslora=True)
    layers = model.base_model.model.transformer.h
    for layer in layers:
        layer.attn.c_attn.base_layer.weight.requires_grad_(trains_base)

    def effective(layer: int) -> Tensor:
        module = layers[layer].attn.c_attn
        return module.base_layer.weight.detach() + module.get_delta_weight("default").detach()

    before = [effective(layer) for layer in range(N_LAYERS)]
    own = [each for each in model.parameters() if each.requires_grad]
    step = optimized(model, torch.optim.Adam(own, lr=1e-2), matrices=["W_Q", "W_K", "W_V"])
    for layer in range(N_LAYERS):
        expected = (effective(layer) - before[layer]).chunk(3, dim=1)
        for matrix, part in zip(("W_Q", "W_K", "W_V"), expected, strict=True):
            change = step.changes[matrix, layer]
            assert relative_error(change.dense(), part) < ROUNDING
            assert (change.right is None) == trains_base
            u, v = change.first_direction()
            left, _, right = torch.linalg.svd(part)
            assert abs(float(u @ left[:, 0])) == pytest.approx(1, rel=1e-9)
            assert abs(float(v @ right[0])) == pytest.approx(1, rel=1e-9)


def test_frozen_matrices_do_not_change(tmp_path: Path) -> None:
    model = adapted("llama", "v_proj")
    own = [each for each in model.parameters() if each.requires_grad]
    step = optimized(model, torch.optim.Adam(own, lr=1e-2), matrices=["W_V", "W_out"])
    rows = TrainingRecord(tmp_path).add(step).set_index(["matrix", "layer"])
    assert rows.change_norm["W_out", 1] == 0
    assert rows.change_norm["W_V", 1] > 0
    assert rows.change_cosine.isna()["W_out", 1]
    assert rows.change_tokens["W_out", 1] == []


def test_changes_that_are_not_known(tmp_path: Path) -> None:
    model = adapted("llama", "up_proj")
    modules = [layer.mlp for layer in model.base_model.model.model.layers]

    class Merging(torch.optim.SGD):
        def step(self, *args: Any) -> None:  # type: ignore[override]
            modules[0].up_proj.merge()
            with torch.no_grad():
                modules[1].down_proj.weight.mul_(2)

    own = [each for each in model.parameters() if each.requires_grad]
    step = optimized(model, Merging(own, lr=1e-2), matrices=["W_in", "W_out"])
    assert set(step.changes) == {("W_out", 0), ("W_in", 1)}
    rows = TrainingRecord(tmp_path).add(step).set_index(["matrix", "layer"])
    assert rows.change_norm.isna()["W_in", 0]


def test_half_precision() -> None:
    """Differences of bfloat16 weights are exact in float32, and often zero."""
    model = hf_model("llama").bfloat16()
    down = model.model.layers[1].mlp.down_proj
    kept: list[Tensor] = []
    step = optimized(
        model,
        sgd(model),
        matrices="W_out",
        before=lambda: kept.append(down.weight.detach().T.double()),
    )
    expected = down.weight.detach().T.double() - kept[0]
    assert torch.equal(step.changes["W_out", 1].dense(), expected)
    assert 0 < int((expected == 0).sum()) < expected.numel()


def test_the_state_before_the_step_is_that_of_its_first_pass() -> None:
    """Weights that are loaded after the watch began are not part of the change."""
    model = hf_model("llama", torch.float64)

    def load() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)

    step = optimized(model, sgd(model), matrices="W_out", before=load)
    expected = -0.1 * step["W_out", 1].dense()
    assert relative_error(step.changes["W_out", 1].dense(), expected) < ROUNDING


def test_nothing_changed() -> None:
    change = WeightChange("W_out", 0, torch.zeros(3, 2))
    assert [each.shape for each in change.first_direction()] == [(3,), (2,)]
    assert repr(change) == "WeightChange(W_out of layer 0, [3, 2])"
    factors = WeightChange("W_in", 0, torch.zeros(3, 2), torch.zeros(2, 5))
    assert not any(each.any() for each in factors.first_direction())
    assert repr(factors) == "WeightChange(W_in of layer 0, [3, 5], rank <= 2)"


def test_adapters_added_after_the_watch_began(tmp_path: Path) -> None:
    """As TRL's trainers add them. The watched modules are then inside those of the adapter."""
    peft = pytest.importorskip("peft")
    model = hf_model("llama", torch.float64)
    config = peft.LoraConfig(r=3, target_modules=["up_proj"], task_type="CAUSAL_LM")
    ids = torch.arange(3, 15).reshape(2, 6)
    with watch(model, ["W_in", "W_out"], changes=True) as watched:
        outer = peft.get_peft_model(model, config)
        own = [each for each in outer.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=1e-2)
        outer(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        step = watched.step()
    assert step is not None
    layers = outer.base_model.model.model.layers
    assert all(float(layer.mlp.up_proj.get_delta_weight("default").norm()) > 0 for layer in layers)
    assert set(step.changes) == {("W_out", layer) for layer in range(N_LAYERS)}
    rows = TrainingRecord(tmp_path).add(step).set_index(["matrix", "layer"])
    assert rows.change_norm.isna()["W_in", 1]


@pytest.mark.parametrize("when", ["before the pass", "after the pass"])
def test_replaced_parameters(when: str) -> None:
    model = hf_model("llama", torch.float64)

    def replace() -> None:
        down = model.model.layers[0].mlp.down_proj
        down.weight = nn.Parameter(down.weight.detach() + 1)

    ids = torch.arange(3, 15).reshape(2, 6)
    with watch(model, "W_out", changes=True) as watched:
        if when == "before the pass":
            replace()
        model(ids, labels=ids).loss.backward()
        if when == "after the pass":
            replace()
        step = watched.step()
    assert step is not None
    assert set(step.changes) == {("W_out", 1)}


def test_plain_sgd_on_an_adapter_is_not_the_gradient(tmp_path: Path) -> None:
    """`dW = -lr s^2 (G B^T B + A A^T G)` to first order: both thin matrices move along `G`."""
    model = adapted("llama", "up_proj")
    modules = [layer.mlp.up_proj for layer in model.base_model.model.model.layers]
    factors: list[tuple[Tensor, Tensor]] = []
    lr = 1e-6

    def keep() -> None:
        for each in modules:
            a, b = (part["default"].weight.detach().T for part in (each.lora_A, each.lora_B))
            factors.append((a.clone(), b.clone()))

    own = [each for each in model.parameters() if each.requires_grad]
    step = optimized(model, torch.optim.SGD(own, lr=lr), matrices="W_in", before=keep)
    rows = TrainingRecord(tmp_path).add(step)
    for layer, (a, b) in enumerate(factors):
        g, scale = step["W_in", layer].dense(), modules[layer].scaling["default"]
        expected = -lr * scale**2 * (g @ b.T @ b + a @ a.T @ g)
        assert relative_error(step.changes["W_in", layer].dense(), expected) < 1e-5
    assert rows.change_cosine.between(0.01, 0.9).all()
    assert rows.change_outside.min() > 0.01
