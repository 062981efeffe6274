"""The benchmark that compares average Jacobians with exact effects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, hooked_only
from torch import Tensor

from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Record
from backward_lens_tl.jacobians.average import Jacobians
from benchmarks.lens_exactness import BEFORE, cosines

ROWS = [{"prompt": "Messi plays for", "target": 30}, {"prompt": "Rome is in", "target": 5}]
POINTS = {"W_out": "mlp", "W_O": "attn"}


def by_differences(model: Any, record: Record, layer: int, point: str, jacobian: Tensor) -> float:
    """The cosine, with the gradient from autograd and the change from two forward passes."""
    name, end = f"blocks.{layer}.hook_{point}_out", f"blocks.{model.cfg.n_layers - 1}"
    tokens = model.to_tokens(record.prompt)
    grads: list[Tensor] = []

    def watch(values: Tensor, hook: Any) -> Tensor:
        values.requires_grad_().register_hook(lambda grad: grads.append(grad[0, -1]))
        return values

    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, watch)])
    logits[0, -1].log_softmax(-1)[record.target].backward()
    vector = grads[0]  # of the log-probability, so it is what the update adds

    def stream(size: float) -> Tensor:
        kept: list[Tensor] = []

        def add(values: Tensor, hook: Any) -> Tensor:
            values[0, -1] += size * vector
            return values

        hooks = [(name, add), (f"{end}.hook_resid_post", lambda v, hook: kept.append(v[0, -1]))]
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        return kept[0]

    step = 1e-4 / float(vector.norm())
    change = (stream(step) - stream(-step)) / (2 * step)
    return float(torch.cosine_similarity(jacobian @ vector, change, dim=0))


@hooked_only
def test_cosines_are_those_of_finite_differences() -> None:
    model: Any = build("hooked-gpt2").model
    records = [row for row in read_records(ROWS).rows if isinstance(row, Record)]
    n, width = model.cfg.n_layers, model.cfg.d_model
    generator = torch.Generator().manual_seed(0)
    matrices = {
        layer: torch.randn(width, width, generator=generator, dtype=torch.float64)
        for layer in range(n - 1)
    }
    every = {**matrices, n - 1: torch.eye(width, dtype=torch.float64)}
    found = cosines(model, Jacobians(matrices, 1, width, {}), records, range(n))
    assert list(found[BEFORE]) == list(range(1, n))
    rows = [(matrix, layer, layer) for matrix in POINTS for layer in range(n)]
    rows += [(BEFORE, layer, layer - 1) for layer in range(1, n)]
    for name, layer, at in rows:
        point = POINTS.get(name, "attn")
        expected = [by_differences(model, each, layer, point, every[at]) for each in records]
        # The step's error is of order 1e-8.
        assert found[name][layer] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
