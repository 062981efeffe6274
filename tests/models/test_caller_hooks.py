"""Hooks of the caller are told apart from those of this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import Case
from torch import nn

from backward_lens_tl.capture.interventions import adding
from backward_lens_tl.models import host_of
from backward_lens_tl.models.hooks import Tap, hooked
from backward_lens_tl.models.resumption import keeping_start

pytestmark = pytest.mark.versions


def unchanged(tensor: torch.Tensor) -> None:
    del tensor


def point(model: Any) -> nn.Module:
    """A hook point, where TransformerLens wraps the functions of callers."""
    found: nn.Module = model.hook_dict["blocks.1.hook_resid_post"]
    return found


@pytest.mark.parametrize("hook", [unchanged, partial(unchanged), [].append])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("find", [point, lambda model: model.blocks[1]])
def test_the_packages_own_hooks_do_not_count(
    case: Case, find: Callable[[Any], nn.Module], side: Any, hook: Any
) -> None:
    module = find(case.model)
    host = host_of(case.model)
    with hooked(Tap(module, side), hook):
        assert not host.hooked_modules  # first read inside
        handle = module.register_forward_hook(lambda *_: None)
        found = host_of(case.model).hooked_modules
        handle.remove()
    assert set(found) == {module}


def test_interventions_and_kept_starts_do_not_count(case: Case) -> None:
    host = host_of(case.model)
    [site] = host.sites(1, ["W_out"])
    with adding(site, lambda inputs: torch.zeros(())), keeping_start(host, 1):
        assert not host.hooked_modules


def test_hooks_added_through_transformer_lens_count(case: Case) -> None:
    seen: list[int] = []
    hooks = [("blocks.1.hook_resid_post", lambda value, hook: seen.append(len(value)))]
    with case.model.hooks(fwd_hooks=hooks):
        found = host_of(case.model).hooked_modules
    assert set(found) == {point(case.model)}
    assert not host_of(case.model).hooked_modules
