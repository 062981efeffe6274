"""The gradient of a batch and its main directions, against autograd and the dense decomposition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_gradients import FAMILIES, TEXTS, dense, joined
from models import Case, relative_error
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.capture.batch_gradient import BatchGradient
from backward_lens_tl.capture.directions import PrincipalDirections
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.errors import InputError

EXACT = 1e-10
"""The goal. Measured errors are below 1e-12; singular vectors are 100 times less exact than values,
because neighbouring values differ by a few percent."""

K = 3
CASES = pytest.mark.parametrize(("family", "kind"), FAMILIES)


def wholes(total: BatchGradient, key: tuple[str, int], dense_sum: Tensor) -> list[Any]:
    """Pairs of a gradient with joint factors and its dense matrix: one, or one per expert."""
    gradient = total[key]
    if gradient.n_experts is None:
        return [(gradient, joined(dense_sum, key[0]))]
    return [(gradient.expert(e), dense_sum[e]) for e in range(gradient.n_experts)]


@CASES
def test_the_total_is_autograds_gradient_of_the_summed_loss(family: str, kind: str) -> None:
    found = dense(family, kind)
    total = found.capture.total()
    assert len(total) == len(found.gradients) == len(list(total))
    for key, by_prompt in found.gradients.items():
        gradient = total[key]
        assert gradient.mask.shape == (1, int(found.capture.mask.sum()))
        assert gradient.mask.all()
        assert relative_error(gradient.dense(), sum(by_prompt)) <= EXACT
        # One prompt is not the batch.
        assert not relative_error(gradient.dense(), by_prompt[0]) <= 0.1


@CASES
def test_directions_are_those_of_the_dense_gradient(family: str, kind: str) -> None:
    found = dense(family, kind)
    total, compared = found.capture.total(), 0
    for key, by_prompt in found.gradients.items():
        for gradient, matrix in wholes(total, key, sum(by_prompt)):
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            main = gradient.principal_directions(K)
            assert_directions(main, matrix, left, values, right)
            compared += len(main.values)
    assert compared > K * len(found.gradients) - K  # an expert may have few tokens


def assert_directions(
    main: PrincipalDirections, matrix: Tensor, left: Tensor, values: Tensor, right: Tensor
) -> None:
    k = len(main.values)
    assert k == min(K, int((values > 1e-12 * values[0]).sum()))
    torch.testing.assert_close(main.values, values[:k], rtol=EXACT, atol=0)
    shares = values.square() / matrix.square().sum()
    torch.testing.assert_close(main.energy, shares[:k], rtol=EXACT, atol=0)
    for j in range(k):
        found = torch.outer(main.inputs[j], main.vjps[j])
        assert relative_error(found, torch.outer(left[:, j], right[j])) <= EXACT


@CASES
def test_contributions_are_those_of_each_position(family: str, kind: str) -> None:
    capture = dense(family, kind).capture
    total = capture.total()
    places = list(zip(total.prompts.tolist(), total.positions.tolist(), strict=True))
    assert [capture.tokens[place].item() for place in places] == capture.tokens[
        capture.mask
    ].tolist()
    for gradient in capture:
        if not gradient.has_joint_factors:
            continue
        main = total[gradient.matrix, gradient.layer].principal_directions(2)
        torch.testing.assert_close(main.contributions.sum(1), main.values)
        for j in range(2):
            for i, place in enumerate(places):
                x, delta = gradient.inputs[place].flatten(), gradient.vjps[place].flatten()
                expected = (x @ main.inputs[j]) * (delta @ main.vjps[j])
                torch.testing.assert_close(main.contributions[j, i], expected)


@CASES
def test_signs_are_positive_where_most_is_contributed(family: str, kind: str) -> None:
    for gradient in dense(family, kind).capture.total():
        if not gradient.has_joint_factors:
            continue
        main = gradient.principal_directions(K)
        for j, i in enumerate(main.contributions.argmax(1).tolist()):
            assert gradient.inputs[0, i].flatten() @ main.inputs[j] > 0
            assert gradient.vjps[0, i].flatten() @ main.vjps[j] > 0
        # The convention does not depend on the signs that the decomposition returns.
        turned = replace(gradient, inputs=-gradient.inputs).principal_directions(K)
        torch.testing.assert_close(turned.inputs, -main.inputs)
        torch.testing.assert_close(turned.vjps, main.vjps)


def test_the_side_of_the_residual_stream(llama: Case) -> None:
    capture = blt.capture_gradients(llama.model, llama.tokens(6), blt.next_token_loss())
    for gradient in capture:
        main = gradient.principal_directions(1)
        assert main.resid.shape == (1, llama.d_model)
        assert main.resid is (main.vjps if gradient.matrix == "W_out" else main.inputs)
        assert main.neurons is (main.inputs if gradient.matrix == "W_out" else main.vjps)


def test_a_padded_batch_gives_what_its_prompts_give(facts_model: Any) -> None:
    prompts = ["Obama grew up in", "Lionel Messi plays for the", "Rome"]
    loss = blt.target_nll(7)
    total = blt.capture_gradients(facts_model, prompts, loss).total()
    singles = [blt.capture_gradients(facts_model, prompt, loss) for prompt in prompts]
    assert total.prompts.bincount().tolist() == [len(single.tokens[0]) for single in singles]
    for gradient in total:
        alone = [single[gradient.matrix, gradient.layer] for single in singles]
        # float32, and the forward pass of a padded batch rounds differently
        assert relative_error(gradient.dense(), sum(each.dense() for each in alone)) < 1e-4


def test_the_total_of_one_expert_has_the_tokens_that_were_routed_to_it() -> None:
    gradient = dense("mixtral", "bridge").capture["W_out", 0]
    assert gradient.n_experts is not None
    total = gradient.total()
    for index in range(gradient.n_experts):
        expert = gradient.expert(index)
        own, other_way = total.expert(index), expert.total()
        assert own.mask.sum() == other_way.mask.sum() == expert.mask.sum()
        torch.testing.assert_close(own.dense(), other_way.dense())
        assert own.total().joined_vjps is not None or gradient.joined_vjps is None
    with pytest.raises(InputError, match=r"each expert of W_out in layer 0 has its own factors"):
        total.principal_directions()


def hand_made(x: Tensor, delta: Tensor) -> MatrixGradient:
    return MatrixGradient("W_in", 0, x[None], delta[None], torch.ones(1, len(x), dtype=torch.bool))


def test_fewer_directions_where_the_rank_is_lower() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(6, 11, generator=generator), torch.randn(6, 17, generator=generator)
    assert len(hand_made(x, delta).principal_directions(10).values) == 6
    x[3:] = x[:3]
    main = hand_made(x, delta).principal_directions(10)
    assert main.inputs.shape == (3, 11)
    assert float(main.energy.sum()) == pytest.approx(1, abs=1e-12)
    nothing = hand_made(x, 0 * delta).principal_directions(10)
    assert nothing.vjps.shape == (0, 17)
    assert nothing.contributions.shape == (0, 6)
    unreached = replace(hand_made(x, delta), mask=torch.zeros(1, 6, dtype=torch.bool))
    assert unreached.principal_directions(2).contributions.shape == (0, 0)


def test_more_positions_than_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(40, d, generator=generator, dtype=torch.float64) for d in (11, 7))
    matrix = x.T @ delta
    main = hand_made(x, delta).principal_directions(20)
    assert len(main.values) == 7
    rebuilt = (main.inputs.T * main.values) @ main.vjps
    assert relative_error(rebuilt, matrix) < 1e-13
    torch.testing.assert_close(main.contributions.sum(1), main.values)


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("k", [0, -1, 1.5, "3", None, True])
def test_a_number_of_directions_that_is_not_usable(k: Any) -> None:
    with pytest.raises(InputError, match=r"k is .*; pass an integer of at least 1"):
        hand_made(torch.ones(1, 2), torch.ones(1, 2)).principal_directions(k)


def test_one_prompt_has_to_be_selected() -> None:
    capture = dense("gpt2", "hooked").capture
    with pytest.raises(InputError, match=r"batch=0\), or use gradient.total\(\)"):
        capture["W_out", 0].principal_directions()
    one, other = (capture["W_out", 0].principal_directions(1, batch).values for batch in (0, 1))
    assert not torch.allclose(one, other)


def test_what_a_total_is_called() -> None:
    total = dense("gpt2", "hooked").capture.total()
    assert total.matrices == ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
    assert total.layers == (0, 1)
    assert f"{len(TEXTS)} prompts" in repr(total)
    assert repr(total["W_out", -1].principal_directions(2)).startswith("PrincipalDirections(2 dir")
    with pytest.raises(InputError, match=r"\('W_gate', 0\) was not captured"):
        total["W_gate", 0]
