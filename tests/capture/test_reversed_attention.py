"""Reversed Attention against autograd's gradient at the scores, and patches built from it.

`RA = A * (E - rowsum(A * E)) / sqrt(d_head)` with the pattern `A` and `E = delta_z V^T` (Katz and
Wolf, NAACL 2025): the gradient at the input of the softmax, divided by `sqrt(d_head)`. Here that
gradient comes from a tensor that a hook puts into the model's own graph, or from the input of
torch's softmax itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import NotAvailable, build_model, hf_model
from attention_cases import HEADS, PAIR_NAMES, shared_case
from models import Case, build, hooked_only, nll, relative_error, training_loss
from torch import Tensor, nn

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.objectives import next_token_loss, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.result import BackwardLensResult

pytestmark = pytest.mark.usefixtures("as_for_a_user")

# In float64 the error is 1e-15, but Hugging Face computes several norms,
# rotations and softmaxes in float32, for any dtype of the model.
TOLERANCE = 1e-6
EXACT = 1e-12  # in float64 throughout: 50 times the observed error
TARGET = 5
DELEGATING = ("gpt_neo", "gptj", "opt")
"""Families whose attention a TransformerBridge delegates to Hugging Face, pattern included."""

Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module", params=PAIR_NAMES)
def pair(request: pytest.FixtureRequest) -> Case:
    """Both model classes, with plain and with grouped-query attention, in float64."""
    return shared_case(request.param)


def tolerance_of(case: Case) -> float:
    return TOLERANCE if case.logits_in_float32 else EXACT


@functools.cache
def model_of(family: str, kind: str) -> Any:
    """A model of one of the many families; every test restores what it changes."""
    try:
        return build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))


def some_tokens(n: int = 7, n_prompts: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 97, (n_prompts, n), generator=generator)


def run(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))


def at_hook(
    model: Any, name: str, tokens: Tensor, loss: Loss | None = None, *, patches: Any = ()
) -> tuple[Tensor, Tensor]:
    """Value and gradient at a hook point, through a tensor that the hook puts into the graph.

    `patches` come first, so value and gradient are those of the patched activation.
    """
    seen: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        seen.append(value.clone())
        seen[-1].retain_grad()
        return seen[-1]

    with torch.enable_grad(), model.hooks(fwd_hooks=[*patches, (name, keep)]):
        (loss or nll(TARGET))(run(model, tokens), tokens).sum().backward(
            inputs=list(model.parameters())
        )
    model.zero_grad()
    (value,) = seen
    gradient = torch.zeros_like(value) if value.grad is None else value.grad
    return value.detach(), gradient


def scores_gradient(model: Any, layer: int, *args: Any, **kwargs: Any) -> Tensor:
    return at_hook(model, f"blocks.{layer}.attn.hook_attn_scores", *args, **kwargs)[1]


def reversed_attention(
    model: Any, tokens: Any, objective: Any = None, **options: Any
) -> GradientCapture:
    objective = target_nll(TARGET) if objective is None else objective
    return capture_gradients(model, tokens, objective, **({"matrices": "attn"} | options))


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Freeze all parameters."""
    roots = [model, *([model.original_model] if hasattr(model, "original_model") else [])]
    trained = [p for root in roots for p in root.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, or absolute where zero is expected."""
    assert found.shape == expected.shape
    distance = float((found.double() - expected.double()).norm())
    return distance / (float(expected.double().norm()) or 1.0)


# ----------------------------------------------------------------------- the gradient at the scores


@pytest.mark.versions
def test_it_is_autograds_gradient_at_the_scores(case: Case) -> None:
    """Every random model in float64; Gemma 2 has a softcap on its scores."""
    tokens = case.tokens(7, 7)
    capture = reversed_attention(case.model, tokens, next_token_loss())
    d_head = case.model.cfg.d_head
    for layer in range(case.n_layers):
        expected = scores_gradient(case.model, layer, tokens, training_loss) / math.sqrt(d_head)
        found = capture.reversed_attention(layer)
        assert found.shape == (2, case.model.cfg.n_heads, 7, 7)
        assert difference(found, expected) <= tolerance_of(case)
        scores_vjp = capture.attention[layer].scores_vjp
        assert difference(scores_vjp, expected * d_head**0.5) <= tolerance_of(case)
        assert found.abs().max() > 0


@pytest.mark.versions
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@pytest.mark.parametrize(
    "family",
    [
        "gemma2",  # softcap on the scores, its own scale, a sliding window
        "gpt_oss",  # attention sinks
        "bloom",  # ALiBi
        "falcon_alibi",  # ALiBi inside the scale
        "mistral",  # a sliding window
        "qwen3",  # norms on queries and keys
        "gpt_neox",
        *DELEGATING,  # of HookedTransformer; GPT-Neo does not scale its scores
    ],
)
def test_it_is_autograds_gradient_at_the_scores_of_many_families(family: str, kind: str) -> None:
    if kind == "bridge" and family in DELEGATING:
        pytest.skip("its bridge hides scores from hooks: see the tests of delegated attention")
    model, tokens = model_of(family, kind), some_tokens()
    capture = reversed_attention(model, tokens)
    for layer in range(2):
        expected = scores_gradient(model, layer, tokens) / math.sqrt(model.cfg.d_head)
        found = capture.reversed_attention(layer)
        assert difference(found, expected) <= TOLERANCE
        assert found.abs().max() > 1e-8
        assert not found.triu(1).any()
        rows = found.sum(-1).abs().max() / found.abs().max()
        # A sink enters the softmax's sum, so gradients add up to 0 only without one.
        assert rows > 0.1 if family == "gpt_oss" else rows < 1e-5


def test_it_is_the_papers_formula(pair: Case) -> None:
    """Loops over heads, queries and keys; a key-value head serves a group of query heads."""
    n, layer, (n_heads, kv_heads, d_head) = 5, 1, HEADS[pair.name]
    tokens = pair.tokens(n)
    at = f"blocks.{layer}.attn"
    pattern, _ = at_hook(pair.model, f"{at}.hook_pattern", tokens)
    v, _ = at_hook(pair.model, f"{at}.hook_v", tokens)
    _, delta_z = at_hook(pair.model, f"{at}.hook_z", tokens)
    expected = torch.zeros(1, n_heads, n, n, dtype=torch.float64)
    without_sum = torch.zeros_like(expected)
    for h in range(n_heads):
        for i in range(n):
            row = [float(delta_z[0, i, h] @ v[0, j, h // (n_heads // kv_heads)]) for j in range(n)]
            mean = sum(float(pattern[0, h, i, j]) * row[j] for j in range(n))
            for j in range(n):
                expected[0, h, i, j] = pattern[0, h, i, j] * (row[j] - mean) / d_head**0.5
                without_sum[0, h, i, j] = pattern[0, h, i, j] * row[j] / d_head**0.5
    found = reversed_attention(pair.model, tokens).reversed_attention(layer)
    assert difference(found, expected) <= EXACT
    # Negative controls: without the row sum or the scale the matrix differs.
    assert difference(without_sum, expected) > 0.1
    assert difference(found * d_head**0.5, expected) > 0.1


def test_it_is_a_causal_map_whose_rows_add_up_to_zero(pair: Case) -> None:
    capture = reversed_attention(pair.model, pair.tokens(7, 7), next_token_loss())
    for layer in range(pair.n_layers):
        found = capture.reversed_attention(layer)
        assert not found.triu(1).any()
        # Llama's bridge computes the softmax in float32.
        assert found.sum(-1).abs().max() <= tolerance_of(pair) * found.abs().max()
        assert not found[:, :, 0].any()  # the first query sees only one key
        assert found[:, :, 1:-1].abs().amax(dim=(0, 1, 3)).min() > 0


def test_with_a_loss_on_the_last_position_the_last_layer_has_one_row(pair: Case) -> None:
    """The other queries of the last layer do not affect the loss; in earlier layers they do."""
    capture = reversed_attention(pair.model, pair.tokens(6))
    last = capture.reversed_attention(pair.n_layers - 1)
    assert not last[:, :, :-1].any()
    assert last[:, :, -1].abs().max() > 0
    assert capture.reversed_attention(0)[:, :, 1:-1].abs().max() > 0


def test_finite_differences_at_the_scores(pair: Case) -> None:
    """No autograd: a hook shifts one score, and the loss is measured."""
    # Central differences: h^2 of truncation and rounding / h, so 1e-9 in float64. Hugging Face
    # computes Llama's norm in float32, where 1e-7 / h is the rounding.
    h, tolerance = (3e-2, 1e-4) if pair.logits_in_float32 else (1e-4, 1e-7)
    layer, tokens, d_head = 1, pair.tokens(5), HEADS[pair.name][2]
    found = reversed_attention(pair.model, tokens).reversed_attention(layer)

    def loss(head: int, query: int, key: int, step: float) -> float:
        def move(scores: Tensor, hook: Any) -> Tensor:
            scores = scores.clone()
            scores[0, head, query, key] += step
            return scores

        name = f"blocks.{layer}.attn.hook_attn_scores"
        with torch.no_grad(), pair.model.hooks(fwd_hooks=[(name, move)]):
            return float(nll(TARGET)(run(pair.model, tokens), tokens))

    for at in [(0, 4, 2), (1, 3, 3), (2, 1, 0), (0, 0, 0)]:
        slope = (loss(*at, h) - loss(*at, -h)) / (2 * h)
        assert float(found[(0, *at)]) * d_head**0.5 == pytest.approx(slope, abs=tolerance)


def test_prompts_of_different_lengths_match_single_runs(pair: Case) -> None:
    prompts = ["The dog of the king runs", "Rome", "Messi plays for"]
    batch = reversed_attention(pair.model, prompts)
    for index, prompt in enumerate(prompts):
        alone = reversed_attention(pair.model, prompt)
        n = alone.mask.shape[1]
        for layer in range(pair.n_layers):
            found = batch.reversed_attention(layer)[index]
            torch.testing.assert_close(
                found[:, :n, :n], alone.reversed_attention(layer)[0], rtol=1e-6, atol=1e-8
            )
            # What padding attends to changes no loss.
            assert not found[:, n:].any()
            assert not found[:, :, n:].any()


@pytest.mark.versions
def test_it_is_computed_with_any_attention_matrix(pair: Case) -> None:
    tokens = pair.tokens(6)
    expected = reversed_attention(pair.model, tokens).reversed_attention(1)
    for matrix in ("W_Q", "W_K", "W_V", "W_O"):
        found = reversed_attention(pair.model, tokens, matrices=matrix, layers=1)
        torch.testing.assert_close(found.reversed_attention(1), expected, rtol=1e-10, atol=1e-14)


@hooked_only
@pytest.mark.parametrize(
    "flags",
    [
        ("use_attn_result",),
        ("ungroup_grouped_query_attention",),
        ("use_split_qkv_input", "ungroup_grouped_query_attention"),
    ],
)
def test_flags_of_a_hooked_transformer_change_nothing(flags: tuple[str, ...]) -> None:
    case = shared_case("hooked-llama")
    tokens = case.tokens(6)
    expected = reversed_attention(case.model, tokens)
    try:
        for flag in flags:
            getattr(case.model, f"set_{flag}")(True)
        found = reversed_attention(case.model, tokens)
    finally:
        for flag in flags:
            getattr(case.model, f"set_{flag}")(False)
    for layer in range(case.n_layers):
        ra = expected.reversed_attention(layer)
        assert difference(found.reversed_attention(layer), ra) <= EXACT


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bridge-gpt2", torch.float32),
        ("bridge-gpt2", torch.bfloat16),
        ("hooked-llama", torch.float16),
    ],
    ids=str,
)
def test_in_lower_precision_it_is_float32_and_close(name: str, dtype: torch.dtype) -> None:
    case, exact = build(name, dtype), shared_case(name)
    tokens = case.tokens(6)
    found = reversed_attention(case.model, tokens).reversed_attention(1)
    expected = reversed_attention(exact.model, tokens).reversed_attention(1)
    assert found.dtype == torch.float32
    # Three layers of rounding to 8 or 11 bits, amplified by softmaxes.
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    assert difference(found, expected) <= tolerance


# ------------------------------------------------------------------------------- a caller's patches


def scaled(value: Tensor, hook: Any) -> Tensor:
    return 1.3 * value + 0.1


def halved(value: Tensor, hook: Any) -> Tensor:
    return 0.5 * value  # keeps -inf where scores are masked


def one_head_off(value: Tensor, hook: Any) -> Tensor:
    value = value.clone()
    value[:, 1] = 0
    return value


def constant(value: Tensor, hook: Any) -> Tensor:
    return torch.full_like(value, 0.2)


PATCHES = [
    ("hook_pattern", scaled),
    ("hook_pattern", one_head_off),
    ("hook_pattern", constant),
    ("hook_attn_scores", halved),
    ("hook_z", scaled),
]


@pytest.mark.versions
@pytest.mark.parametrize(
    ("point", "patch"), PATCHES, ids=[f"{point}-{patch.__name__}" for point, patch in PATCHES]
)
@pytest.mark.parametrize("pair", ["bridge-gpt2", "hooked-llama"], indirect=True)
def test_under_a_patch_it_is_the_gradient_of_the_patched_model(
    pair: Case, point: str, patch: Callable
) -> None:
    """Where a patch acts after the softmax, `E` is the gradient before the patch."""
    layer, tokens, d_head = 1, pair.tokens(6), HEADS[pair.name][2]
    plain = reversed_attention(pair.model, tokens)
    hook = (f"blocks.{layer}.attn.{point}", patch)
    with pair.model.hooks(fwd_hooks=[hook]):
        captures = [reversed_attention(pair.model, tokens)]
        with frozen(pair.model):
            captures.append(reversed_attention(pair.model, tokens))
    for at in range(pair.n_layers):
        expected = scores_gradient(pair.model, at, tokens, patches=[hook]) / math.sqrt(d_head)
        for capture in captures:
            found = capture.reversed_attention(at)
            assert difference(found, expected) <= tolerance_of(pair)
            if at == layer and patch is one_head_off:
                assert not found[:, 1].any()
            if at == layer and patch is constant:
                assert not found.any()
            else:
                assert difference(found, plain.reversed_attention(at)) > 1e-3


def test_under_a_torch_hook_on_the_pattern_it_is_the_gradient_before_it(pair: Case) -> None:
    """The softmax formula needs the pattern before all other hooks."""

    def before(module: nn.Module, args: tuple) -> tuple:
        return (0.5 * args[0] + 0.1, *args[1:])

    layer, tokens, d_head = 1, pair.tokens(6), HEADS[pair.name][2]
    plain = reversed_attention(pair.model, tokens).reversed_attention(layer)
    handle = pair.model.blocks[layer].attn.hook_pattern.register_forward_pre_hook(before)
    try:
        expected = scores_gradient(pair.model, layer, tokens) / math.sqrt(d_head)
        found = reversed_attention(pair.model, tokens).reversed_attention(layer)
    finally:
        handle.remove()
    assert difference(found, expected) <= tolerance_of(pair)
    assert difference(found, plain) > 1e-3


# On bridge-gpt2 hooks get the softmax's own output, which its backward pass needs.
def test_a_patch_may_write_into_the_pattern(pair: Case) -> None:
    def in_place(value: Tensor, hook: Any) -> Tensor:
        value[:, 0, 2:] *= 0.5
        return value

    def out_of_place(value: Tensor, hook: Any) -> Tensor:
        return in_place(value.clone(), hook)

    tokens, name = pair.tokens(6), "blocks.1.attn.hook_pattern"
    with pair.model.hooks(fwd_hooks=[(name, out_of_place)]):
        expected = reversed_attention(pair.model, tokens)
    with pair.model.hooks(fwd_hooks=[(name, in_place)]):
        found = reversed_attention(pair.model, tokens)
    for layer in range(pair.n_layers):
        ra = expected.reversed_attention(layer)
        assert difference(found.reversed_attention(layer), ra) <= tolerance_of(pair)
    assert torch.equal(found.loss, expected.loss)


# ----------------------------------------------------------------------------- delegated attention


def softmax_gradients(raw: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Autograd's gradients at the input of torch's softmax in Hugging Face's attention."""
    softmax, seen = nn.functional.softmax, []

    def recorded(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(scores)
        scores.retain_grad()
        return softmax(scores, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "softmax", recorded)
        logits = raw(tokens).logits
    nll(TARGET)(logits, tokens).sum().backward()
    return [scores.grad for scores in seen]


@pytest.mark.versions
@pytest.mark.parametrize("family", DELEGATING)
def test_delegated_attention_has_reversed_attention_too(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the pattern that Hugging Face returns; the reference is the raw model's softmax."""
    model, raw, tokens = model_of(family, "bridge"), hf_model(family, torch.float64), some_tokens()
    expected = softmax_gradients(raw, tokens, monkeypatch)
    assert len(expected) == 2
    for options in ({}, {"matrices": "W_O"}, {"matrices": "W_Q", "layers": [0, 1]}):
        capture = reversed_attention(model, tokens, **options)
        for layer in range(2):
            found = capture.reversed_attention(layer) * math.sqrt(model.cfg.d_head)
            assert difference(found, expected[layer]) <= TOLERANCE, options


@pytest.mark.parametrize("family", DELEGATING)
def test_delegated_attention_is_the_papers_formula_on_hugging_faces_pattern(family: str) -> None:
    model, raw, tokens = model_of(family, "bridge"), hf_model(family, torch.float64), some_tokens()
    n_heads, d_head, layer = model.cfg.n_heads, model.cfg.d_head, 1
    attn = {
        "gpt_neo": lambda: raw.transformer.h[layer].attn.attention,
        "gptj": lambda: raw.transformer.h[layer].attn,
        "opt": lambda: raw.model.decoder.layers[layer].self_attn,
    }[family]()
    kept: dict[str, Tensor] = {}

    def keep_value(module: nn.Module, args: Any, output: Tensor) -> None:
        kept["v"] = output

    def keep_z(module: nn.Module, args: Any) -> None:
        kept["z"] = args[0]
        args[0].retain_grad()

    attn.v_proj.register_forward_hook(keep_value)
    attn.out_proj.register_forward_pre_hook(keep_z)
    output = raw(tokens, output_attentions=True)
    nll(TARGET)(output.logits, tokens).sum().backward()

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(2, 7, n_heads, d_head).transpose(1, 2)

    pattern, v, delta_z = output.attentions[layer].detach(), by_head(kept["v"]), kept["z"].grad
    e = by_head(delta_z) @ v.transpose(2, 3)
    expected = pattern * (e - (pattern * e).sum(-1, keepdim=True)) / math.sqrt(d_head)
    found = reversed_attention(model, tokens).reversed_attention(layer)
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.versions
@pytest.mark.parametrize("family", DELEGATING)
def test_delegated_attention_of_a_frozen_model(family: str) -> None:
    """The pattern cannot be replaced, so its graph starts before it, also for `W_O`."""
    model, tokens = model_of(family, "bridge"), some_tokens()
    expected = reversed_attention(model, tokens)
    with frozen(model):
        found = reversed_attention(model, tokens)
        of_w_o = reversed_attention(model, tokens, matrices="W_O")
    for layer in range(2):
        wanted = expected.reversed_attention(layer)
        assert difference(found.reversed_attention(layer), wanted) <= EXACT
        assert difference(of_w_o.reversed_attention(layer), wanted) <= EXACT


# -------------------------------------------------------------------------- from a result's methods


def lens(model: Any, tokens: Any, **options: Any) -> BackwardLensResult:
    return backward_lens(model, tokens, TARGET, **({"matrices": "attn"} | options))


def test_a_result_has_reversed_attention_by_layer(pair: Case) -> None:
    tokens = pair.tokens(6, 6)
    capture, result = reversed_attention(pair.model, tokens), lens(pair.model, tokens)
    for layer in range(pair.n_layers):
        expected = capture.reversed_attention(layer)
        assert torch.equal(result.capture.reversed_attention(layer), expected)
        assert torch.equal(result.capture.reversed_attention(layer - pair.n_layers), expected)
    some = lens(pair.model, tokens, layers=[0, 2])
    torch.testing.assert_close(
        some.capture.reversed_attention(-1), capture.reversed_attention(2), rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(
        some.capture.reversed_attention(0), capture.reversed_attention(0), rtol=1e-12, atol=1e-15
    )


def test_layers_without_reversed_attention_are_refused(gpt2: Case) -> None:
    tokens = gpt2.tokens(5)
    of_mlps = lens(gpt2.model, tokens, matrices="mlp")
    with pytest.raises(InputError, match=r"no Reversed Attention for layer 1.*matrices='attn'"):
        of_mlps.capture.reversed_attention(1)
    with pytest.raises(InputError, match=r"no Reversed Attention for layer 1.*matrices='attn'"):
        of_mlps.capture.attention_patch(1, 1.0)
    some = lens(gpt2.model, tokens, layers=[0, 2])
    for layer in (1, 3, -2, "1", None, True):
        with pytest.raises(InputError, match=r"layer"):
            some.capture.reversed_attention(layer)  # type: ignore[arg-type]


def test_a_saved_result_keeps_reversed_attention(pair: Case, tmp_path: Path) -> None:
    tokens = pair.tokens(6)
    result = lens(pair.model, tokens)
    result.save(tmp_path / "result")
    loaded = BackwardLensResult.load(tmp_path / "result")
    for layer in range(pair.n_layers):
        assert torch.equal(
            loaded.capture.reversed_attention(layer), result.capture.reversed_attention(layer)
        )
    hooks = [loaded.capture.attention_patch(1, 2.0)]
    with torch.no_grad(), pair.model.hooks(fwd_hooks=hooks):
        found = run(pair.model, tokens)
    with torch.no_grad(), pair.model.hooks(fwd_hooks=[result.capture.attention_patch(1, 2.0)]):
        assert torch.equal(found, run(pair.model, tokens))


# ---------------------------------------------------------------------------------- attention patch


@pytest.mark.versions
@pytest.mark.parametrize("scale", [-3.0, 20.0])
def test_a_patch_adds_it_to_the_pattern(pair: Case, scale: float) -> None:
    layer, tokens = 1, pair.tokens(6, 6)
    result = lens(pair.model, tokens)
    name, patch = result.capture.attention_patch(layer, scale)
    assert name == f"blocks.{layer}.attn.hook_pattern"
    before, _ = at_hook(pair.model, name, tokens)
    after, _ = at_hook(pair.model, name, tokens, patches=[(name, patch)])
    expected = scale * result.capture.reversed_attention(layer)
    assert expected.any()
    # Two additions in float64.
    torch.testing.assert_close(after - before, expected, rtol=0, atol=1e-14 * abs(scale))


def test_a_patch_changes_the_loss_as_predicted_to_first_order(pair: Case) -> None:
    """Predicted by the inner product of the patch and autograd's gradient at the pattern."""
    tokens = pair.tokens(6)
    result = lens(pair.model, tokens)

    def loss(layer: int, scale: float) -> float:
        hooks = [result.capture.attention_patch(layer, scale)]
        with torch.no_grad(), pair.model.hooks(fwd_hooks=hooks):
            return float(nll(TARGET)(run(pair.model, tokens), tokens))

    for layer in range(pair.n_layers):
        _, at_pattern = at_hook(pair.model, f"blocks.{layer}.attn.hook_pattern", tokens)
        slope = float((at_pattern * result.capture.reversed_attention(layer)).sum())
        # It is sum A (E - mean E)^2 / sqrt(d_head): never negative.
        assert slope > 0
        # Steps by which the loss changes by 1e-4, or by 1e-2 where rounding is 1e-7.
        step = (1e-2 if pair.logits_in_float32 else 1e-4) / slope
        measured = (loss(layer, step) - loss(layer, -step)) / (2 * step)
        assert measured == pytest.approx(slope, rel=1e-2 if pair.logits_in_float32 else 1e-5)
        assert loss(layer, -step) < loss(layer, 0.0) < loss(layer, step)
        assert loss(layer, 0.0) == pytest.approx(float(result.capture.loss), rel=1e-12)


def test_patches_of_several_layers_act_together(pair: Case) -> None:
    tokens = pair.tokens(6)
    result = lens(pair.model, tokens)
    slopes = []
    for layer in range(pair.n_layers):
        _, at_pattern = at_hook(pair.model, f"blocks.{layer}.attn.hook_pattern", tokens)
        slopes.append(float((at_pattern * result.capture.reversed_attention(layer)).sum()))
    step = -1e-2 / sum(slopes)
    hooks = [result.capture.attention_patch(layer, step) for layer in range(pair.n_layers)]
    with torch.no_grad(), pair.model.hooks(fwd_hooks=hooks):
        after = float(nll(TARGET)(run(pair.model, tokens), tokens))
    assert after - float(result.capture.loss) == pytest.approx(-1e-2, rel=0.1)


def test_a_patch_fits_only_copies_of_its_prompt(pair: Case) -> None:
    tokens = pair.tokens(6)
    hook = lens(pair.model, tokens).capture.attention_patch(1, -2.0)
    with torch.no_grad(), pair.model.hooks(fwd_hooks=[hook]):
        alone = run(pair.model, tokens)
        copies = run(pair.model, tokens.expand(3, -1))
        for row in copies:
            torch.testing.assert_close(row, alone[0], rtol=1e-5, atol=1e-6)
        for wrong in (pair.tokens(5), pair.tokens(7, 7)):
            with pytest.raises(InputError, match=r"pattern of layer 1.*prompts that were captured"):
                run(pair.model, wrong)
    of_two = lens(pair.model, pair.tokens(6, 6)).capture.attention_patch(1, -2.0)
    with (
        torch.no_grad(),
        pair.model.hooks(fwd_hooks=[of_two]),
        pytest.raises(InputError, match=r"pattern of layer 1"),
    ):
        run(pair.model, pair.tokens(6, 6, 6))


def hooks_of(model: Any) -> list[tuple]:
    """Every hook on every module, including those of a bridge's Hugging Face model."""
    roots = [model, *([model.original_model] if hasattr(model, "original_model") else [])]
    return [
        (name, attribute, tuple(getattr(module, attribute)))
        for root in roots
        for name, module in root.named_modules()
        for attribute in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]


@pytest.mark.versions
def test_a_patch_leaves_nothing_on_the_model(pair: Case) -> None:
    tokens = pair.tokens(6)
    with torch.no_grad():
        plain = run(pair.model, tokens)
    before = hooks_of(pair.model)
    hook = lens(pair.model, tokens).capture.attention_patch(1, -2.0)
    assert hooks_of(pair.model) == before
    with torch.no_grad(), pair.model.hooks(fwd_hooks=[hook]):
        assert hooks_of(pair.model) != before
        assert not torch.equal(run(pair.model, tokens), plain)
    assert hooks_of(pair.model) == before
    with (
        pytest.raises(InputError),
        torch.no_grad(),
        pair.model.hooks(fwd_hooks=[hook]),
    ):
        run(pair.model, pair.tokens(5))
    assert hooks_of(pair.model) == before
    with torch.no_grad():
        assert torch.equal(run(pair.model, tokens), plain)


def test_a_patched_run_can_be_analysed_again(pair: Case) -> None:
    """Run the lens under the patch: Reversed Attention of the patched model."""
    tokens, d_head = pair.tokens(6), HEADS[pair.name][2]
    result = lens(pair.model, tokens)
    hook = result.capture.attention_patch(1, -5.0)
    with pair.model.hooks(fwd_hooks=[hook]):
        again = lens(pair.model, tokens)
    for layer in range(pair.n_layers):
        expected = scores_gradient(pair.model, layer, tokens, patches=[hook]) / math.sqrt(d_head)
        assert difference(again.capture.reversed_attention(layer), expected) <= tolerance_of(pair)
    assert not torch.equal(again.capture.loss, result.capture.loss)


def test_a_patch_of_a_model_in_half_precision_keeps_its_dtype() -> None:
    case = build("bridge-llama", torch.bfloat16)
    tokens = case.tokens(6)
    name, patch = lens(case.model, tokens).capture.attention_patch(1, -2.0)
    seen: list[Tensor] = []

    def look(value: Tensor, hook: Any) -> None:
        seen.append(value)

    with torch.no_grad(), case.model.hooks(fwd_hooks=[(name, look), (name, patch), (name, look)]):
        run(case.model, tokens)
    assert seen[0].dtype == seen[1].dtype
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.versions
@pytest.mark.parametrize("family", DELEGATING)
def test_a_patch_of_delegated_attention_is_refused(family: str) -> None:
    """A hook there has no effect, so a patch would be silently ignored."""
    model, tokens = model_of(family, "bridge"), some_tokens()
    name = "blocks.1.attn.hook_pattern"
    with torch.no_grad():
        plain = run(model, tokens)
        with model.hooks(fwd_hooks=[(name, lambda value, hook: 0 * value)]):
            assert torch.equal(run(model, tokens), plain)
    result = lens(model, tokens)
    assert result.capture.reversed_attention(1).any()
    with pytest.raises(UnsupportedModelError, match="layer 1 does not use what a hook"):
        result.capture.attention_patch(1, 1.0)


@hooked_only
@pytest.mark.parametrize("family", DELEGATING)
def test_a_hooked_transformer_accepts_the_patch_that_its_bridge_refuses(family: str) -> None:
    model, tokens = model_of(family, "hooked"), some_tokens(n_prompts=1)
    result = lens(model, tokens)
    _, at_pattern = at_hook(model, "blocks.1.attn.hook_pattern", tokens)
    slope = float((at_pattern * result.capture.reversed_attention(1)).sum())
    with torch.no_grad(), model.hooks(fwd_hooks=[result.capture.attention_patch(1, -1e-3 / slope)]):
        after = float(nll(TARGET)(run(model, tokens), tokens))
    assert after - float(result.capture.loss) == pytest.approx(-1e-3, rel=0.05)


@pytest.mark.versions
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_a_patch_on_sinks_and_softcaps(family: str, kind: str) -> None:
    model, tokens = model_of(family, kind), some_tokens(n_prompts=1)
    result = lens(model, tokens)
    _, at_pattern = at_hook(model, "blocks.0.attn.hook_pattern", tokens)
    slope = float((at_pattern * result.capture.reversed_attention(0)).sum())
    assert slope > 0
    with torch.no_grad(), model.hooks(fwd_hooks=[result.capture.attention_patch(0, -1e-3 / slope)]):
        after = float(nll(TARGET)(run(model, tokens), tokens))
    # The rest is second order and Hugging Face's float32 rounding.
    assert after - float(result.capture.loss) == pytest.approx(-1e-3, rel=0.05)


def test_the_reference_sees_a_wrong_gradient(gpt2: Case) -> None:
    """Negative control of this file: another layer, another objective, another scale."""
    tokens = gpt2.tokens(6)
    capture = reversed_attention(gpt2.model, tokens)
    expected = scores_gradient(gpt2.model, 1, tokens) / math.sqrt(8)
    assert difference(capture.reversed_attention(1), expected) <= EXACT
    assert relative_error(capture.reversed_attention(0), expected) > 0.1
    assert relative_error(capture.attention[1].scores_vjp, expected) > 0.1
    other = reversed_attention(gpt2.model, tokens, next_token_loss())
    assert relative_error(other.reversed_attention(1), expected) > 0.1
