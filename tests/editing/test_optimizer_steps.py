"""One step of SGD, Adam and Muon as edits, and their top tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import NotAvailable, build_model
from models import Case, _hf_model, bridge_case, bridge_only, randomise, small_tokenizer
from torch import Tensor, nn

from backward_lens_tl import backward_lens, capture_gradients, sequence_nll
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.steps import GradientStep
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.editing.tokens import compare_tokens, delta_tokens
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EditError, InputError, UnsupportedModelError
from backward_lens_tl.models import host_of

REQUESTS = (
    EditRequest("The capital of", " Paris"),
    EditRequest("Rome is in Italy and", " the king"),  # a target of several tokens
    EditRequest("Messi plays", 7),
)
LR = 0.3
ROUNDING = 1e-10  # float64 rounding through three layers and back
MESSI = EditRequest("Lionel Messi plays for", " Paris")


def independent_loss(model: Any, logits: Any, requests: tuple[EditRequest, ...]) -> Tensor:
    """Mean over requests of the mean over target tokens, prompt by prompt, written out."""
    losses = []
    for request in requests:
        prompt = model.to_tokens(request.prompt, prepend_bos=False)[0].tolist()
        vocabulary = host_of(model).vocabulary
        target = (
            [request.target]
            if isinstance(request.target, int)
            else vocabulary.encode(request.target)
        )
        read = logits(torch.tensor([[*prompt, *target]]))[0]
        terms = [
            torch.logsumexp(read[len(prompt) - 1 + place], -1)
            - read[len(prompt) - 1 + place, token]
            for place, token in enumerate(target)
        ]
        losses.append(sum(terms, torch.zeros(())) / len(terms))
    return torch.stack(losses).mean()


def torch_step(
    case: Case, make: Any, requests: tuple[EditRequest, ...] = REQUESTS
) -> dict[Any, Any]:
    """Change of each MLP weight of the reference model by one of torch's optimizers."""
    tensors = {key: weight.tensor for key, weight in case.weights.items()}
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    optimizer = make(list(tensors.values()))
    optimizer.zero_grad()
    loss = independent_loss(case.model, case.logits, requests)
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    try:
        for tensor, gradient in zip(tensors.values(), gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        return {
            key: case.weights[key].in_out(tensor.detach() - before[key])
            for key, tensor in tensors.items()
        }
    finally:
        for key, tensor in tensors.items():
            tensor.data.copy_(before[key])
            tensor.grad = None


def step(
    optimizer: str, model: Any, *, requests: Any = REQUESTS, lr: float = LR, **more: Any
) -> Any:
    settings = {"matrices": "mlp", "prepend_bos": False} | more
    return GradientStep(optimizer, lr, **settings)(model, requests)  # type: ignore[arg-type]


# -------------------------------------------------------------------------- torch's optimizers


def test_sgd_is_torchs(gpt2: Case) -> None:
    check_sgd(gpt2, ROUNDING)


def test_sgd_is_torchs_in_a_gated_model(llama: Case) -> None:
    # RMS norms of Hugging Face round to float32 in between.
    check_sgd(llama, 1e-6 if llama.logits_in_float32 else ROUNDING)


def check_sgd(case: Case, tolerance: float) -> None:
    """Compare every matrix of a step with the change by torch's optimizer."""
    expected = torch_step(case, lambda tensors: torch.optim.SGD(tensors, lr=LR))
    delta = step("sgd", case.model)
    assert {(each.matrix, each.layer) for each in delta} == set(expected)
    for each in delta:
        found, wanted = each.dense(), expected[each.matrix, each.layer]
        assert float((found - wanted).norm() / wanted.norm()) <= tolerance
        assert each.is_low_rank
        assert each.bias is None


def test_adam_is_torchs(gpt2: Case) -> None:
    expected = torch_step(gpt2, lambda tensors: torch.optim.Adam(tensors, lr=LR))
    delta = step("adam", gpt2.model)
    for each in delta:
        wanted = expected[each.matrix, each.layer]
        # Relative to each entry, whose size is lr except for gradients near eps.
        assert torch.allclose(each.dense(), wanted, rtol=1e-6, atol=1e-9 * LR)
        assert not each.is_low_rank
    largest = max(float(each.dense().abs().max()) for each in delta)
    assert largest == pytest.approx(LR, rel=1e-5)


def test_adams_eps_matters_where_gradients_are_small(gpt2: Case) -> None:
    """Entries near torch's eps take smaller steps than their sign alone would give."""
    delta, gradient = step("adam", gpt2.model), step("sgd", gpt2.model, lr=1.0)
    for each in delta:
        g = -gradient[each.matrix, each.layer].dense()
        assert torch.allclose(each.dense(), -LR * g / (g.abs() + 1e-8), rtol=1e-9, atol=1e-12)


@bridge_only
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_attention_against_hugging_face(architecture: str) -> None:
    """SGD and Adam on attention weights of an independent Hugging Face model."""
    hf_model: Any = _hf_model(architecture, 64, 2).double()
    randomise(hf_model)
    raw: Any = copy.deepcopy(hf_model).eval()
    case = bridge_case(hf_model, small_tokenizer(), name=architecture)
    for name, optimizer in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        delta = step(name, case.model, matrices="attn", layers=1)
        for matrix in ("W_Q", "W_K", "W_V", "W_O"):
            weight, own = attention_weight(raw, matrix)
            before = weight.detach().clone()
            made = optimizer([weight], lr=LR)
            raw.zero_grad()
            loss = independent_loss(case.model, lambda tokens: raw(tokens).logits, REQUESTS)
            loss.backward()
            made.step()
            expected = own(weight.detach() - before)
            weight.data.copy_(before)
            found = delta[matrix, 1].dense()
            # Llama's norms round to float32, so Adam's sign of tiny entries may flip.
            tolerance = 1e-9 if architecture == "gpt2" else 1e-5
            assert float((found - expected).norm() / expected.norm()) <= tolerance


def attention_weight(raw: Any, matrix: str) -> tuple[nn.Parameter, Callable[[Tensor], Tensor]]:
    """The parameter of layer 1 that holds a matrix, and a function that extracts the matrix."""
    place = "QKVO".index(matrix[-1])
    if hasattr(raw, "model"):
        attn = raw.model.layers[1].self_attn
        linear = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)[place]
        return linear.weight, lambda tensor: tensor.T
    attn = raw.transformer.h[1].attn
    if matrix == "W_O":
        return attn.c_proj.weight, lambda tensor: tensor
    width = slice(24 * place, 24 * (place + 1))
    return attn.c_attn.weight, lambda tensor: tensor[:, width]


# ---------------------------------------------------------------------------------------- muon


def spaces(delta: MatrixDelta) -> tuple[Tensor, Tensor]:
    """Projections onto the column space and the row space, by an independent route."""
    dense = delta.dense().double()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    n = int((s > 1e-9 * s[0]).sum())
    return u[:, :n] @ u[:, :n].T, vh[:n].T @ vh[:n]


def outside(found: Tensor, columns: Tensor, rows: Tensor) -> float:
    """The component of a matrix outside a column and a row space."""
    return float((found - columns @ found @ rows).norm() / found.norm())


@pytest.mark.parametrize("matrices", ["mlp", "attn"])
def test_muon_keeps_the_gradients_spaces(gpt2: Case, matrices: str) -> None:
    gradient, muon, adam = (
        step(name, gpt2.model, matrices=matrices, requests=REQUESTS[:1])
        for name in ("sgd", "muon", "adam")
    )
    for each in muon:
        key = each.matrix, each.layer
        own = gradient[key]
        assert own.rank() < min(own.shape)  # otherwise every matrix would be inside
        columns, rows = spaces(own)
        assert outside(each.dense(), columns, rows) <= 1e-7
        assert outside(adam[key].dense(), columns, rows) > 0.05  # negative control
        assert each.rank() == own.rank()
        # All singular values equal the learning rate.
        values = each.singular_values()[: each.rank()]
        assert torch.allclose(values, torch.full_like(values, LR), rtol=1e-8)


def test_muon_is_the_orthogonal_factor(gpt2: Case) -> None:
    """`-lr U V^T` is the polar factor: its product with the gradient is symmetric, <= 0."""
    gradient, muon = (step(name, gpt2.model, requests=REQUESTS[:1]) for name in ("sgd", "muon"))
    for each in muon:
        u, s, vh = torch.linalg.svd(gradient[each.matrix, each.layer].dense(), full_matrices=False)
        n = gradient[each.matrix, each.layer].rank()
        expected = LR * u[:, :n] @ vh[:n]  # SGD's step is minus the gradient
        assert float((each.dense() - expected).norm() / expected.norm()) <= 1e-7
        del s


def four_directions(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient with four similar singular values: Newton-Schulz does not raise small ones."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in shape)
    return u * torch.tensor([1.0, 0.9, 0.8, 0.7]) @ v.T, u, v


@pytest.mark.parametrize("shape", [(24, 52), (52, 24)])
def test_newton_schulz_approximates_the_exact_step(shape: tuple[int, int]) -> None:
    """Muon's five iterations, in float64: the same spaces, singular values near 1."""
    gradient, _, _ = four_directions(shape)
    wide = shape[0] > shape[1]
    x = (gradient.T if wide else gradient).double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    found = -(x.T if wide else x)
    ours = GradientStep("muon", 1.0)._step(_as_gradient(gradient))
    assert outside(found, *spaces(ours)) <= 1e-4  # amplified float32 rounding
    values = torch.linalg.svdvals(found)[:4]
    assert 0.6 <= float(values.min()) <= float(values.max()) <= 1.3
    assert float((found * ours.dense()).sum() / found.norm() / ours.norm) >= 0.97


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(24, 52), (52, 24)])
def test_torchs_muon_is_close_within_the_gradients_spaces(shape: tuple[int, int]) -> None:
    """There its singular values are near 1; outside, bfloat16 rounding is amplified as well."""
    gradient, _, _ = four_directions(shape)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=LR, weight_decay=0.0).step()
    found = weight.detach().double() / math.sqrt(max(1, shape[0] / shape[1]))  # its scale factor
    ours = GradientStep("muon", LR)._step(_as_gradient(gradient))
    columns, rows = spaces(ours)
    within = columns @ found @ rows
    values = torch.linalg.svdvals(within)[:4] / LR
    assert 0.6 <= float(values.min()) <= float(values.max()) <= 1.3
    assert float((within * ours.dense()).sum() / within.norm() / ours.norm) >= 0.8
    # Amplified rounding is smaller than any direction of the gradient, but not zero.
    noise = torch.linalg.svdvals(found - within)[0] / LR
    assert 0.1 < float(noise) < float(values.min())


def _as_gradient(gradient: Tensor) -> Any:
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    # A step of learning rate 1 is minus the gradient.
    return MatrixDelta("W_out", 0, left=u[:, :4], right=-(s[:, None] * vh)[:4]).gradient()


# ---------------------------------------------------------------------------------- the capture


@pytest.mark.parametrize("matrices", ["mlp", "attn", "all", ["W_out", "W_Q"]])
def test_matrices_and_layers(llama: Case, matrices: Any) -> None:
    delta = step("sgd", llama.model, matrices=matrices, layers=[-1, 0])
    host = host_of(llama.model)
    groups = {
        "mlp": host.matrices("mlp"),
        "attn": host.matrices("attn"),
        "all": (*host.matrices("attn"), *host.matrices("mlp")),
    }
    names = (
        groups.get(matrices, ("W_Q", "W_out")) if isinstance(matrices, str) else ("W_Q", "W_out")
    )
    assert [(each.matrix, each.layer) for each in delta] == [
        (name, layer) for layer in (0, 2) for name in names
    ]


def test_outer_products_are_the_positions(gpt2: Case) -> None:
    """Inputs and VJPs as the lens captures them; positions with zero VJPs are left out."""
    request = REQUESTS[1]
    delta = step("sgd", gpt2.model, requests=request, lr=0.5)
    capture = capture_gradients(
        gpt2.model, request.prompt, sequence_nll(" the king"), matrices="mlp", prepend_bos=False
    )
    n_target = len(host_of(gpt2.model).vocabulary.encode(" the king"))
    assert n_target > 1
    for each in delta:
        gradient = capture[each.matrix, each.layer]
        counts = ~gradient.is_zero[0]
        assert each.left is not None
        assert each.right is not None
        assert torch.allclose(each.left.T, gradient.inputs[0, counts], rtol=1e-9)
        wanted = -0.5 / n_target * gradient.vjps[0, counts]
        assert torch.allclose(each.right, wanted, rtol=1e-9, atol=1e-15)
    # In the last layer only positions that predict a target token have a VJP.
    assert delta["W_out", 2].left.shape[1] == n_target


def test_several_requests_are_the_mean_of_each(gpt2: Case) -> None:
    together = step("sgd", gpt2.model)
    alone = [step("sgd", gpt2.model, requests=request) for request in REQUESTS]
    for each in together:
        mean = sum(one[each.matrix, each.layer].dense() for one in alone) / len(alone)
        assert torch.allclose(each.dense(), mean, rtol=1e-8, atol=1e-13)


def test_the_model_is_unchanged(gpt2: Case) -> None:
    before = host_of(gpt2.model).fingerprint()
    for name in ("sgd", "adam", "muon"):
        step(name, gpt2.model)
    assert host_of(gpt2.model).fingerprint() == before
    assert all(each.grad is None for each in host_of(gpt2.model).parameters().values())


def test_a_step_lowers_the_loss(facts_model: Any) -> None:
    """Each optimizer at a small learning rate; in the opposite direction the loss rises."""

    @torch.no_grad()
    def loss() -> float:
        return float(independent_loss(facts_model, facts_model, (MESSI,)))

    before = loss()
    for name, lr in (("sgd", 0.01), ("adam", 1e-4), ("muon", 0.01)):
        delta = step(name, facts_model, requests=MESSI, lr=lr)
        with delta.applied(facts_model):
            assert loss() < before
        with delta.scale(-1).applied(facts_model):
            assert loss() > before


def test_settings_are_recorded(gpt2: Case) -> None:
    made = step("adam", gpt2.model, matrices=("W_in", "W_out"), layers=1)
    assert made.about == {
        "method": "GradientStep",
        "optimizer": "adam",
        "lr": LR,
        "matrices": ["W_in", "W_out"],
        "layers": [1],
        "prepend_bos": False,
        "model": host_of(gpt2.model).name,
    }


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer is 'lion'; it should be 'sgd', 'adam' or 'muon'"),
        ({"lr": 0}, "lr is 0; it should be greater than 0"),
        ({"lr": float("inf")}, "lr is inf; it should be a finite number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": True}, "lr is True"),
        ({"lr": "1"}, "lr is '1'"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        GradientStep(**({"optimizer": "sgd", "lr": 1.0} | settings))


def test_missing_matrices(gpt2: Case) -> None:
    for more, message in (
        ({"matrices": "W_gate"}, "has no W_gate"),
        ({"matrices": "W_up"}, "unknown matrix 'W_up'"),
        ({"layers": 3}, "layer 3 does not exist"),
        ({"layers": []}, r"layers is \[\]; pass at least one layer"),
    ):
        with pytest.raises(EditError, match=message):
            step("sgd", gpt2.model, **more)


@bridge_only
def test_experts_are_refused() -> None:
    try:
        model = build_model("mixtral", "bridge", torch.float64)
    except NotAvailable:
        pytest.skip("no mixture of experts here")
    with pytest.raises(UnsupportedModelError, match="experts"):
        step("sgd", model, requests=REQUESTS[:1], matrices="W_out")


# -------------------------------------------------------------------------------------- tokens


def test_tokens_of_a_step_match_those_of_the_gradient(facts_model: Any) -> None:
    """At a position SGD writes its negative VJP, scaled by `||x_i||`."""
    delta = step("sgd", facts_model, requests=MESSI, lr=1.0, matrices=("W_in", "W_out"))
    table = delta_tokens(
        facts_model, delta, k=4, target=" Paris", projection="normalized", most=None
    )
    result = backward_lens(
        facts_model, MESSI.prompt, " Paris", k=4, projection="normalized", prepend_bos=False
    )
    for each in delta:
        gradient = result.capture[each.matrix, each.layer]
        counts = (~gradient.is_zero[0]).nonzero()[:, 0].tolist()
        rows = table[(table["matrix"] == each.matrix) & (table["layer"] == each.layer)]
        assert len(rows) == len(counts)
        assert rows["norm"].is_monotonic_decreasing
        for _, row in rows.iterrows():
            position = counts[row["component"]]
            cell = result.cell(each.matrix, each.layer, position)
            length = float(gradient.input_norms[0, position] * gradient.norms[0, position])
            assert row["norm"] == pytest.approx(length, rel=1e-4)
            if each.matrix == "W_in":
                assert row["role"] == "reads"
                assert row["vector_norm"] == pytest.approx(
                    float(gradient.input_norms[0, position]), rel=1e-4
                )
                assert row["top_tokens"] == [each.token for each in cell.top]
            else:
                assert row["role"] == "writes"
                assert row["vector_norm"] == pytest.approx(length, rel=1e-4)


def expected_tokens(model: Any, vector: Tensor, k: int) -> list[str]:
    scores = host_of(model).unembedding.logits(vector[None].to(torch.float32))[0]
    vocabulary = host_of(model).vocabulary
    return list(vocabulary.texts(scores.topk(k).indices.tolist()))


@pytest.mark.parametrize("components", ["made", "singular"])
@pytest.mark.parametrize("matrix", ["W_out", "W_O", "W_in", "W_Q"])
def test_tokens_are_decoded_from_the_vector_in_the_stream(
    facts_model: Any, matrix: str, components: str
) -> None:
    """By hand: the Logit Lens of each vector; the bottom is the top of the negated scores."""
    delta = step("sgd", facts_model, requests=MESSI, lr=2.0, matrices=matrix, layers=3)
    table = delta_tokens(facts_model, delta, k=3, components=components)  # type: ignore[arg-type]
    each = delta[matrix, 3]
    if components == "made":
        left, right = each.factors
    else:
        u, s, vh = torch.linalg.svd(each.dense().double(), full_matrices=False)
        sign = torch.tensor([1.0 if float(c[c.abs().argmax()]) > 0 else -1.0 for c in u.T]).double()
        left, right = u * sign, s[:, None] * vh * sign[:, None]
    assert len(table) == min(10, each.left.shape[1] if components == "made" else each.rank())
    for _, row in table.iterrows():
        at = row["component"]
        is_reading = matrix in ("W_in", "W_Q")
        vector = left[:, at] if is_reading else right[at] * left[:, at].norm()
        assert row["vector_norm"] == pytest.approx(float(vector.norm()), rel=1e-4)
        assert row["norm"] == pytest.approx(float(left[:, at].norm() * right[at].norm()), rel=1e-4)
        assert row["top_tokens"] == expected_tokens(facts_model, vector, 3)
        assert row["top_scores"] == sorted(row["top_scores"], reverse=True)
        assert row["bottom_scores"] == sorted(row["bottom_scores"])
        assert row["bottom_scores"][0] < row["top_scores"][-1]
    assert "target_rank" not in table


def test_dense_edits_have_only_singular_tokens(facts_model: Any) -> None:
    delta = step("adam", facts_model, requests=MESSI, matrices="W_out", layers=5, lr=0.01)
    made, singular = (
        delta_tokens(facts_model, delta, k=2, components=each, most=4, target=" Paris")  # type: ignore[arg-type]
        for each in ("made", "singular")
    )
    assert made.equals(singular)
    assert made["component"].tolist() == [0, 1, 2, 3]
    values = delta["W_out", 5].singular_values()[:4]
    assert made["norm"].tolist() == pytest.approx(values.tolist(), rel=1e-6)
    assert made["target_rank"].between(0, host_of(facts_model).d_vocab_out - 1).all()


def test_a_shift_decodes_to_its_target(facts_model: Any) -> None:
    host = host_of(facts_model)
    token = host.vocabulary.encode(" Paris")[0]
    embedding = facts_model.W_E[token].detach()
    made = MatrixDelta("W_out", 6, left=torch.ones(512, 1), right=embedding[None])
    table = delta_tokens(facts_model, WeightDelta((made,), {}), k=1, target=token)
    [row] = table.to_dict("records")
    assert (row["top_tokens"], row["target_rank"]) == ([" Paris"], 0)


@pytest.mark.usefixtures("as_for_a_user")
def test_tokens_that_do_not_exist(facts_model: Any, gpt2: Case) -> None:
    delta = step("sgd", facts_model, requests=MESSI, layers=5)
    for more, message in (
        ({"k": 0}, "k is 0"),
        ({"most": 0}, "most is 0"),
        ({"components": "all"}, "components is 'all'"),
        ({"projection": "tuned"}, "unknown projection"),
        ({"target": "no such token anywhere"}, "token"),
    ):
        for edit in (delta, WeightDelta((), {})):
            with pytest.raises(InputError, match=message):
                delta_tokens(facts_model, edit, **more)
        if not {"most", "components"} & set(more):
            with pytest.raises(InputError, match=message):
                compare_tokens(facts_model, {"none": WeightDelta((), {})}, **more)
    with pytest.raises(EditError, match=r"layer 5 does not exist"):
        delta_tokens(gpt2.model, delta)
    empty = delta_tokens(facts_model, WeightDelta((), {}), target=" Paris")
    assert len(empty) == 0
    assert "target_rank" in empty


def response(delta: MatrixDelta) -> Tensor:
    """Directions that an edit responds to: left vectors times the norms of right vectors."""
    left, right = delta.factors
    parts = [column * row.norm() for column, row in zip(left.T, right, strict=True)]
    return torch.stack(parts).sum(0).double()


def test_comparison_of_optimizers(facts_model: Any) -> None:
    """Each column against dense matrices: the paper's comparison of optimizers on one prompt."""
    deltas = {
        name: step(name, facts_model, requests=MESSI, layers=[4, 7], matrices="W_out")
        for name in ("sgd", "adam", "muon")
    }
    table = compare_tokens(facts_model, deltas, " Paris", k=10).set_index(["layer", "edit"])
    assert table.index.tolist() == [(layer, name) for layer in (4, 7) for name in deltas]
    for (layer, name), row in table.iterrows():
        dense = deltas[name]["W_out", layer].dense().double()
        first = deltas["sgd"]["W_out", layer].dense().double()
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        assert row["rank"] == deltas[name]["W_out", layer].rank()
        assert row["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
        assert row["top_energy"] == pytest.approx(float(s[0] ** 2 / (s @ s)), rel=1e-4)
        assert row["stable_rank"] == pytest.approx(float((s @ s) / s[0] ** 2), rel=1e-4)
        cosine = float((dense * first).sum() / dense.norm() / first.norm())
        assert row["alignment"] == pytest.approx(cosine, abs=1e-4)
        if name != "muon":  # all of its singular values are equal
            responds = response(deltas["sgd"]["W_out", layer])
            side = 1.0 if float(u[:, 0] @ responds) >= 0 else -1.0
            vector = vh[0] * side
            assert row["top_tokens"] == expected_tokens(facts_model, vector, 10)
        answer = response(deltas["sgd"]["W_out", layer]) @ dense
        assert row["answer_tokens"] == expected_tokens(facts_model, answer / answer.norm(), 10)
        shared = set(row["answer_tokens"]) & set(table.loc[layer, "sgd"]["answer_tokens"])
        assert row["answer_overlap"] == pytest.approx(len(shared) / 10)
    sgd, adam, muon = (table.xs(name, level="edit") for name in deltas)
    assert sgd["overlap"].tolist() == [1, 1]
    assert sgd["alignment"].tolist() == pytest.approx([1, 1])
    assert sgd["target_rank"].tolist() == [0, 0]
    assert muon["rank"].tolist() == sgd["rank"].tolist()
    assert sgd["answer_overlap"].tolist() == [1, 1]
    assert (muon["answer_target_rank"] == 0).all()
    assert adam["rank"].iloc[0] > 10 * sgd["rank"].iloc[0]
    assert "target_rank" not in compare_tokens(facts_model, deltas)


def test_steps_on_a_reading_matrix_are_compared_by_their_inputs(facts_model: Any) -> None:
    one, other = (
        step(name, facts_model, requests=MESSI, layers=4, matrices="W_in", lr=0.1)
        for name in ("sgd", "adam")
    )
    row = compare_tokens(facts_model, {"sgd": one, "adam": other}, " Paris").iloc[1]
    dense, first = other["W_in", 4].dense().double(), one["W_in", 4]
    u, _, _ = torch.linalg.svd(dense, full_matrices=False)
    side = 1.0 if float(u[:, 0] @ response(first)) >= 0 else -1.0
    assert row["top_tokens"] == expected_tokens(facts_model, side * u[:, 0], 10)
    left, right = first.factors
    writes = (right * left.norm(dim=0)[:, None]).sum(0).double()
    answer = dense @ writes
    assert row["answer_tokens"] == expected_tokens(facts_model, answer / answer.norm(), 10)


def test_edits_that_cannot_be_compared(facts_model: Any) -> None:
    one, other = (step("sgd", facts_model, requests=MESSI, layers=layer) for layer in (3, 4))
    with pytest.raises(EditError, match="different matrices"):
        compare_tokens(facts_model, {"a": one, "b": other})
    with pytest.raises(EditError, match="deltas is empty"):
        compare_tokens(facts_model, {})
    nothing = compare_tokens(facts_model, {"a": one, "b": one.scale(0.0)}, " Paris")
    last = nothing.iloc[-1]
    assert (last["rank"], last["norm"], last["top_tokens"]) == (0, 0, [])
    assert nothing["target_rank"].isna().tolist() == [False, True] * (len(nothing) // 2)


def test_prompts_with_bos_differ(facts_model: Any) -> None:
    with_bos, without = (
        step("sgd", facts_model, requests=MESSI, layers=2, prepend_bos=each)["W_out", 2]
        for each in (True, False)
    )
    assert with_bos.left.shape[1] == without.left.shape[1] + 1
