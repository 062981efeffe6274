"""The header of a GGUF file, llama.cpp's format: its metadata, and how its tensors are stored.

The format is described at <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. The package
`gguf` has a reader too, but it takes three seconds for a vocabulary of 50,000 tokens, and
transformers calls it several times. This one takes a tenth of a second.
"""

from __future__ import annotations

import math
import mmap
import re
import shutil
import struct
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backward_lens_tl.errors import ModelNotFoundError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
"""Types of metadata values, as `struct` names them."""

_PER_TOKEN = tuple(
    f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")
)
"""Metadata with an entry for each token, or for each merge of two tokens."""


@dataclass(frozen=True)
class StoredTensor:
    """How a tensor is stored.

    Attributes:
        name: llama.cpp's name, such as `blk.0.attn_q.weight`.
        shape: Its sizes, the innermost first.
        kind: Its type, such as `Q4_1`.
        offset: First byte, from the start of the data.
        n_bytes: Number of bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: Values by name, such as `general.architecture`.
        tensors: How each tensor is stored.
        entries: The metadata's bytes by name, each with its name and type.
        tensor_table: The bytes that describe the tensors.
        data_start: First byte of the tensors' values.
        alignment: What offsets in the file are multiples of.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]
    entries: Mapping[str, bytes]
    tensor_table: bytes
    data_start: int
    alignment: int

    @classmethod
    def read(cls, path: Path) -> GGUFFile:
        """Read the header of a file.

        Args:
            path: The file.

        Returns:
            The header.

        Raises:
            ModelNotFoundError: If there is no such file, or it is damaged or cut off.
            UnsupportedModelError: If it is of another version, or one of several files of a model.
        """
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob,
            ):
                found = _read(path, blob)
        except (OSError, ValueError, OverflowError, struct.error) as error:
            raise ModelNotFoundError(
                f"{str(path)!r} cannot be read as a GGUF file: {error}; if the file exists, it is "
                "damaged or cut off: download it again"
            ) from error
        if found.metadata.get("split.count", 0) > 1:
            raise UnsupportedModelError(
                f"{str(path)!r} is one of {found.metadata['split.count']} files of a model; join "
                "them with llama.cpp's llama-gguf-split --merge"
            )
        return found

    @property
    def architecture(self) -> str:
        """The architecture, by llama.cpp's name."""
        return str(self.metadata.get("general.architecture"))

    @property
    def name(self) -> str:
        """The file's name and its tensors by type."""
        kinds = Counter(tensor.kind for tensor in self.tensors)
        stored = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"{self.path.name} ({stored})"

    @property
    def stored_as(self) -> dict[str, dict[str, int]]:
        """How many tensors of each name are stored as which type; `*` stands for a layer."""
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for tensor in self.tensors:
            found[re.sub(r"\.\d+\.", ".*.", tensor.name)][tensor.kind] += 1
        return {name: dict(kinds) for name, kinds in found.items()}

    @property
    def n_values(self) -> int:
        """Number of values of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def d_vocab(self) -> int | None:
        """Rows of the embedding."""
        shapes = (each.shape for each in self.tensors if each.name == "token_embd.weight")
        return next((shape[-1] for shape in shapes), None)

    def write_without_vocabulary(self, path: Path) -> None:
        """Copy the model without its tokens, which slow down other readers.

        Args:
            path: The file to write.
        """
        kept = [entry for name, entry in self.entries.items() if name not in _PER_TOKEN]
        size = f"{self.architecture}.vocab_size"
        if self.d_vocab is not None and size not in self.entries:
            kept.append(_text(size) + struct.pack("<II", _UINT32, self.d_vocab))
        with path.open("wb") as copy, self.path.open("rb") as original:
            copy.write(_MAGIC + struct.pack("<IQQ", 3, len(self.tensors), len(kept)))
            copy.writelines((*kept, self.tensor_table))
            copy.write(bytes(-copy.tell() % self.alignment))
            original.seek(self.data_start)
            shutil.copyfileobj(original, copy, 2**24)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


class _Cursor:
    """Reads a file's bytes in order.

    Attributes:
        at: The next byte.
    """

    def __init__(self, blob: mmap.mmap) -> None:
        self._blob, self.at = blob, 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._blob, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def text(self) -> str:
        return self.raw(self.number("Q")).decode()

    def raw(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self._blob):
            raise ValueError(f"byte {self.at:,} is beyond its end")
        return self._blob[start : self.at]

    def since(self, start: int) -> bytes:
        return self._blob[start : self.at]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.numbers("IQ")
            if count > len(self._blob):
                raise ValueError(f"a list of {count:,} values")
            if of in _SCALARS:
                return list(self.numbers(f"{count}{_SCALARS[of]}"))
            return [self.value(of) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown type {kind}")
        return self.number(_SCALARS[kind])


def _read(path: Path, blob: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(blob)
    if cursor.raw(4) != _MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise UnsupportedModelError(
            f"{str(path)!r} has GGUF version {version}, is for a big-endian machine, or is "
            "damaged; versions 2 and 3 are read. Download it again, or convert it with llama.cpp"
        )
    n_tensors, n_entries = cursor.numbers("QQ")
    metadata, entries = {}, {}
    for _ in range(n_entries):
        start, name = cursor.at, cursor.text()
        metadata[name] = cursor.value(cursor.number("I"))
        entries[name] = cursor.since(start)
    start = cursor.at
    tensors = tuple(_stored_tensor(cursor) for _ in range(n_tensors))
    table = cursor.since(start)
    alignment = int(metadata.get("general.alignment", 32))
    data_start = cursor.at + -cursor.at % alignment
    end = data_start + max((each.offset + each.n_bytes for each in tensors), default=0)
    if end > len(blob):
        raise ValueError(f"it has {len(blob):,} of {end:,} bytes")
    return GGUFFile(path, metadata, tensors, entries, table, data_start, alignment)


def _stored_tensor(cursor: _Cursor) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text()
    shape = cursor.numbers(f"{cursor.number('I')}Q")
    kind, offset = cursor.numbers("IQ")
    stored = GGMLQuantizationType(kind)  # a ValueError if it is unknown
    n_values, n_bytes = GGML_QUANT_SIZES[stored]
    size = math.prod(shape) * n_bytes // n_values
    return StoredTensor(name, shape, stored.name, offset, size)
