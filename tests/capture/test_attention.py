"""Attention matrices: their factors against autograd, their rank laws, lemmas 5.1 and 5.2.

Expected values come from autograd on the model's own parameters, from the raw Hugging Face model,
from loops over heads, queries and keys, and from real steps of SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from architectures import NotAvailable, build_model, hf_model
from attention_cases import (
    HEADS,
    MATRICES,
    PAIR_NAMES,
    Key,
    Loss,
    attention_weights,
    divided,
    loss_of,
    shared_case,
)
from models import Case, build, hooked_only, nll, relative_error, training_loss
from torch import Tensor, nn

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.objectives import next_token_loss, target_nll
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import BackwardLensError, InputError, UnsupportedModelError

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]

# Both sides sum the same products in float64, in another order: 50 times the observed error.
EXACT = 1e-12
# The same in float32; Hugging Face computes Llama's norms and rotations in it in any case.
SINGLE = 1e-5
# Singular values of these gradients are 6 orders of magnitude above rounding.
RTOL = 1e-10
TARGET = 5
READING = ("W_Q", "W_K", "W_V")


@pytest.fixture(scope="module", params=PAIR_NAMES)
def pair(request: pytest.FixtureRequest) -> Case:
    """Both model classes, with plain and with grouped-query attention, in float64."""
    return shared_case(request.param)


# ------------------------------------------------------- the reference: the model's own parameters


def joined(by_head: Tensor, name: str) -> Tensor:
    """Concatenate heads again: `[d_in, d_out]`."""
    return torch.cat(list(by_head), dim=0 if name == "W_O" else 1)


def autograd(model: Any, tokens: Tensor, loss: Loss) -> dict[Key, Tensor]:
    """Autograd's gradients of the attention matrices, `[head, d_in, d_out]`."""
    weights = attention_weights(model)
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            loss_of(model, tokens, loss),
            [weight.parameter for weight in weights.values()],
            materialize_grads=True,
        )
    pairs = zip(weights.items(), gradients, strict=True)
    return {key: weight.by_head(gradient) for (key, weight), gradient in pairs}


def summed(capture: GradientCapture, key: Key) -> Tensor:
    """The gradient of the sum of the prompts' losses."""
    prompts = range(len(capture.mask))
    return torch.stack([capture[key].dense(prompt) for prompt in prompts]).sum(0)


def errors(capture: GradientCapture, expected: dict[Key, Tensor]) -> dict[Key, float]:
    """Relative errors; absolute where zero is expected."""
    found = {}
    for key, gradient in expected.items():
        ours = summed(capture, key)
        assert ours.shape == gradient.shape, key
        difference = float((ours.double() - gradient.double()).norm())
        found[key] = difference / (float(gradient.double().norm()) or 1.0)
    return found


def attention_of(model: Any, tokens: Any, objective: Any = None, **options: Any) -> GradientCapture:
    objective = target_nll(TARGET) if objective is None else objective
    return capture_gradients(model, tokens, objective, matrices="attn", **options)


def distinct(n: int, seed: int = 0) -> Tensor:
    """One prompt of `n` different tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(97, generator=generator)[:n][None]


# --------------------------------------------------------------------------- the factors are right


def test_factors_have_a_head_axis_where_the_matrix_has_one(pair: Case) -> None:
    n_heads, kv_heads, d_head = HEADS[pair.name]
    capture = attention_of(pair.model, pair.tokens(7, 7))
    assert list(capture.gradients) == [(m, layer) for layer in range(3) for m in MATRICES]
    for layer in range(pair.n_layers):
        for matrix, heads in zip(READING, (n_heads, kv_heads, kv_heads), strict=True):
            gradient = capture[matrix, layer]
            assert gradient.inputs.shape == (2, 7, pair.d_model)
            assert gradient.vjps.shape == (2, 7, heads, d_head)
            assert gradient.spanning_set is gradient.inputs
            assert gradient.n_heads == heads
        gradient = capture["W_O", layer]
        assert gradient.inputs.shape == (2, 7, n_heads, d_head)
        assert gradient.vjps.shape == (2, 7, pair.d_model)
        assert gradient.spanning_set is gradient.vjps
        assert gradient.n_heads == n_heads


def test_dense_is_autograds_gradient(case: Case) -> None:
    """The loss is at every position; the tests below use the last one only."""
    tokens = case.tokens(9, 9)
    capture = attention_of(case.model, tokens, next_token_loss())
    found = errors(capture, autograd(case.model, tokens, training_loss))
    assert len(found) == 4 * case.n_layers
    assert all(error <= EXACT for error in found.values()), found


# The position axis must not be confused with the head axis when their lengths are equal.
def test_a_prompt_with_one_token_per_head(pair: Case) -> None:
    for n in sorted(set(HEADS[pair.name])):
        tokens = pair.tokens(n, n)
        found = errors(attention_of(pair.model, tokens), autograd(pair.model, tokens, nll(TARGET)))
        assert all(error <= EXACT for error in found.values()), (n, found)


def test_dense_is_the_gradient_of_each_prompt_alone(pair: Case) -> None:
    tokens = pair.tokens(8, 8, 8)
    capture = attention_of(pair.model, tokens)
    for prompt in range(3):
        for key, gradient in autograd(pair.model, tokens[prompt : prompt + 1], nll(TARGET)).items():
            assert relative_error(capture[key].dense(prompt), gradient) <= EXACT


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dense_is_hugging_faces_gradient(family: str, kind: str) -> None:
    """On the raw model: its fused `c_attn` split into three, its `Linear` transposed."""
    try:
        model = build_model(family, kind, torch.float64)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    raw = hf_model(family, torch.float64)
    tokens = distinct(9)
    nll(TARGET)(raw(tokens).logits, tokens).sum().backward()
    capture = attention_of(model, tokens)
    blocks = raw.transformer.h if family == "gpt2" else raw.model.layers
    d_head = model.cfg.d_head
    for layer, block in enumerate(blocks):
        if family == "gpt2":
            reading = block.attn.c_attn.weight.grad.chunk(3, dim=1)
            expected = dict(zip(READING, reading, strict=True))
            expected["W_O"] = block.attn.c_proj.weight.grad
        else:
            attn = block.self_attn
            linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
            expected = {
                matrix: linear.weight.grad.T
                for matrix, linear in zip(MATRICES, linears, strict=True)
            }
        for matrix, gradient in expected.items():
            found = capture[matrix, layer].dense()
            tolerance = EXACT if family == "gpt2" else SINGLE
            assert relative_error(found, divided(gradient, matrix, d_head)) <= tolerance


def test_every_delta_by_loops_over_heads_queries_and_keys(gpt2: Case) -> None:
    """From the deltas of `W_O` and TransformerLens's cache, for each head h:

    `dz_i = W_O delta_i`, `dv_j = sum_i A_ij dz_i`, `E_ij = dz_i . v_j`,
    `ds_ij = A_ij (E_ij - sum_k A_ik E_ik)`, `dq_i = sum_j ds_ij k_j / sqrt(d_head)`,
    `dk_j = sum_i ds_ij q_i / sqrt(d_head)`.
    """
    n, layer, (n_heads, _, d_head) = 5, 1, HEADS["gpt2"]
    tokens = gpt2.tokens(n)
    capture = attention_of(gpt2.model, tokens, next_token_loss())
    _, cache = gpt2.model.run_with_cache(tokens)
    q, k, v = (cache[f"blocks.{layer}.attn.hook_{name}"][0].detach() for name in "qkv")
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0].detach()
    weight = attention_weights(gpt2.model)["W_O", layer]
    w_o = weight.by_head(weight.parameter.detach())
    delta = capture["W_O", layer].vjps[0]
    dq, dk, dv = (torch.zeros(n, n_heads, d_head, dtype=torch.float64) for _ in range(3))
    for h in range(n_heads):
        for i in range(n):
            dz = w_o[h] @ delta[i]
            at_pattern = [float(dz @ v[j, h]) for j in range(i + 1)]
            mean = sum(float(pattern[h, i, j]) * at_pattern[j] for j in range(i + 1))
            for j in range(i + 1):
                ds = float(pattern[h, i, j]) * (at_pattern[j] - mean)
                dq[i, h] += ds * k[j, h] / d_head**0.5
                dk[j, h] += ds * q[i, h] / d_head**0.5
                dv[j, h] += float(pattern[h, i, j]) * dz
    for matrix, expected in zip(READING, (dq, dk, dv), strict=True):
        assert relative_error(capture[matrix, layer].vjps[0], expected) <= EXACT, matrix
    expected_z = torch.einsum("hij,jhd->ihd", pattern, v)
    assert relative_error(capture["W_O", layer].inputs[0], expected_z) <= EXACT


def test_a_grouped_value_gets_the_sum_over_its_query_heads(llama: Case) -> None:
    n, layer, (n_heads, kv_heads, d_head) = 5, 1, HEADS["llama"]
    tokens = llama.tokens(n)
    capture = attention_of(llama.model, tokens)
    _, cache = llama.model.run_with_cache(tokens)
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0].detach().double()
    weight = attention_weights(llama.model)["W_O", layer]
    w_o = weight.by_head(weight.parameter.detach())
    delta = capture["W_O", layer].vjps[0]
    dv = torch.zeros(n, kv_heads, d_head, dtype=torch.float64)
    for h in range(n_heads):
        for i in range(n):
            for j in range(i + 1):
                dv[j, h // (n_heads // kv_heads)] += pattern[h, i, j] * (w_o[h] @ delta[i])
    assert relative_error(capture["W_V", layer].vjps[0], dv) <= EXACT


def test_prompts_of_different_lengths_match_single_runs(pair: Case) -> None:
    prompts = ["The dog of the king runs", "Rome", "Messi plays for"]
    batch = attention_of(pair.model, prompts)
    assert not batch.mask.all()
    for index, prompt in enumerate(prompts):
        alone = attention_of(pair.model, prompt)
        n = alone.mask.shape[1]
        assert int(batch.mask[index].sum()) == n
        for key, expected in alone.gradients.items():
            gradient = batch[key]
            for found, wanted in (
                (gradient.inputs[index], expected.inputs[0]),
                (gradient.vjps[index], expected.vjps[0]),
            ):
                # Longer rows are summed in another order; Llama's norm and softmax of Hugging
                # Face are computed in float32.
                torch.testing.assert_close(found[:n], wanted, rtol=1e-6, atol=1e-7)
                assert not found[n:].any()
            assert gradient.is_zero[index, n:].all()
            assert not gradient.norms[index, n:].any()
            size = float(expected.dense().norm())
            assert float((gradient.dense(index) - expected.dense()).norm()) <= 1e-6 * (size or 1)
            assert gradient.rank(index, RTOL) == expected.rank(rtol=RTOL)
            assert gradient.factored(index).A.shape[1] == n


# --------------------------------------------------------------------- decoding a matrix with heads


def test_decoding_joins_the_heads(pair: Case) -> None:
    """`factored`, singular values and rank against autograd's dense gradient, in float64."""
    tokens = pair.tokens(7)
    capture = attention_of(pair.model, tokens, next_token_loss())
    for key, by_head in autograd(pair.model, tokens, training_loss).items():
        gradient, dense = capture[key], joined(by_head, key[0])
        factored = gradient.factored()
        assert factored.A.shape == (dense.shape[0], 7)
        assert factored.B.shape == (7, dense.shape[1])
        assert relative_error(factored.AB, dense) <= EXACT
        values = torch.linalg.svdvals(dense)
        found = gradient.singular_values()
        assert len(found) == min(7, *dense.shape)
        # Relative to the largest: values below rounding are noise on both sides.
        torch.testing.assert_close(
            found, values[: len(found)], rtol=0, atol=1e-12 * float(values[0])
        )
        assert (values[len(found) :] <= 1e-12 * values[0]).all()
        assert gradient.rank(rtol=RTOL) == int(torch.linalg.matrix_rank(dense, rtol=RTOL)), key


def test_decoding_one_head(pair: Case) -> None:
    tokens = pair.tokens(7)
    capture = attention_of(pair.model, tokens, next_token_loss())
    for key, by_head in autograd(pair.model, tokens, training_loss).items():
        for index, dense in enumerate(by_head):
            head = capture[key].head(index)
            assert (head.matrix, head.layer) == key
            assert head.inputs.shape == (1, 7, dense.shape[0])
            assert head.vjps.shape == (1, 7, dense.shape[1])
            assert head.n_heads is None
            assert relative_error(head.dense(), dense) <= EXACT
            assert relative_error(head.factored().AB, dense) <= EXACT
            values = torch.linalg.svdvals(dense)
            torch.testing.assert_close(
                head.singular_values(),
                values[: min(7, *dense.shape)],
                rtol=0,
                atol=1e-12 * float(values[0]),
            )
            assert head.rank(rtol=RTOL) == int(torch.linalg.matrix_rank(dense, rtol=RTOL))
            width = capture[key].head(0).dense().shape[0 if key[0] == "W_O" else 1]
            for unit in (0, width - 1):
                expected = dense[unit] if key[0] == "W_O" else dense[:, unit]
                assert relative_error(head.neuron(unit), expected) <= EXACT


def test_neurons_are_numbered_across_heads(pair: Case) -> None:
    tokens = pair.tokens(6)
    capture = attention_of(pair.model, tokens, next_token_loss())
    for key, by_head in autograd(pair.model, tokens, training_loss).items():
        dense = joined(by_head, key[0])
        neurons = dense if key[0] == "W_O" else dense.T
        for index in (0, 7, len(neurons) - 1):
            found = capture[key].neuron(index)
            assert found.shape == (pair.d_model,)
            assert relative_error(found, neurons[index]) <= EXACT
        with pytest.raises(InputError, match=rf"neuron {len(neurons)}.*0 to {len(neurons) - 1}"):
            capture[key].neuron(len(neurons))


def test_a_missing_head_is_refused(pair: Case) -> None:
    capture = capture_gradients(pair.model, pair.tokens(5), target_nll(TARGET), matrices="all")
    _, kv_heads, _ = HEADS[pair.name]
    for index in (kv_heads, -1, True, 0.0):
        with pytest.raises(InputError, match=rf"head {index!r}.*0 to {kv_heads - 1}"):
            capture["W_V", 0].head(index)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="W_out of layer 0 is not divided into heads"):
        capture["W_out", 0].head(0)
    with pytest.raises(InputError, match="not divided into heads"):
        capture["W_Q", 0].head(0).head(0)


def test_norms_are_over_all_heads(pair: Case) -> None:
    capture = attention_of(pair.model, pair.tokens(5, 5))
    for gradient in capture:
        for prompt in range(2):
            for pos in range(5):
                squares = sum(float(value) ** 2 for value in gradient.vjps[prompt, pos].flatten())
                assert float(gradient.norms[prompt, pos]) == pytest.approx(squares**0.5, abs=1e-15)


def test_where_a_position_adds_nothing(pair: Case) -> None:
    """The loss is on the last position; see `test_rank_laws` for the reasons."""
    capture = attention_of(pair.model, pair.tokens(5))
    last, others = pair.n_layers - 1, range(pair.n_layers - 1)
    assert capture["W_O", last].is_zero[0].tolist() == [True] * 4 + [False]
    assert capture["W_Q", last].is_zero[0].tolist() == [True] * 4 + [False]
    for layer in others:
        assert capture["W_Q", layer].is_zero[0].tolist() == [True] + [False] * 4
        assert not capture["W_O", layer].is_zero.any()
    for matrix in ("W_K", "W_V"):
        assert not any(capture[matrix, layer].is_zero.any() for layer in range(pair.n_layers))


def test_a_position_adds_nothing_only_if_none_of_its_heads_does(pair: Case) -> None:
    """The same for zero inputs: `z` of one head, and of all heads at one position."""

    def cut(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 1], value[:, 2] = 0, 0
        return value

    def without_choice(pattern: Tensor, hook: Any) -> Tensor:
        return torch.cat([pattern[:, :1], 0 * pattern[:, 1:2] + 0.1, pattern[:, 2:]], dim=1)

    at, tokens = "blocks.1.attn.hook", pair.tokens(5)
    with pair.model.hooks(fwd_hooks=[(f"{at}_z", cut), (f"{at}_pattern", without_choice)]):
        capture = attention_of(pair.model, tokens)
    written, queries = capture["W_O", 1], capture["W_Q", 1]
    assert not written.inputs[0, :, 1].any()
    assert written.vjps[0, 2].any()
    assert written.is_zero[0].tolist() == [False, False, True, False, False]
    assert not queries.vjps[0, :, 1].any()
    # Position 2 has no gradient at its z, and the first query never has one.
    assert queries.is_zero[0].tolist() == [True, False, True, False, False]


def test_bias_is_autograds_gradient_of_the_bias(pair: Case) -> None:
    """Attention and MLP, prompt by prompt."""
    tokens = pair.tokens(6, 6)
    biases = {
        key: (weight.bias, weight.bias_by_head)
        for key, weight in attention_weights(pair.model).items()
        if weight.bias is not None
    } | mlp_biases(pair.model)
    assert {matrix for matrix, _ in biases} >= {*READING, "W_O", "W_out"}
    capture = capture_gradients(pair.model, tokens, target_nll(TARGET), matrices="all")
    for prompt in range(2):
        alone = tokens[prompt : prompt + 1]
        gradients = torch.autograd.grad(
            loss_of(pair.model, alone, nll(TARGET)), [bias for bias, _ in biases.values()]
        )
        for (key, (_, by_head)), gradient in zip(biases.items(), gradients, strict=True):
            found, expected = capture[key].bias(prompt), by_head(gradient)
            assert found.shape == expected.shape
            # Absolute: the bias gradient of unrotated keys is zero (see below).
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def mlp_biases(model: Any) -> dict[Key, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    def unchanged(tensor: Tensor) -> Tensor:
        return tensor

    found = {}
    for layer, block in enumerate(model.blocks):
        if hasattr(model, "original_model"):
            for matrix, name in {"W_in": "in", "W_gate": "gate", "W_out": "out"}.items():
                if (projection := getattr(block.mlp, name, None)) is not None:
                    found[matrix, layer] = (projection.original_component.bias, unchanged)
        else:
            # A gated MLP adds `b_in` to the output of the gate: it is not a bias of `W_in`.
            if not model.cfg.gated_mlp:
                found["W_in", layer] = (block.mlp.b_in, unchanged)
            found["W_out", layer] = (block.mlp.b_out, unchanged)
    return found


@hooked_only
@pytest.mark.parametrize(("matrix", "point"), [("W_gate", "hook_pre"), ("W_in", "hook_pre_linear")])
def test_bias_of_a_layer_without_one_is_the_gradient_at_zero(matrix: str, point: str) -> None:
    """HookedTransformer's gated MLP has no bias on either matrix: a hook adds a zero bias."""
    case = build("hooked-llama")
    tokens = case.tokens(6)
    zero = torch.zeros(52, dtype=torch.float64, requires_grad=True)
    hook = (f"blocks.1.mlp.{point}", lambda value, hook: value + zero)
    with case.model.hooks(fwd_hooks=[hook]):
        (expected,) = torch.autograd.grad(loss_of(case.model, tokens, nll(TARGET)), zero)
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices=matrix)
    assert relative_error(capture[matrix, 1].bias(), expected) <= EXACT


# -------------------------------------------------------------------- flags of TransformerLens


def edit_head(head: int) -> Callable[[Tensor, Any], Tensor]:
    """Patch one head only, at a tensor `[batch, pos, head, ...]`."""

    def patch(value: Tensor, hook: Any) -> Tensor:
        assert value.ndim == 4
        edited = value.clone()
        edited[:, :, head] = 1.3 * value[:, :, head] + 0.2 * value[:, :, head].roll(1, -1) + 0.05
        return edited

    return patch


SPLIT, ATTN_IN, RESULT, UNGROUP = (
    "use_split_qkv_input",
    "use_attn_in",
    "use_attn_result",
    "ungroup_grouped_query_attention",
)
FLAGS: list[tuple[str, tuple[str, ...], str | None, tuple[str, ...]]] = [
    # the model, its flags, the patched hook point of layer 1, the matrices whose heads then differ
    ("gpt2", (SPLIT,), "hook_q_input", ("W_Q",)),
    ("gpt2", (SPLIT,), "hook_k_input", ("W_K",)),
    ("gpt2", (SPLIT,), "hook_v_input", ("W_V",)),
    ("gpt2", (ATTN_IN,), None, ()),
    ("gpt2", (ATTN_IN,), "hook_attn_in", READING),
    ("gpt2", (RESULT,), "attn.hook_result", ("W_O",)),
    ("gpt2", (SPLIT, RESULT), "hook_k_input", ("W_K",)),
    ("gpt2", (SPLIT, ATTN_IN), "hook_v_input", ("W_V",)),
    ("llama", (SPLIT,), None, ()),
    ("llama", (SPLIT,), "hook_q_input", ("W_Q",)),
    ("llama", (SPLIT,), "hook_k_input", ("W_K",)),
    ("llama", (SPLIT,), "hook_v_input", ("W_V",)),
    ("llama", (RESULT,), "attn.hook_result", ("W_O",)),
    ("llama", (UNGROUP,), "attn.hook_k", ()),  # after the matrix: the heads' deltas are summed
    ("llama", (UNGROUP,), "attn.hook_v", ()),
    ("llama", (UNGROUP, SPLIT), "hook_q_input", ("W_Q",)),
    ("llama", (UNGROUP, SPLIT, RESULT), "attn.hook_result", ("W_O",)),
]


Flagged = Callable[[str, tuple[str, ...]], Case]


@pytest.fixture
def flagged() -> Iterator[Flagged]:
    """Switch on flags of a shared model until the test ends."""
    with ExitStack() as stack:

        def switch_on(name: str, flags: tuple[str, ...]) -> Case:
            case = shared_case(name)
            for flag in flags:
                switch = getattr(case.model, f"set_{flag}")
                stack.callback(switch, False)
                switch(True)
            return case

        yield switch_on


@hooked_only
@pytest.mark.parametrize(
    ("name", "flags", "point", "differing"),
    FLAGS,
    ids=[f"{name}-{'+'.join(flags)}-{point}" for name, flags, point, _ in FLAGS],
)
def test_flags_of_a_hooked_transformer(
    flagged: Flagged,
    name: str,
    flags: tuple[str, ...],
    point: str | None,
    differing: tuple[str, ...],
) -> None:
    """With a caller's patch of one head, the gradient is that of the patched model."""
    case = flagged(f"hooked-{name}", flags)
    n_heads, kv_heads, _ = HEADS[name]
    tokens = case.tokens(7, 7)
    hooks = [] if point is None else [(f"blocks.1.{point}", edit_head(1))]
    plain = loss_of(case.model, tokens, nll(TARGET)).item()
    with case.model.hooks(fwd_hooks=hooks):
        patched = loss_of(case.model, tokens, nll(TARGET)).item()
        expected = autograd(case.model, tokens, nll(TARGET))
        capture = attention_of(case.model, tokens)
    assert (patched == plain) == (point is None)
    assert float(capture.loss.sum()) == pytest.approx(patched, rel=1e-13)
    found = errors(capture, expected)
    assert all(error <= EXACT for error in found.values()), found
    for gradient in capture:
        heads = gradient.layer == 1 and gradient.matrix in differing
        for factor, is_divided in (
            (gradient.inputs, gradient.matrix == "W_O" or heads),
            (gradient.vjps, gradient.matrix != "W_O" or heads),
        ):
            assert factor.ndim == (4 if is_divided else 3), (gradient, point)
        assert gradient.n_heads == (kv_heads if gradient.matrix in ("W_K", "W_V") else n_heads)


@hooked_only
@pytest.mark.parametrize(
    ("name", "flags", "point", "matrix"),
    [
        ("gpt2", (SPLIT,), "hook_q_input", "W_Q"),
        ("llama", (SPLIT,), "hook_k_input", "W_K"),
        ("gpt2", (RESULT,), "attn.hook_result", "W_O"),
    ],
)
def test_heads_that_differ_at_the_stream_are_decoded_separately(
    flagged: Flagged, name: str, flags: tuple[str, ...], point: str, matrix: str
) -> None:
    case = flagged(f"hooked-{name}", flags)
    tokens = case.tokens(6)
    with case.model.hooks(fwd_hooks=[(f"blocks.1.{point}", edit_head(1))]):
        expected = autograd(case.model, tokens, nll(TARGET))[matrix, 1]
        gradient = attention_of(case.model, tokens)[matrix, 1]
    for read in (
        lambda: gradient.spanning_set,
        lambda: gradient.factored(),
        lambda: gradient.rank(),
        lambda: gradient.neuron(0),
    ):
        with pytest.raises(InputError, match=r"head"):
            read()
    by_head = []
    for index, dense in enumerate(expected):
        head = gradient.head(index)
        assert relative_error(head.dense(), dense) <= EXACT
        assert relative_error(head.factored().AB, dense) <= EXACT
        by_head.append(head.spanning_set)
    assert not torch.equal(by_head[0], by_head[1])
    assert len(by_head) == 2 or torch.equal(by_head[0], by_head[2])


@hooked_only
def test_bias_under_a_patch_of_hook_result_is_its_gradient_or_refused(flagged: Flagged) -> None:
    """`b_O` is added after the sum over heads, so the heads' deltas do not give its gradient."""
    case = flagged("hooked-gpt2", (RESULT,))
    tokens = case.tokens(6)
    bias = attention_weights(case.model)["W_O", 1].bias
    with case.model.hooks(fwd_hooks=[("blocks.1.attn.hook_result", edit_head(1))]):
        (expected,) = torch.autograd.grad(loss_of(case.model, tokens, nll(TARGET)), [bias])
        gradient = attention_of(case.model, tokens)["W_O", 1]
    # All heads share one bias, and the patched head's VJPs are not its gradient.
    try:
        found = gradient.bias()
    except BackwardLensError:
        return
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= EXACT


@hooked_only
@pytest.mark.parametrize(("point", "matrix"), [("hook_k_input", "W_K"), ("hook_v_input", "W_V")])
def test_heads_that_share_a_weight_but_not_inputs_are_refused(
    flagged: Flagged, point: str, matrix: str
) -> None:
    case = flagged("hooked-llama", (UNGROUP, SPLIT))
    tokens = case.tokens(6)
    with (
        case.model.hooks(fwd_hooks=[(f"blocks.1.{point}", edit_head(1))]),
        pytest.raises(UnsupportedModelError, match=rf"share one {matrix} in layer 1.*{UNGROUP}"),
    ):
        attention_of(case.model, tokens)
    # The same patch on all heads that share the weight is allowed.
    with case.model.hooks(fwd_hooks=[(f"blocks.1.{point}", lambda value, hook: 1.2 * value + 0.1)]):
        found = errors(attention_of(case.model, tokens), autograd(case.model, tokens, nll(TARGET)))
    assert all(error <= EXACT for error in found.values()), found


@pytest.mark.parametrize("point", [None, "attn.hook_result"])
@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama"])
def test_a_bridge_may_show_the_result_of_each_head(
    flagged: Flagged, name: str, point: str | None
) -> None:
    case = flagged(name, (RESULT,))
    tokens = case.tokens(7, 7)
    hooks = [] if point is None else [(f"blocks.1.{point}", edit_head(1))]
    plain = loss_of(case.model, tokens, nll(TARGET)).item()
    with case.model.hooks(fwd_hooks=hooks):
        assert (loss_of(case.model, tokens, nll(TARGET)).item() == plain) == (point is None)
        found = errors(attention_of(case.model, tokens), autograd(case.model, tokens, nll(TARGET)))
    assert all(error <= EXACT for error in found.values()), found


@pytest.mark.parametrize("flag", [SPLIT, ATTN_IN])
@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama"])
def test_a_bridge_with_inputs_by_head_is_refused(flagged: Flagged, name: str, flag: str) -> None:
    case = flagged(name, (flag,))
    with pytest.raises(UnsupportedModelError, match=rf"{flag}.*switch both off"):
        attention_of(case.model, case.tokens(5))
    # Its MLPs can still be read, and attention again without the flag.
    tokens = case.tokens(5)
    capture = capture_gradients(case.model, tokens, target_nll(TARGET), matrices="mlp")
    assert capture["W_out", 0].vjps.any()
    getattr(case.model, f"set_{flag}")(False)
    found = errors(attention_of(case.model, tokens), autograd(case.model, tokens, nll(TARGET)))
    assert all(error <= EXACT for error in found.values()), found


# ------------------------------------------------------------------------------- a caller's patches


def replaced(value: Tensor, hook: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(value.shape, generator=generator, dtype=value.dtype)


def scaled(value: Tensor, hook: Any) -> Tensor:
    return 1.3 * value + 0.1


def in_place(value: Tensor, hook: Any) -> Tensor:
    value[:, 2] = 0.25
    return value


PATCHES = [
    ("hook_resid_pre", replaced),
    ("attn.hook_q", scaled),
    ("attn.hook_k", replaced),
    ("attn.hook_v", scaled),
    ("attn.hook_v", in_place),
    ("attn.hook_z", scaled),
    ("attn.hook_z", in_place),
    ("attn.hook_pattern", replaced),
    ("hook_attn_out", scaled),
]


@pytest.mark.parametrize(
    ("point", "patch"), PATCHES, ids=[f"{point}-{patch.__name__}" for point, patch in PATCHES]
)
def test_attention_of_a_patched_model(pair: Case, point: str, patch: Callable) -> None:
    """A patch in the middle layer; the gradients are autograd's on the patched model."""
    tokens = pair.tokens(6)
    plain = loss_of(pair.model, tokens, nll(TARGET)).item()
    trained = [p for p in pair.model.parameters() if p.requires_grad]
    with pair.model.hooks(fwd_hooks=[(f"blocks.1.{point}", patch)]):
        patched = loss_of(pair.model, tokens, nll(TARGET)).item()
        expected = autograd(pair.model, tokens, nll(TARGET))
        captures = [attention_of(pair.model, tokens)]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            captures.append(attention_of(pair.model, tokens))
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
    assert patched != pytest.approx(plain, rel=1e-6)
    for capture in captures:
        assert float(capture.loss) == pytest.approx(patched, rel=1e-12)
        found = errors(capture, expected)
        assert all(error <= EXACT for error in found.values()), found


@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
def test_plain_torch_hooks_on_attention_take_effect(pair: Case, freeze: bool) -> None:
    """Hooks on modules: the input as the matrix reads it, its output before the caller's hook."""

    def scaled_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return 1.3 * output + torch.linspace(0, 0.3, output.shape[-1], dtype=output.dtype)

    def scaled_input(module: nn.Module, args: tuple) -> tuple:
        return (0.7 * args[0] + 0.2 * args[0].roll(1, -1), *args[1:])

    attn, tokens = pair.model.blocks[1].attn, pair.tokens(6)
    plain = loss_of(pair.model, tokens, nll(TARGET)).item()
    if hasattr(pair.model, "original_model"):
        modules = [getattr(attn, name).original_component for name in "qkvo"]
        attn_output = []
    else:
        modules = [attn.hook_q, attn.hook_k, attn.hook_v, attn.hook_z]
        attn_output = [attn]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(scaled_input).remove)
        for module in [*modules, *attn_output]:
            stack.callback(module.register_forward_hook(scaled_output).remove)
        patched = loss_of(pair.model, tokens, nll(TARGET)).item()
        expected = autograd(pair.model, tokens, nll(TARGET))
        trained = [p for p in pair.model.parameters() if p.requires_grad] if freeze else []
        for parameter in trained:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        capture = attention_of(pair.model, tokens)
    assert patched != pytest.approx(plain, rel=1e-6)
    assert float(capture.loss) == pytest.approx(patched, rel=1e-12)
    found = errors(capture, expected)
    assert all(error <= EXACT for error in found.values()), found


# --------------------------------------------------------------------------------------- rank laws
#
# A prompt of n different tokens, random weights, the loss on the last position only, and attention
# from the softmax alone (no sinks). Heads are concatenated; `.head` has the laws of one head.
#
# | matrix | last layer                          | earlier layers                            |
# |--------|-------------------------------------|-------------------------------------------|
# | W_O    | 1                                   | n                                         |
# | W_Q    | 1 (0 for n = 1)                     | n - 1                                     |
# | W_V    | min(n, n_heads)                     | min(n, n_kv_heads * d_head)               |
# | W_K    | min(n - 1, n_heads)                 | n - 1                                     |
# |  rotary| min(n, n_kv_heads * d_head)         | min(n, n_kv_heads * d_head)               |
#
# always bounded by the sides of the matrix, and 0 for both W_Q and W_K where n = 1. Why:
#
# - W_O: X^T Delta over n positions; in the last layer only the last position's delta is not zero.
# - W_Q: delta at query i is sum_j ds_ij k_j / sqrt(d_head), and sum_j ds_ij = 0 after a softmax.
#   The first query sees only itself, so its one ds is zero in every layer: n - 1. In the last
#   layer only the last query matters.
# - W_V: in the last layer delta at key j is A_nj dz_n, head by head: a multiple, per head, of one
#   vector, so all n deltas lie in the span of n_heads vectors; per key-value head, in that of its
#   group's.
# - W_K: in the last layer delta at key j is ds_nj q_n: again n_heads vectors. Because
#   sum_j ds_nj = 0 the deltas of all keys add up to zero, in every layer, so there is one less
#   than n (and the gradient of b_K is zero).
#   Rotary models turn each q by the distance to j: the vectors are different for each j, and
#   neither the bound by heads nor the sum to zero is left.


def expected_ranks(architecture: str, n: int, n_layers: int) -> dict[Key, int]:
    n_heads, kv_heads, d_head = HEADS[architecture]
    rotary = architecture == "llama"
    wide = kv_heads * d_head
    ranks: dict[Key, int] = {}
    for layer in range(n_layers):
        last = layer == n_layers - 1
        ranks["W_O", layer] = 1 if last else n
        ranks["W_Q", layer] = min(n - 1, 1) if last else n - 1
        ranks["W_V", layer] = min(n, n_heads) if last else min(n, wide)
        if rotary:
            ranks["W_K", layer] = min(n, wide) if n > 1 else 0
        else:
            ranks["W_K", layer] = min(n - 1, n_heads) if last else n - 1
    return ranks


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_rank_laws(pair: Case, n: int) -> None:
    """Check the table above; 20 tokens exceed the 12 dimensions of grouped keys and values."""
    tokens = distinct(n)
    expected = expected_ranks(pair.name, n, pair.n_layers)
    capture = attention_of(pair.model, tokens)
    assert {key: capture[key].rank(rtol=RTOL) for key in expected} == expected
    for key, by_head in autograd(pair.model, tokens, nll(TARGET)).items():
        values, rank = torch.linalg.svdvals(joined(by_head, key[0])), expected[key]
        assert (values > RTOL * values[0]).sum() == rank, key
        # Singular values and rounding are orders of magnitude apart.
        if rank > 0:
            assert values[rank - 1] > 1e-8 * values[0], key
            assert (values[rank:] < 1e-12 * values[0]).all(), key


@pytest.mark.parametrize("n", [5, 9])
def test_rank_laws_of_one_head_in_the_last_layer(pair: Case, n: int) -> None:
    """Values: the heads of the group; keys: the same, but n where q is rotated."""
    n_heads, kv_heads, d_head = HEADS[pair.name]
    group = n_heads // kv_heads
    capture, last = attention_of(pair.model, distinct(n)), pair.n_layers - 1
    keys = min(n, d_head) if pair.name == "llama" else group
    expected = {"W_Q": 1, "W_K": keys, "W_V": group, "W_O": 1}
    for matrix, rank in expected.items():
        gradient = capture[matrix, last]
        heads = [gradient.head(head).rank(rtol=RTOL) for head in range(gradient.n_heads or 0)]
        assert heads == [rank] * len(heads), matrix
        assert len(heads) == (kv_heads if matrix in ("W_K", "W_V") else n_heads)


@pytest.mark.parametrize("n", [5, 9])
def test_a_loss_at_every_position_raises_the_ranks_of_the_last_layer(pair: Case, n: int) -> None:
    """Negative control: n - 1 positions have a next token, and each adds its own query."""
    _, kv_heads, d_head = HEADS[pair.name]
    wide, last = kv_heads * d_head, pair.n_layers - 1
    capture = attention_of(pair.model, distinct(n), next_token_loss())
    found = {matrix: capture[matrix, last].rank(rtol=RTOL) for matrix in MATRICES}
    expected = {
        "W_Q": n - 2,  # the first query still sees only one key
        "W_K": min(n - 1, wide) if pair.name == "llama" else n - 2,
        "W_V": min(n - 1, wide),
        "W_O": n - 1,
    }
    assert found == expected
    at_last_position = expected_ranks(pair.name, n, pair.n_layers)
    assert any(rank > at_last_position[matrix, last] for matrix, rank in found.items())
    assert capture["W_Q", last].is_zero[0].tolist() == [True] + [False] * (n - 2) + [True]


def test_the_first_query_has_no_gradient_in_any_layer(pair: Case) -> None:
    """It sees one key, and a softmax over one score is constant."""
    for objective in (target_nll(TARGET), next_token_loss()):
        capture = attention_of(pair.model, pair.tokens(6, 6), objective)
        for layer in range(pair.n_layers):
            assert not capture["W_Q", layer].vjps[:, 0].any()
            assert capture["W_V", layer].vjps[:, 0].any()
            assert capture["W_K", layer].vjps[:, 0].any()


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_attention_sinks_give_the_first_query_a_gradient(kind: str) -> None:
    """Negative control: with a sink in the softmax one key competes with it."""
    try:
        model = build_model("gpt_oss", kind)
    except NotAvailable as reason:
        pytest.skip(str(reason))
    capture = attention_of(model, distinct(6))
    assert capture["W_Q", 0].vjps[:, 0].abs().max() > 1e-5
    assert capture["W_Q", 0].rank(rtol=1e-5) == 6  # the sink is in float32


def test_deltas_of_keys_add_up_to_zero_unless_they_are_rotated(pair: Case) -> None:
    """So `b_K` has no gradient in GPT-2: it shifts all scores of a query equally."""
    capture = attention_of(pair.model, pair.tokens(8), next_token_loss())
    for layer in range(pair.n_layers):
        gradient = capture["W_K", layer]
        share = float(gradient.bias().norm() / gradient.vjps.norm())
        assert share > 1e-2 if pair.name == "llama" else share < 1e-12


def test_repeated_tokens_lower_the_rank_in_the_first_layer_of_rotary_models(pair: Case) -> None:
    """Its inputs depend only on the token; GPT-2 adds an embedding of the position."""
    tokens = distinct(4)[:, [0, 1, 2, 3, 1, 0, 1, 2, 3]]
    capture = attention_of(pair.model, tokens)
    ranks = {matrix: capture[matrix, 0].rank(rtol=RTOL) for matrix in MATRICES}
    if pair.name == "llama":
        assert ranks == {"W_Q": 4, "W_K": 4, "W_V": 4, "W_O": 9}
        assert {capture[matrix, 1].rank(rtol=RTOL) for matrix in ("W_K", "W_V")} == {9}
    else:
        assert ranks == {"W_Q": 8, "W_K": 8, "W_V": 9, "W_O": 9}


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2", "hooked-no_norm"])
def test_layer_norm_removes_one_dimension_from_deltas(name: str) -> None:
    """Where every reader of the stream subtracts its mean, no delta of `W_O` has one."""
    case = build(name)
    n = 30
    capture = attention_of(case.model, distinct(n))
    gradient = capture["W_O", 0]
    means = float(gradient.vjps.mean(-1).abs().max() / gradient.vjps.abs().max())
    if name.endswith("gpt2"):
        assert means < 1e-13
        assert gradient.rank(rtol=RTOL) == case.d_model - 1
    else:
        assert means > 1e-3
        assert gradient.rank(rtol=RTOL) == case.d_model


# ----------------------------------------------------------------------------- lemmas 5.1 and 5.2


def at_hook(model: Any, name: str, tokens: Tensor) -> Tensor:
    """An activation as in TransformerLens's cache."""
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=name)[1][name].clone()


@contextmanager
def step_of_sgd(model: Any, key: Key, eta: float, tokens: Tensor) -> Iterator[None]:
    """A real step on one matrix, then undone."""
    weight = attention_weights(model)[key].parameter
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=eta)
    loss_of(model, tokens, nll(TARGET)).backward(inputs=[weight])
    optimizer.step()
    weight.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


OUTPUT_POINTS = {"W_Q": "hook_q", "W_K": "hook_k", "W_V": "hook_v"}


@pytest.mark.parametrize("matrix", READING)
def test_a_step_imprints_the_inputs_on_queries_keys_and_values(pair: Case, matrix: str) -> None:
    """Same prompt, one step: `q(x)` of head h moves by `-eta sum_i (x . x_i) delta_i[h]`.

    Exactly, because queries are linear in the matrix and the layers below do not change.
    """
    eta, layer, tokens = 0.05, 1, pair.tokens(6)
    gradient = attention_of(pair.model, tokens)[matrix, layer]
    name = f"blocks.{layer}.attn.{OUTPUT_POINTS[matrix]}"
    before = at_hook(pair.model, name, tokens)
    with step_of_sgd(pair.model, (matrix, layer), eta, tokens):
        change = at_hook(pair.model, name, tokens) - before
    predicted = torch.zeros_like(change)
    for here in range(6):
        for i in range(6):
            similarity = float(gradient.inputs[0, here] @ gradient.inputs[0, i])
            for head in range(change.shape[2]):
                predicted[0, here, head] -= eta * similarity * gradient.vjps[0, i, head]
    # The difference of two numbers of order 1, rounded at 1e-16.
    assert relative_error(change, predicted) <= 1e-11
    assert relative_error(-change, predicted) > 1


def test_a_step_shifts_the_attention_output(pair: Case) -> None:
    """`attn_out(z)` moves by `-eta sum_i (z . z_i) delta_i`, over all heads together."""
    eta, layer, tokens = 0.05, 1, pair.tokens(6)
    gradient = attention_of(pair.model, tokens)["W_O", layer]
    name = f"blocks.{layer}.hook_attn_out"
    before = at_hook(pair.model, name, tokens)
    with step_of_sgd(pair.model, ("W_O", layer), eta, tokens):
        change = at_hook(pair.model, name, tokens) - before
    predicted = torch.zeros_like(change)
    for here in range(6):
        for i in range(6):
            similarity = float((gradient.inputs[0, here] * gradient.inputs[0, i]).sum())
            predicted[0, here] -= eta * similarity * gradient.vjps[0, i]
    assert relative_error(change, predicted) <= 1e-11
    # It is the shift of lemma 5.2: each position's own term points against its delta.
    assert float((gradient.inputs[0, 5] ** 2).sum()) > 0


def test_a_single_position_moves_against_its_own_delta(pair: Case) -> None:
    """With one token the factor is `||x||^2`; its query and key get no gradient."""
    tokens, layer, eta = pair.tokens(1), 1, 0.05
    capture = attention_of(pair.model, tokens)
    for matrix, point in (("W_V", "attn.hook_v"), ("W_O", "hook_attn_out")):
        gradient, name = capture[matrix, layer], f"blocks.{layer}.{point}"
        before = at_hook(pair.model, name, tokens)
        with step_of_sgd(pair.model, (matrix, layer), eta, tokens):
            change = at_hook(pair.model, name, tokens) - before
        expected = -eta * float((gradient.inputs**2).sum()) * gradient.vjps
        assert relative_error(change, expected) <= 1e-11
    for matrix in ("W_Q", "W_K"):
        gradient, name = capture[matrix, layer], f"blocks.{layer}.attn.{OUTPUT_POINTS[matrix]}"
        before = at_hook(pair.model, name, tokens)
        with step_of_sgd(pair.model, (matrix, layer), eta, tokens):
            assert torch.equal(at_hook(pair.model, name, tokens), before)
        assert gradient.is_zero.all()


@pytest.mark.parametrize("pair", ["bridge-gpt2", "hooked-llama"], indirect=True)
def test_the_loss_falls_by_the_squared_norm_to_first_order(pair: Case) -> None:
    """The rest is second order: half the step leaves a quarter of the error."""
    tokens = pair.tokens(6)
    capture = attention_of(pair.model, tokens)
    # Hugging Face computes Llama's norms in float32: use larger steps, check first order only.
    scale = 1e-2 if pair.logits_in_float32 else 4e-4
    with torch.no_grad():
        before = loss_of(pair.model, tokens, nll(TARGET)).item()
    for key, gradient in capture.gradients.items():
        squared_norm = float((gradient.singular_values() ** 2).sum())
        remainders = []
        for eta in (scale / squared_norm, scale / 2 / squared_norm):
            with step_of_sgd(pair.model, key, eta, tokens), torch.no_grad():
                change = loss_of(pair.model, tokens, nll(TARGET)).item() - before
            assert change == pytest.approx(-eta * squared_norm, rel=0.1), key
            remainders.append(change + eta * squared_norm)
        if not pair.logits_in_float32:
            assert remainders[0] / remainders[1] == pytest.approx(4, rel=0.1), key


def test_the_first_vjp_of_attention_is_the_combination_of_embeddings() -> None:
    """Lemma 5.1 for a model that ends with attention and has no norm: delta of the last `W_O`."""
    case = build("hooked-no_norm")
    tokens, last = case.tokens(6), case.n_layers - 1
    block = case.model.blocks[last]
    for parameter in (block.mlp.W_out, block.mlp.b_out):  # the last MLP outputs zero
        parameter.data.zero_()
    with torch.no_grad():
        p = case.model(tokens)[0, -1].softmax(-1)
    expected = torch.zeros(case.d_model, dtype=torch.float64)
    for token in range(case.d_vocab):
        expected += (float(p[token]) - (token == TARGET)) * case.model.W_U[:, token].detach()
    delta = attention_of(case.model, tokens)["W_O", last].vjps[0]
    # 97 terms of size 1 in float64.
    torch.testing.assert_close(delta[-1], expected, rtol=1e-12, atol=1e-13)
    assert not delta[:-1].any()


def test_an_mlp_after_attention_breaks_the_combination() -> None:
    """Negative control."""
    case = build("hooked-no_norm")
    tokens, last = case.tokens(6), case.n_layers - 1
    with torch.no_grad():
        p = case.model(tokens)[0, -1].softmax(-1)
    p[TARGET] -= 1
    delta = attention_of(case.model, tokens)["W_O", last].vjps[0, -1]
    assert relative_error(delta, case.model.W_U.detach() @ p) > 0.05


def test_write_norms_of_heads(pair: Case) -> None:
    """Heads divide one factor; all blocks of a position's term together."""
    capture = capture_gradients(pair.model, pair.tokens(5, 5), target_nll(7), matrices="attn")
    for gradient in capture:
        terms = gradient.inputs.flatten(2)[..., None] * gradient.vjps.flatten(2)[:, :, None]
        torch.testing.assert_close(gradient.write_norms, terms.flatten(2).norm(dim=-1))
