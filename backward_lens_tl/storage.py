"""Tensors and their description in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backward_lens_tl.errors import ResultFileError

FORMAT_VERSION = 1
"""Raised when older files can no longer be read."""

_KEY = "backward_lens_tl"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON description to one file.

    Args:
        path: The file; one that exists is replaced, at once and as a whole.
        tensors: The tensors, by name.
        description: Anything that JSON holds.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    header = json.dumps({"format": FORMAT_VERSION, **description})
    partial = Path(f"{os.fspath(path)}.partial")
    # Equal tensors may share memory, which the format does not allow: each gets its own.
    owned = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    try:
        save_file(owned, partial, metadata={_KEY: header})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ResultFileError(f"{os.fspath(path)!r} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what `write_tensors` wrote.

    Args:
        path: The file.

    Returns:
        The tensors, on the CPU, and the description.

    Raises:
        ResultFileError: If the file is missing, damaged, not a saved result, or of a later format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ResultFileError(f"{os.fspath(path)!r} cannot be read: {error}") from error
    if _KEY not in metadata:
        raise ResultFileError(
            f"{os.fspath(path)!r} is a safetensors file, but not one that result.save(path) wrote"
        )
    try:
        description: dict[str, Any] = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise ResultFileError(f"{os.fspath(path)!r} has a damaged header: {error}") from error
    if description.get("format") != FORMAT_VERSION:
        raise ResultFileError(
            f"{os.fspath(path)!r} has format {description.get('format')}; this version reads "
            f"{FORMAT_VERSION}. Install the backward-lens-tl that wrote it, "
            f"{description.get('backward_lens_tl', 'of unknown version')}"
        )
    return tensors, description
