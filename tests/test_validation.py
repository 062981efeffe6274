"""`validate` passes if the capture is correct, and fails otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from architectures import NotAvailable, build_model
from models import Case, build
from torch import Tensor

from backward_lens_tl import models
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.errors import BackwardLensError, ValidationError
from backward_lens_tl.models.hooks import Tap
from backward_lens_tl.models.sites import ATTENTION_MATRICES
from backward_lens_tl.models.unembedding import Unembedding
from backward_lens_tl.validation import ValidationReport, validate

pytestmark = pytest.mark.usefixtures("as_for_a_user")


def assert_passes(report: ValidationReport, case: Case, tolerance: float) -> None:
    assert report.passed
    attention = {(matrix, layer) for matrix in ATTENTION_MATRICES for layer in range(case.n_layers)}
    assert {(error.matrix, error.layer) for error in report.errors} == set(case.weights) | attention
    assert 0 <= report.max_error <= tolerance
    assert report.tolerance <= tolerance


@pytest.mark.versions
def test_random_models_pass(case: Case) -> None:
    assert_passes(validate(case.model), case, 1e-12)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_random_models_in_float32_pass(name: str) -> None:
    case = build(name, torch.float32)
    assert_passes(validate(case.model), case, 1e-5)


def test_stories_model_passes(stories: Case) -> None:
    assert_passes(validate(stories.model, "Once upon a time there was a dog"), stories, 1e-5)


@pytest.mark.versions
def test_facts_model_passes(facts: Case) -> None:
    """Confident answers and passes of several shapes: with other shapes errors exceeded 1e-5."""
    prompts = ["Lionel Messi plays for", "Barack Obama grew up in the city of", "Rome"]
    report = validate(facts.model, prompts)
    assert_passes(report, facts, 1e-5)
    assert report.max_error < 1e-6


def test_own_prompts_and_objective(gpt2: Case) -> None:
    report = validate(
        gpt2.model, ["Messi plays for", "Rome"], objective=target_nll(5), matrices="W_out"
    )
    assert report.passed
    assert {error.matrix for error in report.errors} == {"W_out"}
    assert len(report.errors) == gpt2.n_layers


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_frozen_model_passes_and_stays_frozen(name: str) -> None:
    case = build(name)
    tensors = list(case.model.parameters())
    for index, parameter in enumerate(tensors):
        parameter.requires_grad_(index % 2 == 0)
    tensors[0].grad = torch.ones_like(tensors[0])
    wanted = [(p.requires_grad, p.grad is None) for p in tensors]
    with torch.no_grad():
        assert validate(case.model).passed
    assert [(p.requires_grad, p.grad is None) for p in tensors] == wanted
    assert torch.equal(tensors[0].grad, torch.ones_like(tensors[0]))
    case.model.requires_grad_(False)
    assert validate(case.model).passed
    assert not any(p.requires_grad for p in tensors)


def test_report_prints_a_table(gpt2: Case) -> None:
    report = validate(gpt2.model)
    shown = repr(report)
    for word in ("passed", "W_Q", "W_in", "W_out", "tolerance"):
        assert word in shown
    table = report.to_df()
    names = ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"]
    assert table.shape == (gpt2.n_layers, len(names))
    assert list(table.columns) == names
    for error in report.errors:
        assert table.loc[error.layer, error.matrix] == error.relative_error


# ------------------------------------------------------------------------- it fails where it should


def move(monkeypatch: pytest.MonkeyPatch, matrix: str, side: str, where: Any) -> None:
    """Move the hooks of one matrix to another place in the model."""
    for kind in (models.HookedTransformerHost, models.TransformerBridgeHost):
        original = kind.sites

        def sites(self: Any, layer: int, names: Any, original: Any = original) -> Any:
            return [
                dataclasses.replace(site, **{side: where(self.model.blocks[layer], site)})
                if site.matrix == matrix
                else site
                for site in original(self, layer, names)
            ]

        monkeypatch.setattr(kind, "sites", sites)


def before_the_norm(block: Any, site: Any) -> Any:
    return Tap(block.ln2, "input")


def after_the_post_norm(block: Any, site: Any) -> Any:
    return Tap(block.hook_mlp_out, "output")


@pytest.mark.versions
@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_input_read_before_the_norm_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(name)
    validate(case.model)
    move(monkeypatch, "W_in", "input", before_the_norm)
    with pytest.raises(ValidationError) as raised:
        validate(case.model)
    assert isinstance(raised.value, BackwardLensError)
    for word in ("W_in", "W_out", "FAILED", "layer"):
        assert word in str(raised.value)
    assert validate(case.model, matrices="W_out").passed


@pytest.mark.versions
@pytest.mark.parametrize("name", ["hooked-gemma2", "bridge-gemma2"])
def test_output_read_after_the_post_norm_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(name)
    validate(case.model)
    move(monkeypatch, "W_out", "output", after_the_post_norm)
    with pytest.raises(ValidationError, match="W_out"):
        validate(case.model)


def test_wrong_lens_fails(gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The readout is compared with the model's logits."""
    original = Unembedding.logits

    def without_the_bias(self: Any, vectors: Tensor) -> Tensor:
        return original(self, vectors) - 0.1 * torch.arange(97)

    validate(gpt2.model)
    monkeypatch.setattr(Unembedding, "logits", without_the_bias)
    with pytest.raises(ValidationError):
        validate(gpt2.model)


def test_nan_fails() -> None:
    case = build("bridge-gpt2")
    with torch.no_grad():
        case.own["W_in", 1].tensor[0, 0] = torch.nan
    with pytest.raises(BackwardLensError):
        validate(case.model)


def test_patched_model_passes(gpt2: Case) -> None:
    """Both sides of the comparison run under the caller's hooks."""
    patch = ("blocks.1.hook_resid_pre", lambda value, hook: value * 1.5 + 0.1)
    with gpt2.model.hooks(fwd_hooks=[patch]):
        assert validate(gpt2.model).passed


def test_processed_copies_of_a_bridge_are_converted_to_float32_too() -> None:
    try:
        model = build_model("llama", "bridge-compat", torch.bfloat16)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    report = validate(model, torch.arange(3, 14)[None])
    assert all(1e-5 < error.float32_error < 0.1 for error in report.errors)
