"""Norms and ranks by segment of a prompt and by layer (paper, figures 6, 7 and 16 to 21)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from backward_lens_tl._checks import check_choice, is_integer, listed, shown
from backward_lens_tl.analysis.tables import SOURCES, grouped, table_of, with_types_of
from backward_lens_tl.capture.chat import TURNS
from backward_lens_tl.data.segments import SEGMENTS
from backward_lens_tl.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from backward_lens_tl.analysis.tables import Source

_CELL = ["prompt", "matrix", "layer", "position"]
_ORDER = (*SEGMENTS[:-1], *TURNS, SEGMENTS[-1])
_NORMS = {"vjp": "norm", "input": "input_norm", "write": "write_norm"}
_RANKS = {"target": "target_rank", "answer": "answer_rank"}
_UNRANKED = {
    "target": "the objective has no target; pass target=... in addition",
    "answer": 'request it with backward_lens(..., measures=("answer_rank",))',
}


def norms_by_segment(
    positions: Source, of: Literal["vjp", "input", "write"] = "vjp"
) -> pd.DataFrame:
    """Norms of vectors by segment and layer (paper, figures 6, 16 and 17).

    The mean is over tokens, so a segment of several tokens counts several times, and a prompt with
    a long subject counts more than one with a short subject. As in the paper, zero vectors are
    included, such as all but one of the VJPs in the last layer. A cell counts once, even if the
    table has several projections.

    Args:
        positions: A sweep, or the table that `Sweep.positions` or
            `BackwardLensResult.to_df(subject)` returns, of any number of prompts. For chats,
            `to_df(turns=True)` gives the turns as segments.
        of: `"vjp"` for `||delta_i||_2`, `"input"` for `||x_i||_2`, or `"write"` for
            `||x_i|| ||delta_i||`, the norm of the term that a token writes into the matrix.

    Returns:
        One row per `matrix`, `layer` and `segment`, in the order of the table's matrices, of layers
        and of `SEGMENTS`, with `of`, the `mean` norm, the sample standard deviation `std` (missing
        for one token), `count` (number of tokens) and `prompts` (number of prompts of the matrix in
        all segments). Tokens of prompts without a subject have no segment and are left out.

    Raises:
        InputError: If the table has other columns or no rows, or no token has a segment.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(
        ...     model, "Lionel Messi plays for", " Paris", matrices="W_out", layers=7
        ... )
        >>> norms = blt.analysis.norms_by_segment(result.to_df(subject="Lionel Messi"))
        >>> norms.loc[norms["mean"] > 0, "segment"].tolist()  # of the last layer
        ['last token']
    """
    check_choice("of", of, tuple(_NORMS))
    table = table_of(positions, "positions", [*_CELL, "segment", _NORMS[of]])
    cells = _segmented(table, _CELL, [_NORMS[of]]).astype({_NORMS[of]: "float64"})
    groups = grouped(cells, ("matrix", "layer", "segment"))[_NORMS[of]]
    found = groups.agg(["mean", "std", "count"]).reset_index()
    found.insert(1, "of", of)
    return with_types_of(table, _with_prompts(found, cells, ["matrix"]))


def token_ranks_by_segment(
    positions: Source,
    of: Literal["target", "answer"] = "target",
    *,
    prompts: int | Iterable[int] | None = None,
) -> pd.DataFrame:
    """Ranks of a token in the vocabulary, by segment and layer (figures 7 and 18 to 21).

    Cells that add nothing have no rank and are left out: a zero vector reads as the final norm's
    bias, whose rank does not depend on the prompt. The paper includes them, which is why the curves
    of its figure 7 meet in the last layer (appendix A). Averages are over tokens, as in
    `norms_by_segment`.

    Args:
        positions: A sweep, or the table that `Sweep.positions` or
            `BackwardLensResult.to_df(subject)` returns, of any number of prompts, or for chats
            `to_df(turns=True)`. The paper uses `direction="gradient"`.
        of: `"target"`, or `"answer"` for the model's own answer, which needs
            `measures=("answer_rank",)`.
        prompts: Numbers of the prompts to include, such as those that the model answers correctly
            (figures 20 and 21); `None` for all.

    Returns:
        One row per `matrix`, `projection`, `layer` and `segment`, in the order of the table's
        matrices and projections, of layers and of `SEGMENTS`, with `of`, the `mean` rank (0 is the
        most probable token), `median`, `lower_quartile`, `upper_quartile`, `count` (number of
        tokens) and `prompts` (number of prompts of the matrix in all segments). Where no cell adds
        anything, as in the last layer except at the last token, `count` is 0 and ranks are missing.

    Raises:
        InputError: If the table has other columns or no rows, no token has a segment, there is no
            such prompt, or no rank of the token.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(
        ...     model, "Lionel Messi plays for", " Paris", matrices="W_out", layers=6
        ... )
        >>> ranks = blt.analysis.token_ranks_by_segment(result.to_df(subject="Lionel Messi"))
        >>> ranks.loc[ranks["median"] == 0, "segment"].tolist()  # where the target leads
        ['last token']
    """
    check_choice("of", of, tuple(_RANKS))
    keys, column = [*_CELL, "projection"], _RANKS[of]
    table = table_of(positions, "positions", [*keys, "segment", "is_zero", column])
    cells = _segmented(table, keys, ["is_zero", column])
    cells = cells[cells["prompt"].isin(_numbers(prompts, cells["prompt"]))].copy()
    adds = ~cells["is_zero"].astype(bool)
    cells[column] = cells[column].astype("float64").where(adds)
    if adds.any() and cells[column].isna().all():
        raise InputError(f"no {column} was measured: {_UNRANKED[of]}")
    groups = grouped(cells, ("matrix", "projection", "layer", "segment"))[column]
    found = groups.agg(
        mean="mean", median="median", lower_quartile=_lower, upper_quartile=_upper, count="count"
    ).reset_index()
    found.insert(2, "of", of)
    return with_types_of(table, _with_prompts(found, cells, ["matrix", "projection"]))


def norm_correlation(positions: Source) -> pd.DataFrame:
    """Correlation of the norms of inputs and VJPs, layer by layer (paper, figure 17).

    The paper states that "there is no correlation between the norm of `x_i` and `delta_i`". Cells
    that add nothing are left out, because zero norms would all be tied. With them, the last layer
    would only separate the last token from all others.

    Args:
        positions: A sweep, a result, or the table that `Sweep.positions` or
            `BackwardLensResult.to_df` returns, of any number of prompts; it needs no segments.

    Returns:
        One row per `matrix` and `layer`, in the order of the table's matrices and of layers, with
        `spearman` (rank correlation of the two norms over all tokens of all prompts; missing for
        fewer than two tokens or if all norms of one kind are equal) and `count` (number of tokens).

    Raises:
        InputError: If the table has other columns or no rows.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris", matrices="W_out")
        >>> found = blt.analysis.norm_correlation(result)
        >>> found["count"].tolist()  # tokens by layer; in the last one only the last token writes
        [6, 6, 6, 6, 6, 6, 6, 1]
    """
    import pandas as pd

    norms = ["norm", "input_norm"]
    table = table_of(positions, "positions", [*_CELL, *norms, "is_zero"])
    cells = _once(table, _CELL, [*norms, "is_zero"])
    # Masked rather than dropped, so that each matrix and layer keeps a row.
    cells[norms] = cells[norms].mask(cells["is_zero"].astype(bool))
    rows = []
    for (matrix, layer), part in grouped(cells, ("matrix", "layer")):
        ranks = part[norms].rank()
        varies = bool((ranks.nunique() > 1).all())
        spearman = ranks["norm"].corr(ranks["input_norm"]) if varies else float("nan")
        count = int(ranks["norm"].count())
        rows.append({"matrix": matrix, "layer": layer, "spearman": spearman, "count": count})
    return with_types_of(table, pd.DataFrame(rows))


def _once(table: pd.DataFrame, keys: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of a table, with one row per cell; a position may be requested twice."""
    return table[[*keys, *columns]].drop_duplicates(list(keys), ignore_index=True)


def _segmented(table: pd.DataFrame, keys: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """One row per cell that has a segment, with segments in the order of a prompt."""
    import pandas as pd

    cells = _once(table, keys, ["segment", *columns])
    cells = cells[cells["segment"].notna()]
    if cells.empty:
        raise InputError(
            f"no token has a segment; pass {SOURCES['positions']}, with each prompt's subject"
        )
    unknown = [name for name in cells["segment"].unique() if name not in _ORDER]
    if unknown:
        raise InputError(f"segment {unknown[0]!r} is unknown; allowed: {', '.join(_ORDER)}")
    return cells.assign(segment=pd.Categorical(cells["segment"], _ORDER, ordered=True))


def _with_prompts(found: pd.DataFrame, cells: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Groups with the number of prompts that have the same values of `keys`."""
    counts = grouped(cells, keys)["prompt"].nunique().rename("prompts")
    return found.join(counts, on=list(keys)).astype({"prompts": "int64"})


def _numbers(prompts: object, present: pd.Series[int]) -> list[int]:
    """The requested prompts; all of them must be in the table."""
    there = sorted(set(present.tolist()))
    if prompts is None:
        return there
    numbers = listed(prompts)
    if not numbers:
        raise InputError("prompts is empty; omit it to select all of them")
    for number in numbers:
        if not is_integer(number) or number not in there:
            raise InputError(
                f"prompt {shown(number)} is not among those that have segments; allowed: "
                f"{len(there)} numbers from {there[0]} to {there[-1]}"
            )
    return numbers


def _lower(ranks: pd.Series[float]) -> float:
    return float(ranks.quantile(0.25))


def _upper(ranks: pd.Series[float]) -> float:
    return float(ranks.quantile(0.75))
