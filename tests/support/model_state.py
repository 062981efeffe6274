"""Snapshots of a model's state, which must be the same before and after a call."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from models import Case
from torch import nn

HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks(model: nn.Module) -> list[tuple]:
    """Every hook on every module, in order, including TransformerLens's lists."""
    found = []
    for name, module in model.named_modules():
        for attribute in HOOK_DICTS:
            found.append((name, attribute, *map(id, getattr(module, attribute).values())))
        for attribute in ("fwd_hooks", "bwd_hooks"):
            if (listed := getattr(module, attribute, None)) is not None:
                found.append((name, attribute, *(id(entry.hook) for entry in listed)))
    return found


def random_states() -> tuple:
    return random.getstate(), str(np.random.get_state()), tuple(torch.get_rng_state().tolist())


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a caller could notice."""
    parameters = dict(model.named_parameters())
    return {
        "values": {name: p.detach().clone() for name, p in parameters.items()},
        "versions": {name: p._version for name, p in parameters.items()},
        "identities": {name: id(p) for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "grads": {
            name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()
        },
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": hooks(model),
        "random": random_states(),
        "cfg": str(sorted(vars(model.cfg).items(), key=lambda item: item[0])),
        "grad enabled": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key in ("values", "grads", "buffers"):
            assert value.keys() == after[key].keys()
            for name, tensor in value.items():
                found = after[key][name]
                assert (found is None) == (tensor is None), (key, name)
                assert tensor is None or torch.equal(found, tensor), (key, name)
        else:
            assert value == after[key], key


def make_busy(case: Case) -> Case:
    model = case.model
    tokens = case.tokens(5)
    model(tokens, return_type="logits").sum().backward()
    for index, parameter in enumerate(model.parameters()):
        if index % 3 == 0:
            parameter.requires_grad_(False)
    model.blocks[1].train()
    for module in model.modules():  # a submodule in train mode is allowed without dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    model.add_hook("blocks.0.mlp.hook_post", lambda value, hook: value * 1.01)
    model.blocks[1].register_forward_hook(lambda *_: None)
    model.blocks[1].mlp.register_forward_pre_hook(lambda *_: None)
    model.blocks[0].register_full_backward_hook(lambda *_: None)
    # Some attributes of TransformerLens appear in the first forward pass of each kind.
    model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
    return case
