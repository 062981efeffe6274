"""The difference of two checkpoints, layer by layer, as low-rank changes of the matrices.

Tensors are read from the safetensors files one at a time, so neither model is ever in memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backward_lens_tl._checks import check_path, checked_count
from backward_lens_tl.editing.checkpoint_names import NamedLayer, named_layer
from backward_lens_tl.editing.lora_reading import in_order, some
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.truncated_svd import truncated_svd
from backward_lens_tl.errors import EditError, first_line
from backward_lens_tl.models.loading import FACTS_MODEL
from backward_lens_tl.models.smollm2 import SMOLLM2, download_smollm2, find_smollm2

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_IS_IN_OUT = {"gpt2": True, "gpt_neo": False, "gpt_bigcode": False, "starcoder2": False}
"""Whether layers named `c_attn`, `c_proj` and `c_fc` store `[d_in, d_out]`, by model type."""

_UNEMBEDDING = "lm_head.weight"
_EMBEDDINGS = ("model.embed_tokens.weight", "wte.weight", "model.decoder.embed_tokens.weight")

_HEADLESS = re.compile(r"(decoder\.)?layers\.\d+\.")
"""Names without `model.`, which a model that is saved without its unembedding has."""

_BUFFERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")
"""Constants that some versions of transformers save and others do not."""

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types whose values need no scales, by their names in safetensors files."""


def difference(
    base: str | Path, tuned: str | Path, rank: int
) -> tuple[tuple[MatrixDelta, ...], dict[str, Any]]:
    """Compute what fine-tuning added, as explained in `WeightDelta.between`.

    Args:
        base: Folder of the checkpoint before.
        tuned: Folder of the one after.
        rank: The number of singular vectors that are kept of each matrix.

    Returns:
        The changes of the matrices in the order of a forward pass, and what they are of.

    Raises:
        EditError: If a checkpoint cannot be read, or they are of different models.
    """
    rank = checked_count("rank", rank, EditError)
    with ExitStack() as stack:
        before, after = (stack.enter_context(Checkpoint(each)) for each in (base, tuned))
        found = [each for name in before.layers for each in _changes(before, after, name, rank)]
        left_out = tuple(_other_differences(before, after))
        rounded = _rounded_from_to(before, after)
    if not found:
        as_rounded = f" (rounded from {rounded[0]} to {rounded[1]})" if rounded else ""
        raise EditError(
            "no matrix of attention or the MLP whose name is known differs between "
            f"{os.fspath(base)!r}{as_rounded} and {os.fspath(tuned)!r}; what differs: "
            f"{some(left_out)}"
        )
    about = {
        "method": "difference",
        "base": os.fspath(base),
        "tuned": os.fspath(tuned),
        "rank": rank,
        "weights": "raw",
        "discarded": {each.change.name: each.discarded for each in found},
        "rounded": rounded,
        "rounding": {each.change.name: each.rounding for each in found if each.rounding},
        "left_out": left_out,
    }
    return in_order(each.change for each in found), about


class _Found(NamedTuple):
    """What was added to a matrix.

    Attributes:
        change: The change.
        discarded: The share of its squared norm that its rank leaves out.
        rounding: The share that rounding of the base can explain.
    """

    change: MatrixDelta
    discarded: float
    rounding: float


def _changes(before: Checkpoint, after: Checkpoint, name: str, rank: int) -> Iterator[_Found]:
    """The changes of the matrices in one layer."""
    place = before.layers[name]
    change, rounding = before.difference(after, f"{name}.weight")
    is_in_out = before.is_in_out(place)
    if not is_in_out:
        change, rounding = change.T, None if rounding is None else rounding.T
    columns = place.columns(*change.shape, is_in_out=is_in_out)
    bias = None
    if f"{name}.bias" in before:
        bias = before.difference(after, f"{name}.bias").values
    for matrix, own in ({} if columns is None else columns).items():
        moved = None if bias is None or not bias[own].any() else bias[own].float()
        if change[:, own].any():
            found = truncated_svd(change[:, own], rank)
            left, right = found.u.float(), (found.s[:, None] * found.vh).float()
            whole = MatrixDelta(matrix, place.layer, left, right, bias=moved)
            lost = None if rounding is None else rounding[:, own]
            yield _Found(whole, found.discarded, _share(lost, change[:, own]))
        elif moved is not None:
            nothing = change.new_zeros(len(change), 0).float(), moved.new_zeros(0, len(moved))
            yield _Found(MatrixDelta(matrix, place.layer, *nothing, bias=moved), 0.0, 0.0)


def _other_differences(before: Checkpoint, after: Checkpoint) -> Iterator[str]:
    """Tensors that differ and are not in the changes of the matrices."""
    for name in sorted({*before.names, *after.names}):
        if name in before and before.is_read(name):
            continue
        if name in before and name in after:
            old, new = before.tensor(name), after.tensor(name)
            if not _are_equal(_rounded(old, new), new):
                yield name
        elif not name.endswith(_BUFFERS):
            holder = before if name in before else after
            if name != _UNEMBEDDING or not holder.has_tied_embeddings:
                yield name


def _rounded_from_to(before: Checkpoint, after: Checkpoint) -> tuple[str, str] | None:
    """The types of the first matrix that the base stores with more digits; `None` without any."""
    for name in (f"{layer}.weight" for layer in before.layers):
        old, new = before.dtype(name), after.dtype(name) if name in after else None
        if old is not None and new is not None and _has_more_digits(old, new):
            return _shown(old), _shown(new)
    return None


def _has_more_digits(one: torch.dtype, other: torch.dtype) -> bool:
    return torch.finfo(one).eps < torch.finfo(other).eps


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_quantised(tensor: Tensor) -> bool:
    """Whether the values need scales, as those of integers and of 8-bit floating point."""
    return tensor.dtype not in _TYPES.values()


def _rounded(old: Tensor, new: Tensor) -> Tensor:
    """The old tensor, rounded to the type of the new one if that has fewer digits."""
    # Training in that type starts from the rounded weights.
    if _is_quantised(old) or _is_quantised(new) or not _has_more_digits(old.dtype, new.dtype):
        return old
    return old.to(new.dtype)


def _share(rounding: Tensor | None, change: Tensor) -> float:
    """The share of the squared norm that rounding explains."""
    return 0.0 if rounding is None else min(1.0, float(rounding.norm() / change.norm()) ** 2)


class Difference(NamedTuple):
    """What is added to a tensor.

    Attributes:
        values: The difference, in float64.
        rounding: What rounding the new tensor to the type of the old one changes, about as much as
            a rounded copy of the tensor that training started from; `None` if the old tensor has
            as many digits as the new one.
    """

    values: Float[Tensor, "*shape"]
    rounding: Float[Tensor, "*shape"] | None


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


@dataclass
class Checkpoint:
    """A folder with a model in safetensors files, open while it is a context.

    Attributes:
        source: The folder, `"facts"`, `"smollm2"`, or a name on the hub.
    """

    source: str | Path

    def __post_init__(self) -> None:
        check_path(self.source, EditError)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def folder(self) -> Path:
        """Where the files are."""
        if self.source == FACTS_MODEL:
            return Path(str(files("backward_lens_tl"))) / "facts_model"
        path = Path(self.source)
        if self.source == SMOLLM2:
            path = find_smollm2() or download_smollm2()
        if path.is_dir():
            return path
        if path.is_file():  # a GGUF file, for example
            raise EditError(
                f"{str(path)!r} is a file; pass a folder with safetensors files, as "
                "save_pretrained writes it"
            )
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json"]
        try:
            return Path(snapshot_download(os.fspath(self.source), allow_patterns=patterns))
        # Names, the network and the hub can fail in many ways.
        except Exception as error:
            raise EditError(
                f"{os.fspath(self.source)!r} is not a folder, and cannot be loaded from the hub: "
                f"{first_line(error)}"
            ) from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's configuration."""
        return self._json("config.json")

    @cached_property
    def names(self) -> dict[str, tuple[str, str]]:
        """The file and the stored name of each tensor, by its full name without `transformer.`."""
        if (self.folder / _INDEX).exists():
            stored = self._json(_INDEX).get("weight_map")
            if not isinstance(stored, dict):
                raise EditError(
                    f"{_INDEX} of {os.fspath(self.source)!r} has no weight_map, the file of each "
                    "tensor; save the model with save_pretrained"
                )
        elif (self.folder / _WEIGHTS).exists():
            stored = dict.fromkeys(self._open(_WEIGHTS).keys(), _WEIGHTS)
        else:
            raise EditError(
                f"{os.fspath(self.source)!r} has neither {_WEIGHTS} nor {_INDEX}; save the model "
                "with save_pretrained. For the folder of an adapter, use WeightDelta.from_lora"
            )
        names = {name.removeprefix("transformer."): (file, name) for name, file in stored.items()}
        if any(map(_HEADLESS.match, names)):
            return {f"model.{name}": place for name, place in names.items()}
        return names

    @cached_property
    def layers(self) -> dict[str, NamedLayer]:
        """The layers that hold matrices of attention or the MLP, by name."""
        weights = [name.removesuffix(".weight") for name in self.names if name.endswith(".weight")]
        found = {name: named_layer(name) for name in weights}
        return {name: place for name, place in found.items() if place is not None}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def is_read(self, name: str) -> bool:
        """Whether a tensor is a weight or a bias, and it is known of which matrices."""
        layer, _, part = name.rpartition(".")
        if layer not in self.layers or part not in ("weight", "bias"):
            return False
        shape = self._stored(f"{layer}.weight", "get_slice").get_shape()
        place = self.layers[layer]
        is_in_out = self.is_in_out(place)
        d_in, d_out = shape if is_in_out else reversed(shape)
        return place.columns(d_in, d_out, is_in_out=is_in_out) is not None

    @property
    def has_tied_embeddings(self) -> bool:
        """Whether the stored unembedding is the embedding, which other versions do not store."""
        embeddings = (self.tensor(name) for name in _EMBEDDINGS if name in self)
        return any(_are_equal(self.tensor(_UNEMBEDDING), each) for each in embeddings)

    def is_in_out(self, place: NamedLayer) -> bool:
        """Whether a layer stores `[d_in, d_out]`, as in GPT-2."""
        if ".c_" not in f".{place.rest}":
            return False
        model_type = self.config.get("model_type")
        if model_type not in _IS_IN_OUT:
            raise EditError(
                f"it is not known how a {model_type!r} model stores {place.rest}; known are "
                f"{', '.join(_IS_IN_OUT)}"
            )
        return _IS_IN_OUT[model_type]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._stored(name, "get_tensor")
        return tensor

    def dtype(self, name: str) -> torch.dtype | None:
        """The type of a tensor, without reading it; `None` if its values need scales."""
        return _TYPES.get(self._stored(name, "get_slice").get_dtype())

    def difference(self, other: Checkpoint, name: str) -> Difference:
        """What the other checkpoint adds to a tensor."""
        if name not in other:
            raise EditError(
                f"{os.fspath(other.source)!r} has no {name}, which {os.fspath(self.source)!r} has; "
                "pass checkpoints of the same model"
            )
        before, after = self.tensor(name), other.tensor(name)
        if before.shape != after.shape:
            raise EditError(
                f"{name} is {list(before.shape)} in {os.fspath(self.source)!r} and "
                f"{list(after.shape)} in {os.fspath(other.source)!r}; pass checkpoints of the same "
                "model"
            )
        if _is_quantised(before) or _is_quantised(after):
            raise EditError(
                f"{name} is quantised ({_shown(before.dtype)} and {_shown(after.dtype)}); pass "
                "checkpoints of floating-point weights of at least 16 bits"
            )
        before = _rounded(before, after)
        change = after.double() - before.double()
        if not change.isfinite().all():
            raise EditError(f"the change of {name} has infinite or NaN entries")
        has_less = _has_more_digits(after.dtype, before.dtype)
        rounding = after.double() - after.to(before.dtype).double() if has_less else None
        return Difference(change, rounding)

    def _stored(self, name: str, get: str) -> Any:
        """Call a method of the file that holds a tensor."""
        file, stored = self.names[name]
        opened = self._open(file)
        try:
            return getattr(opened, get)(stored)
        except SafetensorError as error:
            raise EditError(
                f"{name} of {os.fspath(self.source)!r} cannot be read from {file}: "
                f"{first_line(error)}. Save the model again with save_pretrained"
            ) from error

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                opened = safe_open(self.folder / file, framework="pt")
                self._files[file] = self._stack.enter_context(opened)
            except (OSError, SafetensorError) as error:
                raise EditError(
                    f"{file} of {os.fspath(self.source)!r} cannot be read: {first_line(error)}"
                ) from error
        return self._files[file]

    def _json(self, file: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EditError(
                f"{file} of {os.fspath(self.source)!r} cannot be read: {first_line(error)}"
            ) from error
        if not isinstance(found, dict):
            raise EditError(
                f"{file} of {os.fspath(self.source)!r} is a {type(found).__name__}, not an object "
                "of names and values; save the model again with save_pretrained"
            )
        return found
