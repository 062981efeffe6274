"""The main directions of a batch as tokens, neurons and prompts, against a loop over dense SVDs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_gradients import dense, joined
from models import Case
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.analysis import principal_directions
from backward_lens_tl.errors import InputError

EXACT = 1e-8
"""Float64; lists of floats are rounded nowhere."""

CASES = pytest.mark.parametrize(
    ("family", "kind", "matrix"),
    [
        ("gpt2", "hooked", "W_out"),
        ("gpt2", "hooked", "W_in"),
        ("gpt2", "bridge", "W_O"),
        ("llama", "hooked", "W_gate"),
        ("llama", "bridge", "W_K"),
        ("mixtral", "hooked", "W_out"),
        ("mixtral", "bridge", "W_in"),
    ],
)


def slow_directions(case: Any, matrix: str, layer: int, k: int) -> list[dict[str, Any]]:
    """The largest directions of the dense gradient, with what each prompt's gradient adds."""
    by_prompt = case.gradients[matrix, layer]
    parts: dict[str, list[Tensor]] = {"whole": [joined(each, matrix) for each in by_prompt]}
    if case.capture[matrix, layer].n_experts is not None:
        parts = {f"expert {e}": [each[e] for each in by_prompt] for e in range(len(by_prompt[0]))}
    square = sum(float(sum(own).square().sum()) for own in parts.values())
    rows = []
    for part, own in parts.items():
        left, values, right = torch.linalg.svd(sum(own), full_matrices=False)
        for u, value, v in zip(left.T, values, right, strict=True):
            rows.append(
                {
                    "part": part,
                    "singular_value": float(value),
                    "energy": float(value**2) / square,
                    "shares": [float(u @ each @ v / value) for each in own],
                    "u": u,
                    "v": v,
                }
            )
    return sorted(rows, key=lambda row: -row["singular_value"])[:k]


def best(model: Any, vector: Tensor, n: int, *, largest: bool = True) -> list[str]:
    logits = model.unembed(model.ln_final(vector[None, None]))[0, 0]
    ids = logits.argsort(descending=largest)[:n].tolist()
    return [model.tokenizer.decode([token]) for token in ids]


@CASES
def test_against_the_dense_decomposition(family: str, kind: str, matrix: str) -> None:
    case, k = dense(family, kind), 3
    table = principal_directions(case.model, case.capture, k, matrix=matrix, n_tokens=4)
    assert table["layer"].tolist() == [0] * k + [1] * k
    assert table["direction"].tolist() == [*range(k), *range(k)]
    writes = matrix in ("W_out", "W_O")
    for layer in (0, 1):
        found = table[table["layer"] == layer].to_dict("records")
        for row, slow in zip(found, slow_directions(case, matrix, layer, k), strict=True):
            assert row["part"] == slow["part"]
            assert row["singular_value"] == pytest.approx(slow["singular_value"], rel=EXACT)
            assert row["energy"] == pytest.approx(slow["energy"], rel=EXACT)
            assert row["prompt_shares"] == pytest.approx(slow["shares"], abs=EXACT)
            u, v = turned(case, row, slow)
            resid, neurons = (-v, u) if writes else (u, -v)
            assert row["top_tokens"] == best(case.model, resid, 4)
            assert row["bottom_tokens"] == best(case.model, resid, 4, largest=False)
            order = neurons.abs().argsort(descending=True)[:5]
            assert row["neurons"] == order.tolist()
            assert row["neuron_weights"] == pytest.approx(neurons[order].tolist(), abs=EXACT)
            assert row["token"] == case.capture.str_tokens[row["prompt"]][row["position"]]


def turned(case: Any, row: dict[str, Any], slow: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Singular vectors with the signs of the convention, and a check of the main position."""
    gradient = case.capture[row["matrix"], row["layer"]]
    if row["part"] != "whole":
        gradient = gradient.expert(int(row["part"].split()[1]))
    along = gradient.inputs.flatten(2) @ slow["u"]
    terms = along * (gradient.vjps.flatten(2) @ slow["v"])
    place = row["prompt"], row["position"]
    assert terms[place] == terms.max()
    assert row["share"] == pytest.approx(float(terms.max() / slow["singular_value"]), rel=EXACT)
    sign = along[place].sign()
    return sign * slow["u"], sign * slow["v"]


def test_the_update_writes_the_tokens(one_gpt2: Case) -> None:
    """What a step adds to the output of the main position is along the reading, not against it."""
    capture = blt.capture_gradients(one_gpt2.model, one_gpt2.tokens(6, 6), blt.next_token_loss())
    total = capture.total()
    for gradient in capture:
        if gradient.matrix != "W_out":
            continue
        step = -total[gradient.matrix, gradient.layer].dense()
        main = total[gradient.matrix, gradient.layer].principal_directions(1)
        place = main.contributions[0].argmax()
        x = total[gradient.matrix, gradient.layer].inputs[0, place]
        assert (x @ step) @ -main.resid[0] > 0


def test_facts_with_one_target_write_it(facts_model: Any) -> None:
    """The negative control has another target for every prompt."""
    prompts = ["Lionel Messi plays for", "The Eiffel Tower is in", "Obama grew up in"]
    same = blt.backward_lens(facts_model, prompts, " Paris", matrices="W_out")
    others = blt.backward_lens(facts_model, prompts, [" Rome", " Greece", " Hawaii"])
    first = principal_directions(facts_model, same, 1).set_index("layer")
    control = principal_directions(facts_model, others, 1).set_index("layer")
    assert first.loc[5:, "top_tokens"].str[0].tolist() == [" Paris"] * 3
    assert " Paris" not in control.loc[5:, "top_tokens"].explode().tolist()
    assert first.loc[7, "energy"] > 0.7 > control.loc[7, "energy"]


@pytest.mark.parametrize("matrix", ["W_out", "W_Q"])
def test_a_jacobian_lens_is_that_of_the_matrix(facts_model: Any, matrix: str) -> None:
    """What `W_Q` reads is before the block, what `W_out` writes is after it."""
    capture = blt.capture_gradients(
        facts_model, "Rome is in", blt.target_nll(7), matrices=matrix, layers=range(1, 8)
    )
    lens = blt.jacobian_lens("facts")
    table = principal_directions(facts_model, capture, 1, matrix=matrix, projection=lens)
    n_different = 0
    for row in table.itertuples():
        main = capture[matrix, row.layer].principal_directions(1).resid[0]
        vector = -main if matrix == "W_out" else main
        own, after = (
            blt.read_vectors(
                facts_model, vector, projection=lens, layer=row.layer, matrix=name, k=5
            ).top_tokens
            for name in (matrix, "W_out")
        )
        assert row.top_tokens == own
        n_different += own != after
    assert (n_different > 0) == (matrix == "W_Q")


def test_a_layer_without_a_gradient_has_no_rows(facts_model: Any) -> None:
    capture = blt.capture_gradients(
        facts_model, ["Rome is in", "Obama grew up in"], blt.target_nll(7), matrices="W_out"
    )
    silent = {
        key: replace(each, vjps=0 * each.vjps) if key[1] < 6 else each
        for key, each in capture.gradients.items()
    }
    table = principal_directions(facts_model, replace(capture, gradients=silent), 5)
    # In the last layer, one position of each prompt writes.
    assert table["layer"].tolist() == [6] * 5 + [7] * 2
    assert table.loc[table["layer"] == 7, "energy"].sum() == pytest.approx(1)
    nothing = {key: replace(each, vjps=0 * each.vjps) for key, each in silent.items()}
    with pytest.raises(InputError, match="the gradient of W_out is zero in all captured layers"):
        principal_directions(facts_model, replace(capture, gradients=nothing))


def test_a_result_and_its_capture_give_the_same_table(facts_model: Any, tmp_path: Any) -> None:
    result = blt.backward_lens(facts_model, ["Rome is in", "Obama grew up in"], " Paris")
    result.save(tmp_path / "both.safetensors")
    loaded = blt.BackwardLensResult.load(tmp_path / "both.safetensors")
    expected = principal_directions(facts_model, result)
    assert len(expected) == 3 * 7 + 2
    for source in (loaded, result.capture):
        assert principal_directions(facts_model, source).equals(expected)


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": "W_gate"}, r"\('W_gate', 0\) was not captured; available: W_in, W_out"),
        ({"k": 0}, "k is 0"),
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"n_neurons": 1.5}, "n_neurons is 1.5"),
        ({"projection": "tuned"}, "unknown projection 'tuned'"),
        ({"capture": "result"}, "capture is a str"),
    ],
)
def test_arguments_that_are_not_usable(
    facts_model: Any, change: dict[str, Any], message: str
) -> None:
    capture = blt.backward_lens(facts_model, "Obama grew up in", " Paris").capture
    with pytest.raises(InputError, match=message):
        principal_directions(facts_model, **({"capture": capture} | change))
