"""A LoRA adapter in PEFT's format as the changes of the matrices of a model.

PEFT adds `scale * (x @ A^T @ B^T + b)` to the output of a layer, so a change of the matrix is
`left @ right` with `left = A^T` and `right = scale * B^T`, whichever way the layer stores its
weight. The scale is `alpha / r`, or `alpha / sqrt(r)` with rsLoRA. PEFT itself is not needed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from backward_lens_tl._checks import check_path, checked_count, checked_number
from backward_lens_tl.editing.checkpoint_names import named_layer
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.errors import EditError, first_line
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MATRIX_NAMES

PREFIX = "base_model.model."
"""PEFT's prefix of layer names."""

_CONFIG, _WEIGHTS, _PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias)")

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to initialise an adapter that leave the base's weights as they are."""

_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the columns of the merged weights, so the change is not low-rank; "
    "merge it into its base with PEFT, and pass both to WeightDelta.between",
    "use_qalora": "QA-LoRA averages the inputs of a quantised base",
    "use_bdlora": "BD-LoRA has factors in blocks",
    "alora_invocation_tokens": "activated LoRA acts on some of the tokens only",
    "arrow_config": "Arrow chooses among several adapters token by token",
    "layer_replication": "it has more layers than its base",
    "kasa_config": "KaSA scales the factors by trained singular values",
    "megatron_config": "its layers are Megatron's",
}
"""Settings under which the change is not what is read here, and why."""


def read_adapter(
    folder: str | Path, *, partial: bool
) -> tuple[tuple[MatrixDelta, ...], dict[str, Any]]:
    """Read an adapter, as explained in `WeightDelta.from_lora`.

    Args:
        folder: The folder of the adapter.
        partial: Whether to leave out what is not a matrix of attention or the MLP.

    Returns:
        The changes of the matrices in the order of a forward pass, and what they are of.

    Raises:
        EditError: If the adapter cannot be read, or does something else as well.
    """
    check_path(folder, EditError)
    path = Path(folder)
    config = _config(path)
    _check_kind(path, config)
    layers, others = _layers(_tensors(path))
    found: dict[tuple[str, int], MatrixDelta] = {}
    for name, parts in layers.items():
        changes = _changes(name, parts, config)
        if changes is None:
            others.append(name)
            continue
        for each in changes:
            if (each.matrix, each.layer) in found:
                raise EditError(f"the adapter {str(path)!r} changes {each.name} twice ({name})")
            found[each.matrix, each.layer] = each
    if others and not partial:
        whole = [name for name in others if _is_whole(name)]
        reason = (
            f"{some(whole)}, which it stores as a whole, not as a change; merge it into its base "
            "with PEFT, and pass both to WeightDelta.between, or"
            if whole
            else f"{some(others)}, which cannot be read as a matrix of attention or the MLP;"
        )
        raise EditError(
            f"the adapter {str(path)!r} also changes {reason} pass partial=True to leave that out"
        )
    if not found:
        raise EditError(
            f"the adapter {str(path)!r} changes no matrix of attention or the MLP whose name is "
            f"known; it has {some(others)}"
        )
    about = {
        "method": "LoRA",
        "base": config.get("base_model_name_or_path") or "",
        "adapter": os.fspath(folder),
        "weights": "raw",
        "left_out": tuple(others),
    }
    return in_order(found.values()), about


def _is_whole(name: str) -> bool:
    """Whether a tensor is the trained weight or bias of a matrix of attention or the MLP."""
    layer, _, part = name.replace(".base_layer.", ".").rpartition(".")
    return part in ("weight", "bias") and named_layer(layer) is not None


def in_order(changes: Any) -> tuple[MatrixDelta, ...]:
    """Sort changes in the order of a forward pass."""
    return tuple(sorted(changes, key=lambda each: (each.layer, MATRIX_NAMES.index(each.matrix))))


def some(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}" if names else "nothing"


# --- files --------------------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EditError(
            f"{str(folder)!r} is not the folder of an adapter: {_CONFIG} cannot be read "
            f"({first_line(error)}){_instead(folder)}"
        ) from error
    if not isinstance(config, dict):
        raise EditError(f"{_CONFIG} in {str(folder)!r} is not the configuration of an adapter")
    return config


def _instead(folder: Path) -> str:
    """What to pass instead of a folder without an adapter."""
    # PEFT saves adapters that have names into subfolders, and trainers their checkpoints.
    inside = sorted(each.parent.name for each in folder.glob(f"*/{_CONFIG}"))
    if inside:
        return f". There are adapters in its subfolders {some(inside)}; pass one of these"
    if (folder / "config.json").exists():
        return (
            ". It holds a whole model: if an adapter was merged into it, pass its base and this "
            "folder to WeightDelta.between"
        )
    return ""


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse adapters whose change is not the product of their factors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise EditError(f"the adapter {str(folder)!r} is of type {kind!r}; only LORA can be read")
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise EditError(f"the adapter {str(folder)!r} has {name}: {reason}")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise EditError(
            f"the adapter {str(folder)!r} was initialised with {start!r}, which changes the "
            "weights of the base too; merge it into its base with PEFT, and pass both to "
            "WeightDelta.between"
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        if (folder / _WEIGHTS).exists():
            return load_file(folder / _WEIGHTS)
        pickled: dict[str, Tensor] = torch.load(
            folder / _PICKLED, map_location="cpu", weights_only=True
        )
    # A damaged file can make the libraries that read it raise anything.
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise EditError(
            f"the weights of the adapter {str(folder)!r} cannot be read: {first_line(error)}"
        ) from error
    return pickled


def _layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each adapted layer, and the names of those that are not LoRA's."""
    layers: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for name, tensor in tensors.items():
        found = _PART.fullmatch(name.removeprefix(PREFIX))
        if found is None:
            others.append(name.removeprefix(PREFIX))
        else:
            layers.setdefault(found["layer"], {})[found["part"]] = tensor
    return layers, others


# --- the changes --------------------------------------------------------------------------------


def _changes(
    name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]
) -> list[MatrixDelta] | None:
    """The changes of the matrices in one layer; `None` if it is not known what it holds."""
    place = named_layer(name)
    if place is None:
        return None
    if not {"A.weight", "B.weight"} <= parts.keys():
        raise EditError(f"the adapter has only one of the two factors of {name}")
    if not all(tensor.isfinite().all() for tensor in parts.values()):
        raise EditError(
            f"the factors of {name} have infinite or NaN entries; train the adapter again, or pass "
            "an earlier checkpoint of it"
        )
    rank = _rank(config, name)
    if len(parts["A.weight"]) != rank:
        raise EditError(
            f"the factors of {name} have rank {len(parts['A.weight'])}, but {_CONFIG} says {rank}, "
            "so the scale alpha / r is not known; pass the configuration that the adapter was "
            "trained with"
        )
    scale = _alpha(config, name) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    left = at_least_float32(parts["A.weight"]).T
    right = at_least_float32(parts["B.weight"]).T * scale
    bias = parts.get("B.bias")
    is_in_out = bool(config.get("fan_in_fan_out"))
    columns = place.columns(len(left), right.shape[1], is_in_out=is_in_out)
    if columns is None:
        return None
    return [
        MatrixDelta(
            matrix,
            place.layer,
            left,
            right[:, own].contiguous(),
            bias=None if bias is None else at_least_float32(bias)[own] * scale,
        )
        for matrix, own in columns.items()
    ]


def _rank(config: Mapping[str, Any], layer: str) -> int:
    name, value = _of_layer(config, "rank_pattern", "r", layer)
    return checked_count(f"{name} in {_CONFIG}", value, EditError)


def _alpha(config: Mapping[str, Any], layer: str) -> float:
    name, value = _of_layer(config, "alpha_pattern", "lora_alpha", layer)
    return checked_number(f"{name} in {_CONFIG}", value, error=EditError)


def _of_layer(config: Mapping[str, Any], pattern: str, name: str, layer: str) -> tuple[str, Any]:
    """A setting of a layer, its own or that of all layers, and where it is."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise EditError(
            f"{pattern} in {_CONFIG} is {patterns!r}; pass an object of names of layers and numbers"
        )
    for own, value in patterns.items():
        # As PEFT compares names; the first pattern that fits counts.
        try:
            fits = re.match(rf"(.*\.)?({own})$", layer)
        except re.error as error:
            raise EditError(
                f"{pattern} in {_CONFIG} has {own!r}, which is not a regular expression ({error}); "
                "pass names of layers, or regular expressions for them"
            ) from error
        if fits:
            return f"{pattern}[{own!r}]", value
    if name not in config:
        raise EditError(f"the configuration of the adapter has no {name}")
    return name, config[name]
