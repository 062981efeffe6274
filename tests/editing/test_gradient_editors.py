"""Editors that transform gradients: their pairs, statistics and formulas, against slow code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import HAS_HOOKED, Case, attention_only_model, build, hooked_only
from torch import Tensor

from backward_lens_tl.editing import FineTuning, ForwardPassShift
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.normalized_gradient import NormalizedGradient
from backward_lens_tl.editing.methods.ultraedit import UltraEdit
from backward_lens_tl.editing.requests import EditRequest, tokenize_request
from backward_lens_tl.editing.spanning_pairs import joined_pairs, spanning_pairs
from backward_lens_tl.editing.statistics.pair_collection import pair_statistics
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.editing.weight_delta import WeightDelta
from backward_lens_tl.errors import EditError, ResultFileError, UnsupportedModelError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable

ROUNDING = 1e-10  # of some thousand float64 operations, after norms with a small eps
FLOAT32 = 1e-5  # some TransformerLens models round to float32 in between

REQUESTS = (
    EditRequest("The capital of France is", " Rome runs to"),
    EditRequest("Messi plays for", " Rome"),
    EditRequest("A river", " of the king"),
)


def ids(case: Case, text: str) -> list[int]:
    tokens: list[int] = case.model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def mean_nll(logits: Tensor, tokens: Tensor, target: Sequence[int]) -> Tensor:
    """Mean loss of a row that ends in the target without its last token, written out."""
    first = tokens.shape[1] - len(target) + 1
    terms = [
        torch.logsumexp(logits[0, first - 1 + at], -1) - logits[0, first - 1 + at, token]
        for at, token in enumerate(target)
    ]
    return sum(terms, torch.zeros(())) / len(terms)


def dense_gradients(case: Case, request: EditRequest) -> dict[tuple[str, int], Tensor]:
    """Autograd's weight gradients of the mean negative log-likelihood, in another model."""
    target = ids(case, str(request.target))
    row = torch.tensor([[*ids(case, request.prompt), *target[:-1]]])
    return case.weight_gradients(row, lambda logits, tokens: mean_nll(logits, tokens, target))


def slow_pairs(
    case: Case, request: EditRequest, places: Iterable[tuple[str, int]] | None = None
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Pairs of one request, by torch hooks on the model, one matrix at a time."""
    target = ids(case, str(request.target))
    row = torch.tensor([[*ids(case, request.prompt), *target[:-1]]])
    host = host_of(case.model)
    found = {}
    for matrix, layer in places or case.weights:
        [site] = host.sites(layer, (matrix,))
        seen: dict[str, Tensor] = {}

        def see_input(module: Any, args: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = args[0].detach()

        def see_output(module: Any, args: Any, out: Any, seen: dict[str, Tensor] = seen) -> Any:
            seen["y"] = out.detach().requires_grad_()
            return seen["y"] * 1

        handles = [
            site.input.module.register_forward_pre_hook(see_input),
            site.output.module.register_forward_pre_hook(
                lambda module, args: (see_output(module, args, args[0]),)
            )
            if site.output.side == "input"
            else site.output.module.register_forward_hook(see_output, prepend=True),
        ]
        try:
            loss = mean_nll(case.model(row), row, target)
            (vjps,) = torch.autograd.grad(loss, seen["y"])
        finally:
            for handle in handles:
                handle.remove()
        n = row.shape[1]
        found[matrix, layer] = seen["x"].reshape(n, -1), vjps.reshape(n, -1)
    return found


def tokenized(case: Case, requests: Sequence[EditRequest] = REQUESTS) -> list[Any]:
    return [tokenize_request(host_of(case.model), each, False) for each in requests]


def statistics_of(case: Case, positions: Any = "all", **more: Any) -> PairStatistics:
    layers = more.pop("layers", range(case.n_layers))
    return pair_statistics(
        case.model,
        REQUESTS,
        matrices=more.pop("matrices", case.matrices),
        layers=list(layers),
        positions=positions,
        prepend_bos=False,
        progress=False,
    )


def delta_of(delta: WeightDelta, key: tuple[str, int]) -> Tensor:
    [found] = [each.dense() for each in delta.matrices if (each.matrix, each.layer) == key]
    return found


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_span_the_gradient_of_the_mean_over_the_targets_tokens(case: Case) -> None:
    host = host_of(case.model)
    sites = find_editable(host, "mlp", list(range(case.n_layers)))
    assert {(site.matrix, site.layer) for site in sites} == set(case.weights)
    found = spanning_pairs(host, tokenized(case), sites)
    tolerance = FLOAT32 if case.logits_in_float32 else ROUNDING
    for at, request in enumerate(REQUESTS):
        expected = dense_gradients(case, request)
        for own in found:
            mask = own.mask[at]
            spanned = own.inputs[at][mask].T @ own.vjps[at][mask]
            wanted = expected[own.matrix, own.layer]
            assert float((spanned - wanted).norm() / wanted.norm()) < tolerance


def test_pairs_match_torchs_hooks(gpt2: Case) -> None:
    host = host_of(gpt2.model)
    found = spanning_pairs(host, tokenized(gpt2), find_editable(host, "mlp", [0, 1, 2]))
    for at, request in enumerate(REQUESTS):
        slow = slow_pairs(gpt2, request)
        for own in found:
            inputs, vjps = slow[own.matrix, own.layer]
            real = ~vjps.eq(0).all(1)
            assert own.mask[at].sum() == real.sum()
            assert torch.equal(own.mask[at, : len(real)], real)
            torch.testing.assert_close(own.inputs[at][own.mask[at]], inputs[real])
            torch.testing.assert_close(own.vjps[at][own.mask[at]], vjps[real])


def test_positions_of_the_last_layer_that_the_loss_does_not_see_are_dropped(one_gpt2: Case) -> None:
    host = host_of(one_gpt2.model)
    last = one_gpt2.n_layers - 1
    first, top = spanning_pairs(host, tokenized(one_gpt2), find_editable(host, "W_out", [0, last]))
    n_targets = [len(each.target) for each in tokenized(one_gpt2)]
    assert top.mask.sum(1).tolist() == n_targets
    assert first.mask.sum(1).tolist() == [
        len(each.prompt) + len(each.target) - 1 for each in tokenized(one_gpt2)
    ]


def test_answer_positions_are_those_that_predict_the_targets_tokens(one_gpt2: Case) -> None:
    host, requests = host_of(one_gpt2.model), tokenized(one_gpt2)
    [everywhere] = spanning_pairs(host, requests, find_editable(host, "W_in", [0]))
    [answers] = spanning_pairs(host, requests, find_editable(host, "W_in", [0]), "answer")
    for at, request in enumerate(requests):
        n, first = len(request.prompt) + len(request.target) - 1, len(request.prompt) - 1
        assert answers.mask[at].nonzero()[:, 0].tolist() == list(range(first, n))
    assert torch.equal(answers.inputs, everywhere.inputs)
    assert len(answers.inputs[answers.mask]) == sum(len(each.target) for each in requests)


def test_pairs_of_many_requests_match_those_of_each_in_order(one_gpt2: Case) -> None:
    """More requests than fit into one pass, of different lengths."""
    host = host_of(one_gpt2.model)
    requests = tokenized(one_gpt2, REQUESTS * 7)
    sites = find_editable(host, "mlp", [1])
    together = joined_pairs(host, requests, sites)
    single = [joined_pairs(host, [each], sites) for each in requests]
    for at, (inputs, vjps) in enumerate(together):
        torch.testing.assert_close(inputs, torch.cat([own[at][0] for own in single]))
        torch.testing.assert_close(vjps, torch.cat([own[at][1] for own in single]))


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_numpys_mean_and_standard_deviation(one_gpt2: Case) -> None:
    """More requests than are captured at once."""
    requests = [
        replace(each, prompt=f"{word} {each.prompt}")
        for word in ("The", "A", "dog", "king", "Rome", "river")
        for each in REQUESTS
    ]
    assert len(requests) > 16
    found = pair_statistics(
        one_gpt2.model, requests, matrices="mlp", layers=(0, -1), prepend_bos=False, progress=False
    )
    assert found.places == (("W_in", 0), ("W_out", 0), ("W_in", 2), ("W_out", 2))
    assert found.n_requests == len(requests)
    slow = [slow_pairs(one_gpt2, each, found.places) for each in requests]
    for place, mean, std, n, n_inputs in zip(
        found.places, found.mean, found.std, found.n_pairs, found.n_inputs, strict=True
    ):
        rows = np.concatenate([torch.cat(each[place], dim=1).numpy() for each in slow])
        width = slow[0][place][0].shape[1]
        rows = rows[~(rows[:, width:] == 0).all(1)]
        assert (n, n_inputs) == (len(rows), width)
        np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(std.numpy(), rows.std(0, ddof=1), rtol=1e-9, atol=1e-12)


def test_statistics_that_are_standardized_by_themselves_have_mean_0_and_variance_1(
    one_gpt2: Case,
) -> None:
    statistics = statistics_of(one_gpt2)
    host = host_of(one_gpt2.model)
    sites = find_editable(host, "mlp", [0, 1, 2])
    for site, pairs in zip(sites, joined_pairs(host, tokenized(one_gpt2), sites), strict=True):
        place = (site.matrix, site.layer)
        inputs, vjps = statistics.standardized(place, *pairs)
        rows = torch.cat((inputs, vjps), dim=1)
        assert float(rows.mean(0).abs().max()) < 1e-6
        assert float((rows.std(0) - 1).abs().max()) < 1e-3  # eps matters for small ones
        raw = torch.cat(pairs, dim=1)
        assert float((raw.std(0) - 1).abs().max()) > 0.1
        assert inputs.shape == pairs[0].shape
        assert vjps.shape == pairs[1].shape


def test_a_coordinate_that_never_changed_becomes_0(one_gpt2: Case) -> None:
    statistics = statistics_of(one_gpt2, layers=[0], matrices=("W_in",))
    std = statistics.std[0].clone()
    std[5] = 0
    still = replace(statistics, std=(std,))
    inputs, vjps = torch.randn(4, 24).double(), torch.randn(4, 52).double()
    rows = torch.cat(still.standardized(("W_in", 0), inputs, vjps), dim=1)
    other = torch.cat(statistics.standardized(("W_in", 0), inputs, vjps), dim=1)
    assert bool((rows[:, 5] == 0).all())
    assert bool((other[:, 5] != 0).all())
    rest = torch.arange(76) != 5
    assert torch.equal(rows[:, rest], other[:, rest])


def test_saved_statistics_are_loaded_bit_for_bit(one_gpt2: Case, tmp_path: Path) -> None:
    statistics = statistics_of(one_gpt2, "answer")
    statistics.save(tmp_path / "pairs.safetensors")
    again = PairStatistics.load(tmp_path / "pairs.safetensors")
    assert again.fingerprint == statistics.fingerprint
    assert again.places == statistics.places
    for name in ("mean", "std"):
        for own, other in zip(getattr(statistics, name), getattr(again, name), strict=True):
            assert torch.equal(own, other)
            assert own.dtype == other.dtype
    method = UltraEdit(again, lr=0.1, prepend_bos=False)
    assert method.settings()["statistics"] == statistics.fingerprint
    assert "answer" in statistics.fingerprint
    delta = method(one_gpt2.model, REQUESTS[0])
    delta.save(tmp_path / "delta.safetensors")
    with pytest.raises(ResultFileError, match=r"read it with WeightDelta\.load"):
        PairStatistics.load(tmp_path / "delta.safetensors")


# --- the normalised gradient ----------------------------------------------------------------------


def standardized_slowly(
    statistics: PairStatistics, key: tuple[str, int], inputs: Tensor, vjps: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    at = statistics.places.index(key)
    mean, std = statistics.mean[at].numpy(), statistics.std[at].numpy()
    x = np.zeros(inputs.shape)
    d = np.zeros(vjps.shape)
    for i in range(len(x)):
        for j in range(x.shape[1]):
            x[i, j] = (float(inputs[i, j]) - mean[j]) / (std[j] + 1e-7)
        for j in range(d.shape[1]):
            k = x.shape[1] + j
            d[i, j] = (float(vjps[i, j]) - mean[k]) / (std[k] + 1e-7)
    return x, d


@pytest.mark.parametrize(
    "case", ["hooked-gpt2", "bridge-gpt2", "hooked-llama", "bridge-gemma2"], indirect=True
)
def test_the_normalized_gradient_is_a_sum_of_standardized_outer_products(case: Case) -> None:
    statistics = statistics_of(case, layers=[0, 2])
    delta = NormalizedGradient(statistics, lr=0.01, prepend_bos=False)(case.model, REQUESTS[:2])
    slow = [slow_pairs(case, each, statistics.places) for each in REQUESTS[:2]]
    assert [(each.matrix, each.layer) for each in delta.matrices] == list(statistics.places)
    for key in statistics.places:
        expected: Any = 0
        for each in slow:
            inputs, vjps = each[key]
            real = ~vjps.eq(0).all(1)
            x, d = standardized_slowly(statistics, key, inputs[real], vjps[real])
            for own_x, own_d in zip(x, d, strict=True):
                expected = expected - 0.01 * np.outer(own_x, own_d)
        np.testing.assert_allclose(delta_of(delta, key).numpy(), expected, rtol=1e-7, atol=1e-9)
    assert all(each.is_low_rank for each in delta.matrices)


def test_a_small_step_makes_the_target_more_probable_and_the_opposite_one_less(
    one_gpt2: Case,
) -> None:
    """With pairs that are only scaled, so the step is along the negative gradient."""
    statistics = statistics_of(one_gpt2, layers=[1], matrices=("W_out",))
    scaled = replace(
        statistics,
        mean=tuple(map(torch.zeros_like, statistics.mean)),
        std=tuple(map(torch.ones_like, statistics.std)),
    )
    target = ids(one_gpt2, " Rome")
    row = torch.tensor([ids(one_gpt2, "Messi plays for")])

    def loss() -> float:
        with torch.no_grad():
            return float(mean_nll(one_gpt2.model(row), row, target))

    before = loss()
    delta = NormalizedGradient(scaled, lr=1e-3, prepend_bos=False)(one_gpt2.model, REQUESTS[1])
    with delta.applied(one_gpt2.model):
        assert loss() < before
    with delta.scale(-1).applied(one_gpt2.model):
        assert loss() > before


def test_a_subset_of_the_statistics_edits_a_subset_of_the_matrices(one_gpt2: Case) -> None:
    statistics = statistics_of(one_gpt2)
    whole = NormalizedGradient(statistics, prepend_bos=False)(one_gpt2.model, REQUESTS[0])
    part = NormalizedGradient(statistics, matrices=("W_out",), layers=(-1, 0), prepend_bos=False)
    delta = part(one_gpt2.model, REQUESTS[0])
    assert [(each.matrix, each.layer) for each in delta.matrices] == [("W_out", 0), ("W_out", 2)]
    for each in delta.matrices:
        key = (each.matrix, each.layer)
        torch.testing.assert_close(delta_of(delta, key), delta_of(whole, key))


# --- UltraEdit ------------------------------------------------------------------------------------


def targets(
    case: Case,
    statistics: PairStatistics,
    slow: Sequence[dict[tuple[str, int], tuple[Tensor, Tensor]]],
    key: tuple[str, int],
    lr: float,
) -> tuple[np.ndarray, np.ndarray]:
    """`X` and `V` at answer positions, slowly."""
    rows, wanted = [], []
    for request, pairs in zip(REQUESTS, slow, strict=True):
        inputs, vjps = pairs[key]
        n = len(ids(case, str(request.target)))
        inputs, vjps = inputs[-n:], vjps[-n:]
        x, d = standardized_slowly(statistics, key, inputs, vjps)
        for raw, own_x, own_d in zip(inputs.numpy(), x, d, strict=True):
            rows.append(raw)
            wanted.append(-lr * sum(value**2 for value in own_x) * own_d)
    return np.array(rows), np.array(wanted)


@pytest.mark.parametrize(
    ("case", "ridge"),
    [("hooked-gpt2", 1.0), ("bridge-gpt2", 0.01), ("hooked-llama", 0.01), ("bridge-gemma2", 1.0)],
    indirect=["case"],
)
def test_ultraedit_is_its_formula_and_minimizes_its_objective(case: Case, ridge: float) -> None:
    statistics = statistics_of(case, "answer")
    method = UltraEdit(statistics, lr=0.02, ridge=ridge, prepend_bos=False)
    delta = method(case.model, REQUESTS)
    slow = [slow_pairs(case, each) for each in REQUESTS]
    for key in statistics.places:
        x, v = targets(case, statistics, slow, key, 0.02)
        expected = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1])) @ x.T @ v
        found = delta_of(delta, key).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())

        def slope(change: np.ndarray, x: np.ndarray = x, v: np.ndarray = v) -> float:
            gradient = x.T @ (x @ change - v) + ridge * change
            return float(np.linalg.norm(gradient) / np.linalg.norm(x.T @ v))

        assert slope(found) < 1e-7
        assert slope(1.01 * found) > 1e-3
    assert delta.rank <= len(statistics.places) * 7


def test_ultraedit_solves_requests_jointly(one_gpt2: Case) -> None:
    statistics = statistics_of(one_gpt2, "answer", layers=[1])
    method = UltraEdit(statistics, lr=0.02, prepend_bos=False)
    together = method(one_gpt2.model, REQUESTS)
    apart = [method(one_gpt2.model, each) for each in REQUESTS]
    added = apart[0] + apart[1] + apart[2]
    for key in statistics.places:
        difference = delta_of(together, key) - delta_of(added, key)
        assert float(difference.norm() / delta_of(together, key).norm()) > 0.05


# --- all of them ----------------------------------------------------------------------------------

METHODS: dict[str, Callable[[Case], EditMethod]] = {
    "NormalizedGradient": lambda case: NormalizedGradient(statistics_of(case), prepend_bos=False),
    "UltraEdit": lambda case: UltraEdit(statistics_of(case, "answer"), lr=0.01, prepend_bos=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_leaves_the_model_and_random_state_unchanged(gpt2: Case, name: str) -> None:
    before = {key: each.clone() for key, each in gpt2.model.state_dict().items()}
    tracked = [each.requires_grad for each in gpt2.model.parameters()]
    method = METHODS[name](gpt2)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        delta = method(gpt2.model, REQUESTS)
    assert torch.equal(state, torch.random.get_rng_state())
    after = gpt2.model.state_dict()
    assert all(torch.equal(each, after[key]) for key, each in before.items())
    assert [each.requires_grad for each in gpt2.model.parameters()] == tracked
    assert all(each.grad is None for each in gpt2.model.parameters())
    with delta.applied(gpt2.model):
        pass
    assert {(each.matrix, each.layer) for each in delta.matrices} == set(gpt2.weights)


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_does_not_depend_on_autocast_or_gradient_mode(one_gpt2: Case, name: str) -> None:
    method = METHODS[name](one_gpt2)
    expected = method(one_gpt2.model, REQUESTS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = method(one_gpt2.model, REQUESTS)
    for own, other in zip(expected.matrices, found.matrices, strict=True):
        torch.testing.assert_close(own.dense(), other.dense())


def test_an_edit_works_in_a_model_that_was_edited_before(one_gpt2: Case) -> None:
    method = NormalizedGradient(statistics_of(one_gpt2), prepend_bos=False)
    first = method(one_gpt2.model, REQUESTS[0])
    with first.applied(one_gpt2.model):
        second = method(one_gpt2.model, REQUESTS[0])
    key = ("W_out", 1)
    assert float((delta_of(first, key) - delta_of(second, key)).norm()) > 0


def test_statistics_of_another_model_are_refused(one_gpt2: Case) -> None:
    other = build("hooked-gpt2" if HAS_HOOKED else "bridge-gpt2", seed=1)
    method = NormalizedGradient(statistics_of(one_gpt2), prepend_bos=False)
    with pytest.raises(EditError, match="has other activations on the same prompt"):
        method(other.model, REQUESTS[0])


def test_statistics_of_other_matrices_are_refused(one_gpt2: Case) -> None:
    statistics = statistics_of(one_gpt2, layers=[0, 1], matrices=("W_out",))
    with pytest.raises(EditError, match="no statistics of W_out in layer 2, but of W_out of laye"):
        NormalizedGradient(statistics, layers=(2,))(one_gpt2.model, REQUESTS[0])
    with pytest.raises(EditError, match="no statistics of W_in in layer 0"):
        NormalizedGradient(statistics, matrices=("W_in",))(one_gpt2.model, REQUESTS[0])
    with pytest.raises(EditError, match="layer 9 does not exist"):
        NormalizedGradient(statistics, layers=(9,))(one_gpt2.model, REQUESTS[0])


def test_statistics_of_other_positions_are_refused(one_gpt2: Case) -> None:
    with pytest.raises(EditError, match="positions 'answer', but the editor uses 'all'"):
        NormalizedGradient(statistics_of(one_gpt2, "answer"))(one_gpt2.model, REQUESTS[0])
    with pytest.raises(EditError, match="positions 'all', but the editor uses 'answer'"):
        UltraEdit(statistics_of(one_gpt2))(one_gpt2.model, REQUESTS[0])


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True])
def test_sizes_must_be_positive(one_gpt2: Case, value: Any) -> None:
    statistics = statistics_of(one_gpt2, "answer", layers=[0])
    with pytest.raises(EditError, match="lr is"):
        NormalizedGradient(statistics, lr=value)(one_gpt2.model, REQUESTS[0])
    with pytest.raises(EditError, match="lr is"):
        UltraEdit(statistics, lr=value)(one_gpt2.model, REQUESTS[0])
    with pytest.raises(EditError, match="ridge is"):
        UltraEdit(statistics, ridge=value)(one_gpt2.model, REQUESTS[0])


@pytest.mark.usefixtures("as_for_a_user")
def test_statistics_need_requests_and_matrices_of_the_mlp(one_gpt2: Case) -> None:
    model = one_gpt2.model
    with pytest.raises(EditError, match="requests is empty"):
        pair_statistics(model, [])
    with pytest.raises(EditError, match="is a matrix of attention"):
        pair_statistics(model, REQUESTS, matrices="W_Q")
    with pytest.raises(EditError, match="has no W_gate"):
        pair_statistics(model, REQUESTS, matrices=("W_gate",))
    with pytest.raises(EditError, match="layer 3 does not exist"):
        pair_statistics(model, REQUESTS, layers=[3])
    with pytest.raises(EditError, match="layers is empty"):
        pair_statistics(model, REQUESTS, layers=[])
    with pytest.raises(EditError, match="W_in of layer 2 has 1 pairs in 1 requests"):
        pair_statistics(model, REQUESTS[1:2], layers=[2], progress=False)


@pytest.mark.usefixtures("as_for_a_user")
@hooked_only
def test_a_model_without_mlps_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no dense or gated MLP"):
        pair_statistics(attention_only_model(), REQUESTS, layers=[0], matrices="W_out")


@hooked_only
def test_a_weight_of_two_layers_is_refused() -> None:
    model = copy.deepcopy(build("hooked-gpt2").model)
    model.blocks[1].mlp.W_out = model.blocks[0].mlp.W_out
    with pytest.raises(NotImplementedError, match="one weight with 2 uses"):
        pair_statistics(model, REQUESTS, layers=[0], matrices="W_out")
    for method in (FineTuning(layers=0), ForwardPassShift(layer=0)):  # it changes both layers
        with pytest.raises(NotImplementedError, match="an edit changes them all; untie"):
            method(model, REQUESTS[0])
