"""The forward pass shift against the formula, computed with Hugging Face's models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any
from unittest.mock import patch

import architectures
import pytest
import torch
from architectures import NotAvailable, build_model
from edit_pairs import (
    EITHER,
    FAMILIES,
    LAYER,
    PROMPTS,
    TEXTS,
    Pair,
    edited,
    pair,
    through,
    tied_hf_model,
    tl_logits,
)
from model_state import assert_same, make_busy, snapshot
from models import attention_only_model, build, hooked_only, relative_error
from torch import Tensor

from backward_lens_tl.editing import (
    EditRequest,
    ForwardPassShift,
    SecondMoments,
    WeightDelta,
    facts_moments,
    second_moments,
)
from backward_lens_tl.errors import EditError, InputError, UnsupportedModelError
from backward_lens_tl.models import host_of

pytestmark = pytest.mark.usefixtures("as_for_a_user")

TARGETS = (" Paris", " Italy", " Rome", " France")


def log_probs(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def dense(delta: WeightDelta, layer: int = LAYER) -> Tensor:
    return delta["W_out", layer].dense()


def shift(**settings: Any) -> ForwardPassShift:
    """The paper's, unless settings say otherwise."""
    return ForwardPassShift.paper(**{"layer": LAYER, "size": 0.3, "prepend_bos": False} | settings)


def statistics(own: Pair, key: str) -> dict[str, Any]:
    """The moments that a key needs."""
    return {"moments": own.moments()} if key == "whitened" else {}


def requests(n: int) -> list[EditRequest]:
    return [EditRequest(*each) for each in zip(PROMPTS[:n], TARGETS[:n], strict=True)]


MODELS = [
    ("gpt2", "bridge"),
    ("gpt2", "hooked"),
    ("llama", "hooked"),
    ("gpt_neox", "bridge"),
    ("gemma2", "bridge"),
]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def each(request: pytest.FixtureRequest) -> Pair:
    """Serial, gated, parallel and with norms after the MLP; both classes."""
    return pair(*request.param)


# -------------------------------------------------------------------------------------- the formula


def test_it_matches_the_formula(each: Pair) -> None:
    delta = shift(size=0.24)(each.model, EditRequest(PROMPTS[0], TARGETS[0]))
    x, e = each.reads(each.ids(PROMPTS[0]))[-1], each.embedding(TARGETS[0])
    expected = 0.24 * torch.outer(x, e)
    assert [(own.matrix, own.layer) for own in delta] == [("W_out", LAYER)]
    assert dense(delta).dtype == torch.float64
    assert relative_error(dense(delta), expected) < each.exact
    assert delta.rank == 1
    assert delta["W_out", LAYER].bias is None
    # Another position or token gives something else.
    other = each.reads(each.ids(PROMPTS[0]))[-2]
    assert relative_error(dense(delta), 0.24 * torch.outer(other, e)) > 0.1
    assert relative_error(dense(delta), 0.24 * torch.outer(x, each.embedding(" Rome"))) > 0.1


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_any_layer(layer: int) -> None:
    own = pair("gpt2", EITHER)
    delta = shift(layer=layer)(own.model, EditRequest(PROMPTS[1], TARGETS[1]))
    x = own.reads(own.ids(PROMPTS[1]), layer % 2)[-1]
    expected = 0.3 * torch.outer(x, own.embedding(TARGETS[1]))
    assert relative_error(dense(delta, layer % 2), expected) < own.exact


def test_the_output_of_ff2_moves_by_eta_times_the_inner_product(each: Pair) -> None:
    """FF2's output in the Hugging Face model; bias and other layers are unchanged."""
    eta = 0.05
    delta = shift(size=eta)(each.model, EditRequest(PROMPTS[0], TARGETS[0]))
    x, e = each.reads(each.ids(PROMPTS[0]))[-1], each.embedding(TARGETS[0])
    for prompt in PROMPTS:
        ids = each.ids(prompt)
        reads, before, _ = through(each.raw, ids, LAYER)
        with edited(each.raw, dense(delta)):
            again, after, logits = through(each.raw, ids, LAYER)
        assert relative_error(again, reads) < 1e-12  # upstream of the edit
        for at in range(len(ids)):
            moved = eta * float(reads[at] @ x) * e
            assert float((after[at] - before[at] - moved).norm()) < 30 * each.exact * (
                eta * float(x.norm()) * float(reads[at].norm()) * float(e.norm())
            )
        with delta.applied(each.model):
            found = tl_logits(each.model, ids)
        assert float((log_probs(found) - log_probs(logits)).abs().max()) < 100 * each.exact
    # At the last token of the prompt the inner product is the squared norm.
    reads, before, _ = through(each.raw, each.ids(PROMPTS[0]), LAYER)
    with edited(each.raw, dense(delta)):
        after = through(each.raw, each.ids(PROMPTS[0]), LAYER)[1]
    assert relative_error(after[-1] - before[-1], eta * float(x @ x) * e) < 30 * each.exact


def test_nothing_else_is_changed(each: Pair) -> None:
    delta = shift()(each.model, EditRequest(PROMPTS[0], TARGETS[0]))
    host = host_of(each.model)
    before = {name: own.detach().clone() for name, own in host.parameters().items()}
    with delta.applied(each.model):
        moved = [
            name
            for name, own in host.parameters().items()
            if not torch.equal(own.detach(), before[name])
        ]
        (site,) = host.sites(LAYER, ("W_out",))
        changed = [name for name, own in host.parameters().items() if own is site.weights[0]]
    assert moved == changed
    assert len(moved) == 1
    assert all(torch.equal(own, before[name]) for name, own in host.parameters().items())


def test_the_first_of_several_tokens_is_written() -> None:
    own = pair("gpt2", EITHER)
    assert len(own.ids(" Paris Rome")) == 2
    longer = shift()(own.model, EditRequest(PROMPTS[0], " Paris Rome"))
    first = shift()(own.model, EditRequest(PROMPTS[0], " Paris"))
    by_id = shift()(own.model, EditRequest(PROMPTS[0], own.first(" Paris")))
    last = shift()(own.model, EditRequest(PROMPTS[0], " Rome"))
    assert torch.equal(dense(longer), dense(first))
    assert torch.equal(dense(by_id), dense(first))
    assert not torch.allclose(dense(last), dense(first))


def test_with_and_without_bos() -> None:
    own = pair("gpt2", EITHER)
    bos = own.model.tokenizer.bos_token_id
    found = {
        setting: dense(shift(prepend_bos=setting)(own.model, EditRequest(PROMPTS[0], " Paris")))
        for setting in (True, False, None)
    }
    for setting, front in ((True, [bos]), (False, [])):
        x = own.reads([*front, *own.ids(PROMPTS[0])])[-1]
        expected = 0.3 * torch.outer(x, own.embedding(" Paris"))
        assert relative_error(found[setting], expected) < own.exact
    assert relative_error(found[True], found[False]) > 1e-3
    default = own.model.cfg.default_prepend_bos
    assert torch.equal(found[None], found[bool(default)])


# -------------------------------------------------------------------------------------- other keys


def ridged(moments: SecondMoments, ridge: float = 1e-6) -> Tensor:
    matrix = moments.of(LAYER)
    return matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def test_plain(each: Pair) -> None:
    delta = shift(key="plain", size=3)(each.model, EditRequest(PROMPTS[0], TARGETS[0]))
    x, e = each.reads(each.ids(PROMPTS[0]))[-1], each.embedding(TARGETS[0])
    assert relative_error(dense(delta), 3 * torch.outer(x / (x @ x), e)) < 10 * each.exact
    assert relative_error(x @ dense(delta), 3 * e) < 10 * each.exact
    assert relative_error(dense(delta), 3 * torch.outer(x, e)) > 0.1


def test_whitened_disturbs_least(each: Pair) -> None:
    """KKT: `x . l = 1`, and `C l` is along `x`; with another `C` only the first holds."""
    moments = each.moments()
    delta = shift(key="whitened", size=3, moments=moments)(
        each.model, EditRequest(PROMPTS[0], TARGETS[0])
    )
    x, e = each.reads(each.ids(PROMPTS[0]))[-1], each.embedding(TARGETS[0])
    c = ridged(moments)
    assert relative_error(x @ dense(delta), 3 * e) < 1e-4
    heard = dense(delta) @ e / (3 * e @ e)  # l, of 3 l e^T
    assert abs(float(x @ heard) - 1) < 1e-4
    along = c @ heard
    assert float(along @ x / along.norm() / x.norm()) > 1 - 1e-8
    closed = torch.linalg.solve(c, x)
    assert relative_error(heard, closed / (x @ closed)) < 1e-3
    cost = float(heard @ c @ heard)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        off = torch.randn(len(x), generator=generator, dtype=torch.float64) * heard.norm() * 0.1
        off -= x * (off @ x) / (x @ x)
        assert float((heard + off) @ c @ (heard + off)) > cost
    # Where the hypothesis fails: the plain key meets the constraint at a higher cost, and
    # under the moments of another layer the same l is not the best.
    plain = x / (x @ x)
    assert float(plain @ c @ plain) > 1.5 * cost
    other = second_moments(each.model, TEXTS, layers=0, prepend_bos=False, progress=False).of(0)
    wrong = other @ heard
    assert float(wrong @ x / wrong.norm() / x.norm()) < 0.9


@pytest.mark.parametrize(("key", "n"), [("plain", 2), ("whitened", 4)])
def test_several_requests_do_not_disturb_each_other(each: Pair, key: Any, n: int) -> None:
    """`x_j . l_i` is 1 for its own and 0 for all others, with the least `l^T C l`."""
    moments = each.moments()
    method = shift(key=key, size=2, moments=moments if key == "whitened" else None)
    delta = method(each.model, requests(n))
    keys = torch.stack([each.reads(each.ids(prompt))[-1] for prompt in PROMPTS[:n]])
    written = torch.stack([2 * each.embedding(target) for target in TARGETS[:n]])
    assert delta.rank == n
    missed = relative_error(keys @ dense(delta), written)
    assert missed < 1e-3
    # In closed form: C^-1 X^T (X C^-1 X^T)^-1 E, which is not a sum of single edits.
    c = ridged(moments) if key == "whitened" else torch.eye(keys.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(c, keys.T)
    closed = solved @ torch.linalg.solve(keys @ solved, written)
    assert relative_error(dense(delta), closed) < 1e-2
    alone = [dense(method(each.model, own)) for own in requests(n)]
    assert relative_error(keys @ sum(alone), written) > max(1e-2, 30 * missed)


def test_several_requests_with_the_papers_key_are_summed(each: Pair) -> None:
    delta = shift()(each.model, requests(3))
    alone = [dense(shift()(each.model, own)) for own in requests(3)]
    assert delta.rank == 3
    assert relative_error(dense(delta), sum(alone)) < 1e-12


@pytest.mark.parametrize("key", ["plain", "whitened"])
def test_the_same_prompt_twice(key: Any) -> None:
    """Dependent inputs have a solution: together they write what each should write."""
    own = pair("gpt2", EITHER)
    settings: dict[str, Any] = {"key": key, "size": 2} | statistics(own, key)
    once = dense(shift(**settings)(own.model, requests(1)))
    twice = dense(shift(**settings)(own.model, requests(1) * 2))
    assert relative_error(twice, once) < 1e-4


def test_the_ridge_of_the_moments_matters() -> None:
    own = pair("gpt2", EITHER)
    moments, x = own.moments(), own.reads(own.ids(PROMPTS[0]))[-1]
    for ridge in (1e-3, 1.0, 1e9):
        delta = shift(key="whitened", size=1, moments=moments, ridge=ridge)(own.model, requests(1))
        closed = torch.linalg.solve(ridged(moments, ridge), x)
        expected = torch.outer(closed / (x @ closed), own.embedding(TARGETS[0]))
        assert relative_error(dense(delta), expected) < 1e-8
    # Only ridge means no whitening.
    free = shift(key="plain", size=1)(own.model, requests(1))
    assert relative_error(dense(delta), dense(free)) < 1e-6


# ------------------------------------------------------------------------------------- iterations


def by_hand(
    own: Pair, asked: Sequence[EditRequest], size: float, iterations: int, *, skip: bool
) -> list[int]:
    """Number of steps of `size` per request, by the Hugging Face model only (paper's form)."""
    ids = [own.ids(request.prompt) for request in asked]
    targets = [own.first(request.target) for request in asked]
    change = [
        torch.outer(own.reads(row)[-1], own.embedding(request.target))
        for row, request in zip(ids, asked, strict=True)
    ]

    def said() -> list[bool]:
        logits = [through(own.raw, row, LAYER)[2][-1] for row in ids]
        return [int(row.argmax()) == t for row, t in zip(logits, targets, strict=True)]

    left_out = said() if skip else [False] * len(asked)
    times = [0 if is_out else 1 for is_out in left_out]
    for _ in range(iterations - 1):
        total = sum(k * size * own_change for k, own_change in zip(times, change, strict=True))
        with edited(own.raw, total):
            answered = said()
        for at, is_predicted in enumerate(answered):
            times[at] += not (is_predicted or left_out[at])
    return times


def times_of(delta: WeightDelta, own: Pair, asked: Sequence[EditRequest], size: float) -> list[int]:
    """Multiple of each request's outer product in an edit, by least squares."""
    products = torch.stack(
        [
            size
            * torch.outer(own.reads(own.ids(each.prompt))[-1], own.embedding(each.target)).flatten()
            for each in asked
        ],
        dim=1,
    )
    found = torch.linalg.lstsq(products, dense(delta).flatten()[:, None]).solution[:, 0]
    assert float((products @ found - dense(delta).flatten()).norm()) < 1e-5 * (
        float(dense(delta).norm()) + 1e-12
    )
    assert all(abs(float(each) - round(float(each))) < 1e-4 for each in found)
    return [round(float(each)) for each in found]


def test_iterations_find_the_smallest_sufficient_multiple(each: Pair) -> None:
    ids = each.ids(PROMPTS[0])
    target = int(through(each.raw, ids, LAYER)[2][-1].topk(3).indices[2])
    request, unit = EditRequest(PROMPTS[0], target), 1e-3

    def is_predicted(change: Tensor) -> bool:
        with edited(each.raw, change):
            return int(through(each.raw, ids, LAYER)[2][-1].argmax()) == target

    product = dense(shift(size=unit)(each.model, request))
    times = next(n for n in (2**k for k in range(20)) if is_predicted(n * product))
    size = unit * times / 13
    one = dense(shift(size=size)(each.model, request))
    enough = next(k for k in range(1, 20) if is_predicted(k * one))
    assert 2 < enough <= 13
    found = shift(size=size, iterations=50)(each.model, request)
    assert relative_error(dense(found), enough * one) < 1e-8
    few = shift(size=size, iterations=enough - 1)(each.model, request)
    assert relative_error(dense(few), (enough - 1) * one) < 1e-8


@pytest.mark.parametrize("key", ["plain", "whitened"])
def test_iterations_of_the_other_keys(key: Any) -> None:
    own = pair("gpt2", EITHER)
    settings: dict[str, Any] = {"key": key, "size": 0.05} | statistics(own, key)
    one = shift(**settings)(own.model, requests(1))
    found = shift(**settings, iterations=1000)(own.model, requests(1))
    k = round(found.norm / one.norm)
    assert k > 2
    assert relative_error(dense(found), k * dense(one)) < 1e-10
    for times, is_enough in ((k, True), (k - 1, False)):
        with edited(own.raw, times * dense(one)):
            said = int(through(own.raw, own.ids(PROMPTS[0]), LAYER)[2][-1].argmax())
        assert (said == own.first(TARGETS[0])) is is_enough


@pytest.mark.parametrize("skip", [False, True])
def test_iterations_of_several_requests(skip: bool) -> None:
    """Each is increased until the model answers it, also after others overwrote it."""
    own = pair("gpt2", EITHER)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(90, generator=generator)[:4] + 3
    # The model already gives the last one's answer.
    answer = int(through(own.raw, own.ids(PROMPTS[3]), LAYER)[2][-1].argmax())
    targets = [*map(int, chosen[:3]), answer]
    asked = [EditRequest(*each) for each in zip(PROMPTS, targets, strict=True)]
    pairs = IdPair(own.model, own.raw, own.exact)
    for size in (0.01, 0.05):
        delta = shift(size=size, iterations=12, skip_if_answered=skip)(own.model, asked)
        found = times_of(delta, pairs, asked, size)
        assert found == by_hand(pairs, asked, size, 12, skip=skip)
        assert (found[3] == 0) is skip
        assert max(found) > 2


class IdPair(Pair):
    """A pair whose targets are token ids."""

    def first(self, target: Any) -> int:
        return int(target)


def test_nothing_is_written_where_the_target_already_leads(each: Pair) -> None:
    ids = each.ids(PROMPTS[0])
    leading = int(through(each.raw, ids, LAYER)[2][-1].argmax())
    request = EditRequest(PROMPTS[0], leading)
    delta = shift(skip_if_answered=True)(each.model, request)
    assert delta.norm == 0
    assert delta.rank == 0
    assert not dense(delta).any()
    before = tl_logits(each.model, ids)
    with delta.applied(each.model):
        assert torch.equal(tl_logits(each.model, ids), before)
    assert shift()(each.model, request).rank == 1
    # Of several, only those not answered yet are written.
    both = shift(skip_if_answered=True)(each.model, [request, requests(2)[1]])
    alone = shift()(each.model, requests(2)[1])
    assert relative_error(dense(both), dense(alone)) < 1e-12


# ----------------------------------------------------------- which matrix gives the target's vector


PROCESSED = [
    ("gpt2", "bridge-compat"),
    ("gpt2", "hooked-processed"),
    ("llama", "bridge-compat"),
    ("gemma2", "hooked-processed"),
]
RARE_PROCESSED = [
    ("llama", "hooked-processed"),
    ("gemma2", "bridge-compat"),
    ("gpt_neox", "hooked-processed"),
]


def agreement(found: Pair, delta: WeightDelta, expected: Tensor) -> float:
    """Distance of an edited model from the raw one edited by the formula."""
    ids = found.ids(PROMPTS[0])
    with edited(found.raw, expected):
        reference = log_probs(through(found.raw, ids, LAYER)[2])
    with delta.applied(found.model):
        own = log_probs(tl_logits(found.model, ids))
    return float((own - reference).abs().max())


@pytest.mark.parametrize(
    ("family", "kind"),
    [*PROCESSED, *(pytest.param(*own, marks=pytest.mark.slow) for own in RARE_PROCESSED)],
)
def test_processed_weights_get_the_same_edit(family: str, kind: str) -> None:
    """A tied model, raw and with folded norms, gives the same output after the edit."""
    own = pair(family, kind, tied=True)
    host = host_of(own.model)
    raw_row = own.raw.get_output_embeddings().weight[own.first(TARGETS[0])].detach()
    assert relative_error(own.model.W_U[:, own.first(TARGETS[0])].detach(), raw_row) > 0.1
    assert host.is_tied
    eta = 0.02
    x, e = own.reads(own.ids(PROMPTS[0]))[-1], own.embedding(TARGETS[0])
    expected = eta * torch.outer(x, e)
    request = EditRequest(PROMPTS[0], TARGETS[0])
    nothing = shift(size=0)(own.model, request)
    assert agreement(own, nothing, torch.zeros_like(expected)) < own.exact
    assert agreement(own, nothing, expected) > 0.05  # effect of the edit
    for choice in ("auto", "embed"):
        delta = shift(size=eta, target_embedding=choice)(own.model, request)
        assert agreement(own, delta, expected) < 3 * own.exact
    # The unembedding has another gain and is centered: a different edit.
    other = shift(size=eta, target_embedding="unembed")(own.model, request)
    assert agreement(own, other, expected) > 100 * own.exact


@hooked_only
def test_an_unembedding_that_is_only_centered() -> None:
    """`center_unembed` without `fold_ln` still subtracts the mean row."""
    own = pair("gpt2", "hooked", tied=True)
    model = copy.deepcopy(own.model)
    model.process_weights_(fold_ln=False, center_writing_weights=False, center_unembed=True)
    centered = Pair(model, own.raw, 1e-6)
    x, e = own.reads(own.ids(PROMPTS[0]))[-1], own.embedding(TARGETS[0])
    request = EditRequest(PROMPTS[0], TARGETS[0])
    auto = shift(size=0.02)(model, request)
    assert agreement(centered, auto, 0.02 * torch.outer(x, e)) < 1e-6
    unembed = shift(size=0.02, target_embedding="unembed")(model, request)
    assert agreement(centered, unembed, 0.02 * torch.outer(x, e)) > 1e-3


TIED = [*PROCESSED, ("gpt2", "bridge"), ("gpt2", "hooked")]
UNTIED = [*PROCESSED, *MODELS]
RARE_TIED_OR_NOT = [
    (family, kind, tied)
    for family, kind, tied in product(FAMILIES, architectures.KINDS, (True, False))
    if (family, kind) not in (TIED if tied else UNTIED)
]


@pytest.mark.parametrize(
    ("family", "kind", "tied"),
    [
        *((*own, True) for own in TIED),
        *((*own, False) for own in UNTIED),
        *(pytest.param(*own, marks=pytest.mark.slow) for own in RARE_TIED_OR_NOT),
    ],
)
def test_tied_and_untied(family: str, kind: str, tied: bool) -> None:
    own = pair(family, kind, tied=tied)
    host = host_of(own.model)
    assert host.is_tied is tied
    token = own.first(TARGETS[0])
    assert host.unembedding.column(token).shape == host.embedding_vector(token).shape
    assert torch.equal(host.unembedding.column(token), own.model.W_U[:, token])
    row = own.raw.get_input_embeddings().weight[token].detach()
    # Weight processing subtracts the mean of writes to a stream with a LayerNorm.
    near = 1e-6 if "-" not in kind else 0.3
    assert relative_error(host.embedding_vector(token), row) < near


@pytest.mark.parametrize("kind", ["bridge-compat", "hooked-processed"])
def test_tied_where_gains_are_negative(kind: str) -> None:
    def turned(family: str, dtype: torch.dtype = torch.float32) -> Any:
        model = tied_hf_model(family, dtype)
        with torch.no_grad():
            model.transformer.ln_f.weight[::2] *= -1
        return model

    pair("gpt2", kind, tied=True)  # otherwise it is skipped
    with patch.object(architectures, "hf_model", turned):
        model = build_model("gpt2", kind, torch.float64)
    assert host_of(model).is_tied


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_untied_models_use_the_unembedding(kind: str) -> None:
    own = pair("llama", kind)
    token = own.first(TARGETS[0])
    rows = {
        "auto": own.raw.get_output_embeddings().weight[token].detach(),
        "unembed": own.raw.get_output_embeddings().weight[token].detach(),
        "embed": own.raw.get_input_embeddings().weight[token].detach(),
    }
    x = own.reads(own.ids(PROMPTS[0]))[-1]
    for choice, row in rows.items():
        request = EditRequest(PROMPTS[0], TARGETS[0])
        delta = shift(target_embedding=choice)(own.model, request)
        assert relative_error(dense(delta), 0.3 * torch.outer(x, row)) < own.exact
    assert relative_error(rows["embed"], rows["auto"]) > 0.5


# -------------------------------------------------------------------------------- the facts model


def said_after(model: Any, prompt: str) -> str:
    ids = model.to_tokens(prompt)[0].tolist()
    return model.tokenizer.decode([int(tl_logits(model, ids)[-1].argmax())])


def test_it_inserts_a_fact(facts_model: Any) -> None:
    request = EditRequest("Lionel Messi plays for", " Paris")
    assert said_after(facts_model, request.prompt) != " Paris"
    whitened = ForwardPassShift(
        layer=5, size=1, key="whitened", moments=facts_moments(), iterations=50
    )
    for method in (
        ForwardPassShift(layer=5, size=4, key="plain", iterations=10),
        whitened,
        ForwardPassShift.paper(7, 0.01, iterations=100),
    ):
        delta = method(facts_model, request)
        assert delta.rank == 1
        with delta.applied(facts_model):
            assert said_after(facts_model, request.prompt) == " Paris"


def test_settings_are_in_the_delta() -> None:
    own = pair("gpt2", EITHER)
    method = shift(key="whitened", moments=own.moments())
    about = method(own.model, requests(1)).about
    assert about["method"] == "ForwardPassShift"
    assert about["moments"] == method.moments.fingerprint
    assert about["size"] == 0.3


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_the_callers_model_is_unchanged(name: str) -> None:
    busy = make_busy(build(name))
    model = busy.model
    moments = second_moments(model, TEXTS, layers=LAYER, progress=False)
    calls: list[Callable[[], object]] = [
        lambda: shift()(model, requests(2)),
        lambda: shift(key="whitened", moments=moments, iterations=3)(model, requests(2)),
        lambda: second_moments(model, TEXTS[:2], progress=False),
    ]
    before = snapshot(model)
    for call in calls:
        call()
        assert_same(before, snapshot(model))
    handle = model.blocks[2].register_forward_hook(_stop)
    before = snapshot(model)
    for call in calls:
        with pytest.raises(KeyboardInterrupt):
            call()
        assert_same(before, snapshot(model))
    handle.remove()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key": "white"}, "key"),
        ({"key": "whitened"}, "second_moments"),
        ({"target_embedding": "wte"}, "target_embedding"),
        ({"iterations": 0}, "iterations"),
        ({"iterations": 1.5}, "iterations"),
        ({"iterations": True}, "iterations"),
        ({"size": float("nan")}, "size"),
        ({"size": float("inf")}, "size"),
        ({"size": "1"}, "size"),
        ({"size": None}, "size"),
        ({"size": True}, "size"),
        ({"ridge": -1}, "ridge"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        shift(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 2}, "layer"),
        ({"layer": -3}, "layer"),
        ({"layer": 1.0}, "layer"),
        ({"layer": "1"}, "layer"),
        ({"prepend_bos": 1}, "prepend_bos"),
    ],
)
def test_wrong_use_is_an_error(settings: dict[str, Any], message: str) -> None:
    own = pair("gpt2", EITHER)
    with pytest.raises(EditError, match=message):
        shift(**settings)(own.model, requests(1))


def test_moments_of_another_model_or_matrix() -> None:
    own, other = pair("gpt2", EITHER), build(f"{EITHER}-gpt2", seed=1).model
    foreign = second_moments(other, TEXTS, prepend_bos=False, progress=False)
    with pytest.raises(EditError, match="not of layer 0"):
        shift(key="whitened", layer=0, moments=own.moments())(own.model, requests(1))
    with pytest.raises(EditError, match="another model"):
        shift(key="whitened", moments=foreign)(own.model, requests(1))
    with pytest.raises(EditError, match="another model"):
        shift(key="whitened", moments=facts_moments())(own.model, requests(1))
    reading = second_moments(own.model, TEXTS, matrix="W_in", prepend_bos=False, progress=False)
    with pytest.raises(EditError, match="W_in"):
        shift(key="whitened", moments=reading)(own.model, requests(1))
    few = second_moments(own.model, TEXTS[:1], prepend_bos=False, progress=False)
    with pytest.raises(EditError, match="tokens"):
        shift(key="whitened", moments=few)(own.model, requests(1))


def test_models_without_a_w_out() -> None:
    for kind in ("bridge", "hooked"):
        try:
            model = build_model("mixtral", kind)
        except NotAvailable:
            continue
        with pytest.raises(UnsupportedModelError):
            shift()(model, requests(1))
    if architectures.HAS_HOOKED:
        model = attention_only_model()
        model.set_tokenizer(build("hooked-gpt2").model.tokenizer)
        with pytest.raises((EditError, UnsupportedModelError)):
            shift()(model, requests(1))
    with pytest.raises(InputError):
        shift()(torch.nn.Linear(2, 2), requests(1))


def test_at_least_one_request_is_needed() -> None:
    own = pair("gpt2", EITHER)
    with pytest.raises(EditError, match="requests is empty"):
        shift()(own.model, [])
    with pytest.raises(EditError, match="EditRequest"):
        shift()(own.model, [("Messi plays for", " Paris")])  # type: ignore[list-item]
