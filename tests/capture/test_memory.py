"""Memory limits change how much is done at a time and what is kept, but no result."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import NotAvailable, build_model
from hypothesis import given
from hypothesis import strategies as st
from model_state import assert_same, snapshot
from models import HAS_BRIDGE, Case, build, hooked_only, nll, relative_error
from recorded_passes import (
    ALIKE,
    CLOSE,
    CLOSE_IN_FLOAT32,
    PROMPTS,
    TARGETS,
    assert_equal,
    has_much_padding,
    in_one_pass,
    read_values,
    record_forward,
    values,
)
from sampling import examples
from torch import Tensor

from backward_lens_tl.capture.batching import (
    MicrobatchSize,
    length_buckets,
    microbatch_size,
    plan_microbatches,
)
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.objectives import next_token_loss, sequence_nll, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import InputError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models import host_of
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.table import render_page

pytestmark = pytest.mark.usefixtures("as_for_a_user", "not_probed")

EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}
BF16 = Memory(factor_dtype=torch.bfloat16)
ALL_MATRICES: dict[str, Any] = {"matrices": "all"}
ALL: dict[str, Any] = {"matrices": "all", "prepend_bos": True}


@pytest.fixture(scope="module", params=("bridge-gemma2", "hooked-gpt2"))
def limited(request: pytest.FixtureRequest) -> Case:
    """Models that only this file uses, with and without norms after their blocks."""
    return build(request.param)


@pytest.fixture(scope="module", params=("bridge", "hooked"))
def mixture(request: pytest.FixtureRequest) -> Any:
    """A mixture of experts of both classes, in float32."""
    try:
        return build_model("mixtral", request.param)
    except NotAvailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def facts_result(facts_model: Any) -> tuple[BackwardLensResult, BackwardLensResult]:
    """The trained model's tokens without limits, and with factors in bfloat16."""
    prompts = ["Lionel Messi plays for", "Paris is the capital of the country of France and"]
    plain, small = (
        backward_lens(facts_model, prompts, " Paris", matrices="all", k=5, memory=memory)
        for memory in (None, BF16)
    )
    return plain, small


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Number of prompts and length of every forward pass."""
    seen: list[tuple[int, ...]] = []
    record_forward(monkeypatch, lambda tokens: seen.append(tuple(tokens.shape)))
    return seen


def close_for(case: Case) -> dict[str, Any]:
    return CLOSE_IN_FLOAT32 if case.logits_in_float32 else CLOSE


def factors_of(capture: GradientCapture) -> list[Tensor]:
    """Tensors in which a capture keeps its factors, each once."""
    kept = [t for g in capture for t in (g.inputs, g.vjps, g.joined_vjps) if t is not None]
    return list({id(tensor): tensor for tensor in kept}.values())


def size_in_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------------------------ the arguments


WRONG: list[tuple[str, Any, str]] = [
    ("budget", 0, "is 0; .*bytes"),
    ("budget", -1, "is -1; .*bytes"),
    ("budget", True, "is True; .*bytes"),
    ("budget", 1.5, r"is 1\.5; .*bytes"),
    ("budget", "1GB", "is '1GB'; .*bytes"),
    ("budget", nan, "is nan; .*bytes"),
    ("budget", inf, "is inf; .*bytes"),
    ("budget", torch.tensor(2**30), "is tensor.*bytes"),
    ("factor_dtype", torch.float16, r"is torch\.float16; allowed: None, torch\.bfloat16"),
    ("factor_dtype", "float32", r"is 'float32'; allowed: None, torch\.bfloat16"),
    ("factor_dtype", torch.int8, r"is torch\.int8; allowed: None, torch\.bfloat16"),
    ("factor_dtype", [], r"is \[\]; allowed: None, torch\.bfloat16"),
    ("factor_device", "nowhere", "is 'nowhere', .*pass for example 'cpu'"),
    ("factor_device", "meta", "is 'meta', .*pass 'cpu'"),
    ("factor_device", torch.device("meta"), ".*meta.*pass 'cpu'"),
    ("factor_device", 1.5, r"is 1\.5, .*pass for example 'cpu'"),
    ("factor_device", "privateuseone", "is 'privateuseone', .*pass for example 'cpu'"),
    ("factor_device", "hpu", "is 'hpu', .*pass for example 'cpu'"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=lambda part: str(part)[:20])
def test_a_wrong_value_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{field} {message}"):
        Memory(**{field: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 3)], ids=str)
def test_a_missing_gpu_is_refused(device: Any) -> None:
    with pytest.raises(InputError, match=r"factor_device is .*cuda.*not a device of this machine"):
        Memory(factor_device=device)


def test_valid_values_are_accepted() -> None:
    assert Memory() == Memory(None, None, None)
    number: Any = np.int64(2**30)
    assert Memory(budget=number).budget == 2**30
    for dtype in (None, torch.bfloat16, torch.float32, torch.float64):
        assert Memory(factor_dtype=dtype).factor_dtype == dtype
    for device in (None, "cpu", torch.device("cpu")):
        assert Memory(factor_device=device).factor_device == device


NO_MEMORY = [5, "1GB", Memory, 2.0, {"budget": 2**30}, torch.bfloat16, 0, False]


@pytest.mark.parametrize("memory", NO_MEMORY, ids=str)
def test_invalid_memory_is_refused_and_changes_nothing(gpt2: Case, memory: Any) -> None:
    before = snapshot(gpt2.model)
    for call in (
        lambda: backward_lens(gpt2.model, "Rome", 5, memory=memory),
        lambda: capture_gradients(gpt2.model, "Rome", target_nll(5), memory=memory),
    ):
        with pytest.raises(InputError, match=r"memory is .*pass a Memory\(") as error:
            call()
        assert repr(memory) in str(error.value)
    assert_same(before, snapshot(gpt2.model))


# --------------------------------------------------------------------------- how factors are kept


def assert_rounded(found: GradientCapture, plain: GradientCapture, dtype: torch.dtype) -> None:
    """Only factors are rounded; results computed from them are at least float32."""
    assert found.gradients.keys() == plain.gradients.keys()
    for key, gradient in plain.gradients.items():
        here = found[key]
        for name in ("inputs", "vjps", "joined_vjps"):
            whole, rounded = getattr(gradient, name), getattr(here, name)
            assert (whole is None) == (rounded is None), name
            if whole is not None:
                assert rounded.dtype == dtype
                assert torch.equal(rounded, whole.to(dtype)), (key, name)
        for name in ("mask", "is_zero", "experts"):
            whole, same = getattr(gradient, name), getattr(here, name)
            assert whole is same is None or torch.equal(same, whole), (key, name)
        assert here.n_experts == gradient.n_experts
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert here.norms.dtype == wide
        # Rounding to nearest changes every number, and so every norm, by at most half an eps.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(here.norms, gradient.norms.to(wide), rtol=max(eps, 1e-6), atol=0)
    names = [name for name in values(plain) if name.split()[0] in ("query", "loss", "targets")]
    assert "loss" in names
    for name in (*names, "pos tokens", "pos mask"):
        assert torch.equal(values(found)[name], values(plain)[name]), name


def assert_same_tokens(found: BackwardLensResult, plain: BackwardLensResult) -> None:
    """Everything except the norms."""
    here, there = read_values(found), read_values(plain)
    for name in [name for name in there if name.endswith(" norms")]:
        here.pop(name), there.pop(name)
    assert_equal(here, there, EXACT)
    assert found.token_texts == plain.token_texts


@pytest.mark.parametrize(
    ("prompts", "dtype"),
    [(PROMPTS, torch.bfloat16), (ALIKE, torch.float32)],
    ids=["several microbatches", "one microbatch"],
)
def test_tokens_are_computed_before_rounding(
    limited: Case, dtype: torch.dtype, prompts: Any
) -> None:
    plain, found = (
        backward_lens(limited.model, prompts, 5, k=4, memory=memory, **ALL_MATRICES)
        for memory in (None, Memory(factor_dtype=dtype))
    )
    assert plain.capture["W_in", 0].inputs.dtype == torch.float64
    assert_rounded(found.capture, plain.capture, dtype)
    assert_same_tokens(found, plain)
    full, half = (size_in_bytes(factors_of(result.capture)) for result in (plain, found))
    assert half * 8 == full * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_experts_are_rounded_like_other_matrices(mixture: Any, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"matrices": "all", "k": 4, "vjps_at": "residual"}
    plain, found = (
        backward_lens(mixture, PROMPTS, 5, memory=memory, **options)
        for memory in (None, Memory(factor_dtype=dtype))
    )
    assert plain.capture["W_in", 0].experts is not None
    assert_rounded(found.capture, plain.capture, dtype)
    assert_same_tokens(found, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"target": None},
        {"objective": next_token_loss(), "target": 5, "positions": [-1, 0]},
        {"objective": sequence_nll(" river runs"), "vjps_at": "residual", "layers": [0, 2]},
        {"target": 5, "projection": "normalized", "direction": "gradient", "matrices": "W_out"},
    ],
    ids=["own answer", "positions", "residual", "normalized"],
)
@pytest.mark.parametrize(
    "limited", [f"{'bridge' if HAS_BRIDGE else 'hooked'}-gemma2"], indirect=True
)
def test_tokens_are_computed_before_rounding_for_every_request(
    limited: Case, options: dict[str, Any]
) -> None:
    plain, found = (
        backward_lens(limited.model, PROMPTS, memory=memory, **ALL | options)
        for memory in (None, BF16)
    )
    assert_rounded(found.capture, plain.capture, torch.bfloat16)
    assert_same_tokens(found, plain)


def dense_in_float64(gradient: MatrixGradient, batch: int) -> Tensor:
    """Dense gradient from the stored factors, heads concatenated."""
    real = gradient.mask[batch]
    inputs, vjps = (
        factor[batch, real].double().flatten(1) for factor in (gradient.inputs, gradient.vjps)
    )
    return inputs.T @ vjps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_from_rounded_factors_are_computed_in_float32(
    limited: Case, dtype: torch.dtype
) -> None:
    memory = Memory(factor_dtype=dtype)
    capture = capture_gradients(limited.model, PROMPTS, next_token_loss(), memory=memory, **ALL)
    exact = capture_gradients(limited.model, PROMPTS, next_token_loss(), **ALL)
    # Sums of up to 17 products in float32. In bfloat16 the error would be 1e-3.
    close = 1e-6
    for key, gradient in capture.gradients.items():
        for prompt in (0, 1):
            expected = dense_in_float64(gradient, prompt)
            dense, factored = gradient.dense(prompt), gradient.factored(prompt)
            assert {dense.dtype, factored.A.dtype, factored.B.dtype} == {torch.float32}
            assert relative_error(factored.A.double() @ factored.B.double(), expected) < 1e-12
            if dense.ndim == 2:
                assert relative_error(dense, expected) < close
            column = gradient.neuron(3, prompt)
            assert column.dtype == torch.float32
            wanted = expected[:, 3] if gradient.reads_residual else expected[3]
            assert relative_error(column, wanted) < close
            bias = gradient.bias(prompt)
            assert bias.dtype == torch.float32
            wanted = gradient.vjps[prompt][gradient.mask[prompt]].double().sum(0)
            assert (
                float((bias - wanted).abs().max()) <= 1e-6 * float(gradient.vjps.abs().max()) * 17
            )
            singular = gradient.singular_values(prompt)
            assert singular.dtype == torch.float64
            reference = torch.linalg.svdvals(expected)[: len(singular)]
            torch.testing.assert_close(singular, reference, rtol=1e-9, atol=1e-12)
            assert gradient.rank(prompt, rtol=1e-9) == int((reference > 1e-9 * reference[0]).sum())
            assert gradient.rank(prompt) <= exact[key].rank(prompt)
            # The rounding is visible, so the test is sensitive.
            error = relative_error(expected, dense_in_float64(exact[key], prompt))
            assert torch.finfo(dtype).eps / 100 < error < torch.finfo(dtype).eps


def test_slices_of_rounded_factors(limited: Case, mixture: Any) -> None:
    capture = capture_gradients(limited.model, PROMPTS, next_token_loss(), memory=BF16, **ALL)
    gradient = capture["W_Q", 1]
    assert gradient.n_heads is not None
    heads = torch.stack([gradient.head(head).dense(1) for head in range(gradient.n_heads)])
    torch.testing.assert_close(heads, gradient.dense(1))
    moe = capture_gradients(mixture, PROMPTS, next_token_loss(), memory=BF16, **ALL)["W_out", 1]
    assert moe.n_experts is not None
    assert moe.dense(1).dtype == torch.float32
    expert = moe.expert(2)
    assert expert.mask.any()
    prompt = int(expert.mask.any(1).nonzero()[0])
    assert relative_error(expert.dense(prompt), dense_in_float64(expert, prompt)) < 1e-6


def test_a_wider_dtype_than_the_models_own(mixture: Any) -> None:
    plain = capture_gradients(mixture, ALIKE, nll(5))
    wide = capture_gradients(mixture, ALIKE, nll(5), memory=Memory(factor_dtype=torch.float64))
    assert plain["W_in", 0].inputs.dtype == torch.float32
    assert_rounded(wide, plain, torch.float64)


@pytest.mark.parametrize(
    "prompts", [PROMPTS, ALIKE], ids=["several microbatches", "one microbatch"]
)
def test_naming_the_models_own_device_changes_nothing(limited: Case, prompts: Any) -> None:
    plain, found = (
        backward_lens(limited.model, prompts, 5, k=3, memory=memory, **ALL_MATRICES)
        for memory in (None, Memory(factor_device=torch.device("cpu")))
    )
    # Norms are summed in memory order.
    assert_equal(values(found.capture), values(plain.capture), CLOSE)
    assert_equal(read_values(found), read_values(plain), CLOSE)
    for gradient in plain.capture:
        here = found.capture[gradient.matrix, gradient.layer]
        for name in ("inputs", "vjps", "joined_vjps"):
            factor = getattr(gradient, name)
            assert factor is None or torch.equal(getattr(here, name), factor), name
    assert found.token_texts == plain.token_texts


def test_hook_points_together_with_rounded_factors(gpt2: Case) -> None:
    point = "blocks.1.hook_resid_pre"
    plain, found = (
        capture_gradients(gpt2.model, PROMPTS, nll(5), hook_points=point, memory=memory)
        for memory in (None, BF16)
    )
    assert_rounded(found, plain, torch.bfloat16)
    for name in ("value", "vjp"):
        here, there = (getattr(c.hook_gradients[point], name) for c in (found, plain))
        torch.testing.assert_close(here, there, **EXACT)


# --------------------------------------------------------------------------------- files and views


def test_a_result_in_bfloat16_is_saved_and_loaded(facts_result: Any, tmp_path: Path) -> None:
    plain, small = facts_result
    sizes = []
    for result in (plain, small):
        path = tmp_path / "result.safetensors"
        result.save(path)
        sizes.append(path.stat().st_size)
        loaded = BackwardLensResult.load(path)
        assert_equal(values(loaded.capture), values(result.capture), EXACT)
        assert_equal(read_values(loaded), read_values(result), EXACT)
        assert render_page(loaded, 1) == render_page(result, 1)
        kept = loaded.capture
        assert kept["W_K", 0].inputs is kept["W_Q", 0].inputs
        assert len(factors_of(kept)) == len(factors_of(result.capture))
    assert small.capture["W_in", 3].inputs.dtype == torch.bfloat16
    assert sizes[1] < 0.7 * sizes[0]


def visible(page: str) -> list[str]:
    """Text of a page, without markup and numbers."""
    text = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    return [word for word in text.split() if not re.fullmatch(r"[-+(]?[\d.,e+%−-]+[);,]?", word)]


def test_views_show_a_result_in_bfloat16(facts_result: Any) -> None:
    plain, small = facts_result
    assert_same_tokens(small, plain)
    assert repr(small) == repr(plain)
    assert repr(small.capture) == repr(plain.capture)
    assert [repr(g) for g in small.capture] == [repr(g) for g in plain.capture]
    assert "Paris" in visible(small._repr_html_())
    assert visible(small._repr_html_()) == visible(plain._repr_html_())
    assert visible(render_page(small, 1)) == visible(render_page(plain, 1))
    found, expected = small.to_df(), plain.to_df()
    rounded = ("norm", "input_norm", "write_norm", "top_vjp_cosine", "is_faint")
    exact = [column for column in expected if column not in rounded]
    pd.testing.assert_frame_equal(found[exact], expected[exact])
    cosines = expected["top_vjp_cosine"].tolist()
    assert found["top_vjp_cosine"].tolist() == pytest.approx(cosines, abs=2**-7, nan_ok=True)
    for norm in ("norm", "input_norm", "write_norm"):
        assert found[norm].tolist() == pytest.approx(expected[norm].tolist(), rel=2**-8)
    assert (found["is_faint"] != expected["is_faint"]).mean() < 0.01
    for layer in (0, -1):
        assert small.top_tokens("W_out", layer, -1) == plain.top_tokens("W_out", layer, -1)
        maps = (each.capture.reversed_attention(layer) for each in (small, plain))
        assert torch.equal(*maps)
    cache, wanted = small.capture.to_cache(), plain.capture.to_cache()
    assert set(cache.keys()) == set(wanted.keys())


# ------------------------------------------------------------------------------------- the estimate


Plan = tuple[list[int], tuple[int, ...], MicrobatchSize, Memory]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Prompts, layers of different sizes, and a budget from too small to plenty."""
    some_lengths = draw(
        st.sampled_from([st.integers(3, 6), st.integers(1, 12), st.integers(1, 200)])
    )
    lengths = draw(st.lists(some_lengths, min_size=1, max_size=12))
    layers = tuple(sorted(draw(st.sets(st.integers(0, 11), min_size=1, max_size=8))))
    widths = st.integers(1, 400)
    width = draw(st.one_of(st.none(), widths))
    size = MicrobatchSize(
        per_token=draw(st.one_of(st.integers(1, 20), st.integers(1, 2000))),
        per_pair=draw(st.integers(0, 20)),
        per_prompt=draw(st.integers(0, 5000)),
        factors={layer: width or draw(widths) for layer in layers},
        n_blocks=12 - layers[0],
        device=torch.device("cpu"),
    )
    form = draw(st.sampled_from([Memory(), BF16, Memory(factor_device="cpu")]))
    # Enough for all at once, or for one prompt and some of its layers.
    count = draw(st.sampled_from([1, len(lengths)]))
    pass_bytes = size.of(count, max(lengths), layers)
    budget = draw(st.floats(0.2, 1.2)) * pass_bytes + size.kept(len(lengths), max(lengths), form)
    return lengths, layers, size, Memory(max(1, int(budget)), form.factor_dtype, form.factor_device)


def divided(plan: Plan, *, in_one: bool = False) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompts and layers of each pass, for an objective that takes prompts one by one."""
    lengths, layers, size, memory = plan
    planned = plan_microbatches(lengths, layers, size, memory, in_one=in_one, by_prompt=True)
    return [(run.prompts, run.layers) for run in planned]


def too_large(plan: Plan) -> list[tuple[int, int]]:
    """Prompts and layers that do not fit next to the stored tensors."""
    lengths, layers, size, memory = plan
    assert memory.budget is not None
    room = memory.budget - size.kept(len(lengths), max(lengths), memory)
    return [
        (prompt, layer)
        for prompt, length in enumerate(lengths)
        for layer in layers
        if size.of(1, length, [layer]) > room
    ]


@given(plans())
@examples(250)
def test_passes_cover_everything_once_within_the_budget(plan: Plan) -> None:
    lengths, layers, size, memory = plan
    kept = size.kept(len(lengths), max(lengths), memory)
    whole = size.of(len(lengths), max(lengths), layers)
    assert memory.budget is not None
    try:
        microbatches = divided(plan)
    except InputError:
        assert too_large(plan)
        return
    pairs = [
        (prompt, layer) for prompts, own in microbatches for prompt in prompts for layer in own
    ]
    assert sorted(pairs) == [(prompt, at) for prompt in range(len(lengths)) for at in layers]
    for prompts, own in microbatches:
        # A single pass keeps what it computes; its estimate already includes that.
        others = 0 if len(microbatches) == 1 and memory.keeps_as_computed else kept
        within = [lengths[prompt] for prompt in prompts]
        assert size.of(len(prompts), max(within), own) + others <= memory.budget
        assert not has_much_padding(within)
    if whole + kept <= memory.budget:
        assert [prompts for prompts, _ in microbatches] == length_buckets(lengths)


@given(plans(), st.booleans())
@examples(60)
def test_without_a_budget_every_bucket_is_a_pass(plan: Plan, in_one: bool) -> None:
    lengths, layers, size, memory = plan
    free = Memory(None, memory.factor_dtype, memory.factor_device)
    microbatches = divided((lengths, layers, size, free), in_one=in_one)
    everything = [tuple(range(len(lengths)))]
    assert [prompts for prompts, _ in microbatches] == (
        everything if in_one else length_buckets(lengths)
    )
    assert {own for _, own in microbatches} == {layers}


USUAL = 256 * 2**20


@given(plans(), st.integers(1, 2000))
@examples(100)
def test_default_passes_stay_within_the_default_limit(plan: Plan, scale: int) -> None:
    """Or have one prompt. A plain callable still gets all prompts of one length."""
    lengths, layers, small, memory = plan
    size = MicrobatchSize(
        small.per_token * scale,
        small.per_pair * scale,
        small.per_prompt * scale,
        small.factors,
        small.n_blocks,
        small.device,
    )
    free = Memory(None, memory.factor_dtype, memory.factor_device)
    microbatches = divided((lengths, layers, size, free))
    assert sorted(p for prompts, _ in microbatches for p in prompts) == list(range(len(lengths)))
    for prompts, own in microbatches:
        assert own == layers
        longest = max(lengths[prompt] for prompt in prompts)
        assert len(prompts) == 1 or size.of(len(prompts), longest, own) <= USUAL
    for bucket in length_buckets(lengths):
        longest = max(lengths[prompt] for prompt in bucket)
        if size.of(len(bucket), longest, layers) <= USUAL:
            assert (bucket, layers) in microbatches
    together = plan_microbatches(lengths, layers, size, free, in_one=False, by_prompt=False)
    assert [run.prompts for run in together] == length_buckets(lengths)


@given(plans())
@examples(100)
def test_under_a_hook_there_is_one_pass_or_an_error_with_the_reason(plan: Plan) -> None:
    lengths, layers, size, memory = plan
    whole = size.of(len(lengths), max(lengths), layers)
    kept = size.kept(len(lengths), max(lengths), memory)
    everything = [(tuple(range(len(lengths))), layers)]
    assert memory.budget is not None
    if memory.budget >= whole + kept:
        assert divided(plan, in_one=True) == everything
    elif memory.budget >= whole and memory.keeps_as_computed:
        # Everything computed is kept.
        assert divided(plan, in_one=True) == everything
    else:
        with pytest.raises(InputError, match=r"budget.*hooks.*one microbatch"):
            divided(plan, in_one=True)


def test_factors_on_another_device_take_no_memory_here() -> None:
    size = MicrobatchSize(1, 0, 0, {0: 10, 1: 20}, 2, torch.device("cuda", 0))
    assert size.kept(3, 7, Memory()) == 3 * 7 * 30 * 4
    assert size.kept(3, 7, BF16) == 3 * 7 * 30 * 2
    assert size.kept(3, 7, Memory(factor_device="cpu")) == 0


KEPT = {
    "plain": ("hooked-gpt2", torch.float32, "mlp"),
    "VJPs after a norm": ("bridge-gemma2", torch.float32, "W_out"),
    "attention patterns": ("hooked-gpt2", torch.float32, "attn"),
    "float64": ("bridge-gpt2", torch.float64, "mlp"),
    "all": ("bridge-llama", torch.float32, "all"),
}


@pytest.mark.parametrize("what", KEPT)
def test_kept_memory_is_not_underestimated(what: str) -> None:
    """Compare with the tensors of a capture."""
    name, dtype, matrices = KEPT[what]
    model = build(name, dtype).model
    host = host_of(model)
    for length in (5, 60):
        tokens = torch.randint(3, 97, (2, length))
        capture = capture_gradients(model, tokens, nll(5), matrices=matrices)
        sites = [site for layer in capture.layers for site in host.sites(layer, capture.matrices)]
        size = microbatch_size(host, sites, 1, length)
        patterns = [attention.scores_vjp for attention in capture.attention.values()]
        actual = size_in_bytes([*factors_of(capture), *patterns])
        assert actual <= size.kept(2, length, Memory()) <= 4 * actual


@pytest.mark.parametrize(("matrices", "n_layers"), [(("W_Q", "W_O"), 2), (("W_in",), 0)])
def test_one_pattern_is_kept_per_head_of_a_layer_with_attention(
    matrices: tuple[str, ...], n_layers: int
) -> None:
    host = host_of(build("hooked-gpt2", torch.float64).model)
    sites = [site for layer in (0, 2) for site in host.sites(layer, matrices)]
    assert microbatch_size(host, sites, 1, 5).patterns == n_layers * 3 * 8  # heads, bytes


def test_no_more_memory_is_held_than_the_factors_need(mixture: Any) -> None:
    """A view would keep its whole base tensor alive."""
    for matrix in ("W_Q", "W_in", "W_gate", "W_out"):
        kept = factors_of(capture_gradients(mixture, ALIKE, nll(5), matrices=matrix))
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        assert sum(held.values()) == size_in_bytes(kept), matrix


# --------------------------------------------------------------------------------------- the budget


class Stop(Exception):
    """Raised where a run would begin, once the budget allows it."""


def smallest_budget(run: Callable[[Memory], object], form: Memory | None = None) -> int:
    """The smallest accepted budget, to one percent, found without a run."""
    form = form or Memory()

    def stop(tokens: Tensor) -> None:
        raise Stop

    low, high = 1, 2**30
    with pytest.MonkeyPatch.context() as patched:
        record_forward(patched, stop)
        while high > 1.01 * low:
            middle = int((low * high) ** 0.5) if high > 4 * low else (low + high) // 2
            try:
                run(Memory(middle, form.factor_dtype, form.factor_device))
            except InputError:
                low = middle
            except Stop:
                high = middle
    return high


@pytest.mark.parametrize("factor_dtype", [None, torch.bfloat16], ids=str)
def test_a_budget_changes_the_number_of_passes_and_nothing_else(
    limited: Case, shapes: list[tuple[int, ...]], factor_dtype: torch.dtype | None
) -> None:
    prompts = [*PROMPTS, "Rome is", "A dog"]

    def run(memory: Memory) -> BackwardLensResult:
        return backward_lens(limited.model, prompts, 5, k=3, memory=memory, **ALL)

    smallest = smallest_budget(run, Memory(factor_dtype=factor_dtype))
    plain = run(Memory(factor_dtype=factor_dtype))
    without = list(shapes)
    counts = []
    close = close_for(limited)
    # Where sums round differently, the last bit in bfloat16 may differ.
    close_factors = close if factor_dtype is None else close | {"rtol": 2**-7, "atol": 1e-6}
    for budget in (smallest, 2 * smallest, 2**40):
        shapes.clear()
        found = run(Memory(budget=budget, factor_dtype=factor_dtype))
        counts.append(len(shapes))
        if budget == smallest:
            assert shapes.count((1, 17)) > 1, "the layers of the longest prompt are divided"
        assert_equal(values(found.capture), values(plain.capture), close_factors)
        assert list(found.capture.gradients) == list(plain.capture.gradients)
        here, there = read_values(found), read_values(plain)
        for name in [name for name in there if name.endswith(" norms")]:
            torch.testing.assert_close(here.pop(name), there.pop(name), **close_factors)
        assert_equal(here, there, close)
        assert found.token_texts == plain.token_texts
    assert shapes == without
    assert counts[0] > counts[1] >= counts[2]


@pytest.mark.versions
def test_experts_under_a_budget(mixture: Any, shapes: list[tuple[int, ...]]) -> None:
    def run(memory: Memory | None) -> BackwardLensResult:
        return backward_lens(mixture, PROMPTS, 5, memory=memory, **ALL)

    smallest = smallest_budget(run)
    plain = run(None)
    shapes.clear()
    found = run(Memory(budget=smallest))
    assert shapes.count((1, 17)) > 1
    assert list(found.capture.gradients) == list(plain.capture.gradients)
    # In float32; sums over different numbers of masked positions.
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}
    assert_equal(values(found.capture), values(plain.capture), close)


def test_prompts_of_equal_length_are_separated_under_a_budget(
    limited: Case, shapes: list[tuple[int, ...]]
) -> None:
    """A callable then sees some of them at a time, never padding."""
    seen: list[tuple[int, ...]] = []

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        seen.append(tuple(tokens.shape))
        return nll(5)(logits, tokens)

    def run(memory: Memory | None) -> GradientCapture:
        return capture_gradients(limited.model, ALIKE, loss, matrices="all", memory=memory)

    smallest = smallest_budget(run)
    plain = run(None)
    assert seen == shapes == [(3, 10)]
    seen.clear()
    found = run(Memory(budget=smallest))
    assert set(seen) == {(1, 10)}
    assert_equal(values(found), values(plain), close_for(limited))


class Counting:
    """A projection onto a made-up vocabulary that records the number of vectors per call."""

    def __init__(self, d_model: int, d_vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weight = torch.randn(d_model, d_vocab, generator=generator, dtype=torch.float64)
        self.asked: list[int] = []

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        self.asked.append(len(vectors))
        return vectors @ self._weight


@hooked_only
def test_scores_are_computed_in_smaller_chunks_under_a_budget(
    shapes: list[tuple[int, ...]],
) -> None:
    """A pass of 60 tokens fits, and the scores of its 240 vectors do not fit next to it."""
    d_vocab = 4000
    case = build("hooked-gpt2", d_vocab=d_vocab)
    tokens = case.tokens(60)
    found = {}
    asked = {}
    budget = 2**23
    for memory in (None, Memory(budget=budget)):
        projection = Counting(case.d_model, d_vocab)
        found[memory] = backward_lens(
            case.model, tokens, 5, matrices="all", k=3, projection=projection, memory=memory
        )
        asked[memory] = projection.asked
    assert shapes == [(1, 60)] * 2
    most = {memory: max(sizes) for memory, sizes in asked.items()}
    assert most[None] * d_vocab * 8 < 2**27
    assert most[Memory(budget=budget)] * d_vocab * 8 <= budget
    assert most[Memory(budget=budget)] < most[None]
    assert sum(asked[None]) == sum(asked[Memory(budget=budget)])
    plain, limited = found.values()
    # BLAS sums in another order for other numbers of rows.
    assert_equal(read_values(limited), read_values(plain), CLOSE)


# -------------------------------------------------------------------------------- budgets too small


_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def amounts(message: str) -> list[float]:
    """Every amount of memory in a message, in bytes."""
    found = re.findall(r"([\d.,]+) (bytes|B|KiB|MiB|GiB)\b", message)
    return [float(number.replace(",", "")) * _UNITS[unit] for number, unit in found]


@pytest.mark.parametrize("call", ["capture", "lens"])
def test_too_small_a_budget_is_refused_with_the_estimate_and_the_remedy(
    limited: Case, call: str
) -> None:
    model = limited.model
    before = snapshot(model)
    run: Callable[[Memory], object] = {
        "capture": lambda memory: capture_gradients(model, PROMPTS, nll(5), memory=memory),
        "lens": lambda memory: backward_lens(model, PROMPTS, 5, memory=memory),
    }[call]
    with pytest.raises(InputError, match=r"budget") as error:
        run(Memory(budget=1000))
    assert_same(before, snapshot(model))
    message = str(error.value)
    for word in ("increase it", "fewer", "shorter", "factor_dtype", "factor_device"):
        assert word in message
    named = amounts(message)
    assert min(named) == pytest.approx(1000, rel=0.1), "the budget"
    assert max(named) > 2000, "the estimate"


@pytest.mark.parametrize("reason", ["a hook", "hook points"])
def test_a_budget_too_small_for_one_pass_under_a_hook(limited: Case, reason: str) -> None:
    model = limited.model
    options: dict[str, Any] = {}
    with ExitStack() as hooks:
        if reason == "a hook":
            hooks.enter_context(in_one_pass(model))
        else:
            options["hook_points"] = "blocks.1.hook_resid_pre"
        before = snapshot(model)
        with pytest.raises(InputError, match=r"hooks.*one microbatch") as error:
            capture_gradients(model, PROMPTS, nll(5), memory=Memory(budget=1000), **options)
        assert_same(before, snapshot(model))
    message = str(error.value)
    for word in ("budget", "fewer prompts", "layers"):
        assert word in message
    named = amounts(message)
    assert min(named) == pytest.approx(1000, rel=0.1), "the budget"
    assert max(named) > 2000, "the estimate"


def test_a_budget_large_enough_for_one_pass_under_a_hook(
    limited: Case, shapes: list[tuple[int, ...]]
) -> None:
    with in_one_pass(limited.model):
        plain = capture_gradients(limited.model, PROMPTS, target_nll(TARGETS), **ALL)
        shapes.clear()
        found = capture_gradients(
            limited.model, PROMPTS, target_nll(TARGETS), memory=Memory(budget=2**28), **ALL
        )
    assert shapes == [(4, 17)]
    assert_equal(values(found), values(plain), EXACT)


@given(plans())
@examples(100)
def test_the_estimate_in_a_refusal_is_sufficient(plan: Plan) -> None:
    """The number in the message, up to rounding, is sufficient."""
    lengths, layers, size, memory = plan
    # In megabytes, so that the message's rounding does not count.
    mega = 10**6
    scaled = MicrobatchSize(
        size.per_token * mega,
        size.per_pair * mega,
        size.per_prompt * mega,
        {layer: width * mega for layer, width in size.factors.items()},
        size.n_blocks,
        size.device,
    )
    form = memory.factor_dtype, memory.factor_device
    assert memory.budget is not None
    small = Memory(memory.budget * 100, *form)
    try:
        divided((lengths, layers, scaled, small))
    except InputError as error:
        enough = Memory(int(1.01 * max(amounts(str(error)))) + 2**20, *form)
        assert divided((lengths, layers, scaled, enough))


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.uint32, np.uint64])
def test_a_budget_of_any_integer_type_is_respected(gpt2: Case, kind: Any) -> None:
    """numpy's integers overflow or wrap around; Python's do not."""
    for budget in (100, 2**30):
        if budget > np.iinfo(kind).max:
            continue
        expected = budget == 2**30
        try:
            capture_gradients(gpt2.model, PROMPTS, nll(5), memory=Memory(budget=kind(budget)))
        except InputError:
            assert not expected
        else:
            assert expected
