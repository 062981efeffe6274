"""Edits as objects: arithmetic, and exact restoration of a model."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import edit, everything, low_rank, of_model, random, unchanged
from models import Case, build, nll
from torch import Tensor

from backward_lens_tl import capture_gradients, target_nll
from backward_lens_tl.analysis.neurons import neuron_tokens, spanning_tokens
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import (
    EditError,
    ModelStateError,
    ResultFileError,
)
from backward_lens_tl.files.storage import write
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")
ROUNDING = 1e-12  # of a few hundred float64 operations


def dense_delta(
    matrix: str = "W_out",
    layer: int = 1,
    shape: tuple[int, int] = (52, 24),
    seed: int = 7,
    dtype: torch.dtype = torch.float64,
) -> MatrixDelta:
    return MatrixDelta(matrix, layer, values=random(*shape, seed=seed, dtype=dtype))


# ------------------------------------------------------------------------------------ arithmetic


def test_factors_represent_their_product() -> None:
    delta = low_rank()
    assert delta.left is not None
    assert delta.right is not None
    by_hand = sum(torch.outer(delta.left[:, i], delta.right[i]) for i in range(3))
    assert torch.allclose(delta.dense(), by_hand, rtol=ROUNDING)
    assert delta.shape == (52, 24)
    assert delta.is_low_rank
    assert not dense_delta().is_low_rank


def test_scale_multiplies_every_change() -> None:
    for delta in (low_rank(bias=True), dense_delta()):
        scaled = delta.scale(-2.5)
        assert torch.allclose(scaled.dense(), -2.5 * delta.dense(), rtol=ROUNDING)
        assert (scaled.bias is None) == (delta.bias is None)
        if delta.bias is not None and scaled.bias is not None:
            assert torch.equal(scaled.bias, -2.5 * delta.bias)
    whole = edit(low_rank(), dense_delta("W_in", 2, (24, 52)))
    scaled_whole = whole.scale(3).scale(-0.5)
    for each, scaled in zip(whole, scaled_whole, strict=True):
        assert torch.allclose(scaled.dense(), -1.5 * each.dense(), rtol=ROUNDING)
    assert scaled_whole.about == {"method": "test", "scaled_by": -1.5}


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("factor", ["2", None, True, float("nan"), float("inf")])
def test_scale_accepts_numbers_only(factor: object) -> None:
    with pytest.raises(EditError, match=r"factor is .*; pass a finite number"):
        edit(low_rank()).scale(factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("second", ["factors", "dense"])
@pytest.mark.parametrize("first", ["factors", "dense"])
def test_a_sum_of_edits_sums_their_matrices(first: str, second: str) -> None:
    make: dict[str, Callable[[int], MatrixDelta]] = {
        "factors": lambda seed: low_rank(seed=seed, bias=True),
        "dense": lambda seed: dense_delta(seed=seed),
    }
    one, other = make[first](1), make[second](2)
    added = one + other
    assert torch.allclose(added.dense(), one.dense() + other.dense(), rtol=ROUNDING)
    assert added.is_low_rank == (first == second == "factors")
    biases = [each.bias for each in (one, other) if each.bias is not None]
    assert (added.bias is None) == (not biases)
    if biases and added.bias is not None:
        assert torch.equal(added.bias, sum(biases[1:], biases[0]))


def test_a_sum_of_edits_has_each_matrix_once_in_the_order_of_a_forward_pass() -> None:
    one = edit(low_rank("W_out", 2), low_rank("W_out", 1, seed=4))
    other = edit(low_rank("W_in", 2, (24, 52)), low_rank("W_out", 1, seed=5))
    both = one + other
    assert [(each.matrix, each.layer) for each in both] == [
        ("W_out", 1),
        ("W_in", 2),
        ("W_out", 2),
    ]
    expected = one["W_out", 1].dense() + other["W_out", 1].dense()
    assert torch.allclose(both["W_out", 1].dense(), expected, rtol=ROUNDING)
    assert torch.equal(both["W_in", 2].dense(), other["W_in", 2].dense())
    assert len(both) == 3
    assert both.about == {"sum_of": (one.about, other.about)}
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]
    with pytest.raises(EditError, match="not of one matrix"):
        low_rank("W_out", 1) + low_rank("W_out", 2)


@pytest.mark.parametrize("rank", [1, 3, 24, 40])
def test_norm_and_rank_equal_those_of_the_matrix(rank: int) -> None:
    delta = low_rank(rank=rank)
    dense = delta.dense()
    expected = torch.linalg.svdvals(dense)
    assert delta.norm == pytest.approx(float(dense.norm()), rel=ROUNDING)
    assert torch.allclose(delta.singular_values()[: len(expected)], expected[:rank], atol=1e-10)
    assert delta.rank() == int(torch.linalg.matrix_rank(dense)) == min(rank, 24)
    assert replace(delta, left=None, right=None, values=dense).rank() == min(rank, 24)


def test_rank_and_norm_of_several_matrices() -> None:
    whole = edit(low_rank(rank=3), low_rank("W_in", 1, (24, 52), rank=2), dense_delta("W_out", 2))
    assert whole.rank == 3 + 2 + 24
    stacked = torch.cat([each.dense().flatten() for each in whole])
    assert whole.norm == pytest.approx(float(stacked.norm()), rel=ROUNDING)
    # A norm in float32 would lose all digits after the seventh.
    assert edit(low_rank().scale(1 + 1e-9)).norm != edit(low_rank()).norm


def test_rank_does_not_count_the_same_outer_product_twice() -> None:
    delta = low_rank(dtype=torch.float32)
    assert (delta + delta.scale(2)).rank() == 3
    assert (delta + delta.scale(-1)).norm == pytest.approx(0, abs=1e-4)
    assert low_rank(rank=3).rank() == 3  # but it does count what differs


@pytest.mark.parametrize("delta", [low_rank(rank=5), dense_delta(), low_rank(rank=40)])
def test_the_singular_value_decomposition_matches_the_matrix(delta: MatrixDelta) -> None:
    u, s, vh = delta.svd()
    assert torch.allclose(u @ torch.diag(s) @ vh, delta.dense().double(), atol=1e-11)
    assert torch.allclose(u.T @ u, torch.eye(len(s), dtype=u.dtype), atol=1e-12)
    assert torch.allclose(vh @ vh.T, torch.eye(len(s), dtype=u.dtype), atol=1e-12)
    assert bool((s[:-1] >= s[1:]).all())
    for column in u.T:
        assert float(column[column.abs().argmax()]) > 0


def test_factors_of_a_dense_change_are_exact() -> None:
    # Small singular values count too: rank() would cut those below 52 eps, this does not.
    u, _ = torch.linalg.qr(random(52, 4))
    v, _ = torch.linalg.qr(random(24, 4, seed=1))
    values = (u * torch.tensor([1.0, 0.5, 2e-6, 1e-14]) @ v.T).float()
    delta = MatrixDelta("W_out", 0, values=values)
    left, right = delta.factors
    error = (left.double() @ right.double() - values.double()).norm() / values.double().norm()
    assert float(error) <= 3 * torch.finfo(torch.float32).eps
    assert left.shape[1] > delta.rank() == 2
    assert left.shape[1] < 24  # but values within rounding do not


def test_a_zero_change() -> None:
    no_products = MatrixDelta("W_out", 1, left=random(52, 0), right=random(0, 24))
    zeros = MatrixDelta("W_out", 1, values=torch.zeros(52, 24))
    for delta in (no_products, zeros):
        assert delta.rank() == 0
        assert delta.norm == 0
        assert not delta.dense().any()
        assert delta.svd()[1].numel() == 0
        assert delta.factors[0].shape == (52, 0)
    assert (no_products + low_rank()).rank() == 3
    nothing = WeightDelta((), {})
    assert (nothing.norm, nothing.rank, len(nothing)) == (0, 0, 0)


def test_half_precision_is_analysed_in_float32() -> None:
    delta = MatrixDelta("W_out", 1, values=random(52, 24, dtype=torch.bfloat16))
    left, right = delta.factors
    assert left.dtype == torch.float32
    assert torch.allclose(left @ right, delta.dense().float(), atol=1e-5)
    assert delta.dense().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "both factors, or values"),
        ({"left": random(52, 2)}, "both factors, or values"),
        ({"left": random(52, 2), "values": random(52, 24)}, "both factors, or values"),
        (
            {"left": random(52, 2), "right": random(2, 24), "values": random(52, 24)},
            "both factors, or values",
        ),
        ({"left": random(52, 2), "right": random(3, 24)}, "2 columns and 3 rows"),
        ({"values": random(52, 24), "bias": random(23)}, r"bias of shape \(23,\).*\(24,\)"),
        ({"values": random(52)}, r"real matrices; it is \(52,\)"),
        ({"values": torch.ones(52, 24, dtype=torch.int64)}, "torch.int64"),
        ({"values": random(52, 24), "layer": -1}, "counted from 0"),
    ],
)
@pytest.mark.usefixtures("as_for_a_user")
def test_invalid_changes(parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(EditError, match=message):
        MatrixDelta(**({"matrix": "W_out", "layer": 1} | parts))


@pytest.mark.usefixtures("as_for_a_user")
def test_a_matrix_is_found_by_name_and_layer() -> None:
    whole = edit(low_rank(), low_rank("W_in", 1, (24, 52)))
    assert whole["W_in", 1] is whole.matrices[1]
    for key in (("W_out", 2), "W_out", 3):
        with pytest.raises(EditError, match=r"it changes \('W_out', 1\), \('W_in', 1\)"):
            whole[key]  # type: ignore[index]
    with pytest.raises(EditError, match="twice in one edit"):
        edit(low_rank(), dense_delta())


def test_reprs_name_the_matrices() -> None:
    whole = edit(low_rank(bias=True), dense_delta("W_out", 2))
    assert repr(whole) == "WeightDelta(test, W_out of layer 1, W_out of layer 2)"
    assert repr(whole["W_out", 1]) == (
        "MatrixDelta(W_out of layer 1, [52, 24], rank <= 3, with bias)"
    )
    assert repr(whole["W_out", 2]) == "MatrixDelta(W_out of layer 2, [52, 24], dense)"
    assert repr(WeightDelta((), {})) == "WeightDelta(edit, nothing)"


# ------------------------------------------------------------------------------------ on a model


@pytest.mark.versions
def test_applied_adds_the_same_as_a_slow_sum(case: Case) -> None:
    """Every MLP matrix, against the parameters found before TransformerLens wrapped the model."""
    for (matrix, layer), weight in case.own.items():
        delta = of_model(case.model, matrix, layer)
        before = weight.in_out(weight.tensor.detach()).clone()
        assert delta.left is not None
        assert delta.right is not None
        expected = before + sum(torch.outer(delta.left[:, i], delta.right[i]) for i in range(2))
        with edit(delta).applied(case.model) as yielded:
            assert yielded is case.model
            found = weight.in_out(weight.tensor.detach())
            assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(weight.in_out(weight.tensor.detach()), before)


def test_biases_are_added_to_the_output(gpt2: Case) -> None:
    tokens = gpt2.tokens(6)
    delta = MatrixDelta("W_out", 1, values=torch.zeros(52, 24).double(), bias=random(24))
    name = "blocks.1.hook_mlp_out"
    _, before = gpt2.model.run_with_cache(tokens)
    with edit(delta).applied(gpt2.model):
        _, after = gpt2.model.run_with_cache(tokens)
    assert delta.bias is not None
    assert torch.allclose(after[name] - before[name], delta.bias.expand(1, 6, 24), atol=1e-12)


@pytest.mark.parametrize("matrix", ATTENTION)
def test_heads_are_concatenated(case: Case, matrix: str) -> None:
    """Each head's output changes by its block of the dense change, head by head."""
    tokens = case.tokens(5)
    delta = replace(of_model(case.model, matrix, 1), bias=None)
    capture = capture_gradients(case.model, tokens, target_nll(3), matrices=matrix, layers=1)
    inputs = capture[matrix, 1].inputs[0]
    names = {"W_Q": "attn.hook_q", "W_K": "attn.hook_k", "W_V": "attn.hook_v"}
    [site] = find_editable(host_of(case.model), matrix, 1)
    seen: list[Tensor] = []

    def keep(module: object, args: object, output: Tensor) -> None:
        seen.append(output)

    if matrix == "W_O":
        # The attention's output, before the norm that some models add there.
        handle = site.output.module.register_forward_hook(keep)
    else:
        point = case.model.hook_dict[f"blocks.1.{names[matrix]}"]
        handle = point.register_forward_hook(keep)
    with torch.no_grad():
        case.model(tokens)
        with edit(delta).applied(case.model):
            case.model(tokens)
    handle.remove()
    change = (seen[1] - seen[0])[0].reshape(5, -1)
    dense = delta.dense()
    if matrix == "W_O":
        d_head = inputs.shape[-1]
        expected = sum(
            inputs[:, head] @ dense[head * d_head : (head + 1) * d_head]
            for head in range(inputs.shape[1])
        )
    else:
        expected = inputs @ dense
        heads = site.output_heads or 1
        d_head = dense.shape[1] // heads
        by_hand = [inputs @ dense[:, h * d_head : (h + 1) * d_head] for h in range(heads)]
        assert torch.allclose(torch.cat(by_hand, dim=1), expected)
    # NeoX rotates queries in float32, after this point; its norms do not round here.
    assert torch.allclose(change, expected, atol=1e-6 if case.logits_in_float32 else 1e-10)
    stored = site.as_stored(dense)
    assert stored.shape == site.weight.parameter.shape
    assert torch.equal(site.joined(site.weight.in_out(stored)), dense)


@pytest.mark.versions
def test_applied_restores_every_bit(case: Case) -> None:
    delta = everything(case.model)
    tokens = case.tokens(6)
    with torch.no_grad():
        before = case.model(tokens)
        with unchanged(case.model):
            with delta.applied(case.model):
                inside = case.model(tokens)
                with delta.scale(0.5).applied(case.model), delta.applied(case.model):
                    pass  # the same edit inside itself
                assert torch.equal(case.model(tokens), inside)
            with pytest.raises(ZeroDivisionError), delta.applied(case.model):
                raise ZeroDivisionError
        assert torch.equal(case.model(tokens), before)
    assert not torch.allclose(inside, before)


def test_one_edit_inside_itself_adds_twice(gpt2: Case) -> None:
    delta = edit(low_rank())
    weight = gpt2.own["W_out", 1].tensor
    orientation = gpt2.own["W_out", 1]
    before = orientation.in_out(weight.detach()).clone()
    with delta.applied(gpt2.model), delta.applied(gpt2.model):
        change = orientation.in_out(weight.detach()) - before
        assert torch.allclose(change, 2 * delta["W_out", 1].dense(), atol=1e-12)
    assert torch.equal(orientation.in_out(weight.detach()), before)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_every_bit_is_restored_in_bfloat16(name: str) -> None:
    """Adding and subtracting would lose bits in bfloat16, as the negative control shows."""
    case = build(name, torch.bfloat16)
    delta = everything(case.model)
    with unchanged(case.model):
        with delta.applied(case.model):
            pass
        delta.apply_(case.model)
        delta.revert_(case.model)
    weight = case.own["W_out", 1].tensor
    before, added = weight.detach().clone(), random(*weight.shape).to(torch.bfloat16)
    assert not torch.equal(before + added - added, before)


def test_a_wide_change_of_a_narrow_weight_is_rounded_once() -> None:
    case = build("bridge-gpt2", torch.bfloat16)
    weight = case.own["W_out", 1]
    delta = edit(low_rank(dtype=torch.float32).scale(0.01))
    expected = (weight.in_out(weight.tensor.detach()).float() + delta["W_out", 1].dense()).to(
        torch.bfloat16
    )
    with delta.applied(case.model):
        assert torch.equal(weight.in_out(weight.tensor.detach()), expected)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_frozen_models_and_modes_without_gradients(
    one_gpt2: Case, mode: Callable[[], torch.no_grad]
) -> None:
    delta, tokens = everything(one_gpt2.model), one_gpt2.tokens(4)
    parameters = list(host_of(one_gpt2.model).parameters().values())
    trained = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with unchanged(one_gpt2.model):
            with mode():
                with delta.applied(one_gpt2.model):
                    inside = one_gpt2.model(tokens).clone()
                delta.apply_(one_gpt2.model)
                assert torch.equal(one_gpt2.model(tokens), inside)
            delta.revert_(one_gpt2.model)
            with delta.applied(one_gpt2.model):
                assert torch.equal(one_gpt2.model(tokens), inside)
    finally:
        for parameter, flag in zip(parameters, trained, strict=True):
            parameter.requires_grad_(flag)


def test_an_earlier_graph_can_still_be_used(gpt2: Case) -> None:
    tokens, weight = gpt2.tokens(5), gpt2.own["W_in", 0].tensor
    [expected] = torch.autograd.grad(nll(3)(gpt2.model(tokens), tokens).sum(), [weight])
    loss = nll(3)(gpt2.model(tokens), tokens).sum()
    with everything(gpt2.model).applied(gpt2.model):
        pass
    [found] = torch.autograd.grad(loss, [weight])
    assert torch.equal(found, expected)


def test_only_the_named_weights_change(gpt2: Case) -> None:
    host = host_of(gpt2.model)
    before = {name: each.detach().clone() for name, each in host.parameters().items()}
    with edit(of_model(gpt2.model, "W_out", 1)).applied(gpt2.model):
        now = host.parameters()
        changed = [name for name in now if not torch.equal(now[name].detach(), before[name])]
    assert len(changed) == 2  # the weight and its bias
    assert all("1" in name.split(".") for name in changed)


def test_an_edit_that_fails_half_way_leaves_the_model_unchanged(gpt2: Case) -> None:
    """Computing the second matrix fails for lack of memory after the first is changed."""

    class Failing(MatrixDelta):
        def dense(self) -> Tensor:
            raise MemoryError

    good, shape = of_model(gpt2.model, "W_in", 1), (52, 24)
    bad = Failing("W_out", 1, left=random(shape[0], 1), right=random(1, shape[1]))
    delta = edit(good, bad)
    with unchanged(gpt2.model):
        with pytest.raises(MemoryError), delta.applied(gpt2.model):
            pass
        with pytest.raises(MemoryError):
            delta.apply_(gpt2.model)
        with pytest.raises(ModelStateError, match="not applied"):
            delta.revert_(gpt2.model)


# --------------------------------------------------------------------------- apply_ and revert_


def test_apply_and_revert(gpt2: Case) -> None:
    delta, tokens = everything(gpt2.model), gpt2.tokens(4)
    with torch.no_grad(), unchanged(gpt2.model):
        with delta.applied(gpt2.model):
            expected = gpt2.model(tokens)
        delta.apply_(gpt2.model)
        try:
            assert torch.equal(gpt2.model(tokens), expected)
            with pytest.raises(ModelStateError, match="already applied to the model"):
                delta.apply_(gpt2.model)
            with delta.applied(gpt2.model):  # an inner context restores the edited model
                pass
            assert torch.equal(gpt2.model(tokens), expected)
        finally:
            delta.revert_(gpt2.model)
        with pytest.raises(ModelStateError, match="nothing to undo"):
            delta.revert_(gpt2.model)


def test_edits_are_reverted_in_the_opposite_order(gpt2: Case) -> None:
    one, other = edit(of_model(gpt2.model, "W_out", 1)), edit(low_rank(seed=9))
    elsewhere = edit(of_model(gpt2.model, "W_out", 2))
    with unchanged(gpt2.model):
        for delta in (one, other, elsewhere):
            delta.apply_(gpt2.model)
        weight = gpt2.own["W_out", 1].tensor
        edited = weight.detach().clone()
        with pytest.raises(ModelStateError, match="in the opposite order"):
            one.revert_(gpt2.model)
        assert torch.equal(weight.detach(), edited)  # refused, nothing was restored
        other.revert_(gpt2.model)  # an edit on another model does not matter
        one.revert_(gpt2.model)
        elsewhere.revert_(gpt2.model)


def test_a_later_change_of_the_weights_is_not_overwritten(gpt2: Case) -> None:
    delta, weight = edit(low_rank()), gpt2.own["W_out", 1].tensor
    with unchanged(gpt2.model):
        delta.apply_(gpt2.model)
        place = weight.detach().flatten()[0]
        value = float(place)
        weight.data.view(-1)[0] = value + 1
        with pytest.raises(ModelStateError, match="have changed again since"):
            delta.revert_(gpt2.model)
        weight.data.view(-1)[0] = value
        delta.revert_(gpt2.model)


def test_one_edit_on_two_models() -> None:
    one, other = build("bridge-gpt2"), build("bridge-gpt2")
    delta = edit(low_rank())
    with unchanged(one.model), unchanged(other.model):
        delta.apply_(one.model)
        delta.apply_(other.model)
        delta.revert_(one.model)
        delta.revert_(other.model)


def test_a_copy_is_another_edit(gpt2: Case) -> None:
    delta = edit(low_rank())
    with unchanged(gpt2.model):
        delta.apply_(gpt2.model)
        for duplicate in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
            assert torch.equal(duplicate["W_out", 1].dense(), delta["W_out", 1].dense())
            with pytest.raises(ModelStateError, match="nothing to undo"):
                duplicate.revert_(gpt2.model)
        delta.revert_(gpt2.model)


def test_an_edit_keeps_no_model_alive() -> None:
    case, delta = build("hooked-gpt2") if _has("hooked") else build("bridge-gpt2"), edit(low_rank())
    delta.apply_(case.model)
    assert len(delta._kept_by_model) == 1
    del case
    gc.collect()
    assert len(delta._kept_by_model) == 0


def _has(kind: str) -> bool:
    from models import HAS_BRIDGE, HAS_HOOKED

    return {"bridge": HAS_BRIDGE, "hooked": HAS_HOOKED}[kind]


# ------------------------------------------------------------------------------- wrong models


def test_an_edit_for_another_model_is_refused(gpt2: Case) -> None:
    wrong = {
        "layer 9 does not exist": low_rank(layer=9),
        "layer 1 of this model has no W_gate": low_rank("W_gate"),
        r"shape \(52, 25\); in .* shape \(52, 24\): the edit is of another model": low_rank(
            shape=(52, 25)
        ),
    }
    for message, delta in wrong.items():
        with unchanged(gpt2.model), pytest.raises(EditError, match=message):
            edit(of_model(gpt2.model, "W_in", 0), delta).apply_(gpt2.model)


def test_a_bias_where_there_is_none() -> None:
    case = build("hooked-llama" if _has("hooked") else "bridge-gemma2")
    shape = (24, 52)
    with pytest.raises(EditError, match="changes the bias of W_in in layer 1"):
        edit(low_rank("W_in", 1, shape, bias=True)).apply_(case.model)


# --------------------------------------------------------------------------------------- files


def test_an_edit_survives_saving_and_loading(tmp_path: Path, gpt2: Case) -> None:
    about = {"method": "test", "lr": 0.5, "layers": None, "nested": {"seed": 3}}
    dense = dense_delta("W_out", 2, dtype=torch.float32)
    saved = WeightDelta((low_rank(bias=True), dense), about)
    path = tmp_path / "edit.safetensors"
    saved.save(path)
    loaded = WeightDelta.load(path)
    assert loaded.about == about
    assert [(each.matrix, each.layer) for each in loaded] == [("W_out", 1), ("W_out", 2)]
    for one, other in zip(saved, loaded, strict=True):
        for part in ("left", "right", "values", "bias"):
            before, after = getattr(one, part), getattr(other, part)
            assert (before is None) == (after is None)
            if before is not None:
                assert before.dtype == after.dtype
                assert torch.equal(before, after)
    tokens = gpt2.tokens(4)
    with torch.no_grad(), unchanged(gpt2.model):
        with saved.applied(gpt2.model):
            expected = gpt2.model(tokens)
        loaded.apply_(gpt2.model)
        assert torch.equal(gpt2.model(tokens), expected)
        loaded.revert_(gpt2.model)


def test_files_without_an_edit(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    edit(low_rank()).save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "short").write_bytes(data[: len(data) // 2])
    write(tmp_path / "other", low_rank(), {})
    for name, message in (
        ("flipped", "damaged"),
        ("short", "damaged"),
        ("missing", "cannot be read"),
        ("other", "holds a MatrixDelta, not a WeightDelta"),
    ):
        with pytest.raises(ResultFileError, match=message):
            WeightDelta.load(tmp_path / name)
    with pytest.raises(ResultFileError, match="does not exist"):
        edit(low_rank()).save(tmp_path / "nowhere" / "edit.safetensors")


# --------------------------------------------------------------------------- through the lens


@pytest.mark.parametrize("matrix", ["W_in", "W_out", "W_Q", "W_O"])
def test_a_step_of_gradient_descent_decodes_like_its_gradient(
    facts_model: Any, matrix: str
) -> None:
    prompt = "Lionel Messi plays for"
    capture = capture_gradients(
        facts_model, prompt, target_nll(" Paris"), matrices=matrix, layers=4
    )
    gradient, lr = capture[matrix, 4], 0.5
    factors = gradient.factored()
    delta = MatrixDelta(matrix, 4, left=factors.A, right=-lr * factors.B)
    seen = delta.scale(1 / lr).gradient()
    assert torch.allclose(seen.dense(), factors.A @ factors.B, atol=1e-6)
    assert torch.allclose(seen.neuron_norms(), gradient.neuron_norms(), rtol=1e-5)
    assert torch.allclose(seen.singular_values(), gradient.singular_values(), rtol=1e-5, atol=1e-9)
    assert seen.rank() == gradient.rank() == delta.rank()
    assert torch.allclose(seen.spanning_set, gradient.spanning_set, atol=1e-6)
    as_edit = replace(capture, gradients={(matrix, 4): seen})
    for read in (neuron_tokens, spanning_tokens):
        found, expected = (read(facts_model, each, matrix, 4) for each in (as_edit, capture))
        for column in expected.columns.difference(["norm"]):
            assert found[column].tolist() == expected[column].tolist()
        assert found["norm"].tolist() == pytest.approx(expected["norm"].tolist(), rel=1e-4)
