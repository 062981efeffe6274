"""The matrices of a model that somebody trains, and the modules that use them.

A transformers model is not wrapped, because wrapping it changes its modules and their names. Its
matrices are recognised by the names of its modules, as those of checkpoints and adapters are. PEFT
puts its own modules in the place of those that it adapts; their gradient is that of the effective
weight, `W + s A B`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import shown
from backward_lens_tl.editing.checkpoint_names import named_layer
from backward_lens_tl.editing.lora_reading import PREFIX
from backward_lens_tl.errors import InputError, UnsupportedModelError
from backward_lens_tl.models import host_of_trained
from backward_lens_tl.models.holders import Holders
from backward_lens_tl.models.linear import linear_site
from backward_lens_tl.models.matrix_selection import (
    check_sharing,
    find_sites,
    select_layers,
    select_matrices,
)
from backward_lens_tl.models.sites import (
    ATTENTION_MATRICES,
    MATRIX_NAMES,
    READING_MATRICES,
    MatrixName,
    MatrixSite,
    Site,
)


@dataclass(frozen=True)
class TrainedMatrix:
    """One matrix of one layer.

    Attributes:
        site: Where the module that holds it is used.
        columns: The columns of the module's output that are the matrix's own; `None` for all.
    """

    site: MatrixSite
    columns: slice | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Its name and layer."""
        return self.site.matrix, self.site.layer

    def own_columns(self, tensor: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d_out"]:
        """The columns of the matrix among those of its module."""
        return tensor if self.columns is None else tensor[..., self.columns]


def find_trained(
    model: nn.Module, matrices: str | Sequence[str], layers: int | Sequence[int] | None
) -> list[TrainedMatrix]:
    """Find the matrices of a model.

    Args:
        model: A transformers model, with or without PEFT's adapters, or a model of
            TransformerLens.
        matrices: Names or groups, as in `select_matrices`.
        layers: Indices, or `None` for all, as in `select_layers`.

    Returns:
        The matrices in the order of a forward pass.

    Raises:
        InputError: If it is not a model, or has no such matrix or layer.
        UnsupportedModelError: If a matrix cannot be found by its name, belongs to a mixture of
            experts, or is shared by several modules.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is {shown(model)}; pass the model that is trained, of transformers or of "
            "TransformerLens"
        )
    host = host_of_trained(model) or _TransformersModel(model)
    if isinstance(host, _TransformersModel):
        found = host.select(matrices, layers)
    else:
        found = [TrainedMatrix(_single(site)) for site in find_sites(host, matrices, layers)]
    check_sharing(host, [each.site for each in found])
    return found


@dataclass(frozen=True)
class _Named:
    """A matrix that was recognised by the name of its module, before anything is checked.

    Attributes:
        name: The module's name.
        module: The module.
        columns: The columns of its output that are the matrix's own.
        is_joined: Whether the module holds other matrices too.
    """

    name: str
    module: nn.Module
    columns: slice
    is_joined: bool


class _TransformersModel:
    """The matrices of a transformers model by name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @cached_property
    def _named(self) -> dict[tuple[MatrixName, int], _Named]:
        found: dict[tuple[MatrixName, int], _Named] = {}
        for name, module in self._model.named_modules():
            linear = getattr(module, "base_layer", module)  # inside an adapter
            layer, sizes = named_layer(name.removeprefix(PREFIX)), _sizes(linear)
            if layer is None or sizes is None:
                continue
            is_in_out = type(linear).__name__ == "Conv1D"
            columns = layer.columns(*sizes, is_in_out=is_in_out) or {}
            for matrix, own in columns.items():
                found[matrix, layer.layer] = _Named(name, module, own, len(columns) > 1)
        if not found:
            raise UnsupportedModelError(
                f"the model, a {type(self._model).__name__}, has no module whose name is that of "
                "a known matrix, such as model.layers.0.mlp.up_proj; pass the transformers model "
                "itself, without DistributedDataParallel or torch.compile around it, or a model "
                "of TransformerLens"
            )
        return found

    @property
    def n_layers(self) -> int:
        """Number of layers with matrices."""
        return 1 + max(layer for _, layer in self._named)

    @property
    def has_mlp(self) -> bool:
        """Whether there are matrices of MLPs."""
        return bool(self.matrices("mlp"))

    def matrices(self, group: Literal["attn", "mlp"]) -> tuple[MatrixName, ...]:
        """The matrices of attention or MLPs, of any layer."""
        present = {matrix for matrix, _ in self._named}
        return tuple(
            matrix
            for matrix in MATRIX_NAMES
            if matrix in present and (matrix in ATTENTION_MATRICES) == (group == "attn")
        )

    def holders(self, weight: Tensor) -> tuple[str, ...]:
        """Names under which modules hold a parameter; more than one if it is shared."""
        return self._holders.of(weight)

    @cached_property
    def _holders(self) -> Holders:
        return Holders(self._model.named_modules())

    def select(
        self, matrices: str | Sequence[str], layers: int | Sequence[int] | None
    ) -> list[TrainedMatrix]:
        """Some of the matrices, in the order of a forward pass."""
        names = select_matrices(matrices, self)
        wanted = [(name, layer) for layer in select_layers(layers, self) for name in names]
        missing = next((key for key in wanted if key not in self._named), None)
        if missing is not None or not wanted:
            known = ", ".join((*self.matrices("attn"), *self.matrices("mlp")))
            name = f"{missing[0]} in layer {missing[1]}" if missing else f"matrix for {matrices!r}"
            raise UnsupportedModelError(
                f"the model, a {type(self._model).__name__}, has no {name} that can be recognised "
                f"by the name of its module; recognised: {known}. Mixtures of experts and fused "
                "projections of queries, keys and values, except GPT-2's, are not"
            )
        return [self._matrix(*key) for key in wanted]

    def _matrix(self, matrix: MatrixName, layer: int) -> TrainedMatrix:
        named = self._named[matrix, layer]
        site = linear_site(matrix, layer, named.module)
        if matrix in ATTENTION_MATRICES:
            site = self._by_head(site, named)
        return TrainedMatrix(site, named.columns if named.is_joined else None)

    def _by_head(self, site: MatrixSite, named: _Named) -> MatrixSite:
        attention: Any = self._model.get_submodule(named.name.rpartition(".")[0])
        d_head = getattr(attention, "head_dim", None)
        is_reading = site.matrix in READING_MATRICES
        d_in, _ = site.weight.in_out(site.weight.parameter).shape
        width = named.columns.stop - named.columns.start if is_reading else d_in
        if not isinstance(d_head, int) or width % d_head:
            raise UnsupportedModelError(
                f"{site.matrix} of layer {site.layer} is {width} wide, which is not a number of "
                f"heads of width {d_head}; pass matrices='mlp'"
            )
        if is_reading:
            return replace(site, output_heads=width // d_head)
        return replace(site, input_heads=width // d_head)


def _sizes(linear: nn.Module) -> tuple[int, int] | None:
    """Widths of a linear module's input and output; `None` for other modules."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    d_in, d_out = weight.shape  # Conv1D's; another module is refused when it is selected
    return d_in, d_out


def _single(site: Site) -> MatrixSite:
    if isinstance(site, MatrixSite):
        return site
    raise UnsupportedModelError(
        f"{site.matrix} of layer {site.layer} belongs to a mixture of {site.n_experts} experts, "
        "which cannot be watched during training; pass matrices='attn'"
    )
