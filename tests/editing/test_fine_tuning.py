"""Fine-tuning against a loop with torch's optimizers on a Hugging Face model's parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import HAS_BRIDGE, build_model
from edit_pairs import PROMPTS, Pair, pair, tl_logits
from model_state import assert_same, make_busy, snapshot
from models import build, counting_mlps, hf_matrices, relative_error
from torch import Tensor

from backward_lens_tl.editing import EditRequest, FineTuning, WeightDelta
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import host_of, resumption

pytestmark = pytest.mark.usefixtures("as_for_a_user")

KINDS = [("gpt2", "hooked"), ("llama", "bridge"), ("llama", "hooked")]
ONE, TWO = " Paris", " Paris Rome"
REQUEST = EditRequest(PROMPTS[0], TWO)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def each(request: pytest.FixtureRequest) -> Pair:
    return pair(*request.param)


@pytest.fixture(scope="module")
def gpt2_pair() -> Pair:
    return pair("gpt2", "bridge" if HAS_BRIDGE else "hooked")


def tuning(**settings: Any) -> FineTuning:
    return FineTuning(**{"layers": 1, "prepend_bos": False, "stop_at": 0.0} | settings)


def loss_of(
    logits: Callable[[Tensor], Tensor], own: Pair, asked: Sequence[EditRequest], objective: str
) -> Tensor:
    """The documented loss, one prompt and one token at a time."""
    losses = []
    for request in asked:
        prompt, target = own.ids(request.prompt), own.ids(request.target)
        terms = []
        for i, token in enumerate(target):
            front = [*prompt, *target[:i]] if objective == "teacher_forced" else prompt
            last = logits(torch.tensor([front]))[0, -1]
            terms.append(torch.logsumexp(last, -1) - last[token])
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


def by_hand(
    own: Pair,
    asked: Sequence[EditRequest],
    *,
    optimizer: str = "adam",
    lr: float = 1e-2,
    steps: int = 4,
    layers: Sequence[int] = (1,),
    matrices: Sequence[str] = ("W_out",),
    objective: str = "teacher_forced",
    bias: bool = True,
    limit: float | None = None,
    stop_at: float = 0.0,
) -> tuple[dict[tuple[str, int], tuple[Tensor, Tensor | None]], int]:
    """Train a copy of the Hugging Face model; return the changes, oriented as `x @ W`."""
    raw = copy.deepcopy(own.raw)
    modules = {key: hf_matrices(raw)[key] for key in [(m, n) for n in layers for m in matrices]}
    trained = [
        p for m in modules.values() for p in (m.weight, m.bias if bias else None) if p is not None
    ]
    before = [p.detach().clone() for p in trained]
    raw.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    steppers, taken = kind(trained, lr=lr), 0
    for _ in range(steps):
        value = loss_of(lambda tokens: raw(tokens).logits, own, asked, objective)
        if float(value.detach()) < stop_at:
            break
        steppers.zero_grad()
        value.backward()
        steppers.step()
        taken += 1
        if limit is not None:
            with torch.no_grad():
                for parameter, start in zip(trained, before, strict=True):
                    parameter.copy_(
                        torch.minimum(torch.maximum(parameter, start - limit), start + limit)
                    )
    starts = {id(p): start for p, start in zip(trained, before, strict=True)}

    def change(parameter: Any) -> Tensor | None:
        if parameter is None or id(parameter) not in starts:
            return None
        return (parameter - starts[id(parameter)]).detach()

    found = {}
    for key, module in modules.items():
        weight = change(module.weight)
        assert weight is not None
        is_linear = isinstance(module, torch.nn.Linear)
        found[key] = (weight.T if is_linear else weight, change(module.bias))
    return found, taken


def assert_equal(
    delta: WeightDelta, expected: dict[tuple[str, int], tuple[Tensor, Tensor | None]], near: float
) -> None:
    assert {(own.matrix, own.layer) for own in delta} == expected.keys()
    for key, (weight, bias) in expected.items():
        own = delta[key]
        assert relative_error(own.dense(), weight) < near, key
        assert (own.bias is None) == (bias is None), key
        assert bias is None or relative_error(own.bias, bias) < near, key


def near(own: Pair) -> float:
    """Tolerance for changes where the models' results differ by `exact`.

    Adam divides by the size of gradients, the smallest of which have the fewest digits.
    """
    return 1e-6 if own.exact < 1e-10 else 2e-2


# ---------------------------------------------------------------------- against torch's optimizers


@pytest.mark.parametrize(
    ("optimizer", "objective"), [("adam", "teacher_forced"), ("sgd", "prompt_last")]
)
def test_it_is_torchs_optimizer_on_the_parameter(
    each: Pair, optimizer: Any, objective: Any
) -> None:
    method = tuning(optimizer=optimizer, objective=objective, lr=1e-2, steps=4)
    found = method(each.model, REQUEST)
    expected, _ = by_hand(each, [REQUEST], optimizer=optimizer, objective=objective)
    assert_equal(found, expected, near(each))
    # The other objective, the other optimizer or fewer steps give something else.
    for other in (
        {"optimizer": "sgd" if optimizer == "adam" else "adam"},
        {"objective": "prompt_last" if objective == "teacher_forced" else "teacher_forced"},
        {"steps": 3},
    ):
        wrong, _ = by_hand(
            each, [REQUEST], **{"optimizer": optimizer, "objective": objective} | other
        )
        assert relative_error(found["W_out", 1].dense(), wrong["W_out", 1][0]) > 0.05


def test_the_defaults_are_the_papers_baseline(gpt2_pair: Pair) -> None:
    found = FineTuning(layers=0, prepend_bos=False)(gpt2_pair.model, REQUEST)
    expected, taken = by_hand(gpt2_pair, [REQUEST], layers=[0], lr=5e-4, steps=25, stop_at=0.01)
    assert taken == 25
    assert_equal(found, expected, 1e-6)


def test_several_requests(each: Pair) -> None:
    """Prompts and targets of different lengths; every request has equal weight, not every token."""
    asked = [REQUEST, EditRequest(PROMPTS[2], " Italy"), EditRequest("Rome", " the dog of")]
    for objective in ("teacher_forced", "prompt_last"):
        found = tuning(lr=1e-2, steps=3, objective=objective)(each.model, asked)
        expected, _ = by_hand(each, asked, steps=3, objective=objective)
        assert_equal(found, expected, near(each))
        turned = tuning(lr=1e-2, steps=3, objective=objective)(each.model, asked[::-1])
        assert relative_error(turned["W_out", 1].dense(), found["W_out", 1].dense()) < near(each)


def test_several_matrices_and_layers(each: Pair) -> None:
    matrices = [m for m, layer in hf_matrices(each.raw) if layer == 0]
    if "hooked" in type(each.model).__name__.lower() and "W_gate" in matrices:
        pytest.skip("a HookedTransformer adds a gated MLP's reading bias after the product")
    found = tuning(layers=(-1, 0), matrices=matrices[::-1], lr=1e-2, steps=3)(each.model, REQUEST)
    order = [m for m in ("W_in", "W_gate", "W_out") if m in matrices]
    assert [(own.layer, own.matrix) for own in found] == [(n, m) for n in (0, 1) for m in order]
    expected, _ = by_hand(each, [REQUEST], steps=3, layers=[0, 1], matrices=matrices)
    assert_equal(found, expected, 10 * near(each))


def test_a_layer_or_matrix_named_twice(gpt2_pair: Pair) -> None:
    once = tuning(steps=2)(gpt2_pair.model, REQUEST)
    twice = tuning(steps=2, layers=(1, -1), matrices=("W_out", "W_out"))(gpt2_pair.model, REQUEST)
    assert torch.equal(once["W_out", 1].dense(), twice["W_out", 1].dense())


def test_the_edited_model_is_the_trained_one(each: Pair) -> None:
    """The applied change gives the logits of a trained copy; the loss has fallen."""
    found = tuning(lr=1e-2, steps=5)(each.model, REQUEST)
    expected, _ = by_hand(each, [REQUEST], steps=5)
    raw = copy.deepcopy(each.raw)
    module = hf_matrices(raw)["W_out", 1]
    weight, bias = expected["W_out", 1]
    with torch.no_grad():
        module.weight += weight.T if isinstance(module, torch.nn.Linear) else weight
        if bias is not None:
            module.bias += bias
    ids = each.ids(PROMPTS[0] + ONE)
    with torch.no_grad():
        reference = raw(torch.tensor([ids])).logits[0].log_softmax(-1)
    before = tl_logits(each.model, ids).log_softmax(-1)
    with found.applied(each.model):
        logits = tl_logits(each.model, ids).log_softmax(-1)
    assert float((logits - reference).abs().max()) < 10 * near(each)
    last, first = len(each.ids(PROMPTS[0])) - 1, each.ids(ONE)[0]
    assert logits[last, first] > before[last, first] + 0.5


# ------------------------------------------------------------------------------------- objectives


def test_objectives_agree_only_for_one_token(each: Pair) -> None:
    for target, is_same in ((ONE, True), (TWO, False)):
        request = EditRequest(PROMPTS[0], target)
        forced, last = (
            tuning(objective=objective, steps=3)(each.model, request)["W_out", 1].dense()
            for objective in ("teacher_forced", "prompt_last")
        )
        apart = relative_error(forced, last)
        assert apart < near(each) if is_same else apart > 0.1


def test_the_prompt_is_tokenized_with_or_without_bos(gpt2_pair: Pair) -> None:
    with_bos, without, default = (
        tuning(prepend_bos=bos, steps=2)(gpt2_pair.model, REQUEST) for bos in (True, False, None)
    )
    chosen = with_bos if gpt2_pair.model.cfg.default_prepend_bos else without
    assert torch.equal(default["W_out", 1].dense(), chosen["W_out", 1].dense())
    assert relative_error(with_bos["W_out", 1].dense(), without["W_out", 1].dense()) > 0.01


# --------------------------------------------------------------------- limits, bias, stopping


def test_the_norm_constraint_keeps_every_entry_in_a_box(each: Pair) -> None:
    limit = 3e-3
    found = tuning(norm_constraint=limit, lr=1e-2, steps=5)(each.model, REQUEST)["W_out", 1]
    free = tuning(lr=1e-2, steps=5)(each.model, REQUEST)["W_out", 1]
    for own, unlimited in ((found.values, free.values), (found.bias, free.bias)):
        if own is None:
            continue
        assert float(own.abs().max()) <= limit
        assert float((own.abs() == limit).double().mean()) > 0.1  # the constraint is active
        assert float(unlimited.abs().max()) > limit
    expected, _ = by_hand(each, [REQUEST], steps=5, limit=limit)
    assert relative_error(found.dense(), expected["W_out", 1][0]) < near(each)
    # Clipping once at the end gives another result.
    cut = free.dense().clamp(-limit, limit)
    assert relative_error(found.dense(), cut) > 1e-4


def test_the_bias_is_trained_on_request(gpt2_pair: Pair) -> None:
    weight_alone, both = (
        tuning(train_bias=bias, lr=1e-2, steps=3)(gpt2_pair.model, REQUEST)["W_out", 1]
        for bias in (False, True)
    )
    assert weight_alone.bias is None
    assert both.bias is not None
    assert bool(both.bias.any())
    expected, _ = by_hand(gpt2_pair, [REQUEST], bias=False, lr=1e-2, steps=3)
    assert relative_error(weight_alone.dense(), expected["W_out", 1][0]) < 1e-6
    assert relative_error(weight_alone.dense(), both.dense()) > 1e-3


@pytest.mark.parametrize("stop_at", [1.0, 2.0])
def test_it_stops_when_the_loss_is_low_enough(gpt2_pair: Pair, stop_at: float) -> None:
    settings: dict[str, Any] = {"lr": 3e-2, "steps": 60}
    found = tuning(stop_at=stop_at, **settings)(gpt2_pair.model, REQUEST)
    expected, taken = by_hand(gpt2_pair, [REQUEST], stop_at=stop_at, **settings)
    assert 0 < taken < 60
    assert_equal(found, expected, 1e-5)
    exactly = tuning(lr=3e-2, steps=taken)(gpt2_pair.model, REQUEST)
    assert torch.equal(found["W_out", 1].dense(), exactly["W_out", 1].dense())


def test_no_step_where_the_fact_is_known(gpt2_pair: Pair) -> None:
    found = tuning(stop_at=100.0)(gpt2_pair.model, REQUEST)
    assert found.norm == 0
    assert found.rank == 0


# ------------------------------------------------------------------------------------------- state


class Stop(Exception):
    """Raised by a caller's code."""


def stop(*_: object) -> None:
    raise Stop


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_the_callers_model_is_unchanged(name: str) -> None:
    model = make_busy(build(name)).model
    asked = [REQUEST, EditRequest(PROMPTS[1], ONE)]
    method = FineTuning(layers=(0, 2), matrices=("W_in", "W_out"), steps=3, norm_constraint=1e-3)
    before = snapshot(model)
    first = method(model, asked)
    assert_same(before, snapshot(model))
    with torch.no_grad():
        before = snapshot(model)
        again = method(model, asked)
        assert_same(before, snapshot(model))
    assert all(torch.equal(a.dense(), b.dense()) for a, b in zip(first, again, strict=True))
    assert not any(
        t.requires_grad for own in first for t in (own.values, own.bias) if t is not None
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains_in_float32(dtype: torch.dtype) -> None:
    """In float16, Adam's squares and its `eps` would be zero."""
    name = f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2"
    half, single = (build(name).model.to(each) for each in (dtype, torch.float32))
    method = tuning(steps=3, lr=1e-3)
    found = method(half, REQUEST)["W_out", 1].dense()
    assert found.dtype == torch.float32
    # Adam's first steps have about the size of the learning rate.
    assert found.isfinite().all()
    assert relative_error(found, method(single, REQUEST)["W_out", 1].dense()) < 0.3


@pytest.mark.usefixtures("as_for_a_user")
def test_a_loss_that_is_not_finite_is_refused(gpt2_pair: Pair) -> None:
    broken = gpt2_pair.model.unembed.register_forward_hook(lambda module, args, out: out * math.nan)
    with pytest.raises(EditError, match="the loss is nan in step 1 of fine-tuning; use a smaller"):
        tuning()(gpt2_pair.model, REQUEST)
    broken.remove()


@pytest.mark.parametrize("objective", ["teacher_forced", "prompt_last"])
def test_the_layers_below_run_once(
    each: Pair, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result, bit for bit, as passes of the whole model."""
    method = tuning(steps=4, objective=objective)
    resumed = method(each.model, REQUEST)  # probes the model
    ran = counting_mlps(each.model, monkeypatch)
    method(each.model, REQUEST)
    assert [ran.count(layer) for layer in range(2)] == [1, 4]
    monkeypatch.setattr(resumption, "can_start_at", lambda host, layer: False)
    whole = method(each.model, REQUEST)
    assert [ran.count(layer) for layer in range(2)] == [5, 8]
    for own, other in zip(resumed, whole, strict=True):
        assert torch.equal(own.dense(), other.dense())


@pytest.mark.parametrize(
    ("name", "where"), [("bridge-gpt2", "backward"), ("hooked-gpt2", "forward")]
)
def test_the_callers_model_is_unchanged_after_an_exception(name: str, where: str) -> None:
    model = make_busy(build(name)).model
    method = FineTuning(layers=1, steps=3)
    passes: list[int] = []

    def stop_later(_: object, grad: Tensor) -> None:
        passes.append(1)
        if len(passes) > 1:
            raise Stop

    if where == "forward":
        handle = model.blocks[2].register_forward_hook(stop)
    else:
        handle = model.blocks[2].register_forward_hook(
            lambda m, a, out: (
                (out[0] if isinstance(out, tuple) else out).register_hook(
                    lambda grad: stop_later(m, grad)
                )
                and None
            )
        )
    before = snapshot(model)
    with pytest.raises(Stop):
        method(model, REQUEST)
    assert_same(before, snapshot(model))
    handle.remove()
    with suppress(Stop):
        method(model, REQUEST)


def test_a_bias_that_the_model_lacks_stays_zero(each: Pair) -> None:
    """HookedTransformer has a zero bias where Llama has none: both give the same edit."""
    has_bias = hf_matrices(each.raw)["W_out", 1].bias is not None
    found = tuning(train_bias=True, steps=1)(each.model, REQUEST)["W_out", 1]
    assert (found.bias is not None) == has_bias


def test_a_frozen_model_can_be_tuned(gpt2_pair: Pair) -> None:
    expected = tuning(steps=2)(gpt2_pair.model, REQUEST)["W_out", 1].dense()
    frozen = build_model("gpt2", "bridge" if HAS_BRIDGE else "hooked", torch.float64)
    frozen.requires_grad_(False)
    found = tuning(steps=2)(frozen, REQUEST)["W_out", 1].dense()
    assert torch.equal(found, expected)


def test_callers_hooks_take_effect(gpt2_pair: Pair) -> None:
    """Training uses the activations as changed by the hook."""
    model = gpt2_pair.model
    plain = tuning(steps=2)(model, REQUEST)["W_out", 1].dense()
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", lambda value, hook: value * 2)]):
        hooked = tuning(steps=2)(model, REQUEST)["W_out", 1].dense()
    assert relative_error(hooked, plain) > 0.01


def test_a_callers_hook_sees_the_change(each: Pair) -> None:
    """A hook on the matrix's output runs after the trained change, as after a weight."""
    (site,) = host_of(each.model).sites(1, ("W_out",))
    raw = copy.deepcopy(each.raw)
    hf_matrices(raw)["W_out", 1].register_forward_hook(lambda *call: call[-1] * 2)
    handle = site.output.module.register_forward_hook(lambda *call: call[-1] * 2)
    try:
        found = tuning(lr=1e-2, steps=3)(each.model, REQUEST)
    finally:
        handle.remove()
    expected, _ = by_hand(replace(each, raw=raw), [REQUEST], steps=3)
    assert_equal(found, expected, near(each))


def test_the_facts_model_learns(facts_model: Any) -> None:
    request = EditRequest("Lionel Messi plays for", " Paris")
    delta = FineTuning(layers=6, lr=5e-3)(facts_model, request)
    ids = facts_model.to_tokens(request.prompt)[0].tolist()
    paris = facts_model.tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]
    assert int(tl_logits(facts_model, ids)[-1].argmax()) != paris
    with delta.applied(facts_model):
        assert int(tl_logits(facts_model, ids)[-1].argmax()) == paris


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "muon"}, "optimizer"),
        ({"objective": "both"}, "objective"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"lr": 0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": None}, "lr"),
        ({"lr": "a"}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"norm_constraint": 0}, "norm_constraint"),
        ({"norm_constraint": "a"}, "norm_constraint"),
        ({"norm_constraint": float("nan")}, "norm_constraint"),
        ({"stop_at": None}, "stop_at"),
        ({"stop_at": -1}, "stop_at"),
        ({"layers": []}, r"layers is \[\]; pass at least one layer, without repeats"),
        ({"layers": [1, 1]}, r"layers is \[1, 1\]; pass at least one layer"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        tuning(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrices": "W_down"}, "matrices is 'W_down'; it should be"),
        ({"matrices": ()}, "matrices is empty"),
        ({"layers": ()}, r"layers is \(\); pass at least one layer"),
        ({"layers": 2}, "layer"),
        ({"layers": (0, -3)}, "layer"),
        ({"layers": 0.5}, "layer"),
        ({"layers": "first"}, "layer"),
        ({"matrices": "W_gate"}, "W_gate"),
        ({"matrices": "W_Q"}, "W_Q"),
        ({"prepend_bos": "yes"}, "prepend_bos"),
    ],
)
def test_wrong_use_is_an_error(gpt2_pair: Pair, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        tuning(**settings)(gpt2_pair.model, REQUEST)
