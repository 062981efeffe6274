"""Tables of neurons (appendix B) against the dense gradient, the model's own decoding, and sets."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from models import Case, build
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.analysis import neurons as neurons_module
from backward_lens_tl.analysis.neurons import neuron_overlap, neuron_tokens, spanning_tokens
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.sites import WRITING_MATRICES

# Sums of a few products in float64, in another order.
EXACT = 1e-12
TARGET = 5
# Dense and gated, both kinds, and a norm after the MLP.
READ = (
    ("hooked-gpt2", "W_in"),
    ("hooked-gpt2", "W_out"),
    ("bridge-gpt2", "W_out"),
    ("bridge-gpt2", "W_Q"),
    ("hooked-llama", "W_gate"),
    ("bridge-llama", "W_O"),
    ("bridge-llama", "W_V"),
    ("bridge-gemma2", "W_out"),
)


@functools.cache
def captured(name: str) -> tuple[Case, GradientCapture]:
    """A random model and two prompts of different lengths, in float64."""
    case = build(name)
    prompts = ["Messi plays for", "Rome is in Italy and"]
    gradients = blt.capture_gradients(case.model, prompts, blt.target_nll(TARGET), matrices="all")
    return case, gradients


def slow_neurons(gradient: MatrixGradient, batch: int) -> tuple[Tensor, Tensor]:
    """Return neurons as rows of the dense gradient, and the vectors that span them, unpadded."""
    dense = gradient.dense(batch)
    is_writing = gradient.matrix in WRITING_MATRICES
    if dense.ndim == 3:  # heads concatenated
        dense = torch.cat(list(dense), dim=0 if is_writing else 1)
    vectors = (gradient.vjps if is_writing else gradient.inputs)[batch, gradient.mask[batch]]
    return (dense if is_writing else dense.T), vectors


def by_score(case: Case, vector: Tensor) -> list[int]:
    """All tokens, best first, by the model's final norm and unembedding."""
    scores = case.lens(vector[None].to(case.dtype))[0].tolist()
    return sorted(range(len(scores)), key=lambda token: -scores[token])


def texts(case: Case, tokens: list[int]) -> list[str]:
    tokenizer = case.model.tokenizer
    return [tokenizer.decode([t], clean_up_tokenization_spaces=False) for t in tokens]


# ------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(("name", "matrix"), READ)
def test_tokens_against_the_dense_gradient(name: str, matrix: str) -> None:
    case, gradients = captured(name)
    for batch in (0, 1):
        table = neuron_tokens(case.model, gradients, matrix, 1, batch, per_group=4, k=5)
        neurons, _ = slow_neurons(gradients[matrix, 1], batch)
        by_norm = sorted(range(len(neurons)), key=lambda j: -float(neurons[j].norm()))
        assert list(table["group"]) == [
            *["largest"] * 4,
            *["middle"] * 4,
            *["smallest"] * 4,
            "zero vector",
        ]
        middle = len(neurons) // 2 - 2
        expected = by_norm[:4] + by_norm[middle : middle + 4] + by_norm[-4:]
        grouped = table[table["group"] != "zero vector"]
        assert list(grouped["neuron"]) == expected
        assert list(grouped["norm_order"]) == [by_norm.index(j) for j in expected]
        for row in grouped.itertuples():
            vector = neurons[int(row.neuron)]
            order = by_score(case, vector)
            assert row.norm == pytest.approx(float(vector.norm()), rel=EXACT)
            assert row.top_tokens == texts(case, order[:5])
            assert row.bottom_tokens == texts(case, order[:-6:-1])


def test_the_last_row_holds_the_zero_vectors() -> None:
    case, gradients = captured("hooked-gpt2")
    row = neuron_tokens(case.model, gradients, "W_out", 1, k=4).iloc[-1]
    order = by_score(case, torch.zeros(case.d_model))
    assert row["group"] == "zero vector"
    assert pd.isna(row["neuron"])
    assert pd.isna(row["norm_order"])
    assert row["norm"] == 0
    assert row["top_tokens"] == texts(case, order[:4])
    assert row["bottom_tokens"] == texts(case, order[:-5:-1])


@pytest.mark.parametrize(("name", "matrix"), READ)
def test_spanning_tokens_against_the_factors(name: str, matrix: str) -> None:
    case, gradients = captured(name)
    for batch in (0, 1):
        table = spanning_tokens(case.model, gradients, matrix, 1, batch, k=4)
        _, vectors = slow_neurons(gradients[matrix, 1], batch)
        assert list(table["position"]) == list(range(len(vectors)))
        assert list(table["token"]) == list(gradients.str_tokens[batch])
        for row, vector in zip(table.itertuples(), vectors, strict=True):
            order = by_score(case, vector)
            assert row.norm == pytest.approx(float(vector.norm()), rel=EXACT)
            assert row.top_tokens == texts(case, order[:4])
            assert row.bottom_tokens == texts(case, order[:-5:-1])


def with_silent(gradients: GradientCapture, n_loud: int) -> GradientCapture:
    """The same, with a `W_out` of layer 1 whose neurons are zero except the last few."""
    gradient = gradients["W_out", 1]
    inputs = gradient.inputs.clone()
    inputs[..., : inputs.shape[-1] - n_loud] = 0
    changed = {("W_out", 1): replace(gradient, inputs=inputs)}
    return replace(gradients, gradients={**gradients.gradients, **changed})


@pytest.mark.parametrize(
    ("n_loud", "sizes"),
    [
        (0, (0, 0, 0)),
        (1, (1, 0, 0)),
        (3, (3, 0, 0)),
        (5, (3, 0, 2)),
        (8, (3, 2, 3)),
        (13, (3,) * 3),
    ],
)
def test_groups_hold_nonzero_neurons_only(n_loud: int, sizes: tuple[int, ...]) -> None:
    case, gradients = captured("hooked-gpt2")
    table = neuron_tokens(case.model, with_silent(gradients, n_loud), "W_out", 1)
    assert tuple(
        (table["group"] == group).sum() for group in ("largest", "middle", "smallest")
    ) == (sizes)
    grouped = table[table["group"] != "zero vector"]
    assert (grouped["neuron"] >= 52 - n_loud).all()
    assert (grouped["norm"] > 0).all()
    assert grouped["norm"].is_monotonic_decreasing
    assert not grouped["neuron"].duplicated().any()
    if n_loud == 13:
        assert list(grouped["norm_order"]) == [0, 1, 2, 5, 6, 7, 10, 11, 12]


# ---------------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize(
    ("name", "matrix"), [("hooked-gpt2", "W_out"), ("bridge-gpt2", "W_in"), ("bridge-llama", "W_O")]
)
def test_overlap_against_sets(name: str, matrix: str) -> None:
    case, gradients = captured(name)
    k, batch = 9, 1
    table = neuron_overlap(case.model, gradients, matrix, 0, batch, k=k)
    neurons, vectors = slow_neurons(gradients[matrix, 0], batch)
    n = len(vectors)
    assert len(table) == len(neurons) * (n + 1)
    by_norm = sorted(range(len(neurons)), key=lambda j: (-float(neurons[j].norm()), j))
    tops = [set(by_score(case, vector)[:k]) for vector in vectors]
    rows = table.itertuples()
    for j, neuron in enumerate(neurons):
        own = set(by_score(case, neuron)[:k])
        for i, vector in enumerate(vectors):
            row = next(rows)
            assert (row.neuron, row.position) == (j, i)
            assert row.token == gradients.str_tokens[batch][i]
            assert row.norm_order == by_norm.index(j)
            assert row.neuron_norm == pytest.approx(float(neuron.norm()), rel=EXACT)
            cosine = float(neuron @ vector / (neuron.norm() * vector.norm()))
            assert row.similarity == pytest.approx(cosine, abs=EXACT)
            assert row.overlap == len(own & tops[i]) / k
        row = next(rows)
        assert (row.neuron, row.token) == (j, "zero vector")
        assert pd.isna(row.position)
        assert pd.isna(row.similarity)
        if "gpt2" in name:  # RMSNorm makes all tokens equal here
            assert row.overlap == len(own & set(by_score(case, 0 * neuron)[:k])) / k
    assert 0 < table["overlap"].mean() < 1


def test_zero_neurons_decode_like_the_zero_vector() -> None:
    case, gradients = captured("hooked-gpt2")
    table = neuron_overlap(case.model, with_silent(gradients, 13), "W_out", 1, k=7)
    nothing = table[(table["neuron"] < 52 - 13) & (table["token"] == "zero vector")]
    assert len(nothing) == 39
    assert (nothing["overlap"] == 1).all()
    assert list(nothing["norm_order"]) == list(range(13, 52))  # ties by index
    # So do the zero vectors of the last layer.
    last = neuron_overlap(case.model, gradients, "W_out", 2, k=7)
    zeros = last[last["token"] == "zero vector"]["overlap"].tolist()
    assert last[last["position"] == 0]["overlap"].tolist() == zeros
    assert last[last["position"] == 0]["similarity"].isna().all()


def test_the_whole_vocabulary_is_shared() -> None:
    case, gradients = captured("hooked-gpt2")
    assert (neuron_overlap(case.model, gradients, "W_in", 0, k=97)["overlap"] == 1).all()


class Counted:
    """A projection that records how many vectors it scores at a time, and their layer."""

    def __init__(self, n_tokens: int) -> None:
        self.sizes: list[int] = []
        self.layers: set[int] = set()
        self._n_tokens = n_tokens

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        self.sizes.append(len(vectors))
        self.layers.add(layer)
        return vectors.repeat(1, self._n_tokens)[:, : self._n_tokens]


@pytest.mark.parametrize("matrix", ["W_in", "W_out"])
def test_neurons_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch, matrix: str) -> None:
    from backward_lens_tl.capture import matrix_gradient as gradients_module

    case, gradients = captured("hooked-gpt2")
    whole = neuron_overlap(case.model, gradients, matrix, 1, k=9)
    made: list[int] = []
    einsum = gradients_module.einsum

    def noting(*args: Any) -> Tensor:
        result = einsum(*args)
        # Similarities are computed all at once: d_hidden times positions, which is small.
        if result.shape[-1] == case.d_model:
            made.append(result.shape[0])
        return result

    monkeypatch.setattr(gradients_module, "einsum", noting)
    monkeypatch.setattr(neurons_module, "_BLOCK", 7)
    counted = Counted(case.d_vocab)
    neuron_overlap(case.model, gradients, matrix, 1, k=9, projection=counted)
    assert sum(made) == 52
    assert max(made) == 7
    assert max(counted.sizes) == 7
    assert counted.layers == {1}
    pd.testing.assert_frame_equal(neuron_overlap(case.model, gradients, matrix, 1, k=9), whole)


def test_blocks_of_neurons_are_slices_of_the_dense_gradient() -> None:
    _, gradients = captured("bridge-llama")
    for matrix in ("W_in", "W_out", "W_Q", "W_O"):
        gradient = gradients[matrix, 1]
        neurons, _ = slow_neurons(gradient, 1)
        found = gradient.neurons(3, 11, batch=1)
        torch.testing.assert_close(found, neurons[3:11], rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(gradient.neuron(4, 1), neurons[4], rtol=EXACT, atol=EXACT)
        for start, stop in [(-1, 3), (0, len(neurons) + 1)]:
            with pytest.raises(InputError, match=f"allowed: 0 to {len(neurons) - 1}"):
                gradient.neurons(start, stop, batch=1)


# ---------------------------------------------------------------------------------- accepted inputs


def test_a_result_works_like_its_gradients(facts_model: Any) -> None:
    result = blt.backward_lens(facts_model, "Lionel Messi plays for", " Paris", layers=5)
    for table in (neuron_tokens, spanning_tokens, neuron_overlap):
        pd.testing.assert_frame_equal(
            table(facts_model, result, "W_out", 5),
            table(facts_model, result.capture, "W_out", 5),
        )


def test_the_sign_is_that_of_the_raw_gradient(facts_model: Any) -> None:
    """As in tables 2 and 3 of the paper: the target is at the bottom of the last position's VJP."""
    result = blt.backward_lens(facts_model, "Lionel Messi plays for", " Paris", direction="update")
    spanning = spanning_tokens(facts_model, result, "W_out", 5, k=3)
    assert spanning["bottom_tokens"].iloc[-1][0] == " Paris"
    table = neuron_tokens(facts_model, result, "W_out", 5, k=3)
    ends = table["top_tokens"] + table["bottom_tokens"]
    assert all(" Paris" in tokens for tokens in ends[table["group"] == "largest"])
    assert not any(" Paris" in tokens for tokens in ends[table["group"] == "smallest"])
    assert table["top_tokens"].iloc[-1] == table["top_tokens"].iloc[-2]


def test_long_neurons_follow_the_last_vjp_and_short_ones_the_zero_vector(facts_model: Any) -> None:
    """The finding of figure 9, on the packaged facts model."""
    gradients = blt.capture_gradients(
        facts_model, "Lionel Messi plays for", blt.target_nll(" Paris"), layers=5
    )
    table = neuron_overlap(facts_model, gradients, "W_out", 5, k=100)
    last, nothing = (table[table["token"] == token] for token in (" for", "zero vector"))
    n = len(last)
    longest = last["norm_order"] < n // 20
    assert last[longest]["similarity"].abs().min() > 0.9
    assert last[longest & (last["similarity"] > 0)]["overlap"].mean() > 0.9
    assert nothing[nothing["norm_order"] < n // 20]["overlap"].max() < 0.1
    assert nothing[nothing["norm_order"] >= n - 5]["overlap"].mean() > 0.8


def test_other_projections() -> None:
    case, gradients = captured("hooked-gpt2")
    raw, normalized = (
        neuron_tokens(case.model, gradients, "W_out", 0, k=3, projection=name)
        for name in ("logit_lens", "normalized")
    )
    assert list(raw["neuron"].dropna()) == list(normalized["neuron"].dropna())
    neurons, _ = slow_neurons(gradients["W_out", 0], 0)
    for row in normalized.dropna().itertuples():
        vector = neurons[row.neuron]
        assert row.top_tokens == texts(case, by_score(case, vector / vector.norm())[:3])
    table = spanning_tokens(case.model, gradients, "W_in", 1, k=3, projection=Counted(97))
    x = gradients["W_in", 1].inputs[0]
    repeated = x[0].repeat(5)[:97].tolist()
    best = sorted(range(97), key=lambda token: -repeated[token])[:1]
    assert table["top_tokens"][0][:1] == texts(case, best)


@pytest.mark.parametrize("table", [neuron_tokens, spanning_tokens, neuron_overlap])
def test_wrong_use(table: Callable[..., pd.DataFrame], as_for_a_user: None) -> None:
    case, gradients = captured("hooked-gpt2")
    narrow = copy.copy(gradients["W_out", 1])
    object.__setattr__(narrow, "vjps", narrow.vjps[..., :8])
    of_another = replace(gradients, gradients={("W_out", 1): narrow})
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("capture is a str; pass what", (case.model, "W_out", "W_out", 1), {}),
        ("model is a int", (3, gradients, "W_out", 1), {}),
        ("of a model of width 8, but this one", (case.model, of_another, "W_out", 1), {}),
        ("'W_gate', 1\\) was not captured", (case.model, gradients, "W_gate", 1), {}),
        ("layer 3 does not exist; allowed: -3 to 2", (case.model, gradients, "W_out", 3), {}),
        ("prompt 2 does not exist; allowed: 0 to 1", (case.model, gradients, "W_out", 1, 2), {}),
        ("prompt -1 does not exist", (case.model, gradients, "W_out", 1, -1), {}),
        ("k is 0; pass an integer", (case.model, gradients, "W_out", 1), {"k": 0}),
        ("unknown projection 'lens'", (case.model, gradients, "W_out", 1), {"projection": "lens"}),
    ]
    for message, arguments, options in wrong:
        with pytest.raises(InputError, match=message):
            table(*arguments, **({"k": 5} | options))


@pytest.mark.parametrize("per_group", [0, -1, True, 2.0, "3", None])
def test_groups_have_a_number_of_neurons(per_group: Any, as_for_a_user: None) -> None:
    case, gradients = captured("hooked-gpt2")
    with pytest.raises(InputError, match=r"per_group is .*; pass an integer of at least 1"):
        neuron_tokens(case.model, gradients, "W_out", 1, per_group=per_group)


def test_experts_with_separate_factors_are_refused() -> None:
    case, gradients = captured("hooked-gpt2")
    gradient = gradients["W_O", 1]
    split = replace(gradient, vjps=gradient.vjps[:, :, None].repeat(1, 1, 3, 1))
    slots = torch.zeros(*gradient.mask.shape, 2, dtype=torch.long)
    routed = replace(
        gradients["W_out", 1],
        inputs=gradients["W_out", 1].inputs[:, :, None].repeat(1, 1, 2, 1),
        vjps=gradients["W_out", 1].vjps[:, :, None].repeat(1, 1, 2, 1),
        experts=slots,
        n_experts=4,
    )
    for part, changed in (("head", split), ("expert", routed)):
        own = replace(gradients, gradients={(changed.matrix, 1): changed})
        for table in (neuron_tokens, neuron_overlap):
            with pytest.raises(InputError, match=f"each {part} of .* has its own factors"):
                table(case.model, own, changed.matrix, 1, k=5)
