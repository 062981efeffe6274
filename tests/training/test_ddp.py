"""Training in several processes: each one sees its own part of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ddp_training
import pytest
import torch
from architectures import LLAMA_MODULES, N_LAYERS, hf_model
from ddp_training import WORLD, microbatches
from dense_gradients import joined
from models import relative_error
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.training import watch

TOLERANCE = 1e-12
"""Rounding in float64, as in test_watching.py."""

KEYS = [(matrix, layer) for layer in range(N_LAYERS) for matrix in LLAMA_MODULES]


def parameter(matrix: str, layer: int) -> str:
    return f"model.layers.{layer}.{LLAMA_MODULES[matrix]}.weight"


def own_gradients(rank: int) -> dict[str, torch.Tensor]:
    """Autograd's gradient of one process's part, in a model of its own."""
    model = hf_model("llama", torch.float64)
    for ids in microbatches(rank):
        ddp_training.backward(model, ids)
    return ddp_training.gradients(model)


def test_one_process(tmp_path: Path) -> None:
    with ddp_training.process_group(tmp_path, 0, 1):
        found = ddp_training.step_in_parallel(0)
    expected = own_gradients(0)
    assert list(found["dense"]) == KEYS
    for key in KEYS:
        dense = joined(found["dense"][key], key[0])
        assert relative_error(dense, expected[parameter(*key)].T) < TOLERANCE, key


@pytest.mark.usefixtures("as_for_a_user")
def test_the_wrapper_is_refused(tmp_path: Path) -> None:
    with ddp_training.process_group(tmp_path, 0, 1):
        parallel = DistributedDataParallel(hf_model("llama"))
        message = "a DistributedDataParallel, has no module .* pass the transformers model itself"
        with pytest.raises(UnsupportedModelError, match=message), watch(parallel):
            pass


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(ddp_training.run, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
def test_each_process_sees_its_own_part(two: list[Any]) -> None:
    for rank in range(WORLD):
        expected = own_gradients(rank)
        for key in KEYS:
            dense = joined(two[rank]["step"]["dense"][key], key[0])
            assert relative_error(dense, expected[parameter(*key)].T) < TOLERANCE, (rank, key)


@pytest.mark.slow
def test_the_mean_is_the_gradient_after_the_exchange(two: list[Any]) -> None:
    for key in KEYS:
        parts = [joined(found["step"]["dense"][key], key[0]) for found in two]
        averaged = two[0]["step"]["averaged"][parameter(*key)].T
        assert relative_error(sum(parts) / WORLD, averaged) < TOLERANCE, key
        # A part alone is not the gradient that the optimizer sees.
        assert relative_error(parts[0], averaged) > 0.1


@pytest.mark.slow
def test_trainer_in_two_processes(two: list[Any]) -> None:
    """A step of SGD is the mean of the gradients that the processes see."""
    found = [each["trainer"] for each in two]
    assert [each["wrapped"] for each in found] == ["DistributedDataParallel"] * WORLD
    mean = sum(each["dense"] for each in found) / WORLD
    for each in found:
        # The difference of two float32 weights has few digits.
        assert torch.allclose(mean, each["averaged"], atol=1e-4)
        assert float(each["averaged"].abs().max()) > 1e-2
    assert not torch.allclose(found[0]["dense"], found[1]["dense"], atol=1e-2)
