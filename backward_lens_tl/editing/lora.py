"""An edit as a LoRA adapter of the Hugging Face model, in PEFT's format.

PEFT adds `scale * x @ A^T @ B^T + b` to the output of a linear layer: with `A = left^T`,
`B = right^T` and scale 1 this is the edit. The task is to find the layer, and its columns that hold
the matrix:

    W_Q   W_K   W_V     in TransformerLens, heads concatenated
     │     │     │
    [q │ k │ v]         one layer of GPT-2, or [q k v of head 0 │ q k v of head 1 │ ...] of NeoX

Weights are compared, not names, so no architecture is special.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from backward_lens_tl._checks import check_path
from backward_lens_tl.editing.lora_reading import PREFIX
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.errors import EditError, ResultFileError, first_line
from backward_lens_tl.files.storage import replacing
from backward_lens_tl.models.linear import stored_layout
from backward_lens_tl.models.loading import without_progress_bars
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import READING_MATRICES, MatrixSite

_ROUNDINGS = 8
"""Rounding after the mean of a row was subtracted, in `eps` of the largest weight."""

_FEW = 16
"""Rows that are compared first: columns that differ nearly always differ there."""


@dataclass(frozen=True)
class Adapted:
    """A matrix of a TransformerLens model, and what an edit adds to it.

    Attributes:
        name: The matrix and its layer, for messages.
        weight: The matrix, with heads concatenated.
        left: Left factor of the edit.
        right: Right factor of the edit.
        bias: What the edit adds to the bias, if anything.
        n_parts: Number of equal blocks of columns, heads, that the layer may have interleaved.
        writes: Whether it writes to the residual stream, whose mean may have been subtracted.
    """

    name: str
    weight: Float[Tensor, "d_in d_out"]
    left: Float[Tensor, "d_in rank"]
    right: Float[Tensor, "rank d_out"]
    bias: Float[Tensor, "d_out"] | None
    n_parts: int
    writes: bool


def adapted(site: MatrixSite, delta: MatrixDelta) -> Adapted:
    """What an edit adds to one matrix of the model that it is of.

    Args:
        site: The matrix.
        delta: The change.

    Returns:
        The matrix and the change, as at most as many outer products as the matrix has columns.
    """
    left, right = delta.factors
    if left.shape[1] > min(delta.shape):  # more outer products than any matrix needs
        left, right = replace(delta, left=None, right=None, values=delta.dense()).factors
    weight = site.weight.in_out(site.weight.parameter.detach())
    is_reading = site.matrix in READING_MATRICES
    return Adapted(
        name=delta.name,
        weight=site.joined(weight),
        left=left,
        right=right,
        bias=delta.bias,
        n_parts=len(weight) if is_reading and weight.ndim == 3 else 1,
        writes=not is_reading,
    )


@dataclass(frozen=True)
class _Layer:
    """A linear layer of the Hugging Face model; `weight` is `[d_in, d_out]`, as in `Conv1D`."""

    name: str
    weight: Float[Tensor, "d_in d_out"]
    is_conv1d: bool

    def centered(self) -> _Layer:
        """The layer with the mean of every row subtracted."""
        wide = at_least_float32(self.weight)
        return _Layer(self.name, wide - wide.mean(1, keepdim=True), self.is_conv1d)


_Place = tuple[_Layer, Int[Tensor, "_"]]
"""A layer, and the indices of the columns that are a matrix's."""


def write_adapter(
    folder: str | Path, base: Any, adapted: Sequence[Adapted], *, may_be_centered: bool
) -> None:
    """Write an adapter, as explained in `WeightDelta.to_lora`.

    Args:
        folder: The folder to write to.
        base: A `PreTrainedModel`, a folder or a name on the hub.
        adapted: The matrices, and what is added to each.
        may_be_centered: Whether the model is invariant to the mean over the residual stream of
            what is written to it.

    Raises:
        EditError: If there is nothing to write, a matrix is in no layer or in several, or PEFT is
            missing.
        ResultFileError: If the folder cannot be written.
    """
    peft = _peft()
    if not adapted:
        raise EditError("the edit changes nothing, and PEFT has no adapters without layers")
    check_path(folder, ResultFileError)
    layers, name = _layers(base)
    by_layer: dict[str, list[tuple[Adapted, _Place]]] = {}
    for each in adapted:
        place = _place(each, layers, name, may_be_centered=may_be_centered and each.writes)
        by_layer.setdefault(place[0].name, []).append((each, place))
    has_bias = any(each.bias is not None for each in adapted)
    tensors: dict[str, Tensor] = {}
    for layer, parts in by_layer.items():
        tensors |= _tensors(f"{PREFIX}{layer}.lora_", parts, has_bias=has_bias)
    ranks = {layer: len(tensors[f"{PREFIX}{layer}.lora_A.weight"]) for layer in by_layer}
    conv1d = all(place[0].is_conv1d for parts in by_layer.values() for _, place in parts)
    _write(Path(folder), _config(peft, name, ranks, conv1d, has_bias), tensors)


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise EditError('to_lora needs peft: pip install "backward-lens-tl[lora]"') from error
    found: ModuleType = peft
    return found


# --- the Hugging Face model --------------------------------------------------------------------


def _layers(base: Any) -> tuple[list[_Layer], str]:
    """The linear layers of the base model, and its name."""
    if isinstance(base, nn.Module):
        return list(_linear_layers(base)), str(getattr(base, "name_or_path", ""))
    check_path(base, EditError)
    try:
        with without_progress_bars():
            loaded: nn.Module = AutoModelForCausalLM.from_pretrained(base)
    # The libraries that read files can raise anything.
    except Exception as error:
        raise EditError(
            f"transformers cannot load the base {os.fspath(base)!r}: {first_line(error)}"
        ) from error
    return list(_linear_layers(loaded)), os.fspath(base)


def _linear_layers(base: nn.Module) -> Iterator[_Layer]:
    for name, module in base.named_modules():
        if "_original_component" in name or hasattr(module, "original_component"):
            raise EditError(
                "the base is a Hugging Face model that a TransformerBridge has wrapped, so its "
                "layers have other names than PEFT expects; pass a freshly loaded one, or its "
                "folder or name"
            )
        weight = getattr(module, "weight", None)
        is_conv1d = type(module).__name__ == "Conv1D"
        if not (is_conv1d or isinstance(module, nn.Linear)) or not isinstance(weight, Tensor):
            continue
        if weight.is_floating_point() and weight.ndim == 2:  # not so for quantised weights
            is_turned = stored_layout(module, name, 0) == "out_in"
            stored = weight.detach()
            yield _Layer(name, stored.T if is_turned else stored, is_conv1d)


# --- finding a matrix ---------------------------------------------------------------------------


def _place(
    adapted: Adapted, layers: Sequence[_Layer], base: str, *, may_be_centered: bool
) -> _Place:
    """The one layer that holds a matrix, and its columns there."""
    found = list(_places(adapted, layers))
    if not found and may_be_centered:
        fitting = (layer for layer in layers if layer.weight.shape == adapted.weight.shape)
        found = list(_places(adapted, [layer.centered() for layer in fitting]))
    if not found:
        raise EditError(
            f"no linear layer of the base {base!r} has the weights of {adapted.name}. Either it is "
            "another model, an edit is applied to the TransformerLens model, or TransformerLens "
            "has processed its weights (fold_ln): load it without processing, as load_model does, "
            "and compute the edit on that"
        )
    if len(found) > 1:
        names = ", ".join(layer.name for layer, _ in found)
        raise EditError(
            f"the weights of {adapted.name} are in several places of the base {base!r} ({names}), "
            "which cannot be told apart"
        )
    return found[0]


def _places(adapted: Adapted, layers: Sequence[_Layer]) -> Iterator[_Place]:
    """Where a matrix is: as a whole, or else head by head, or column by column."""
    width = adapted.weight.shape[1]
    divisions = dict.fromkeys((1, adapted.n_parts, width))
    for n_parts in divisions:
        found = [
            (layer, columns)
            for layer in layers
            for columns in _columns(adapted.weight, layer.weight, n_parts)
        ]
        if found:
            yield from found
            return


def _columns(
    weight: Float[Tensor, "d_in d_out"], layer: Float[Tensor, "layer_in layer_out"], n_parts: int
) -> Iterator[Int[Tensor, "d_out"]]:
    """The columns of a layer that are a matrix's, once for each time that they occur."""
    if weight.shape[0] != layer.shape[0] or weight.shape[1] > layer.shape[1]:
        return
    width = weight.shape[1] // n_parts
    starts: list[list[int]] = []
    for part in weight.split(width, dim=1):
        starts.append(_starts(part, layer))
        if not starts[-1]:
            return
    # Equal parts, such as heads of zeros, cannot be distinguished.
    ways = zip(*starts, strict=True) if n_parts == 1 else [tuple(own[0] for own in starts)]
    is_clear = n_parts == 1 or all(len(own) == 1 for own in starts)
    for way in ways:
        columns = torch.cat([torch.arange(start, start + width) for start in way])
        if is_clear and len(columns.unique()) == len(columns):
            yield columns


def _starts(part: Float[Tensor, "d_in width"], layer: Float[Tensor, "d_in layer_out"]) -> list[int]:
    """The columns of a layer at which a part of a matrix begins."""
    rows = torch.linspace(0, len(part) - 1, min(_FEW, len(part)), device=part.device).long()
    # The column with the largest norm: a column of zeros would be found in many places.
    at = int(at_least_float32(part).norm(dim=0).argmax())
    last = layer.shape[1] - part.shape[1]
    few = layer[rows.to(layer.device)][:, at : at + last + 1]
    likely = _are_alike(part[rows, at : at + 1], few).all(0).nonzero()[:, 0].tolist()
    width = part.shape[1]
    return [
        start for start in likely if bool(_are_alike(part, layer[:, start : start + width]).all())
    ]


def _are_alike(one: Float[Tensor, "d_in #width"], other: Float[Tensor, "d_in width"]) -> Tensor:
    """Where two weights agree up to rounding to the coarser of both dtypes."""
    eps = max(torch.finfo(each.dtype).eps for each in (one, other))
    a, b = one.to(device=other.device, dtype=torch.float64), other.double()
    fine = min(eps, torch.finfo(torch.float32).eps)
    largest = b.abs().max() if b.numel() else 0.0
    close: Tensor = (a - b).abs() <= eps * b.abs() + _ROUNDINGS * fine * largest
    return close


# --- the adapter -------------------------------------------------------------------------------


def _tensors(
    name: str, parts: Sequence[tuple[Adapted, _Place]], *, has_bias: bool
) -> dict[str, Tensor]:
    """The adapter of one layer: the factors of all matrices in it."""
    layer = parts[0][1][0].weight
    left = torch.cat([at_least_float32(each.left).cpu() for each, _ in parts], dim=1)
    right = left.new_zeros(left.shape[1], layer.shape[1])
    bias = left.new_zeros(layer.shape[1])
    row = 0
    for each, (_, columns) in parts:
        rank = len(each.right)
        right[row : row + rank, columns] = each.right.cpu().to(right.dtype)
        row += rank
        if each.bias is not None:
            bias[columns] += each.bias.cpu().to(bias.dtype)
    if not left.shape[1]:  # PEFT has no adapters of rank 0
        left, right = left.new_zeros(len(left), 1), right.new_zeros(1, right.shape[1])
    tensors = {f"{name}A.weight": left.T, f"{name}B.weight": right.T}
    return tensors | ({f"{name}B.bias": bias} if has_bias else {})


def _config(peft: Any, base: str, ranks: Mapping[str, int], is_conv1d: bool, has_bias: bool) -> Any:
    """PEFT's configuration of the adapter."""
    if has_bias and "lora_bias" not in {field.name for field in fields(peft.LoraConfig)}:
        raise EditError(
            f"the edit changes biases, which LoRA in peft {peft.__version__} does not support; "
            "upgrade to peft 0.14 or newer"
        )
    # Names are regular expressions here. `alpha` equal to the rank makes the scale 1.
    by_name = {name.replace(".", r"\."): rank for name, rank in ranks.items()}
    largest = max(ranks.values())
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base or None,
        inference_mode=True,
        target_modules=list(ranks),
        r=largest,
        lora_alpha=largest,
        rank_pattern=by_name,
        alpha_pattern=dict(by_name),
        lora_dropout=0.0,
        fan_in_fan_out=is_conv1d,
        **({"lora_bias": True} if has_bias else {}),
    )


def _write(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(os.fspath(folder))
    except OSError as error:
        raise ResultFileError(f"{os.fspath(folder)!r} cannot be written: {error}") from error
    owned = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(folder / SAFETENSORS_WEIGHTS_NAME) as partial:
        save_file(owned, partial, metadata={"format": "pt"})
