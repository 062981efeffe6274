"""Every matrix of every architecture, in both classes, against autograd's weight gradient.

`architecture_table.py` finds the weights and computes the expected values without the package. The
measurements are those of docs/architectures.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from typing import Any

import architecture_table
import pytest
import torch
from architecture_table import (
    DTYPES,
    N_LAYERS,
    TOLERANCES,
    Cells,
    errors,
    expert_slice,
    find_weight,
    keys_of,
    largest_errors,
    loss,
    matrices_of,
    prompts,
    read_parts,
    rounded_up,
    summed,
    weight_gradients,
)
from architectures import FAMILIES, KINDS, NotAvailable, build_model
from models import HAS_BRIDGE, HAS_HOOKED, NO_BRIDGE, NO_HOOKED, relative_error
from torch import Tensor

from backward_lens_tl import GradientCapture, backward_lens, capture_gradients

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("as_for_a_user")]

TRANSFORMER_LENS = version("transformer-lens")
MAJOR = int(TRANSFORMER_LENS.partition(".")[0])

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
NORM_AFTER = ("gemma2", "gemma3", "olmo2")
"""Families with a norm between attention or MLP and the residual stream."""

# ---------------------------------------------------------------------------------- expected values

# Families without a HookedTransformer, and TransformerLens's message.
NOT_HOOKED = {
    **dict.fromkeys(("falcon", "falcon_new", "falcon_alibi"), "FalconForCausalLM is not currently"),
    "stablelm": "StableLmForCausalLM is not currently supported",
    "qwen2_moe": "Qwen2MoeForCausalLM is not currently supported",
    "qwen3_moe": "Qwen3MoeForCausalLM is not currently supported",
}
NOT_HOOKED_IN_2 = {
    "olmo2": "Olmo2ForCausalLM is not currently supported",
    "gpt_oss": "unexpected keyword argument 'use_attention_sinks'",
}
# Families that weight processing leaves with two dtypes if the model is float64.
MIXED_DTYPES_IN_3 = ("gpt_neo", "gptj", "falcon_new", "qwen2", "stablelm", "qwen2_moe")


def unavailable(family: str, kind: str, dtype: str) -> str | None:
    """Reason why a model is unavailable. In all other models every matrix must have a number."""
    if kind.startswith("hooked"):
        lacking = NOT_HOOKED | (NOT_HOOKED_IN_2 if MAJOR == 2 else {})
        return lacking.get(family) if HAS_HOOKED else NO_HOOKED
    if not HAS_BRIDGE:
        return NO_BRIDGE
    mixed = MAJOR == 3 and kind == "bridge-compat" and family in MIXED_DTYPES_IN_3
    return "biases in float32" if mixed and dtype == "float64" else None


def models(families: Any = FAMILIES, kinds: Any = KINDS) -> Any:
    """Parametrise a test with every available model."""
    there = [pair for pair in product(families, kinds) if not unavailable(*pair, "float32")]
    return pytest.mark.parametrize(("family", "kind"), there)


def precision(family: str, kind: str) -> str:
    """The highest precision of a model."""
    return "float32" if unavailable(family, kind, "float64") else "float64"


# ------------------------------------------------------------------------------------- measurements

model_of = functools.cache(build_model)


@functools.cache
def captured(family: str, kind: str) -> GradientCapture:
    return capture_gradients(model_in(family, kind), prompts(), loss, matrices="all")


@dataclass(frozen=True)
class PlainRun:
    """One pass of the model without the package, with autograd's gradients.

    Attributes:
        gradients: By id, of every parameter and matrix used.
        at_joins: Where attention and MLP are added to the residual stream, `[batch, pos, d]`.
    """

    gradients: dict[int, Tensor]
    at_joins: dict[tuple[str, int], Tensor]


JOINS = {"W_O": "hook_attn_out", "W_out": "hook_mlp_out"}


@functools.cache
def plain_run(family: str, kind: str) -> PlainRun:
    model, joins = model_in(family, kind), list(product(JOINS, range(N_LAYERS)))
    tensors = list(named_parameters(model).values())
    # They include copies of processed weights, which are not parameters.
    for key in keys_of(matrices_of(family)):
        tensors += [tensor.requires_grad_() for tensor in find_weight(model, family, *key).tensors]
    by_id = {id(tensor): tensor for tensor in tensors}
    outputs: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int], module: Any, args: Any, output: Tensor) -> None:
        outputs[key] = output

    handles = [
        model.hook_dict[f"blocks.{layer}.{JOINS[matrix]}"].register_forward_hook(
            functools.partial(keep, (matrix, layer))
        )
        for matrix, layer in joins
    ]
    total = loss(model(prompts()), prompts()).sum()
    for handle in handles:
        handle.remove()
    asked = [*by_id.values(), *(outputs[key] for key in joins)]
    found = torch.autograd.grad(total, asked, allow_unused=True)
    own, joined = found[: len(by_id)], found[len(by_id) :]
    return PlainRun(
        {key: g for key, g in zip(by_id, own, strict=True) if g is not None},
        {key: g.view(*prompts().shape, -1) for key, g in zip(joins, joined, strict=True)},
    )


@functools.cache
def expected_gradients(family: str, kind: str) -> dict[tuple[str, int], Tensor]:
    """Autograd's gradients in the layout of the factors' product."""
    run, expected = plain_run(family, kind), {}
    for key in keys_of(matrices_of(family)):
        weight = find_weight(model_in(family, kind), family, *key)
        # An expert without tokens is not in the graph. Neither is a weight that was looked
        # up in the wrong place, but then the error is infinite or NaN.
        own = [run.gradients.get(id(each), torch.zeros_like(each)) for each in weight.tensors]
        expected[key] = weight.turn(*own)
    return expected


@functools.cache
def measured(family: str, kind: str) -> Cells:
    return largest_errors(captured(family, kind), expected_gradients(family, kind))


@functools.cache
def measured_in_float32(family: str, kind: str) -> Cells:
    cells = architecture_table.measure(family, kind, "float32")
    assert not isinstance(cells, str), cells
    return cells


def model_in(family: str, kind: str) -> Any:
    return model_of(family, kind, DTYPES[precision(family, kind)])


def tolerance_of(family: str, kind: str) -> float:
    return TOLERANCES[precision(family, kind)]


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    caches = (model_of, captured, plain_run, expected_gradients, measured, measured_in_float32)
    for kept in caches:
        kept.cache_clear()


# -------------------------------------------------------------------------------------- the table


@models()
def test_every_matrix_is_autograds_gradient(family: str, kind: str) -> None:
    capture = captured(family, kind)
    assert capture.matrices == matrices_of(family)
    assert capture.layers == tuple(range(N_LAYERS))
    cells = measured(family, kind)
    assert outcomes(cells) == dict.fromkeys(matrices_of(family), "a number")
    assert all(error <= tolerance_of(family, kind) for error in cells.values()), cells


@models()
def test_page_has_the_same_outcomes(family: str, kind: str) -> None:
    page = on_the_page(family, kind, precision(family, kind))
    assert outcomes(measured(family, kind)) == outcomes(page)


UNAVAILABLE = pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [model for model in product(FAMILIES, KINDS, DTYPES) if unavailable(*model)],
)


@functools.cache
def refusal(family: str, kind: str, dtype: str) -> str:
    with pytest.raises(NotAvailable) as raised:
        build_model(family, kind, DTYPES[dtype])
    return str(raised.value)


@UNAVAILABLE
def test_an_unavailable_model_has_a_reason(family: str, kind: str, dtype: str) -> None:
    assert str(unavailable(family, kind, dtype)) in refusal(family, kind, dtype)


@UNAVAILABLE
def test_page_has_the_reason(family: str, kind: str, dtype: str) -> None:
    assert on_the_page(family, kind, dtype) == refusal(family, kind, dtype)


@pytest.mark.slow  # float64 covers every model, float32 only these
@models()
def test_every_matrix_in_float32(family: str, kind: str) -> None:
    cells = measured_in_float32(family, kind)
    assert outcomes(cells) == dict.fromkeys(matrices_of(family), "a number")
    assert all(error <= TOLERANCES["float32"] for error in cells.values()), cells


@pytest.mark.slow
@models()
def test_page_has_the_same_outcomes_in_float32(family: str, kind: str) -> None:
    page = on_the_page(family, kind, "float32")
    assert outcomes(measured_in_float32(family, kind)) == outcomes(page)


def on_the_page(family: str, kind: str, dtype: str) -> Cells | str:
    """Committed measurements for the installed TransformerLens."""
    for part in parts():
        if part["versions"]["transformer-lens"] == TRANSFORMER_LENS:
            return architecture_table.cells_of(part, family, kind, dtype)
    return pytest.skip(f"no measurements for TransformerLens {TRANSFORMER_LENS}")


@pytest.mark.parametrize("part", [part["versions"]["transformer-lens"] for part in read_parts()])
def test_page_has_every_model_within_its_tolerance(part: str) -> None:
    [rows] = [found["rows"] for found in parts() if found["versions"]["transformer-lens"] == part]
    models = [(row["family"], row["kind"], row["dtype"]) for row in rows]
    assert models == list(product(FAMILIES, KINDS, DTYPES))
    for row in rows:
        if isinstance(row["cells"], dict):
            assert all(error <= TOLERANCES[row["dtype"]] for error in row["cells"].values()), row


def test_page_is_rendered_from_the_committed_measurements() -> None:
    assert architecture_table.PAGE.read_text() == architecture_table.render(parts())


parts = functools.cache(read_parts)


def outcomes(cells: Cells | str) -> dict[str, str] | str:
    """Cells that are numbers, and the reasons for the others."""
    if isinstance(cells, str):
        return cells
    return {name: cell if isinstance(cell, str) else "a number" for name, cell in cells.items()}


@pytest.mark.parametrize(
    ("error", "shown"), [(1.3e-7, 2e-7), (2e-7, 2e-7), (2.1e-7, 5e-7), (5.1e-16, 2e-15), (0.0, 0.0)]
)
def test_numbers_are_rounded_up(error: float, shown: float) -> None:
    assert rounded_up(error) == shown


# ------------------------------------------------------------------------------ negative controls


@models(("gpt2", "llama", "mixtral"))
def test_factor_shifted_by_one_position_is_not_the_gradient(family: str, kind: str) -> None:
    expected = expected_gradients(family, kind)
    for key, gradient in captured(family, kind).gradients.items():
        right = expected[key]
        shifted = replace(gradient, inputs=gradient.inputs.roll(1, dims=1))
        assert relative_error(summed(gradient), right) <= tolerance_of(family, kind)
        assert relative_error(summed(shifted), right) > 0.1


@models(("gpt2",))
def test_a_refused_matrix_has_a_reason_and_the_others_numbers(family: str, kind: str) -> None:
    model = build_model(family, kind)
    first, second = (getattr(block.mlp, "in", block.mlp) for block in model.blocks)
    if kind.startswith("hooked"):
        second.W_in = first.W_in
    else:
        second.original_component.weight = first.original_component.weight
    cells = errors(model, family)
    assert "one weight with 2 uses" in str(cells.pop("W_in"))
    assert set(outcomes(cells).values()) == {"a number"}
    assert all(error <= TOLERANCES["float32"] for error in cells.values())


# ------------------------------------------------------------------------------ mixtures of experts


def layers_of_experts(family: str) -> list[int]:
    return [1] if family == "qwen3_moe" else [0, 1]


def routed(model: Any, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Input of the MLP, and the two experts of each token, ordered by routing weight."""
    mlp, read = model.blocks[layer].mlp, []
    handle = mlp.register_forward_pre_hook(
        lambda module, args, kwargs: read.extend((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    named = clean(mlp.named_parameters())
    (router,) = named.keys() & {"W_gate.weight", "gate.weight", "router.weight"}
    logits = read[0] @ named[router].T + named.get(router.replace("weight", "bias"), 0)
    return read[0], logits.topk(2).indices


def clean(named: Any) -> dict[str, Tensor]:
    """Parameters by Hugging Face's names, without those of the bridge's wrapper modules."""
    return {name.replace("_original_component.", ""): parameter for name, parameter in named}


def expert_gradients(
    family: str,
    kind: str,
    tokens: Tensor,
    capture: GradientCapture,
    loss: Callable[[Tensor, Tensor], Tensor] = loss,
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Each expert's gradient, its expected value, and the tokens routed there."""
    model = model_in(family, kind)
    keys = list(product(("W_in", "W_gate", "W_out"), layers_of_experts(family)))
    weights = [find_weight(model, family, *key) for key in keys]
    found = weight_gradients(model, weights, tokens, loss)
    chosen = {layer: routed(model, layer, tokens)[1] for layer in layers_of_experts(family)}
    for (matrix, layer), expected in zip(keys, found, strict=True):
        for number in range(4):
            expert = capture[matrix, layer].expert(number)
            yield expert, expected[number], (chosen[layer] == number).any(-1)


@models(EXPERTS)
def test_expert_has_the_tokens_routed_to_it(family: str, kind: str) -> None:
    capture, tolerance = captured(family, kind), tolerance_of(family, kind)
    for expert, expected, mask in expert_gradients(family, kind, prompts(), capture):
        assert mask.any()
        assert torch.equal(expert.mask, mask)
        assert relative_error(summed(expert), expected) <= tolerance
        assert expert.rank(0) <= int(mask[0].sum())


@models(EXPERTS)
def test_factors_of_experts_are_at_their_tokens(family: str, kind: str) -> None:
    """The sum over tokens is not enough: both factors could be at the same wrong tokens."""
    at_joins, tolerance = plain_run(family, kind).at_joins, tolerance_of(family, kind)
    for layer in layers_of_experts(family):
        read, chosen = routed(model_in(family, kind), layer, prompts())
        for number in range(4):
            mask = (chosen == number).any(-1)
            into, out = (
                captured(family, kind)[matrix, layer].expert(number) for matrix in ("W_in", "W_out")
            )
            assert torch.equal(into.inputs[mask], read[mask])
            # The routing weight is positive, so the direction is that at the stream. At the last
            # position of the last layer both are zero.
            found = torch.nn.functional.normalize(out.vjps[mask], dim=-1)
            expected = torch.nn.functional.normalize(at_joins["W_out", layer][mask], dim=-1)
            assert relative_error(found, expected) <= tolerance


def last_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.logsumexp(logits[:, -1], -1) - logits[:, -1, 5]


@models(EXPERTS)
def test_expert_without_tokens_has_a_gradient_of_zero(family: str, kind: str) -> None:
    """A prompt of one token goes to two of the four experts."""
    tokens = prompts()[:1, :1]
    capture = capture_gradients(model_in(family, kind), tokens, last_token, matrices="mlp")
    used = 0
    for expert, expected, mask in expert_gradients(family, kind, tokens, capture, last_token):
        assert torch.equal(expert.mask, mask)
        if mask.any():
            used += 1
            assert expert.rank() == 1
            assert relative_error(expert.dense(), expected) <= tolerance_of(family, kind)
        else:
            assert expert.rank() == 0
            assert not expert.dense().any()
            assert not expected.any()
    assert used == len(layers_of_experts(family)) * 3 * 2


# -------------------------------------------------------------------------------------- coverage

# Parameters that exist but are not used. They may be listed or not.
IDLE = (
    "pos_embed.W_pos",  # HookedTransformer has one in addition to ALiBi
    ".mlp.gate_up_proj.weight",  # fused; the bridge multiplies by its halves
)
# With processed weights, gated MLPs multiply by copies in TransformerLens 3.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "gate", "in")
IDLE_IN_3 = tuple(
    f".{mlp}.{name}.{part}"
    for mlp, name, part in product(("mlp", "shared_expert"), PROJECTIONS, ("weight", "bias"))
)


def named_parameters(model: Any) -> dict[str, Tensor]:
    """The parameters by Hugging Face's names; some have several."""
    raw = getattr(model, "original_model", None)
    return clean(model.named_parameters()) | (clean(raw.named_parameters()) if raw else {})


@models()
def test_coverage_is_every_parameter_that_is_used(family: str, kind: str) -> None:
    model, coverage = model_in(family, kind), captured(family, kind).coverage
    named = named_parameters(model)
    listed = [*coverage.covered, *coverage.not_covered]
    ids = {id(named[name]): name for name in listed}
    used = plain_run(family, kind).gradients.keys() & {id(tensor) for tensor in named.values()}
    assert len(ids) == len(listed)
    assert used <= ids.keys()
    idle = [ids[key] for key in ids.keys() - used]
    assert all(name.endswith(IDLE + (IDLE_IN_3 if MAJOR == 3 else ())) for name in idle), idle


def biases_of(name: str) -> set[str]:
    """The name that a weight's bias would have."""
    return {name.replace("weight", "bias"), name.replace("W_", "b_"), f"{name}_bias"} - {name}


def biases_of_weights(tensors: tuple[Tensor, ...], named: dict[str, Tensor]) -> list[Tensor]:
    names = [name for tensor in tensors for name, own in named.items() if own is tensor]
    found = [named[bias] for name in names for bias in biases_of(name) & named.keys()]
    return list({id(bias): bias for bias in found}.values())


def follows(gradient: Any, at_biases: Sequence[Tensor], family: str, tolerance: float) -> bool:
    """Whether autograd's gradients of a matrix's biases are the sum of its VJPs."""
    if at_biases[0].ndim == 2 and gradient.n_experts:  # gate and up in one parameter
        at_biases = [expert_slice(part, family, gradient.matrix) for part in at_biases]
    expected = torch.cat([part.flatten() for part in at_biases])
    found = sum(gradient.bias(prompt) for prompt in range(2)).flatten()
    # Without rotary angles no loss depends on key biases, so the scale is that of the terms.
    return bool((found - expected).norm() <= tolerance * gradient.norms.sum())


@models()
def test_coverage_has_the_captured_weights_and_the_biases_that_follow(
    family: str, kind: str
) -> None:
    model, capture = model_in(family, kind), captured(family, kind)
    named, gradients = named_parameters(model), plain_run(family, kind).gradients
    used = gradients.keys() & {id(tensor) for tensor in named.values()}
    expected = set()
    for key, gradient in capture.gradients.items():
        tensors = find_weight(model, family, *key).tensors
        biases = [bias for bias in biases_of_weights(tensors, named) if id(bias) in used]
        expected |= {id(tensor) for tensor in tensors} & used
        if not biases:
            continue
        at_biases = [gradients[id(bias)] for bias in biases]
        if follows(gradient, at_biases, family, tolerance_of(family, kind)):
            expected |= {id(bias) for bias in biases}
    assert {id(named[name]) for name in capture.coverage.covered} & used == expected


def test_bias_after_the_product_of_a_gated_mlp_is_not_covered() -> None:
    """`HookedTransformer` adds `b_in` after the gate; VJPs of `W_in` do not sum to its gradient."""
    if not HAS_HOOKED:
        pytest.skip(NO_HOOKED)
    names = {f"blocks.{layer}.mlp.b_in" for layer in range(N_LAYERS)}
    assert names <= set(captured("llama", "hooked").coverage.not_covered)
    assert names <= set(captured("gpt2", "hooked").coverage.covered)


@models(("gpt2",))
def test_coverage_is_limited_to_the_request(family: str, kind: str) -> None:
    model = model_in(family, kind)
    for matrix, left_out in (("attn", {"mlp"}), ("W_out", {"attn", "c_fc", "W_in", "b_in"})):
        coverage = capture_gradients(model, prompts(), loss, matrices=matrix).coverage
        assert coverage.covered
        assert not [name for name in coverage.covered if set(name.split(".")) & left_out]


@models(("qwen2_moe",))
def test_router_and_shared_expert_are_not_covered(family: str, kind: str) -> None:
    model = model_in(family, kind)
    coverage = backward_lens(model, prompts(), objective=loss, matrices="all").capture.coverage
    for layer in range(N_LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        shared = {f"{mlp}.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")}
        routers = {f"{mlp}.gate.weight", f"{mlp}.shared_expert_gate.weight"}
        assert shared | routers <= set(coverage.not_covered)
        experts = {f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj"}
        assert experts <= set(coverage.covered)


# ---------------------------------------------------------- where branches join the residual stream


@models()
def test_vjps_at_the_residual_stream(family: str, kind: str) -> None:
    for key, expected in plain_run(family, kind).at_joins.items():
        gradient = captured(family, kind)[key]
        assert relative_error(gradient.resid_vjps, expected) <= tolerance_of(family, kind)
        if gradient.experts is not None:
            continue  # the routing weights come in between
        if family in NORM_AFTER:
            assert relative_error(gradient.vjps, expected) > 0.1
        else:
            assert torch.equal(gradient.vjps, gradient.resid_vjps)


class Seen:
    """A projection that records its arguments."""

    def __init__(self, d_vocab: int) -> None:
        self.d_vocab, self.vectors = d_vocab, {}

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        self.vectors[layer] = vectors
        return torch.zeros(len(vectors), self.d_vocab, dtype=vectors.dtype)


@models(("gpt2", *NORM_AFTER), ("hooked", "bridge"))
def test_lens_reads_vjps_where_requested(family: str, kind: str) -> None:
    model, at_joins = model_in(family, kind), plain_run(family, kind).at_joins
    for matrix, place in product(JOINS, ("matrix", "residual")):
        seen = Seen(model.cfg.d_vocab)
        backward_lens(
            model, prompts(), objective=loss, matrices=matrix, projection=seen, vjps_at=place
        )
        for layer, vectors in seen.vectors.items():
            own = captured(family, kind)[matrix, layer].vjps
            vjps = at_joins[matrix, layer] if place == "residual" else own
            assert relative_error(-vectors, vjps.flatten(0, 1)) <= tolerance_of(family, kind)
        assert list(seen.vectors) == list(range(N_LAYERS))
