"""Watched training in several processes, for test_ddp.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from architectures import hf_model
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from backward_lens_tl.training import BackwardLensCallback, StepGradient, watch

WORLD = 2


def microbatches(rank: int) -> list[Tensor]:
    """A process's own part of the batch."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(3, 90, (2, length), generator=generator) for length in (6, 5 + rank)]


@contextmanager
def process_group(folder: Path, rank: int, world: int) -> Iterator[None]:
    """The processes find each other by a file."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def backward(model: nn.Module, ids: Tensor) -> None:
    """Add to the gradients."""
    model(input_ids=ids, labels=ids).loss.backward()


def gradients(model: Any) -> dict[str, Tensor]:
    """`.grad` of all parameters."""
    return {name: each.grad.clone() for name, each in model.named_parameters()}


def step_in_parallel(rank: int) -> dict[str, Any]:
    """One step of two microbatches; only the second one is followed by an exchange."""
    model = hf_model("llama", torch.float64)
    parallel = DistributedDataParallel(model)
    first, second = microbatches(rank)
    with watch(parallel.module, "all") as watched:
        with parallel.no_sync():
            backward(parallel, first)
        backward(parallel, second)
        step = watched.step()
    assert step is not None
    return {
        "dense": {key: gradient.dense() for key, gradient in step.gradients.items()},
        "averaged": gradients(model),
    }


def trainer_in_parallel(folder: Path) -> dict[str, Any]:
    """One step of SGD by a `Trainer`, which puts the model into DistributedDataParallel."""
    from trainers import LEARNING_RATE, SGD, Sequences, trainer_settings
    from transformers import Trainer

    model = hf_model("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.detach().T.clone()
    found: list[StepGradient] = []
    settings = trainer_settings(folder, max_steps=1, ddp_backend="gloo", **SGD)
    with watch(model, "W_out", layers=1) as watched:
        callbacks = [BackwardLensCallback(watched, found.append)]
        trainer = Trainer(model, settings, train_dataset=Sequences(8), callbacks=callbacks)
        trainer.train()
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "dense": found[0]["W_out", 1].dense(),
        "averaged": (before - weight.detach().T) / LEARNING_RATE,
    }


def run(rank: int, folder: Path) -> None:
    """What each process does; the results are in `RANK.pt`."""
    torch.set_num_threads(1)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    # The Trainer wants an address, and does not use it: the processes have found each other.
    os.environ.update(ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    with process_group(folder, rank, WORLD):
        results = {"step": step_in_parallel(rank), "trainer": trainer_in_parallel(folder)}
    torch.save(results, folder / f"{rank}.pt")
