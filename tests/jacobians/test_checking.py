"""A Jacobian Lens is compared with the model, and refused on any other."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from jacobian_cases import OwnLens, identity_lens, random_lens, slow_jacobians
from models import HAS_HOOKED, Case, bridge_only, build, small_tokenizer

import backward_lens_tl as blt
from backward_lens_tl.errors import BackwardLensWarning, JacobianLensError
from backward_lens_tl.jacobians.agreement import agreement
from backward_lens_tl.jacobians.average import WEIGHTS, jacobians_of
from backward_lens_tl.models import host_of

N_TOKENS, SKIP = 12, 2


def lens_of(case: Case) -> OwnLens:
    return slow_jacobians(case.model, case.tokens(N_TOKENS), SKIP)


def read(model: Any, lens: object) -> blt.VectorReadout:
    vector = torch.ones(model.cfg.d_model)
    return blt.read_vectors(model, vector, projection=lens, layer=0)  # type: ignore[arg-type]


@pytest.mark.versions
def test_the_lens_of_the_model_is_accepted(case: Case) -> None:
    lens = lens_of(case)
    found = agreement(jacobians_of(lens), host_of(case.model))
    assert found.own.min() > 0.3  # of other models: below 0.2
    read(case.model, lens)


@pytest.mark.versions
def test_the_lens_of_another_model_of_the_same_width_is_refused(case: Case) -> None:
    kind = "bridge" if "Bridge" in type(case.model).__name__ else "hooked"
    other = build(f"{kind}-{case.name}", seed=1)
    with pytest.raises(JacobianLensError, match=r"does not belong to .* correlate with its matr"):
        read(case.model, lens_of(other))


def test_transposed_matrices_are_refused(one_gpt2: Case) -> None:
    lens = lens_of(one_gpt2)
    read(one_gpt2.model, lens)
    turned = OwnLens({layer: matrix.T for layer, matrix in lens.jacobians.items()})
    with pytest.raises(JacobianLensError, match=r"transposed: .* J_l\[a, b\] must be d h_final\["):
        read(one_gpt2.model, turned)


@pytest.mark.parametrize("wrong", [identity_lens, random_lens])
def test_matrices_of_no_model_are_refused_unless_asked_for(one_gpt2: Case, wrong: Any) -> None:
    lens = wrong(one_gpt2.model)
    with pytest.raises(JacobianLensError, match=r"pass the lens of this model, or jacobian_lens\("):
        read(one_gpt2.model, lens)
    read(one_gpt2.model, blt.jacobian_lens(lens, check=False))


def test_identities_are_the_lens_of_a_model_that_adds_nothing() -> None:
    case = build("hooked-gpt2" if HAS_HOOKED else "bridge-gpt2")
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            if "blocks" in name and not name.endswith(("ln1.w", "ln2.w")):
                parameter.zero_()
    read(case.model, identity_lens(case.model))


@pytest.mark.parametrize(
    "order",
    [(6, 5, 4, 3, 2, 1, 0), (2, 0, 4, 1, 6, 3, 5), (1, 2, 3, 4, 5, 6, 6), (0, 0, 1, 2, 3, 4, 5)],
)
def test_layers_in_another_order_are_refused(facts_model: Any, order: tuple[int, ...]) -> None:
    own = blt.jacobian_lens("facts").jacobians
    read(facts_model, OwnLens(own.matrices))
    shuffled = OwnLens({layer: own.matrices[other] for layer, other in enumerate(order)})
    with pytest.raises(JacobianLensError, match="the layers of the Jacobian Lens are not those of"):
        read(facts_model, shuffled)


@pytest.mark.versions
def test_sizes_that_differ_are_refused(one_gpt2: Case) -> None:
    model, width = one_gpt2.model, one_gpt2.d_model
    wrong = {
        "fitted on a model of width 5, but": OwnLens({0: torch.eye(5)}),
        r"matrices for layers \[2, 7\], but .* has layers 0 to 2": OwnLens(
            {layer: torch.eye(width) for layer in (0, 2, 7)}
        ),
        "maps to the output of layer 1, but the final norm .* layer 2": OwnLens(
            {0: torch.eye(width)}, metadata={"target_layer": 1}
        ),
    }
    for message, lens in wrong.items():
        for checked in (True, False):
            with pytest.raises(JacobianLensError, match=message):
                read(model, blt.jacobian_lens(lens, check=checked))


def test_the_recorded_name_must_be_the_models(one_gpt2: Case) -> None:
    lens = lens_of(one_gpt2)
    name = one_gpt2.model.cfg.model_name
    lens.metadata["model_name"] = "gpt2-xl"
    with pytest.raises(
        JacobianLensError, match=f"was fitted on 'gpt2-xl', but the model is '{name}"
    ):
        read(one_gpt2.model, lens)
    read(one_gpt2.model, blt.jacobian_lens(lens, check=False))
    # As HookedTransformer and TransformerBridge write one name.
    lens = lens_of(one_gpt2)
    lens.metadata["model_name"] = f"Organisation/{name.upper()}"
    read(one_gpt2.model, lens)


def test_a_pair_is_compared_once(one_gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = lens_of(one_gpt2)
    read(one_gpt2.model, lens)
    monkeypatch.setattr("backward_lens_tl.jacobians.checking.agreement", None)
    read(one_gpt2.model, lens)
    with torch.no_grad():
        lens.jacobians[0] *= 2  # the same object, with other numbers
    with pytest.raises(TypeError):
        read(one_gpt2.model, lens)


def test_hooks_of_the_caller_do_not_see_the_probe(one_gpt2: Case) -> None:
    model, seen = one_gpt2.model, []
    lens = lens_of(one_gpt2)
    hooks = [("blocks.0.hook_resid_post", lambda value, hook: seen.append(value.shape))]
    with model.hooks(fwd_hooks=hooks), pytest.warns(BackwardLensWarning, match="was not compared"):
        read(model, lens)
    assert not seen
    read(model, lens)
    with model.hooks(fwd_hooks=hooks), warnings.catch_warnings():
        warnings.simplefilter("error")
        read(model, lens)


def test_the_models_state_is_unchanged(one_gpt2: Case) -> None:
    model = one_gpt2.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    read(model, lens_of(one_gpt2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@pytest.mark.parametrize("broken", [True, False])
def test_a_model_without_a_usable_tokenizer_is_compared_on_random_tokens(
    monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    case = build(f"{'hooked' if HAS_HOOKED else 'bridge'}-gpt2")
    right, wrong = lens_of(case), random_lens(case.model)
    if broken:
        monkeypatch.setattr(case.model, "to_tokens", lambda *args, **kwargs: torch.tensor([[999]]))
    else:
        case.model.tokenizer = None
    read(case.model, right)
    with pytest.raises(JacobianLensError, match="does not belong to"):
        read(case.model, wrong)


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_the_same_lens(dtype: torch.dtype) -> None:
    model = blt.load_facts_model().to(dtype)
    own = blt.jacobian_lens("facts").jacobians
    assert agreement(own, host_of(model)).own.min() > 0.7
    result = blt.backward_lens(
        model, "Lionel Messi plays for", " Paris", projection=blt.jacobian_lens("facts")
    )
    assert (result.target_rank("W_out")[:, 0, -1] < 10).all()
    turned = OwnLens({layer: matrix.T for layer, matrix in own.matrices.items()})
    with pytest.raises(JacobianLensError, match="transposed"):
        read(model, turned)


@bridge_only
def test_other_weights_than_recorded_give_a_warning() -> None:
    case = build("bridge-gpt2")
    lens = lens_of(case)
    about = {"fit_dtype": "float64", "model_system": "TransformerBridge"}
    lens.metadata = {WEIGHTS: host_of(case.model).fingerprint(), **about}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(case.model, lens)
    lens = lens_of(case)
    lens.metadata = {WEIGHTS: "of another checkpoint", **about}
    with pytest.warns(BackwardLensWarning, match="with other weights, such as before an edit"):
        read(case.model, lens)
    # Versions of TransformerLens name the parameters of the same weights differently.
    lens = lens_of(case)
    lens.metadata = {WEIGHTS: "by another version", "transformer_lens_version": "0.1", **about}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(case.model, lens)


@pytest.mark.versions
def test_the_lens_of_the_facts_model_fits_it_without_a_warning() -> None:
    """It was fitted with one version of TransformerLens."""
    model = blt.load_facts_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackwardLensWarning)
        read(model, blt.jacobian_lens("facts"))


@bridge_only
@pytest.mark.parametrize("kind", ["bridge-compat", "hooked", "hooked-processed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_bridges_fit_reads_processed_weights_alike(family: str, kind: str) -> None:
    """`fold_ln` leaves the stream as it is; `center_writing_weights` removes its mean."""
    from architectures import NotAvailable, build_model

    raw = build_model(family, "bridge", torch.float64)
    try:
        other = build_model(family, kind, torch.float64)
    except NotAvailable as error:
        pytest.skip(str(error))
    tokens = torch.tensor([[5, 17, 40, 8, 61, 22, 9, 77, 30, 12]])
    lens = slow_jacobians(raw, tokens, SKIP)
    found, expected = (
        blt.backward_lens(model, tokens[:, :5], 7, matrices=["W_O", "W_out"], projection=lens)
        for model in (other, raw)
    )
    for matrix in ("W_O", "W_out"):
        for mine, theirs in (
            (found.target_rank(matrix), expected.target_rank(matrix)),
            (found.readout(matrix).top_ids, expected.readout(matrix).top_ids),
        ):
            assert torch.equal(mine, theirs), matrix


@bridge_only
def test_the_slow_estimator_is_that_of_transformer_lens() -> None:
    """The reference of these tests; and the orientation of the matrices."""
    from transformer_lens.tools.analysis import JacobianLens

    case = build("bridge-gpt2")
    text = "The capital of France is Paris"
    tokens = case.model.to_tokens(text)
    assert small_tokenizer().decode(tokens[0, 1:]) == text
    theirs = JacobianLens.fit(
        case.model, [text], corpus="one", skip_first_positions=SKIP, show_progress=False
    )
    ours = slow_jacobians(case.model, tokens, SKIP)
    for layer, matrix in theirs.jacobians.items():
        assert torch.allclose(ours.jacobians[layer].float(), matrix, atol=1e-5)
