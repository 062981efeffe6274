"""The difference of two checkpoints, layer by layer, as low-rank changes of the matrices.

Tensors are read from the safetensors files one at a time, so neither model is ever in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

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

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_IS_IN_OUT = {"gpt2": True, "gpt_neo": False, "gpt_bigcode": False, "starcoder2": False}
"""Whether layers named `c_attn`, `c_proj` and `c_fc` store `[d_in, d_out]`, by model type."""

_UNEMBEDDING = "lm_head.weight"
_EMBEDDINGS = ("model.embed_tokens.weight", "wte.weight", "model.decoder.embed_tokens.weight")

_BUFFERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")
"""Constants that some versions of transformers save and others do not."""


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
        changes, discarded = [], {}
        for name in before.layers:
            for change, share in _changes(before, after, name, rank):
                changes.append(change)
                discarded[change.name] = share
        left_out = tuple(_other_differences(before, after))
    if not changes:
        raise EditError(
            "no matrix of attention or the MLP whose name is known differs between "
            f"{os.fspath(base)!r} and {os.fspath(tuned)!r}; what differs: {some(left_out)}"
        )
    about = {
        "method": "difference",
        "base": os.fspath(base),
        "tuned": os.fspath(tuned),
        "rank": rank,
        "weights": "raw",
        "discarded": discarded,
        "left_out": left_out,
    }
    return in_order(changes), about


def _changes(
    before: Checkpoint, after: Checkpoint, name: str, rank: int
) -> Iterator[tuple[MatrixDelta, float]]:
    """The changes of the matrices in one layer, and the share that each leaves out."""
    place = before.layers[name]
    change = before.difference(after, f"{name}.weight")
    is_in_out = before.is_in_out(place)
    if not is_in_out:
        change = change.T
    columns = place.columns(*change.shape, is_in_out=is_in_out)
    bias = None
    if f"{name}.bias" in before:
        bias = before.difference(after, f"{name}.bias")
    for matrix, own in ({} if columns is None else columns).items():
        moved = None if bias is None or not bias[own].any() else bias[own].float()
        if change[:, own].any():
            found = truncated_svd(change[:, own], rank)
            left, right = found.u.float(), (found.s[:, None] * found.vh).float()
            yield MatrixDelta(matrix, place.layer, left, right, bias=moved), found.discarded
        elif moved is not None:
            nothing = change.new_zeros(len(change), 0).float(), moved.new_zeros(0, len(moved))
            yield MatrixDelta(matrix, place.layer, *nothing, bias=moved), 0.0


def _other_differences(before: Checkpoint, after: Checkpoint) -> Iterator[str]:
    """Tensors that differ and are not in the changes of the matrices."""
    for name in sorted({*before.names, *after.names}):
        if name in before and before.is_read(name):
            continue
        if name in before and name in after:
            if not _are_equal(before.tensor(name), after.tensor(name)):
                yield name
        elif not name.endswith(_BUFFERS):
            holder = before if name in before else after
            if name != _UNEMBEDDING or not holder.has_tied_embeddings:
                yield name


def _is_quantised(tensor: Tensor) -> bool:
    """Whether the values need scales, as those of integers and of 8-bit floating point."""
    return not tensor.is_floating_point() or tensor.element_size() < 2


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


@dataclass
class Checkpoint:
    """A folder with a model in safetensors files, open while it is a context.

    Attributes:
        source: The folder, `"facts"`, or a name on the hub.
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
        if path.is_dir():
            return path
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
        """The file and the stored name of each tensor, by its name without `transformer.`."""
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
        return {name.removeprefix("transformer."): (file, name) for name, file in stored.items()}

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

    def difference(self, other: Checkpoint, name: str) -> Float[Tensor, "*shape"]:
        """What the other checkpoint adds to a tensor, in float64."""
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
                f"{name} is quantised ({_dtype(before)} and {_dtype(after)}); pass checkpoints of "
                "floating-point weights of at least 16 bits"
            )
        change = after.double() - before.double()
        if not change.isfinite().all():
            raise EditError(f"the change of {name} has infinite or NaN entries")
        return change

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
