"""The captured factors are the gradient: `X^T Delta` against autograd's weight gradient."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from models import HAS_BRIDGE, NAMES, Case, build, nll, relative_error, training_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.objectives import next_token_loss, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.capture.prompts import pad_prompts
from backward_lens_tl.errors import ModelStateError, UnsupportedModelError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models import host_of
from backward_lens_tl.models.matrix_selection import find_editable

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]

# Both sides sum the same products in float64, in another order: 50 times the observed error.
EXACT = 1e-12
# The same in float32.
SINGLE = 1e-5
TARGET = 5


def summed(capture: GradientCapture, key: tuple[str, int]) -> Tensor:
    """The gradient of the sum of the prompts' losses."""
    prompts = range(len(capture.mask))
    return torch.stack([capture[key].dense(prompt) for prompt in prompts]).sum(0)


def assert_gradients(capture: GradientCapture, expected: dict, tolerance: float) -> None:
    errors = {key: relative_error(summed(capture, key), g) for key, g in expected.items()}
    assert all(error <= tolerance for error in errors.values()), errors


# --------------------------------------------------------------------------- the factors are right


def test_factors_give_the_weight_gradient(case: Case) -> None:
    """Loss at every position; `test_each_prompt_of_a_batch_has_its_own_gradient` has it at one."""
    tokens = case.tokens(9, 9)
    capture = capture_gradients(case.model, tokens, next_token_loss(), matrices="mlp")
    assert list(capture.gradients) == [
        (matrix, layer) for layer in range(case.n_layers) for matrix in case.matrices
    ]
    assert_gradients(capture, case.weight_gradients(tokens, training_loss), EXACT)


def test_each_prompt_of_a_batch_has_its_own_gradient(case: Case) -> None:
    tokens = case.tokens(8, 8, 8)
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    for prompt in range(3):
        expected = case.weight_gradients(tokens[prompt : prompt + 1], nll(TARGET))
        for key, gradient in expected.items():
            assert relative_error(capture[key].dense(prompt), gradient) <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_factors_give_the_weight_gradient_in_float32(name: str) -> None:
    case = build(name, torch.float32)
    tokens = case.tokens(9)
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    assert {capture[key].inputs.dtype for key in case.weights} == {torch.float32}
    assert_gradients(capture, case.weight_gradients(tokens, nll(TARGET)), SINGLE)


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_bfloat16_model_gives_float32_factors(name: str) -> None:
    case = build(name, torch.bfloat16)
    tokens = case.tokens(9)
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    for gradient in capture:
        assert {gradient.inputs.dtype, gradient.vjps.dtype} == {torch.float32}
    assert capture.loss.dtype == torch.float32
    # 8 bits of mantissa give 4e-3 per rounding; autograd also sums the positions in bfloat16.
    assert_gradients(capture, case.weight_gradients(tokens, nll(TARGET)), 5e-2)


def test_factors_of_the_stories_model(stories: Case) -> None:
    assert_factors_of_a_trained_model(stories)


def test_factors_of_the_facts_model(facts: Case) -> None:
    assert_factors_of_a_trained_model(facts)


def assert_factors_of_a_trained_model(case: Case) -> None:
    tokens = case.model.to_tokens("The little dog plays with a ball")
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    assert_gradients(capture, case.weight_gradients(tokens, nll(TARGET)), SINGLE)


@pytest.mark.parametrize("case", ["bridge-gemma2", "bridge-gpt2", "hooked-llama"], indirect=True)
def test_one_matrix_of_one_layer_equals_its_slice_of_all(case: Case) -> None:
    tokens = case.tokens(6)
    everything = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    for key in case.weights:
        alone = capture_gradients(
            case.model, tokens, target_nll(TARGET), matrices=key[0], layers=key[1]
        )
        assert list(alone.gradients) == [key]
        torch.testing.assert_close(alone[key].vjps, everything[key].vjps, rtol=1e-12, atol=1e-14)
        assert torch.equal(alone[key].inputs, everything[key].inputs)


def test_a_capture_is_in_model_order_for_any_requested_order(llama: Case) -> None:
    capture = capture_gradients(
        llama.model,
        llama.tokens(4),
        target_nll(TARGET),
        matrices=["W_out", "W_in", "W_gate", "W_out"],
        layers=[-1, 0, 2],
    )
    expected = [(matrix, layer) for layer in (0, 2) for matrix in ("W_in", "W_gate", "W_out")]
    assert list(capture.gradients) == expected
    assert [(gradient.matrix, gradient.layer) for gradient in capture] == expected
    assert len(capture) == 6
    assert capture["W_gate", 2].spanning_set.shape == (1, 4, llama.d_model)


def test_capture_describes_its_run(gpt2: Case) -> None:
    tokens = gpt2.tokens(5, 5)
    capture = capture_gradients(gpt2.model, tokens, target_nll([3, 4]))
    assert torch.equal(capture.tokens, tokens)
    assert capture.mask.all()
    assert capture.mask.shape == tokens.shape
    expected = [[gpt2.model.tokenizer.decode([i]) for i in row] for row in tokens.tolist()]
    assert [list(row) for row in capture.str_tokens] == expected
    assert capture.targets is not None
    assert capture.targets.tolist() == [[3] * 5, [4] * 5]
    assert not capture.loss.requires_grad
    with torch.no_grad():
        expected = [nll(3)(gpt2.logits(tokens[:1]), tokens)[0]]
        expected += [nll(4)(gpt2.logits(tokens[1:]), tokens)[0]]
    torch.testing.assert_close(capture.loss, torch.stack(expected))


def test_an_mlp_that_flattens_the_positions_is_right_or_refused() -> None:
    """OPT's MLP sees `[batch * pos, d]`; factors of a wrong shape must never be returned."""
    case = build("bridge-opt")
    tokens = case.tokens(6, 6)
    with suppress(UnsupportedModelError):  # refusing is allowed
        capture = capture_gradients(case.model, tokens, target_nll(TARGET))
        assert capture["W_in", 0].inputs.shape == (2, 6, case.d_model)
        assert_gradients(capture, case.weight_gradients(tokens, nll(TARGET)), EXACT)


def test_the_norm_before_the_mlp_may_be_folded() -> None:
    """Folding changes `x_i` of W_in, and nothing else (paper.md, section 2)."""
    raw, folded = build("bridge-gpt2"), build("bridge-gpt2")
    folded.model.enable_compatibility_mode(
        fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    assert_folding_changes_only_what_w_in_reads(raw, folded)


def test_norm_of_a_hooked_transformer_may_be_folded() -> None:
    raw, folded = build("hooked-gpt2"), build("hooked-ln_pre")
    folded.model.load_and_process_state_dict(
        raw.model.state_dict(),
        fold_ln=True,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    assert_folding_changes_only_what_w_in_reads(raw, folded)


def assert_folding_changes_only_what_w_in_reads(raw: Case, folded: Case) -> None:
    tokens = raw.tokens(7)
    before = capture_gradients(raw.model, tokens, target_nll(TARGET))
    after = capture_gradients(folded.model, tokens, target_nll(TARGET))
    # TransformerLens folds in float32.
    close = {"rtol": 1e-5, "atol": 1e-6}
    for layer in range(raw.n_layers):
        w_in, w_out = ("W_in", layer), ("W_out", layer)
        torch.testing.assert_close(after[w_in].vjps, before[w_in].vjps, **close)
        torch.testing.assert_close(after[w_out].vjps, before[w_out].vjps, **close)
        torch.testing.assert_close(after[w_out].inputs, before[w_out].inputs, **close)
        # What the folded matrix reads is the normalised stream without gain and bias.
        x = after[w_in].inputs
        torch.testing.assert_close(x.mean(-1), torch.zeros(1, 7, dtype=x.dtype), **close)
        assert relative_error(x, before[w_in].inputs) > 0.05


# ----------------------------------------------- negative controls: three tempting hook points


def at_hook(case: Case, hook: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient at one of TransformerLens's hook points."""
    seen: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        seen.append(value)
        if value.requires_grad:
            value.retain_grad()
        return value

    with torch.enable_grad():
        logits = case.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[(hook, keep)])
        nll(TARGET)(logits, tokens).sum().backward()
    assert len(seen) == 1
    value, gradient = seen[0].detach(), seen[0].grad
    case.model.zero_grad()
    return value, torch.full_like(value, torch.nan) if gradient is None else gradient


@pytest.mark.parametrize(
    "name", ["bridge-gpt2", "hooked-gpt2", "hooked-llama", "hooked-gemma2", "bridge-gemma2"]
)
def test_tempting_hook_points_differ_from_the_matrix(name: str) -> None:
    """`hook_mlp_out` is right only where the MLP's output is not normalised."""
    case = build(name)
    hooks = ["ln2.hook_normalized", "hook_mlp_out"]
    if name.startswith("hooked"):  # a bridge's hook point needs compatibility mode
        hooks.append("hook_mlp_in")
        case.model.set_use_hook_mlp_in(True)
    tokens, layer = case.tokens(7), 1
    expected = case.weight_gradients(tokens, nll(TARGET))
    capture = capture_gradients(case.model, tokens, target_nll(TARGET))
    for hook in hooks:
        value, gradient = at_hook(case, f"blocks.{layer}.{hook}", tokens)
        if hook == "hook_mlp_out":
            key = ("W_out", layer)
            wrong = capture[key].inputs[0].T @ gradient[0]
            right_here = not name.endswith("gemma2")
        else:
            key = ("W_in", layer)
            wrong = value[0].T @ capture[key].vjps[0]
            # In TransformerLens 2 it comes after LayerNorm's gain and bias.
            right_here = hook == "ln2.hook_normalized" and name == "hooked-gpt2" and not HAS_BRIDGE
        assert relative_error(capture[key].dense(), expected[key]) <= EXACT
        error = relative_error(wrong, expected[key])
        # paper.md measured 27 to 100 % on random models.
        assert error <= EXACT if right_here else error > 0.05, (hook, error)


# -------------------------------------------------------------------------------------- torch modes


@contextmanager
def frozen(case: Case, keep: Callable[[str], bool] = lambda name: False) -> Iterator[None]:
    """Freeze all parameters except those in `kept`."""
    changed = [p for n, p in case.model.named_parameters() if p.requires_grad and not keep(n)]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def count_forwards(model: nn.Module) -> tuple[list[int], Any]:
    calls: list[int] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls, handle


def test_what_a_caller_keeps_of_an_activation_stays_where_it_is(gpt2: Case) -> None:
    """Such as products that were moved to the CPU because a GPU has no room for all of them."""
    host = host_of(gpt2.model)
    sites, batch = find_editable(host, "W_out", 0), pad_prompts(host, [[1, 2, 3]])

    def moved(values: Tensor) -> Tensor:
        return values.to("meta")

    assert forward_pass(host, batch, inputs=sites, keep=moved).inputs[0].device.type == "meta"
    assert forward_pass(host, batch, inputs=sites).inputs[0].device == batch.mask.device


def test_inference_mode_is_refused_before_the_forward_pass(gpt2: Case) -> None:
    calls, handle = count_forwards(gpt2.model)
    try:
        with torch.inference_mode(), pytest.raises(ModelStateError, match="inference_mode"):
            capture_gradients(gpt2.model, gpt2.tokens(5), target_nll(TARGET))
        with torch.inference_mode(), pytest.raises(ModelStateError, match="inference_mode"):
            backward_lens(gpt2.model, gpt2.tokens(5), TARGET)
    finally:
        handle.remove()
    assert not calls


def test_parameters_created_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        case = build("bridge-gpt2")
    with pytest.raises(ModelStateError, match="inference_mode"):
        capture_gradients(case.model, case.tokens(5), target_nll(TARGET))


# ------------------------------------------------------------------- the caller's hooks take effect


def replace(value: Tensor, hook: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(value.shape, generator=generator, dtype=value.dtype)


def scale(value: Tensor, hook: Any) -> Tensor:
    return 1.3 * value + 0.1


def in_place(value: Tensor, hook: Any) -> Tensor:
    value[:, 2] = 0.25
    return value


PATCHES = [
    ("blocks.1.hook_resid_pre", replace),
    ("blocks.0.hook_mlp_out", scale),
    ("blocks.1.hook_mlp_out", replace),
    ("blocks.1.mlp.hook_post", scale),
    ("blocks.1.mlp.hook_post", in_place),
    ("blocks.1.mlp.hook_pre", scale),
    ("blocks.1.mlp.hook_pre", in_place),
    ("blocks.1.hook_mlp_out", in_place),
]
PATCHED = ("bridge-llama", "bridge-gemma2", "hooked-gpt2", "hooked-gemma2")
"""The models of the quick run; the complete run uses all."""


@pytest.mark.parametrize(
    "case",
    [name if name in PATCHED else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
    indirect=True,
)
@pytest.mark.parametrize(
    ("hook", "patch"), PATCHES, ids=[f"{hook}-{patch.__name__}" for hook, patch in PATCHES]
)
def test_gradients_are_those_of_the_patched_model(case: Case, hook: str, patch: Callable) -> None:
    tokens = case.tokens(6)
    keys, weights = list(case.own), [case.own[key].tensor for key in case.own]
    with torch.no_grad():
        plain = float(nll(TARGET)(case.logits(tokens), tokens))
    with case.model.hooks(fwd_hooks=[(hook, patch)]):
        with torch.enable_grad():
            logits = case.model(tokens, return_type="logits")
            value = nll(TARGET)(logits, tokens).sum()
            expected = torch.autograd.grad(value, weights, materialize_grads=True)
        captures = [capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")]
        with frozen(case):
            captures += [capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")]
    for capture in captures:
        assert float(capture.loss) == pytest.approx(value.item(), rel=1e-12)
        assert float(capture.loss) != pytest.approx(plain, rel=1e-6)
        errors = {
            key: relative_or_zero(capture[key].dense(), case.own[key].in_out(gradient))
            for key, gradient in zip(keys, expected, strict=True)
        }
        assert all(error <= EXACT for error in errors.values()), errors


@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama"])
def test_plain_torch_hooks_of_the_caller_take_effect(name: str, freeze: bool) -> None:
    """Hooks on modules rather than on TransformerLens's hook points."""
    case, layer = build(name), 1
    mlp = case.model.blocks[layer].mlp
    tokens = case.tokens(6)
    keys, weights = list(case.own), [case.own[key].tensor for key in case.own]

    def scaled_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return 1.3 * output + 0.1

    def scaled_input(module: nn.Module, args: tuple) -> tuple:
        return (0.7 * args[0] + 0.2, *args[1:])

    mlp.register_forward_hook(scaled_output)
    mlp.register_forward_pre_hook(scaled_input)
    if name.startswith("bridge"):
        for projection in ("in", "out"):
            linear = getattr(mlp, projection).original_component
            linear.register_forward_hook(scaled_output)
            linear.register_forward_pre_hook(scaled_input)
    value = nll(TARGET)(case.model(tokens, return_type="logits"), tokens).sum()
    expected = torch.autograd.grad(value, weights)
    case.model.requires_grad_(not freeze)
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    assert float(capture.loss) == pytest.approx(value.item(), rel=1e-12)
    errors = {
        key: relative_error(capture[key].dense(), case.own[key].in_out(gradient))
        for key, gradient in zip(keys, expected, strict=True)
    }
    assert all(error <= EXACT for error in errors.values()), errors


def test_inputs_are_captured_before_a_later_overwrite() -> None:
    """The gate reads first; what a hook then writes into the same tensor only W_in reads."""
    case = build("bridge-llama")
    tokens, hook = case.tokens(6), "blocks.1.mlp.in.hook_in"

    def copied(value: Tensor, hook: Any) -> Tensor:
        return in_place(value.clone(), hook)

    with frozen(case):
        with case.model.hooks(fwd_hooks=[(hook, copied)]):
            expected = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
        with case.model.hooks(fwd_hooks=[(hook, in_place)]):
            found = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    assert not torch.equal(expected["W_gate", 1].inputs, expected["W_in", 1].inputs)
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(found[key].inputs, gradient.inputs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[key].vjps, gradient.vjps, rtol=1e-6, atol=1e-6)


def relative_or_zero(found: Tensor, expected: Tensor) -> float:
    """Relative error; absolute where a patch makes the gradient zero."""
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)


def test_hooks_of_the_caller_run_once_and_stay(gpt2: Case) -> None:
    """The projection decodes vectors; the caller's hooks on its path must not see them."""
    names = [
        "ln_final.hook_normalized",
        "ln_final.hook_scale",
        "unembed.hook_out",
        "unembed.hook_in",
    ]
    names = [name for name in names if name in gpt2.model.hook_dict]
    assert "ln_final.hook_normalized" in names
    calls = dict.fromkeys(names, 0)

    def count(value: Tensor, hook: Any) -> Tensor:
        calls[hook.name] += 1
        return value

    modules: list[nn.Module] = []
    watched = [gpt2.model.ln_final, gpt2.model.unembed]
    handles = [m.register_forward_hook(lambda m, *_: modules.append(m)) for m in watched]
    try:
        with gpt2.model.hooks(fwd_hooks=[(name, count) for name in names]):
            backward_lens(gpt2.model, gpt2.tokens(6), TARGET)
            assert calls == dict.fromkeys(names, 1)
            gpt2.model(gpt2.tokens(6))
            assert calls == dict.fromkeys(names, 2)
    finally:
        for handle in handles:
            handle.remove()
    assert modules == watched * 2


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama"])
def test_hooks_on_hugging_faces_final_norm_run_as_in_a_forward_pass(name: str) -> None:
    """GPT-2's bridge computes the norm itself; Llama's calls Hugging Face's module."""
    case = build(name)
    norm = case.model.ln_final.original_component
    calls: list[Any] = []
    handle = norm.register_forward_hook(lambda module, args, output: calls.append(args))
    try:
        case.model(case.tokens(6))
        of_a_forward_pass = len(calls)
        backward_lens(case.model, case.tokens(6), TARGET)
    finally:
        handle.remove()
    assert of_a_forward_pass == {"bridge-gpt2": 0, "bridge-llama": 1}[name]
    assert len(calls) == 2 * of_a_forward_pass


# ---------------------------------------------------------------------------------- never in memory


class Allocations(TorchDispatchMode):
    """Count torch's allocations of the size of an MLP's weight matrix."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.sides = {case.d_model, case.weights["W_in", 0].tensor.numel() // case.d_model}
        self.dense: Counter[str] = Counter()
        self.n_operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.n_operations += 1
        given = {storage(value) for value in args if isinstance(value, Tensor)}
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and storage(tensor) not in given:
                self.dense[str(func)] += self.sides <= set(tensor.shape)
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "case", ["bridge-gpt2", "bridge-llama", "hooked-gpt2", "hooked-llama"], indirect=True
)
def test_no_weight_gradient_is_computed_and_no_matrix_allocated(case: Case) -> None:
    tokens = case.tokens(7, 7)
    with torch.no_grad(), Allocations(case) as forward:
        case.model(tokens, return_type="logits")
    with Allocations(case) as lens:
        result = backward_lens(case.model, tokens, TARGET, matrices="mlp")
        for gradient in result.capture:
            gradient.rank(1)
            gradient.singular_values(1)
            gradient.neuron(3, 1)
            gradient.factored(1)
            assert gradient.norms.shape == gradient.is_zero.shape
    assert lens.n_operations > 2 * forward.n_operations
    # HookedTransformer's gated MLP copies its weights during the forward pass.
    assert +lens.dense == +forward.dense


def test_the_check_detects_dense_matrices(gpt2: Case) -> None:
    """Negative control of the test above: autograd's weight gradient, and `dense`."""
    tokens = gpt2.tokens(7)
    with Allocations(gpt2) as autograd, torch.enable_grad():
        value = nll(TARGET)(gpt2.model(tokens, return_type="logits"), tokens).sum()
        torch.autograd.grad(value, [gpt2.own["W_in", 0].tensor])
    assert +autograd.dense
    capture = capture_gradients(gpt2.model, tokens, target_nll(TARGET))
    with Allocations(gpt2) as on_request:
        capture["W_in", 0].dense()
    assert +on_request.dense


# -------------------------------------------------------------------------------- long prompts


@pytest.mark.parametrize("name", ["bridge-llama", "hooked-gpt2"])
def test_positions_of_a_long_prompt_stay_aligned(name: str) -> None:
    case = build(name, n_ctx=400)
    tokens = case.tokens(400)
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    assert_gradients(capture, case.weight_gradients(tokens, nll(TARGET)), EXACT)
    cut = random.Random(0).randrange(257, 399)
    truncated = capture_gradients(case.model, tokens[:, :cut], target_nll(TARGET), matrices="mlp")
    for key in case.weights:
        # What a causal model computes at a position does not depend on what follows.
        torch.testing.assert_close(
            capture[key].inputs[:, :cut], truncated[key].inputs, rtol=1e-10, atol=1e-12
        )


def test_a_trained_model_on_a_long_text(stories: Case, shared: Any) -> None:
    text = (shared / "data" / "wikitext2" / "wiki.test.raw").read_text()[1000:3000]
    tokens = stories.model.to_tokens(text, truncate=False)[:, :200]
    assert tokens.shape == (1, 200)
    capture = capture_gradients(stories.model, tokens, next_token_loss(), matrices="mlp")
    expected = stories.weight_gradients(tokens, training_loss)
    # Sums in float32 over 200 positions instead of 9.
    assert_gradients(capture, expected, SINGLE)


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_vjps_at_the_stream_are_those_after_the_callers_hook(gpt2: Case, branch: str) -> None:
    """A hook that triples a branch's output triples its VJPs, but not those at the stream."""
    matrix, point = {"attn": ("W_O", "hook_attn_out"), "mlp": ("W_out", "hook_mlp_out")}[branch]
    name = f"blocks.1.{point}"
    with gpt2.model.hooks(fwd_hooks=[(name, lambda value, hook: 3 * value)]):
        capture = capture_gradients(
            gpt2.model, gpt2.tokens(5), target_nll(TARGET), matrices=matrix, hook_points=name
        )
    gradient = capture[matrix, 1]
    at_point = capture.hook_gradients[name].vjp
    torch.testing.assert_close(gradient.resid_vjps, at_point, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient.vjps, 3 * at_point, rtol=1e-12, atol=1e-14)
