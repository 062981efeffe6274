"""Dataclasses of tensors in one safetensors file, without pickle.

Tensors lie in the file under the path of fields that leads to them; the file's header holds the
rest as JSON, in which a tensor, a dataclass or a mapping is an object with one key of those below.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
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

_T = TypeVar("_T")
_SavedT = TypeVar("_SavedT", bound="Saved")

FORMAT_VERSION = 4
"""Raised when older files can no longer be read."""

_KEY, _DIGEST = "backward_lens_tl", "sha256"
_TENSOR, _DATACLASS, _FIELDS, _MAPPING = "tensor", "dataclass", "fields", "mapping"


def write(path: str | Path, value: object, about: Mapping[str, object]) -> None:
    """Write a dataclass and all that it holds to one file.

    Args:
        path: The file; one that exists is replaced, at once and as a whole.
        value: The dataclass: tensors, texts, numbers, `None`, and tuples, mappings and dataclasses
            of those.
        about: What it is and what wrote it, for the header, as JSON can hold it.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _packed(value, _KEY, tensors, names={})
    header = json.dumps({"format": FORMAT_VERSION, **about, "tree": tree})
    # Different tensors may share memory, which the format does not allow: each gets its own.
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with replacing(path) as partial:
        save_file(owned, partial, metadata={_KEY: header, _DIGEST: tensors_digest(owned, header)})


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file at once and as a whole: what is at its path stays until the new one is complete.

    Args:
        path: The file.

    Yields:
        Where to write.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    check_path(path, ResultFileError)
    file = Path(path)
    if os.path.isdir(file):
        raise ResultFileError(f"{os.fspath(path)!r} cannot be written: it is a folder")
    if not os.path.isdir(file.parent):
        raise ResultFileError(
            f"{os.fspath(path)!r} cannot be written: there is no folder {os.fspath(file.parent)!r}"
        )
    # With the file's own ending, from which pandas tells whether to compress.
    # Hidden, since whoever reads all files of a folder is not to read this one.
    partial = file.with_name(f".{uuid4().hex}.partial.{file.name}")
    try:
        partial.touch()
        # Some writers make files that only their owner may read.
        mode = (file if file.exists() else partial).stat().st_mode
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # or the name could outlive the content in a power cut
        partial.chmod(mode)
        partial.replace(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ResultFileError(f"{os.fspath(path)!r} cannot be written: {error}") from error
    finally:
        with suppress(OSError, ValueError):
            partial.unlink()


def read(path: str | Path, kinds: Sequence[type], parts: Sequence[type]) -> Any:
    """Read back what `write` wrote.

    Args:
        path: The file.
        kinds: The dataclasses that it may hold; where it holds none of them, the first is said to
            be missing.
        parts: Other dataclasses that may be in those.

    Returns:
        The dataclass, its tensors on the CPU.

    Raises:
        ResultFileError: If the file is missing, damaged, not a saved result, of a later format, or
            holds something else.
    """
    check_path(path, ResultFileError)
    if os.path.isdir(path):
        raise ResultFileError(f"{os.fspath(path)!r} cannot be read: it is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ResultFileError(
            f"{os.fspath(path)!r} cannot be read: it is not a file that result.save(path) wrote, "
            f"or it is damaged ({error})"
        ) from error
    except (OSError, ValueError) as error:
        raise ResultFileError(f"{os.fspath(path)!r} cannot be read: {error}") from error
    if _KEY not in metadata:
        raise ResultFileError(
            f"{os.fspath(path)!r} is a safetensors file, but not one that result.save(path) wrote"
        )
    try:
        header: Any = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise ResultFileError(f"{os.fspath(path)!r} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise ResultFileError(f"{os.fspath(path)!r} has a damaged header: {header!r}")
    if header.get("format") != FORMAT_VERSION:
        raise ResultFileError(
            f"{os.fspath(path)!r} has format {header.get('format')}; this version reads "
            f"{FORMAT_VERSION}. Install the backward-lens-tl that wrote it, "
            f"{header.get('backward_lens_tl', 'of unknown version')}"
        )
    if metadata.get(_DIGEST) != tensors_digest(tensors, metadata[_KEY]):
        raise ResultFileError(f"{os.fspath(path)!r} is damaged: its contents have changed")
    try:
        held = str(header["tree"][_DATACLASS])
        if held in [kind.__name__ for kind in kinds]:
            types = {each.__name__: each for each in (*kinds, *parts)}
            return _unpacked(header["tree"], tensors, types)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ResultFileError(
            f"{os.fspath(path)!r} is damaged: {type(error).__name__} {error}"
        ) from error
    raise ResultFileError(
        f"{os.fspath(path)!r} holds a {held}, no {kinds[0].__name__}; read it with {held}.load"
    )


def read_one(path: str | Path, kind: type[_T], parts: Sequence[type]) -> _T:
    """Read back one dataclass that `write` wrote.

    Args:
        path: The file.
        kind: The dataclass.
        parts: Other dataclasses that may be in it.

    Returns:
        The dataclass, its tensors on the CPU.

    Raises:
        ResultFileError: As for `read`.
    """
    found: _T = read(path, (kind,), parts)
    return found


class Saved:
    """A dataclass that lies in a file of its own.

    Attributes:
        WHAT: What it is, for the file's header.
        PARTS: Other dataclasses that are in it.
    """

    WHAT: ClassVar[str]
    PARTS: ClassVar[tuple[type, ...]] = ()

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file.

        Args:
            path: The file; one that exists is replaced as a whole.

        Raises:
            ResultFileError: If it cannot be written.

        Examples:
            >>> delta.save(folder / "paris.safetensors")
            >>> [file.name for file in folder.iterdir()]
            ['paris.safetensors']
        """
        about = {"what": self.WHAT, "backward_lens_tl": version("backward-lens-tl")}
        write(path, self, about)

    @classmethod
    def load(cls: type[_SavedT], path: str | Path) -> _SavedT:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The same, its tensors on the CPU.

        Raises:
            ResultFileError: If the file holds something else, or is damaged.

        Examples:
            >>> delta.save(folder / "paris.safetensors")
            >>> blt.editing.WeightDelta.load(folder / "paris.safetensors")
            WeightDelta(ForwardPassShift, W_out of layer 5)
        """
        return read_one(path, cls, cls.PARTS)


def _packed(value: Any, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """A value as JSON holds it, with its tensors put aside, each once."""
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
