"""The lens, against a slow loop over vectors through the model's norm and unembedding."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from models import Case, build
from torch import Tensor

from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.errors import InputError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models import host_of, unembedding
from backward_lens_tl.readout.readout import Readout
from backward_lens_tl.result import BackwardLensResult

TARGET = 5
K = 4
LENSES = ("logit_lens", "normalized")
KINDS_OF_NORMS = pytest.mark.parametrize(
    "case", ["bridge-gpt2", "bridge-gemma2", "hooked-llama", "hooked-no_norm"], indirect=True
)
"""Both model classes; LayerNorm, RMS norms with Gemma's own gain, and no norm at all."""


def slow_scores(case: Case, vector: Tensor, projection: str) -> list[float]:
    """Scores of one vector, by the reference model."""
    if projection == "normalized":
        length = sum(float(value) ** 2 for value in vector) ** 0.5
        vector = vector / length if length else vector
    return case.lens(vector[None])[0].tolist()


def assert_reads(
    result: BackwardLensResult, matrix: str, at: tuple[int, int, int], scores: list[float]
) -> None:
    """Compare one cell with a full sort of its scores."""
    readout = result.readout(matrix)
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    top, bottom = order[: result.k], order[::-1][: result.k]
    assert readout.top_ids[at].tolist() == top
    assert readout.bottom_ids[at].tolist() == bottom
    # HF's RMS norms round to float32.
    expected = pytest.approx([scores[token] for token in top], rel=1e-5, abs=1e-6)
    assert readout.top_scores[at].tolist() == expected
    expected = pytest.approx([scores[token] for token in bottom], rel=1e-5, abs=1e-6)
    assert readout.bottom_scores[at].tolist() == expected
    rank = sum(score > scores[TARGET] for score in scores)
    assert int(result.target_rank(matrix)[at]) == rank


@pytest.mark.versions
def test_every_cell_against_a_slow_loop(case: Case) -> None:
    """Both lenses of every random model."""
    assert_every_cell(case, "update")


def test_every_cell_of_the_gradient_itself(gpt2: Case) -> None:
    assert_every_cell(gpt2, "gradient")


def assert_every_cell(case: Case, direction: Any) -> None:
    result = backward_lens(
        case.model, case.tokens(3, 3), TARGET, matrices="mlp", direction=direction, k=K
    )
    assert (result.projections, result.direction, result.k) == (LENSES, direction, K)
    sign = -1 if direction == "update" else 1
    zero = torch.zeros(case.n_layers, 2, 3, dtype=torch.bool)
    zero[-1, :, :-1] = True  # in the last layer only the last position affects the loss
    for lens, matrix in product(LENSES, case.matrices):
        under = result.under(lens)
        assert under.target_rank(matrix).shape == (case.n_layers, 2, 3)
        assert torch.equal(result.is_zero(matrix), zero)
        for at in (~result.is_zero(matrix)).nonzero().tolist():
            layer, batch, pos = at
            gradient = result.capture[matrix, layer]
            is_written = matrix == "W_out"
            vector = sign * gradient.vjps[batch, pos] if is_written else gradient.inputs[batch, pos]
            assert_reads(under, matrix, (layer, batch, pos), slow_scores(case, vector, lens))


def test_normalized_lens_differs_where_the_eps_matters(gpt2: Case) -> None:
    """A loss scaled by 1e-4 has VJPs for which the final norm's eps matters."""

    def small(logits: Tensor, tokens: Tensor) -> Tensor:
        return -1e-4 * logits[:, -1].log_softmax(-1)[:, TARGET]

    tokens = gpt2.tokens(5)
    found = {
        name: backward_lens(gpt2.model, tokens, TARGET, objective=small, projection=name).readout(
            "W_out"
        )
        for name in ("logit_lens", "normalized")
    }
    assert (found["logit_lens"].top_scores - found["normalized"].top_scores).abs().max() > 0.01
    large = backward_lens(gpt2.model, tokens, TARGET, projection="normalized").readout("W_out")
    torch.testing.assert_close(found["normalized"].top_scores[0], large.top_scores[0])


@pytest.mark.versions
def test_lens_of_the_stories_model(stories: Case) -> None:
    assert_lens_of_a_trained_model(stories, "Once upon a time")


@pytest.mark.versions
def test_lens_of_the_facts_model(facts: Case) -> None:
    assert_lens_of_a_trained_model(facts, "Lionel Messi plays for")


def assert_lens_of_a_trained_model(case: Case, prompt: str) -> None:
    result = backward_lens(case.model, prompt, TARGET, matrices="mlp", k=1)
    n = result.capture.tokens.shape[1]
    last = case.n_layers - 1
    for layer, pos in [(0, 0), (1, n - 1), (2, 1), (last, n - 1)]:
        for matrix in case.matrices:
            gradient = result.capture[matrix, layer]
            vector = -gradient.vjps[0, pos] if matrix == "W_out" else gradient.inputs[0, pos]
            scores = case.lens(vector[None])[0]
            assert int(result.readout(matrix).top_ids[layer, 0, pos, 0]) == int(scores.argmax())
            rank = int((scores > scores[TARGET]).sum())
            assert int(result.target_rank(matrix)[layer, 0, pos]) == rank


def test_the_update_of_the_facts_model_writes_the_target(facts: Case) -> None:
    """Lemma 5.1: before the final norm, only the target's embedding is added."""
    result = backward_lens(facts.model, "Lionel Messi plays for", " Paris")
    assert int(result.target_rank("W_out")[-1, 0, -1]) == 0
    assert result.top_tokens("W_out", -1, -1, k=1) == [" Paris"]
    raw = backward_lens(facts.model, "Lionel Messi plays for", " Paris", direction="gradient")
    assert int(raw.target_rank("W_out")[-1, 0, -1]) > 0.99 * facts.d_vocab


# ------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize(
    ("name", "flips"),
    [
        ("bridge-gpt2", False),
        ("hooked-gpt2", False),
        ("bridge-llama", True),
        ("hooked-no_norm", False),
    ],
)
def test_the_update_is_the_negated_gradient_only_without_biases(name: str, flips: bool) -> None:
    """An RMS norm and a head without biases are odd functions; any bias breaks that."""
    case = build(name)
    tokens = case.tokens(5)
    update = backward_lens(case.model, tokens, TARGET, direction="update").readout("W_out")
    raw = backward_lens(case.model, tokens, TARGET, direction="gradient").readout("W_out")
    live = slice(0, case.n_layers - 1)
    assert torch.equal(update.top_ids[live], raw.bottom_ids[live]) == flips


def test_the_direction_changes_neither_inputs_nor_stored_factors(llama: Case) -> None:
    tokens = llama.tokens(4)
    update = backward_lens(llama.model, tokens, TARGET, matrices="mlp", direction="update")
    raw = backward_lens(llama.model, tokens, TARGET, matrices="mlp", direction="gradient")
    for matrix in ("W_in", "W_gate"):
        assert torch.equal(update.readout(matrix).top_ids, raw.readout(matrix).top_ids)
        assert torch.equal(update.target_rank(matrix), raw.target_rank(matrix))
    assert not torch.equal(update.readout("W_out").top_ids, raw.readout("W_out").top_ids)
    for gradient in raw.capture:
        assert torch.equal(update.capture[gradient.matrix, gradient.layer].vjps, gradient.vjps)


# ---------------------------------------------------------------------------------- zero vectors


def test_positions_that_add_nothing_have_no_tokens(llama: Case) -> None:
    result = backward_lens(llama.model, llama.tokens(4), TARGET, matrices="mlp", k=3)
    for matrix in llama.matrices:
        zero = torch.zeros(llama.n_layers, 1, 4, dtype=torch.bool)
        zero[-1, 0, :3] = True
        assert torch.equal(result.is_zero(matrix), zero)
        assert (result.norms(matrix) == 0).equal(zero)
        for pos in range(3):
            assert result.top_tokens(matrix, -1, pos) == []
            assert result.bottom_tokens(matrix, -1, pos) == []
            assert result.cell(matrix, -1, pos).is_zero
            assert not result.cell(matrix, -1, pos).target_leads
        assert len(result.top_tokens(matrix, -1, 3)) == 3
        assert len(result.bottom_tokens(matrix, 0, 0)) == 3


# ------------------------------------------------------------------------- layers and positions


PROMPTS = ["Messi plays for", "The capital of France is", "Rome"]


def test_layers_and_positions_are_slices_of_everything(gpt2: Case) -> None:
    tokens = gpt2.tokens(6, 6)
    full = backward_lens(gpt2.model, tokens, TARGET)
    part = backward_lens(gpt2.model, tokens, TARGET, layers=[2, 0], positions=[4, 1, -1])
    assert part.layers == (0, 2)
    assert part.positions.tolist() == [[4, 1, 5]] * 2
    for matrix in ("W_in", "W_out"):
        for name in ("top_ids", "bottom_ids", "target_rank"):
            whole = getattr(full.readout(matrix), name)[[0, 2]][:, :, [4, 1, 5]]
            assert torch.equal(getattr(part.readout(matrix), name), whole)
        whole = full.norms(matrix)[[0, 2]][:, :, [4, 1, 5]]
        torch.testing.assert_close(part.norms(matrix), whole, rtol=1e-12, atol=0)
        for layer in (0, 2):
            for pos in (4, 1, -1):
                assert part.top_tokens(matrix, layer, pos) == full.top_tokens(matrix, layer, pos)


def test_negative_positions_count_from_each_prompts_own_end(gpt2: Case) -> None:
    full = backward_lens(gpt2.model, PROMPTS, TARGET)
    last = backward_lens(gpt2.model, PROMPTS, TARGET, positions=-1)
    lengths = full.capture.mask.sum(1).tolist()
    assert len(set(lengths)) == 3
    assert last.positions.tolist() == [[n - 1] for n in lengths]
    for matrix in ("W_in", "W_out"):
        for b, n in enumerate(lengths):
            expected = full.target_rank(matrix)[:, b, n - 1]
            assert torch.equal(last.target_rank(matrix)[:, b, 0], expected)
            torch.testing.assert_close(
                last.norms(matrix)[:, b, 0], full.norms(matrix)[:, b, n - 1], rtol=1e-12, atol=0
            )
            for pos in (-1, n - 1):
                words = last.top_tokens(matrix, 0, pos, batch=b)
                assert words == full.top_tokens(matrix, 0, -1, batch=b)


def test_norms_equal_those_of_the_vjps(llama: Case) -> None:
    result = backward_lens(llama.model, llama.tokens(3, 3), TARGET, matrices="mlp", layers=[1, 2])
    for matrix in llama.matrices:
        assert result.norms(matrix).shape == (2, 2, 3)
        for row, layer in enumerate((1, 2)):
            for b in range(2):
                for pos in range(3):
                    delta = result.capture[matrix, layer].vjps[b, pos].tolist()
                    length = sum(value**2 for value in delta) ** 0.5
                    found = float(result.norms(matrix)[row, b, pos])
                    assert found == pytest.approx(length, rel=1e-12)


def test_a_position_that_was_not_projected_is_refused(gpt2: Case) -> None:
    result = backward_lens(gpt2.model, gpt2.tokens(6), TARGET, layers=[1], positions=[2])
    with pytest.raises(InputError, match=r"position 3.*\[2\]"):
        result.top_tokens("W_in", 1, 3)
    with pytest.raises(InputError, match=r"layer 0.*1"):
        result.top_tokens("W_in", 0, 2)
    with pytest.raises(InputError, match=r"W_gate.*W_in, W_out"):
        result.top_tokens("W_gate", 1, 2)
    with pytest.raises(InputError, match=r"prompt 1.*0 to 0"):
        result.top_tokens("W_in", 1, 2, batch=1)


# ------------------------------------------------------------------------------- custom projections


class Ties:
    """Scores with many ties: the sum of a vector's signs, and the token id in steps of ten."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        self.layers.append(layer)
        steps = torch.arange(97, dtype=vectors.dtype).div(10, rounding_mode="floor")
        return steps.expand(len(vectors), -1).clone()


def test_a_custom_projection_gets_each_layer_and_ties_share_a_rank(gpt2: Case) -> None:
    ties = Ties()
    result = backward_lens(gpt2.model, gpt2.tokens(4), 45, projection=ties, k=7, layers=[0, 2])
    assert set(ties.layers) == {0, 2}
    assert result.projection == "Ties"
    # Token 45 has score 4; 50 to 96 have more, and the nine ties do not count.
    assert (result.target_rank("W_out") == 47).all()
    assert (result.readout("W_out").top_ids >= 90).all()
    assert (result.readout("W_out").bottom_ids < 10).all()


def test_a_custom_projection_gets_the_oriented_vectors(gpt2: Case) -> None:
    class Keep:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def project(self, vectors: Tensor, layer: int) -> Tensor:
            self.seen.append(vectors)
            return torch.zeros(len(vectors), 97)

    keep = Keep()
    tokens = gpt2.tokens(4)
    result = backward_lens(gpt2.model, tokens, TARGET, projection=keep, matrices="W_out", layers=1)
    assert torch.equal(torch.cat(keep.seen), -result.capture["W_out", 1].vjps[0])


# -------------------------------------------------------------------------- several projections


@pytest.mark.versions
@KINDS_OF_NORMS
def test_both_lenses_together_decode_like_each_alone(case: Case) -> None:
    tokens = case.tokens(4, 4)
    measures = ("answer_rank", "entropy")
    together = backward_lens(case.model, tokens, TARGET, k=K, measures=measures)
    assert together.projections == LENSES
    for lens in LENSES:
        alone = backward_lens(case.model, tokens, TARGET, k=K, projection=lens, measures=measures)
        assert alone.projections == (lens,)
        same = together.under(lens)
        assert (same.projection, same.faint_norm) == (lens, alone.faint_norm)
        assert set(same.projections) == set(LENSES)
        for matrix in alone.matrices:
            found, wanted = same.readout(matrix), alone.readout(matrix)
            if lens == "logit_lens":  # to the last bit
                for name, values in vars(wanted).items():
                    assert torch.equal(getattr(found, name), values)
            assert_same_readout(found, wanted, ~alone.is_zero(matrix))


def assert_same_readout(found: Readout, wanted: Readout, real: Tensor) -> None:
    # Float64, and logits below about a hundred.
    torch.testing.assert_close(found.top_scores, wanted.top_scores, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.bottom_scores, wanted.bottom_scores, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.entropy, wanted.entropy, rtol=0, atol=1e-11, equal_nan=True)
    # Zero vectors decode to the norm's bias if there is one; otherwise all scores tie.
    for name in ("top_ids", "bottom_ids", "target_rank", "answer_rank"):
        assert torch.equal(getattr(found, name)[real], getattr(wanted, name)[real])


def test_both_lenses_cost_one_product_where_the_norm_allows_it(
    gpt2: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    product = unembedding.product
    monkeypatch.setattr(unembedding, "product", lambda v, w: rows.append(len(v)) or product(v, w))

    def rows_multiplied(**how: Any) -> int:
        rows.clear()
        tokens = gpt2.tokens(4)
        backward_lens(gpt2.model, tokens, TARGET, layers=1, matrices="W_in", **how)
        return sum(rows)

    once = rows_multiplied(projection="logit_lens")
    assert once == rows_multiplied(projection="normalized")
    of_nothing = 1  # the zero vector's
    assert rows_multiplied() == once + of_nothing

    # Under another norm each vector is decoded by a separate product.
    bend = lambda host, vectors: (vectors * 3).tanh()  # noqa: E731
    monkeypatch.setattr(type(host_of(gpt2.model).unembedding), "normed", bend)
    assert rows_multiplied() == once + 4
    tokens = gpt2.tokens(4)
    together = backward_lens(gpt2.model, tokens, TARGET)
    for lens in LENSES:
        alone = backward_lens(gpt2.model, tokens, TARGET, projection=lens)
        found, wanted = together.under(lens).readout("W_in"), alone.readout("W_in")
        assert_same_readout(found, wanted, ~alone.is_zero("W_in"))


def normalized_error(model: Any, scale: float) -> float:
    """Error of normalized scores computed together with raw ones, relative to those alone."""

    def short(logits: Tensor, tokens: Tensor) -> Tensor:
        return scale * -logits[:, -1].log_softmax(-1)[:, TARGET]

    prompt = "Lionel Messi plays for"
    beside, alone = (
        backward_lens(model, prompt, objective=short, projection=projection, matrices="W_out")
        .under("normalized")
        .readout("W_out")
        .top_scores[:-1]
        for projection in (LENSES, "normalized")
    )
    return float(((beside - alone).abs() / alone.abs()).max())


def test_short_vectors_are_not_computed_from_the_bias_of_the_norm(
    facts_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    eps = torch.finfo(torch.float32).eps
    assert max(normalized_error(facts_model, scale) for scale in (1, 1e-4)) < 64 * eps
    # With a lower threshold the rounding of the bias is magnified.
    monkeypatch.setattr(unembedding, "_CLOSE", 1e-12)
    assert normalized_error(facts_model, 1e-4) > 1000 * eps


def test_custom_projections_combine_with_the_lenses(gpt2: Case) -> None:
    tokens = gpt2.tokens(4)
    result = backward_lens(gpt2.model, tokens, 45, projection=("normalized", Ties(), "logit_lens"))
    assert result.projections == ("normalized", "Ties", "logit_lens")
    assert (result.under("Ties").target_rank("W_out") == 47).all()
    for lens in LENSES:
        alone = backward_lens(gpt2.model, tokens, 45, projection=lens)
        real = ~alone.is_zero("W_out")
        assert_same_readout(result.under(lens).readout("W_out"), alone.readout("W_out"), real)
    with pytest.raises(InputError, match=r"'jacobian' was not requested.*normalized, Ties"):
        result.under("jacobian")


class InPlace:
    """A projection that overwrites its argument, and has its own name."""

    name = "in place"

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        return torch.arange(97.0, dtype=vectors.dtype) * vectors.zero_()[:, :1]


def test_a_projection_that_works_in_place_does_not_affect_others(gpt2: Case) -> None:
    tokens = gpt2.tokens(4)
    result = backward_lens(gpt2.model, tokens, TARGET, projection=(InPlace(), "logit_lens"))
    assert result.projections == ("in place", "logit_lens")
    alone = backward_lens(gpt2.model, tokens, TARGET, projection="logit_lens")
    found, wanted = result.under("logit_lens").readout("W_out"), alone.readout("W_out")
    assert_same_readout(found, wanted, ~alone.is_zero("W_out"))


def test_the_direction_of_the_shortest_vectors_is_decoded(facts_model: Any) -> None:
    def short(logits: Tensor, tokens: Tensor) -> Tensor:
        return 1e-28 * -logits[:, -1].log_softmax(-1)[:, TARGET]

    prompt = "Lionel Messi plays for"
    tiny, usual = (
        backward_lens(facts_model, prompt, objective=objective, matrices="W_out").under(
            "normalized"
        )
        for objective in (short, target_nll(TARGET))
    )
    at = "W_out", -2, -1
    assert 0 < float(tiny.capture["W_out", 6].vjps.abs().max()) < 1e-26
    assert tiny.top_tokens(*at) == usual.top_tokens(*at)


@pytest.mark.parametrize("projections", [(), ("normalized", "normalized"), (Ties(), Ties())])
def test_projections_need_distinct_names(gpt2: Case, projections: Any) -> None:
    with pytest.raises(InputError, match=r"pass one, or several that differ in name"):
        backward_lens(gpt2.model, gpt2.tokens(3), TARGET, projection=projections)


# ---------------------------------------------------------------------------- k, chunks, targets


def test_k_may_be_the_whole_vocabulary(gpt2: Case) -> None:
    result = backward_lens(gpt2.model, gpt2.tokens(3), TARGET, k=97)
    readout = result.readout("W_in")
    everything = list(range(97))
    for ids in readout.top_ids.reshape(-1, 97).tolist():
        assert sorted(ids) == everything
    assert len(result.top_tokens("W_in", 0, 0)) == 97
    assert result.top_tokens("W_in", 0, 0, k=2) == result.top_tokens("W_in", 0, 0)[:2]


def test_chunks_of_one_vector_give_the_same(gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tokens = gpt2, gpt2.tokens(3, 3)
    whole = backward_lens(case.model, tokens, TARGET, matrices="mlp")
    monkeypatch.setattr("backward_lens_tl.readout.streaming._CPU_CHUNK", 1)
    calls = Ties()
    backward_lens(case.model, tokens, TARGET, projection=calls, matrices="W_in", layers=0)
    assert len(calls.layers) == 6
    chunked = backward_lens(case.model, tokens, TARGET, matrices="mlp")
    for matrix in case.matrices:
        live = ~whole.is_zero(matrix)
        assert torch.equal(chunked.target_rank(matrix)[live], whole.target_rank(matrix)[live])
        assert torch.equal(
            chunked.readout(matrix).top_ids[live], whole.readout(matrix).top_ids[live]
        )
        torch.testing.assert_close(
            chunked.readout(matrix).bottom_scores, whole.readout(matrix).bottom_scores
        )


@KINDS_OF_NORMS
def test_without_a_target_the_models_own_answer_is_used(case: Case) -> None:
    tokens = case.tokens(5, 5, 5)
    result = backward_lens(case.model, tokens, layers=0)
    with torch.no_grad():
        answers = case.logits(tokens)[:, -1].argmax(-1)
    assert result.capture.targets is not None
    assert torch.equal(result.capture.targets, answers[:, None].expand(3, 5))
    explicit = backward_lens(case.model, tokens, answers, layers=0)
    assert torch.equal(result.capture.loss, explicit.capture.loss)
    assert torch.equal(result.target_rank("W_out"), explicit.target_rank("W_out"))


def test_a_target_with_an_objective_is_only_ranked(gpt2: Case) -> None:
    tokens = gpt2.tokens(5)

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 9]

    ranked = backward_lens(gpt2.model, tokens, 9, objective=loss)
    other = backward_lens(gpt2.model, tokens, 3, objective=loss)
    assert torch.equal(ranked.capture["W_in", 0].vjps, other.capture["W_in", 0].vjps)
    assert not torch.equal(ranked.target_rank("W_out"), other.target_rank("W_out"))
    silent = backward_lens(gpt2.model, tokens, objective=loss)
    assert silent.target() is None
    assert silent.cell("W_out", 0, 0).target_rank is None
    with pytest.raises(InputError, match="target="):
        silent.target_rank("W_out")


def test_targets_one_per_prompt_as_texts_and_ids(gpt2: Case) -> None:
    words = [" Paris", " the", " is"]
    ids = [gpt2.model.tokenizer(word)["input_ids"][-1] for word in words]
    by_text = backward_lens(gpt2.model, PROMPTS, words)
    by_id = backward_lens(gpt2.model, PROMPTS, ids)
    by_tensor = backward_lens(gpt2.model, PROMPTS, torch.tensor(ids))
    assert [by_text.target(b) for b in range(3)] == words
    for other in (by_id, by_tensor):
        assert torch.equal(other.capture.loss, by_text.capture.loss)
        assert torch.equal(other.target_rank("W_out"), by_text.target_rank("W_out"))


@pytest.mark.parametrize("name", ["bridge-gemma2", "hooked-gemma2"])
def test_softcap_bounds_the_scores(name: str) -> None:
    case = build(name)
    result = backward_lens(case.model, case.tokens(4), TARGET)
    assert 1 < result.readout("W_in").top_scores.abs().max() < 1.5


def test_faint_cells_are_those_where_the_final_norms_eps_exceeds_the_vector(
    facts_model: Any,
) -> None:
    """The model is confident of its own answer, so the gradient towards it is tiny."""
    prompt = "Lionel Messi plays for"
    sure = backward_lens(facts_model, prompt)
    for layer in sure.layers:
        delta = sure.capture["W_out", layer].vjps[0, -1]
        centred = delta - delta.mean()
        assert centred.square().mean() < 1e-5, "the model's layer_norm_epsilon"
        assert sure.cell("W_out", layer, -1).is_faint
        assert not sure.cell("W_in", layer, -1).is_faint
    normalized = backward_lens(facts_model, prompt, projection="normalized")
    assert not normalized.to_df()["is_faint"].any()
    other = backward_lens(facts_model, prompt, " Paris")
    assert not any(other.cell("W_out", layer, -1).is_faint for layer in other.layers)
    assert [normalized.top_tokens("W_out", layer, -1, 1) for layer in sure.layers] == [
        [" Miami"]
    ] * len(sure.layers)
