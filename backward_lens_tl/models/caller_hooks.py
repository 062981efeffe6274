"""The caller's hooks on a model, as opposed to those of the libraries and of this package."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)
"""torch's own collections of the hooks that act on every module."""

_LIBRARIES = ("transformer_lens", "transformers", "accelerate")
_WIRING = "transformer_lens.model_bridge"
_OWN = __name__.partition(".")[0]


def with_callers_hooks(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules, including hook points, that have hooks of the caller."""
    on_all = any(_GLOBAL_HOOKS)
    return [
        module
        for module in modules
        if on_all
        or any(
            _is_callers(hook, module)
            for hook in chain(
                module._forward_hooks.values(),
                module._forward_pre_hooks.values(),
                module._backward_hooks.values(),
                module._backward_pre_hooks.values(),
            )
        )
    ]


def _is_callers(hook: Any, module: nn.Module) -> bool:
    library = _module_of(hook).partition(".")[0]
    if library == _OWN:
        return False
    if not isinstance(module, HookPoint):
        return library not in _LIBRARIES
    # Hook points call the hooked function through a wrapper of TransformerLens's own. The wiring
    # between bridges is the library's; hooks of run_with_cache observe the caller's own run.
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    if "hook" in names:
        hook = hook.__closure__[names.index("hook")].cell_contents
    return not _module_of(hook).startswith(_WIRING)


def _module_of(function: object) -> str:
    return str(getattr(function, "__module__", ""))
