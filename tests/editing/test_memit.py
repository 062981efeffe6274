"""MEMIT against its closed form, computed densely, and against ROME."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Case, build, relative_error
from slow_editing import (
    OTHER,
    REQUEST,
    block,
    contexts,
    key_at,
    output_at,
    random_moments,
    search,
    with_moments,
)
from torch import Tensor

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.editing import EditRequest, facts_moments, second_moments
from backward_lens_tl.editing.fact_contexts import sampled_prefixes
from backward_lens_tl.editing.methods.memit import MEMIT
from backward_lens_tl.editing.methods.rome import ROME
from backward_lens_tl.errors import EditError, UnsupportedModelError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.checksums import tensors_digest

LAYERS = (0, 1)
STARTS = ("The", "I")
LENGTH = 5
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "lr": 0.4,
    "weight_decay": 1.0,
    "kl_factor": 0.7,
    "clamp": 0.3,
}
EXACT = 1e-9
SOFT = 2e-5
"""Adam divides gradients by their size, so it magnifies float32 rounding of an RMS norm."""

MOMENTS = (random_moments(52), random_moments(52, seed=1))


def memit(case: Case, **settings: Any) -> MEMIT:
    own: dict[str, Any] = {"moments": with_moments(case, LAYERS, MOMENTS), "ridge": 0.0}
    own |= {"starts": STARTS, "prefix_length": LENGTH, "prepend_bos": False}
    return MEMIT(LAYERS, **(own | SETTINGS | settings))


def sampled(case: Case, starts: Sequence[str] = STARTS) -> tuple[str, ...]:
    return sampled_prefixes(host_of(case.model), starts, [LENGTH] * len(starts), 0)


def wanted_of(case: Case, request: EditRequest, **settings: Any) -> Tensor:
    """`z`: the residual stream after the last layer, and what is added to it."""
    module, prefixes = block(case, LAYERS[-1]), sampled(case)
    (row, *_), (at, *_) = contexts(case, request, prefixes, "subject_last", False)
    delta = search(case, module, request, prefixes, **(SETTINGS | settings))
    return output_at(case, module, row, at) + delta


@pytest.fixture(
    params=("bridge-llama", "hooked-gpt2"),
    scope="module",
)
def each(request: pytest.FixtureRequest) -> Case:
    """Random models whose MLPs write directly to the residual stream."""
    return build(request.param)


# ---------------------------------------------------------------------------------- the closed form


@contextmanager
def added_to(case: Case, changes: Sequence[tuple[int, Tensor]]) -> Iterator[None]:
    """The reference and the model under test, with some weights changed."""
    with torch.no_grad():
        kept = []
        for layer, dense in changes:
            weight = case.weights["W_out", layer]
            kept.append((weight, weight.tensor.clone()))
            weight.in_out(weight.tensor).add_(dense)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.tensor.copy_(before)


def reference_key(
    case: Case, changes: Sequence[tuple[int, Tensor]], layer: int, row: Sequence[int], at: int
) -> Tensor:
    """Input of a layer's W_out in a model whose earlier layers are edited."""
    own = {at_layer: case.model.blocks[at_layer].mlp.W_out for at_layer, _ in changes}
    before = {at_layer: weight.detach().clone() for at_layer, weight in own.items()}
    with torch.no_grad():
        for at_layer, dense in changes:
            own[at_layer].data.add_(dense)
        try:
            return key_at(case, layer, row, at)
        finally:
            for at_layer, weight in own.items():
                weight.data.copy_(before[at_layer])


def closed_form(
    case: Case, requests: Sequence[EditRequest], regularization: float
) -> list[tuple[int, Tensor]]:
    prefixes, wanted = sampled(case), [wanted_of(case, request) for request in requests]
    changes: list[tuple[int, Tensor]] = []
    for place, layer in enumerate(LAYERS):
        columns, missing = [], []
        for request, z in zip(requests, wanted, strict=True):
            rows, places = contexts(case, request, prefixes, "subject_last", False)
            keys = [
                reference_key(case, changes, layer, row, at)
                for row, at in zip(rows, places, strict=True)
            ]
            column = 0.5 * keys[0]
            for key in keys[1:]:
                column = column + 0.5 * key / len(prefixes)
            columns.append(column)
            with added_to(case, changes):
                now = output_at(case, block(case, LAYERS[-1]), rows[0], places[0])
            missing.append((z - now) / (len(LAYERS) - place))
        keys = torch.stack(columns, 1)
        left = torch.linalg.inv(regularization * MOMENTS[place] + keys @ keys.T) @ keys
        changes.append((layer, left @ torch.stack(missing)))
    return changes


def test_it_is_its_closed_form(each: Case) -> None:
    delta = memit(each, regularization=7.0)(each.model, [REQUEST, OTHER])
    expected = closed_form(each, [REQUEST, OTHER], 7.0)
    assert [(own.matrix, own.layer) for own in delta] == [("W_out", layer) for layer in LAYERS]
    for layer, dense in expected:
        own = delta["W_out", layer]
        assert own.rank() == 2
        assert own.bias is None
        close = SOFT if each.logits_in_float32 else EXACT
        assert relative_error(own.dense(), dense) < close


def test_the_default_regularization_grows_with_the_width(one_gpt2: Case) -> None:
    delta = memit(one_gpt2)(one_gpt2.model, REQUEST)
    same = memit(one_gpt2, regularization=3 * 52.0)(one_gpt2.model, REQUEST)
    for layer in LAYERS:
        assert torch.equal(delta["W_out", layer].dense(), same["W_out", layer].dense())


# ----------------------------------------------------------------------------------- other facts


@pytest.mark.parametrize("fact_token", ["subject_last", "last"])
def test_one_layer_and_one_request_equal_rome(each: Case, fact_token: str) -> None:
    """At one layer, adding to the MLP's output equals adding after the layer."""
    shared: dict[str, Any] = SETTINGS | {"weight_decay": 0.0, "clamp": 1e9}
    shared |= {"fact_token": fact_token, "prepend_bos": False, "ridge": 0.0}
    shared |= {"moments": with_moments(each, [1], [MOMENTS[0]])}
    rome = ROME(1, key_mode="bare", prefixes=(), **shared)(each.model, REQUEST)["W_out", 1]
    method = MEMIT((1,), starts=(), regularization=1e-9, **shared)
    close = SOFT if each.logits_in_float32 else 1e-8
    found = method(each.model, REQUEST)["W_out", 1]
    assert relative_error(found.dense(), rome.dense()) < close
    more = replace(method, regularization=1.0)(each.model, REQUEST)["W_out", 1]
    assert relative_error(more.dense(), rome.dense()) > 1e-3


@pytest.mark.parametrize("regularization", [0.5, 20.0, 3000.0])
def test_the_fraction_that_is_written(one_gpt2: Case, regularization: float) -> None:
    """For one key the fraction is s / (lambda + s)."""
    (row, *_), (at, *_) = contexts(one_gpt2, REQUEST, (), "subject_last", False)
    key = key_at(one_gpt2, 1, row, at)
    moments = with_moments(one_gpt2, [1], [MOMENTS[0]])
    shared: dict[str, Any] = SETTINGS | {"moments": moments, "starts": (), "ridge": 0.0}
    method = MEMIT((1,), regularization=regularization, prepend_bos=False, **shared)
    own = method(one_gpt2.model, REQUEST)["W_out", 1]
    s = float(key @ torch.linalg.inv(MOMENTS[0]) @ key)
    wanted = own.factors[1][0]
    assert relative_error(key @ own.dense(), s / (regularization + s) * wanted) < 1e-10


def test_without_regularization_the_edit_is_complete(each: Case) -> None:
    """The last layer writes the remainder that earlier layers left."""
    method = memit(each, starts=(), regularization=1e-9)
    requests = [REQUEST, OTHER]
    name = f"blocks.{LAYERS[-1]}.hook_resid_post"
    edited = method(each.model, requests)
    for request in requests:
        (row, *_), (at, *_) = contexts(each, request, (), "subject_last", False)
        module = block(each, LAYERS[-1])
        z = output_at(each, module, row, at) + search(each, module, request, (), **SETTINGS)
        with edited.applied(each.model), torch.no_grad():
            _, cache = each.model.run_with_cache(torch.tensor([row]))
        close = SOFT if each.logits_in_float32 else 1e-7
        assert relative_error(cache[name][0, at], z) < close


def test_a_lower_layer_writes_only_its_share(one_gpt2: Case) -> None:
    """Each layer's share is one over the number of remaining layers."""
    (row, *_), (at, *_) = contexts(one_gpt2, REQUEST, (), "subject_last", False)
    key = key_at(one_gpt2, LAYERS[0], row, at)
    delta = memit(one_gpt2, starts=(), regularization=1e-9)(one_gpt2.model, REQUEST)
    z = search(one_gpt2, block(one_gpt2, LAYERS[-1]), REQUEST, (), **SETTINGS)
    assert relative_error(key @ delta["W_out", LAYERS[0]].dense(), z / 2) < 1e-7


def test_identity_moments_are_ridge_regression(one_gpt2: Case) -> None:
    same = with_moments(one_gpt2, LAYERS, [torch.eye(52, dtype=torch.float64)] * 2)
    delta = memit(one_gpt2, moments="identity", regularization=5.0)(one_gpt2.model, REQUEST)
    equal = memit(one_gpt2, moments=same, regularization=5.0)(one_gpt2.model, REQUEST)
    for layer in LAYERS:
        found, expected = delta["W_out", layer].dense(), equal["W_out", layer].dense()
        assert relative_error(found, expected) < 1e-10


# ------------------------------------------------------------------------------------- kept values


def test_values_are_searched_for_once(
    each: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = memit(each)(each.model, [REQUEST, OTHER])
    method, searched = memit(each, value_folder=tmp_path), []
    search_once = MEMIT._find_value

    def counted(*args: Any) -> Tensor:
        searched.append(args)
        return search_once(*args)

    monkeypatch.setattr(MEMIT, "_find_value", counted)
    method(each.model, REQUEST)
    # Neither the regularization nor other facts change a value.
    replace(method, regularization=1.0)(each.model, REQUEST)
    assert len(searched) == 1
    found = method(each.model, [REQUEST, OTHER])
    assert len(searched) == 2
    for layer in LAYERS:
        assert torch.equal(found["W_out", layer].dense(), expected["W_out", layer].dense())
    assert method.settings() == memit(each).settings()


def test_other_searches_have_other_values(one_gpt2: Case, tmp_path: Path) -> None:
    method, count = memit(one_gpt2, value_folder=tmp_path), 0
    shorter = replace(method, layers=(0,))
    for own in (method, replace(method, lr=0.3), replace(method, seed=1), shorter):
        own(one_gpt2.model, REQUEST)
        count += 1
        assert len(list(tmp_path.iterdir())) == count
    weight = one_gpt2.model.blocks[1].mlp.W_out
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1e-3)
        method(one_gpt2.model, REQUEST)
        weight.copy_(before)
    assert len(list(tmp_path.iterdir())) == count + 1


def test_values_are_not_kept_while_hooks_change_them(one_gpt2: Case, tmp_path: Path) -> None:
    method = memit(one_gpt2, value_folder=tmp_path)
    handle = one_gpt2.model.blocks[2].register_forward_hook(lambda module, args, output: None)
    method(one_gpt2.model, REQUEST)
    handle.remove()
    assert list(tmp_path.iterdir()) == []
    method(one_gpt2.model, REQUEST)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_had_is_refused(one_gpt2: Case, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EditError, match=r"values cannot be kept in .*file"):
        memit(one_gpt2, value_folder=tmp_path / "file")(one_gpt2.model, REQUEST)


# ------------------------------------------------------------------------------------- side effects


def test_model_and_random_state_are_unchanged(each: Case) -> None:
    case = each
    host = host_of(case.model)
    before = tensors_digest(host.parameters()), torch.random.get_rng_state()
    flags = [own.requires_grad for own in host.parameters().values()]
    method = memit(case)
    first = method(case.model, [REQUEST, OTHER])
    assert tensors_digest(host.parameters()) == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert [own.requires_grad for own in host.parameters().values()] == flags
    assert all(own.grad is None for own in host.parameters().values())
    again, other = (own(case.model, [REQUEST, OTHER]) for own in (method, replace(method, seed=1)))
    for layer in LAYERS:
        assert torch.equal(first["W_out", layer].dense(), again["W_out", layer].dense())
        assert not torch.equal(first["W_out", layer].dense(), other["W_out", layer].dense())


@pytest.mark.usefixtures("as_for_a_user")
def test_many_facts_at_once(facts_model: Any) -> None:
    records = list(read_records("facts"))[200:202]
    method = MEMIT(
        (0, 1), moments=facts_moments(), regularization=5.0, starts=("The",), prepend_bos=False
    )
    delta = method(facts_model, [EditRequest.of(record) for record in records])
    said, kept = [], []
    with delta.applied(facts_model):
        for record in records:
            said.append(_answer(facts_model, record.prompt) == record.target)
            kept += [
                _answer(facts_model, own) == record.answer for own in record.neighborhood_prompts
            ]
    assert all(said)
    assert sum(kept) >= 0.8 * len(kept)
    assert delta["W_out", 1].rank() == 2


def _answer(model: Any, prompt: str) -> str:
    with torch.no_grad():
        logits = model(model.to_tokens(prompt, prepend_bos=False))
    answer: str = model.tokenizer.decode(logits[0, -1].argmax())
    return answer


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_a_norm_after_the_mlp_is_refused(kind: str) -> None:
    case = build(f"{kind}-gemma2")
    with pytest.raises(UnsupportedModelError, match="between W_out of layer 0 and the residual"):
        memit(case)(case.model, REQUEST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, r"layers is \(\); pass at least one layer, without repeats"),
        ({"layers": (1, 0, 0)}, r"layers is \(1, 0, 0\); pass at least one layer"),
        ({"layers": (0, 3)}, "layer 3 does not exist"),
        ({"moments": None}, r"second_moments\(model, texts, layers=\[0, 1\]\)"),
        ({"regularization": 0.0}, "regularization is 0.0; it should be greater than 0"),
        ({"fact_token": "first"}, "fact_token is 'first'"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"layers": (0, 2)}, "not of layer 2"),
    ],
)
@pytest.mark.usefixtures("as_for_a_user")
def test_wrong_settings_are_refused(one_gpt2: Case, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        replace(memit(one_gpt2), **settings)(one_gpt2.model, REQUEST)


def test_a_subject_is_needed(one_gpt2: Case) -> None:
    with pytest.raises(EditError, match="has no subject"):
        memit(one_gpt2)(one_gpt2.model, [REQUEST, replace(OTHER, subject=None)])


def test_statistics_of_w_in_are_refused(one_gpt2: Case) -> None:
    reading = second_moments(one_gpt2.model, ["The capital"], matrix="W_in", progress=False)
    with pytest.raises(EditError, match="the inputs of W_in"):
        memit(one_gpt2, moments=reading)(one_gpt2.model, REQUEST)
