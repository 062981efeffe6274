"""Resolve the argument `projection`: names, TransformerLens's lenses, files, and other objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backward_lens_tl.choices import JACOBIAN_LENS
from backward_lens_tl.errors import InputError
from backward_lens_tl.jacobians.average import FittedLens
from backward_lens_tl.jacobians.loading import SUFFIX
from backward_lens_tl.models import Host
from backward_lens_tl.readout.jacobian_projection import JacobianProjection, jacobian_lens
from backward_lens_tl.readout.projections import LENSES, Projection

ProjectionLike = str | Path | Projection | JacobianProjection | FittedLens
"""A name, a projection, TransformerLens's `JacobianLens`, or its file."""


def as_projections(
    projection: ProjectionLike | Sequence[ProjectionLike], host: Host
) -> dict[str, Projection]:
    """Resolve a `projection` argument that may name several.

    Args:
        projection: One projection or several, each as for `as_projection`.
        host: The model.

    Returns:
        The projections by name, in the order given.

    Raises:
        InputError: If there is none, one is not usable, or two have the same name.
    """
    wanted: Sequence[ProjectionLike]
    if isinstance(projection, str) or not isinstance(projection, Sequence):
        wanted = [projection]
    else:
        wanted = projection
    found = [(_name(each, own := as_projection(each, host)), own) for each in wanted]
    by_name = dict(found)
    if not found or len(by_name) < len(found):
        raise InputError(
            f"projection is {projection!r}; pass one, or several that differ in name, such as "
            "('logit_lens', 'normalized')"
        )
    return by_name


def _name(wanted: ProjectionLike, projection: Projection) -> str:
    is_built_in = isinstance(wanted, str) and wanted in LENSES
    return str(wanted) if is_built_in else name_of(projection)


def name_of(projection: Projection) -> str:
    """The attribute `name` of a projection object if that is a text, otherwise its class."""
    name = getattr(projection, "name", None)
    return name if isinstance(name, str) else type(projection).__name__


def as_projection(projection: ProjectionLike, host: Host) -> Projection:
    """Resolve the `projection` argument.

    Args:
        projection: `"logit_lens"`, `"normalized"`, `"cosine"`, what `jacobian_lens` returned,
            TransformerLens's `JacobianLens` or the path of its `.pt` file, or an object with
            `project(vectors, layer) -> logits`.
        host: The model.

    Returns:
        The projection.

    Raises:
        InputError: If it is none of these.
        JacobianLensError: If a Jacobian Lens was fitted on another model.
    """
    if isinstance(projection, str) and projection in LENSES:
        return LENSES[projection](host)
    if isinstance(projection, JacobianProjection):
        return projection.bound(host)
    if not isinstance(projection, type):
        if isinstance(projection, Projection) and callable(projection.project):
            return projection
        if isinstance(projection, FittedLens | Path) or _is_file(projection):
            return jacobian_lens(projection).bound(host)
    fit = ""
    if isinstance(projection, str) and projection.startswith(JACOBIAN_LENS):
        fit = f" ({JACOBIAN_LENS!r} needs a fit: pass jacobian_lens(...) of its file)"
    raise InputError(
        f"unknown projection {projection!r}{fit}; allowed: {', '.join(map(repr, LENSES))}, "
        "TransformerLens's JacobianLens or its .pt file, or an object with project(vectors, layer) "
        "-> logits"
    )


def _is_file(projection: object) -> bool:
    return isinstance(projection, str) and projection.endswith(SUFFIX)
