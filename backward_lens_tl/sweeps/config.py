"""The settings of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from backward_lens_tl._checks import shown
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.choices import Direction, FactorDtype, Lens, MultiToken, VjpsAt
from backward_lens_tl.errors import SweepError, raised_as
from backward_lens_tl.runs.columns import Column
from backward_lens_tl.runs.config import Config
from backward_lens_tl.settings import Count
from backward_lens_tl.sweeps.columns import TABLES

_FOR_LENS = (
    "matrices", "layers", "direction", "vjps_at", "k", "prepend_bos", "memory"
)  # fmt: skip


@dataclass(frozen=True)
class SweepConfig(Config):
    """The settings of a sweep; those that `backward_lens` also has mean the same here.

    Where several values are allowed, a single one is too, and is stored as a tuple.

    Attributes:
        matrices: Among W_Q, W_K, W_V, W_O, W_in, W_gate and W_out, or the groups attn, mlp, all.
        layers: Layers, negative ones from the end; all by default.
        projection: How vectors are read: logit_lens, normalized, cosine, or several of these.
        jacobian: A Jacobian Lens through which vectors are read in addition: its .pt file, facts,
            or the name of a published lens. Rows of logit_lens have rows of jacobian_lens, and so
            on.
        direction: W_out and W_O as what gradient descent adds (update), or as the raw gradient.
        vjps_at: VJPs of W_out and W_O at the matrix's own output (matrix), or where that output
            joins the residual stream (residual); they differ after a post-norm.
        k: Tokens kept at either end.
        position_columns: Columns of the table of positions in addition to its keys; all by
            default, none to leave the table out. docs/sweeps.md lists them.
        gradient_columns: Columns of the table of gradients, likewise; by default all except the
            list of singular values.
        keep_factors: The dtype in which the factors of all gradients are written too, for
            Sweep.similarity; by default they are not kept. bfloat16 halves the files.
        prepend_bos: Whether prompts get a BOS token; by default as the model does.
        multi_token: Which token represents a target of several; by default such rows are rejected.
        prompts: Number of rows of the data to draw at random; all by default.
        seed: Seed for drawing them.
        shard_size: Prompts that are measured and written together. Their factors are in memory at
            the same time.
        memory: Limits on the memory of a shard.

    Raises:
        SweepError: If a value is not usable.

    Examples:
        >>> import backward_lens_tl as blt
        >>> blt.SweepConfig(matrices="attn", k=3).matrices
        ('attn',)
    """

    ERROR = SweepError

    matrices: str | Sequence[str] = "mlp"
    layers: int | Sequence[int] | None = None
    projection: Lens | Sequence[Lens] = "logit_lens"
    jacobian: str | None = None
    direction: Direction = "update"
    vjps_at: VjpsAt = "matrix"
    k: Count = 10
    position_columns: str | Sequence[str] | None = None
    gradient_columns: str | Sequence[str] | None = None
    keep_factors: FactorDtype | None = None
    prepend_bos: bool | None = None
    multi_token: MultiToken | None = None
    prompts: Count | None = None
    seed: int = 0
    shard_size: Count = 64
    memory: Memory | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "memory", _as_memory(self.memory))
        if not self.projection or len(set(self.projection)) < len(self.projection):
            raise SweepError(
                f"projection is {self.projection!r}; pass 'logit_lens', 'normalized', "
                "'cosine', or several of these"
            )
        for table, asked in self._chosen.items():
            names = [column.name for column in TABLES[table]]
            for name in asked or ():
                if name not in names:
                    raise SweepError(
                        f"the table of {table} has no column {name!r}; it has {', '.join(names)}"
                    )

    def columns(self, table: str) -> tuple[Column, ...]:
        """Return a table's columns, in the order of the schema.

        Args:
            table: `"positions"`, `"gradients"`, `"prompts"` or `"rejects"`.

        Returns:
            The columns, keys included; none if the table is left out.

        Examples:
            >>> lean = blt.SweepConfig(gradient_columns=["norm"])
            >>> [column.name for column in lean.columns("gradients")]
            ['prompt', 'matrix', 'layer', 'norm']
        """
        asked = self._chosen.get(table)
        if asked is None:
            return tuple(column for column in TABLES[table] if column.is_default)
        if not asked:
            return ()
        return tuple(column for column in TABLES[table] if column.is_key or column.name in asked)

    def for_lens(self) -> dict[str, Any]:
        """Return the settings that are arguments of `backward_lens`.

        Returns:
            The values by name; without `multi_token`, since targets of sweeps are token ids. A
            Jacobian Lens is loaded, and is one of the projections.

        Raises:
            JacobianLensError: If the Jacobian Lens cannot be loaded.

        Examples:
            >>> list(blt.SweepConfig().for_lens())[:4]
            ['projection', 'matrices', 'layers', 'direction']
            >>> blt.SweepConfig(jacobian="facts").for_lens()["projection"][1].name
            'jacobian_lens'
        """
        return {"projection": self._lenses} | {name: getattr(self, name) for name in _FOR_LENS}

    @property
    def _lenses(self) -> tuple[Any, ...]:
        if self.jacobian is None:
            return tuple(self.projection)
        from backward_lens_tl.readout.jacobian_projection import jacobian_lens

        names: Sequence[Any] = self.projection  # a tuple, once it was checked
        return (*names, *(jacobian_lens(self.jacobian, name) for name in names))

    @property
    def _chosen(self) -> dict[str, str | Sequence[str] | None]:
        return {"positions": self.position_columns, "gradients": self.gradient_columns}


def _as_memory(value: Any) -> Memory | None:
    """Limits on memory as they are, or from JSON."""
    if value is None or isinstance(value, Memory):
        return value
    if not isinstance(value, Mapping):
        raise SweepError(f"memory is {shown(value)}; pass a Memory, such as Memory(budget=2**30)")
    known = [field.name for field in fields(Memory)]
    for name in value:
        if name not in known:
            raise SweepError(f"memory has no setting {shown(name)}; allowed: {', '.join(known)}")
    import torch

    dtype = value.get("factor_dtype")
    named = None if dtype is None else getattr(torch, str(dtype).removeprefix("torch."), dtype)
    with raised_as(SweepError):
        return Memory(**{**value, "factor_dtype": named})
