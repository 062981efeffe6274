"""Steps of gradient descent against torch's, on the raw model; weights are restored bit by bit."""

from __future__ import annotations

import functools
import itertools
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from architectures import NotAvailable, build_model
from attention_cases import attention_weights
from model_state import assert_same, make_busy, snapshot
from models import Case, build, nll
from sgd_steps import output_and_loss, step_of_sgd
from torch import Tensor, nn

import backward_lens_tl as blt
from backward_lens_tl.analysis import steps as steps_module
from backward_lens_tl.analysis.steps import step_changes
from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MATRIX_NAMES, WRITING_MATRICES, MatrixSite, Stored
from backward_lens_tl.models.weight_patching import stepped

pytestmark = pytest.mark.usefixtures("as_for_a_user")

TARGET = 5
NAMES = ("bridge-gpt2", "bridge-gemma2", "bridge-neox", "hooked-llama")
# A change of 1e-2 of numbers of size 1 to 10 in float64, 1000 times the observed error.
EXACT = 1e-10


@functools.cache
def model_case(name: str) -> Case:
    """A random model in float64; every test restores what it changes."""
    case = build(name)
    tokens = case.tokens(5)
    # A bridge registers its own hooks at the first forward pass of each kind.
    case.model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    return case


@pytest.fixture(scope="module", params=NAMES)
def each(request: pytest.FixtureRequest) -> Case:
    return model_case(request.param)


def site_of(case: Case, matrix: str, layer: int) -> MatrixSite:
    [site] = find_editable(host_of(case.model), matrix, layer)
    return site


def loss_of(case: Case, tokens: Tensor) -> float:
    with torch.no_grad():
        logits = case.model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    return float(nll(TARGET)(logits, tokens))


# ----------------------------------------------------------------------- stored layouts, both ways

LAYOUTS = [
    (Stored(torch.zeros(6, 8), "in_out"), (6, 8)),
    (Stored(torch.zeros(8, 6), "out_in"), (6, 8)),
    (Stored(torch.zeros(2, 6, 4), "in_out"), (2, 6, 4)),
    (Stored(torch.zeros(6, 8), "in_out", 2, "out"), (2, 6, 4)),
    (Stored(torch.zeros(8, 6), "out_in", 2, "out"), (2, 6, 4)),
    (Stored(torch.zeros(6, 8), "in_out", 2, "in"), (2, 3, 8)),
    (Stored(torch.zeros(8, 6), "out_in", 2, "in"), (2, 3, 8)),
]


@pytest.mark.parametrize(("stored", "shape"), LAYOUTS)
def test_layouts_round_trip(stored: Stored, shape: tuple[int, ...]) -> None:
    matrix = torch.arange(math.prod(shape)).double().reshape(shape)
    laid_out = stored.as_stored(matrix)
    assert laid_out.shape == stored.parameter.shape
    assert torch.equal(stored.in_out(laid_out), matrix)
    # Entry by entry, written out explicitly.
    for index in itertools.product(*map(range, shape)):
        *head, i, j = index
        if stored.n_heads is not None:
            i += head[0] * shape[1] if stored.divided == "in" else 0
            j += head[0] * shape[2] if stored.divided == "out" else 0
            head = []
        place = (*head, j, i) if stored.layout == "out_in" else (*head, i, j)
        assert laid_out[place] == matrix[index]


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama", "hooked-gpt2", "hooked-llama"])
def test_stored_layouts_of_attention_are_the_models(name: str) -> None:
    case = model_case(name)
    for (matrix, layer), weight in attention_weights(case.model).items():
        site = site_of(case, matrix, layer)
        assert site.weight.parameter is weight.parameter
        change = torch.randn(site.weight.in_out(weight.parameter).shape).double()
        assert torch.equal(weight.by_head(site.weight.as_stored(change)), change)


# ----------------------------------------------------------------------------------------- stepped


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def change_like(site: MatrixSite, seed: int = 0) -> Tensor:
    shape = site.weight.in_out(site.weight.parameter).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("matrix", MATRIX_NAMES)
@pytest.mark.parametrize("name", ["bridge-llama", "hooked-llama"])
def test_a_weight_is_changed_and_restored(name: str, matrix: str) -> None:
    case = model_case(name)
    site, tokens = site_of(case, matrix, 1), case.tokens(5)
    weight, before = site.weight.parameter, snapshot(case.model)
    was, loss = weight.detach().clone(), loss_of(case, tokens)
    weight.data.view(-1)[0] = -0.0  # the sign bit of zero, which `==` does not see
    with_minus = bits(weight)
    with stepped(site, change_like(site)):
        moved = site.weight.in_out(weight) - site.weight.in_out(was)
        assert (
            torch.allclose(moved, change_like(site), atol=1e-12, rtol=0)
            or (moved.flatten()[1:] - change_like(site).flatten()[1:]).abs().max() < 1e-12
        )
        assert abs(loss_of(case, tokens) - loss) > 1e-6
        with stepped(site, change_like(site, 1)):
            both = site.weight.in_out(weight) - site.weight.in_out(was)
            assert torch.equal(both != moved, torch.ones_like(both, dtype=torch.bool))
        assert torch.equal(site.weight.in_out(weight) - site.weight.in_out(was), moved)
    assert bits(weight) == with_minus
    weight.data.copy_(was)
    assert_same(before, snapshot(case.model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_weight_is_restored_after_an_exception(error: type[BaseException]) -> None:
    case = model_case("hooked-gpt2")
    sites = [site_of(case, matrix, layer) for matrix in ("W_in", "W_Q") for layer in (0, 2)]
    before = [bits(site.weight.parameter) for site in sites]

    def interrupted() -> None:
        with stepped(sites, [change_like(site) for site in sites]):
            now = [bits(site.weight.parameter) for site in sites]
            assert all(one != other for one, other in zip(now, before, strict=True))
            raise error

    with pytest.raises(error):
        interrupted()
    assert [bits(site.weight.parameter) for site in sites] == before


def test_one_weight_twice() -> None:
    case = model_case("bridge-gpt2")
    site = site_of(case, "W_out", 1)
    was = site.weight.parameter.detach().clone()
    with stepped([site, site], [change_like(site), 2 * change_like(site)]):
        found = site.weight.parameter.detach() - was
        torch.testing.assert_close(found, site.weight.as_stored(3 * change_like(site)))
    assert bits(site.weight.parameter) == bits(was)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions_are_rounded_once(dtype: torch.dtype) -> None:
    case = build("hooked-gpt2", dtype)
    site = site_of(case, "W_in", 0)
    weight = site.weight.parameter
    was = weight.detach().clone()
    with stepped(site, 1e-3 * change_like(site).float()):
        expected = (was.double() + (1e-3 * change_like(site).float()).double()).to(dtype)
        # Half precision is added in float32, and its rounding can break a tie.
        assert (weight != expected).double().mean() < 1e-3
        assert weight.dtype == dtype
    assert bits(weight) == bits(was)


def test_autograd_does_not_see_the_change(as_for_a_user: None) -> None:
    """Gradients, frozen parameters, and a graph built before."""
    case = build("hooked-gpt2")
    tokens, site = case.tokens(4), site_of(case, "W_in", 1)
    weight = site.weight.parameter
    weight.grad = torch.ones_like(weight)
    expected = torch.autograd.grad(case.model(tokens).square().sum(), weight)[0]
    graph = case.model(tokens).square().sum()
    version = weight._version
    with stepped(site, change_like(site).requires_grad_()):
        pass
    assert weight._version == version
    assert bits(weight.grad) == bits(torch.ones_like(weight))
    assert weight.is_leaf
    assert torch.equal(torch.autograd.grad(graph, weight)[0], expected)
    weight.requires_grad_(False)
    was = bits(weight)
    with torch.no_grad(), stepped(site, change_like(site)):
        assert bits(weight) != was
    assert not weight.requires_grad
    assert bits(weight) == was


def test_wrong_changes() -> None:
    case = model_case("bridge-llama")
    in_, query = site_of(case, "W_in", 0), site_of(case, "W_Q", 0)
    before = snapshot(case.model)
    wrong: list[tuple[str, Any, Any]] = [
        (r"W_in in layer 0 has shape \(52, 24\).* of shape \(24, 52\)", in_, torch.zeros(52, 24)),
        (r"W_Q in layer 0 has shape \(24, 24\).*\(4, 24, 6\)", query, torch.zeros(24, 24)),
        ("dtype torch.int64; it must be real numbers", in_, torch.zeros(24, 52).long()),
        ("there are 1 changes for 2 matrices", [in_, query], [change_like(in_)]),
        ("there are 1 changes for 2 matrices", [in_, query], change_like(in_)),
        ("W_Q in layer 0 has shape", [in_, query], [change_like(in_), torch.zeros(2, 2)]),
    ]
    for message, sites, changes in wrong:
        with pytest.raises(InputError, match=message), stepped(sites, changes):
            pytest.fail("the context was entered")
        assert_same(before, snapshot(case.model))


# ------------------------------------------------------------------------- our step against torch's


REFERENCES = ("bridge-llama", "bridge-gemma2", "hooked-gpt2")


@pytest.mark.parametrize("name", REFERENCES)
def test_measured_changes_are_those_of_torchs_own_step(name: str) -> None:
    case, eta = model_case(name), 0.05
    tokens = case.tokens(6)
    table = step_changes(case.model, tokens, TARGET, learning_rate=eta, matrices="mlp")
    assert len(table) == len(case.weights)
    for row in table.itertuples():
        key = (row.matrix, row.layer)
        before, loss = output_and_loss(case, key, tokens, TARGET)
        with step_of_sgd(case, key, eta, tokens, TARGET):
            after, loss_after = output_and_loss(case, key, tokens, TARGET)
        gradient = case.weight_gradients(tokens, nll(TARGET))[key]
        # Hugging Face computes these norms, and so the loss, in float32.
        loss_error = 1e-6 if case.logits_in_float32 else 1e-12
        assert row.learning_rate == eta
        assert row.output_change == pytest.approx(float((after - before).norm()), rel=1e-6)
        assert row.loss == pytest.approx(loss, abs=loss_error)
        assert row.loss_change == pytest.approx(loss_after - loss, abs=2 * loss_error)
        assert row.predicted_loss_change == pytest.approx(
            -eta * float(gradient.square().sum()), rel=1e-6
        )
        if row.matrix == "W_out":
            scores = case.lens((after - before)[-1:])[0]
            assert row.shift_target_rank == int((scores > scores[TARGET]).sum())
        else:
            assert pd.isna(row.shift_target_rank)


def test_the_prediction_of_the_output_is_exact(each: Case) -> None:
    tokens = each.tokens(6)
    table = step_changes(each.model, tokens, TARGET, learning_rate=0.1, matrices="all")
    names = [*host_of(each.model).matrices("attn"), *host_of(each.model).matrices("mlp")]
    assert list(zip(table["layer"], table["matrix"], strict=True)) == [
        (layer, name) for layer in range(3) for name in names
    ]
    assert (table["output_error"] < EXACT).all()
    assert (table["output_error"] < 30 * table["rounding"]).all()
    assert (table["output_change"] > 0).all()
    writing = table["matrix"].isin(WRITING_MATRICES)
    assert (table["shift_target_rank"].isna() == ~writing).all()


def test_every_head_separately() -> None:
    """Per-head copies of the residual stream and per-head results do not change the numbers."""
    case = model_case("hooked-llama")
    tokens, options = case.tokens(5), {"matrices": "attn", "learning_rate": 0.1}
    plain = step_changes(case.model, tokens, TARGET, **options)
    cfg = case.model.cfg
    cfg.use_split_qkv_input, cfg.use_attn_result = True, True
    try:
        split = step_changes(case.model, tokens, TARGET, **options)
        # Heads read different inputs; the norm after this point ignores scale.
        noise = torch.randn(4, case.d_model, generator=torch.Generator().manual_seed(0)).double()
        hook = ("blocks.1.hook_q_input", lambda x, hook: x + noise)
        with case.model.hooks(fwd_hooks=[hook]):
            edited = step_changes(case.model, tokens, TARGET, **options)
    finally:
        cfg.use_split_qkv_input, cfg.use_attn_result = False, False
    for column in ("output_change", "loss_change", "self_imprint", "predicted_loss_change"):
        assert split[column].tolist() == pytest.approx(plain[column].tolist(), rel=1e-9)
    moved = edited["layer"] >= 1
    assert (edited["output_change"] / plain["output_change"] - 1)[moved].abs().min() > 1e-4
    assert (split["output_error"] < EXACT).all()
    assert (edited["output_error"] < EXACT).all()


@pytest.mark.parametrize("wrong", ["layer", "sign", "position"])
def test_another_prediction_fails(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Negative control: only the prediction from the right factors has a small error."""
    case = model_case("bridge-gpt2")
    tokens = case.tokens(6)
    of = steps_module._Prediction.of
    capture = blt.capture_gradients(case.model, tokens, blt.target_nll(TARGET))

    def changed(gradient: Any) -> Any:
        right = of(gradient)
        others = {
            "layer": lambda: of(capture[gradient.matrix, (gradient.layer + 1) % 3]).change,
            "sign": lambda: -right.change,
            "position": lambda: right.change.roll(1, 0),
        }
        return replace(right, change=others[wrong]())

    monkeypatch.setattr(steps_module._Prediction, "of", changed)
    table = step_changes(case.model, tokens, TARGET, learning_rate=0.1)
    assert (table["output_error"] > 0.1).all()
    if wrong == "sign":
        assert table["output_error"].tolist() == pytest.approx([2] * len(table), rel=1e-9)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_the_prediction_of_the_loss_is_first_order(name: str) -> None:
    case = model_case(name)
    tokens = case.tokens(6)
    usual = step_changes(case.model, tokens, TARGET, matrices="mlp")
    norms = usual["loss"] * 0.01 / usual["learning_rate"]
    for row, norm in zip(usual.itertuples(), norms, strict=True):
        errors = []
        for eta in (2e-3 / norm, 1e-3 / norm):
            (step,) = step_changes(
                case.model,
                tokens,
                TARGET,
                learning_rate=eta,
                matrices=row.matrix,
                layers=row.layer,
            ).itertuples()
            errors.append(step.loss_change - step.predicted_loss_change)
        # The third-order term is 1e-3 of the second-order term here.
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1), row


def test_the_default_rate_lowers_the_loss_by_one_percent(each: Case) -> None:
    table = step_changes(each.model, ["Messi plays for", "Rome is"], [" Paris", TARGET])
    assert table["predicted_loss_change"].tolist() == pytest.approx(
        (-0.01 * table["loss"]).tolist(), rel=1e-12
    )
    # The loss falls by roughly that amount; the loss of random models is not smooth.
    part = table["loss_change"] / table["predicted_loss_change"]
    assert part.between(0.5, 1.5).all()


def test_rounding_bounds_the_errors(facts_model: Any) -> None:
    table = step_changes(facts_model, "Lionel Messi plays for", " Paris")
    assert (table["output_error"] < 5 * table["rounding"]).all()
    assert (table["output_error"] > table["rounding"] / 5).all()
    assert (table["output_error"] < 1e-3).all()
    # The lemma's claim: the output of every layer moves towards the target.
    assert table["shift_target_rank"].dropna().eq(0).all()
    small = step_changes(facts_model, "Lionel Messi plays for", " Paris", learning_rate=1e-7)
    assert (small["rounding"] > 50 * table["rounding"]).all()


# -------------------------------------------------------------------------- own position and others


@pytest.mark.parametrize("matrix", ["W_in", "W_out", "W_O", "W_V"])
def test_self_imprint_in_loops(matrix: str) -> None:
    case = model_case("bridge-llama")
    tokens = case.tokens(5)
    capture = blt.capture_gradients(case.model, tokens, blt.target_nll(TARGET), matrices=matrix)
    table = step_changes(case.model, tokens, TARGET, matrices=matrix)
    for row in table.itertuples():
        gradient = capture[matrix, row.layer]
        x, delta = gradient.inputs[0], gradient.vjps[0]
        if matrix == "W_O":
            x = x.flatten(1)
        delta = delta.flatten(1)
        whole = sum(torch.dot(x[-1], x[i]) * delta[i] for i in range(5))
        cosine = torch.cosine_similarity(whole, delta[-1], dim=0)
        assert row.self_imprint == pytest.approx(float(cosine), abs=1e-9)
    assert table["self_imprint"].iloc[0] < 0.999


def test_a_single_position_shifts_against_its_own_vjp() -> None:
    case = model_case("hooked-gpt2")
    single = step_changes(case.model, case.tokens(1), TARGET)
    assert single["self_imprint"].tolist() == pytest.approx([1.0] * 6, abs=1e-12)
    # In the last layer no other position has a VJP (appendix A).
    last = step_changes(case.model, case.tokens(6), TARGET, layers=-1)
    assert last["self_imprint"].tolist() == pytest.approx([1.0] * 2, abs=1e-12)


# -------------------------------------------------------------------------- prompts, targets, state


def test_prompts_of_different_lengths_match_single_runs() -> None:
    case = model_case("bridge-llama")
    prompts, targets = ["Messi plays for", "Rome is in Italy and Paris", "A"], [" Paris", 7, " the"]
    together = step_changes(case.model, prompts, targets, learning_rate=0.1, layers=[0, -1])
    for prompt, (text, target) in enumerate(zip(prompts, targets, strict=True)):
        alone = step_changes(case.model, text, target, learning_rate=0.1, layers=[0, 2])
        own = together[together["prompt"] == prompt].reset_index(drop=True)
        pd.testing.assert_frame_equal(own.drop(columns="prompt"), alone.drop(columns="prompt"))


def test_the_models_own_answer_stays_the_target() -> None:
    """Take a step so large that the model's answer changes."""
    case = model_case("hooked-gpt2")
    tokens = case.tokens(4)
    own = int(case.logits(tokens)[0, -1].argmax())
    for eta in (0.01, 1e3):
        found, expected = (
            step_changes(case.model, tokens, target, learning_rate=eta) for target in (None, own)
        )
        pd.testing.assert_frame_equal(found, expected)


def test_texts_of_several_tokens() -> None:
    case = model_case("hooked-gpt2")
    with pytest.raises(InputError, match="Pass multi_token='first' or 'last'"):
        step_changes(case.model, "Rome is", " the river")
    first, last = (
        step_changes(case.model, "Rome is", " the river", multi_token=position, layers=1)
        for position in ("first", "last")
    )
    assert first["loss"].iloc[0] != last["loss"].iloc[0]


def test_where_the_gradient_is_zero_nothing_changes() -> None:
    case = model_case("hooked-gpt2")
    hook = ("blocks.1.hook_resid_post", lambda value, hook: torch.ones_like(value))
    with case.model.hooks(fwd_hooks=[hook]):
        usual = step_changes(case.model, case.tokens(4), TARGET, layers=1)
        given = step_changes(case.model, case.tokens(4), TARGET, layers=1, learning_rate=0.1)
    assert usual["learning_rate"].tolist() == [0, 0]
    for table in (usual, given):
        assert not table[["output_change", "loss_change", "predicted_loss_change"]].any(axis=None)
        missing = ["output_error", "rounding", "self_imprint", "shift_target_rank"]
        assert table[missing].isna().all(axis=None)


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_nothing_changes(name: str) -> None:
    """Also with the caller's hooks, gradients and frozen parameters, and when a hook raises."""
    case = make_busy(build(name))
    tokens = case.tokens(4)
    before = snapshot(case.model)
    table = step_changes(case.model, tokens, TARGET, matrices="all")
    assert (table["output_error"] < EXACT).all()
    assert_same(before, snapshot(case.model))
    for last in (
        1,
        2,
        3,
        8,
    ):  # the capture's pass, the one before, the first step's, the last step's
        passes = itertools.count(1)

        def raising(value: Tensor, hook: Any, *, passes: Any = passes, last: int = last) -> Tensor:
            if next(passes) == last:
                raise KeyboardInterrupt
            return value

        hooks = [("blocks.1.hook_resid_post", raising)]
        with case.model.hooks(fwd_hooks=hooks), pytest.raises(KeyboardInterrupt):
            step_changes(case.model, tokens, TARGET)
        assert_same(before, snapshot(case.model))
    with suppress(InputError):
        step_changes(case.model, tokens, TARGET, learning_rate=-1)
    assert_same(before, snapshot(case.model))


def test_nothing_changes_on_a_frozen_model_without_grad() -> None:
    case = model_case("bridge-gpt2")
    case.model.requires_grad_(False)
    with torch.no_grad():
        step_changes(case.model, "Rome is", " Paris")  # the first pass of each kind leaves traces
        before = snapshot(case.model)
        frozen = step_changes(case.model, "Rome is", " Paris")
        assert_same(before, snapshot(case.model))
    case.model.requires_grad_(True)
    pd.testing.assert_frame_equal(frozen, step_changes(case.model, "Rome is", " Paris"))


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
def test_a_callers_autocast_does_not_round(name: str) -> None:
    case = build(name, torch.float32)  # autocast leaves float64 alone
    expected = step_changes(case.model, "Rome is", " Paris")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step_changes(case.model, "Rome is", " Paris")
    pd.testing.assert_frame_equal(found, expected)


def test_a_callers_edit_of_the_output_is_not_counted_for_the_matrix() -> None:
    """The output is copied before the caller's hooks run."""
    case = model_case("hooked-gpt2")
    hooks = [
        ("blocks.1.mlp.hook_pre", lambda value, hook: value.mul_(2)),
        ("blocks.1.hook_mlp_out", lambda value, hook: value.mul_(0.5)),
    ]
    # A hook on the same module from which the output is taken.
    handle = case.model.blocks[0].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    with case.model.hooks(fwd_hooks=hooks):
        table = step_changes(case.model, case.tokens(5), TARGET, learning_rate=0.1)
    handle.remove()
    assert (table["output_error"] < EXACT).all()


# --------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize("rate", [0, -0.1, math.inf, math.nan, True, "0.1", [0.1], 1j])
def test_wrong_learning_rates(rate: Any) -> None:
    with pytest.raises(InputError, match=r"learning_rate is .*pass a positive number, or None for"):
        step_changes(model_case("hooked-gpt2").model, "Rome", TARGET, learning_rate=rate)


def test_learning_rates_of_other_libraries() -> None:
    import numpy as np

    model = model_case("hooked-gpt2").model
    expected = step_changes(model, "Rome", TARGET, learning_rate=0.25, layers=0)
    for rate in (np.float32(0.25), torch.tensor(0.25), np.float64(0.25)):
        found = step_changes(model, "Rome", TARGET, learning_rate=rate, layers=0)
        pd.testing.assert_frame_equal(found, expected)


def test_wrong_arguments() -> None:
    model = model_case("hooked-gpt2").model
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("layer 3 does not exist; allowed: -3 to 2", {"layers": 3}),
        ("has no W_gate", {"matrices": "W_gate"}),
        ("unknown matrix 'W_up'", {"matrices": "W_up"}),
        ("multi_token is 'middle'", {"multi_token": "middle"}),
        ("there are 2 targets for 1 prompts", {"target": [1, 2]}),
        ("the list of prompts is empty", {"prompts": []}),
    ]
    for message, options in wrong:
        with pytest.raises(InputError, match=message):
            step_changes(**{"model": model, "prompts": "Rome", "target": TARGET, **options})
    with pytest.raises(InputError, match="model is a Linear"):
        step_changes(nn.Linear(2, 2), "Rome", TARGET)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_mixtures_of_experts_are_refused(kind: str) -> None:
    try:
        model = build_model("mixtral", kind)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    tokens = torch.tensor([[5, 6, 7]])
    with pytest.raises(
        UnsupportedModelError, match=r"W_in of layer 0 belongs to a mixture of 4 experts"
    ):
        step_changes(model, tokens, TARGET)
    assert (step_changes(model, tokens, TARGET, matrices="attn")["output_error"] < 1e-2).all()


def test_weights_that_cannot_be_stepped() -> None:
    case = build("hooked-llama")
    cfg = case.model.cfg
    cfg.ungroup_grouped_query_attention = True
    with pytest.raises(UnsupportedModelError, match="switch off ungroup_grouped_query_attention"):
        step_changes(case.model, case.tokens(3), TARGET, matrices="W_K")
    cfg.ungroup_grouped_query_attention = False

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(
        case.model.blocks[1].attn, "W_Q", Doubled(), unsafe=True
    )
    assert (step_changes(case.model, case.tokens(3), TARGET, matrices="attn", layers=0)).size
    with pytest.raises(UnsupportedModelError, match="W_Q of layer 1 is computed from other param"):
        step_changes(case.model, case.tokens(3), TARGET, matrices="W_Q")
