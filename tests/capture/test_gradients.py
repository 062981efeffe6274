"""Properties computed from the factors: rank, singular values, neurons, dense matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import Case, build, nll
from torch import Tensor
from transformer_lens import FactoredMatrix

from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.objectives import next_token_loss, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import InputError

TARGET = 5
D_IN, D_OUT = 11, 17


def random_factors(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=generator, dtype=torch.float64)
    delta = torch.randn(n, D_OUT, generator=generator, dtype=torch.float64)
    return x.to(dtype), delta.to(dtype)


def hand_made(x: Tensor, delta: Tensor, matrix: str = "W_in") -> MatrixGradient:
    mask = torch.ones(1, len(x), dtype=torch.bool)
    return MatrixGradient(matrix, 0, x[None], delta[None], mask)


def slow_dense(x: Tensor, delta: Tensor) -> Tensor:
    """The sum of outer products of the paper's equation 8, entry by entry."""
    dense = torch.zeros(x.shape[1], delta.shape[1], dtype=torch.float64)
    for i in range(len(x)):
        dense += torch.outer(x[i].double(), delta[i].double())
    return dense


# ------------------------------------------------------------------------------ lemma 4.1: the rank


def assert_rank_is_the_number_of_positions(case: Case, tokens: Tensor) -> None:
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    n, last = tokens.shape[1], case.n_layers - 1
    ranks = {key: gradient.rank() for key, gradient in capture.gradients.items()}
    expected = {(matrix, layer): 1 if layer == last else n for matrix, layer in ranks}
    if case.name == "no_norm":
        expected["W_out", last - 1] = min(n, 7)
    assert ranks == expected


def test_without_norms_the_vjps_of_w_out_are_dependent() -> None:
    """Lemma 4.1 needs its hypothesis: the rank is smaller where the `delta_i` are dependent.

    Without a norm, gradients that the last layer's attention passes to other positions lie in two
    directions per head, through values and keys, for any number of positions.
    """
    case = build("hooked-no_norm")
    n_heads = 3
    for n in (6, 9, 20):
        capture = capture_gradients(case.model, case.tokens(n), target_nll(TARGET))
        assert capture["W_out", case.n_layers - 2].rank() == min(n, 2 * n_heads + 1)
        assert capture["W_in", case.n_layers - 2].rank() == n


def test_rank_is_the_number_of_positions_and_one_in_the_last_layer(case: Case) -> None:
    for n in (1, 2, 9):
        assert_rank_is_the_number_of_positions(case, case.tokens(n))


def test_rank_in_the_stories_model(stories: Case) -> None:
    tokens = stories.model.to_tokens("Once upon a time there was a little dog")
    assert_rank_is_the_number_of_positions(stories, tokens)


def test_rank_in_the_facts_model(facts: Case) -> None:
    tokens = facts.model.to_tokens("Lionel Messi plays for")
    assert_rank_is_the_number_of_positions(facts, tokens)


def test_only_the_last_position_contributes_in_the_last_layer(case: Case) -> None:
    """Appendix A: every other `delta_i` is exactly zero there; in the layer before, none is."""
    capture = capture_gradients(case.model, case.tokens(6), target_nll(TARGET), matrices="mlp")
    for matrix in case.matrices:
        last = capture[matrix, case.n_layers - 1]
        assert (last.vjps[0, :-1] == 0).all()
        assert last.is_zero.tolist() == [[True] * 5 + [False]]
        before = capture[matrix, case.n_layers - 2]
        assert not before.is_zero.any()


def test_a_loss_on_every_position_gives_full_rank_in_the_last_layer(case: Case) -> None:
    """Negative control of appendix A; only the last position has no next token."""
    capture = capture_gradients(case.model, case.tokens(6), next_token_loss(), matrices="mlp")
    assert {gradient.rank() for gradient in capture} == {5}


def test_rank_against_numpy_on_the_dense_gradient(case: Case) -> None:
    tokens = case.tokens(9)
    expected = case.weight_gradients(tokens, nll(TARGET))
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    for key, gradient in expected.items():
        values = np.linalg.svd(gradient.numpy(), compute_uv=False)
        found = capture[key].singular_values()
        assert found.shape == (9,)
        # Rounding of a value is relative to the largest one.
        np.testing.assert_allclose(found.numpy(), values[:9], rtol=0, atol=1e-12 * values[0])
        assert capture[key].rank() == np.linalg.matrix_rank(gradient.numpy())


DEPENDENT: dict[str, tuple[int, Callable[[Tensor, Tensor], None]]] = {
    "nothing": (6, lambda x, delta: None),
    "equal inputs": (5, lambda x, delta: x[3].copy_(x[1])),
    "equal VJPs": (5, lambda x, delta: delta[0].copy_(delta[5])),
    "input twice another": (5, lambda x, delta: x[3].copy_(2 * x[1])),
    "VJP a sum of two": (5, lambda x, delta: delta[2].copy_(delta[0] - delta[4])),
    "a zero VJP": (5, lambda x, delta: delta[2].zero_()),
    "a zero input and another zero VJP": (4, lambda x, delta: (x[0].zero_(), delta[1].zero_())),
    "an input repeated three times": (3, lambda x, delta: x[1:4].copy_(x[:1].expand(3, -1))),
    "all VJPs but one": (1, lambda x, delta: delta[:-1].zero_()),
    "no VJP at all": (0, lambda x, delta: delta.zero_()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", DEPENDENT)
def test_dependent_positions_lower_the_rank(how: str, dtype: torch.dtype) -> None:
    rank, make_dependent = DEPENDENT[how]
    x, delta = random_factors(6, dtype=dtype)
    make_dependent(x, delta)
    gradient = hand_made(x, delta)
    assert gradient.rank() == rank
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14  # float32 rounds this sum
    dense = slow_dense(x, delta)
    assert gradient.rank() == torch.linalg.matrix_rank(dense, rtol=tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rank_does_not_depend_on_the_size_of_the_loss(scale: float) -> None:
    x, delta = random_factors(6)
    assert hand_made(x, scale * delta).rank() == 6


def test_a_weak_position_counts_if_float64_resolves_it() -> None:
    """numpy's tolerance in float64 is 17 * 2e-16 of the largest singular value."""
    for weak, rank in ((1e-8, 6), (1e-13, 6), (1e-18, 5)):
        x, delta = random_factors(6)
        delta[2] *= weak
        assert hand_made(x, delta).rank() == rank
        assert np.linalg.matrix_rank(slow_dense(x, delta).numpy()) == rank


@pytest.mark.parametrize("n", [D_IN - 1, D_IN, D_IN + 1, D_OUT + 5])
def test_more_positions_than_dimensions_of_the_matrix(n: int) -> None:
    x, delta = random_factors(n)
    gradient = hand_made(x, delta)
    values = np.linalg.svd(slow_dense(x, delta).numpy(), compute_uv=False)[:n]
    assert gradient.rank() == min(n, D_IN)
    np.testing.assert_allclose(gradient.singular_values().numpy(), values, rtol=1e-10)


def test_singular_values_of_float32_factors_are_computed_in_float64() -> None:
    x, delta = random_factors(6, dtype=torch.float32)
    x[5] = x[4] + 1e-5 * x[5]
    values = np.linalg.svd(slow_dense(x, delta).numpy(), compute_uv=False)[:6]
    found = hand_made(x, delta).singular_values()
    assert found.dtype == torch.float64
    # The smallest value is 1e-5 of the largest; float32 would keep two digits of it.
    np.testing.assert_allclose(found.numpy(), values, rtol=1e-9)


# ------------------------------------------------------------------- factors, neurons, dense matrix


@pytest.mark.parametrize("matrix", ["W_in", "W_gate", "W_out"])
def test_neuron_is_a_column_or_row_of_the_dense_gradient(matrix: str) -> None:
    x, delta = random_factors(6)
    gradient, dense = hand_made(x, delta, matrix), slow_dense(x, delta)
    rows = dense if matrix == "W_out" else dense.T
    for j, row in enumerate(rows):
        torch.testing.assert_close(gradient.neuron(j), row)
    with pytest.raises(InputError, match=f"neuron {len(rows)} .* 0 to {len(rows) - 1}"):
        gradient.neuron(len(rows))
    with pytest.raises(InputError, match="-1"):
        gradient.neuron(-1)


def test_neurons_of_a_model_are_those_of_its_weight_gradient(llama: Case) -> None:
    tokens = llama.tokens(5)
    expected = llama.weight_gradients(tokens, nll(TARGET))
    capture = capture_gradients(llama.model, tokens, target_nll(TARGET), matrices="mlp")
    for (matrix, layer), gradient in expected.items():
        neuron = gradient[7] if matrix == "W_out" else gradient[:, 7]
        assert neuron.shape == (llama.d_model,)
        torch.testing.assert_close(capture[matrix, layer].neuron(7), neuron)


@pytest.mark.parametrize("matrix", ["W_in", "W_gate", "W_out"])
def test_spanning_set_is_the_side_of_the_residual_stream(matrix: str) -> None:
    x, delta = random_factors(3)
    spanning = hand_made(x, delta, matrix).spanning_set
    assert torch.equal(spanning[0], delta if matrix == "W_out" else x)


def padded_batch() -> MatrixGradient:
    """Two prompts of 4 and 2 positions; values at padding must not count."""
    x, delta = random_factors(8)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    return MatrixGradient("W_in", 2, x.reshape(2, 4, D_IN), delta.reshape(2, 4, D_OUT), mask)


@pytest.mark.parametrize(("batch", "n"), [(0, 4), (1, 2)])
def test_each_prompt_has_its_own_length(batch: int, n: int) -> None:
    gradient = padded_batch()
    expected = slow_dense(gradient.inputs[batch, :n], gradient.vjps[batch, :n])
    factored = gradient.factored(batch)
    assert isinstance(factored, FactoredMatrix)
    assert factored.A.shape == (D_IN, n)
    assert factored.B.shape == (n, D_OUT)
    torch.testing.assert_close(factored.AB, expected)
    torch.testing.assert_close(gradient.dense(batch), expected)
    torch.testing.assert_close(gradient.neuron(3, batch), expected[:, 3])
    assert gradient.rank(batch) == n
    np.testing.assert_allclose(
        gradient.singular_values(batch).numpy(),
        np.linalg.svd(expected.numpy(), compute_uv=False)[:n],
        rtol=1e-10,
    )


@pytest.mark.parametrize("call", ["factored", "dense", "rank", "singular_values"])
@pytest.mark.parametrize("batch", [2, -1])
def test_a_missing_prompt_is_refused(call: str, batch: int) -> None:
    with pytest.raises(InputError, match=f"{batch}.*0 to 1"):
        getattr(padded_batch(), call)(batch)


def test_norms_equal_those_of_the_vjps() -> None:
    x, delta = random_factors(5)
    norms = hand_made(x, delta).norms[0]
    for i in range(5):
        assert float(norms[i]) == pytest.approx(sum(float(d) ** 2 for d in delta[i]) ** 0.5)


def test_zero_positions_are_marked() -> None:
    x, delta = random_factors(5)
    x[1] = 0
    delta[3] = 0
    delta[4, :-1] = 0
    assert hand_made(x, delta).is_zero.tolist() == [[False, True, False, True, False]]


def test_a_key_that_was_not_captured_names_those_that_were(gpt2: Case) -> None:
    capture = capture_gradients(gpt2.model, gpt2.tokens(3), target_nll(TARGET), layers=[0, 2])
    with pytest.raises(InputError, match=r"W_gate.*W_in, W_out.*0, 2"):
        capture["W_gate", 0]
    with pytest.raises(InputError, match="0, 2"):
        capture["W_in", 1]
