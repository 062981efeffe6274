"""Read fitted Jacobian Lenses: files of the published format, folders, and names on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from backward_lens_tl._checks import is_integer
from backward_lens_tl.errors import JacobianLensError, first_line
from backward_lens_tl.jacobians.average import (
    FittedLens,
    Jacobians,
    checked_jacobians,
    jacobians_of,
)
from backward_lens_tl.models.loading import FACTS_MODEL

SUFFIX = ".pt"
"""How files of lenses end."""

_IN_FOLDER = "lens.pt"
"""TransformerLens's default name of a lens in a folder."""

FACTS_LENS = "jacobian_lens.pt"
"""Name of the file that ships with the facts model."""

_KEPT = 2
"""Files that stay in memory, so that calls with the same path read it once."""


def load_jacobians(source: object) -> Jacobians:
    """Load the matrices of a fitted lens.

    Args:
        source: TransformerLens's `JacobianLens`, a file that its `save` or the reference
            implementation wrote, a folder with a `lens.pt`, `"facts"`, or a name that
            TransformerLens's `JacobianLens.from_pretrained` finds on the hub.

    Returns:
        The matrices.

    Raises:
        JacobianLensError: If there is no such lens, or it cannot be read.
    """
    if isinstance(source, Jacobians):
        return source
    if not isinstance(source, str | Path):
        if isinstance(source, FittedLens) and not isinstance(source, type):
            return jacobians_of(source)
        raise JacobianLensError(
            f"source is a {type(source).__name__}; pass TransformerLens's JacobianLens, the path "
            "of its file, 'facts', or a name on the hub"
        )
    path = Path(source)
    if os.path.isdir(path):
        path = path / _IN_FOLDER
    if os.path.isfile(path):
        about = path.stat()
        return _read(str(path), about.st_mtime_ns, about.st_size)
    if source == FACTS_MODEL:
        with as_file(files("backward_lens_tl") / "facts_model" / FACTS_LENS) as shipped:
            about = shipped.stat()
            return _read(str(shipped), about.st_mtime_ns, about.st_size)
    if isinstance(source, Path) or path.suffix == SUFFIX or path != Path(source):
        raise JacobianLensError(f"{os.fspath(path)!r} does not exist; pass the file of a lens")
    return _from_hub(source)


@lru_cache(maxsize=_KEPT)
def _read(path: str, modified: int, size: int) -> Jacobians:
    """Read a file; the time of its last change and its size identify its contents."""
    del modified, size
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
        raise JacobianLensError(
            f"{path!r} is not the file of a Jacobian Lens, or is damaged: {first_line(error)}"
        ) from error
    if isinstance(held, Mapping) and isinstance(held.get("J"), Mapping):
        return checked_jacobians(
            held["J"], held.get("n_prompts"), held.get("d_model"), held.get("metadata")
        )
    if isinstance(held, Mapping) and isinstance(held.get("jacobian_sum"), Mapping):
        return _unfinished(path, held)
    raise JacobianLensError(
        f"{path!r} holds no 'J' and no 'jacobian_sum'; pass a file that JacobianLens.save wrote"
    )


def _unfinished(path: str, held: Mapping[str, Any]) -> Jacobians:
    """The average so far of a checkpoint, which holds the sum over prompts."""
    n_prompts, sums = held.get("n_done", held.get("n_prompts")), held["jacobian_sum"]
    if not is_integer(n_prompts) or int(n_prompts) < 1:
        raise JacobianLensError(
            f"{path!r} is a checkpoint after {n_prompts!r} prompts; continue the fit until it has "
            "at least one"
        )
    metadata = dict(held.get("metadata") or {})
    if "target_layer" in held:
        metadata.setdefault("target_layer", held["target_layer"])
    matrices = {layer: matrix.float() / int(n_prompts) for layer, matrix in sums.items()}
    width = next(iter(matrices.values())).shape[0] if matrices else 0
    return checked_jacobians(matrices, n_prompts, width, metadata)


def _from_hub(name: str) -> Jacobians:
    try:
        from transformer_lens.tools.analysis import JacobianLens
    except ImportError as error:
        raise JacobianLensError(
            f"{name!r} is not a file, and TransformerLens {version('transformer-lens')} does not "
            "look for lenses on the hub; download the file and pass its path, or install "
            "TransformerLens 3.9 or newer"
        ) from error
    try:
        return jacobians_of(JacobianLens.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise JacobianLensError(
            f"{name!r} is not a file, and the hub has no lens of that name, or cannot be reached: "
            f"{first_line(error)}. Pass the path of a lens's file, or fit a lens with "
            "fit_jacobian_lens"
        ) from error
