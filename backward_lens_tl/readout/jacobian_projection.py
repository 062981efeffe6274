"""Read vectors of any layer as the last layer reads its own: through average Jacobians.

What is added to the output of block `l` changes the output of the last block by `J_l` times it on
average. The Logit Lens then reads `J_l v` instead of `v`. A vector elsewhere in the residual stream
is carried along the stream to the next point that has a matrix, the output of a block:

- `W_out` of layer `l` writes to the output of block `l`: `J_l`.
- `W_O` of layer `l`: `J_l`. This is exact if attention and MLP are parallel; otherwise it leaves
  out what the MLP of the same layer makes of the vector.
- `W_in` and `W_gate` of layer `l` read the stream after attention, on its way to the output of
  block `l`: `J_l`. In parallel blocks they read the output of block `l - 1`: `J_{l-1}`.
- `W_Q`, `W_K` and `W_V` of layer `l` read the output of block `l - 1`: `J_{l-1}`.

The embedding has no matrix. What reads it is read through `J_0`, which leaves out block 0. Inputs
`x_i` are read as they are, after the norm and its gain, as with the Logit Lens: with `J_l = I` both
lenses agree for every matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from backward_lens_tl._checks import check_choice
from backward_lens_tl.choices import JACOBIAN_LENS, Lens, VjpsAt
from backward_lens_tl.errors import JacobianLensError
from backward_lens_tl.jacobians.average import FittedLens, Jacobians
from backward_lens_tl.jacobians.checking import check_fits, check_sizes
from backward_lens_tl.jacobians.loading import load_jacobians
from backward_lens_tl.jacobians.stream import block_of, has_post_norms
from backward_lens_tl.models import Host
from backward_lens_tl.models.sites import WRITING_MATRICES, Site
from backward_lens_tl.readout.projections import LENSES, LogitLens, Projection


@dataclass(frozen=True)
class JacobianProjection:
    """A projection through average Jacobians, as `jacobian_lens` returns it.

    Attributes:
        jacobians: The average Jacobians.
        projection: How vectors are read once they are carried to the last layer.
        check: Whether a model must be the one that the lens was fitted on.

    Examples:
        >>> import backward_lens_tl as blt
        >>> lens = blt.jacobian_lens("facts", "normalized")
        >>> lens.name, lens.jacobians.layers
        ('jacobian_lens_normalized', (0, 1, 2, 3, 4, 5, 6))
    """

    jacobians: Jacobians
    projection: Lens = "logit_lens"
    check: bool = True

    @property
    def name(self) -> str:
        """Its name in results."""
        is_plain = self.projection == "logit_lens"
        return JACOBIAN_LENS if is_plain else f"{JACOBIAN_LENS}_{self.projection}"

    def bound(self, host: Host) -> CarriedLens:
        """The projection for one model.

        Args:
            host: The model.

        Returns:
            The projection.

        Raises:
            JacobianLensError: If the lens was fitted on another model.

        Examples:
            >>> from backward_lens_tl.models import host_of
            >>> blt.jacobian_lens("facts").bound(host_of(model)).name
            'jacobian_lens'
        """
        (check_fits if self.check else check_sizes)(self.jacobians, host)
        return CarriedLens(host, self.jacobians, LENSES[self.projection](host), self.name)


def jacobian_lens(
    source: str | Path | FittedLens | Jacobians,
    projection: Lens = "logit_lens",
    *,
    check: bool = True,
) -> JacobianProjection:
    """A projection that reads vectors of any layer through average Jacobians.

    What an update adds to the output of block `l` changes the output of the last block by `J_l`
    times it on average (the Jacobian Lens of Gurnee et al., 2026, and of TransformerLens). The
    Logit Lens assumes `J_l = I`, which fails in early layers.

    Args:
        source: TransformerLens's `JacobianLens`, the path of its file or of a folder with
            a `lens.pt`, `"facts"` for the lens of the facts model, or the name of a published lens
            on the hub.
        projection: How vectors are read once they are carried to the last layer: `"logit_lens"`,
            `"normalized"` or `"cosine"`.
        check: Whether a model must be the one that the lens was fitted on. Pass `False` to read
            a model with the matrices of another, as a control.

    Returns:
        A value for the argument `projection` of `backward_lens` and of everything else that reads
        vectors. Its name in results is `"jacobian_lens"`, `"jacobian_lens_normalized"` or
        `"jacobian_lens_cosine"`.

    Raises:
        JacobianLensError: If there is no such lens, or it cannot be read.
        InputError: If another argument is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> lens = blt.jacobian_lens("facts")
        >>> result = blt.backward_lens(
        ...     model, "Lionel Messi plays for", " Paris", projection=("logit_lens", lens)
        ... )
        >>> result.projections
        ('logit_lens', 'jacobian_lens')
    """
    check_choice("projection", projection, get_args(Lens))
    check_choice("check", check, (True, False))
    return JacobianProjection(load_jacobians(source), projection, check)


class CarriedLens:
    """The Jacobian Lens of one model: carry vectors to the last layer, then read them.

    Args:
        host: The model.
        jacobians: The average Jacobians.
        lens: Reads the carried vectors.
        name: The projection's name in results.
    """

    def __init__(self, host: Host, jacobians: Jacobians, lens: LogitLens, name: str) -> None:
        self.jacobians, self.lens, self.name = jacobians, lens, name
        self._host, self._last = host, host.n_layers - 1

    def project(
        self, vectors: Float[Tensor, "n d_model"], layer: int
    ) -> Float[Tensor, "n d_vocab"]:
        """Score every token for vectors at the output of the layer's block."""
        return self.lens.project(self.carried(vectors, layer), layer)

    def carried(
        self, vectors: Float[Tensor, "n d_model"], block: int
    ) -> Float[Tensor, "n d_model"]:
        """Vectors at the output of the last block.

        Args:
            vectors: Vectors at the output of a block.
            block: The block; -1 for the embedding, which is read like the output of block 0.

        Returns:
            `J_l v`; `v` itself for the last block.

        Raises:
            JacobianLensError: If the lens has no matrix for the block.
        """
        self.check_blocks([block])
        source = max(block, 0)
        return vectors if source == self._last else self.jacobians.times(vectors, source)

    def check_matrices(self, matrices: Iterable[str], vjps_at: VjpsAt) -> None:
        """Refuse vectors that are not at the residual stream.

        Args:
            matrices: The matrices that read or write them.
            vjps_at: Where vectors of matrices that write are taken.

        Raises:
            JacobianLensError: If a norm comes between the matrix and the stream.
        """
        writing = [matrix for matrix in matrices if matrix in WRITING_MATRICES]
        if vjps_at == "matrix" and writing and has_post_norms(self._host):
            raise JacobianLensError(
                f"a norm follows {' and '.join(writing)} in this model, and the Jacobian Lens "
                "reads vectors of the residual stream; pass vjps_at='residual' to backward_lens, "
                "which reads VJPs after that norm"
            )

    def check_blocks(self, blocks: Iterable[int]) -> None:
        """Refuse blocks that the lens has no matrix for.

        Args:
            blocks: Blocks whose outputs are to be read; -1 for the embedding.

        Raises:
            JacobianLensError: If there is such a block.
        """
        needed = {max(block, 0) for block in blocks} - {self._last}
        missing = sorted(needed - set(self.jacobians.layers))
        if missing:
            raise JacobianLensError(
                f"the Jacobian Lens has no matrix for layers {missing}, only for "
                f"{list(self.jacobians.layers)}; choose layers=... among these, or fit the lens "
                "on all layers"
            )


def blocks_to_read(
    host: Host, sites: Sequence[Site], projections: Iterable[Projection], vjps_at: VjpsAt
) -> dict[tuple[str, int], int]:
    """The block whose Jacobian carries the vectors of each matrix.

    Args:
        host: The model.
        sites: The matrices.
        projections: How they are read.
        vjps_at: Where vectors of matrices that write are taken.

    Returns:
        The blocks by matrix and layer.

    Raises:
        JacobianLensError: If a Jacobian Lens among the projections cannot read one of the matrices.
    """
    blocks: dict[tuple[str, int], int] = {
        (site.matrix, site.layer): block_of(host, site.matrix, site.layer) for site in sites
    }
    for lens in projections:
        if isinstance(lens, CarriedLens):
            lens.check_blocks(blocks.values())
            lens.check_matrices(dict.fromkeys(matrix for matrix, _ in blocks), vjps_at)
    return blocks
