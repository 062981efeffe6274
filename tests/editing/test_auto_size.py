"""`size="auto"` against a bisection with the raw Hugging Face model, in float64."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from edit_pairs import EITHER, LAYER, PROMPTS, TEXTS, Pair, edited, pair, through, tl_logits
from models import relative_error
from torch import Tensor

from backward_lens_tl.editing import (
    EditOutcome,
    EditRequest,
    ForwardPassShift,
    WeightDelta,
    second_moments,
)
from backward_lens_tl.editing.shift import sizes
from backward_lens_tl.editing.shift.cells import Standing
from backward_lens_tl.editing.shift.sizes import Sized
from backward_lens_tl.errors import BackwardLensWarning, EditError

pytestmark = pytest.mark.usefixtures("as_for_a_user")

MODELS = [
    ("gpt2", "bridge"),
    ("gpt2", "hooked"),
    ("llama", "hooked"),
    ("gpt_neox", "bridge"),
    ("gemma2", "bridge"),  # a norm after the MLP, and a softcap
]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def each(request: pytest.FixtureRequest) -> Pair:
    return pair(*request.param)


def shift(**settings: Any) -> ForwardPassShift:
    return ForwardPassShift(**{"layer": LAYER, "prepend_bos": False} | settings)


def dense(delta: WeightDelta) -> Tensor:
    return delta["W_out", LAYER].dense()


def margins(own: Pair, change: Tensor, prompt: str, target: list[int]) -> list[float]:
    """Margin of each token of a target, read after those before it, in the raw model."""
    ids = own.ids(prompt)
    with edited(own.raw, change):
        logits = through(own.raw, [*ids, *target[:-1]], LAYER)[2][len(ids) - 1 :]
    found = []
    for row, token in zip(logits, target, strict=True):
        others = torch.cat([row[:token], row[token + 1 :]])
        found.append(float(row[token] - others.max()))
    return found


def unchanged(own: Pair) -> Tensor:
    return torch.zeros(own.model.cfg.d_mlp, own.model.cfg.d_model, dtype=torch.float64)


def third_token(own: Pair, prompt: str) -> int:
    """A token that does not lead, but may with an edit of any layer."""
    return int(through(own.raw, own.ids(prompt), LAYER)[2][-1].topk(3).indices[2])


def least(own: Pair, one: Tensor, prompt: str, target: list[int]) -> float:
    """The least multiple of a change with which the target leads, by bisection."""
    low, high = 0.0, 1e-6
    while min(margins(own, high * one, prompt, target)) <= 0:
        low, high = high, 2 * high
        assert high < 1e9
    for _ in range(60):
        middle = (low + high) / 2
        if min(margins(own, middle * one, prompt, target)) > 0:
            high = middle
        else:
            low = middle
    return high


@pytest.mark.parametrize("key", ["plain", "whitened", "paper"])
def test_it_is_a_multiple_of_the_least_size(each: Pair, key: Any) -> None:
    """Within 3 % in six forward passes, for every kind of model, both classes."""
    target = third_token(each, PROMPTS[0])
    request = EditRequest(PROMPTS[0], target)
    settings: dict[str, Any] = {"key": key}
    if key == "whitened":
        settings["moments"] = each.moments()
    one = dense(shift(**settings, size=1.0)(each.model, request))
    expected = least(each, one, PROMPTS[0], [target])
    for margin in (None, 1, 2.0):
        delta = shift(**settings, margin=margin)(each.model, request)
        [outcome] = delta.outcomes
        factor = max(margin or 1.1, 1.01)
        assert 0.97 < outcome.size / (factor * expected) < 1.03
        assert relative_error(dense(delta), outcome.size * one) < 1e-6
        [measured] = margins(each, dense(delta), PROMPTS[0], [target])
        assert outcome.margin == pytest.approx(measured, rel=1e-3, abs=1e-4)
        assert outcome.margin > 0
        assert (outcome.rank, outcome.is_reached) == (0, True)
        assert 2 <= delta.about["forward_passes"] <= 6
        assert len(outcome.tried) == delta.about["forward_passes"] - 1
        assert outcome.tried[-1] == (outcome.size, outcome.margin)
        with delta.applied(each.model):
            assert int(tl_logits(each.model, each.ids(PROMPTS[0]))[-1].argmax()) == target


@pytest.mark.parametrize("probability", [0.1, 0.2])
def test_a_wanted_probability(each: Pair, probability: float) -> None:
    if each.raw.config.model_type == "gemma2":
        pytest.skip("its softcap of 1.5 allows no token that much")
    target = third_token(each, PROMPTS[0])
    delta = shift(probability=probability)(each.model, EditRequest(PROMPTS[0], target))
    [outcome] = delta.outcomes
    assert outcome.is_reached
    with edited(each.raw, dense(delta)):
        logits = through(each.raw, each.ids(PROMPTS[0]), LAYER)[2][-1]
    found = float(logits.softmax(-1)[target])
    assert outcome.probability == pytest.approx(found, rel=1e-3)
    assert probability < found < probability + 0.05
    assert int(logits.argmax()) == target


def test_every_token_of_a_target(each: Pair) -> None:
    """One outer product each; the first alone does not make the model say the second."""
    target = [each.ids(" Paris")[0], each.ids(" Rome")[0]]
    request = EditRequest(PROMPTS[0], " Paris Rome")
    assert min(margins(each, unchanged(each), PROMPTS[0], target)) < 0
    delta = shift()(each.model, request)
    [outcome] = delta.outcomes
    if each.raw.config.model_type == "gemma2" and not outcome.is_reached:
        pytest.skip("the norm after its MLP bounds what an edit can do")
    assert delta.rank == len(outcome.sizes) == 2
    found = margins(each, dense(delta), PROMPTS[0], target)
    assert min(found) > 0
    assert outcome.margin == pytest.approx(min(found), rel=1e-3, abs=1e-4)
    first = shift(target_tokens="first")(each.model, request)
    assert first.rank == len(first.outcomes[0].sizes) == 1
    before, after = margins(each, dense(first), PROMPTS[0], target)
    assert before > 0 > after


def test_several_facts_have_a_size_each_and_are_checked_together() -> None:
    own = pair("gpt2", EITHER)
    targets = [third_token(own, prompt) for prompt in PROMPTS]
    asked = [EditRequest(*each) for each in zip(PROMPTS, targets, strict=True)]
    moments = second_moments(own.model, TEXTS, layers=LAYER, prepend_bos=False, progress=False)
    for settings in ({}, {"key": "whitened", "moments": moments}):
        delta = shift(**settings)(own.model, asked)
        assert all(outcome.is_reached for outcome in delta.outcomes)
        for request, outcome in zip(asked, delta.outcomes, strict=True):
            assert (outcome.prompt, outcome.target) == (request.prompt, request.target)
            [found] = margins(own, dense(delta), request.prompt, [int(request.target)])
            assert outcome.margin == pytest.approx(found, rel=1e-6)
            assert found > 0
        assert len({outcome.size for outcome in delta.outcomes}) == len(asked)
        # None of them is much larger than needed: each fails at nine tenths of all sizes.
        smaller = dense(delta) * 0.85
        assert all(
            margins(own, smaller, request.prompt, [int(request.target)])[0] < 0 for request in asked
        )


def test_nothing_is_written_for_a_token_that_leads() -> None:
    own = pair("gpt2", EITHER)
    leading = int(through(own.raw, own.ids(PROMPTS[0]), LAYER)[2][-1].argmax())
    delta = shift()(own.model, EditRequest(PROMPTS[0], leading))
    [outcome] = delta.outcomes
    assert (delta.rank, delta.about["forward_passes"]) == (0, 1)
    assert (outcome.sizes, outcome.is_reached, outcome.tried) == ((0.0,), True, ())
    other = third_token(own, PROMPTS[1])
    both = shift()(own.model, [EditRequest(PROMPTS[0], leading), EditRequest(PROMPTS[1], other)])
    assert both.rank in (1, 2)  # 2 if the second edit disturbed the first
    assert all(outcome.is_reached for outcome in both.outcomes)


def test_a_target_that_no_size_reaches_is_reported_and_warned_about_once() -> None:
    own = pair("gpt2", EITHER)
    prompt = PROMPTS[0]
    one, other = own.first(" Paris"), own.first(" Rome")
    asked = [EditRequest(prompt, one), EditRequest(prompt, other)]  # a contradiction
    with pytest.warns(BackwardLensWarning) as caught:
        delta = shift()(own.model, asked)
    [warning] = caught
    text = str(warning.message)
    assert "1 of 2 targets were not reached" in text
    assert repr(prompt) in text
    assert "sizes tried, with margins" in text
    assert " and 14 more" in text
    # The type checks of `make check-all` add a frame of their own.
    assert warning.filename == __file__ or "jaxtyping" in warning.filename
    missed = [outcome for outcome in delta.outcomes if not outcome.is_reached]
    assert len(missed) == 1
    assert missed[0].rank is not None
    assert missed[0].rank > 0
    assert missed[0].margin is not None
    assert missed[0].margin <= 0
    assert len(missed[0].tried) == 19
    [found] = margins(own, dense(delta), prompt, [int(missed[0].target)])
    assert missed[0].margin == pytest.approx(found, rel=1e-6)
    assert "margin -" in repr(delta)


def test_iterations_that_end_too_early_are_reported_and_warned_about() -> None:
    own = pair("gpt2", EITHER)
    request = EditRequest(PROMPTS[0], third_token(own, PROMPTS[0]))
    needed = shift(margin=1)(own.model, request).outcomes[0].size
    with pytest.warns(BackwardLensWarning, match="1 of 1 targets were not reached"):
        delta = shift(size=needed / 10, iterations=5)(own.model, request)
    [outcome] = delta.outcomes
    assert outcome.is_reached is False
    assert outcome.size == pytest.approx(needed / 2)
    assert len(outcome.tried) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = shift(size=needed / 10, iterations=12)(own.model, request)
        once = shift(size=needed / 10)(own.model, request)
    assert enough.outcomes[0].is_reached is True
    # Without iterations nothing is checked, and nothing is said.
    assert once.about["forward_passes"] == 1
    [unchecked] = once.outcomes
    assert (unchecked.is_reached, unchecked.margin, unchecked.tried) == (None, None, ())


def test_the_delta_says_what_was_found(tmp_path: Any) -> None:
    own = pair("gpt2", EITHER)
    request = EditRequest(PROMPTS[0], third_token(own, PROMPTS[0]))
    delta = shift()(own.model, request)
    [outcome] = delta.outcomes
    assert repr(delta) == (
        f"WeightDelta(ForwardPassShift, W_out of layer 1; size {outcome.size:.3g}, margin "
        f"{outcome.margin:.3g}, rank 0, {delta.about['forward_passes']} forward passes)"
    )
    delta.save(tmp_path / "edit.safetensors")
    loaded = WeightDelta.load(tmp_path / "edit.safetensors")
    assert loaded.outcomes == delta.outcomes
    assert isinstance(loaded.outcomes[0], EditOutcome)
    assert repr(loaded) == repr(delta)
    # What was measured is not true of other sizes.
    assert delta.scale(2).outcomes == ()
    assert (delta + delta).outcomes == ()
    assert repr(delta.scale(2)) == "WeightDelta(ForwardPassShift, W_out of layer 1)"
    once = shift(size=0.5)(own.model, request)
    assert repr(once).endswith("; size 0.5, not checked, 1 forward pass)")
    both = shift(iterations=8)(own.model, [request, EditRequest(PROMPTS[1], " Rome")])
    assert "; 2 prompts, sizes " in repr(both)


def test_passes_are_of_the_edited_layer_and_those_above(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pair("gpt2", EITHER)
    request = EditRequest(PROMPTS[0], third_token(own, PROMPTS[0]))
    shift()(own.model, request)  # before counting: it is checked once per model
    ran: list[int] = []
    for layer, block in enumerate(own.model.blocks):
        forward = block.mlp.forward

        def counted(*args: Any, _own: Any = forward, _at: int = layer, **kwargs: Any) -> Any:
            ran.append(_at)
            return _own(*args, **kwargs)

        monkeypatch.setitem(vars(block.mlp), "forward", counted)
    delta = shift()(own.model, request)
    assert ran.count(0) == 1
    assert ran.count(LAYER) == delta.about["forward_passes"]
    # The caller's hooks act on the run that is analysed, so they see every pass.
    monkeypatch.undo()
    passes: list[int] = []
    handle = own.model.blocks[0].register_forward_hook(lambda *_: passes.append(0))
    again = shift()(own.model, request)
    handle.remove()
    assert len(passes) == again.about["forward_passes"]
    assert relative_error(dense(again), dense(delta)) < 1e-12


def test_a_hook_of_the_caller_changes_what_is_needed() -> None:
    own = pair("gpt2", EITHER)
    request = EditRequest(PROMPTS[0], third_token(own, PROMPTS[0]))
    usual = shift()(own.model, request)
    handle = own.model.blocks[0].register_forward_hook(
        lambda module, args, output: (
            (output[0] * 3, *output[1:]) if isinstance(output, tuple) else output * 3
        )
    )
    other = shift()(own.model, request)
    handle.remove()
    assert abs(other.outcomes[0].size / usual.outcomes[0].size - 1) > 0.02


class Coupled:
    """Two outer products: the second target leads until the first one is written."""

    cells = None

    def without(self) -> Sized:
        return self._at([0.0, 0.0])

    def at(self, sizes: Tensor) -> Sized:
        return self._at(sizes.tolist())

    def _at(self, sizes: list[float]) -> Sized:
        margins = torch.tensor([sizes[0] - 3, 1 - 0.5 * sizes[0] + sizes[1]])
        ranks = (margins <= 0).long()
        return Sized(
            torch.tensor(sizes, dtype=torch.float64), Standing(margins, ranks, -margins.exp())
        )


def test_a_target_that_another_edit_disturbs_is_written_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(sizes, "_guesses", lambda *_: torch.tensor([2.0, 0.5]))
    tried = sizes.least_sizes(None, Coupled(), factor=1.1, probability=None, n_passes=8, n_most=8)  # type: ignore[arg-type]
    assert tried[1].sizes.tolist() == [2.0, 0.0]
    first, second = tried[-1].sizes.tolist()
    assert 3 < first < 3.4
    assert 0.5 * first - 1 < second < 1.2 * (0.5 * first - 1)


def test_a_small_probability_is_not_enough_where_others_lead() -> None:
    """Logits 2, 1.9 and 0: the second token has much more than 1 %, and does not lead."""
    standing = Standing.of(torch.tensor([[2.0, 1.9, 0.0]] * 2), torch.tensor([0, 1]))
    assert standing.margins.tolist() == pytest.approx([0.1, -0.1])
    assert standing.ranks.tolist() == [0, 1]
    assert standing.surplus(0.01).tolist() == pytest.approx([0.1, -0.1])
    odds = math.exp(2) / (math.exp(1.9) + 1)
    assert standing.surplus(0.9)[0] == pytest.approx(math.log(odds / 9))
    certain = Standing.of(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]))
    assert math.isfinite(float(certain.surplus(0.9)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "least"}, "size is 'least'; pass 'auto', or a finite number"),
        ({"margin": 0.9}, "margin is 0.9"),
        ({"margin": float("inf")}, "margin is inf"),
        ({"probability": 1.0}, "probability is 1.0"),
        ({"probability": 0}, "probability is 0"),
        ({"margin": 1.1, "probability": 0.5}, "margin is 1.1 and probability is 0.5; pass one"),
        ({"size": 4, "margin": 1.1}, "margin and probability are for size='auto', but size is 4"),
        ({"size": 4, "probability": 0.5}, "are for size='auto', but size is 4"),
        ({"iterations": 1}, "iterations is 1, but size='auto' needs at least 2"),
        (
            {"skip_if_answered": True},
            "skip_if_answered is for a number as size, but size is 'auto'",
        ),
        ({"target_tokens": "last"}, "target_tokens is 'last'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        shift(**settings)


def test_passes_go_on_only_while_a_target_is_not_reached(monkeypatch: Any) -> None:
    monkeypatch.setattr(sizes, "_guesses", lambda *_: torch.tensor([0.1, 0.1]))

    def tried(n_passes: int, n_most: int) -> list[Sized]:
        return sizes.least_sizes(
            None,  # type: ignore[arg-type]
            Coupled(),  # type: ignore[arg-type]
            factor=1.1,
            probability=None,
            n_passes=n_passes,
            n_most=n_most,
        )

    few, more = tried(2, 2), tried(2, 12)
    assert len(few) == 3
    assert not few[-1].leads.all()
    assert 3 < len(more) < 12
    assert more[-1].leads.all()
    assert not more[-2].leads.all()
    # With enough passes none is added.
    assert len(tried(12, 12)) == len(tried(12, 20))
