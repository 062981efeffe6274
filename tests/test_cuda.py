"""Capture, readout, files and edits give the same results on a GPU as on a CPU.

The device is a GPU if there is one and the CPU otherwise, so that the tests themselves always
run; `make gpu-check` runs only them, and requires the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from delta_cases import everything, unchanged
from models import HAS_BRIDGE, Case, build, hooked_only, nll, relative_error, require_kind
from recorded_passes import CLOSE, PROMPTS, assert_equal, read_values, record_forward, values
from sweep_cases import ROWS, assert_close
from torch import Tensor, nn

import backward_lens_tl as blt
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.editing import EditRequest, ForwardPassShift
from backward_lens_tl.result import BackwardLensResult
from benchmarks import memory as peaks
from benchmarks.sizes import SMALL, bridge, hooked, question

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("as_for_a_user")]

DEVICE = os.environ.get("BACKWARD_LENS_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("bridge", "hooked")
KIND = KINDS[0] if HAS_BRIDGE else KINDS[1]
NAMES = ("bridge-gpt2", "hooked-llama")
PROMPT, TARGET = "Lionel Messi plays for", " Paris"
FACTS = [PROMPT, "Barack Obama grew up in", "The capital of the country of France is"]
ALL: dict[str, Any] = {"matrices": "all"}

# Sums of a few hundred float32 products in another order: about 1e-7 each.
FLOAT32 = 1e-4

on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="peaks of a GPU's memory; no GPU here")


@pytest.fixture(scope="module")
def device() -> str:
    """The device of the models."""
    return DEVICE


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, device: str) -> tuple[Case, nn.Module]:
    """A random model in float64 on the CPU with its reference, and the same model on the device."""
    moved = build(request.param).model.to(device)
    return build(request.param), moved


@pytest.fixture(scope="module", params=KINDS)
def facts_pair(request: pytest.FixtureRequest, device: str) -> tuple[nn.Module, nn.Module]:
    """The trained model in float32, on the CPU and on the device."""
    require_kind(request.param)
    return blt.load_facts_model(request.param), blt.load_facts_model(request.param, device)


def on_cpu(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """Move tensors, which must all be on the device, to the CPU."""
    assert {tensor.device.type for tensor in tensors.values()} == {device}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def factors(capture: GradientCapture) -> dict[str, Tensor]:
    return {
        f"{gradient.matrix} {gradient.layer} {name}": getattr(gradient, name)
        for gradient in capture
        for name in ("inputs", "vjps")
    }


# --------------------------------------------------------------------------------- capture, readout


def test_the_capture_is_autograds_gradient(pair: tuple[Case, nn.Module], device: str) -> None:
    case, model = pair
    tokens = case.tokens(7, 7)
    expected = [case.weight_gradients(row[None], nll(5)) for row in tokens]
    capture = blt.capture_gradients(model, tokens, blt.target_nll(5))
    # The reference's norms round to float32 in some models.
    close = 1e-5 if case.logits_in_float32 else 1e-12
    for gradient in capture:
        for prompt, gradients in enumerate(expected):
            dense = gradient.dense(prompt)
            assert dense.device.type == device
            wanted = gradients[gradient.matrix, gradient.layer]
            assert relative_error(dense.cpu(), wanted) < close
            assert gradient.rank(prompt) <= 7


def test_validation_passes(pair: tuple[Case, nn.Module]) -> None:
    report = blt.validate(pair[1])
    assert report.passed, report


def test_a_capture_matches_the_cpus(pair: tuple[Case, nn.Module], device: str) -> None:
    case, model = pair
    expected = blt.capture_gradients(case.model, PROMPTS, nll(5), **ALL)
    found = blt.capture_gradients(model, PROMPTS, nll(5), **ALL)
    close = {"rtol": 1e-4, "atol": 1e-6} if case.logits_in_float32 else CLOSE
    assert_equal(on_cpu(values(found), device), values(expected), close)


def test_a_readout_matches_the_cpus(pair: tuple[Case, nn.Module], device: str) -> None:
    case, model = pair
    both = ("logit_lens", "normalized")
    for lens in both:
        expected, found = (
            blt.backward_lens(each, PROMPTS, 5, k=4, projection=lens, **ALL)
            for each in (case.model, model)
        )
        close = {"rtol": 1e-4, "atol": 1e-5} if case.logits_in_float32 else CLOSE
        assert_equal(on_cpu(read_values(found), device), read_values(expected), close)
        assert found.token_texts == expected.token_texts


def test_the_model_is_unchanged_on_the_device(pair: tuple[Case, nn.Module], device: str) -> None:
    module = torch.cuda if device == "cuda" else torch
    before = module.get_rng_state()
    with unchanged(pair[1]):
        blt.backward_lens(pair[1], PROMPTS, 5, **ALL)
    assert torch.equal(module.get_rng_state(), before)


# -------------------------------------------------------------------------------- the trained model


def lens(model: nn.Module, memory: Memory | None = None) -> BackwardLensResult:
    return blt.backward_lens(model, FACTS, TARGET, k=3, memory=memory, **ALL)


def test_top_tokens_of_the_trained_model(facts_pair: tuple[nn.Module, nn.Module]) -> None:
    expected, found = map(lens, facts_pair)
    errors = {
        name: relative_error(value.cpu(), factors(expected.capture)[name])
        for name, value in factors(found.capture).items()
        if value.any()
    }
    assert max(errors.values()) < FLOAT32
    same = found.to_df()["top_tokens"].map(list) == expected.to_df()["top_tokens"].map(list)
    # Neighbors whose scores are equal up to rounding may swap places.
    assert same.mean() > 0.99
    assert found.top_tokens("W_out", -1, -1) == expected.top_tokens("W_out", -1, -1)


def test_values_of_a_result(facts_pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    _, model = facts_pair
    result = lens(model)
    path = tmp_path / "result.safetensors"
    result.save(path)
    loaded = BackwardLensResult.load(path)
    # Norms are computed on the factors' device.
    pd.testing.assert_frame_equal(result.to_df(), loaded.to_df(), rtol=1e-4, atol=1e-6)
    assert TARGET in result._repr_html_()
    assert len(blt.analysis.gradient_ranks(result)) == len(blt.analysis.gradient_ranks(loaded))
    assert set(result.capture.to_cache().keys()) == set(loaded.capture.to_cache().keys())
    attention = result.capture.reversed_attention(-1)
    assert torch.equal(attention.cpu(), loaded.capture.reversed_attention(-1).cpu())


# Tolerance of a matrix's factors and of the scores of its top tokens relative to float32.
# bfloat16 keeps 8 bits and float16 11, and dozens of roundings accumulate: on a CPU the
# largest errors of factors are 0.07 and 0.012, those of scores half of that.
HALVES = {torch.bfloat16: 0.15, torch.float16: 0.03}


@pytest.mark.parametrize(
    ("kind", "dtype"), [*zip(KINDS, HALVES, strict=True)], ids=["bridge-bfloat16", "hooked-float16"]
)
def test_a_model_in_half_precision(device: str, kind: str, dtype: torch.dtype) -> None:
    require_kind(kind)
    model, half = blt.load_facts_model(kind), blt.load_facts_model(kind, device).to(dtype)
    expected, found = (blt.backward_lens(each, PROMPT, TARGET, k=3) for each in (model, half))
    wanted = factors(expected.capture)
    for name, factor in factors(found.capture).items():
        assert factor.dtype == torch.float32
        if wanted[name].any():
            assert relative_error(factor.cpu(), wanted[name]) < HALVES[dtype], name
    for matrix in ("W_in", "W_out"):
        scores, wanted_scores = (
            each.readout(matrix).top_scores[:, 0, -1].cpu() for each in (found, expected)
        )
        assert relative_error(scores, wanted_scores) < HALVES[dtype] / 2
    assert found.top_tokens("W_out", -1, -1, k=1) == expected.top_tokens("W_out", -1, -1, k=1)
    assert blt.validate(half, PROMPT, matrices="mlp").passed


# ------------------------------------------------------------------------------------------- memory


def test_a_fit_begun_on_the_cpu_continues_on_the_device(device: str, tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens.tools.analysis")
    on_the_cpu, on_the_device = (blt.load_facts_model("bridge", where) for where in ("cpu", device))
    settings: dict[str, Any] = {"skip": 4, "seed": None, "progress": False}
    whole, continued = tmp_path / "whole.pt", tmp_path / "continued.pt"
    expected = blt.fit_jacobian_lens(on_the_cpu, "facts", whole, prompts=2, **settings)
    blt.fit_jacobian_lens(on_the_cpu, "facts", continued, prompts=1, **settings)
    found = blt.fit_jacobian_lens(on_the_device, "facts", continued, prompts=2, **settings)
    assert found.metadata == expected.metadata
    for layer, matrix in expected.jacobians.items():
        assert relative_error(found.jacobians[layer], matrix) < FLOAT32
    alone = blt.fit_jacobian_lens(
        on_the_device, "facts", tmp_path / "device.pt", prompts=1, **settings
    )
    assert alone.metadata["dim_batch"] == (16 if device == "cpu" else 128)


def test_factors_kept_on_the_cpu(pair: tuple[Case, nn.Module], device: str) -> None:
    case, model = pair
    plain, found = (
        blt.backward_lens(model, PROMPTS, 5, k=3, memory=memory, **ALL)
        for memory in (None, Memory(factor_device="cpu"))
    )
    close = {"rtol": 1e-4, "atol": 1e-5} if case.logits_in_float32 else CLOSE
    kept, whole = factors(found.capture), factors(plain.capture)
    assert {tensor.device.type for tensor in kept.values()} == {"cpu"}
    assert_equal(kept, on_cpu(whole, device), close)
    here, there = (
        {name: tensor.cpu() for name, tensor in read_values(result).items()}
        for result in (found, plain)
    )
    assert_equal(here, there, close)
    # Results are computed on the factors' device.
    assert found.capture["W_out", 2].dense(0).device.type == "cpu"
    assert found.to_df().shape == plain.to_df().shape


class Counting:
    """The unembedding of a model, which records the number of vectors per call."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.asked: list[int] = []

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        assert vectors.device == self._weight.device
        self.asked.append(len(vectors))
        return vectors @ self._weight


@hooked_only
def test_scores_are_computed_in_chunks_under_a_budget(device: str) -> None:
    d_vocab, budget = 4000, 2**23
    case = build("hooked-gpt2", d_vocab=d_vocab)
    model = case.model.to(device)
    found = {}
    for memory in (None, Memory(budget=budget)):
        projection = Counting(model.W_U.detach())
        tokens = case.tokens(60)
        found[memory] = blt.backward_lens(
            model, tokens, 5, k=3, projection=projection, memory=memory
        )
        assert sum(projection.asked) == 2 * 60 * case.n_layers
    assert max(projection.asked) * d_vocab * 8 <= budget // 8
    plain, limited = (on_cpu(read_values(result), device) for result in found.values())
    assert_equal(limited, plain, CLOSE)


def test_passes_under_a_budget(
    pair: tuple[Case, nn.Module], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = pair
    shapes: list[tuple[int, ...]] = []
    record_forward(monkeypatch, lambda tokens: shapes.append(tuple(tokens.shape)))
    options: Any = {"matrices": ("W_in", "W_out"), "k": 3}
    plain = blt.backward_lens(model, PROMPTS, 5, **options)
    without = len(shapes)
    # Just enough for one layer of the longest prompt, in addition to all factors.
    found = blt.backward_lens(model, PROMPTS, 5, memory=Memory(budget=850_000), **options)
    assert len(shapes) > without + 1
    close = {"rtol": 1e-4, "atol": 1e-5} if case.logits_in_float32 else CLOSE
    assert_equal(on_cpu(read_values(found), device), on_cpu(read_values(plain), device), close)


@on_a_gpu
@pytest.mark.parametrize(
    ("budget", "factor_device"), [(2**30, None), (2**28, "cpu")], ids=["1 GiB", "256 MiB"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_stays_under_the_budget(kind: str, budget: int, factor_device: str | None) -> None:
    """1600 tokens through GPT-2 small, whose factors alone take 0.6 GB."""
    require_kind(kind)
    model = {"hooked": hooked, "bridge": bridge}[kind](SMALL, "cuda")
    ids = question(SMALL, 32, 50, "cuda").ids

    def run(memory: Memory) -> BackwardLensResult:
        return blt.backward_lens(model, ids, 5, memory=memory)

    memory = Memory(budget=budget, factor_device=factor_device)
    run(memory)  # CUDA's libraries have allocated their workspaces afterwards
    # HookedTransformer copies its unembedding in every forward pass, even in a plain one.
    copied = model.W_U.nbytes if kind == "hooked" else 0
    assert peaks.extra_peak(lambda: run(memory), "cuda") <= budget + copied
    assert peaks.extra_peak(lambda: run(Memory(budget=2**40)), "cuda") > 2**30


# ------------------------------------------------------------------------------------ sweeps, edits


def test_rows_of_a_sweep_match_the_cpus(device: str, tmp_path: Path) -> None:
    config = blt.SweepConfig(projection=("logit_lens", "normalized"), shard_size=3)
    expected, found = (
        blt.sweep(
            build(f"{KIND}-gpt2").model.to(where), ROWS, tmp_path / name, config, progress=False
        )
        for name, where in (("cpu", "cpu"), ("device", device))
    )
    assert found.is_complete
    assert found.rejects().empty
    for table in ("prompts", "positions", "gradients"):
        assert_close(getattr(found, table)(), getattr(expected, table)())


def test_an_edit_is_reverted_bit_by_bit(pair: tuple[Case, nn.Module], device: str) -> None:
    case, model = pair
    delta, tokens = everything(case.model), case.tokens(6)
    with torch.no_grad():
        before = model(tokens.to(device))
        with unchanged(model):
            with delta.applied(model):
                inside = model(tokens.to(device))
            delta.apply_(model)
            assert torch.equal(model(tokens.to(device)), inside)
            delta.revert_(model)
        assert torch.equal(model(tokens.to(device)), before)
        with delta.applied(case.model):
            wanted = case.model(tokens)
    close = {"rtol": 1e-4, "atol": 1e-5} if case.logits_in_float32 else {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(inside.cpu(), wanted, **close)


def test_a_fact_is_written(facts_pair: tuple[nn.Module, nn.Module]) -> None:
    request = EditRequest(PROMPT, TARGET, subject="Lionel Messi")
    shift = ForwardPassShift(layer=5, size=4.0, key="plain", iterations=15)
    expected, found = (shift(model, request) for model in facts_pair)
    for here, there in zip(found, expected, strict=True):
        assert relative_error(here.dense().cpu(), there.dense().cpu()) < 10 * FLOAT32
    with unchanged(facts_pair[1]), found.applied(facts_pair[1]):
        assert blt.backward_lens(facts_pair[1], PROMPT).target() == TARGET


# ----------------------------------------------------------------------------------- training loops


def watched_rows(where: str, folder: Path) -> pd.DataFrame:
    """What a record keeps of two steps of plain SGD on two microbatches."""
    model = blt.load_facts_model(KIND, where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = blt.training.TrainingRecord(folder, k=2)
    reference = (PROMPT, TARGET)
    options: dict[str, Any] = {"every": 1, "changes": True, "reference": reference}
    with blt.training.watch(model, "all", layers=[0, 6], **options) as watched:
        for _ in range(2):
            for fact in FACTS[1:]:
                model(model.to_tokens(fact), return_type="loss").backward()
            optimizer.step()
            optimizer.zero_grad()
            step = watched.step()
            assert step is not None
            assert {gradient.vjps.device.type for gradient in step} == {where}
            record.add(step)
    return blt.training.TrainingRecord.load(folder).to_dataframe()


def test_a_watched_training_matches_the_cpus(device: str, tmp_path: Path) -> None:
    expected, found = (
        watched_rows(where, tmp_path / name) for name, where in (("cpu", "cpu"), ("device", device))
    )
    numbers = expected.select_dtypes("number").columns
    pd.testing.assert_frame_equal(found[numbers], expected[numbers], rtol=1e-3, atol=1e-3)
    first = [[each[0][0] for each in table["top_tokens"]] for table in (found, expected)]
    assert first[0] == first[1]
