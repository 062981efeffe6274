"""The Jacobian Lens: vectors of any layer, carried to the last one and read there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, NotAvailable, build_model
from jacobian_cases import OwnLens, identity_lens, random_lens
from models import HAS_BRIDGE, HAS_HOOKED, Case, attention_only_model, hooked_only

import backward_lens_tl as blt
from backward_lens_tl.errors import InputError, JacobianLensError
from backward_lens_tl.jacobians.average import jacobians_of
from backward_lens_tl.jacobians.stream import block_of, is_parallel
from backward_lens_tl.models import host_of
from backward_lens_tl.models.hooks import hooked
from backward_lens_tl.models.sites import MatrixSite
from backward_lens_tl.readout.readout import Readout

FIELDS = ("top_ids", "top_scores", "bottom_ids", "bottom_scores", "target_rank", "is_faint")
LENSES = ("logit_lens", "normalized", "cosine")
PROMPTS = ["The capital of France", "Rome"]


def equal(found: Readout, expected: Readout) -> bool:
    """Bit for bit; padding holds NaN."""
    return all(
        torch.equal(getattr(found, name).nan_to_num(), getattr(expected, name).nan_to_num())
        if getattr(found, name).is_floating_point()
        else torch.equal(getattr(found, name), getattr(expected, name))
        for name in FIELDS
    )


def unchecked(lens: OwnLens, projection: Any = "logit_lens") -> blt.JacobianProjection:
    return blt.jacobian_lens(lens, projection, check=False)


@pytest.mark.versions
@pytest.mark.parametrize("projection", LENSES)
def test_identities_give_the_plain_lens_bit_for_bit(case: Case, projection: Any) -> None:
    identity = unchecked(identity_lens(case.model, case.dtype), projection)
    plain, carried = (
        blt.backward_lens(
            case.model, PROMPTS, " the", matrices="all", projection=each, vjps_at="residual"
        )
        for each in (projection, identity)
    )
    assert carried.projection == identity.name != plain.projection
    for matrix in plain.matrices:
        assert equal(carried.readout(matrix), plain.readout(matrix)), matrix


def test_other_matrices_give_other_tokens(one_gpt2: Case) -> None:
    """Negative control."""
    model = one_gpt2.model
    plain = blt.backward_lens(model, PROMPTS, " the", matrices="all")
    carried = blt.backward_lens(
        model, PROMPTS, " the", matrices="all", projection=unchecked(random_lens(model))
    )
    for matrix in plain.matrices:
        found, expected = carried.readout(matrix), plain.readout(matrix)
        assert not torch.equal(found.top_ids[0], expected.top_ids[0]), matrix
        assert equal_in_last_layer(found, expected) == (matrix in ("W_O", "W_in", "W_out")), matrix


def equal_in_last_layer(found: Readout, expected: Readout) -> bool:
    return torch.equal(found.top_ids[-1], expected.top_ids[-1])


@hooked_only
def test_a_linear_network_is_read_as_it_changes() -> None:
    """Attention that looks everywhere alike, without norms, is linear: the average is exact."""
    model = attention_only_model(has_norms=False)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
            block.attn.W_V.normal_(std=0.3)
            block.attn.W_O.normal_(std=0.3)
    tokens = torch.tensor([[5]])
    steps = [torch.einsum("hdk,hke->de", block.attn.W_V, block.attn.W_O) for block in model.blocks]
    width, last = model.cfg.d_model, model.cfg.n_layers - 1
    exact: dict[int, torch.Tensor] = {}
    after = torch.eye(width, dtype=torch.float64)
    for layer in range(last - 1, -1, -1):
        after = (torch.eye(width, dtype=torch.float64) + steps[layer + 1]) @ after
        exact[layer] = after.T.detach()  # a stream is a row here, and J multiplies columns
    capture = blt.capture_gradients(model, tokens, blt.target_nll(7), matrices="W_O")
    for layer in exact:
        added = -capture["W_O", layer].vjps[0, 0]

        def add(stream: torch.Tensor, hook: Any, added: torch.Tensor = added) -> torch.Tensor:
            return stream + added

        with torch.no_grad():
            before = model(tokens)[0, 0]
            changed = model.run_with_hooks(
                tokens, fwd_hooks=[(f"blocks.{layer}.hook_attn_out", add)]
            )[0, 0]
        predicted, turned = (
            unchecked(OwnLens(lens))
            .bound(host_of(model))
            .project(added[None], layer)[0]
            .sub(model.b_U)
            for lens in (exact, {each: matrix.T for each, matrix in exact.items()})
        )
        assert torch.allclose(predicted, changed - before, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(turned, changed - before, rtol=1e-2)  # the other orientation


@pytest.mark.versions
def test_each_matrix_has_the_jacobian_of_its_point_of_the_stream(one_gpt2: Case) -> None:
    model = one_gpt2.model
    lens = random_lens(model)
    result = blt.backward_lens(
        model, PROMPTS[0], " the", matrices="all", direction="gradient", projection=unchecked(lens)
    )
    for gradient in result.capture:
        reads_before = gradient.matrix in ("W_Q", "W_K", "W_V")
        block = max(gradient.layer - reads_before, 0)
        vectors = gradient.spanning_set[0].double()
        matrix = lens.jacobians.get(block)  # the last block has none
        carried = vectors if matrix is None else vectors @ matrix.double().T
        expected = one_gpt2.lens(carried)
        read = result.readout(gradient.matrix)
        own = gradient.layer, 0
        assert torch.allclose(read.top_scores[own], expected.topk(10).values, atol=1e-9)


@pytest.mark.parametrize("family", ["gptj", "gpt2"])
def test_parallel_blocks_are_read_before_both_halves(family: str) -> None:
    host = host_of(built(family, "hooked" if HAS_HOOKED else "bridge"))
    before = family == "gptj"
    for matrix, block in {"W_in": 1 - before, "W_Q": 0, "W_O": 1, "W_out": 1}.items():
        assert block_of(host, matrix, 1) == block
    assert block_of(host, "W_Q", 0) == -1


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_mlp_reads_is_as_the_config_says(family: str, kind: str) -> None:
    """In parallel blocks, the input of the MLP does not depend on the same layer's attention."""
    host = host_of(built(family, kind))
    [attention], [reading] = host.sites(1, ["W_O"]), host.sites(1, ["W_in"])
    if not isinstance(reading, MatrixSite):
        pytest.skip("a mixture of experts")
    assert attention.joins is not None
    seen: dict[str, torch.Tensor] = {}
    with (
        torch.enable_grad(),
        hooked(attention.joins.tap, partial(seen.__setitem__, "written")),
        hooked(reading.input, partial(seen.__setitem__, "read")),
    ):
        host.logits(torch.tensor([[5, 6, 7, 8, 9]]))
    [gradient] = torch.autograd.grad(seen["read"].sum(), seen["written"], allow_unused=True)
    assert (gradient is None) == is_parallel(host)


def built(family: str, kind: str) -> Any:
    try:
        return build_model(family, kind)
    except NotAvailable as error:
        pytest.skip(str(error))


@pytest.mark.versions
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "llama"])
def test_vjps_before_a_post_norm_are_refused(family: str, kind: str) -> None:
    model = built(family, kind)
    lens = unchecked(random_lens(model))
    reads = {
        vjps_at: partial(
            blt.backward_lens, model, PROMPTS[0], " the", projection=lens, vjps_at=vjps_at
        )
        for vjps_at in ("matrix", "residual")
    }
    reads["reading"] = partial(reads["matrix"], matrices=["W_in", "W_V"])
    reads["neurons"] = lambda: blt.read_vectors(
        model, torch.ones(model.cfg.d_model), projection=lens, layer=0, matrix="W_out"
    )
    for name, read in reads.items():
        if family != "llama" and name in ("matrix", "neurons"):
            with pytest.raises(
                JacobianLensError, match=r"a norm follows W_out .*vjps_at='residual'"
            ):
                read()
        else:
            read()


@pytest.mark.versions
@pytest.mark.skipif(not HAS_BRIDGE, reason="JacobianLens came with TransformerLens 3.9")
def test_streams_are_read_as_by_transformer_lens(facts_model: Any) -> None:
    from transformer_lens.tools.analysis import JacobianLens

    made = random_lens(facts_model)
    lens = JacobianLens(made.jacobians, n_prompts=1, d_model=made.d_model)
    text = "Lionel Messi plays for"
    theirs = lens.readout(facts_model, text, return_full_logits=True)
    _, cache = facts_model.run_with_cache(text)
    for layer in (0, 3, 6):
        read = blt.read_vectors(
            facts_model,
            cache[f"blocks.{layer}.hook_out"][0],
            projection=blt.jacobian_lens(lens, check=False),
            layer=layer,
        )
        assert torch.equal(read.top_ids, theirs.lens_topk_indices[layer])
        assert torch.allclose(read.top_scores, theirs.lens_topk_values[layer], atol=1e-4)


def test_a_vector_needs_its_layer(one_gpt2: Case) -> None:
    lens = unchecked(random_lens(one_gpt2.model))
    with pytest.raises(InputError, match="projection jacobian_lens may depend on the layer; pass"):
        blt.read_vectors(one_gpt2.model, torch.ones(one_gpt2.d_model), projection=lens)


def test_half_precision_is_carried_in_float32(one_gpt2: Case) -> None:
    lens = random_lens(one_gpt2.model)
    bound = unchecked(lens).bound(host_of(one_gpt2.model))
    vectors = torch.randn(3, one_gpt2.d_model, generator=torch.Generator().manual_seed(0))
    carried = bound.carried(vectors.bfloat16(), 0)
    assert carried.dtype == torch.float32
    assert torch.equal(carried, vectors.bfloat16().float() @ lens.jacobians[0].T)


def test_faint_is_what_is_read(one_gpt2: Case) -> None:
    """A vector that `J_l` makes long is not faint, and the reverse."""
    model = one_gpt2.model
    width, layers = one_gpt2.d_model, range(model.cfg.n_layers - 1)
    plain = blt.backward_lens(model, PROMPTS[0], " the", matrices="W_out")
    length = plain.faint_norm / plain.norms("W_out")[0, 0, -1]
    for scale, is_faint in ((2 * length, False), (length / 2, True)):
        lens = OwnLens({layer: scale * torch.eye(width) for layer in layers})
        carried = blt.backward_lens(
            model, PROMPTS[0], " the", matrices="W_out", projection=unchecked(lens)
        )
        assert carried.cell("W_out", layer=0, pos=-1).is_faint == is_faint


def test_a_saved_result_says_what_its_lens_was_fitted_on(one_gpt2: Case, tmp_path: Path) -> None:
    lens = random_lens(one_gpt2.model)
    lens.n_prompts, lens.metadata = 28, {"corpus": "wikitext"}
    result = blt.backward_lens(
        one_gpt2.model, PROMPTS, " the", projection=("logit_lens", unchecked(lens))
    )
    assert result.fit == ""
    carried = result.under("jacobian_lens")
    checksum = jacobians_of(lens).provenance["sha256"][:8]
    assert carried.fit == f"fitted on 28 prompts of wikitext, SHA-256 {checksum}"
    carried.save(tmp_path / "carried.safetensors")
    again = blt.BackwardLensResult.load(tmp_path / "carried.safetensors")
    assert again.fit == carried.fit
    for matrix in carried.matrices:
        assert equal(again.readout(matrix), carried.readout(matrix))


@pytest.mark.parametrize(("matrix", "layer"), [("W_out", 0), ("W_in", 1)])
def test_tables_of_tokens_read_through_the_layers_jacobian(
    one_gpt2: Case, matrix: str, layer: int
) -> None:
    model = one_gpt2.model
    lens = random_lens(model)
    own = lens.jacobians[layer].double()

    class Carried:
        """The same as an object of the caller."""

        def project(self, vectors: torch.Tensor, layer: int) -> torch.Tensor:
            del layer
            return one_gpt2.lens(vectors.double() @ own.T)

    capture = blt.capture_gradients(
        model, PROMPTS[0], blt.target_nll(" the"), matrices=matrix, layers=layer
    )
    request = blt.editing.EditRequest(PROMPTS[0], " the")
    step = blt.editing.GradientStep("sgd", lr=1.0, matrices=matrix, layers=layer)(model, request)
    for table, columns in (
        (partial(blt.analysis.neuron_tokens, model, capture, matrix, layer, k=3), ["top_tokens"]),
        (partial(blt.analysis.spanning_tokens, model, capture, matrix, layer, k=3), ["top_tokens"]),
        (partial(blt.analysis.neuron_overlap, model, capture, matrix, layer, k=3), ["overlap"]),
        (partial(blt.editing.delta_tokens, model, step, k=3), ["top_tokens"]),
        (
            partial(blt.analysis.top_neurons, model, capture, k=5, matrix=matrix),
            ["update_top", "weight_top"],
        ),
    ):
        found, expected = (table(projection=each) for each in (unchecked(lens), Carried()))
        for column in columns:
            assert found[column].tolist() == expected[column].tolist()


def test_neurons_that_read_the_stream_before_the_block(one_gpt2: Case) -> None:
    """Values of layer 1 read the output of block 0; the MLP reads on the way to that of block 1."""
    model, lens = one_gpt2.model, random_lens(one_gpt2.model)
    vector = torch.randn(one_gpt2.d_model, generator=torch.Generator().manual_seed(0))
    read = partial(blt.read_vectors, model, vector, projection=unchecked(lens), k=97)
    at = {block: read(layer=block).top_ids for block in (0, 1, 2)}
    assert not torch.equal(at[0], at[1])
    for matrix, layer, block in (
        ("W_V", 0, 0), ("W_V", 1, 0), ("W_V", 2, 1), ("W_O", 1, 1), ("W_in", 1, 1), ("W_out", 2, 2)
    ):  # fmt: skip
        assert torch.equal(read(layer=layer, matrix=matrix).top_ids, at[block]), (matrix, layer)
    plain = blt.read_vectors(model, vector, layer=2, k=97)
    assert torch.equal(at[2], plain.top_ids)  # the last block has the identity
    with pytest.raises(InputError, match="matrix is 'W_E'; allowed: 'W_Q'"):
        read(layer=1, matrix="W_E")


def test_missing_layers_are_refused_only_where_they_are_read(one_gpt2: Case) -> None:
    model = one_gpt2.model
    partial = random_lens(model)
    del partial.jacobians[0]
    lens = unchecked(partial)
    with pytest.raises(JacobianLensError, match=r"no matrix for layers \[0\], only for \[1\]; ch"):
        blt.backward_lens(model, PROMPTS[0], " the", projection=lens)
    result = blt.backward_lens(model, PROMPTS[0], " the", layers=[1, 2], projection=lens)
    assert result.projection == "jacobian_lens"
