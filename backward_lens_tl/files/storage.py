"""Dataclasses of tensors in one safetensors file, without pickle.

Each tensor is stored under the path of fields that leads to it. The metadata hold everything else
as JSON, in which a tensor, a dataclass or a mapping is an object with one of the keys below.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backward_lens_tl._checks import check_path
from backward_lens_tl.errors import ResultFileError
from backward_lens_tl.models.checksums import tensors_digest

_SavedT = TypeVar("_SavedT", bound="Saved")

FORMAT_VERSION = 7
"""Increased when older files can no longer be read."""

_KEY, _DIGEST = "backward_lens_tl", "sha256"
_TENSOR, _DATACLASS, _FIELDS, _MAPPING = "tensor", "dataclass", "fields", "mapping"


def write(path: str | Path, value: object, about: Mapping[str, object]) -> None:
    """Write a dataclass and everything in it to one file.

    Args:
        path: The file. An existing file is replaced atomically.
        value: The dataclass. It may contain tensors, strings, numbers, `None`, and tuples, mappings
            and dataclasses of these.
        about: Further entries of the header, as JSON.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _packed(value, _KEY, tensors, names={})
    header = json.dumps({"format": FORMAT_VERSION, **about, "tree": tree})
    # Tensors may share memory, which the format does not allow: each gets its own.
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with replacing(path) as partial:
        save_file(owned, partial, metadata={_KEY: header, _DIGEST: tensors_digest(owned, header)})


def check_place(path: str | Path) -> None:
    """Refuse a file that cannot be written because of where it is.

    Args:
        path: The file.

    Raises:
        ResultFileError: If it is a folder, or its own folder does not exist.
    """
    check_path(path, ResultFileError)
    file, name = Path(path), repr(os.fspath(path))
    if os.path.isdir(file):
        raise ResultFileError(f"{name} cannot be written: it is a folder")
    if not os.path.isdir(file.parent):
        raise ResultFileError(
            f"{name} cannot be written: folder {os.fspath(file.parent)!r} does not exist"
        )


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: an existing file stays until the new one is complete.

    Args:
        path: The file.

    Yields:
        The temporary file to write to. It is in the same folder, hidden, and has the same suffix,
        from which pandas infers the compression.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    check_place(path)
    file, name = Path(path), repr(os.fspath(path))
    partial = file.with_name(f".{uuid4().hex}.partial.{file.name}")
    try:
        partial.touch()
        # Some writers make files that only their owner may read.
        mode = (file if file.exists() else partial).stat().st_mode
        yield partial
        with partial.open("rb") as written:
            os.fsync(
                written.fileno()
            )  # otherwise a power cut could keep the name and lose the content
        partial.chmod(mode)
        partial.replace(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ResultFileError(f"{name} cannot be written: {error}") from error
    finally:
        with suppress(OSError, ValueError):
            partial.unlink()


def remove_partials(path: str | Path) -> None:
    """Remove temporary files of processes that were killed while they wrote a file.

    Args:
        path: The file. No other process may be writing it.
    """
    file = Path(path)
    for left in file.parent.glob(f".*.partial.{escape(file.name)}"):
        with suppress(OSError):
            left.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Args:
        path: The file.
        text: Its contents.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read(path: str | Path, kinds: Sequence[type], parts: Sequence[type]) -> Any:
    """Read a dataclass that `write` wrote.

    Args:
        path: The file.
        kinds: The dataclasses that it may hold.
        parts: Other dataclasses that it may contain.

    Returns:
        The dataclass, with its tensors on the CPU.

    Raises:
        ResultFileError: If the file is missing or damaged, has another format, or holds something
            else.
    """
    check_path(path, ResultFileError)
    name = repr(os.fspath(path))
    if os.path.isdir(path):
        raise ResultFileError(f"{name} cannot be read: it is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ResultFileError(
            f"{name} cannot be read: it is missing, damaged, or not a file that .save(path) wrote "
            f"({error})"
        ) from error
    if _KEY not in metadata:
        raise ResultFileError(f"{name} is a safetensors file, but not one that .save(path) wrote")
    try:
        header = json.loads(metadata[_KEY])
        found = header["format"]
        held = header["tree"][_DATACLASS] if found == FORMAT_VERSION else None
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ResultFileError(
            f"{name} is damaged: its header cannot be read ({error!r})"
        ) from error
    if found != FORMAT_VERSION:
        raise ResultFileError(
            f"{name} has format {found}, but this version reads {FORMAT_VERSION}; install "
            f"backward-lens-tl {header.get('backward_lens_tl', '')}, which wrote it"
        )
    if metadata.get(_DIGEST) != tensors_digest(tensors, metadata[_KEY]):
        raise ResultFileError(f"{name} is damaged: its checksum does not match its contents")
    if held not in [kind.__name__ for kind in kinds]:
        raise ResultFileError(
            f"{name} holds a {held}, not a {kinds[0].__name__}; read it with {held}.load"
        )
    types = {each.__name__: each for each in (*kinds, *parts)}
    try:
        return _unpacked(header["tree"], tensors, types)
    except (KeyError, TypeError, ValueError) as error:
        raise ResultFileError(f"{name} is damaged: {error!r}") from error


class Saved:
    """A dataclass with a file format.

    Attributes:
        WHAT: What it is, for the file's header.
        PARTS: Other dataclasses that it may contain.
    """

    WHAT: ClassVar[str]
    PARTS: ClassVar[tuple[type, ...]] = ()

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file.

        Args:
            path: The file. An existing file is replaced atomically.

        Raises:
            ResultFileError: If the file cannot be written.

        Examples:
            >>> delta.save(folder / "paris.safetensors")
            >>> [file.name for file in folder.iterdir()]
            ['paris.safetensors']
        """
        about = {"what": self.WHAT, "backward_lens_tl": version("backward-lens-tl")}
        write(path, self, about)

    @classmethod
    def load(cls: type[_SavedT], path: str | Path) -> _SavedT:
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Returns:
            The same object, with its tensors on the CPU.

        Raises:
            ResultFileError: If the file is damaged or holds something else.

        Examples:
            >>> delta.save(folder / "paris.safetensors")
            >>> blt.editing.WeightDelta.load(folder / "paris.safetensors").matrices
            (MatrixDelta(W_out of layer 5, [512, 128], rank <= 1),)
        """
        found: _SavedT = read(path, (cls,), cls.PARTS)
        return found


def _packed(value: Any, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """A value as JSON; its tensors are added to `tensors`, each once."""
    if isinstance(value, Tensor):
        name = names.setdefault(id(value), path)
        tensors[name] = value
        return {_TENSOR: name}
    if is_dataclass(value):
        held = {f.name: getattr(value, f.name) for f in fields(value)}
        packed = {name: _packed(v, f"{path}.{name}", tensors, names) for name, v in held.items()}
        return {_DATACLASS: type(value).__name__, _FIELDS: packed}
    if isinstance(value, Mapping):
        pairs = [
            [_packed(key, path, tensors, names), _packed(v, f"{path}.{key}", tensors, names)]
            for key, v in value.items()
        ]
        return {_MAPPING: pairs}
    if isinstance(value, tuple):
        return [_packed(v, f"{path}.{i}", tensors, names) for i, v in enumerate(value)]
    return value


def _unpacked(packed: Any, tensors: Mapping[str, Tensor], types: Mapping[str, type]) -> Any:
    if isinstance(packed, list):
        return tuple(_unpacked(entry, tensors, types) for entry in packed)
    if not isinstance(packed, dict):
        return packed
    if _TENSOR in packed:
        return tensors[packed[_TENSOR]]
    if _MAPPING in packed:
        pairs = [_unpacked(pair, tensors, types) for pair in packed[_MAPPING]]
        return dict(pairs)
    held = {name: _unpacked(v, tensors, types) for name, v in packed[_FIELDS].items()}
    return types[packed[_DATACLASS]](**held)
