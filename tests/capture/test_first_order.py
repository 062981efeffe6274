"""First-order changes against finite differences of the plain model, and a linear model's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from architectures import FAMILIES, NotAvailable, build_model
from attention_cases import attention_weights
from model_state import assert_same, make_busy, snapshot
from models import HAS_BRIDGE, NAMES, build, hooked_only, relative_error, require_kind
from recorded_passes import record_forward
from torch import Tensor, nn

from backward_lens_tl.capture import first_order
from backward_lens_tl.capture.first_order import (
    AddedVector,
    FirstOrderChanges,
    first_order_changes,
)
from backward_lens_tl.capture.forward import selected_logits
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.capture.prompts import PromptBatch, pad_prompts
from backward_lens_tl.errors import InputError, ModelStateError, UnsupportedModelError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.sites import MatrixSite

EXACT = (
    "bridge-gpt2",
    "hooked-gpt2",
    "hooked-llama",
    "hooked-gemma2",
    "hooked-solu_ln",
    "hooked-no_norm",
    "hooked-gptj",
    "hooked-olmo2",
    "bridge-neox",
)
"""In float64 throughout: grouped queries, norms after attention, parallel attention, no norm."""

ROUNDED = ("bridge-llama", "bridge-gemma2", "bridge-bloom", "bridge-mixtral")
"""Hugging Face computes norms, attention or routing of these in float32."""

WRITING = ("W_out", "W_O")
PROMPTS = ((5, 9, 17, 30, 41), (60, 3, 12))
PLACES = ((0, 1, 4), (0, 4, 4), (0, 2, 2), (1, 0, 2))
"""Prompt, position and where the change is read."""


KIND = "bridge" if HAS_BRIDGE else "hooked"


@functools.cache
def model_of(name: str) -> Any:
    """A random model in float64; no test changes it."""
    kind, family = name.split("-")
    require_kind(kind)
    if name in NAMES:
        return build(name).model
    try:
        return build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))


def any_model() -> Any:
    return model_of(f"{KIND}-gpt2")


def added_to(model: Any, places: Sequence[tuple[int, int, int]] = PLACES) -> list[AddedVector]:
    """Random vectors at every writing matrix and layer, without matrices of experts."""
    host, generator = host_of(model), torch.Generator().manual_seed(0)
    sites = [host.sites(layer, WRITING) for layer in range(host.n_layers)]
    return [
        AddedVector(
            site,
            *place,
            torch.randn(host.d_model, generator=generator, dtype=torch.float64),
        )
        for site, place in product((one for own in sites for one in own), places)
        if isinstance(site, MatrixSite)
    ]


def batch_of(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> PromptBatch:
    return pad_prompts(host_of(model), prompts)


def changes_of(
    model: Any, added: Sequence[AddedVector], memory: Memory | None = None, **batch: Any
) -> tuple[Tensor, Tensor]:
    """The changes of the last stream and of the logits, in the order of the vectors."""
    found = list(
        first_order_changes(host_of(model), batch_of(model, **batch), added, memory or Memory())
    )
    assert sorted(index for each in found for index in each.indices) == list(range(len(added)))
    return in_order(found, "stream"), in_order(found, "logits")


def in_order(found: Sequence[FirstOrderChanges], name: str) -> Tensor:
    values = torch.cat([getattr(each, name) for each in found])
    order = torch.tensor([index for each in found for index in each.indices])
    return values[order.argsort()]


# --------------------------------------------------------------------------- finite differences


def module_of(model: Any, matrix: str, layer: int) -> nn.Module:
    """The module whose output is that of the matrix, found without the package."""
    block = model.blocks[layer]
    if not hasattr(model, "original_model"):
        return block.mlp if matrix == "W_out" else block.attn
    if matrix == "W_O":
        weight = attention_weights(model)["W_O", layer].parameter
        return next(
            module
            for module in model.original_model.modules()
            if getattr(module, "weight", None) is weight
        )
    mlp = block.mlp
    return next(
        getattr(mlp, name).original_component for name in ("out", "down") if hasattr(mlp, name)
    )


def plain_run(
    model: Any, matrix: str, layer: int, own: Sequence[AddedVector], step: float
) -> tuple[Tensor, Tensor]:
    """The last stream and the logits, with a step along each vector, one row per vector."""
    rows = torch.arange(len(own))
    positions = torch.tensor([each.position for each in own])
    read_at = torch.tensor([each.read_at for each in own])
    batch = batch_of(model, [PROMPTS[each.prompt] for each in own])

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        moved = output.reshape(*batch.tokens.shape, -1).clone()
        moved[rows, positions] += step * torch.stack([each.vector for each in own])
        return moved.reshape(output.shape)

    streams: list[Tensor] = []
    last = model.hook_dict[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    handles = [
        module_of(model, matrix, layer).register_forward_hook(add),
        last.register_forward_hook(lambda module, args, output: streams.append(output)),
    ]
    with torch.no_grad():
        logits = model(
            batch.tokens, return_type="logits", attention_mask=torch.ones_like(batch.tokens)
        )
    for handle in handles:
        handle.remove()
    return streams[0][rows, read_at].double(), logits[rows, read_at].double()


def differences(model: Any, added: Sequence[AddedVector], step: float) -> tuple[Tensor, Tensor]:
    """Central differences, extrapolated once, so that the error is of order `step ** 4`."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for matrix, layer in dict.fromkeys((each.site.matrix, each.site.layer) for each in added):
        indices = [
            index
            for index, each in enumerate(added)
            if (each.site.matrix, each.site.layer) == (matrix, layer)
        ]
        own = [added[index] for index in indices]
        central = []
        for size in (step, step / 2):
            ahead, behind = (plain_run(model, matrix, layer, own, sign * size) for sign in (1, -1))
            central.append(
                [(up - down) / (2 * size) for up, down in zip(ahead, behind, strict=True)]
            )
        slopes = [(4 * half - whole) / 3 for whole, half in zip(*central, strict=True)]
        found |= zip(indices, zip(*slopes, strict=True), strict=True)
    streams, logits = zip(*(found[index] for index in range(len(added))), strict=True)
    return torch.stack(streams), torch.stack(logits)


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Relative errors; absolute ones where zero is expected."""
    lengths = expected.norm(dim=-1)
    return (found - expected).norm(dim=-1) / lengths.masked_fill(lengths == 0, 1)


@pytest.mark.versions
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_changes_are_finite_differences_of_the_plain_model(name: str) -> None:
    model = model_of(name)
    added = added_to(model)
    assert len(added) >= len(PLACES) * model.cfg.n_layers
    # Rounding divided by the step, and the step to the power of 4: 1e-12 + 1e-9 in float64. With
    # 1e-7 of rounding the best step leaves 1e-4 of a usual change and 4e-3 of the smallest.
    step, tolerance = (3e-4, 1e-6) if name in EXACT else (0.02, 1e-2)
    for found, expected in zip(
        changes_of(model, added), differences(model, added, step), strict=True
    ):
        assert float(errors(found, expected).max()) < tolerance
        assert float(errors(found, expected).median()) < tolerance / 100
        # Changes at another matrix, layer, position or prompt are others.
        reaches = found.any(-1)
        assert float(errors(found, expected.roll(1, 0))[reaches].min()) > 5e-2


@pytest.mark.versions
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), list(product(FAMILIES, ("hooked", "bridge", "bridge-compat")))
)
def test_every_architecture_agrees_with_its_gradients(family: str, kind: str) -> None:
    """`u . (J v) = (J^T u) . v`, where a capture gives `J^T u`, which autograd's own gradients of
    the weights confirm in test_architectures.py."""
    try:
        model = build_model(family, kind)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    upstream = torch.linspace(-1, 1, model.cfg.d_vocab).exp()
    capture = capture_gradients(
        model,
        torch.tensor([PROMPTS[0]]),
        lambda logits, tokens: logits[:, -1] @ upstream,
        matrices=WRITING,
    )
    added = added_to(model, places=((0, 1, 4), (0, 4, 4)))
    assert {each.site.matrix for each in added} >= {"W_O"}
    _, logits = changes_of(model, added)
    for each, found in zip(added, logits, strict=True):
        vjp = capture[each.site.matrix, each.site.layer].vjps[0, each.position].double()
        # Thousands of roundings in float32.
        room = 1e-5 * float(vjp.norm() * each.vector.norm())
        assert float(found.double() @ upstream.double()) == pytest.approx(
            float(vjp @ each.vector), abs=room
        )


# ------------------------------------------------------------------------------- a linear model


def linear_model() -> Any:
    """Uniform attention, ReLUs that are always on, and no norms: linear in the stream."""
    model = build("hooked-no_norm").model
    model.cfg.act_fn = "relu"
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
            block.attn.b_Q.zero_()
            block.mlp.act_fn = torch.relu
            block.mlp.b_in.fill_(1e4)
            block.mlp.b_out.copy_(-block.mlp.b_in @ block.mlp.W_out)
    return model


def carried_by_hand(model: Any, each: AddedVector, n: int) -> Tensor:
    """The change of the last stream at `read_at`, block by block."""
    change = torch.zeros(n, model.cfg.d_model, dtype=torch.float64)
    change[each.position] = each.vector
    uniform = torch.ones(n, n, dtype=torch.float64).tril()
    uniform /= uniform.sum(1, keepdim=True)
    for layer, block in enumerate(model.blocks):
        if layer > each.site.layer:
            values = torch.einsum("hde,hef->df", block.attn.W_V, block.attn.W_O)
            change = change + uniform @ change @ values
        if layer > each.site.layer or (layer == each.site.layer and each.site.matrix == "W_O"):
            change = change + change @ block.mlp.W_in @ block.mlp.W_out
    return change[each.read_at]


@hooked_only
def test_a_linear_model_in_closed_form() -> None:
    model = linear_model()
    added = added_to(model)
    streams, logits = changes_of(model, added)
    with torch.no_grad():
        for each, stream, own in zip(added, streams, logits, strict=True):
            expected = carried_by_hand(model, each, len(PROMPTS[each.prompt]))
            assert float(errors(stream, expected)) < 1e-9
            assert float(errors(own, expected @ model.W_U)) < 1e-9


def test_the_last_layer_leaves_a_vector_as_it_is() -> None:
    model = any_model()
    n = model.cfg.n_layers
    added = [
        each for each in added_to(model) if (each.site.matrix, each.site.layer) == ("W_out", n - 1)
    ]
    own = [each for each in added if each.position == each.read_at]
    streams, _ = changes_of(model, own)
    assert torch.allclose(streams, torch.stack([each.vector for each in own]))
    # A later token does not see the last MLP's output at an earlier one.
    earlier = [each for each in added if each.position < each.read_at]
    streams, logits = changes_of(model, earlier)
    assert not streams.any()
    assert not logits.any()


# ------------------------------------------------------------------ the caller's model and hooks


def test_hooks_of_the_caller_act_on_the_batch_as_it_is() -> None:
    """A hook that patches one prompt of the batch only, and cannot see copies of prompts."""
    model, seen = any_model(), []

    def patch(value: Tensor, hook: Any) -> Tensor:
        seen.append(tuple(value.shape[:2]))
        patched = value.clone()
        patched[1] = 0.5 * patched[1].detach()
        return patched

    added = added_to(model)
    without = changes_of(model, added)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", patch)]):
        streams, logits = changes_of(model, added)
    assert set(seen) == {(2, 5)}
    assert len(seen) == max(sum(each.prompt == prompt for each in added) for prompt in (0, 1))
    for found, expected in zip((streams, logits), without, strict=True):
        for each, own, others in zip(added, found, expected, strict=True):
            if each.prompt == 0:
                assert torch.allclose(own, others)
            elif each.site.layer == 0:
                assert not own.any()  # the patch cuts the connection
            elif others.any():
                assert relative_error(own, others) > 0.01  # another stream, another Jacobian


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2", "bridge-bloom"])
def test_the_model_stays_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    added = added_to(model)
    changes_of(model, added)  # a bridge adds its own hooks in the first pass
    before = snapshot(model)
    changes_of(model, added)
    assert_same(before, snapshot(model))

    def interrupted(*args: Any) -> Tensor:
        selected_logits(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(first_order, "selected_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        changes_of(model, added)
    assert_same(before, snapshot(model))


@pytest.mark.usefixtures("as_for_a_user")
def test_a_busy_model_stays_as_it_was() -> None:
    """With hooks of the caller, gradients, frozen parameters and modules in train mode."""
    model = make_busy(build(f"{KIND}-gpt2")).model
    changes_of(model, added_to(model)[:3])
    before = snapshot(model)
    changes_of(model, added_to(model)[:3])
    assert_same(before, snapshot(model))


@hooked_only
def test_heads_with_outputs_of_their_own() -> None:
    case = build("hooked-gpt2")
    expected = changes_of(case.model, added_to(case.model))
    case.model.set_use_attn_result(True)
    added = added_to(case.model)
    assert {each.site.output_heads for each in added} == {None, 3}
    for found, own in zip(changes_of(case.model, added), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-11)


def test_a_change_that_is_not_finite_is_refused() -> None:
    model = any_model()
    added = added_to(model)[:2]
    added[1].vector[3] = torch.inf
    with pytest.raises(
        ModelStateError,
        match=r"at W_out of layer 0, position 4 of prompt 0, .* is not finite; check",
    ):
        changes_of(model, added)
    assert list(first_order_changes(host_of(model), batch_of(model), [], Memory())) == []


# ------------------------------------------------------------------------------------------- passes


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Number of prompts and length of every forward pass."""
    seen: list[tuple[int, ...]] = []
    record_forward(monkeypatch, lambda tokens: seen.append(tuple(tokens.shape)))
    return seen


@pytest.mark.usefixtures("not_probed")
def test_a_budget_makes_passes_smaller_and_changes_nothing(shapes: list[tuple[int, ...]]) -> None:
    model = any_model()
    added = added_to(model)
    expected = changes_of(model, added)
    assert shapes == [(len(added), 5)]  # the usual size is large enough for all
    shapes.clear()
    found = changes_of(model, added, Memory(budget=2**20))
    assert 2 < len(shapes) < len(added)
    assert sum(rows for rows, _ in shapes) == len(added)
    for own, others in zip(found, expected, strict=True):
        torch.testing.assert_close(own, others, rtol=1e-9, atol=1e-11)
    with pytest.raises(InputError, match="but the budget is 1,000 bytes; increase it"):
        changes_of(model, added, Memory(budget=1000))


@pytest.mark.versions
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_both_ways_to_differentiate_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    added, modes = added_to(model), []
    double = first_order._double_backward

    def counted(*args: Any) -> Any:
        modes.append("double")
        return double(*args)

    monkeypatch.setattr(first_order, "_double_backward", counted)
    expected = changes_of(model, added)
    # The GELU of this model is a function of its own, without a forward-mode formula.
    assert bool(modes) == (name == "bridge-bloom")
    monkeypatch.setattr(first_order, "_forward_mode", counted)
    for found, own in zip(changes_of(model, added), expected, strict=True):
        # Norms that Hugging Face computes in float32 round in different orders.
        assert float(errors(found, own).max()) < (1e-9 if name in EXACT else 1e-5)


class Once(torch.autograd.Function):
    """Doubles values; no forward-mode formula, and a gradient without a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return 2 * values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize("point", ["hook_resid_pre", "hook_mlp_out"])
def test_an_operator_that_is_differentiable_once_is_refused(point: str) -> None:
    """On the whole stream, and on one of two ways, where autograd drops its term silently."""
    model = any_model()
    apply: Callable[[Tensor], Tensor] = Once.apply
    with (
        model.hooks(fwd_hooks=[(f"blocks.1.{point}", lambda value, hook: apply(value))]),
        pytest.raises(UnsupportedModelError, match="cannot be differentiated twice either; load"),
    ):
        changes_of(model, added_to(model)[1:2])
