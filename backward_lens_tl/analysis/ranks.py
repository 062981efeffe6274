"""The rank of each gradient against the length of its prompt, and its exceptions (figure 4)."""

from __future__ import annotations

from itertools import starmap
from typing import TYPE_CHECKING

from backward_lens_tl.analysis.tables import grouped, table_of, with_types_of

if TYPE_CHECKING:
    import pandas as pd

    from backward_lens_tl.analysis.tables import GradientSource

_COLUMNS = (
    "prompt",
    "matrix",
    "layer",
    "is_last_layer",
    "n_tokens",
    "n_writing",
    "rank",
    "largest_rank",
    "input_rank",
    "vjp_rank",
)
_CAUSE_COLUMNS = (
    "n_tokens",
    "n_writing",
    "law",
    "rank",
    "largest_rank",
    "input_rank",
    "vjp_rank",
)
"""The arguments of `_cause`, in order."""


def gradient_ranks(gradients: GradientSource) -> pd.DataFrame:
    """Ranks of gradients by the length of their prompt (paper, figure 4).

    The paper's law holds for MLPs and a loss on the last token. A gradient has rank `n`, the number
    of tokens of the prompt, and rank 1 in the model's last layer, where only the VJP of the last
    token is nonzero (lemma 4.1 and appendix A). If more than one token writes in the last layer,
    the loss involves several tokens, and the law is `n` there too. Attention deviates from the law,
    as `rank_exceptions` reports for each gradient: the first token attends only to itself, so its
    query adds nothing; the VJPs of keys sum to zero unless keys are rotated; and those of keys and
    values of the last layer all follow from one query per head, so their rank is at most the number
    of heads.

    Args:
        gradients: A sweep, a result, or the table that `Sweep.gradients` or
            `GradientCapture.gradient_df` returns, of any number of prompts.

    Returns:
        One row per `matrix`, `layer` and `n_tokens`, in the order of the table's matrices, of
        layers and of lengths, with `prompts` (their number), the `lowest`, `median` and `highest`
        rank, `law` (the rank by the law) and `exceptions` (number of prompts with another rank).
        Prompts with different laws, as with several losses, have separate rows. Gradients without
        a rank, because heads or experts have separate factors, are left out.

    Raises:
        InputError: If the table has other columns or no rows.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> prompts = ["Lionel Messi plays for", "The capital of France is"]
        >>> result = blt.backward_lens(model, prompts, " Paris", layers=[6, 7])
        >>> ranks = blt.analysis.gradient_ranks(result)
        >>> ranks[["matrix", "layer", "n_tokens", "median", "law"]].values.tolist()
        [['W_in', 6, 6, 6.0, 6], ['W_in', 7, 6, 1.0, 1], ['W_out', 6, 6, 6.0, 6], ['W_out', 7, 6,
        1.0, 1]]
    """
    source = table_of(gradients, "gradients", _COLUMNS)
    table = _measured(source)
    table["is_off"] = table["rank"] != table["law"]
    groups = grouped(table, ("matrix", "layer", "n_tokens", "law"))
    found = groups.agg(
        prompts=("prompt", "size"),
        lowest=("rank", "min"),
        median=("rank", "median"),
        highest=("rank", "max"),
        exceptions=("is_off", "sum"),
    ).reset_index()
    order = ["prompts", "lowest", "median", "highest", "law", "exceptions"]
    return with_types_of(source, found)[["matrix", "layer", "n_tokens", *order]]


def rank_exceptions(gradients: GradientSource) -> pd.DataFrame:
    """The gradients whose rank deviates from the law, with the cause.

    The paper saw "a drop of one or two" in the rank, "once in a few dozen examples", and attributed
    it to linear dependency of the `x_i` or the `delta_i` (section 6).

    Args:
        gradients: As for `gradient_ranks`.

    Returns:
        One row per exception, in the order of the table: `prompt`, `matrix`, `layer`, `n_tokens`,
        `law`, `rank` and `cause`, a text. It lists every cause that follows from the other columns,
        separated by semicolons:

        - positions that add nothing, because their `x_i` or `delta_i` is zero;
        - more positions that add something than the matrix has dimensions;
        - linearly dependent inputs or VJPs, within the tolerance of the rank;
        - rounding: the ranks of the factors imply a larger rank of their product
          (`rank(X^T Delta) >= rank(X) + rank(Delta) - n`, Sylvester), but its smallest singular
          values are below the tolerance.

        If no cause follows, the text says so. Gradients without a rank are left out.

    Raises:
        InputError: If the table has other columns or no rows.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(
        ...     model, "Lionel Messi plays for", " Paris", matrices="W_Q", layers=5
        ... )
        >>> blt.analysis.rank_exceptions(result)[["rank", "law", "cause"]].values.tolist()
        [[5, 6, '1 position adds nothing']]
    """
    import pandas as pd

    table = _measured(table_of(gradients, "gradients", _COLUMNS))
    table = table[table["rank"] != table["law"]].reset_index(drop=True)
    facts = zip(*(table[column].tolist() for column in _CAUSE_COLUMNS), strict=True)
    table["cause"] = pd.Series(list(starmap(_cause, facts)), dtype=object)
    return table[["prompt", "matrix", "layer", "n_tokens", "law", "rank", "cause"]]


def _measured(gradients: pd.DataFrame) -> pd.DataFrame:
    """The gradients that have a rank, with their law, and ranks as int64."""
    table = gradients.loc[gradients["rank"].notna(), list(_COLUMNS)].reset_index(drop=True)
    numbers = ("n_tokens", "n_writing", "rank", "largest_rank", "input_rank", "vjp_rank")
    table = table.astype(dict.fromkeys(numbers, "int64"))
    # A zero gradient has no position that writes, so nothing follows about the loss.
    is_one = table["is_last_layer"].astype(bool) & (table["n_writing"] <= 1)
    table["law"] = table["n_tokens"].mask(is_one, 1)
    return table


def _cause(
    n_tokens: int,
    n_writing: int,
    law: int,
    rank: int,
    largest_rank: int,
    input_rank: int,
    vjp_rank: int,
) -> str:
    """Why a rank is below the law."""
    if not n_writing:
        return "no position adds anything"
    causes = []
    if silent := max(law - n_writing, 0):
        causes.append(f"{silent} position{' adds' if silent == 1 else 's add'} nothing")
    if largest_rank < n_writing:
        causes.append(f"more tokens than the {largest_rank} dimensions of the matrix")
    if rank < largest_rank:
        causes += _dependence(n_tokens, rank, largest_rank, input_rank, vjp_rank)
    return "; ".join(causes)


def _dependence(
    n_tokens: int, rank: int, largest_rank: int, input_rank: int, vjp_rank: int
) -> list[str]:
    """Why a rank is below its upper bound."""
    causes = []
    if input_rank < largest_rank:
        causes.append("inputs x_i are linearly dependent")
    if vjp_rank < largest_rank:
        causes.append("VJPs delta_i are linearly dependent")
    # Sylvester's bound counts all positions, as the ranks of the factors do. A position that adds
    # nothing lowers the rank of a factor, so the bound still holds.
    if rank < input_rank + vjp_rank - n_tokens:
        causes.append("small singular values are lost in rounding")
    # The ranks of the factors count all positions and may hide dependence among those that write.
    return causes or ["positions that add something are linearly dependent, or lost in rounding"]
