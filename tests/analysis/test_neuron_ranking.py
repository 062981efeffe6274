"""The neurons that change most, against autograd's dense gradient and a loop over all neurons."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import Case, build
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.analysis import top_neurons
from backward_lens_tl.errors import InputError

TARGET, K = 5, 7
EXACT = 1e-9
"""Float64; the lens and the reference sum in another order."""

CASES = pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("hooked-gpt2", "W_out"),
        ("hooked-gpt2", "W_in"),
        ("bridge-gpt2", "W_out"),
        ("hooked-llama", "W_out"),
        ("hooked-llama", "W_in"),
        ("hooked-llama", "W_gate"),
        ("bridge-llama", "W_gate"),
    ],
)


@cache
def found(name: str) -> tuple[Case, Any, dict[tuple[str, int], Tensor]]:
    case = build(name)
    tokens = case.tokens(6)
    result = blt.backward_lens(case.model, tokens, TARGET)

    def loss(logits: Tensor, _: Tensor) -> Tensor:
        return -logits[:, -1].log_softmax(-1)[:, TARGET]

    return case, result, case.weight_gradients(tokens, loss)


def rows_of(matrix: Tensor, name: str) -> Tensor:
    return matrix if name == "W_out" else matrix.T


def slow_neurons(name: str, matrix: str) -> list[dict[str, Any]]:
    """All neurons of all layers, the largest gradient first."""
    case, result, gradients = found(name)
    rows = []
    for layer in range(case.n_layers):
        held = case.weights[matrix, layer]
        weights = rows_of(held.in_out(held.tensor.detach()), matrix)
        factors = result.capture[matrix, layer]
        activations = result.capture["W_out", layer].inputs[0]
        for neuron, own in enumerate(rows_of(gradients[matrix, layer], matrix)):
            terms = [
                float(rows_of(torch.outer(x, delta), matrix)[neuron].norm())
                for x, delta in zip(factors.inputs[0], factors.vjps[0], strict=True)
            ]
            position = terms.index(max(terms))
            rows.append(
                {
                    "layer": layer,
                    "neuron": neuron,
                    "norm": float(own.norm()),
                    "relative_norm": float(own.norm() / weights[neuron].norm()),
                    "cosine": float(torch.cosine_similarity(-own, weights[neuron], dim=0)),
                    "position": position,
                    "activation": float(activations[position, neuron]),
                    "update": -own,
                    "weights": weights[neuron],
                    "input": factors.inputs[0, position],
                }
            )
    return sorted(rows, key=lambda row: -row["norm"])


def best(case: Case, vector: Tensor, n: int) -> list[str]:
    ids = case.lens(vector[None])[0].argsort(descending=True)[:n].tolist()
    return [case.model.tokenizer.decode([token]) for token in ids]


@CASES
def test_neurons_against_a_loop_over_the_dense_gradient(name: str, matrix: str) -> None:
    case, result, _ = found(name)
    table = top_neurons(case.model, result, K, matrix=matrix, n_tokens=3)
    wanted = slow_neurons(name, matrix)[:K]
    for column in ("layer", "neuron", "position"):
        assert table[column].tolist() == [row[column] for row in wanted]
    for column in ("norm", "relative_norm", "cosine", "activation"):
        expected = [row[column] for row in wanted]
        assert table[column].tolist() == pytest.approx(expected, rel=EXACT, abs=EXACT)
    for found_row, row in zip(table.itertuples(), wanted, strict=True):
        assert found_row.token == result.capture.str_tokens[0][row["position"]]
        assert found_row.weight_top == best(case, row["weights"], 3)
        assert found_row.update_top == best(case, row["update"], 3)


@pytest.mark.parametrize("name", ["hooked-gpt2", "hooked-llama"])
def test_the_effect_of_a_written_row_is_what_the_neurons_output_gains(name: str) -> None:
    case, result, _ = found(name)
    table = top_neurons(case.model, result, 200, n_tokens=1)
    assert table["effect"].nunique() == 2
    for effect, row in zip(table["effect"], slow_neurons(name, "W_out"), strict=False):
        ends = {"adds update_top": row["update"], "adds update_bottom": -row["update"]}
        gained = row["activation"] * row["update"]
        assert torch.cosine_similarity(ends[effect], gained, dim=0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [("hooked-gpt2", "W_in"), ("hooked-llama", "W_in"), ("hooked-llama", "W_gate")],
)
def test_the_effect_of_a_read_column_is_whether_its_output_grows(name: str, matrix: str) -> None:
    case, result, _ = found(name)
    table = top_neurons(case.model, result, 40, matrix=matrix, n_tokens=1)
    assert table["effect"].nunique() == 2
    for effect, row in zip(table["effect"], slow_neurons(name, matrix), strict=False):
        before = float(row["input"] @ row["weights"])
        after = float(row["input"] @ (row["weights"] + 1e-3 * row["update"]))
        assert effect == ("responds more" if after > before else "responds less")


def test_a_loaded_result_and_a_capture_give_the_same_table(
    facts_model: Any, tmp_path: Path
) -> None:
    result = blt.backward_lens(
        facts_model, ["Lionel Messi plays for", "Obama grew up in"], " Paris"
    )
    result.save(tmp_path / "both.safetensors")
    loaded = blt.BackwardLensResult.load(tmp_path / "both.safetensors")
    for source in (result, loaded, result.capture):
        table = top_neurons(facts_model, source, 4, batch=1)
        pd.testing.assert_frame_equal(table, top_neurons(facts_model, result, 4, batch=1))
    assert table["token"].isin(result.capture.str_tokens[1]).all()


@pytest.mark.parametrize("matrix", ["W_out", "W_in"])
def test_a_padded_batch_gives_what_its_prompts_give_alone(facts_model: Any, matrix: str) -> None:
    prompts = ["Obama grew up in", "Lionel Messi plays for the", "Rome"]
    together = blt.backward_lens(facts_model, prompts, 7)
    for batch, prompt in enumerate(prompts):
        alone = blt.backward_lens(facts_model, prompt, 7)
        found, expected = (
            top_neurons(facts_model, result, 5, matrix=matrix, batch=row, n_tokens=1)
            for result, row in ((together, batch), (alone, 0))
        )
        exact = ["layer", "neuron", "position", "token", "effect"]
        pd.testing.assert_frame_equal(found[exact], expected[exact])
        numbers = ["norm", "relative_norm", "cosine", "activation"]
        pd.testing.assert_frame_equal(found[numbers], expected[numbers], rtol=1e-3, atol=1e-5)


def test_activations_are_missing_without_w_out(facts_model: Any) -> None:
    capture = blt.capture_gradients(
        facts_model, "Obama grew up in", blt.target_nll(" Paris"), matrices="W_in"
    )
    table = top_neurons(facts_model, capture, 3, matrix="W_in")
    assert table["activation"].isna().all()
    assert table["effect"].str.startswith("responds").all()


def test_only_neurons_with_a_gradient_are_listed(facts_model: Any) -> None:
    """In the last layer only the last position has a VJP; an input of zero has no gradient."""
    capture = blt.capture_gradients(
        facts_model, "Obama grew up in", blt.target_nll(" Paris"), layers=-1, matrices="W_out"
    )
    gradient = capture["W_out", -1]
    inputs = gradient.inputs.clone()
    inputs[..., 2:] = 0
    few = replace(capture, gradients={("W_out", 7): replace(gradient, inputs=inputs)})
    assert set(top_neurons(facts_model, few, 10)["neuron"]) == {0, 1}
    none = replace(capture, gradients={("W_out", 7): replace(gradient, inputs=0 * inputs)})
    with pytest.raises(InputError, match="the gradient of W_out is zero in all captured layers"):
        top_neurons(facts_model, none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": "W_Q"}, "matrix is 'W_Q'; allowed: 'W_in', 'W_gate', 'W_out'"),
        ({"matrix": "W_gate"}, r"\('W_gate', 0\) was not captured; available: W_in, W_out"),
        ({"k": 0}, "k is 0"),
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"batch": 3}, "prompt 3 does not exist"),
        ({"projection": "tuned"}, "unknown projection 'tuned'"),
    ],
)
def test_arguments_that_are_not_usable(
    facts_model: Any, change: dict[str, Any], message: str
) -> None:
    result = blt.backward_lens(facts_model, "Obama grew up in", " Paris")
    with pytest.raises(InputError, match=message):
        top_neurons(facts_model, result, **change)


def test_a_model_with_other_neurons_is_refused() -> None:
    case, result, _ = found("hooked-gpt2")
    gradient = result.capture["W_out", 0]
    narrow = replace(gradient, inputs=gradient.inputs[..., :10])
    capture = replace(result.capture, gradients={("W_out", 0): narrow})
    with pytest.raises(InputError, match=r"a model with 10 neurons per layer, but .* has 52; pass"):
        top_neurons(case.model, capture)
