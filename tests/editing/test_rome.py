"""ROME against its formulas: the search, the written change, and what stays unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import HAS_HOOKED, Case, build, counting_mlps, relative_error
from slow_editing import (
    OTHER,
    REQUEST,
    contexts,
    key_at,
    output_at,
    packed,
    random_moments,
    search,
    w_out,
    with_moments,
)
from torch import Tensor

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.editing import EditRequest, facts_moments, second_moments
from backward_lens_tl.editing.fact_contexts import FactContexts, sampled_prefixes
from backward_lens_tl.editing.methods.rome import ROME
from backward_lens_tl.editing.requests import tokenize_request
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import host_of, resumption
from backward_lens_tl.models.checksums import tensors_digest

LAYER = 1
PREFIXES = ((4, 1), (6, 1))
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "lr": 0.4,
    "weight_decay": 1.0,
    "kl_factor": 0.7,
    "clamp": 50.0,
}
"""All terms have visible weights."""

EXACT = 1e-9
SOFT = 2e-5
"""Adam divides gradients by their size, so it magnifies float32 rounding of an RMS norm."""


def sampled(case: Case, seed: int = 0) -> tuple[str, ...]:
    lengths = [length for length, number in PREFIXES for _ in range(number)]
    return sampled_prefixes(host_of(case.model), [""] * len(lengths), lengths, seed)


def rome(case: Case, moments: Any = None, **settings: Any) -> ROME:
    own = with_moments(case, [LAYER], [random_moments(52)]) if moments is None else moments
    settings = {"prefixes": PREFIXES, "prepend_bos": False} | SETTINGS | settings
    return ROME(LAYER, moments=own, **settings)


def change(method: ROME, case: Case, *requests: EditRequest) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method(case.model, requests)["W_out", LAYER].dense()


def keys_of(case: Case, request: EditRequest, fact_token: str = "subject_last") -> Tensor:
    rows, places = contexts(case, request, sampled(case), fact_token, False)
    return torch.stack([key_at(case, LAYER, row, at) for row, at in zip(rows, places, strict=True)])


def values_of(case: Case, request: EditRequest) -> Tensor:
    rows, places = contexts(case, request, sampled(case), "subject_last", False)
    module = w_out(case, LAYER)
    return torch.stack(
        [output_at(case, module, row, at) for row, at in zip(rows, places, strict=True)]
    )


def delta_of(case: Case, **settings: Any) -> Tensor:
    key = (id(case), *sorted(settings.items()))
    if key not in _FOUND:
        module = w_out(case, LAYER)
        found = search(case, module, REQUEST, sampled(case), **(SETTINGS | settings))
        _FOUND[key] = case, found
    return _FOUND[key][1].clone()


_FOUND: dict[tuple[Any, ...], tuple[Case, Tensor]] = {}
"""Finished slow searches, with their cases (which must stay alive)."""


@pytest.fixture(
    params=("bridge-llama", "bridge-gemma2", "hooked-gpt2"),
    scope="module",
)
def each(request: pytest.FixtureRequest) -> Case:
    """Random models whose reference exposes the output of each matrix."""
    return build(request.param)


# ------------------------------------------------------------------------------- the written change


def test_the_bare_key_gives_the_value_of_a_slow_search(each: Case) -> None:
    dense = change(rome(each, key_mode="bare"), each, REQUEST)
    key, expected = keys_of(each, REQUEST)[0], delta_of(each)
    assert expected.norm() > 0.1
    assert relative_error(key @ dense, expected) < (SOFT if each.logits_in_float32 else EXACT)


def test_each_key_mode_keeps_its_guarantee(each: Case) -> None:
    bare, mean = keys_of(each, REQUEST)[0], keys_of(each, REQUEST).mean(0)
    values, delta = values_of(each, REQUEST), delta_of(each)
    close = SOFT if each.logits_in_float32 else EXACT
    of_mean = change(rome(each), each, REQUEST)
    published = change(rome(each, key_mode="rome"), each, REQUEST)
    wanted = values[0] + delta
    assert relative_error(values.mean(0) + mean @ of_mean, wanted) < close
    assert relative_error(values[0] + bare @ published, wanted) < close
    # Negative controls: neither holds for the other key.
    assert relative_error(values[0] + bare @ of_mean, wanted) > 100 * close
    assert relative_error(values.mean(0) + mean @ published, wanted) > 100 * close


def test_the_edited_model_writes_the_value(gpt2: Case) -> None:
    method = rome(gpt2, key_mode="bare")
    rows, places = contexts(gpt2, REQUEST, (), "subject_last", False)
    wanted = values_of(gpt2, REQUEST)[0] + delta_of(gpt2)
    name = f"blocks.{LAYER}.hook_mlp_out"
    with method(gpt2.model, REQUEST).applied(gpt2.model), torch.no_grad():
        _, cache = gpt2.model.run_with_cache(torch.tensor(rows[:1]))
    assert relative_error(cache[name][0, places[0]], wanted) < EXACT


@pytest.mark.parametrize("key_mode", ["mean", "bare"])
def test_other_text_is_changed_as_little_as_possible(one_gpt2: Case, key_mode: str) -> None:
    moments, wrong = random_moments(52), random_moments(52, seed=1)
    keys = keys_of(one_gpt2, REQUEST)
    key = keys.mean(0) if key_mode == "mean" else keys[0]
    method = rome(
        one_gpt2, with_moments(one_gpt2, [LAYER], [moments]), key_mode=key_mode, ridge=0.0
    )
    foreign = replace(method, moments=with_moments(one_gpt2, [LAYER], [wrong]))
    dense, other = change(method, one_gpt2, REQUEST), change(foreign, one_gpt2, REQUEST)
    # Both meet the constraint ...
    assert relative_error(key @ other, key @ dense) < EXACT
    # ... and the gradient 2 C dW of tr(dW^T C dW) is zero in all directions that satisfy it.
    along = torch.eye(52, dtype=torch.float64) - torch.outer(key, key) / (key @ key)

    def free_gradient(own: Tensor) -> float:
        return float((along @ moments @ own).norm() / (moments @ own).norm())

    assert free_gradient(dense) < 1e-10
    assert free_gradient(other) > 0.1
    assert torch.trace(other.T @ moments @ other) > 1.1 * torch.trace(dense.T @ moments @ dense)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_it_solves_the_optimality_system(one_gpt2: Case, ridge: float) -> None:
    """min tr(dW^T C dW) with k dW = r: one linear system with a multiplier per column."""
    moments = random_moments(52)
    method = rome(
        one_gpt2, with_moments(one_gpt2, [LAYER], [moments]), key_mode="bare", ridge=ridge
    )
    key, residual = keys_of(one_gpt2, REQUEST)[0], delta_of(one_gpt2)
    system = torch.zeros(53, 53, dtype=torch.float64)
    system[:52, :52] = moments + ridge * moments.diagonal().mean() * torch.eye(52)
    system[:52, 52] = system[52, :52] = key
    right = torch.zeros(53, len(residual), dtype=torch.float64)
    right[52] = residual
    expected = torch.linalg.inv(system) @ right
    assert relative_error(change(method, one_gpt2, REQUEST), expected[:52]) < 1e-8


def test_identity_moments_equal_no_moments(one_gpt2: Case) -> None:
    same = with_moments(one_gpt2, [LAYER], [torch.eye(52, dtype=torch.float64)])
    dense = change(rome(one_gpt2, same, ridge=0.3), one_gpt2, REQUEST)
    assert relative_error(change(rome(one_gpt2, "identity"), one_gpt2, REQUEST), dense) < 1e-12
    key, values = keys_of(one_gpt2, REQUEST).mean(0), values_of(one_gpt2, REQUEST)
    residual = values[0] + delta_of(one_gpt2) - values.mean(0)
    assert relative_error(dense, torch.outer(key, residual) / (key @ key)) < EXACT


def test_only_the_matrix_changes_with_rank_one(one_gpt2: Case) -> None:
    delta = rome(one_gpt2)(one_gpt2.model, REQUEST)
    assert [(own.matrix, own.layer) for own in delta] == [("W_out", LAYER)]
    own = delta["W_out", LAYER]
    assert own.is_low_rank
    assert own.rank() == 1
    assert own.bias is None
    below = replace(rome(one_gpt2), layer=LAYER - 3)(one_gpt2.model, REQUEST)
    assert torch.equal(below["W_out", LAYER].dense(), own.dense())


def test_later_requests_see_earlier_edits(gpt2: Case) -> None:
    method = rome(gpt2)
    both = method(gpt2.model, [REQUEST, OTHER])
    first = method(gpt2.model, REQUEST)
    prefixes = sampled(gpt2)
    assert both["W_out", LAYER].rank() == 2
    with first.applied(gpt2.model), pytest.MonkeyPatch.context() as patch:
        # The prefixes are sampled from the unedited model.
        module = "backward_lens_tl.editing.methods.fact_method"
        patch.setattr(f"{module}.sampled_prefixes", lambda *_: prefixes)
        second = method(gpt2.model, OTHER)
    summed = (first + second)["W_out", LAYER].dense()
    dense = both["W_out", LAYER].dense()
    assert relative_error(dense, summed) < 1e-12
    alone = method(gpt2.model, OTHER)
    assert relative_error(dense, (first + alone)["W_out", LAYER].dense()) > 1e-4


# --------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.0},
        {"kl_factor": 0.0},
        {"steps": 3},
        {"lr": 0.3},
        {"clamp": 0.2},
    ],
    ids=lambda own: next(iter(own)),
)
def test_every_setting_of_the_search_matters(one_gpt2: Case, settings: dict[str, Any]) -> None:
    key = keys_of(one_gpt2, REQUEST)[0]
    found = key @ change(rome(one_gpt2, key_mode="bare", **settings), one_gpt2, REQUEST)
    assert relative_error(found, delta_of(one_gpt2, **settings)) < EXACT
    assert relative_error(found, delta_of(one_gpt2)) > 1e-3


def test_the_clamp_is_a_multiple_of_the_value(one_gpt2: Case) -> None:
    key, value = keys_of(one_gpt2, REQUEST)[0], values_of(one_gpt2, REQUEST)[0]
    found = key @ change(rome(one_gpt2, key_mode="bare", clamp=0.2, steps=2), one_gpt2, REQUEST)
    assert float(found.norm()) == pytest.approx(0.2 * float(value.norm()), rel=1e-9)


def test_no_step_follows_the_last_evaluation_of_the_loss(one_gpt2: Case) -> None:
    key = keys_of(one_gpt2, REQUEST)[0]
    assert (key @ change(rome(one_gpt2, key_mode="bare", steps=1), one_gpt2, REQUEST)).norm() == 0


def test_the_layers_below_run_once_in_a_search(gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result, bit for bit, as passes of the whole model."""
    change(rome(gpt2), gpt2, REQUEST)  # probes the model
    ran = counting_mlps(gpt2.model, monkeypatch)

    def counts(**settings: Any) -> tuple[Tensor, list[int]]:
        ran.clear()
        found = change(rome(gpt2, **settings), gpt2, REQUEST)
        return found, [ran.count(layer) for layer in range(3)]

    _, few = counts(steps=4)
    _, many = counts(steps=9)
    assert [more - less for more, less in zip(many, few, strict=True)] == [0, 5, 5]
    resumed, _ = counts()
    monkeypatch.setattr(resumption, "can_start_at", lambda host, layer: False)
    whole, _ = counts()
    assert torch.equal(whole, resumed)
    _, slow = counts(steps=9)
    assert [more - less for more, less in zip(slow, many, strict=True)] == [8, 0, 0]


def test_a_fact_can_be_edited_at_the_last_token(one_gpt2: Case) -> None:
    key = keys_of(one_gpt2, REQUEST, "last")[0]
    found = key @ change(rome(one_gpt2, key_mode="bare", fact_token="last"), one_gpt2, REQUEST)
    assert relative_error(found, delta_of(one_gpt2, fact_token="last")) < EXACT


def test_without_a_subject_there_is_no_divergence(one_gpt2: Case) -> None:
    bare = replace(REQUEST, subject=None)
    key = keys_of(one_gpt2, REQUEST, "last")[0]
    method = rome(one_gpt2, key_mode="bare", fact_token="last")
    found = key @ change(method, one_gpt2, bare)
    assert relative_error(found, delta_of(one_gpt2, fact_token="last", kl_factor=0.0)) < EXACT
    assert relative_error(found, delta_of(one_gpt2, fact_token="last")) > 1e-3


def test_bos_precedes_all_texts(one_gpt2: Case) -> None:
    rows, places = contexts(one_gpt2, REQUEST, (), "subject_last", True)
    key = key_at(one_gpt2, LAYER, rows[0], places[0])
    found = key @ change(rome(one_gpt2, key_mode="bare", prepend_bos=True), one_gpt2, REQUEST)
    assert relative_error(found, delta_of(one_gpt2, bos=True)) < EXACT


def test_a_known_fact_needs_no_search(facts_model: Any) -> None:
    """Its loss is below 0.05 from the start."""
    record = _tuning_record()
    known = EditRequest(record.prompt, record.answer, record.subject)
    method = ROME(0, moments=facts_moments(), key_mode="bare", prefixes=(), prepend_bos=False)
    assert method(facts_model, known).norm == 0


def test_the_seed_determines_the_edit(one_gpt2: Case) -> None:
    method = rome(one_gpt2)
    dense = change(method, one_gpt2, REQUEST)
    assert torch.equal(change(method, one_gpt2, REQUEST), dense)
    assert relative_error(change(replace(method, seed=1), one_gpt2, REQUEST), dense) > 1e-3
    fewer = replace(method, prefixes=((4, 1),))
    assert relative_error(change(fewer, one_gpt2, REQUEST), dense) > 1e-3


# ---------------------------------------------------------------------------------- where it edits


@pytest.mark.parametrize("bos", [False, True])
def test_the_subject_is_found_after_a_prefix_that_names_it(one_gpt2: Case, bos: bool) -> None:
    host = host_of(one_gpt2.model)
    prefixes = ("Messi plays. ", "The dog of Messi is Messi.. ", "Messi")
    asked = tokenize_request(host, REQUEST, bos)
    found = FactContexts.of(host, asked, prefixes, "subject_last", bos)
    rows, places = contexts(one_gpt2, REQUEST, prefixes, "subject_last", bos)
    assert found.rows == tuple(map(tuple, rows))
    assert found.positions == tuple(places)
    assert len(set(places)) == 4


def test_another_occurrence_of_the_subject_can_be_chosen(gpt2: Case) -> None:
    host = host_of(gpt2.model)
    request = EditRequest("Messi plays for Messi Paris", " Rome", "Messi", subject_start=16)
    asked = tokenize_request(host, request, False)
    found = FactContexts.of(host, asked, ("The dog. ",), "subject_last", False)
    for row, at in zip(found.rows, found.positions, strict=True):
        assert host.vocabulary.decode(row[at + 1 :]) == " Paris"
        assert host.vocabulary.decode(row[: at + 1]).endswith("for Messi")


@pytest.mark.parametrize("fact_token", ["subject_last", "last"])
def test_positions_in_a_sentencepiece_tokenizer(stories: Case, fact_token: str) -> None:
    host = host_of(stories.model)
    request = EditRequest("One day Lily went to the park with", " Ben", "Lily")
    asked = tokenize_request(host, request, None)
    prefixes = ("Tom and Lily ran. ", "It was hot.. ")
    found = FactContexts.of(host, asked, prefixes, fact_token, None)
    ending = "Lily" if fact_token == "subject_last" else "Lily went to the park with"
    for prefix, row, at in zip(("", *prefixes), found.rows, found.positions, strict=True):
        text = host.vocabulary.decode(row[: at + 1])
        assert text.split() == f"{prefix}One day {ending}".split()
    assert found.essence is not None
    expected = "Lily" if fact_token == "subject_last" else "Lily is a"
    assert host.vocabulary.decode(found.essence).strip() == expected


# ------------------------------------------------------------------------------------- side effects


@contextmanager
def untouched(case: Case) -> Iterator[None]:
    host = host_of(case.model)
    before = tensors_digest(host.parameters()), torch.random.get_rng_state()
    flags = [own.requires_grad for own in host.parameters().values()]
    yield
    assert tensors_digest(host.parameters()) == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert [own.requires_grad for own in host.parameters().values()] == flags
    assert all(own.grad is None for own in host.parameters().values())


def test_model_and_random_state_are_unchanged(gpt2: Case) -> None:
    with untouched(gpt2):
        change(rome(gpt2), gpt2, REQUEST, OTHER)


def test_model_and_random_state_are_unchanged_after_an_interruption(gpt2: Case) -> None:
    host, calls = host_of(gpt2.model), []
    module = host.hook_points["blocks.2.hook_resid_post"].tap.module

    def give_up(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 14:  # in the search for the second request's value
            raise KeyboardInterrupt

    handle = module.register_forward_hook(give_up)
    try:
        with untouched(gpt2), pytest.raises(KeyboardInterrupt):
            change(rome(gpt2), gpt2, REQUEST, OTHER)
    finally:
        handle.remove()


def test_half_precision_searches_in_float32() -> None:
    case = build("hooked-gpt2" if HAS_HOOKED else "bridge-gpt2", torch.bfloat16)
    own = rome(case)(case.model, REQUEST)["W_out", LAYER]
    assert own.dense().dtype == torch.float32
    assert bool(own.dense().isfinite().all())
    assert own.norm > 0


# ------------------------------------------------------------------------------------ trained facts


def _tuning_record() -> Any:
    """A record that is not used for any published table."""
    return list(read_records("facts"))[200]


@pytest.mark.usefixtures("as_for_a_user")
def test_a_fact_is_edited_and_neighbors_are_not(facts_model: Any) -> None:
    few = ((5, 1), (10, 1))
    method = ROME(0, moments=facts_moments(), key_mode="bare", prefixes=few, prepend_bos=False)
    record = _tuning_record()
    with method(facts_model, EditRequest.of(record)).applied(facts_model):
        said = _answer(facts_model, record.prompt)
        kept = [_answer(facts_model, own) == record.answer for own in record.neighborhood_prompts]
    assert said == record.target
    assert sum(kept) >= 0.9 * len(kept) > 0


def _answer(model: Any, prompt: str) -> str:
    with torch.no_grad():
        logits = model(model.to_tokens(prompt, prepend_bos=False))
    answer: str = model.tokenizer.decode(logits[0, -1].argmax())
    return answer


# ------------------------------------------------------------------------------------------- errors


def test_a_key_that_hardly_responds_gives_a_warning(one_gpt2: Case) -> None:
    """Statistics under which the bare key is almost orthogonal to C^-1 times the mean key."""
    keys = keys_of(one_gpt2, REQUEST)
    bare, mean = keys[0], keys.mean(0)
    both = torch.stack((bare, mean))
    w = torch.linalg.pinv(both) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    inverse = torch.eye(52, dtype=torch.float64) + 0.999 * (bare @ mean) * torch.outer(w, w)
    assert bare @ mean > 0
    moments = with_moments(one_gpt2, [LAYER], [torch.linalg.inv(inverse)])
    with pytest.warns(UserWarning, match="may disable the model"):
        huge = rome(one_gpt2, moments, key_mode="rome", ridge=0.0)(one_gpt2.model, REQUEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = rome(one_gpt2, moments, ridge=0.0)(one_gpt2.model, REQUEST)
    assert huge.norm > 50 * usual.norm


@pytest.mark.usefixtures("as_for_a_user")
def test_prefixes_are_pairs_in_any_sequence(one_gpt2: Case) -> None:
    for prefixes in (((5, 10),), [(5, 10)], [[5, 10]], ([5, 10],)):
        assert rome(one_gpt2, prefixes=prefixes).prefixes == ((5, 10),)
    for prefixes in ((5, 10), [(5, 10, 1)], [(5, 1.5)], "ab"):
        with pytest.raises(EditError, match="prefixes is"):
            rome(one_gpt2, prefixes=prefixes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moments": None}, r"second_moments\(model, texts, layers=\[1\]\).*moments='identity'"),
        ({"moments": "none"}, "moments is 'none'"),
        ({"layer": 3}, "layer 3 does not exist"),
        ({"key_mode": "median"}, "key_mode is 'median'; it should be 'mean', 'bare' or 'rome'"),
        ({"fact_token": "first"}, "fact_token is 'first'"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0; it should be greater than 0"),
        ({"clamp": float("nan")}, "clamp is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it should be greater than or equal to 0"),
        ({"kl_factor": float("inf")}, "kl_factor is inf"),
        ({"ridge": -1e-3}, "ridge is -0.001"),
        ({"prepend_bos": 1}, "prepend_bos is 1"),
        ({"lr": 1e300}, "not finite|the loss is"),
    ],
)
@pytest.mark.usefixtures("as_for_a_user")
def test_wrong_settings_are_refused(one_gpt2: Case, settings: dict[str, Any], message: str) -> None:
    settings = {"weight_decay": 0.0, "clamp": 1e308} | settings
    with pytest.raises(EditError, match=message):
        replace(rome(one_gpt2), **settings)(one_gpt2.model, REQUEST)


def test_a_subject_is_needed_where_it_is_edited(one_gpt2: Case) -> None:
    with pytest.raises(EditError, match=r"has no subject.*fact_token='last'"):
        rome(one_gpt2)(one_gpt2.model, replace(REQUEST, subject=None))
    with pytest.raises(EditError, match="'Ronaldo' is not in the prompt"):
        rome(one_gpt2)(one_gpt2.model, replace(REQUEST, subject="Ronaldo"))


def test_prompts_with_prefixes_must_fit_into_the_context(one_gpt2: Case) -> None:
    long = replace(REQUEST, prompt=REQUEST.prompt + " the" * 55)
    with pytest.raises(EditError, match="the model's context holds 64"):
        rome(one_gpt2)(one_gpt2.model, long)


def test_foreign_statistics_are_refused(one_gpt2: Case, as_for_a_user: None) -> None:
    texts = ["The capital of France", "Rome is in Italy"]
    reading = second_moments(one_gpt2.model, texts, matrix="W_in", progress=False)
    elsewhere = second_moments(one_gpt2.model, texts, layers=[0], progress=False)
    few = second_moments(one_gpt2.model, texts, progress=False)
    with pytest.raises(EditError, match=r"moments is 3; pass .*second_moments\(model"):
        rome(one_gpt2, 3)(one_gpt2.model, REQUEST)
    with pytest.raises(EditError, match="the inputs of W_in, but W_out is edited"):
        rome(one_gpt2, reading)(one_gpt2.model, REQUEST)
    with pytest.raises(EditError, match="not of layer 1"):
        rome(one_gpt2, elsewhere)(one_gpt2.model, REQUEST)
    with pytest.raises(EditError, match="another model"):
        rome(one_gpt2, facts_moments())(one_gpt2.model, REQUEST)
    with pytest.raises(EditError, match="dimensions need more"):
        rome(one_gpt2, few, ridge=0.0)(one_gpt2.model, REQUEST)
    assert packed(few.of(1)).shape == few.moments[1].shape
