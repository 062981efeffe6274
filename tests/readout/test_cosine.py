"""The cosine lens, against columns that the reference model's own readout of unit vectors gives."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from models import Case
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.models import host_of
from backward_lens_tl.models.unembedding import _uneven

LONG = 1e6
"""A length at which no norm's eps matters in float64."""

EPS = 1e-4
"""The lens reads vectors of root mean square 1, whose cosines the norm's eps (1e-5) changes."""


def linear_logits(case: Case, vectors: Tensor) -> Tensor:
    """The reference's logits without softcap and biases, up to a term that all tokens share."""
    logits = case.lens(vectors) - case.lens(torch.zeros_like(vectors[:1]))
    if "gemma2" in case.name:
        cap = case.model.cfg.output_logits_soft_cap
        both = [case.lens(each) for each in (vectors, torch.zeros_like(vectors[:1]))]
        logits = torch.sub(*(cap * (each / cap).atanh() for each in both))
    return logits - logits.mean(1, keepdim=True)


def slow_cosines(case: Case, vectors: Tensor) -> Tensor:
    scale = 1.0 if "no_norm" in case.name else LONG
    columns = linear_logits(case, scale * torch.eye(case.d_model, dtype=vectors.dtype))
    is_layer_norm = bool(columns.sum(0).abs().max() < 1e-6 * columns.abs().max())
    seen = vectors - vectors.mean(1, keepdim=True) if is_layer_norm else vectors
    return torch.stack(
        [(columns * row[:, None]).sum(0) / (columns.norm(dim=0) * row.norm()) for row in seen]
    )


@pytest.mark.parametrize(
    "case",
    ["bridge-gpt2", "bridge-gemma2", "hooked-gpt2", "hooked-llama", "hooked-no_norm"],
    indirect=True,
)
def test_scores_are_cosines_with_the_columns_that_the_reference_reads(case: Case) -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(5, case.d_model, generator=generator, dtype=case.dtype)
    vectors = vectors * torch.tensor([1e-20, 1e-3, 1.0, 30.0, 1e8])[:, None]  # length has no effect
    read = blt.read_vectors(case.model, vectors, projection="cosine", k=case.d_vocab)
    found = torch.empty(5, case.d_vocab, dtype=case.dtype)
    found.scatter_(1, read.top_ids, read.top_scores)
    wanted = slow_cosines(case, vectors)
    torch.testing.assert_close(found, wanted, rtol=EPS, atol=1e-6)
    assert found.abs().max() > 0.2


def test_only_the_logit_lens_prefers_tokens_with_long_columns(facts_model: Any) -> None:
    """The spread of a token's score over vectors of random direction."""
    vectors = torch.randn(2000, facts_model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    host = host_of(facts_model)
    lengths = host.unembedding.columns().lengths
    assert lengths.max() > 1.5 * lengths.min()
    spread = {}
    for name in ("normalized", "cosine"):
        read = blt.read_vectors(facts_model, vectors, projection=name, k=host.d_vocab_out)
        scores = torch.empty(len(vectors), host.d_vocab_out)
        scores.scatter_(1, read.top_ids, read.top_scores)
        spread[name] = (scores - scores.mean(1, keepdim=True)).std(0)
    # 2,000 draws: a standard deviation is known to 1.6 %, the largest of 3,072 to four times that.
    expected = torch.full_like(lengths, facts_model.cfg.d_model**-0.5)
    torch.testing.assert_close(spread["cosine"], expected, rtol=0.1, atol=0)
    assert torch.corrcoef(torch.stack([spread["normalized"], lengths]))[0, 1] > 0.98


@pytest.mark.parametrize("case", ["hooked-gpt2"], indirect=True)
def test_weight_processing_does_not_change_cosines(case: Case) -> None:
    vectors = torch.randn(4, case.d_model, dtype=case.dtype)
    model = deepcopy(case.model)
    read = partial(blt.read_vectors, model, vectors, projection="cosine", k=case.d_vocab)
    before = read()
    model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=True)
    torch.testing.assert_close(read().top_scores, before.top_scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(read().top_ids, before.top_ids)


def test_it_needs_no_layer_and_reads_zero_as_zero(facts_model: Any) -> None:
    read = blt.read_vectors(
        facts_model, torch.zeros(facts_model.cfg.d_model), projection="cosine", k=3
    )
    assert read.top_scores.tolist() == [0, 0, 0]


@pytest.mark.parametrize("d_model", [2, 3, 8, 9])
def test_the_probe_of_the_norm_has_mean_zero(d_model: int) -> None:
    probe = _uneven(torch.empty(d_model, dtype=torch.float64))
    assert abs(float(probe.mean())) < 1e-15
    assert float(probe.square().mean()) == pytest.approx(1)
    assert bool((probe != 0).all())
