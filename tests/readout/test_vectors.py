"""`read_vectors` against the models' final norm and unembedding, in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import build, relative_error
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.errors import InputError, TargetError

# Sums of d_model products in float64, in another order; Hugging Face's RMS norms use float32.
EXACT, EXACT_IN_FLOAT32 = 1e-12, 1e-5
# eps of bfloat16 is 8e-3; vector, norm and product are each rounded once.
HALF = 5e-2

PARIS = " Paris"


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model only for this file: a bridge that keeps an attention pattern with a graph cannot be
    copied."""
    return blt.load_facts_model()


def some_vectors(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scores_of(read: blt.VectorReadout, d_vocab: int) -> Tensor:
    """All scores in the order of token ids; the readout must hold all tokens."""
    assert read.top_ids.shape[-1] == d_vocab
    return torch.empty_like(read.top_scores).scatter_(-1, read.top_ids, read.top_scores)


def float64_scores(model: Any, vectors: Tensor) -> Tensor:
    """`ln_final(v) @ W_U + b_U`, written out."""
    double = copy.deepcopy(model).double()
    double.cfg.dtype = torch.float64  # TransformerLens 2 converts to it after the norm
    with torch.no_grad():
        normed = torch.stack([double.ln_final(v[None, None].double())[0, 0] for v in vectors])
        return normed @ double.W_U + double.b_U


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (17,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-llama", "bridge-gemma2"])
def test_scores_match_the_reference(name: str, shape: tuple[int, ...]) -> None:
    case = build(name)
    vectors = some_vectors(*shape, case.d_model)
    read = blt.read_vectors(case.model, vectors, 5, k=10**6)
    expected = case.lens(vectors.reshape(-1, case.d_model)).reshape(*shape, -1)
    tolerance = EXACT_IN_FLOAT32 if case.logits_in_float32 else EXACT
    assert relative_error(scores_of(read, case.d_vocab), expected) < tolerance
    assert torch.equal(read.bottom_ids, read.top_ids.flip(-1))
    assert torch.equal(read.target_rank, (expected > expected[..., 5:6]).sum(-1))
    # Negative control: without the final norm the scores differ.
    raw = vectors @ case.model.W_U.detach().to(vectors)
    assert relative_error(scores_of(read, case.d_vocab), raw) > 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_float32_scores_of_a_trained_model(trained: Any, n: int) -> None:
    vectors = trained.W_out[6, :n].detach()
    read = blt.read_vectors(trained, vectors, PARIS, k=10**6)
    expected = float64_scores(trained, vectors)
    # Sums of 128 products in float32.
    assert relative_error(scores_of(read, expected.shape[-1]), expected) < 1e-6
    target = trained.to_single_token(PARIS)
    assert torch.equal(read.target_rank, (expected > expected[:, target, None]).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_decode_like_the_same_numbers_in_float32(
    trained: Any, dtype: torch.dtype
) -> None:
    vectors = trained.W_out[6, :3].detach().to(dtype)
    found, expected = (blt.read_vectors(trained, v) for v in (vectors, vectors.float()))
    assert torch.equal(found.top_ids, expected.top_ids)
    assert torch.equal(found.top_scores, expected.top_scores)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_half_precision_model(trained: Any, n: int) -> None:
    rounded = copy.deepcopy(trained).to(torch.bfloat16)
    vectors = trained.W_out[6, :n].detach()
    expected = float64_scores(rounded, vectors)
    found = scores_of(blt.read_vectors(rounded, vectors, k=10**6), expected.shape[-1])
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < HALF


def test_normalized_scores_do_not_depend_on_the_norm_of_a_vector(trained: Any) -> None:
    vectors = trained.W_out[6, :4].detach()
    short = 1e-9 * vectors
    for projection, is_same in (("normalized", True), ("logit_lens", False)):
        found, expected = (
            blt.read_vectors(trained, each, projection=projection).top_ids
            for each in (short, vectors)
        )
        assert torch.equal(found, expected) is is_same


def test_vectors_decode_as_in_the_lens(facts_model: Any) -> None:
    result = blt.backward_lens(facts_model, "Lionel Messi plays for", PARIS)
    vjps = result.capture["W_out", 5].vjps
    read, seen = blt.read_vectors(facts_model, -vjps, PARIS), result.readout("W_out")
    assert torch.equal(read.top_ids, seen.top_ids[5])
    assert torch.equal(read.target_rank, seen.target_rank[5])
    assert read.top_tokens[0][-1] == result.top_tokens("W_out", layer=5, pos=-1)


def test_targets(trained: Any) -> None:
    vectors = trained.W_out[6, :4].detach()
    paris, rome = (trained.to_single_token(each) for each in (PARIS, " Rome"))
    of_paris = blt.read_vectors(trained, vectors, PARIS).target_rank
    of_rome = blt.read_vectors(trained, vectors, rome).target_rank
    mixed = torch.stack([of_paris[:2], of_rome[2:]]).flatten()
    for targets in ([PARIS, PARIS, " Rome", rome], torch.tensor([paris, paris, rome, rome])):
        read = blt.read_vectors(trained, vectors, targets)
        assert torch.equal(read.target_rank, mixed)
        assert read.targets.tolist() == [paris, paris, rome, rome]
    grid = blt.read_vectors(trained, vectors.reshape(2, 2, -1), [[PARIS, PARIS], [rome, rome]])
    assert torch.equal(grid.target_rank, mixed.reshape(2, 2))
    both = blt.read_vectors(trained, vectors, f"{PARIS} Rome", multi_token="last")
    assert torch.equal(both.target_rank, of_rome)
    without = blt.read_vectors(trained, vectors)
    assert without.targets is None
    assert without.target_rank is None


class Noting:
    """A projection that records the requested layers."""

    def __init__(self, model: Any) -> None:
        self.layers: list[int] = []
        self._unembedding = model.W_U.detach()

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        self.layers.append(layer)
        return vectors @ self._unembedding


def test_a_callers_projection_needs_a_layer(trained: Any) -> None:
    vectors, own = trained.W_out[6, :2].detach(), Noting(trained)
    for layer in (3, -1):
        read = blt.read_vectors(trained, vectors, projection=own, layer=layer)
        best = (vectors @ trained.W_U).argmax(-1)
        assert torch.equal(read.top_ids[:, 0], best)
    assert own.layers == [3, 7]
    with pytest.raises(InputError, match="Noting may depend on the layer; pass layer="):
        blt.read_vectors(trained, vectors, projection=own)


def test_table_and_repr(trained: Any) -> None:
    vectors = trained.W_out[6, :6].detach()
    read = blt.read_vectors(trained, vectors.reshape(2, 3, -1), PARIS, k=2)
    table = read.to_df()
    assert table.index.tolist() == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert table.loc[(1, 2), "top_tokens"] == read.top_tokens[1][2]
    assert table.loc[(0, 1), "target_rank"] == int(read.target_rank[0, 1])
    assert set(table["target"]) == {PARIS}
    assert repr(read).splitlines()[0] == "VectorReadout of [2, 3] vectors, k=2"
    assert repr(read).splitlines()[-1].startswith("[1, 2] ' ")
    one = blt.read_vectors(trained, vectors[0], k=2)
    assert one.to_df()["top_tokens"].tolist() == [one.top_tokens]
    assert repr(one).splitlines()[-1] == " ".join(map(repr, one.top_tokens))
    assert repr(blt.read_vectors(trained, trained.W_out[6])).endswith("... 504 more")


def test_vectors_with_a_graph_are_decoded_and_left_unchanged(trained: Any) -> None:
    vectors = trained.W_out[6, :2].detach().requires_grad_()
    before = vectors.detach().clone()
    read = blt.read_vectors(trained, vectors)
    assert not read.top_scores.requires_grad
    assert torch.equal(vectors.detach(), before)
    assert vectors.grad is None


PLAIN = torch.ones(2, 128)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"vectors": [1.0]}, r"vectors is a list; pass a tensor of shape \[\.\.\., 128\]"),
    "width": ({"vectors": torch.ones(2, 3)}, r"has shape \(2, 3\); .* has width 128"),
    "number": ({"vectors": torch.tensor(1.0)}, r"has shape \(\); .* has width 128"),
    "integers": ({"vectors": PLAIN.long()}, "torch.int64 on cpu; pass a dense floating-point"),
    "complex": ({"vectors": PLAIN.cfloat()}, "torch.complex64 on cpu; pass a dense"),
    "sparse": ({"vectors": PLAIN.to_sparse()}, "torch.sparse_coo tensor"),
    "no values": ({"vectors": PLAIN.to("meta")}, "on meta; pass a dense floating-point tensor"),
    "empty": ({"vectors": PLAIN[:0]}, r"shape \(0, 128\); pass at least one vector"),
    "NaN": ({"vectors": PLAIN * torch.tensor([[1.0], [float("nan")]])}, r"vectors\[1\] contains"),
    "infinity": ({"vectors": PLAIN[0] / 0}, "vectors contains NaN or infinity"),
    "layer": ({"layer": 8}, "layer 8 does not exist; allowed: -8 to 7"),
    "k": ({"k": 0}, "k is 0; pass an integer of at least 1"),
    "projections": ({"projection": ("logit_lens", "normalized")}, "unknown projection"),
    "targets": (
        {"target": [PARIS]},
        r"target is \[.*\] where the vectors have an axis of 2; pass one target",
    ),
    "two tokens": ({"target": f"{PARIS} Rome"}, r"is 2 tokens .* multi_token='first'"),
    "no token id": ({"target": 1.5}, "target 1.5 is a float"),
    "multi_token": ({"target": PARIS, "multi_token": "all"}, "multi_token is 'all'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use(trained: Any, wrong: str, as_for_a_user: None) -> None:
    arguments, message = WRONG[wrong]
    kind = TargetError if "target" in arguments else InputError
    with pytest.raises(kind, match=message):
        blt.read_vectors(trained, **({"vectors": PLAIN} | arguments))


def test_a_readout_can_be_pickled_and_holds_no_tokenizer(trained: Any) -> None:
    read = blt.read_vectors(trained, trained.W_out[6, :2].detach(), PARIS, k=2)
    data = pickle.dumps(read)
    assert len(data) < 10_000  # four tokens at either end, not a vocabulary
    again = pickle.loads(data)
    assert again.top_tokens == read.top_tokens
    assert again.to_df().equals(read.to_df())
    assert repr(again) == repr(read)
