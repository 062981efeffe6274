"""The modules that hold a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn


class Holders:
    """The places of parameters in modules.

    Args:
        modules: The modules by name; one that comes twice is counted once.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._found: dict[int, dict[tuple[int, str], str]] = {}
        for name, module in modules:
            for own, parameter in module._parameters.items():
                place = f"{name}.{own}".removeprefix(".")
                self._found.setdefault(id(parameter), {}).setdefault((id(module), own), place)

    def of(self, weight: Tensor) -> tuple[str, ...]:
        """Names under which modules hold a parameter; more than one if it is shared."""
        places: Mapping[tuple[int, str], str] = self._found.get(id(weight), {})
        return tuple(places.values())
