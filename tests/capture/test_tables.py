"""Neurons of a gradient, and gradients as tables, against dense matrices and slow loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.predictions import Predictions
from backward_lens_tl.capture.tables import gradient_table, neuron_table
from backward_lens_tl.errors import InputError

PROMPTS = ["Lionel Messi plays for", "The Eiffel Tower is in the city of", "Rome is in"]
TARGETS = [" Paris", " Rome", " Paris"]
D_MODEL, D_HIDDEN, N_HEADS = 11, 12, 3


@pytest.fixture(scope="module")
def capture(facts_model: Any) -> GradientCapture:
    """Prompts of different lengths; every matrix of some layers of the facts model."""
    loss = blt.target_nll(TARGETS)
    return blt.capture_gradients(facts_model, PROMPTS, loss, matrices="all", layers=[0, 4, 7])


@pytest.fixture(scope="module")
def table(capture: GradientCapture) -> pd.DataFrame:
    return gradient_table(capture)


def made(matrix: str, n: int, *, heads: int | None = None, seed: int = 0) -> MatrixGradient:
    """Random float32 factors of two prompts, the second one shorter."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, n, D_MODEL, generator=generator)
    hidden = torch.randn(2, n, D_HIDDEN, generator=generator)
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, n - 1 :] = n == 1
    wide, hidden = (part.masked_fill(~mask[..., None], 0) for part in (wide, hidden))
    if heads is not None:
        hidden = hidden.unflatten(-1, (heads, -1))
    inputs, vjps = (hidden, wide) if matrix in ("W_out", "W_O") else (wide, hidden)
    return MatrixGradient(matrix, 0, inputs, vjps, mask)


def slow_neurons(gradient: MatrixGradient, batch: int) -> tuple[Tensor, Tensor]:
    """Return neurons as rows of the dense float64 gradient, and the vectors that span them."""
    real = gradient.mask[batch]
    inputs = gradient.inputs[batch, real].flatten(1).double()
    vjps = gradient.vjps[batch, real].flatten(1).double()
    dense = torch.zeros(inputs.shape[1], vjps.shape[1], dtype=torch.float64)
    for x, delta in zip(inputs, vjps, strict=True):
        dense += torch.outer(x, delta)
    return (dense, vjps) if gradient.matrix in ("W_out", "W_O") else (dense.T, inputs)


KINDS = [("W_in", None), ("W_out", None), ("W_Q", N_HEADS), ("W_O", N_HEADS)]


@pytest.mark.parametrize("n", [1, 4, 15])  # fewer and more than d_model
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize(("matrix", "heads"), KINDS)
def test_neurons_against_the_dense_gradient(
    matrix: str, heads: int | None, batch: int, n: int
) -> None:
    gradient = made(matrix, n, heads=heads)
    neurons, vectors = slow_neurons(gradient, batch)
    norms, similarity = gradient.neuron_norms(batch), gradient.neuron_similarity(batch)
    assert norms.shape == (D_HIDDEN,)
    assert similarity.shape == (D_HIDDEN, len(vectors))
    # Both sides are float64, and sums have at most 15 terms of about 1.
    for j in range(D_HIDDEN):
        assert norms[j].item() == pytest.approx(math.dist(neurons[j], [0] * D_MODEL), rel=1e-12)
        torch.testing.assert_close(
            gradient.neuron(j, batch).double(), neurons[j], rtol=0, atol=1e-4
        )
        for i, vector in enumerate(vectors):
            lengths = neurons[j].norm() * vector.norm()
            cosine = float(neurons[j] @ vector / lengths)
            assert similarity[j, i].item() == pytest.approx(cosine, abs=1e-12)


def test_with_one_position_every_neuron_is_the_vector_or_its_opposite() -> None:
    gradient = made("W_out", 1)
    signs = gradient.inputs[0, 0].sign().double()
    torch.testing.assert_close(gradient.neuron_similarity(0)[:, 0], signs, rtol=0, atol=1e-14)


def test_similarities_are_valid_cosines() -> None:
    """Neurons along one of several vectors: rounding would put some cosines above 1."""
    for seed in range(5):
        gradient = made("W_out", 6, seed=seed)
        only = torch.zeros_like(gradient.inputs)
        only[:, 3] = gradient.inputs[:, 3]
        similarity = replace(gradient, inputs=only).neuron_similarity(0)
        assert similarity[:, 3].abs().min() == pytest.approx(1, abs=1e-14)
        assert similarity.acos().isfinite().all()


def test_neurons_whose_terms_cancel_keep_their_digits() -> None:
    """The neuron `s + e - s` is `e`; from the Gram matrix its norm would be rounding only."""
    tiny = 2.0**-32
    vectors = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0)).double()
    vectors[0, 0] = 0
    vectors[1] = vectors[0]
    vectors[1, 0] = tiny
    coefficients = torch.tensor([[-1.0], [1.0]]).double()
    mask = torch.ones(1, 2, dtype=torch.bool)
    gradient = MatrixGradient("W_in", 0, vectors[None], coefficients[None], mask)
    # The basis is accurate to eps = 2e-16, which is 1e-6 of the neuron.
    assert gradient.neuron_norms(0).item() == pytest.approx(tiny, rel=1e-5)
    gram = vectors @ vectors.T
    naive = float((coefficients.T @ gram @ coefficients).clamp_min(0).sqrt())
    assert naive != pytest.approx(tiny, rel=0.5)


def test_zero_vectors_have_no_direction() -> None:
    gradient = made("W_out", 4)
    inputs, vjps = gradient.inputs.clone(), gradient.vjps.clone()
    inputs[0, :, 5], vjps[0, 2] = 0, 0
    gradient = replace(gradient, inputs=inputs, vjps=vjps)
    similarity = gradient.neuron_similarity(0)
    assert gradient.neuron_norms(0)[5] == 0
    assert similarity.isnan().sum() == 4 + D_HIDDEN - 1
    assert similarity[5].isnan().all()
    assert similarity[:, 2].isnan().all()


def experts() -> MatrixGradient:
    """Two tokens, each in two of three experts."""
    inputs, vjps = torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 3)
    mask = torch.ones(1, 2, dtype=torch.bool)
    slots = torch.tensor([[[0, 1], [1, 2]]])
    return MatrixGradient("W_out", 0, inputs, vjps, mask, experts=slots, n_experts=3)


@pytest.mark.parametrize("method", ["neuron_norms", "neuron_similarity"])
def test_experts_with_separate_factors_are_refused(method: str) -> None:
    with pytest.raises(InputError, match=r"each expert of W_out in layer 0 has its own factors"):
        getattr(experts(), method)()
    patched = made("W_Q", 4, heads=N_HEADS)
    patched = replace(patched, inputs=patched.inputs[:, :, None].repeat(1, 1, N_HEADS, 1))
    with pytest.raises(InputError, match=r"with \.head\(index\)"):
        getattr(patched, method)()
    assert getattr(patched.head(0), method)(0).shape[0] == D_HIDDEN // N_HEADS
    with pytest.raises(InputError, match="prompt 2 does not exist"):
        getattr(made("W_in", 4), method)(2)


# ---------------------------------------------------------------------------------- gradient_table


def test_gradients_of_a_batch(capture: GradientCapture, table: pd.DataFrame) -> None:
    assert list(table.columns) == [
        "prompt", "matrix", "layer", "is_last_layer", "n_tokens", "n_writing", "loss", "rank",
        "largest_rank", "input_rank", "vjp_rank", "norm", "top_energy", "rank_99",
        "singular_values",
    ]  # fmt: skip
    assert len(table) == len(PROMPTS) * len(capture)
    assert [str(table[name].dtype) for name in ("rank", "norm")] == ["Int64", "float64"]
    assert table["is_last_layer"].tolist() == (table["layer"] == 7).tolist()
    last = capture.layers[-1]
    for row in table.itertuples():
        tokens = capture.str_tokens[row.prompt]
        assert row.n_tokens == len(tokens)
        assert row.loss == capture.loss[row.prompt].item()
        if row.matrix in ("W_in", "W_out"):  # the paper's figure 4
            assert row.rank == (1 if row.layer == last else len(tokens))
    assert len(set(table["n_tokens"])) == 3


def test_norms_and_singular_values_are_those_of_the_dense_gradient(
    capture: GradientCapture, table: pd.DataFrame
) -> None:
    chosen = table["layer"].isin([0, 7]) & table["matrix"].isin(["W_out", "W_O"])
    for row in table[chosen & (table["prompt"] == 2)].itertuples():
        dense = capture[row.matrix, row.layer].dense(row.prompt).double()
        dense = dense.flatten(0, -2)  # heads of W_O are concatenated in its rows
        # Products in float32, sums over at most 12 tokens: rounding of 1e-6.
        assert row.norm == pytest.approx(dense.norm().item(), rel=1e-5)
        expected = torch.linalg.svdvals(dense).numpy()[: row.n_tokens]
        np.testing.assert_allclose(row.singular_values, expected, atol=1e-5 * expected[0])


def test_causes_that_bound_the_rank(capture: GradientCapture, table: pd.DataFrame) -> None:
    for row in table[table["matrix"].isin(["W_in", "W_out"])].itertuples():
        gradient = capture[row.matrix, row.layer]
        n, zero = row.n_tokens, gradient.is_zero[row.prompt]
        assert row.n_writing == row.largest_rank == sum(not each for each in zero[:n].tolist())
        for found, factor in ((row.input_rank, gradient.inputs), (row.vjp_rank, gradient.vjps)):
            factor = factor[row.prompt, :n].double()
            # The tolerance of `rank`: n roundings of float32.
            values = torch.linalg.svdvals(factor)
            assert found == int((values > n * 2.0**-23 * values[0]).sum())
        energy = np.square(row.singular_values)
        assert row.top_energy == pytest.approx(energy[0] / sum(energy), rel=1e-12)
        assert sum(energy[: row.rank_99]) >= 0.99 * sum(energy) > sum(energy[: row.rank_99 - 1])


def test_more_positions_than_dimensions() -> None:
    gradient = made("W_in", D_HIDDEN + D_MODEL)
    row = gradient_table(hand_made(gradient)).iloc[0]
    assert row["n_tokens"] == row["n_writing"] == D_HIDDEN + D_MODEL
    assert row["largest_rank"] == row["rank"] == min(D_HIDDEN, D_MODEL)


def test_a_gradient_of_zero() -> None:
    gradient = made("W_in", 3)
    gradient = replace(gradient, vjps=torch.zeros_like(gradient.vjps))
    row = gradient_table(hand_made(gradient)).iloc[0]
    found = row[["n_writing", "rank", "largest_rank", "vjp_rank", "norm", "rank_99"]]
    assert found.tolist() == [0] * 6
    assert np.isnan(row["top_energy"])


def hand_made(gradient: MatrixGradient) -> GradientCapture:
    batch = len(gradient.mask)
    return GradientCapture(
        gradients={(gradient.matrix, gradient.layer): gradient},
        tokens=torch.zeros(gradient.mask.shape, dtype=torch.long),
        mask=gradient.mask,
        str_tokens=tuple(tuple("abcdefgh"[: int(n)]) for n in gradient.mask.sum(1)),
        loss=torch.arange(float(batch)),
        targets=None,
        target_texts=None,
        predictions=Predictions.without_target(torch.zeros(batch, 3)),
        prompt_lengths=gradient.mask.sum(1),
        n_layers=1 + gradient.layer,
        objective="made by hand",
        model_name="none",
    )


def test_one_matrix_and_one_prompt(
    capture: GradientCapture, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal rows of the whole table, each from one factorisation."""
    calls: list[torch.Size] = []
    own = torch.linalg.qr
    monkeypatch.setattr(
        torch.linalg, "qr", lambda a, **mode: calls.append(a.shape) or own(a, **mode)
    )
    for matrix, batch in (("W_V", 1), ("W_V", None), (None, 1)):
        calls.clear()
        some = gradient_table(capture, matrix, batch)
        assert len(calls) == 2 * len(some)
        chosen = (matrix is None) | (table["matrix"] == matrix)
        chosen &= (batch is None) | (table["prompt"] == batch)
        pd.testing.assert_frame_equal(some, table[chosen].reset_index(drop=True))


@pytest.mark.usefixtures("as_for_a_user")
def test_gradients_that_were_not_captured(capture: GradientCapture) -> None:
    with pytest.raises(InputError, match="'W_gate' was not captured; pass one of W_Q, W_K"):
        gradient_table(capture, "W_gate")
    for batch in (3, -1, True):
        with pytest.raises(InputError, match=f"prompt {batch} does not exist; allowed: 0 to 2"):
            gradient_table(capture, batch=batch)


def test_experts_have_no_joint_rank() -> None:
    table = gradient_table(hand_made(experts()))
    assert table["rank"].isna().all()
    assert table["norm"].isna().all()
    assert table["singular_values"].tolist() == [[]]
    assert table["n_tokens"].tolist() == [2]


# ------------------------------------------------------------------------------------ neuron_table


@pytest.mark.parametrize("batch", [0, 1])
def test_neurons_with_tokens(batch: int) -> None:
    gradient = made("W_in", 4)
    table = neuron_table(hand_made(gradient), "W_in", 0, batch)
    neurons, vectors = slow_neurons(gradient, batch)
    n = len(vectors)
    assert list(table.columns) == [
        "neuron", "neuron_norm", "norm_order", "position", "token", "similarity",
    ]  # fmt: skip
    assert len(table) == D_HIDDEN * n
    norms = neurons.norm(dim=1)
    for index, row in enumerate(table.itertuples()):
        assert (row.neuron, row.position) == divmod(index, n)
        assert row.token == "abcdefgh"[row.position]
        assert row.neuron_norm == pytest.approx(norms[row.neuron].item(), rel=1e-12)
        assert row.norm_order == int((norms > norms[row.neuron]).sum())
        cosine = torch.cosine_similarity(neurons[row.neuron], vectors[row.position], dim=0)
        assert row.similarity == pytest.approx(cosine.item(), abs=1e-12)


def test_neurons_of_equal_norm_keep_their_order() -> None:
    gradient = made("W_out", 2)
    gradient = replace(gradient, inputs=torch.ones_like(gradient.inputs))
    table = neuron_table(hand_made(gradient), "W_out", 0)
    assert table["norm_order"].tolist() == table["neuron"].tolist()
    assert sorted(set(table["norm_order"])) == list(range(D_HIDDEN))


def test_neurons_that_were_not_captured(capture: GradientCapture) -> None:
    with pytest.raises(InputError, match=r"\('W_gate', 0\) was not captured"):
        neuron_table(capture, "W_gate", 0)
    with pytest.raises(InputError, match=r"each expert of W_out"):
        neuron_table(hand_made(experts()), "W_out", 0)


def test_the_facts_models_neuron_of_largest_norm(capture: GradientCapture) -> None:
    """As in the paper's figure 9, neurons with a large norm lie along the last VJP."""
    table = neuron_table(capture, "W_out", 7)
    by_position = table.groupby("position")["similarity"]
    assert by_position.count().tolist() == [0] * 5 + [512]  # only the last one writes
    assert table["similarity"].abs().max() == pytest.approx(1, abs=1e-6)
    assert isinstance(table, pd.DataFrame)
