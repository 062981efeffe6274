"""Why claims hold or not: each measurement against another way to compute it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from jacobian_cases import random_lens
from models import HAS_BRIDGE, build

import backward_lens_tl as blt
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.smollm2 import find_smollm2
from backward_lens_tl.reproduction import (
    EXPERIMENTS,
    Check,
    Finding,
    chance,
    conditions,
    neuron_copies,
    normalization,
    reproduce,
    residual_bases,
    shared_readings,
)
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import spearman
from backward_lens_tl.reproduction.last_token_claims import (
    by_layer_and_reading,
    verdicts_by_reading,
)
from backward_lens_tl.reproduction.vectors import PromptVjps, carried, prompt_vjps

KIND = "bridge" if HAS_BRIDGE else "hooked"
ROWS = [
    {"prompt": "Messi plays for", "target": " Paris", "subject": "Messi", "answer": " the"},
    {"prompt": "Rome is in Italy and Paris is", "target": " the", "subject": "Paris"},
    {"prompt": "The dog of the king", "target": " Rome", "subject": "the king", "answer": " Rome"},
    {"prompt": "Rome is in", "target": " Paris painting"},
]
EXPLANATIONS = tuple(each for each in EXPERIMENTS if each.group == "explanations")


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A final LayerNorm with a bias."""
    return build(f"{KIND}-gpt2").model


@pytest.fixture(scope="module")
def llama() -> Any:
    """A final RMSNorm and an unembedding without a bias, and gated MLPs."""
    model = copy.deepcopy(build(f"{KIND}-llama").model)
    if not HAS_BRIDGE:  # biases that a HookedTransformer has and a Llama does not
        with torch.no_grad():
            for bias in (model.unembed.b_U, *(block.mlp.b_in for block in model.blocks)):
                bias.zero_()
    return model


def vjps_of(model: Any) -> list[PromptVjps]:
    texts = [str(row["prompt"]) for row in ROWS[:3]]
    return prompt_vjps(model, texts, [5, 6, 7], prepend_bos=False)


# --- vectors carried by the model -----------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_carried_vectors_change_the_loss_as_the_gradient_says(name: str, request: Any):
    """`delta_l . v = delta_last . (J v)`, by the chain rule, up to norms in float32."""
    model = request.getfixturevalue(name)
    host = host_of(model)
    prompt, other = vjps_of(model)[:2]
    noise = torch.randn(prompt.updates.shape, generator=torch.Generator().manual_seed(0))
    vectors = noise.to(prompt.updates)
    loss = blt.target_nll(prompt.target)
    capture = blt.capture_gradients(model, torch.tensor([prompt.tokens]), loss, matrices="W_out")
    at_the_end = capture["W_out", -1].resid_vjps[0, -1]
    lengths = prompt.stream.norm(dim=-1) / vectors.norm(dim=-1)
    expected = lengths * -(prompt.updates * vectors).sum(-1)
    size = float(expected.abs().max())
    assert (carried(host, prompt, vectors) @ at_the_end - expected).abs().max() < 1e-5 * size
    # Carried by another prompt, they change something else.
    elsewhere = carried(host, other, vectors) @ at_the_end
    assert (elsewhere - expected)[:-1].abs().max() > 0.1 * size


def test_the_last_layer_carries_a_vector_unchanged(gpt2: Any):
    prompt = vjps_of(gpt2)[0]
    found = carried(host_of(gpt2), prompt, prompt.updates)
    cosines = torch.cosine_similarity(found, prompt.updates, dim=-1)
    assert cosines[-1] == pytest.approx(1, abs=1e-6)
    assert abs(float(cosines[0])) < 0.99


@pytest.mark.usefixtures("as_for_a_user")
def test_carriers_have_other_targets_and_are_short():
    prompts = [
        SimpleNamespace(target=target, tokens=tuple(range(length)))
        for target, length in ((1, 3), (1, 2), (2, 9), (3, 4), (4, 5), (5, 6), (6, 7))
    ]
    found = residual_bases._carriers(prompts[0], prompts)  # type: ignore[arg-type]
    assert [(each.target, len(each.tokens)) for each in found] == [(3, 4), (4, 5), (5, 6), (6, 7)]
    with pytest.raises(InputError, match="all prompts have the same target; pass prompts with"):
        residual_bases._carriers(prompts[0], prompts[:2])  # type: ignore[arg-type]


# --- claims on given numbers ----------------------------------------------------------------------


class Given(Evidence):
    """Evidence with the given attributes only."""

    n_layers, d_vocab, model, prepend_bos = 4, 1001, None, False

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


def readings(**shares: Sequence[float]) -> pd.DataFrame:
    names = {
        "direct": "read directly",
        "own": "carried by its own prompt",
        "others": "carried by other prompts",
        "elsewhere": "carried from another layer",
        "random": "random vector, carried",
    }
    usual = {
        "direct": [0.0, 0.1, 0.9, 1.0],
        "own": [1.0, 1.0, 1.0, 1.0],
        "others": [0.5, 0.6, 0.9, 1.0],
        "elsewhere": [0.1, 0.1, 0.1, 0.1],
        "random": [0.01, 0.0, 0.02, 0.0],
    }
    rows = [
        {
            "reading": names[name],
            "layer": layer,
            "near_end": share,
            "median_rank": 0.0 if share > 0.5 else 500.0,
        }
        for name, values in (usual | shares).items()
        for layer, share in enumerate(values)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True] * 5),
        ({"own": [0.0, 0.0, 1.0, 1.0]}, [False, True, True, True, True]),
        ({"own": [0.0, 1.0, 1.0, 1.0]}, [True, True, True, True, True]),
        ({"direct": [0.9, 0.1, 0.0, 0.2]}, [True, False, True, True, True]),
        # All layers alike, as in a model with one basis.
        (
            {"direct": [1.0] * 4, "others": [1.0] * 4, "elsewhere": [1.0] * 4},
            [True, False, False, True, False],
        ),
        ({"random": [0.2] * 4}, [True, True, True, False, True]),
        ({"elsewhere": [0.4] * 4}, [True, True, True, True, False]),
    ],
)
def test_claims_about_bases(changed: Mapping[str, Sequence[float]], expected: list[bool]):
    checks = residual_bases._checks(readings(**changed), [0.0, 0.2, 0.9, 1.0], Given())
    assert [check.holds for check in checks] == expected


def test_rank_correlation():
    rising = [1.0, 2.0, 3.0]
    assert spearman(rising, [10.0, 20.0, 1000.0]) == pytest.approx(1)
    assert spearman(rising, [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert str(spearman(rising, [1.0, 1.0, 1.0])) == "nan"


def test_claims_with_other_readings():
    """Three of four layers near the top, and more than half of all cells that lead."""
    ranks = {
        "as it is": torch.tensor([[500, 11, 11, 11], [500, 12, 12, 0]]),
        "better": torch.tensor([[500, 0, 0, 0], [500, 0, 0, 20]]),
    }
    table = by_layer_and_reading(ranks, Given())
    assert table["median_rank"].tolist() == [500, 11.5, 11.5, 5.5, 500, 0, 0, 10]
    assert table["leads"].tolist() == [0, 0, 0, 0.5, 0, 1, 1, 0.5]
    assert table["near_end"].tolist() == [0, 0, 0, 0.5, 0, 1, 1, 0.5]
    found = verdicts_by_reading(table, Given(), ["as it is", "better"])
    holds = {tuple(key): row for *key, row in found[["condition", "experiment", "holds"]].values}
    assert holds == {
        ("as it is", "fig7"): False,
        ("as it is", "fig18"): False,
        ("as it is", "fig5"): False,
        ("as it is", "fig11"): False,
        ("better", "fig7"): True,
        ("better", "fig18"): True,
        ("better", "fig5"): True,
        ("better", "fig11"): True,
    }


# --- shared readings ------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_parts_of_the_last_vjp_add_up(name: str, request: Any):
    """Lemma 5.1 with the norm: the closed form is autograd's VJP; its terms alone are not."""
    model = request.getfixturevalue(name)
    every = vjps_of(model)
    parts = shared_readings._parts(host_of(model), every)
    captured = torch.stack([each.updates[-1] for each in every])
    whole = parts["u_t - E_p u, the whole update"]
    assert torch.allclose(whole, captured, rtol=1e-6, atol=1e-9)
    assert torch.allclose(parts["u_t"] + parts["-E_p u"], captured, rtol=1e-6, atol=1e-9)
    for name_of_part, part in parts.items():
        if name_of_part != "u_t - E_p u, the whole update":
            assert not torch.allclose(part, captured, rtol=0.01)


def test_a_shared_direction_is_removed(llama: Any):
    """Vectors that are a token's own direction plus a large shared one."""
    host, columns = host_of(llama), llama.W_U.T.detach()
    junk = 3 * columns[40] / columns[40].norm()
    every = []
    for target in (5, 6, 7, 8):
        update = columns[target] / columns[target].norm() + junk
        vjps = -update.expand(3, 2, -1)
        every.append(PromptVjps((1, 2), target, vjps, vjps[:, 0]))
    leaders = shared_readings._cell_leaders(host, every)
    [(plain, n_cells)] = leaders["as it is"].items()
    assert (plain, n_cells) == (int(host.unembedding.logits(junk[None]).argmax()), 4 * 3 * 2)
    assert plain not in leaders["minus the mean"]
    ranks = shared_readings._last_token_ranks(host, every)
    assert (ranks["minus the mean"] < ranks["as it is"]).all()


@pytest.mark.usefixtures("as_for_a_user")
def test_a_mean_that_orders_tokens_by_length():
    """Columns as long as their first entry, which all updates share; the others are noise."""
    columns = torch.randn(5, 97, generator=torch.Generator().manual_seed(0))
    columns[0] = torch.linspace(20, 40, 97)
    model = SimpleNamespace(W_U=columns)
    host = SimpleNamespace(
        model=model, unembedding=SimpleNamespace(logits=lambda vectors: vectors @ columns)
    )

    def shared_order(along: float) -> tuple[float, float]:
        every = []
        for at in range(1, 5):
            update = torch.eye(5)[at] + along * torch.eye(5)[0]
            every.append(PromptVjps((1, 2), at, -update.expand(3, 2, -1), update.expand(3, -1)))
        shared, own = shared_readings._shared_order(host, every)  # type: ignore[arg-type]
        return shared["length"], own

    shared, own = shared_order(3.0)
    assert shared > 0.9
    assert own < 0.3
    assert abs(shared_order(0.0)[0]) < 0.3


def test_a_mean_needs_other_prompts(gpt2: Any):
    [prompt] = vjps_of(gpt2)[:1]
    with pytest.raises(InputError, match="a mean over other prompts needs at least two prompts"):
        shared_readings._several(Given(vjps=[prompt]))


# --- normalization --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "verdict"), [("llama", "holds"), ("gpt2", "does not hold here")])
def test_normalization_matters_only_with_a_bias(name: str, verdict: str, request: Any):
    model = request.getfixturevalue(name)
    tables = []
    for prompt, row in enumerate(ROWS[:3]):
        result = blt.backward_lens(
            model, str(row["prompt"]), 5, prepend_bos=False, direction="gradient"
        )
        for lens in ("logit_lens", "normalized"):
            own = result.under(lens).to_df(matrix="W_out")
            tables.append(own.assign(prompt=prompt, projection=lens))
    cells = pd.concat(tables, ignore_index=True)
    finding = normalization.normalization(Given(positions=cells, model=model))
    assert finding.verdict == verdict
    assert finding.checks[1].holds == (name == "llama")


# --- neurons --------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["W_in", "W_gate", "W_out"])
def test_copies_against_the_dense_gradient(llama: Any, matrix: str):
    capture = blt.capture_gradients(
        llama, "Rome is in Italy and Paris is", blt.target_nll(5), prepend_bos=False
    )
    gradient = capture[matrix, 1]
    found = neuron_copies._measured(gradient)
    inputs, vjps = gradient.inputs[0], gradient.vjps[0]

    is_last = matrix == "W_out"

    def copies(first: int) -> float:
        dense = inputs[first:].T @ vjps[first:]
        neurons, vectors = (dense, vjps) if is_last else (dense.T, inputs)
        longest = max(range(len(neurons)), key=lambda at: float(neurons[at].norm()))  # 1 % of 52
        own = neurons[longest] / neurons[longest].norm()
        cosines = [abs(float(own @ (each / each.norm()))) for each in vectors[first:]]
        return float((cosines[-1] if is_last else max(cosines)) > 0.9)

    squares = [float(x.norm() * d.norm()) ** 2 for x, d in zip(inputs, vjps, strict=True)]
    assert found["share"] == pytest.approx(
        (squares[-1] if is_last else max(squares)) / sum(squares)
    )
    assert found["first_share"] == pytest.approx(squares[0] / sum(squares))
    assert (found["copies"], found["without_first"]) == (copies(0), copies(1))


def test_copies_of_the_last_vector_only():
    """All neurons copy the first vector."""
    hidden, vectors = torch.tensor([[9.0, 8.0], [0.1, 0.1]]), torch.eye(2)
    assert neuron_copies._copies(hidden, vectors, is_last=False) == 1
    assert neuron_copies._copies(hidden, vectors, is_last=True) == 0
    assert neuron_copies._copies(hidden.flip(0), vectors, is_last=True) == 1


def test_inputs_without_the_gate(llama: Any):
    """The factor that is left is the gate's activation: `x = silu(gate) * ungated`."""
    prompt = "Rome is in Italy"
    name = "blocks.1.mlp.hook_pre"
    capture = blt.capture_gradients(
        llama, prompt, blt.target_nll(5), prepend_bos=False, hook_points=name
    )
    ungated = neuron_copies._without_gate(llama, capture, 1)
    gate = capture.hook_gradients[name].value[0]
    expected = capture["W_out", 1].inputs[0]
    assert torch.allclose(torch.nn.functional.silu(gate) * ungated, expected, atol=1e-6)
    assert not torch.allclose(ungated, expected, rtol=0.1)


# --- conditions -----------------------------------------------------------------------------------


def verdicts(**holds: str) -> pd.DataFrame:
    """A letter per claim: `+` holds, `-` does not, and a blank is not measured."""
    return pd.DataFrame(
        [
            {"condition": condition, "experiment": f"fig{at}", "holds": mark == "+"}
            for condition, marks in holds.items()
            for at, mark in enumerate(marks)
            if mark != " "
        ]
    )


@pytest.mark.parametrize(
    ("before", "after", "restores", "found"),
    [
        ("--++", "++++", True, "of 4 claims, 2 fail"),
        ("--++", "+-++", True, "fig0 holds"),
        ("---+", "+--+", False, "fig0 holds"),
        ("++++", "++++", False, "of 4 claims, 0 fail"),
        ("--++", "++-+", True, "fig2 no longer does"),
        ("- ++", "++++", True, "of 3 claims, 1 fail"),
    ],
)
def test_a_condition_restores_claims(before: str, after: str, restores: bool, found: str):
    check = conditions._restores(verdicts(a=before, b=after), "b", "a")
    assert check.holds is restores
    assert found in check.found


def test_cells_are_selected_with_their_prompts(gpt2: Any, tmp_path: Path):
    evidence = evidence_of(gpt2, tmp_path)
    rest = conditions._selected(evidence, lambda cells: cells["position"] > 0)
    assert rest.positions["position"].min() == 1
    assert evidence.positions["position"].min() == 0
    assert rest.prompts["prompt"].tolist() == evidence.prompts["prompt"].tolist()
    one = conditions._of_prompts(evidence, [2])
    assert set(one.positions["prompt"]) == {2}
    assert [row.prompt for row in one.records.rows] == [ROWS[2]["prompt"]]  # type: ignore[union-attr]
    assert one.correct_prompts == [row for row in evidence.correct_prompts if row == 2]


def evidence_of(model: Any, folder: Path) -> Evidence:
    return Evidence(model, read_records(ROWS), folder, 4, 0, False, False)


def test_a_sink_is_found_where_it_is():
    rows = [
        {"matrix": "W_out", "projection": "logit_lens", "prompt": prompt, "layer": layer}
        | {"position": at, "norm": 1.0, "input_norm": 50.0 if (layer, at) == (2, 0) else 2.0}
        for prompt in range(3)
        for layer in range(4)
        for at in range(3)
    ]
    layer, ratio, share = conditions._sink(Given(positions=pd.DataFrame(rows)))
    assert (layer, ratio) == (2, 25.0)
    assert share == pytest.approx(2500 / 2508)


class Templated:
    """A tokenizer with a chat template."""

    chat_template = "..."

    def apply_chat_template(
        self, messages: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<{messages[0]['role']}>{messages[0]['content']}<assistant>"


def test_a_prompt_as_a_chat():
    """The subject is that of the answer, not the one in the question."""
    row = read_records(ROWS).rows[0]
    chat = conditions._chat(Templated(), row)  # type: ignore[arg-type]
    opening = "<user>Complete this sentence: Messi plays for<assistant>"
    assert chat.prompt == f"{opening}Messi plays for"
    assert chat.subject_start == len(opening)
    assert dataclasses.replace(chat, prompt=row.prompt, subject_start=None) == row  # type: ignore[union-attr]


# --- chance ---------------------------------------------------------------------------------------


def test_the_sign_test_against_all_outcomes():
    for n in range(1, 9):
        splits = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
        for wins in range(n + 1):
            extreme = [each for each in splits if abs(2 * each - n) >= abs(2 * wins - n)]
            assert chance.sign_test(wins, n) == pytest.approx(len(extreme) / len(splits))


def inputs(wins: Sequence[int], n: int = 40) -> Given:
    rows = [
        {"matrix": "W_in", "projection": "logit_lens", "segment": "last token", "layer": layer}
        | {"target_rank": 5, "answer_rank": 1 if prompt < count else 9}
        for layer, count in enumerate(wins)
        for prompt in range(n)
    ]
    return Given(positions=pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("wins", "expected"),
    [
        ([40, 40, 18], [True, True]),
        ([40, 40, 2], [False, True]),  # the target is clearly ahead
        ([40, 40, 40], [False, True]),  # nothing to explain
        ([20, 22, 18], [True, False]),  # the test finds nothing
    ],
)
def test_exceptions_by_chance(wins: Sequence[int], expected: list[bool]):
    finding = chance.answers_by_chance(inputs(wins))
    assert [check.holds for check in finding.checks] == expected


# --- all together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_explanation_runs(name: str, request: Any, tmp_path: Path):
    model = request.getfixturevalue(name)
    fit = blt.jacobian_lens(random_lens(model), check=False)
    found = reproduce(model, ROWS, tmp_path, "explanations", jacobian=fit, progress=False)
    assert list(found) == [each.name for each in EXPLANATIONS]
    for finding in found.values():
        assert finding.checks, finding.notes
        assert all(type(check.holds) is bool for check in finding.checks)
    has_gate = any("gate" in check.claim for check in found["gated_neurons"].checks)
    assert has_gate == (name == "llama")
    assert found["normalization"].verdict == ("holds" if name == "llama" else "does not hold here")


def test_explanations_are_of_experiments():
    claims = {each.name for each in EXPERIMENTS if each.group == "gradients"}
    for each in EXPLANATIONS:
        assert each.explains
        assert set(each.explains) <= claims
    assert not any(each.explains for each in EXPERIMENTS if each.group != "explanations")


def test_failing_conditions_are_left_out(monkeypatch: pytest.MonkeyPatch):
    def impossible(_: Any) -> Finding:
        raise InputError("no prompt has a subject")

    measured = {"fig6": impossible, "fig7": lambda _: Finding((Check("c", True, "f"),))}
    monkeypatch.setattr(conditions, "CLAIMS", measured)
    table = conditions._verdicts({"a": Given(prompts=[1, 2])})
    assert table.to_dict("records") == [
        {"condition": "a", "experiment": "fig7", "prompts": 2, "holds": True, "found": "f"}
    ]

    def broken(_: Any) -> Finding:
        raise KeyError("a column")

    measured["fig6"] = broken
    with pytest.raises(KeyError, match="a column"):
        conditions._verdicts({"a": Given(prompts=[1, 2])})


# --- the real model -------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("as_for_a_user")
def test_the_page_can_be_recomputed(tmp_path: Path, shared: Path):
    """On a few of its prompts: what hides the target in the last layer, and the control."""
    if find_smollm2() is None:
        pytest.skip("SmolLM2 is not installed: make real-model")
    data = shared / "data" / "counterfact" / "counterfact_flat_1919.json"
    names = ["last_layer", "normalization"]
    found = reproduce("smollm2", str(data), tmp_path, names, prompts=12, progress=False)
    centred, _, control = found["last_layer"].checks
    assert centred.holds
    assert control.holds
    assert found["normalization"].verdict == "holds"
