"""What the shift responds to: the optimality system, with inputs read from the raw model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from edit_pairs import EITHER, LAYER, Pair, edited, pair, through
from models import relative_error
from torch import Tensor

from backward_lens_tl.editing import (
    EditRequest,
    ForwardPassShift,
    SecondMoments,
    facts_moments,
)
from backward_lens_tl.editing.shift import contrast
from backward_lens_tl.editing.shift.keys import fewer_rows, with_low_rank
from backward_lens_tl.editing.shift.subjects import SUBJECTS
from backward_lens_tl.errors import EditError

pytestmark = pytest.mark.usefixtures("as_for_a_user")

PROMPT, SUBJECT = "The capital of France is", "France"
OTHERS = ("Italy", "Rome", "the king")
MODELS = [
    ("gpt2", "bridge"),
    ("gpt2", "hooked"),
    ("llama", "hooked"),
    ("gpt_neox", "bridge"),
    ("gemma2", "bridge"),
]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def each(request: pytest.FixtureRequest) -> Pair:
    return pair(*request.param)


def request(target: Any = 40) -> EditRequest:
    return EditRequest(PROMPT, target, SUBJECT)


def direction(own: Pair, *asked: EditRequest, **settings: Any) -> Tensor:
    """The input directions, as columns."""
    usual: dict[str, Any] = {"layer": LAYER, "size": 1.0, "prepend_bos": False}
    if settings.get("key") in (None, "contrast"):
        usual["contrast"] = OTHERS
    [matrix] = ForwardPassShift(**usual | settings)(own.model, list(asked) or request())
    assert matrix.left is not None
    return matrix.left.double()


def about(other: str) -> str:
    return PROMPT.replace(SUBJECT, other)


def inputs(own: Pair, texts: Sequence[str], after: Sequence[int] = ()) -> list[Tensor]:
    """What FF2 of the raw model reads at every position of each text."""
    return [own.reads([*own.ids(text), *after]).double() for text in texts]


def penalty(
    own: Pair,
    rows: Sequence[Tensor],
    edited_rows: Tensor,
    moments: SecondMoments | None = None,
    *,
    n: int = len(OTHERS),
) -> Tensor:
    """`A`, dense."""
    every = torch.cat(list(rows))
    usual = every.T @ every / len(every) if moments is None else moments.of(LAYER)
    ridge = usual.diagonal().mean() * torch.eye(len(usual), dtype=torch.float64)
    return usual + ridge + 10 / n * edited_rows.T @ edited_rows


def closed_form(penalties: Tensor, keys: Tensor) -> Tensor:
    solved = torch.linalg.solve(penalties, keys.T)
    return solved @ torch.linalg.inv(keys @ solved)


@pytest.mark.parametrize("with_moments", [False, True])
def test_contrast_is_its_closed_form(each: Pair, with_moments: bool) -> None:
    moments = each.moments() if with_moments else None
    found = direction(each, moments=moments)[:, 0]
    rows = inputs(each, [about(other) for other in OTHERS])
    last = torch.stack([row[-1] for row in rows])
    x = each.reads(each.ids(PROMPT))[-1].double()
    expected = closed_form(penalty(each, rows, last, moments), x[None])[:, 0]
    # Hugging Face computes some activations in float32.
    assert relative_error(found, expected) < 300 * each.exact
    assert float(x @ found) == pytest.approx(1, abs=1e-5)
    # Negative controls: other subjects, and no subjects.
    other = inputs(each, [about(name) for name in ("Paris", "Messi", "a river")])
    wrong = penalty(each, other, torch.stack([row[-1] for row in other]), moments)
    assert relative_error(found, closed_form(wrong, x[None])[:, 0]) > 0.05
    assert relative_error(found, x / (x @ x)) > 0.05


def test_the_prompts_are_counted() -> None:
    own = pair("gpt2", EITHER)
    delta = ForwardPassShift(layer=LAYER, contrast=OTHERS, prepend_bos=False)(own.model, request())
    assert delta.about["contrast_prompts"] == 3
    assert repr(delta).endswith(" forward passes, 3 contrast prompts)")
    plain = ForwardPassShift(layer=LAYER, key="plain", prepend_bos=False)(own.model, request())
    assert plain.about["contrast_prompts"] == 0


def test_less_is_written_for_the_other_subjects(each: Pair) -> None:
    """In the raw model, at the last token: less than half of what the plain key writes."""
    one = ForwardPassShift(layer=LAYER, size=2.0, contrast=OTHERS, prepend_bos=False)
    delta = one(each.model, request())["W_out", LAYER].dense()
    plain = ForwardPassShift(layer=LAYER, size=2.0, key="plain", prepend_bos=False)
    other = plain(each.model, request())["W_out", LAYER].dense()

    def moved(change: Tensor, text: str) -> float:
        ids = each.ids(text)
        before = through(each.raw, ids, LAYER)[1][-1]
        with edited(each.raw, change):
            return float((through(each.raw, ids, LAYER)[1][-1] - before).norm())

    assert moved(delta, PROMPT) == pytest.approx(moved(other, PROMPT), rel=1e-4)
    for name in OTHERS:
        assert moved(delta, about(name)) < 0.5 * moved(other, about(name))


def test_the_answer_does_not_depend_on_which_matrix_is_inverted() -> None:
    """Few rows: Woodbury's identity. More than dimensions: the dense matrix."""
    own = pair("gpt2", EITHER)
    few = OTHERS[:2]
    assert sum(len(own.ids(about(name))) for name in few) < own.model.cfg.d_mlp
    many = ("Italy", "Rome", "Paris", "Messi", "the dog of the king", "a river", "the ball")
    assert sum(len(own.ids(about(name))) for name in many) > own.model.cfg.d_mlp
    x = own.reads(own.ids(PROMPT))[-1].double()
    for names in (few, many):
        rows = inputs(own, [about(name) for name in names])
        last = torch.stack([row[-1] for row in rows])
        expected = closed_form(penalty(own, rows, last, n=len(names)), x[None])[:, 0]
        assert relative_error(direction(own, contrast=names)[:, 0], expected) < 1e-6


@pytest.mark.parametrize("with_moments", [False, True])
def test_the_prompts_run_in_batches(with_moments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of prompts takes the memory of one batch, and batches change no number."""
    own = pair("gpt2", EITHER)
    moments = own.moments() if with_moments else None
    width = own.model.cfg.d_mlp
    names = tuple(f"{'the ' * n}{name}" for n in range(1, 10) for name in OTHERS)
    assert len(names) > width / 2
    asked = [request(), EditRequest("Messi plays for", 30, "Messi")]
    texts = [f"{each.prompt.replace(each.subject, name)}" for each in asked for name in names]
    assert sum(len(own.ids(text)) for text in texts) > 4 * width
    settings: Any = {"contrast": names, "n_contrast": len(names), "moments": moments}
    expected = direction(own, *asked, **settings)
    sizes, rows = [], []
    run, keep = contrast.forward_pass, contrast.fewer_rows

    def running(host: Any, batch: Any, **given: Any) -> Any:
        sizes.append(batch.mask.numel())
        return run(host, batch, **given)

    def keeping(every: Tensor) -> Tensor:
        rows.append(len(every))
        return keep(every)

    monkeypatch.setattr(contrast, "forward_pass", running)
    monkeypatch.setattr(contrast, "fewer_rows", keeping)
    monkeypatch.setattr(contrast, "PASS_TOKENS", 40)
    assert relative_error(direction(own, *asked, **settings), expected) < 1e-8
    assert len(sizes) > 10
    assert max(sizes) <= 40
    assert max(rows) <= 2 * width + 40
    delta = ForwardPassShift(layer=LAYER, size=1.0, prepend_bos=False, **settings)(own.model, asked)
    assert delta.about["contrast_prompts"] == len(texts)


def test_fewer_rows_have_the_same_products() -> None:
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 0] = rows[:, 1]  # of deficient rank
    few = fewer_rows(rows)
    assert len(few) == 6
    assert relative_error(few.T @ few, rows.T @ rows) < 1e-12
    assert torch.equal(fewer_rows(rows[:6]), rows[:6])


def test_woodbury_is_the_inverse_of_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, keys = (torch.randn(n, 9, generator=generator, dtype=torch.float64) for n in (4, 3))
    base = torch.diag(torch.rand(9, generator=generator, dtype=torch.float64) + 0.1)
    solve = with_low_rank(lambda keys: torch.linalg.solve(base, keys), rows)
    expected = torch.linalg.solve(base + rows.T @ rows, keys.T)
    assert relative_error(solve(keys.T), expected) < 1e-10


def test_several_facts_share_the_contrast() -> None:
    """`x_j . l_i` is 1 for its own and 0 for others, and every prompt's other subjects count."""
    own = pair("gpt2", EITHER)
    second = EditRequest("Messi plays for", 30, "Messi")
    found = direction(own, request(), second)
    keys = torch.stack(
        [own.reads(own.ids(each.prompt))[-1].double() for each in (request(), second)]
    )
    assert relative_error(keys @ found, torch.eye(2, dtype=torch.float64)) < 1e-3
    texts = [about(name) for name in OTHERS] + [f"{name} plays for" for name in OTHERS]
    rows = inputs(own, texts)
    last = torch.stack([row[-1] for row in rows])
    expected = closed_form(penalty(own, rows, last), keys)
    assert relative_error(found, expected) < 1e-3


def test_every_token_of_a_target_is_contrasted() -> None:
    """The other subjects' prompts go on with the target, as the request's does."""
    own = pair("gpt2", EITHER)
    target = [own.first(" Paris"), own.first(" Rome")]
    found = direction(own, request(" Paris Rome"))
    assert found.shape[1] == 2
    rows = inputs(own, [about(name) for name in OTHERS], after=target[:1])
    edited_rows = torch.cat([row[-2:] for row in rows])
    keys = own.reads([*own.ids(PROMPT), target[0]])[-2:].double()
    expected = closed_form(penalty(own, rows, edited_rows), keys)
    assert relative_error(found, expected) < 1e-3


def test_at_the_subjects_last_token() -> None:
    own = pair("gpt2", EITHER)
    found = direction(own, fact_token="subject_last")[:, 0]
    at = len(own.ids("The capital of France")) - 1
    x = own.reads(own.ids(PROMPT))[at].double()
    rows = inputs(own, [about(name) for name in OTHERS])
    there = torch.stack(
        [
            row[len(own.ids(f"The capital of {name}")) - 1]
            for row, name in zip(rows, OTHERS, strict=True)
        ]
    )
    expected = closed_form(penalty(own, rows, there), x[None])[:, 0]
    assert relative_error(found, expected) < 1e-6
    assert float(own.reads(own.ids(PROMPT))[-1].double() @ found) < 0.9
    plain = direction(own, fact_token="subject_last", key="plain")[:, 0]
    assert relative_error(plain, x / (x @ x)) < 1e-6
    with pytest.raises(EditError, match="has no subject, but the edit is made at its last token"):
        direction(own, EditRequest(PROMPT, 40), fact_token="subject_last", key="plain")


def test_which_key_is_the_default() -> None:
    own = pair("gpt2", EITHER)
    moments = own.moments()
    without = EditRequest(PROMPT, 40)
    assert torch.equal(direction(own), direction(own, key="contrast"))
    assert torch.equal(direction(own, without), direction(own, without, key="plain"))
    assert torch.equal(
        direction(own, without, moments=moments),
        direction(own, without, key="whitened", moments=moments),
    )
    assert torch.equal(
        direction(own, moments=moments), direction(own, key="contrast", moments=moments)
    )
    found = [
        direction(own, key="contrast", moments=moments),
        direction(own, key="whitened", moments=moments),
        direction(own, key="plain"),
    ]
    assert relative_error(found[0], found[1]) > 0.05
    assert relative_error(found[1], found[2]) > 0.05
    # Requests without a subject may share an edit with others.
    mixed = direction(own, request(), EditRequest("A river runs", 30))
    assert mixed.shape[1] == 2


def test_the_names_are_others_and_the_same_each_time() -> None:
    own = pair("gpt2", EITHER)
    once, again = (direction(own, contrast=SUBJECTS, n_contrast=3) for _ in range(2))
    assert torch.equal(once, again)
    more = direction(own, contrast=SUBJECTS, n_contrast=4)
    assert relative_error(once, more) > 1e-4
    # The request's own name is never one of them, however it is written.
    usual = direction(own, contrast=OTHERS)
    with_own = direction(own, contrast=("france", " France", *OTHERS))
    assert relative_error(with_own, usual) < 1e-9
    assert len(set(SUBJECTS)) == len(SUBJECTS) >= 32


def test_a_subject_that_occurs_twice() -> None:
    """The occurrence that the request means is replaced."""
    own = pair("gpt2", EITHER)
    prompt = "Rome is in Rome"
    second = direction(own, EditRequest(prompt, 40, "Rome", 11), contrast=("Paris",))
    x = own.reads(own.ids(prompt))[-1].double()
    rows = inputs(own, ["Rome is in Paris"])
    expected = closed_form(penalty(own, rows, rows[0][-1:], n=1), x[None])
    # One name of the sixteen that may be used.
    assert relative_error(second, expected) < 1e-6


def test_statistics_are_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next edit with the same statistics inverts nothing of the width of the MLP."""
    own = pair("gpt2", EITHER)
    moments, sizes = own.moments(), []
    for name in ("cholesky", "cholesky_ex", "solve", "inv"):
        real = getattr(torch.linalg, name)

        def counted(matrix: Tensor, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            sizes.append(len(matrix))
            return _real(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    first = direction(own, moments=moments)
    assert sizes.count(own.model.cfg.d_mlp) == 1
    sizes.clear()
    assert torch.equal(direction(own, moments=moments), first)
    assert max(sizes) <= len(OTHERS)


def test_blocks_above_the_edited_one_do_not_run_for_the_contrast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = pair("gpt2", EITHER)
    direction(own, layer=0)  # before counting
    ran: list[tuple[int, int]] = []
    for layer, block in enumerate(own.model.blocks):
        forward = block.mlp.forward

        def counted(*args: Any, _own: Any = forward, _at: int = layer, **kwargs: Any) -> Any:
            ran.append((_at, len(args[0])))
            return _own(*args, **kwargs)

        monkeypatch.setitem(vars(block.mlp), "forward", counted)
    direction(own, layer=0)
    assert ran == [(0, 1), (1, 1), (0, len(OTHERS))]


def test_the_facts_models_neighbors_are_disturbed_less(facts_model: Any) -> None:
    """With sizes that just suffice, on records that no other test tunes on."""
    prompt, others = "Lionel Messi plays for", ("Cristiano Ronaldo", "Neymar", "Kobe Bryant")
    asked = EditRequest(prompt, " Paris", "Lionel Messi")
    divergence = {}
    for key in ("plain", "contrast"):
        delta = ForwardPassShift(layer=6, key=key, prepend_bos=False)(facts_model, asked)
        assert delta.outcomes[0].is_reached
        found = []
        for name in others:
            ids = facts_model.to_tokens(f"{name} plays for", prepend_bos=False)
            with torch.no_grad():
                before = facts_model(ids, return_type="logits")[0, -1].log_softmax(-1)
                with delta.applied(facts_model):
                    after = facts_model(ids, return_type="logits")[0, -1].log_softmax(-1)
            found.append(float((before.exp() * (before - after)).sum()))
        divergence[key] = sum(found)
    assert divergence["contrast"] < 0.5 * divergence["plain"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key": "whitened"}, "the whitened key needs moments"),
        ({"key": "contrasted"}, "key is 'contrasted'"),
        ({"n_contrast": 0}, "n_contrast is 0"),
        ({"contrast": (3,)}, "contrast is"),
        ({"fact_token": "first"}, "fact_token is 'first'"),
        ({"contrast": ("France",)}, "contrast has no name of a subject other than"),
        ({"contrast": ()}, "contrast has no name of a subject other than"),
        ({"ridge": 0}, "ridge is 0.*; the contrast key needs at least 1e-08 without moments"),
        ({"moments": facts_moments()}, "another model"),
        (
            {"key": "plain", "contrast": OTHERS},
            r"contrast is \('Italy', .*but key='plain' does not read it; leave it out, or pass "
            "key='contrast'",
        ),
        ({"key": "whitened", "moments": facts_moments(), "n_contrast": 4}, "n_contrast is 4, but"),
        ({"key": "paper", "ridge": 0.1}, "ridge is 0.1, .* pass key='whitened' or key='contrast'"),
        ({"key": "plain", "moments": facts_moments()}, "moments is .*, but key='plain' does not"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    own = pair("gpt2", EITHER)
    with pytest.raises(EditError, match=message):
        direction(own, **settings)


def test_the_contrast_key_needs_a_subject() -> None:
    own = pair("gpt2", EITHER)
    with pytest.raises(EditError, match="has no subject, but key='contrast' compares"):
        direction(own, EditRequest(PROMPT, 40), key="contrast")
