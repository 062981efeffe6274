"""Analyses of tables of many prompts, against row-by-row loops and known answers."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import backward_lens_tl as blt
from backward_lens_tl.analysis.by_segment import (
    norm_correlation,
    norms_by_segment,
    token_ranks_by_segment,
)
from backward_lens_tl.analysis.ranks import gradient_ranks, rank_exceptions
from backward_lens_tl.data.segments import SEGMENTS
from backward_lens_tl.errors import InputError

N_PROMPTS, N_SUBJECTS = 6, 4
RECORDS = Path(blt.__file__).parent / "facts_model" / "records.json"


@pytest.fixture(scope="module")
def result(facts_model: Any) -> blt.BackwardLensResult:
    """Raw gradients of facts of several lengths, as in the paper."""
    rewrites = [record["requested_rewrite"] for record in facts()]
    prompts = [rewrite["prompt"].format(rewrite["subject"]) for rewrite in rewrites]
    targets = [f" {rewrite['target_new']['str']}" for rewrite in rewrites]
    return blt.backward_lens(
        facts_model, prompts, targets, measures=("answer_rank",), direction="gradient", k=1
    )


@pytest.fixture(scope="module")
def positions(result: blt.BackwardLensResult) -> pd.DataFrame:
    """All cells, under both projections in one table, as in a sweep; two have no subject."""
    subjects = [record["requested_rewrite"]["subject"] for record in facts()]
    table = pd.concat(
        [result.under(name).to_df(subjects) for name in result.projections], ignore_index=True
    )
    table["segment"] = table["segment"].astype(object).where(table["prompt"] < N_SUBJECTS, None)
    return table


def facts() -> list[dict[str, Any]]:
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    return records[:N_PROMPTS]


# ---------------------------------------------------------------------------- ranks of gradients


def gradients(*changes: dict[str, Any]) -> pd.DataFrame:
    """Gradients of six tokens and full rank, except for the given changes."""
    row = {
        "prompt": 0, "matrix": "W_out", "layer": 0, "is_last_layer": False, "n_tokens": 6,
        "n_writing": 6, "rank": 6, "largest_rank": 6, "input_rank": 6, "vjp_rank": 6,
    }  # fmt: skip
    counts = ("rank", "largest_rank", "input_rank", "vjp_rank")
    return pd.DataFrame([row | change for change in changes]).astype(dict.fromkeys(counts, "Int64"))


LAST = {"is_last_layer": True, "layer": 7, "n_writing": 1, "largest_rank": 1, "vjp_rank": 1}
LONG = {"n_tokens": 70, "n_writing": 70, "largest_rank": 64, "input_rank": 64, "vjp_rank": 64}
INPUTS, VJPS = "inputs x_i are linearly dependent", "VJPs delta_i are linearly dependent"
ROUNDING = "small singular values are lost in rounding"
UNKNOWN = "positions that add something are linearly dependent, or lost in rounding"


@pytest.mark.parametrize(
    ("change", "causes"),
    [
        ({"n_writing": 5, "largest_rank": 5, "vjp_rank": 5, "rank": 5}, "1 position adds nothing"),
        ({"n_writing": 4, "largest_rank": 4, "vjp_rank": 4, "rank": 4}, "2 positions add nothing"),
        (
            {"n_writing": 0, "largest_rank": 0, "vjp_rank": 0, "rank": 0},
            "no position adds anything",
        ),
        (LONG | {"rank": 64}, "more tokens than the 64 dimensions of the matrix"),
        ({"input_rank": 5, "rank": 5}, INPUTS),
        ({"vjp_rank": 4, "rank": 4}, VJPS),
        ({"rank": 5}, ROUNDING),
        ({"input_rank": 5, "rank": 4}, f"{INPUTS}; {ROUNDING}"),
        # Two planes of five dimensions may intersect in four of six.
        ({"input_rank": 5, "vjp_rank": 5, "rank": 4}, f"{INPUTS}; {VJPS}"),
        ({"input_rank": 5, "vjp_rank": 5, "rank": 3}, f"{INPUTS}; {VJPS}; {ROUNDING}"),
        (
            {"n_writing": 4, "largest_rank": 4, "vjp_rank": 4, "rank": 3},
            f"2 positions add nothing; {ROUNDING}",
        ),
        # One input depends on others, perhaps on those that add nothing.
        (
            {"n_writing": 4, "largest_rank": 4, "vjp_rank": 4, "input_rank": 5, "rank": 3},
            f"2 positions add nothing; {UNKNOWN}",
        ),
        (
            LONG | {"input_rank": 60, "rank": 60},
            f"more tokens than the 64 dimensions of the matrix; {INPUTS}",
        ),
        (LAST | {"n_writing": 0, "largest_rank": 0, "rank": 0}, "no position adds anything"),
        (LAST | {"rank": 0}, ROUNDING),
        (LAST | {"n_writing": 6, "largest_rank": 6, "vjp_rank": 2, "rank": 2}, VJPS),
    ],
)
def test_every_cause(change: dict[str, Any], causes: str) -> None:
    (found,) = rank_exceptions(gradients({}, change)).to_dict("records")
    assert found["cause"] == causes
    assert found["rank"] == change["rank"]


def test_the_law() -> None:
    """Rank n; 1 in the last layer, if only one token contributes there."""
    on_all = LAST | {"matrix": "W_in", "n_writing": 6, "largest_rank": 6, "vjp_rank": 6, "rank": 6}
    table = gradients(
        LAST | {"rank": 1},
        LAST | {"rank": 0, "prompt": 1},
        on_all,
        {"prompt": 2, "n_tokens": 3, "n_writing": 3, "rank": 3},
        {},
        {"rank": 4, "prompt": 1},
        {"rank": 5, "prompt": 3},
        {"rank": None, "prompt": 4, "matrix": "W_O"},
    )
    found = gradient_ranks(table)
    assert list(found) == [
        "matrix", "layer", "n_tokens", "prompts", "lowest", "median", "highest", "law",
        "exceptions",
    ]  # fmt: skip
    assert found.to_numpy().tolist() == [
        ["W_out", 0, 3, 1, 3, 3, 3, 3, 0],
        ["W_out", 0, 6, 3, 4, 5, 6, 6, 2],
        ["W_out", 7, 6, 2, 0, 0.5, 1, 1, 1],
        ["W_in", 7, 6, 1, 6, 6, 6, 6, 0],
    ]
    off = rank_exceptions(table)
    assert list(off) == ["prompt", "matrix", "layer", "n_tokens", "law", "rank", "cause"]
    assert off[["prompt", "layer", "law", "rank"]].to_numpy().tolist() == [
        [1, 7, 1, 0],
        [1, 0, 6, 4],
        [3, 0, 6, 5],
    ]
    nothing = rank_exceptions(table.iloc[4:5])
    assert len(nothing) == 0
    assert list(nothing) == list(off)
    unranked = gradients({"rank": None})
    assert gradient_ranks(unranked).empty
    assert rank_exceptions(unranked).empty


def test_prompts_with_different_laws_have_separate_rows() -> None:
    on_two = LAST | {"n_writing": 2, "rank": 2, "largest_rank": 2, "vjp_rank": 2, "prompt": 1}
    found = gradient_ranks(gradients(LAST | {"rank": 1}, on_two))
    assert found[["law", "prompts", "exceptions"]].to_numpy().tolist() == [[1, 1, 0], [6, 1, 1]]


def test_causes_hold_for_exact_ranks() -> None:
    """Small integers, whose ranks are exact, and measured ranks that may be too low."""
    rng = np.random.default_rng(0)
    rank = np.linalg.matrix_rank
    factors, rows = [], []
    for prompt in range(400):
        n, d_in, d_out = rng.integers(1, 6, 3).tolist()
        x, delta = rng.integers(-1, 2, (n, d_in)), rng.integers(-1, 2, (n, d_out))
        writing = int((x.any(1) & delta.any(1)).sum())
        measured = max(int(rank(x.T @ delta)) - int(rng.integers(0, 2)), 0)
        factors.append((x, delta))
        rows.append(
            {
                "prompt": prompt, "n_tokens": n, "n_writing": writing, "rank": measured,
                "largest_rank": min(writing, d_in, d_out),
                "input_rank": rank(x), "vjp_rank": rank(delta),
            }
        )  # fmt: skip
    seen: dict[str, int] = defaultdict(int)
    for row in rank_exceptions(gradients(*rows)).to_dict("records"):
        (x, delta), largest = factors[row["prompt"]], rows[row["prompt"]]["largest_rank"]
        writes = x.any(1) & delta.any(1)
        assert row["cause"]
        for cause in row["cause"].split("; "):
            seen[cause.lstrip("0123456789 ")] += 1
            if cause == ROUNDING:
                assert row["rank"] < rank(x.T @ delta)
            elif cause == INPUTS:
                assert rank(x[writes]) < largest
            elif cause == VJPS:
                assert rank(delta[writes]) < largest
            elif "dimensions" in cause:
                assert writes.sum() > min(x.shape[1], delta.shape[1])
            elif cause != UNKNOWN:
                assert not writes.all()
    assert min(seen[part] for part in (ROUNDING, INPUTS, VJPS, UNKNOWN)) > 5


def test_the_facts_model_follows_the_law(result: blt.BackwardLensResult) -> None:
    """Compare with dense gradients (figure 4 of the paper)."""
    table = result.capture.gradient_df()
    found = gradient_ranks(table)
    assert not found["exceptions"].any()
    assert found["law"].eq(found["n_tokens"].where(found["layer"] < 7, 1)).all()
    assert found["prompts"].sum() == N_PROMPTS * 16
    lengths = [len(tokens) for tokens in result.capture.str_tokens]
    for matrix, layer in product(["W_in", "W_out"], range(8)):
        part = found[(found["matrix"] == matrix) & (found["layer"] == layer)]
        assert part["n_tokens"].tolist() == sorted(set(lengths))
        if layer in (3, 7):
            dense = result.capture[matrix, layer].dense(0).double()
            own = part[part["n_tokens"] == lengths[0]]
            # float32 rounds to 1e-7 of the largest of at most 14 values.
            values = torch.linalg.svdvals(dense)
            assert own["lowest"].item() == int((values > 1e-6 * values[0]).sum())


def test_a_loss_on_all_tokens_has_no_last_layer_of_rank_1(facts_model: Any) -> None:
    """The last token has no next token, so it adds nothing in any layer."""
    every = blt.backward_lens(facts_model, "Rome is in Italy", objective=blt.next_token_loss())
    found = gradient_ranks(every.capture.gradient_df())
    assert found["law"].eq(found["n_tokens"]).all()
    assert found["exceptions"].all()
    assert set(rank_exceptions(every.capture.gradient_df())["cause"]) == {"1 position adds nothing"}


def test_attention_departs_from_the_law(facts_model: Any) -> None:
    """The first query sees one key; without rotation the VJPs of keys add up to zero."""
    result = blt.backward_lens(
        facts_model, "Lionel Messi plays for", " Paris", matrices=["W_Q", "W_K"]
    )
    off = rank_exceptions(result.capture.gradient_df())
    early = off[off["layer"] < 7]
    queries, keys = (early[early["matrix"] == name] for name in ("W_Q", "W_K"))
    assert len(queries) == 7
    assert set(queries["cause"]) == {"1 position adds nothing"}
    assert len(keys) >= 5  # in some layer, rounding may fill the missing rank
    assert set(keys["cause"]) == {VJPS}
    assert keys["rank"].eq(keys["n_tokens"] - 1).all()
    last = off[(off["layer"] == 7) & (off["matrix"] == "W_K")]
    assert last[["rank", "cause"]].to_numpy().tolist() == [[facts_model.cfg.n_heads, VJPS]]


# ----------------------------------------------------------------------------- norms by segment


def cells(table: pd.DataFrame, *keys: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Read each cell once, row by row."""
    seen = set()
    for row in table.to_dict("records"):
        cell = tuple(row[key] for key in ("prompt", "matrix", *keys, "layer", "position"))
        if row["segment"] in SEGMENTS and cell not in seen:
            seen.add(cell)
            yield tuple(row[key] for key in ("matrix", *keys, "layer", "segment")), row


def in_order(groups: dict[tuple[Any, ...], Any]) -> list[tuple[Any, ...]]:
    """Matrices and projections in order of appearance, then layers and segments."""
    matrices = list(dict.fromkeys(key[0] for key in groups))
    projections = list(dict.fromkeys(key[1:-2] for key in groups))
    return sorted(
        groups,
        key=lambda key: (
            matrices.index(key[0]),
            projections.index(key[1:-2]),
            key[-2],
            SEGMENTS.index(key[-1]),
        ),
    )


@pytest.mark.parametrize(
    ("of", "column"), [("vjp", "norm"), ("input", "input_norm"), ("write", "write_norm")]
)
def test_norms_by_segment(positions: pd.DataFrame, of: Any, column: str) -> None:
    shuffled = positions.sample(frac=1, random_state=0)
    values: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for key, row in cells(shuffled):
        values[key].append(row[column])
    found = norms_by_segment(shuffled, of)
    assert list(found) == [
        "matrix", "of", "layer", "segment", "mean", "std", "count", "prompts",
    ]  # fmt: skip
    keys = found[["matrix", "layer", "segment"]].itertuples(index=False, name=None)
    assert list(keys) == in_order(values)
    assert set(found["of"]) == {of}
    assert set(found["prompts"]) == {N_SUBJECTS}
    for key, mean, std, count in zip(
        in_order(values), found["mean"], found["std"], found["count"], strict=True
    ):
        assert mean == pytest.approx(statistics.mean(values[key]), rel=1e-9)
        assert std == pytest.approx(statistics.stdev(values[key]), rel=1e-6, abs=1e-12)
        assert count == len(values[key])
    zeros = found[(found["layer"] == 7) & (found["segment"] != "last token")]
    assert zeros["mean"].eq(0).all() == (of != "input")
    assert zeros["count"].all()


def test_matrices_keep_the_order_of_the_table(positions: pd.DataFrame) -> None:
    turned = positions.iloc[::-1]
    for found in (
        norms_by_segment(turned),
        token_ranks_by_segment(turned),
        norm_correlation(turned),
    ):
        assert found["matrix"].unique().tolist() == ["W_out", "W_in"]
    assert token_ranks_by_segment(turned)["projection"].unique().tolist() == [
        "normalized",
        "logit_lens",
    ]
    forward = norms_by_segment(positions)
    assert forward["matrix"].unique().tolist() == ["W_in", "W_out"]
    assert forward["matrix"].dtype == positions["matrix"].dtype


def by_hand(**columns: Sequence[Any]) -> pd.DataFrame:
    """Cells of one layer, whose answers are known."""
    n = len(next(iter(columns.values())))
    table = pd.DataFrame(
        {
            "prompt": 0, "matrix": "W_out", "layer": 2, "position": range(n),
            "segment": "last token", "norm": 1.0, "input_norm": 1.0, "is_zero": False,
            "projection": "logit_lens", "target_rank": 0, "answer_rank": None,
        }
    ).assign(**columns)  # fmt: skip
    return table.astype({"target_rank": "Int64", "answer_rank": "Int64"})


def test_means_are_over_tokens() -> None:
    """A prompt with three tokens in a segment counts three times."""
    table = by_hand(
        norm=[1.0, 1.0, 4.0, 0.0, 9.0],
        prompt=[0, 0, 0, 1, 2],
        segment=[*["after subject"] * 4, None],
    )
    (found,) = norms_by_segment(table).to_dict("records")
    assert (found["mean"], found["count"], found["prompts"]) == (1.5, 4, 2)
    assert found["std"] == pytest.approx(math.sqrt((0.25 + 0.25 + 6.25 + 2.25) / 3))
    (one,) = norms_by_segment(by_hand(norm=[3.0])).to_dict("records")
    assert one["mean"] == 3
    assert math.isnan(one["std"])


def test_narrow_types_of_a_sweep(positions: pd.DataFrame, result: blt.BackwardLensResult) -> None:
    """Parquet has 32 bits and NaN where tables have 64 and NA; means still have 64."""
    ranks = dict.fromkeys(("target_rank", "answer_rank"), "float64")
    counts = dict.fromkeys(("layer", "position"), "int32")
    norms = dict.fromkeys(("norm", "input_norm"), "float32")
    narrow = positions.astype(ranks | counts | norms)
    found = norms_by_segment(narrow)
    assert [str(found[name].dtype) for name in ("mean", "std")] == ["float64", "float64"]
    # The norms of float32 factors lose nothing in float32.
    expected = {"check_dtype": False, "rtol": 1e-12}
    for function in (norms_by_segment, token_ranks_by_segment, norm_correlation):
        pd.testing.assert_frame_equal(function(narrow), function(positions), **expected)
    wide = result.capture.gradient_df()
    narrow = wide.astype({"rank": "float64", "layer": "int32", "n_tokens": "int32"})
    for function in (gradient_ranks, rank_exceptions):
        pd.testing.assert_frame_equal(function(narrow), function(wide), **expected)


# ------------------------------------------------------------------------------ ranks by segment


@pytest.mark.parametrize("of", ["target", "answer"])
@pytest.mark.parametrize("prompts", [None, (1, 3)])
def test_token_ranks_by_segment(positions: pd.DataFrame, of: Any, prompts: Any) -> None:
    values: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for key, row in cells(positions, "projection"):
        if prompts is None or row["prompt"] in prompts:
            values[key] += [] if row["is_zero"] else [int(row[f"{of}_rank"])]
    found = token_ranks_by_segment(positions, of, prompts=prompts)
    assert list(found) == [
        "matrix", "projection", "of", "layer", "segment", "mean", "median", "lower_quartile",
        "upper_quartile", "count", "prompts",
    ]  # fmt: skip
    keys = found[["matrix", "projection", "layer", "segment"]]
    assert list(keys.itertuples(index=False, name=None)) == in_order(values)
    assert set(found["of"]) == {of}
    assert set(found["prompts"]) == {N_SUBJECTS if prompts is None else 2}
    numbers = found[["mean", "median", "lower_quartile", "upper_quartile"]].to_numpy()
    for key, four, count in zip(in_order(values), numbers, found["count"], strict=True):
        assert count == len(values[key])
        if len(values[key]) > 1:
            low, middle, high = statistics.quantiles(values[key], n=4, method="inclusive")
            assert four.tolist() == pytest.approx([statistics.mean(values[key]), middle, low, high])
        elif not values[key]:
            assert np.isnan(four).all()
    assert not found.loc[found["layer"].eq(7) & found["segment"].ne("last token"), "count"].any()


def test_cells_that_add_nothing_have_no_rank() -> None:
    table = by_hand(target_rank=[5, 7, 1000], is_zero=[False, False, True])
    (found,) = token_ranks_by_segment(table).to_dict("records")
    assert (found["mean"], found["median"], found["count"]) == (6, 6, 2)
    (nothing,) = token_ranks_by_segment(table.assign(is_zero=True)).to_dict("records")
    assert nothing["count"] == 0
    assert math.isnan(nothing["median"])


@pytest.mark.usefixtures("as_for_a_user")
def test_prompts_in_any_kind_of_list(positions: pd.DataFrame) -> None:
    some = positions[positions["layer"] == 3]
    expected = token_ranks_by_segment(some, prompts=[2, 3])
    for prompts in ((3, 2), np.array([2, 3]), pd.Series([2, 3, 3])):
        pd.testing.assert_frame_equal(token_ranks_by_segment(some, prompts=prompts), expected)
    pd.testing.assert_frame_equal(
        token_ranks_by_segment(some, prompts=2), token_ranks_by_segment(some, prompts=[2])
    )


# ----------------------------------------------------------------------------------- correlation


def places(values: Sequence[float]) -> list[float]:
    """Rank of each value; ties get the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def test_norm_correlation(positions: pd.DataFrame) -> None:
    found = norm_correlation(positions)
    assert list(found) == ["matrix", "layer", "spearman", "count"]
    assert len(found) == 16
    once = positions[positions["projection"] == "normalized"]
    n_tokens = len(once) // 16
    for row in found.to_dict("records"):
        own = [
            cell
            for cell in once.to_dict("records")
            if (cell["matrix"], cell["layer"]) == (row["matrix"], row["layer"])
            and not cell["is_zero"]
        ]
        assert row["count"] == len(own) == (N_PROMPTS if row["layer"] == 7 else n_tokens)
        ranks = [places([cell[name] for cell in own]) for name in ("norm", "input_norm")]
        assert row["spearman"] == pytest.approx(statistics.correlation(*ranks), abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_known_correlations() -> None:
    def correlation(norm: list[float], inputs: list[float], **columns: Any) -> tuple[float, int]:
        table = by_hand(norm=norm, input_norm=inputs, **columns).drop(columns="segment")
        (row,) = norm_correlation(table).to_dict("records")
        return row["spearman"], row["count"]

    assert correlation([1, 2, 3], [1, 10, 1000]) == (pytest.approx(1), 3)
    assert correlation([1, 2, 3], [9, 8, -1]) == (pytest.approx(-1), 3)
    assert correlation([1, 2, 0], [1, 2, 9], is_zero=[False, False, True]) == (pytest.approx(1), 2)
    for few in (([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0]), ([1.0, 2.0], [3.0, 3.0])):
        spearman, count = correlation(*few)
        assert math.isnan(spearman)
        assert count == len(few[0])
    spearman, count = correlation([0.0, 0.0], [1.0, 2.0], is_zero=True)
    assert math.isnan(spearman)
    assert count == 0


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.usefixtures("as_for_a_user")
def test_a_sweep_a_result_and_their_tables_give_the_same(
    result: blt.BackwardLensResult, facts_model: Any, tmp_path: Path
) -> None:
    """A sweep's columns are read only when needed."""
    config = blt.SweepConfig(direction="gradient", projection=("logit_lens",))
    rows = [
        {"prompt": "Lionel Messi plays for", "target": " Paris", "subject": "Lionel Messi"},
        {"prompt": "The city of Rome is in", "target": " Paris", "subject": "Rome"},
    ]
    sweep = blt.sweep(facts_model, rows, tmp_path, config, progress=False)
    for function in (norms_by_segment, token_ranks_by_segment, norm_correlation):
        pd.testing.assert_frame_equal(function(sweep), function(sweep.positions()))
    for function in (gradient_ranks, rank_exceptions):
        pd.testing.assert_frame_equal(function(sweep), function(sweep.gradients()))
        pd.testing.assert_frame_equal(function(result), function(result.capture.gradient_df()))
        pd.testing.assert_frame_equal(function(result), function(result.capture))
    pd.testing.assert_frame_equal(norm_correlation(result), norm_correlation(result.to_df()))


@pytest.mark.usefixtures("as_for_a_user")
def test_errors(result: blt.BackwardLensResult, positions: pd.DataFrame) -> None:
    def refused(message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        with pytest.raises(InputError, match=message):
            function(*args, **kwargs)

    refused(
        r"a result, its capture, or result\.capture\.gradient_df\(\)", gradient_ranks, "gradients"
    )
    refused("is a GradientCapture; pass a table of positions", norm_correlation, result.capture)
    by_segment = (norms_by_segment, token_ranks_by_segment)
    for function in (gradient_ranks, rank_exceptions, *by_segment, norm_correlation):
        refused("the table is a NoneType; pass a table of", function, None)
    for function in (gradient_ranks, rank_exceptions):
        refused("no column 'is_last_layer', .*gradient_df", function, positions)
        refused("the table has no rows", function, result.capture.gradient_df().iloc[:0])
    for function in (*by_segment, norm_correlation):
        refused("no column 'position'", function, result.capture.gradient_df())
        refused("the table has no rows", function, positions.iloc[:0])
    for function in by_segment:
        refused(
            r"no column 'segment'; pass .* a sweep, its positions\(\), or result.to_df\(subject\)",
            function,
            positions.drop(columns="segment"),
        )
        refused("no column 'segment'", function, result)
        refused("no token has a segment; .* subject", function, positions.assign(segment=None))
        refused(
            "segment 'end' is unknown; allowed: before",
            function,
            positions.assign(segment="end"),
        )
    refused("of is 'x'; allowed: 'vjp', 'input'", norms_by_segment, positions, "x")
    refused("of is 'vjp'; allowed: 'target', 'answer'", token_ranks_by_segment, positions, "vjp")
    bare = positions.assign(answer_rank=pd.array([None] * len(positions), "Int64"))
    refused(
        r'no answer_rank was measured: .* measures=\("answer_rank",\)',
        token_ranks_by_segment,
        bare,
        "answer",
    )
    aimless = positions.assign(target_rank=pd.array([None] * len(positions), "Int64"))
    refused(r"no target_rank was measured: .* pass target=", token_ranks_by_segment, aimless)
    for prompt in (11, -1, True, "2", 2.0):
        refused(
            f"prompt {prompt!r} is not among those that have segments; allowed: 4 numbers from "
            "0 to 3",
            token_ranks_by_segment,
            positions,
            prompts=[prompt],
        )
    refused("prompts is empty", token_ranks_by_segment, positions, prompts=[])
