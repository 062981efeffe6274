"""Steps whose factors are on another device than the weights, without a GPU.

The other device is a pretended one: its tensors hold values of the CPU, and an operation that mixes
them with tensors of the CPU raises, as it does with a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from architectures import hf_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from backward_lens_tl.training import StepGradient, TrainingRecord, spectrum, watch

DEVICE = torch.device("meta")
MOVING = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor of the pretended device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        self = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=DEVICE
        )
        self.values = values
        return self

    def tolist(self) -> Any:
        return self.values.tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Moves tensors to the pretended device too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute on the CPU, after a check that all tensors are on one device."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    inside = [isinstance(each, Elsewhere) for each in tensors if each.ndim]
    is_elsewhere = any(isinstance(each, Elsewhere) for each in tensors)
    if func is torch.ops.aten.index.Tensor:  # by indices of the CPU or of its own device
        inside = inside if not inside[0] else []
    if func not in MOVING and any(inside) and not all(inside):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    if kwargs.get("device") is not None:
        is_elsewhere = kwargs["device"] == DEVICE
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = tree_map(
        lambda each: each.values if isinstance(each, Elsewhere) else each, (args, kwargs)
    )
    found = func(*args, **kwargs)
    if not is_elsewhere:
        return found
    return tree_map(lambda each: Elsewhere(each) if isinstance(each, Tensor) else each, found)


def recorded(
    folder: Path, *, n: int, elsewhere: bool, changes: bool
) -> tuple[StepGradient, pd.DataFrame]:
    """A step of `n` positions and its record."""
    model = hf_model("llama", torch.float64)
    ids = torch.arange(3, 4 + n)[None]
    options: dict[str, Any] = {"changes": changes, "reference": ([5, 6], 7)}
    with watch(model, **options) as watched, Pretended() if elsewhere else nullcontext():
        model(ids, labels=ids).loss.backward()
        for recorder in watched._recorders if elsewhere else ():
            recorder.pairs = [
                replace(pair, x=Elsewhere(pair.x), delta=Elsewhere(pair.delta), versions=(0, 0))
                for pair in recorder.pairs
            ]
        step = watched.step()
        assert step is not None
        return step, TrainingRecord(folder).add(step)


# More positions than the model is wide, fewer, and a whole decomposition.
@pytest.mark.parametrize(("n", "changes"), [(80, False), (20, False), (20, True)])
def test_factors_on_another_device(
    n: int, changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum, "_FEW", 10)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not of this device
    step, rows = recorded(tmp_path / "elsewhere", n=n, elsewhere=True, changes=changes)
    assert all(isinstance(gradient.vjps, Elsewhere) for gradient in step)
    _, expected = recorded(tmp_path / "here", n=n, elsewhere=False, changes=changes)
    pd.testing.assert_frame_equal(rows, expected)
