"""The paper's experiments: verdicts on synthetic evidence, and the output folder."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pandas as pd
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from browser import opened
from models import HAS_BRIDGE, HAS_HOOKED, build
from playwright.sync_api import Browser, Page

import backward_lens_tl as blt
from backward_lens_tl import cli
from backward_lens_tl.data.segments import SEGMENTS
from backward_lens_tl.errors import InputError, SweepError, UnsupportedModelError
from backward_lens_tl.models import loading
from backward_lens_tl.reproduction import (
    COUNTERFACT,
    COUNTERFACT_RECORDS,
    EXPERIMENTS,
    Check,
    Finding,
    default_data,
    folder,
    gradient_neurons,
    gradient_ranks,
    imprint_and_shift,
    page,
    reproduce,
    segment_norms,
    segment_ranks,
    single_prompts,
)
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.experiments import select_experiments
from backward_lens_tl.reproduction.finding import (
    by_layer,
    count_check,
    count_of,
    listed_values,
)
from backward_lens_tl.result import BackwardLensResult

LENSES = ("logit_lens", "normalized")
LAST = "last token"
OTHERS = [name for name in SEGMENTS if name != LAST]
GRADIENTS = tuple(each for each in EXPERIMENTS if each.group == "gradients")
EDITING = tuple(each for each in EXPERIMENTS if each.group == "editing")
"""Tested in test_editing_experiments.py."""
EXPLANATIONS = tuple(each for each in EXPERIMENTS if each.group == "explanations")
"""Tested in test_explanations.py."""

# --- evidence made by hand ----------------------------------------------------------------------


class Fake(Evidence):
    """Evidence with the given attributes only."""

    model, model_name, n_layers, d_vocab, attention_sweep = None, "fake", 8, 1001, None
    prepend_bos = False

    def __init__(self, **given: Any) -> None:
        self.__dict__.update({"prompts": prompts_table([None]), "correct_prompts": []} | given)


class Written(BackwardLensResult):
    """A result with given norms of VJPs and ranks of the target by layer."""

    layers = matrices = projections = ()

    def __init__(self, norms: Sequence[Sequence[float]], ranks: Sequence[int], **by_lens: Any):
        norms_of = pd.DataFrame(norms).to_numpy()[:, None]
        self.__dict__.update(layers=tuple(range(len(norms))), ranks=ranks, by_lens=by_lens)
        self.__dict__.update(given=norms_of, prompt="a prompt")
        self.__dict__.update(capture=SimpleNamespace(prompt=lambda batch: self.prompt))

    def called(self, prompt: str) -> Written:
        self.__dict__["prompt"] = prompt
        return self

    def target(self, *_: Any) -> str:
        return " taught"

    def under(self, projection: str) -> Written:
        return self.by_lens.get(projection, self)

    def norms(self, matrix: str) -> Any:
        assert matrix == "W_out"
        return torch.tensor(self.given)

    def cell(self, matrix: str, layer: int, pos: int, batch: int = 0) -> Any:
        assert (matrix, pos, batch) == ("W_out", -1, 0)
        return SimpleNamespace(target_leads=self.ranks[layer] == 0)

    def to_df(self, *_: Any, **__: Any) -> pd.DataFrame:
        return pd.DataFrame({"layer": self.layers, "target_rank": self.ranks})


def prompts_table(correct: Sequence[bool | None]) -> pd.DataFrame:
    rows = {"prompt": range(len(correct)), "is_correct": pd.Series(correct, dtype=object)}
    return pd.DataFrame(rows)


Value = Callable[[str, int, str, int, str], float]
"""A function of matrix, layer, segment, prompt and lens."""


def cells(
    n_layers: int = 8,
    *,
    matrices: Sequence[str] = ("W_in", "W_out"),
    prompts: int = 1,
    lenses: Sequence[str] = LENSES,
    segments: Sequence[str | None] = SEGMENTS,
    norm: Value = lambda *_: 1.0,
    input_norm: Value = lambda *_: 1.0,
    target: Value = lambda *_: 500,
    answer: Value = lambda *_: 500,
    zeros: bool = True,
) -> pd.DataFrame:
    """A table of positions with one token per segment, and zero VJPs in the last layer."""
    rows = []
    for matrix in matrices:
        for layer in range(n_layers):
            for prompt in range(prompts):
                for at, segment in enumerate(segments):
                    for lens in lenses:
                        where = (matrix, layer, segment or "none", prompt, lens)
                        is_zero = zeros and layer == n_layers - 1 and at < len(segments) - 1
                        rows.append(
                            {
                                "prompt": prompt,
                                "matrix": matrix,
                                "layer": layer,
                                "position": at,
                                "token": f" {at}",
                                "segment": segment,
                                "projection": lens,
                                "norm": 0.0 if is_zero else norm(*where),
                                "input_norm": input_norm(*where),
                                "is_zero": is_zero,
                                "target_rank": target(*where),
                                "answer_rank": answer(*where),
                            }
                        )
    return pd.DataFrame(rows)


def holds(finding: Finding) -> list[bool]:
    found = [check.holds for check in finding.checks]
    assert all(type(each) is bool for each in found)  # JSON does not support numpy's bools
    return found


# --- text of findings -----------------------------------------------------------------------------


YES, NO, ALMOST = Check("c", True, "f"), Check("c", False, "f"), Check("c", True, "f", "but")


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ((YES,), "holds"),
        ((YES, YES), "holds"),
        ((ALMOST,), "holds with exceptions"),
        ((YES, ALMOST), "holds with exceptions"),
        ((YES, NO), "holds with exceptions"),
        ((NO,), "does not hold here"),
        ((NO, YES, YES), "does not hold here"),
        ((), "not measured"),
    ],
)
def test_the_first_check_decides(checks: tuple[Check, ...], verdict: str):
    assert Finding(checks).verdict == verdict


def test_numbers_as_text():
    assert count_of(7, 8) == "7 of 8 (88 %)"
    assert count_of(0, 0) == "none of 0"
    assert listed_values({"rome": 99.04, "shift": 95.0}.items(), unit=" %") == (
        "rome 99.0 %, shift 95.0 %"
    )


def test_columns_by_layer():
    table = pd.DataFrame(
        {"layer": [2, 0, 0], "of": ["a", "a", "b"], "x": [1.0, 2.0, 3.0], "lens": ["l", "l", "m"]}
    )
    assert by_layer(table, "x", "of")["a"].to_dict() == {0: 2.0, 2: 1.0}
    assert by_layer(table, "x", "of", lens="m").to_dict() == {"b": {0: 3.0}}


@pytest.mark.parametrize(
    ("count", "total", "at_least", "expected"),
    [
        (2, 4, None, False),
        (3, 4, None, True),
        (0, 0, None, False),
        (3, 4, 0.75, True),
        (2, 4, 0.75, False),
        (4, 4, 1.0, True),
        (3, 4, 1.0, False),
        (0, 0, 1.0, False),
    ],
)
def test_checks_of_counts(count: int, total: int, at_least: float | None, expected: bool):
    flags = [True] * count + [False] * (total - count)
    check = count_check("c", flags, "layers", at_least=at_least)
    assert check == Check("c", expected, f"{count_of(count, total)} layers")


@pytest.mark.parametrize(
    ("n_layers", "first", "second", "last"),
    [
        (1, (0,), (0,), (0,)),
        (2, (0,), (0,), (1,)),
        # No layer's middle is in the second quarter, which is mostly in layer 1, from 1/3 to 2/3.
        (3, (0,), (1,), (2,)),
        (4, (0,), (1,), (3,)),
        (5, (0,), (1,), (4,)),
        (6, (0,), (1, 2), (4, 5)),  # of a middle at 1/4, 1/2 or 3/4 the later quarter
        (8, (0, 1), (2, 3), (6, 7)),
        (12, (0, 1, 2), (3, 4, 5), (9, 10, 11)),
        (48, tuple(range(12)), tuple(range(12, 24)), tuple(range(36, 48))),
    ],
)
def test_quarters_of_the_layers(n_layers: int, first: Any, second: Any, last: Any):
    evidence = Fake(n_layers=n_layers)
    assert evidence.layers(0.0, 0.25) == first
    assert evidence.layers(0.25, 0.5) == second
    assert evidence.layers(0.75, 1.0) == last


@pytest.mark.parametrize("n_layers", range(1, 49))
def test_the_layer_whose_neurons_are_shown(n_layers: int):
    """At the relative depth of the paper's layer, but not the last one."""
    layer = Fake(n_layers=n_layers).example_layer
    assert 0 <= layer <= max(0, n_layers - 2)
    if n_layers > 3:
        assert abs(layer / n_layers - 14 / 24) <= 0.5 / n_layers + 1e-9
    assert Fake(n_layers=24).example_layer == 14


# --- figures 1 and 3 ------------------------------------------------------------------------------


def steps(**changed: Sequence[Any]) -> pd.DataFrame:
    """Twenty steps as in the lemma, the last ten on `W_out`."""
    table = pd.DataFrame(
        {
            "matrix": ["W_in"] * 10 + ["W_out"] * 10,
            "output_error": [1e-5] * 20,
            "rounding": [1e-5] * 20,
            "self_imprint": [0.9] * 10 + [0.0] * 10,
            "loss_change": [-0.01] * 20,
            "predicted_loss_change": [-0.01] * 20,
            "shift_target_rank": [None] * 10 + [3] * 10,
        }
    )
    return table.assign(**changed).astype({"shift_target_rank": "Int64"})


def found_of_steps(
    monkeypatch: pytest.MonkeyPatch, table: pd.DataFrame, n_prompts: int = 20, **more: Any
) -> Finding:
    asked = []

    def step_changes(model: Any, texts: Any, targets: Any, *, prepend_bos: Any) -> pd.DataFrame:
        asked.append((texts, targets, prepend_bos))
        return table

    monkeypatch.setattr(imprint_and_shift, "step_changes", step_changes)
    prompts = pd.DataFrame({"text": [f"t{n}" for n in range(30)], "target_id": range(30)})
    finding = imprint_and_shift.imprint_and_shift(Fake(prompts=prompts, **more))
    texts = [f"t{n}" for n in range(n_prompts)]
    assert asked == [(texts, list(range(n_prompts)), more.get("prepend_bos", False))]
    return finding


def test_steps_as_in_the_lemma(monkeypatch: pytest.MonkeyPatch):
    finding = found_of_steps(monkeypatch, steps())
    assert holds(finding) == [True] * 4
    assert [check.found for check in finding.checks] == [
        "20 of 20 (100 %) steps; the largest relative error is 1.0e-05",
        "20 of 20 (100 %) steps; the loss falls in 20 of 20 (100 %)",
        "10 of 10 (100 %) steps",
        "10 of 10 (100 %) steps; the median cosine is 0.90",
    ]
    assert finding.notes[0].startswith("20 prompts.")


@pytest.mark.parametrize(
    ("n_layers", "n_prompts"), [(1, 20), (10, 20), (11, 18), (48, 4), (100, 2), (300, 2)]
)
def test_large_models_take_a_step_for_fewer_prompts(
    monkeypatch: pytest.MonkeyPatch, n_layers: int, n_prompts: int
):
    """At most 400 steps, one per prompt, matrix and layer, but at least two prompts."""
    found_of_steps(monkeypatch, steps(), n_prompts, n_layers=n_layers)
    found_of_steps(monkeypatch, steps(), n_prompts, n_layers=n_layers, prepend_bos=True)


@pytest.mark.parametrize(
    ("changed", "expected", "at", "found"),
    [
        # An identity must hold for every step.
        (
            {"output_error": [2e-4] + [1e-5] * 19},
            [False, True, True, True],
            0,
            "19 of 20 (95 %) steps",
        ),
        ({"output_error": [9e-5] * 20}, [True] * 4, 0, "20 of 20"),
        ({"loss_change": [-0.012] * 2 + [-0.01] * 18}, [True] * 4, 1, "18 of 20 (90 %)"),
        (
            {"loss_change": [-0.012] * 3 + [-0.01] * 17},
            [True, False, True, True],
            1,
            "17 of 20 (85 %)",
        ),
        (
            {"loss_change": [0.01] * 20},
            [True, False, True, True],
            1,
            "the loss falls in 0 of 20 (0 %)",
        ),
        # The most probable 1 % of 1001 tokens are ranks 0 to 10.
        ({"shift_target_rank": [None] * 10 + [10] * 6 + [11] * 4}, [True] * 4, 2, "6 of 10 (60 %)"),
        (
            {"shift_target_rank": [None] * 10 + [10] * 5 + [11] * 5},
            [True, True, False, True],
            2,
            "5 of 10",
        ),
        # The other end of the vocabulary is the wrong direction.
        ({"shift_target_rank": [None] * 10 + [1000] * 10}, [True, True, False, True], 2, "0 of 10"),
        # The imprint is in W_in's own ten steps.
        ({"self_imprint": [0.51] * 6 + [0.5] * 14}, [True] * 4, 3, "6 of 10 (60 %)"),
        ({"self_imprint": [0.51] * 5 + [0.5] * 15}, [True, True, True, False], 3, "5 of 10"),
        ({"self_imprint": [0.5] * 10 + [0.9] * 10}, [True, True, True, False], 3, "0 of 10"),
        ({"self_imprint": [-0.9] * 20}, [True, True, True, False], 3, "0 of 10"),
        ({"self_imprint": [None] * 20}, [True, True, True, False], 3, "0 of 10"),
    ],
)
def test_steps_that_contradict_the_lemma(
    monkeypatch: pytest.MonkeyPatch, changed: Any, expected: list[bool], at: int, found: str
):
    finding = found_of_steps(monkeypatch, steps(**changed))
    assert holds(finding) == expected
    assert found in finding.checks[at].found


# --- figure 4 -------------------------------------------------------------------------------------


def ranks(
    off: Mapping[int, Mapping[str, Any]] = {}, *, prompts: int = 10, n_layers: int = 8
) -> pd.DataFrame:
    """Ranks by the paper's law for prompts of five tokens, with exceptions."""
    rows = []
    for prompt in range(prompts):
        for layer in range(n_layers):
            for matrix in ("W_in", "W_out"):
                is_last = layer == n_layers - 1
                rank = 1 if is_last else 5
                rows.append(
                    {"prompt": prompt, "matrix": matrix, "layer": layer, "is_last_layer": is_last}
                    | {"n_tokens": 5, "n_writing": rank, "rank": rank, "largest_rank": rank}
                    | {"input_rank": 5, "vjp_rank": rank}
                )
    table = pd.DataFrame(rows)
    for row, values in off.items():
        for column, value in values.items():
            table[column] = table[column].astype("Float64" if value is None else "Int64")
            table.loc[row, column] = value
    return table


def test_the_rank_law():
    finding = gradient_ranks.rank_law(Fake(gradients=ranks()))
    assert finding.verdict == "holds"
    assert [check.found for check in finding.checks] == [
        "140 of 140 (100 %) gradients",
        "20 of 20 (100 %) gradients",
        "gradients with another rank: 0; largest difference: 0",
    ]
    assert len(finding.tables["exceptions"]) == 0
    assert len(finding.tables["ranks"]) == 16


def test_a_rare_drop_of_the_rank_is_an_exception_with_its_cause():
    dropped = {"rank": 4, "input_rank": 4}
    finding = gradient_ranks.rank_law(Fake(gradients=ranks({0: dropped})))
    assert finding.verdict == "holds with exceptions"
    first, last, drops = finding.checks
    assert (drops.holds, drops.found) == (
        True,
        "gradients with another rank: 1; largest difference: 1",
    )
    assert (first.found, last.exceptions) == ("139 of 140 (99 %) gradients", "")
    assert first.exceptions == "inputs x_i are linearly dependent (1)"
    assert finding.tables["exceptions"]["rank"].tolist() == [4]


@pytest.mark.parametrize(
    ("rows", "value", "expected"),
    [
        # Rows 14 and 15 of each prompt's 16 are those of the last layer.
        ([row for row in range(10) if row % 16 < 14][:7], 4, [True, True, True]),
        ([row for row in range(10) if row % 16 < 14][:8], 4, [False, True, True]),
        # Drops by two and by three.
        ([3], 3, [True, True, True]),
        ([3], 2, [True, True, False]),
        ([14], 2, [True, True, True]),
        ([14, 15], 3, [True, False, True]),
        ([14, 15], 5, [True, False, False]),
        (range(160), 5, [True, False, False]),
        (range(160), 1, [False, True, False]),
    ],
)
def test_ranks_that_break_the_law(rows: Sequence[int], value: int, expected: list[bool]):
    """95 % of 140 is 133, and 95 % of 20 is 19."""
    table = ranks({row: {"rank": value} for row in rows})
    finding = gradient_ranks.rank_law(Fake(gradients=table))
    assert holds(finding) == expected
    assert any(check.exceptions for check in finding.checks)


def test_gradients_without_a_rank_are_not_counted():
    """Such as those of experts. They are not counted."""
    table = ranks({row: {"rank": None} for row in range(140)})
    right = gradient_ranks.rank_law(Fake(gradients=table))
    assert right.checks[0].found == "16 of 16 (100 %) gradients"
    table.loc[table["rank"] == 5, "rank"] = 3
    wrong = gradient_ranks.rank_law(Fake(gradients=table))
    assert wrong.checks[0].found == "0 of 16 (0 %) gradients"
    assert wrong.verdict == "does not hold here"
    none = gradient_ranks.rank_law(Fake(gradients=ranks({n: {"rank": None} for n in range(160)})))
    assert (none.verdict, none.checks) == ("not measured", ())


def test_the_rank_law_of_one_layer():
    finding = gradient_ranks.rank_law(Fake(gradients=ranks(n_layers=1), n_layers=1))
    assert [check.found for check in finding.checks] == [
        "20 of 20 (100 %) gradients",
        "gradients with another rank: 0; largest difference: 0",
    ]
    off = ranks({0: {"rank": 4}, 1: {"rank": 4}}, n_layers=1)
    assert holds(gradient_ranks.rank_law(Fake(gradients=off, n_layers=1))) == [False, False]


# --- figures 5, 11 to 15, 22 and 23: tokens -------------------------------------------------------


def written(
    n_layers: int = 8,
    leads: Sequence[int] = range(8),
    strong: Sequence[int] = range(8),
    **lenses: Any,
) -> Written:
    """A result with the target on top, or the largest VJP at the last token, in some layers."""
    norms = [[0.5, 2.0, 1.0 if layer not in strong else 3.0] for layer in range(n_layers)]
    return Written(norms, [int(layer not in leads) for layer in range(n_layers)], **lenses)


@pytest.mark.parametrize(
    ("result", "expected", "found"),
    [
        (written(), [True, True], ["8 of 8 (100 %) layers", "1 of 1 (100 %) of these layers"]),
        (written(leads=range(5)), [True, True], ["5 of 8 (62 %) layers"]),
        (written(leads=range(4)), [False, True], ["4 of 8 (50 %) layers"]),
        (written(leads=()), [False, True], ["0 of 8 (0 %) layers"]),
        # The last layer does not count, because all other VJPs are zero there.
        (written(strong=[7]), [True, False], ["8 of 8", "0 of 1 (0 %) of these layers"]),
        (written(strong=[6]), [True, True], ["8 of 8", "1 of 1"]),
        (written(strong=range(6)), [True, False], ["8 of 8", "0 of 1"]),
        # Of twelve layers the last quarter is 9 to 11.
        (written(12, range(12), [9, 10]), [True, True], ["12 of 12", "2 of 2"]),
        (written(12, range(12), [10, 11]), [True, False], ["12 of 12", "1 of 2 (50 %)"]),
        (written(12, range(12), [8, 9, 11]), [True, False], ["12 of 12", "1 of 2"]),
        (written(2, range(2), [0]), [True, True], ["2 of 2", "1 of 1"]),
        (written(2, range(2), [1]), [True, False], ["2 of 2", "0 of 1"]),
        (written(1, range(1), [0]), [True, False], ["1 of 1", "none of 0"]),
    ],
)
def test_tables_of_a_prompt(result: Written, expected: list[bool], found: list[str]):
    finding = single_prompts.example_table(Fake(example=result))
    assert holds(finding) == expected
    for check, said in zip(finding.checks, found, strict=False):
        assert said in check.found
    assert list(finding.results) == list(finding.tables) == ["a prompt →  taught"]


def test_other_prompts_are_counted_together(monkeypatch: pytest.MonkeyPatch):
    shown = {"a": written(), "b": written(leads=range(2), strong=()), "c": written(leads=())}
    shown = {name: result.called(name) for name, result in shown.items()}
    asked = []

    class Evidence(Fake):
        def result(self, prompt: str, target: Any) -> Any:
            asked.append((prompt, target))
            return shown[prompt]

    prompts = pd.DataFrame(
        {"text": list("abccccc"), "target": list("uvwwwww"), "target_id": [1, 2, 3, 3, 3, 3, 3]}
    )
    finding = single_prompts.more_tables(Evidence(prompts=prompts.head(3)))
    assert asked == [("a", 1), ("b", 2), ("c", 3)]
    assert [check.found for check in finding.checks] == [
        "10 of 24 (42 %) layers",
        "2 of 3 (67 %) of these layers",
    ]
    assert holds(finding) == [False, False]
    # The tokens actually used as targets.
    assert list(finding.results) == ["a →  taught", "b →  taught", "c →  taught"]
    asked.clear()
    single_prompts.more_tables(Evidence(prompts=prompts))
    assert len(asked) == 5


def normalized_table(raw: int, normalized: int, of: int = 100) -> Finding:
    """VJPs, some of which have the target among the last 1 % of 1001 tokens."""
    counts = {"logit_lens": raw, "normalized": normalized}

    def target(matrix: str, layer: int, segment: str, prompt: int, lens: str) -> float:
        # Zero vectors and the other matrix would reverse every count.
        if matrix == "W_in" or layer == 1:
            return 1000 if lens == "normalized" else 0
        return 990 if prompt < counts[lens] else 989

    table = cells(2, prompts=of, segments=[LAST, LAST], target=target)
    table = table[(table["layer"] == 1) | (table["position"] == 0)]
    table.loc[table["layer"] == 1, "is_zero"] = True
    other = written(leads=range(3))
    return single_prompts.normalized_table(
        Fake(positions=table, n_layers=2, example=written(normalized=other))
    )


@pytest.mark.parametrize(
    ("raw", "normalized", "expected"),
    [
        (50, 51, [True, True]),
        (51, 51, [True, False]),
        (52, 51, [True, False]),
        (20, 50, [False, True]),
        (20, 21, [False, True]),
        (50, 50, [False, False]),
        (100, 100, [True, False]),
    ],
)
def test_normalizing_magnifies_the_target(raw: int, normalized: int, expected: list[bool]):
    finding = normalized_table(raw, normalized)
    assert holds(finding)[:2] == expected
    assert [check.found for check in finding.checks[:2]] == [
        f"{normalized} of 100 ({normalized} %) VJPs",
        f"{normalized} of 100 ({normalized} %) VJPs with normalization, {raw} of 100 ({raw} %) "
        "without",
    ]
    # The table uses the normalized lens.
    assert finding.checks[2].found == "3 of 8 (38 %) layers"


# --- figures 6, 16 and 17: norms ------------------------------------------------------------------


def usual_norm(matrix: str, layer: int, segment: str, prompt: int, lens: str) -> float:
    """As in the paper: the subject in layers 0 and 1 of 8, the last token in layers 2 and 3."""
    if segment == LAST:
        return 10.0 if layer == 3 else 5.0
    if segment == "last subject token":
        return 4.0 if layer < 2 else 0.1
    return 0.2


def but(changed: Mapping[Any, float], matrix: str = "W_out") -> Value:
    """The usual norms, except in some segments and layers of one matrix."""

    def norm(name: str, layer: int, segment: str, prompt: int, lens: str) -> float:
        usual = usual_norm(name, layer, segment, prompt, lens)
        if name != matrix:
            return usual
        return changed.get((segment, layer), changed.get(segment, usual))

    return norm


def test_norms_as_in_the_paper():
    finding = segment_norms.norms_of_shifts(Fake(positions=cells(norm=usual_norm)))
    assert finding.verdict == "holds"
    subject, last, small = finding.checks
    # Zeros of the last layer count: 7 * 0.2 / 8 = 0.175, of 10.
    assert small.found == "before subject 0.02, after subject 0.02"
    assert subject.found.startswith("mean norms: last subject token 4, ")
    assert last.found == ("in layer 3 of 8, where it is 10; in the second quarter it is at most 10")
    assert set(finding.tables["norms by segment"]["matrix"]) == {"W_out"}
    assert list(finding.figures) == ["norm of delta_i, W_out"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        # Seven of eight layers with 2.9 make a mean of 2.54, and 10 is the last token's peak.
        ({"after subject": 2.9}, [True, True, False]),
        ({"before subject": 2.9}, [True, True, False]),
        ({"after subject": 2.8}, [True, True, True]),
        ({"middle subject tokens": 2.9}, [True, True, True]),
        ({"last subject token": 0.1}, [False, True, True]),
        # Other tokens have larger norms.
        ({("before subject", 0): 9.0}, [False, True, True]),
        ({("after subject", 1): 9.0}, [False, True, True]),
        # The subject's other tokens count as well.
        ({"last subject token": 0.1, ("first subject token", 0): 3.0}, [True, True, True]),
        # Layers 2 and 3 are not the first quarter.
        ({"last subject token": 0.1, ("last subject token", 2): 50.0}, [False, True, True]),
        ({(LAST, 2): 11.0}, [True, True, True]),
        ({(LAST, 4): 11.0}, [True, False, True]),
        ({(LAST, 1): 11.0}, [True, False, True]),
        ({(LAST, 7): 11.0}, [True, False, True]),
    ],
)
def test_norms_unlike_the_papers(changed: Any, expected: list[bool]):
    table = cells(norm=but(changed))
    assert holds(segment_norms.norms_of_shifts(Fake(positions=table))) == expected
    # Other matrices are not checked.
    elsewhere = cells(norm=but(changed, "W_in"))
    assert holds(segment_norms.norms_of_shifts(Fake(positions=elsewhere))) == [True] * 3


@pytest.mark.parametrize("present", [[], ["after subject"]])
def test_norms_without_other_tokens(present: list[str]):
    """The claim about other tokens does not hold without any."""
    absent = {"before subject", "after subject"} - set(present)
    own = [name for name in SEGMENTS if name not in absent]
    table = cells(norm=usual_norm, segments=own)
    subject, last, small = segment_norms.norms_of_shifts(Fake(positions=table)).checks
    assert (subject.holds, last.holds, small.holds) == (True, True, bool(present))
    assert small.found == ("after subject 0.02" if present else "there are none")


def norms_of_all(changed: Mapping[Any, float] = {}, matrix: str = "W_out", **more: Any) -> Finding:
    positions = cells(norm=but(changed, matrix), **more)
    return segment_norms.norms_of_all(Fake(positions=positions))


def test_norms_of_every_matrix():
    attention = cells(matrices=["W_Q", "W_V"], norm=but({"before subject": 40.0}, "W_V"))
    evidence = Fake(positions=cells(norm=usual_norm), attention_sweep=attention)
    finding = segment_norms.norms_of_all(evidence)
    assert [check.claim.partition(":")[0] for check in finding.checks] == (
        ["W_in"] * 2 + ["W_out"] * 2
    )
    assert [check.found for check in finding.checks] == [
        "the largest is that of: last subject token",
        "in layer 3 of 8",
    ] * 2
    # Attention is shown and noted, but not checked.
    assert finding.verdict == "holds"
    (note,) = finding.notes
    assert note.endswith("of: W_Q last subject token, W_V before subject.")
    table = finding.tables["norms by segment"]
    assert set(table["matrix"]) == {"W_Q", "W_V", "W_in", "W_out"}
    assert set(finding.figures) == {f"norm of delta_i, {name}" for name in set(table["matrix"])}
    # Without attention, the checks are the same.
    alone = segment_norms.norms_of_all(Fake(positions=cells(norm=usual_norm)))
    assert alone.checks == finding.checks
    assert alone.notes == ("The attention of this model cannot be analysed.",)
    assert len(alone.figures) == 2


@pytest.mark.parametrize("matrix", ["W_in", "W_out"])
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True]),
        # Figure 6 is about any token of the subject, and this one about the last of them.
        ({"first subject token": 4.5}, [False, True]),
        ({("first subject token", 0): 9.0}, [False, True]),
        ({"middle subject tokens": 4.5}, [False, True]),
        ({"before subject": 4.5}, [False, True]),
        ({"after subject": 4.5}, [False, True]),
        ({"first subject token": 3.9}, [True, True]),
        ({("first subject token", 2): 50.0}, [True, True]),
        # The middle is layers 2 to 5.
        ({(LAST, 2): 11.0}, [True, True]),
        ({(LAST, 5): 11.0}, [True, True]),
        ({(LAST, 1): 11.0}, [True, False]),
        ({(LAST, 6): 11.0}, [True, False]),
        ({(LAST, 7): 11.0}, [True, False]),
    ],
)
def test_norms_of_one_matrix_unlike_the_papers(matrix: str, changed: Any, expected: list[bool]):
    found = holds(norms_of_all(changed, matrix))
    other = [True, True]
    assert found == ([*expected, *other] if matrix == "W_in" else [*other, *expected])


def correlated(strong: Sequence[tuple[str, int]], sign: int = 1) -> pd.DataFrame:
    """Six tokens of five prompts per layer, with correlated norms in some layers only."""

    def norm(matrix: str, layer: int, segment: str, prompt: int, lens: str) -> float:
        return 1.0 + SEGMENTS.index(segment) + 6 * prompt

    def input_norm(matrix: str, layer: int, segment: str, prompt: int, lens: str) -> float:
        own = norm(matrix, layer, segment, prompt, lens)
        # Symmetric, so that rank correlation is zero.
        return 100 + sign * own if (matrix, layer) in strong else abs(own - 15.5)

    return cells(4, prompts=5, norm=norm, input_norm=input_norm, zeros=False)


def test_norms_without_correlation():
    finding = segment_norms.norms_of_inputs(Fake(positions=correlated([])))
    assert finding.verdict == "holds"
    assert finding.checks[0].found.startswith(
        "8 of 8 (100 %) layers and matrices; the coefficients are from "
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_correlated_norms(sign: int):
    """Positive or negative correlation. A minority of layers is listed as exceptions."""
    all_layers = [(matrix, layer) for matrix in ("W_in", "W_out") for layer in range(4)]
    few = segment_norms.norms_of_inputs(Fake(positions=correlated(all_layers[:3], sign)))
    assert few.verdict == "holds with exceptions"
    assert few.checks[0].exceptions == ", ".join(
        f"{sign:.2f} in layer {layer} of W_in" for layer in range(3)
    )
    many = segment_norms.norms_of_inputs(Fake(positions=correlated(all_layers[:4], sign)))
    assert "4 of 8 (50 %)" in many.checks[0].found
    assert many.verdict == "does not hold here"


def test_layers_without_a_correlation_are_left_out():
    table = cells(4, norm=lambda *at: 1 + SEGMENTS.index(at[2]))
    finding = segment_norms.norms_of_inputs(Fake(positions=table))  # all inputs have the same norm
    assert finding.checks[0].found == "none of 0 layers and matrices"
    assert finding.verdict == "does not hold here"


# --- figures 7 and 18 to 21: ranks ----------------------------------------------------------------


FEW: Any = {"segments": ("before subject", LAST)}
"""Cells for checks of the last token."""


def ranked(by: Callable[[int, str], float], matrix: str = "W_out", lens: str = LENSES[0]) -> Value:
    """Ranks of one matrix under one lens; all others would reverse the checks."""
    far = by(0, LAST) > 500
    return lambda name, layer, segment, prompt, own: (
        by(layer, segment) if (name, own) == (matrix, lens) else 0 if far else 1000
    )


def target_by_segment(by: Callable[[int, str], float], **more: Any) -> Finding:
    return segment_ranks.target_by_segment(Fake(positions=cells(target=ranked(by), **more)))


@pytest.mark.parametrize(
    ("layers", "rank", "expected"),
    [
        (range(8), 1000, True),
        (range(8), 990, True),  # the last 1 % of ranks 0 to 1000
        (range(8), 989, False),
        (range(6), 990, True),
        (range(5), 990, False),
        (range(8), 0, False),
        (range(8), 10, False),
    ],
)
def test_the_target_is_at_the_far_end(layers: Sequence[int], rank: float, expected: bool):
    def by(layer: int, segment: str) -> float:
        return rank if segment != LAST or layer in layers else 900

    n_far = len(layers) if rank >= 990 else 0
    finding = target_by_segment(by, **FEW)
    assert finding.checks[0].holds == expected
    assert finding.checks[0].found.startswith(f"{count_of(n_far, 8)} layers; median ranks ")
    alone = segment_ranks.target_at_last_token(Fake(positions=cells(target=ranked(by), **FEW)))
    assert alone.checks[0] == finding.checks[0]
    assert set(alone.tables["target rank at the last token"]["segment"]) == {LAST}


def test_the_median_prompt_decides():
    """One of three prompts may be an exception, but not two."""
    for off, expected in ((1, True), (2, False)):
        table = cells(prompts=3, target=lambda *at, off=off: 0 if at[3] < off else 1000, **FEW)
        assert segment_ranks.target_by_segment(Fake(positions=table)).checks[0].holds == expected


@pytest.mark.parametrize(
    ("layers", "rank", "expected", "found"),
    [
        # Five segments of seven layers: all of the last layer's are zero vectors.
        (range(7), 750, True, "35 of 35 (100 %)"),
        (range(7), 749, False, "0 of 35 (0 %)"),
        (range(4), 750, True, "20 of 35 (57 %)"),
        (range(3), 750, False, "15 of 35 (43 %)"),
        ([7], 750, False, "0 of 35 (0 %)"),
    ],
)
def test_other_tokens_behave_the_same(
    layers: Sequence[int], rank: float, expected: bool, found: str
):
    def by(layer: int, segment: str) -> float:
        return 1000 if segment == LAST else rank if layer in layers else 0

    finding = target_by_segment(by)
    assert [check.holds for check in finding.checks] == [True, expected]
    assert finding.checks[1].found == f"{found} segments and layers"


def test_claims_without_layers_do_not_hold():
    """Sweeps have no prompts without a last token."""
    table = cells(segments=OTHERS, target=lambda *_: 1000, answer=lambda *_: 0)
    by_segment = segment_ranks.target_by_segment(Fake(positions=table))
    in_inputs = segment_ranks.target_in_inputs(Fake(positions=table))
    for finding in (by_segment, in_inputs):
        assert finding.verdict == "does not hold here"
        assert finding.checks[0].found.startswith("none of 0 layers")


def test_the_target_is_less_far_away_in_the_first_layer():
    def found(first: float, rest: float) -> Check:
        table = cells(target=ranked(lambda layer, _: rest if layer else first), **FEW)
        return segment_ranks.target_at_last_token(Fake(positions=table)).checks[1]

    assert found(900, 1000).holds
    assert not found(1000, 1000).holds
    assert not found(1000, 995).holds
    assert found(900, 1000).found == "median rank 900 in layer 0, 1000 in the others"


def far(layer: int, segment: str) -> float:
    return 1000


@pytest.mark.parametrize(
    ("by", "target", "expected"),
    [
        (lambda layer, _: 99, far, [True, True]),
        (lambda layer, _: 100, far, [False, True]),  # a tenth of 1000
        (lambda layer, _: 0, far, [True, False]),
        (lambda layer, _: 99 if layer >= 6 else 900, far, [True, True]),
        (lambda layer, _: 99 if layer == 7 else 900, far, [False, True]),
        (lambda layer, _: 99 if layer < 6 else 900, far, [False, True]),
        # Only the last layers count, but all of them.
        (lambda layer, _: 0 if layer >= 6 else 900, far, [True, False]),
        (lambda layer, _: 0 if layer == 6 else 50, far, [True, False]),
        (lambda layer, segment: 5 if segment == LAST else 900, far, [True, True]),
        (lambda layer, segment: 900 if segment == LAST else 5, far, [False, True]),
        # The target is 1000 minus its rank away from the far end.
        (lambda layer, _: 5, lambda layer, _: 996, [True, True]),
        (lambda layer, _: 5, lambda layer, _: 995, [True, False]),
        (lambda layer, _: 5, lambda layer, _: 0, [True, False]),
        (lambda layer, _: 5, lambda layer, _: 994 if layer == 7 else 1000, [True, False]),
        (lambda layer, _: 5, lambda layer, _: 1000 if layer >= 6 else 600, [True, True]),
        (lambda layer, _: 5, lambda layer, at: 1000 if at == LAST else 0, [True, True]),
    ],
)
def test_the_answer_is_demoted(by: Any, target: Any, expected: list[bool]):
    table = cells(answer=ranked(by), target=ranked(target), **FEW)
    finding = segment_ranks.answer_by_segment(Fake(positions=table))
    assert holds(finding) == expected
    late = ", ".join(f"{by(layer, LAST):.0f}" for layer in (6, 7))
    added = ", ".join(f"{1000 - target(layer, LAST):.0f}" for layer in (6, 7))
    assert [check.found for check in finding.checks] == [
        f"median ranks {late} of 1001",
        f"median ranks from the top {late}; of the target, from the bottom {added}",
    ]


def answer_in_inputs(
    curve: Sequence[float],
    right: Sequence[float] = (),
    correct: Sequence[Any] = (None,) * 4,
    **more: Any,
) -> Finding:
    """Ranks by layer of four prompts, and of those that are answered correctly."""
    rows = [prompt for prompt, is_correct in enumerate(correct) if is_correct]

    def answer(matrix: str, layer: int, segment: str, prompt: int, lens: str) -> float:
        if (matrix, lens) != ("W_in", "logit_lens") or segment != LAST:
            return 1000 - curve[layer]
        return right[layer] if prompt in rows else curve[layer]

    table = cells(len(curve), prompts=4, answer=answer, zeros=False, **FEW, **more)
    return segment_ranks.answer_in_inputs(
        Fake(
            positions=table,
            prompts=prompts_table(correct),
            correct_prompts=rows,
            n_layers=len(curve),
        )
    )


@pytest.mark.parametrize(
    ("curve", "expected", "found"),
    [
        ([80, 70, 60, 50, 40, 30, 20, 10], True, "coefficient -1.00"),
        ([10, 20, 30, 40, 50, 60, 70, 80], False, "coefficient 1.00"),
        # Spearman's coefficient is 1 - 6 sum d^2 / (n (n^2 - 1)), d against the order of layers.
        ([80, 70, 60, 50, 40, 30, 10, 20], True, "coefficient -0.98"),
        ([60, 70, 80, 30, 40, 50, 10, 20], False, "coefficient -0.79"),
        ([10, 80, 70, 60, 50, 40, 30, 20], False, "coefficient -0.33"),
        ([5] * 8, False, "coefficient nan"),
        ([5], False, "coefficient nan"),
        ([5, 4], True, "coefficient -1.00"),
    ],
)
def test_the_answer_builds_up(curve: Sequence[float], expected: bool, found: str):
    finding = answer_in_inputs(curve)
    assert holds(finding) == [expected]
    assert finding.checks[0].found.startswith(found)
    assert finding.notes == (
        "The data have no original answers to compare the model's answers with.",
    )


def test_correct_answers_show_more():
    curve = [80, 70, 60, 50, 40, 30, 20, 10]
    better = answer_in_inputs(curve, [rank - 10 for rank in curve], [True, False, False, None])
    assert holds(better) == [True, True]
    assert better.checks[1].found == (
        "35.0 for the 1 prompt answered correctly, 45.0 for all prompts"
    )
    assert better.notes[0].startswith("1 of 4 (25 %) prompts are answered correctly")
    worse = answer_in_inputs(curve, [rank + 10 for rank in curve], [True, False, False, False])
    assert holds(worse) == [True, False]
    assert set(worse.tables) == {"all prompts", "prompts answered correctly"}
    # Nothing to compare.
    every = answer_in_inputs(curve, curve, [True] * 4)
    none = answer_in_inputs(curve, curve, [False] * 4)
    assert holds(every) == holds(none) == [True]
    assert [each.notes[0].partition(" prompts")[0] for each in (every, none)] == [
        "4 of 4 (100 %)",
        "0 of 4 (0 %)",
    ]


def test_a_correct_prompt_without_a_subject():
    """Its tokens have no segment."""
    table = cells(4, prompts=3, zeros=False, answer=lambda *at: 10 - at[1], **FEW)
    table.loc[table["prompt"] == 1, "segment"] = None
    finding = segment_ranks.answer_in_inputs(
        Fake(positions=table, prompts=prompts_table([True, True, False]), correct_prompts=[0, 1])
    )
    assert finding.notes[0].startswith("1 of 2 (50 %)")


def test_the_target_ranks_below_the_answer():
    def found(target: Callable[[int], float]) -> Finding:
        table = cells(
            target=lambda matrix, layer, *_: target(layer) if matrix == "W_in" else 0,
            answer=lambda matrix, layer, *_: 10 if matrix == "W_in" else 1000,
            **FEW,
        )
        return segment_ranks.target_in_inputs(Fake(positions=table))

    below = found(lambda layer: 11)
    assert below.verdict == "holds"
    assert below.checks[0].found.startswith("8 of 8 (100 %) layers; median ranks of the target 11,")
    assert found(lambda layer: 10).verdict == "does not hold here"
    once = found(lambda layer: 9 if layer == 2 else 50)
    assert (once.verdict, once.checks[0].found[:13]) == ("does not hold here", "7 of 8 (88 %)")


# --- figures 8 to 10 and tables 2 to 5: neurons ---------------------------------------------------


def neurons(
    like: Mapping[int, float],
    longest: int = 2,
    n_neurons: int = 200,
    others: float = 0.2,
    short: tuple[float, Mapping[int, float]] = (0.9, {}),
    norm: float = 30.0,
) -> pd.DataFrame:
    """Neurons, largest norm first, and three spanning vectors.

    `like` are the longest ones' cosines with some of these, `norm` is their norm, where that of
    all others is 1, and `short` the overlaps of the shortest with the zero vector and with some of
    these.
    """
    rows = []
    for neuron in range(n_neurons):
        is_long, is_short = neuron < longest, neuron >= n_neurons - 2
        for position in (0, 1, 2, None):
            if position is None:
                cosine, overlap = float("nan"), short[0] if is_short else 0.0
            else:
                cosine = like.get(position, others) if is_long else others
                overlap = short[1].get(position, 0.0) if is_short else 1.0
            own = norm if is_long else 1.0
            rows.append((neuron, own, neuron, position, f"t{position}", cosine, overlap))
    columns = ["neuron", "neuron_norm", "norm_order", "position", "token", "similarity", "overlap"]
    table = pd.DataFrame(rows, columns=columns).astype({"position": "Int64"})
    # The order of the table is that of indices, not of norms.
    return table.assign(neuron=(table["neuron"] * 7) % n_neurons).sort_values(
        "neuron", kind="stable", ignore_index=True
    )


def said(*largest: tuple[str, str]) -> pd.DataFrame:
    """Top and bottom tokens of the largest neurons, one letter each, and of other neurons."""
    rows = [("largest", list(top), list(bottom)) for top, bottom in largest]
    rows += [("smallest", list("xyz"), list("uvw")), ("zero vector", list("xyz"), list("uvw"))]
    return pd.DataFrame(rows, columns=["group", "top_tokens", "bottom_tokens"])


AGREED = said(("abc", "def"))


@pytest.fixture
def similarity(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """The findings of the figures and tables of one matrix for a table of neurons."""

    def found(
        table: pd.DataFrame,
        matrix: str,
        d_vocab: int = 1001,
        tokens: pd.DataFrame = AGREED,
    ) -> list[Finding]:
        asked = []

        def overlap(model: Any, gradients: Any, name: str, layer: int, *, k: int) -> pd.DataFrame:
            asked.append((name, layer, k))
            return table

        monkeypatch.setattr(gradient_neurons, "neuron_overlap", overlap)
        monkeypatch.setattr(gradient_neurons, "neuron_tokens", lambda *_, **__: tokens)
        monkeypatch.setattr(gradient_neurons, "spanning_tokens", lambda *_, **__: tokens)
        example = SimpleNamespace(
            capture=SimpleNamespace(prompt=lambda _: "a prompt"), target=lambda: "c"
        )
        evidence = Fake(example=example, d_vocab=d_vocab)
        measures = (
            gradient_neurons.similarity,
            gradient_neurons.tokens_of_neurons,
            gradient_neurons.tokens_of_spanning_set,
        )
        findings = [measure(evidence, matrix) for measure in measures]
        assert asked == [(matrix, 5, max(1, min(100, d_vocab // 5)))] * 3
        assert [len(each.checks) for each in findings] == [2, 3, 1]
        assert findings[1].checks[1:] == findings[0].checks
        note = (
            "The prompt 'a prompt' with the target 'c', in layer 5 of 8; the paper shows layer 14"
        )
        assert all(each.notes[0].startswith(note) for each in findings)
        return findings

    return found


@pytest.mark.parametrize(
    ("matrix", "largest", "expected", "found"),
    [
        ("W_in", [("abc", "def"), ("bgh", "ijk")], True, "they share 'b'"),
        # A neuron with the other sign has them at its other end.
        ("W_in", [("abc", "def"), ("ghi", "bca"), ("ajb", "klm")], True, "they share 'a', 'b'"),
        # All of them, not two of three; the smallest ones do not count.
        ("W_in", [("abc", "def"), ("abc", "def"), ("ghi", "jkl")], False, "they share none"),
        ("W_in", [("abc", "def"), ("xyz", "uvw")], False, "they share none"),
        ("W_in", [], False, "they share none"),
        # Those of W_out share the target, which is c.
        ("W_out", [("abc", "def"), ("ghi", "jkc")], True, "they share 'c'"),
        ("W_out", [("abc", "def"), ("bgh", "ijk")], False, "they share 'b'"),
        ("W_out", [], False, "they share none"),
    ],
)
def test_the_largest_neurons_share_their_tokens(
    similarity: Callable[..., list[Finding]],
    matrix: str,
    largest: Any,
    expected: bool,
    found: str,
):
    finding = similarity(neurons({2: 0.95}), matrix, tokens=said(*largest))[1]
    assert (finding.checks[0].holds, finding.checks[0].found) == (expected, found)
    assert finding.verdict == ("holds" if expected else "does not hold here")


@pytest.mark.parametrize("matrix", ["W_in", "W_out"])
@pytest.mark.parametrize(
    ("table", "expected", "found"),
    [
        # Two neurons of norm 30 are 1800 of 1800 + 198, and of norm 29 they are 1682 of 1880.
        (neurons({1: 0.7}), True, "90.1 % of it, in 2 of 200 (1 %) neurons"),
        (neurons({1: 0.7}, norm=29), False, "89.5 % of it, in 2 of 200 (1 %) neurons"),
        (neurons({1: -0.7}), True, "90.1 % of it, in 2 of 200 (1 %) neurons"),
        (neurons({1: 0.69}), False, "0.0 % of it, in 0 of 200 (0 %) neurons"),
        # Many small ones do not make up for a few large ones.
        (neurons({0: 0, 1: 0, 2: 0}, others=0.8), False, "9.9 % of it, in 198 of 200 (99 %)"),
        (neurons({0: 0, 1: 0, 2: 0}, others=0.8, norm=1), True, "99.0 % of it, in 198 of 200"),
        (neurons({}, others=0.8), True, "100.0 % of it, in 200 of 200 (100 %) neurons"),
    ],
)
def test_a_few_vectors_have_the_tokens_of_neurons(
    similarity: Callable[..., list[Finding]],
    matrix: str,
    table: pd.DataFrame,
    expected: bool,
    found: str,
):
    (check,) = similarity(table, matrix)[2].checks
    assert check.holds == expected
    assert check.found.startswith(found)


@pytest.mark.parametrize(
    ("table", "of_inputs", "of_vjps"),
    [
        (neurons({2: 0.95}), [True, True], [True, True]),
        (neurons({2: -0.95}), [True, True], [True, True]),
        (neurons({2: 0.9}), [False, True], [False, True]),
        # Of VJPs, the paper says which one.
        (neurons({0: 0.95, 2: 0.5}), [True, True], [False, True]),
        # One of the two longest of 200 is not enough, and the third does not count.
        (neurons({2: 0.95}, longest=1), [False, True], [False, True]),
        (neurons({2: 0.95}, longest=3), [True, True], [True, True]),
        (neurons({2: 0.95}, short=(0.4, {1: 0.5})), [True, False], [True, False]),
        (neurons({2: 0.95}, short=(0.5, {1: 0.5})), [True, False], [True, False]),
        (neurons({2: 0.95}, short=(0.4, {1: 0.3, 0: 0.3})), [True, True], [True, True]),
    ],
)
def test_neurons_and_their_spanning_vectors(
    similarity: Callable[..., list[Finding]],
    table: pd.DataFrame,
    of_inputs: list[bool],
    of_vjps: list[bool],
):
    assert holds(similarity(table, "W_in")[0]) == of_inputs
    assert holds(similarity(table, "W_out")[0]) == of_vjps


def test_numbers_of_neurons(similarity: Callable[..., list[Finding]]):
    finding, *_ = similarity(neurons({2: -0.95}, short=(0.9, {0: 0.25})), "W_out")
    assert [check.found for check in finding.checks] == [
        "the 2 largest have at least 0.950; the closest vector is most often that of 't2'",
        "they share 90 % with the zero vector, and at most 25 % with a vector of the spanning set",
    ]


@pytest.mark.parametrize("d_vocab", [3, 50, 97, 499, 500, 50257])
def test_small_vocabularies_are_not_compared_with_themselves(
    similarity: Callable[..., list[Finding]], d_vocab: int
):
    similarity(neurons({2: 0.95}), "W_in", d_vocab)


# --- names ----------------------------------------------------------------------------------------


def test_names_of_figures_and_tables():
    names = [cover for experiment in EXPERIMENTS for cover in experiment.covers]
    figures = [f"fig{n}" for n in (1, *range(3, 25))]
    tables = [f"table{n}" for n in range(1, 8)]
    beyond = ["several_facts", "whitening", "optimizers", "training"]
    beyond += ["residual_bases", "last_layer", "junk_tokens", "sinks", "gated_neurons"]
    beyond += ["normalization", "chance", "prompt_forms", "early_layers"]
    assert sorted(names) == sorted([*figures, *tables, *beyond])
    for experiment in EXPERIMENTS:
        assert experiment.name in experiment.covers
        for cover in experiment.covers:
            assert select_experiments(cover) == (experiment,)
    assert select_experiments("all") == EXPERIMENTS == select_experiments(["fig4", "all"])
    assert select_experiments("gradients") == GRADIENTS == select_experiments(["gradients", "fig4"])
    assert select_experiments("editing") == EDITING
    assert select_experiments("explanations") == EXPLANATIONS
    assert select_experiments(["editing", "gradients"]) == (*GRADIENTS, *EDITING)
    assert (*GRADIENTS, *EDITING, *EXPLANATIONS) == EXPERIMENTS
    assert select_experiments(["fig24", "gradients"]) == (*GRADIENTS, *select_experiments("fig24"))
    folders = {"fig9": "fig8", "fig12": "fig11", "fig15": "fig11", "fig23": "fig22", "fig1": "fig3"}
    for alias, name in folders.items():
        assert [each.name for each in select_experiments(alias)] == [name]
    asked = ["table2", "fig9", "fig8", "fig4"]
    assert [each.name for each in select_experiments(asked)] == ["fig4", "fig8", "table2"]


def test_unknown_names(tmp_path: Path):
    known = (
        r"allowed: fig3, fig1, .*table5, .*optimizers, .*prompt_forms, gradients, explanations, "
        r"editing, all\n"
    )
    with pytest.raises(InputError, match=rf"unknown experiment 'fig2'; {known}"):
        reproduce("facts", None, tmp_path / "x", "fig2")
    with pytest.raises(InputError, match="names is empty; allowed: fig3, fig1"):
        reproduce("facts", None, tmp_path / "x", [])
    assert not (tmp_path / "x").exists()


# --- one report of everything, remeasured ---------------------------------------------------------

KIND = "bridge" if HAS_BRIDGE else "hooked"
SMALL_ROWS = [
    {"prompt": "Messi plays for", "target": " Paris", "subject": "Messi", "answer": " the"},
    {"prompt": "Rome is in Italy and Paris is", "target": " the", "subject": "Paris"},
    {"prompt": "The dog of the king", "target": " Paris", "subject": "the king", "answer": " Rome"},
    {"prompt": "Rome is in", "target": " Paris painting"},
]
"""With a subject at the beginning, in the middle, at the end or missing, and a long target."""


@pytest.fixture(scope="module")
def small_model() -> Any:
    """Three layers, 97 tokens and random weights, in float64."""
    return build(f"{KIND}-gpt2").model


class Report(NamedTuple):
    """A folder, which tests must not change, and the times of its sweep's files."""

    folder: Path
    swept: dict[Path, int]


def times_of(sweep: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in sweep.rglob("*.parquet")}


@pytest.fixture(scope="module")
def report(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Figure 4 first, then the others in the same folder, as without matplotlib."""
    out = tmp_path_factory.mktemp("report")
    reproduce(small_model, SMALL_ROWS, out, "fig4", progress=False)
    swept = times_of(out / "sweep")
    others = [experiment.name for experiment in GRADIENTS if experiment.name != "fig4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "find_spec", lambda _: None)
        found = reproduce(small_model, SMALL_ROWS, out, others, progress=False)
    assert list(found) == others
    return Report(out, swept)


@pytest.fixture(scope="module")
def slow_cells(small_model: Any, report: Report) -> list[dict[str, Any]]:
    """The same prompts one by one, cell by cell. Those without a subject have no segments."""
    prompts = pd.read_parquet(report.folder / "sweep" / "prompts")
    assert len(prompts) == len(SMALL_ROWS)
    rows = prompts.dropna(subset="subject")
    return [cell for row in rows.itertuples() for cell in cells_of(small_model, row)]


def cells_of(model: Any, row: Any) -> Iterator[dict[str, Any]]:
    found = blt.backward_lens(
        model,
        row.text,
        int(row.target_id),
        direction="gradient",
        projection=LENSES,
        k=1,
        prepend_bos=False,
    )
    segments = segments_of(found.capture.str_tokens[0], row.text, row.subject)
    lens = {"logit_lens": LogitLens(model, False), "normalized": LogitLens(model, True)}
    for name in LENSES:
        result = found.under(name)
        for matrix in ("W_in", "W_out"):
            for layer in result.layers:
                gradient = result.capture[matrix, layer]
                for at, segment in enumerate(segments):
                    cell = result.cell(matrix, layer, at)
                    vector = gradient.spanning_set[0, at]
                    yield {
                        "prompt": row.prompt,
                        "matrix": matrix,
                        "layer": layer,
                        "segment": segment,
                        "projection": name,
                        "norm": cell.norm,
                        "target": None if cell.is_zero else cell.target_rank,
                        "answer": None
                        if cell.is_zero
                        else lens[name].rank(vector, int(row.answer_id)),
                    }


class LogitLens:
    """Scores of a vector by the model's own modules."""

    def __init__(self, model: Any, normalize: bool) -> None:
        self.model, self.normalize = model, normalize

    def rank(self, vector: Any, token: int) -> int:
        if self.normalize:
            vector = vector / vector.norm()
        with torch.no_grad():
            scores = self.model.unembed(self.model.ln_final(vector[None, None]))[0, 0]
        return int((scores > scores[token]).sum())


def segments_of(tokens: Sequence[str], text: str, subject: str) -> list[str]:
    """By adding up the tokens' lengths."""
    assert "".join(tokens) == text
    start = text.index(subject)
    end, at, own = start + len(subject), 0, []
    for index, token in enumerate(tokens):
        left, at = at, at + len(token)
        if left < end and at > start:
            own.append(index)
    names = [
        "before subject" if index < own[0] else "after subject" for index in range(len(tokens))
    ]
    for index in own:
        names[index] = "middle subject tokens"
    names[own[0]] = "first subject token"
    names[own[-1]] = "last subject token"
    names[-1] = "last token"
    return names


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def slow_groups(
    slow_cells: list[dict[str, Any]], matrix: str, of: str, by_lens: bool
) -> dict[tuple[str, ...], list[float]]:
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for cell in slow_cells:
        if cell["matrix"] == matrix and (by_lens or cell["projection"] == "logit_lens"):
            lens = (cell["projection"],) if by_lens else ()
            values = groups[(*lens, str(cell["layer"]), cell["segment"])]
            if cell[of] is not None:
                values.append(cell[of])
    return groups


def test_norms_against_a_slow_loop(report: Report, slow_cells: list[dict[str, Any]]):
    rows = read_csv(report.folder / "fig6" / "norms-by-segment.csv")
    groups = slow_groups(slow_cells, "W_out", "norm", by_lens=False)
    assert len(rows) == len(groups) == 3 * len(SEGMENTS)
    for row in rows:
        values = groups[row["layer"], row["segment"]]
        # The sweep's files have norms in float32.
        assert float(row["mean"]) == pytest.approx(statistics.fmean(values), rel=1e-6, abs=1e-12)
        assert int(row["count"]) == len(values)


@pytest.mark.parametrize(
    ("file", "matrix", "of"),
    [
        ("fig7/target-rank-by-segment.csv", "W_out", "target"),
        ("fig19/answer-rank-by-segment.csv", "W_out", "answer"),
        ("fig20/all-prompts.csv", "W_in", "answer"),
    ],
)
def test_ranks_against_a_slow_loop(
    report: Report, slow_cells: list[dict[str, Any]], file: str, matrix: str, of: str
):
    rows = read_csv(report.folder / file)
    groups = slow_groups(slow_cells, matrix, of, by_lens=True)
    assert len(rows) == len(groups) == 2 * 3 * len(SEGMENTS)
    for row in rows:
        values = groups[row["projection"], row["layer"], row["segment"]]
        assert int(row["count"]) == len(values)
        assert (row["matrix"], row["of"]) == (matrix, of)
        if not values:
            assert (row["layer"], row["median"]) == ("2", "")
            continue
        assert float(row["median"]) == statistics.median(values)
        assert float(row["mean"]) == pytest.approx(statistics.fmean(values), rel=1e-12)


def test_checks_follow_from_the_tables(report: Report):
    """The main numbers, recomputed from the files."""
    findings = {each["name"]: each for each in folder.read_findings(report.folder)}
    rows = read_csv(report.folder / "fig7" / "target-rank-by-segment.csv")
    last = [
        float(row["median"])
        for row in rows
        if (row["projection"], row["segment"]) == ("logit_lens", LAST)
    ]
    far = sum(rank >= 0.99 * 96 for rank in last)
    check = findings["fig7"]["checks"][0]
    assert check["found"].startswith(f"{far} of 3 ")
    assert check["holds"] == (far >= 3)
    answers = [
        float(row["median"])
        for row in read_csv(report.folder / "fig20" / "all-prompts.csv")
        if (row["projection"], row["segment"]) == ("logit_lens", LAST)
    ]
    assert findings["fig20"]["checks"][0]["found"].endswith(
        "median ranks " + ", ".join(f"{rank:.0f}" for rank in answers)
    )


# --- the folder -----------------------------------------------------------------------------------


def test_files_of_the_folder(report: Report):
    findings = folder.read_findings(report.folder)
    assert [each["name"] for each in findings] == [experiment.name for experiment in GRADIENTS]
    covers = {each["name"]: each["covers"] for each in findings}
    assert covers["fig8"] == ["fig8", "fig9"]
    name = "gpt2" if HAS_BRIDGE else "random-gpt2"
    about = {"model": name, "n_layers": 3, "d_vocab": 97, "data": "rows", "prompts": 4}
    about |= {"rejected": 0, "cut": 1, "bos": "without BOS"}
    for finding in findings:
        assert {"title", "statement", "verdict", "checks", "notes"} <= set(finding)
        assert finding["checks"]
        assert finding["about"].items() >= about.items()
        shown = [*finding["results"], *finding["figures"]]
        assert shown or finding["tables"]
        for each in (*shown, *finding["tables"]):
            assert (report.folder / each["file"]).stat().st_size > 0
        for figure in finding["figures"]:
            page_of = (report.folder / figure["file"]).read_text(encoding="utf-8")
            assert '"../plotly.min.js"' in page_of
            assert ("svg" in figure) == (finding["name"] == "fig4")
        for table in finding["tables"]:
            rows = read_csv(report.folder / table["file"])
            assert len(rows) == table["n_rows"]
            assert len(table["rows"]) == min(12, len(rows))
            if rows:
                assert list(rows[0]) == table["columns"]
    law = next(each for each in findings if each["name"] == "fig4")
    for figure in law["figures"]:
        assert ElementTree.parse(report.folder / figure["svg"]).getroot().tag.endswith("}svg")
    # The law holds for any weights.
    assert law["verdict"] == "holds"


def test_a_folder_grows_and_its_sweep_is_reused(report: Report):
    assert report.swept
    assert times_of(report.folder / "sweep") == report.swept
    text = (report.folder / "report.html").read_text(encoding="utf-8")
    names = re.findall(r'<section id="(\w+)">', text)
    assert names == [experiment.name for experiment in GRADIENTS]
    for experiment in GRADIENTS:
        assert experiment.statement in html.unescape(text)


def test_truncated_targets(report: Report):
    """Only the first token of a target is used, and its table is named after it."""
    finding = json.loads((report.folder / "fig11" / "finding.json").read_text(encoding="utf-8"))
    shown = [each["name"] for each in finding["results"]]
    assert "Rome is in →  Paris" in shown
    assert "Messi plays for →  Paris" in shown
    text = (report.folder / "report.html").read_text(encoding="utf-8")
    assert "1 with only the first token of the target" in text


class Links(HTMLParser):
    """Tags of a page, and addresses of its links and frames."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]


def test_links_of_the_report(report: Report):
    links = Links()
    links.feed((report.folder / "report.html").read_text(encoding="utf-8"))
    assert {"iframe", "table"} <= links.tags
    assert "script" not in links.tags
    inside = {address for address in links.addresses if address.startswith("#")}
    assert inside == {f"#{experiment.name}" for experiment in GRADIENTS}
    files = {address for address in links.addresses if not address.startswith("#")}
    assert len(files) > 20
    assert all((report.folder / file).is_file() for file in files)


def test_another_model_or_data_is_refused(small_model: Any, report: Report):
    before = (report.folder / "report.html").read_bytes()
    with pytest.raises(SweepError, match=r"holds a sweep of other settings \(data\): "):
        reproduce(small_model, SMALL_ROWS[:1], report.folder, "fig6", progress=False)
    with pytest.raises(SweepError, match=r"holds a sweep of other settings \(config\): "):
        reproduce(small_model, SMALL_ROWS, report.folder, "fig6", prompts=9, progress=False)
    other = build(f"{KIND}-gpt2", seed=1).model
    with pytest.raises(SweepError, match=r"holds a sweep of other settings \(model\): "):
        reproduce(other, SMALL_ROWS, report.folder, "fig6", progress=False)
    assert (report.folder / "report.html").read_bytes() == before


def test_similar_prompts_have_separate_files(tmp_path: Path):
    """Long prompts and those in other scripts, whose file names are truncated."""
    names = ["x" * 80, "x" * 81, "東京", "パリ", "a-2", "a", "A", "?"]
    finding = Finding((YES,), {name: pd.DataFrame({"n": [name]}) for name in names})
    folder.write_finding(tmp_path, EXPERIMENTS[0], finding, {})
    tables = json.loads((tmp_path / "fig3" / "finding.json").read_text())["tables"]
    assert [read_csv(tmp_path / each["file"]) for each in tables] == [
        [{"n": name}] for name in names
    ]


# --- prompts of all kinds -------------------------------------------------------------------------

NASTY = "Lionel Messi plays <script>alert(\"x\")</script> & 'y'\n🙂 for"
ROWS = [
    {"prompt": "Lionel Messi plays for", "target": " Paris", "subject": "Lionel Messi"},
    {"prompt": NASTY, "target": " Rome", "subject": "Lionel Messi", "answer": " Paris"},
    {"prompt": "for Lionel Messi", "target": " Paris", "subject": "Lionel Messi"},
    {"prompt": "plays for", "target": " Paris"},
    {"prompt": "Messi", "target": " Paris", "subject": "Messi"},
]
"""With a subject at the end, without one, and with a single token."""


@pytest.fixture(scope="module")
def everything(facts_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experiments on few prompts of all kinds."""
    out = tmp_path_factory.mktemp("everything")
    found = reproduce(facts_model, ROWS, out, "gradients", progress=False)
    assert list(found) == [experiment.name for experiment in GRADIENTS]
    return out


def small_evidence(model: Any, rows: Any, out: Path) -> Evidence:
    return Evidence(
        model,
        blt.read_records(rows),
        out,
        n_prompts=2,
        seed=0,
        prepend_bos=False,
        progress=False,
    )


WITHOUT_SUBJECT = [{"prompt": "Messi plays for", "target": " Paris"}]


def test_data_without_subjects(small_model: Any, tmp_path: Path):
    evidence = small_evidence(small_model, WITHOUT_SUBJECT, tmp_path)
    by_segment = {"fig6", "fig7", "fig16", "fig17", "fig18", "fig19", "fig20", "fig21"}
    for experiment in GRADIENTS:
        if experiment.name in by_segment:
            with pytest.raises(InputError, match=r"no token has a segment.*subject"):
                experiment.measure(evidence)
        else:
            assert experiment.measure(evidence).checks


def test_a_failing_experiment_does_not_stop_the_others(small_model: Any, tmp_path: Path):
    with pytest.raises(InputError, match=r"no token has a segment.*subject"):
        reproduce(small_model, WITHOUT_SUBJECT, tmp_path, "fig6", progress=False)
    names = ["fig4", "fig6", "table3"]
    found = reproduce(small_model, WITHOUT_SUBJECT, tmp_path, names, progress=False)
    assert list(found) == names
    verdicts = [found[name].verdict for name in names]
    assert verdicts[1] == "not measured"
    assert "not measured" not in (verdicts[0], verdicts[2])
    (note,) = found["fig6"].notes
    assert re.fullmatch(
        r"It could not be measured: no token has a segment.*subject.*\.", note, re.S
    )
    written_down = {each["name"]: each for each in folder.read_findings(tmp_path)}
    assert list(written_down) == names
    assert written_down["fig6"]["checks"] == []
    assert written_down["fig6"]["notes"] == [note]
    assert "not measured</span>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def experiment(name: str, error: Exception | None) -> Any:
    """An experiment that succeeds or fails."""

    def measure(evidence: Evidence) -> Finding:
        if error is not None:
            raise error
        return Finding((YES,))

    own = next(each for each in EXPERIMENTS if each.name == name)
    return dataclasses.replace(own, measure=measure)


def with_experiments(monkeypatch: pytest.MonkeyPatch, **errors: Exception | None) -> None:
    chosen = tuple(experiment(name, error) for name, error in errors.items())
    module = sys.modules["backward_lens_tl.reproduction"]
    monkeypatch.setattr(module, "select_experiments", lambda _: chosen)


def test_a_model_that_an_experiment_does_not_support(
    small_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    problem = UnsupportedModelError("experts")
    with_experiments(monkeypatch, fig3=problem, fig4=None)
    found = reproduce(small_model, WITHOUT_SUBJECT, tmp_path, "gradients", progress=False)
    assert {name: each.verdict for name, each in found.items()} == {
        "fig3": "not measured",
        "fig4": "holds",
    }
    assert found["fig3"].notes == ("It could not be measured: experts.",)
    with_experiments(monkeypatch, fig3=problem)
    with pytest.raises(UnsupportedModelError, match=r"^experts\n"):
        reproduce(small_model, WITHOUT_SUBJECT, tmp_path, "gradients", progress=False)


def test_findings_are_kept_if_a_later_experiment_crashes(
    small_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Errors that are not about the data or the model are raised, like Ctrl-C."""
    with_experiments(monkeypatch, fig3=None, fig4=RuntimeError("stop"), fig5=None)
    with pytest.raises(RuntimeError, match="stop"):
        reproduce(small_model, WITHOUT_SUBJECT, tmp_path, "gradients", progress=False)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', text) == ["fig3"]


@pytest.mark.parametrize(
    ("bos", "text", "n_more"),
    [(False, "without BOS", 0), (True, "with BOS", 1), (None, "with the default BOS", 1)],
)
def test_a_bos_token(
    facts_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bos: bool | None,
    text: str,
    n_more: int,
):
    """The facts model has a BOS token by default. The setting applies to the example too."""
    n_tokens = len(facts_model.to_tokens(ROWS[0]["prompt"], prepend_bos=False)[0]) + n_more

    def measure(evidence: Evidence) -> Finding:
        assert set(evidence.gradients["n_tokens"]) == {n_tokens}
        assert len(evidence.example.capture.str_tokens[0]) == n_tokens
        return Finding((YES,))

    chosen = (dataclasses.replace(experiment("fig4", None), measure=measure),)
    monkeypatch.setattr(
        sys.modules["backward_lens_tl.reproduction"], "select_experiments", lambda _: chosen
    )
    options = {} if bos is False else {"prepend_bos": bos}
    reproduce(facts_model, ROWS[:1], tmp_path, "fig4", progress=False, **options)
    (finding,) = folder.read_findings(tmp_path)
    assert finding["about"]["bos"] == text
    assert f" {text}" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_counting_truncated_targets():
    """Token ids and rejected prompts do not count."""
    rows = [SimpleNamespace(target=each) for each in (" Paris", " New York", 5, " Los Angeles")]
    shown = pd.DataFrame({"prompt": [0, 1, 2], "target": [" Paris", " New", " x"]})
    own = SimpleNamespace(rows=[*rows, object()])
    assert Fake(records=own, prompts=shown).n_cut_targets == 1
    assert Fake(records=own, prompts=shown.head(1)).n_cut_targets == 0
    refused = pd.DataFrame({"prompt": [4], "target": ["a"]})
    assert Fake(records=own, prompts=refused).n_cut_targets == 0


def test_data_by_default():
    for experiments in (GRADIENTS, EDITING, EXPERIMENTS):
        assert default_data("facts", experiments) == "facts"
    for other in ("gpt2-xl", torch.nn.Identity()):
        assert default_data(other, GRADIENTS) == COUNTERFACT
        # Editing needs paraphrase and neighborhood prompts.
        assert default_data(other, EDITING) == COUNTERFACT_RECORDS
        assert default_data(other, EXPERIMENTS) == COUNTERFACT_RECORDS
    assert COUNTERFACT != COUNTERFACT_RECORDS


def test_data_without_analysable_prompts(small_model: Any, tmp_path: Path):
    rows = [{"prompt": "Rome is in", "target": " Paris", "subject": "Messi"}]
    with pytest.raises(
        InputError, match=r"none of the prompts can be analysed; the first: .*'Messi'"
    ):
        reproduce(small_model, rows, tmp_path, "fig4", progress=False)


@pytest.mark.usefixtures("as_for_a_user")
def test_a_model_of_one_layer(tmp_path: Path):
    """The other model class, where there is one."""
    kind = "hooked" if HAS_HOOKED else "bridge"
    model = build(f"{kind}-gpt2", n_layers=1).model
    evidence = small_evidence(model, SMALL_ROWS[:2], tmp_path)
    found = {experiment.name: experiment.measure(evidence) for experiment in GRADIENTS}
    assert found["fig4"].verdict == "holds"
    for finding in found.values():
        assert all(check.found for check in finding.checks)
    # One of each kind of figure.
    for name in ("fig3", "fig4", "fig6", "fig7", "fig8"):
        for draw in found[name].figures.values():
            draw(backend="plotly")


# --- the report in a browser ----------------------------------------------------------------------


def grave(shown: Page) -> list[tuple[str, list[str]]]:
    """Serious and critical violations of axe-core, with their elements."""
    return [
        (found["id"], [node["html"] for node in found["nodes"]])
        for found in Axe().run(shown).response["violations"]
        if found["impact"] in ("serious", "critical")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_in_a_browser(browser: Browser, everything: Path, scheme: str):
    with opened(browser, everything / "report.html", scheme=scheme) as window:
        shown = window.page
        shown.locator("details").evaluate_all("all => all.forEach(each => each.open = true)")
        frames = shown.locator("iframe")
        n_frames = frames.count()
        assert n_frames > 20
        # Frames load when they are scrolled to. For the dark scheme, three are enough.
        for index in range(n_frames if scheme == "light" else 3):
            frames.nth(index).scroll_into_view_if_needed()
            inner = frames.nth(index).content_frame
            inner.locator(".js-plotly-plot .main-svg, table").first.wait_for(timeout=15_000)
        assert shown.evaluate("document.title") == "Backward Lens on facts"
        assert shown.locator("section").count() == len(GRADIENTS)
        for width in (400, 1280):
            shown.set_viewport_size({"width": width, "height": 800})
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
        # Only files of the folder, no network.
        assert window.requests
        assert all(address.startswith("file://") for address in window.requests)
        # axe-core posts messages to frames, which Chromium refuses between files.
        assert window.complaints == []
        assert grave(shown) == []
        background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]


@pytest.mark.slow
def test_prompts_are_text_in_the_report(browser: Browser, everything: Path):
    with opened(browser, everything / "report.html") as window:
        assert window.page.locator("script").count() == 0
        captions = window.page.locator("figcaption").all_text_contents()
        assert any(
            "<script>alert(\"x\")</script> & 'y'" in each and "🙂" in each for each in captions
        )


def test_text_of_the_report():
    """Verdicts and checks, escaped, with an accessible mark."""
    about = {"model": "<m>", "n_layers": 8, "d_vocab": 50257, "data": "d&d", "prompts": 9}
    about |= {"rejected": 2, "seconds": 3.4, "bos": "without BOS", "cut": 1}
    finding = {
        "name": "fig4",
        "title": "<T>",
        "statement": "a < b",
        "verdict": "does not hold here",
    }
    shown = {"results": [{"name": "<r>\nis", "file": "r.html", "height": 9}], "figures": []}
    rows = {"name": "<n>", "file": "n.csv", "columns": ["a"], "rows": [["<cell>"]], "n_rows": 2}
    finding |= {"about": about, "notes": ["<note>"], "tables": [rows], **shown}
    checks = [
        {"claim": "<c>", "holds": False, "found": "<f>", "exceptions": ""},
        {"claim": "d", "holds": True, "found": "g", "exceptions": "<e>"},
    ]
    text = page.render_report([finding | {"checks": checks}])
    for piece in (
        "<title>Backward Lens on &lt;m&gt;</title>",
        "&lt;m&gt; (8 layers, 50,257 tokens),\n9 prompts of d&amp;d without BOS, 2 rejected, "
        "1 with only the first token of the target, 3 s",
        '<span class="verdict fails">does not hold here</span>',
        'aria-label="does not hold">✗</span> &lt;c&gt;. <b>Found:</b> &lt;f&gt;.</li>',
        'aria-label="holds">✓</span> d. <b>Found:</b> g. Exceptions: &lt;e&gt;.</li>',
        "<b>The paper:</b> a &lt; b",
        '<p class="note">&lt;note&gt;</p>',
        '<figcaption>&lt;r&gt;⏎is · <a href="r.html">page</a></figcaption>',
        'title="&lt;r&gt;⏎is"',
        "<summary>&lt;n&gt;: the first 1 of 2 rows</summary>",
        "<td>&lt;cell&gt;</td>",
    ):
        assert piece in text
    assert not re.search("<(m|c|f|e|r|n|note|cell)>", text)
    plain = {"about": about | {"rejected": 0, "cut": 0}, "verdict": "not measured", "checks": []}
    unmeasured = page.render_report([finding | plain])
    assert "9 prompts of d&amp;d without BOS, 3 s" in unmeasured
    assert re.search(r'<span class="verdict \w+">not measured</span>', unmeasured)
    assert "</main>" in page.render_report([])


# --- the command ----------------------------------------------------------------------------------


def test_the_command(
    facts_model: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    loaded = []

    def load_model(*args: Any, **options: Any) -> Any:
        loaded.append((args, options))
        return facts_model

    monkeypatch.setattr(loading, "load_model", load_model)
    monkeypatch.setattr(folder, "find_spec", lambda _: None)
    out = tmp_path / "found"
    argv = ["reproduce", "fig4", "fig23", "--prompts", "4", "--out", str(out), "--quiet"]
    assert cli.main(argv) == 0
    assert loaded == [(("facts", None), {"device": None})]
    said, err = capsys.readouterr()
    lines = said.splitlines()
    assert lines[0] == "fig4: holds"
    law, last, drops = lines[1:4]
    assert re.fullmatch(r"  \+ in every layer but the last.+: 56 of 56 \(100 %\) gradients", law)
    assert re.fullmatch(
        r"  \+ in the last layer, the rank is 1.*: 8 of 8 \(100 %\) gradients", last
    )
    assert re.fullmatch(r"  \+ no rank differs .+: gradients with another rank: 0.+", drops)
    assert re.fullmatch(r"fig22: (holds|holds with exceptions|does not hold here)", lines[4])
    assert len(lines) == 10
    for line in lines[5:9]:
        assert re.match(r"  [+-] .+: .+", line)
    assert lines[9] == f"report: {out / 'report.html'}"
    assert "experiment" not in err
    assert "prompt" not in err
    for finding in folder.read_findings(out):
        assert finding["about"].items() >= {"model": "facts", "bos": "without BOS"}.items()
    # The folder cannot be resumed with other settings.
    assert cli.main([*argv, "--bos"]) == 2
    assert "holds a sweep of other settings (config)" in capsys.readouterr().err
    # Without --quiet, there are progress bars.
    argv.remove("fig23")
    assert cli.main(argv[:-1]) == 0
    assert "experiment" in capsys.readouterr().err


def test_the_command_prints_what_was_not_measured_and_exceptions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    findings = {"fig3": Finding((NO, ALMOST)), "fig6": Finding((), notes=("It could not.",))}
    asked = []

    def found(model: Any, data: Any, out: str, names: Any, **options: Any) -> Any:
        asked.append((names, model, out, data.rows[0].prompt, options))
        return findings

    monkeypatch.setattr(loading, "load_model", lambda *_, **__: "the model")
    monkeypatch.setattr(sys.modules["backward_lens_tl.reproduction"], "reproduce", found)
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"prompt": "Rome is in", "target": " Paris"}]), encoding="utf-8")
    argv = ["reproduce", "gradients", "--out", str(tmp_path), "--data", str(data)]
    assert cli.main([*argv, "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fig3: does not hold here",
        "  - c: f",
        "  + c: f (but but)",
        "fig6: not measured",
        "  It could not.",
        f"report: {tmp_path / 'report.html'}",
    ]
    fits = ["--jacobian", "a.pt", "b.pt", "--statistics", "s.txt", "--texts", "t.txt"]
    assert cli.main([*argv, "--bos", "--seed", "3", "--prompts", "5", *fits]) == 0
    given = (["gradients"], "the model", str(tmp_path), "Rome is in")
    usual = {"prompts": 100, "seed": 0, "prepend_bos": False, "progress": False}
    chosen = {"prompts": 5, "seed": 3, "prepend_bos": True, "progress": True}
    lenses: tuple[dict[str, Any], ...] = (
        {"jacobian": (), "statistics": None, "texts": None},
        {"jacobian": ["a.pt", "b.pt"], "statistics": "s.txt", "texts": "t.txt"},
    )
    assert asked == [(*given, usual | lenses[0]), (*given, chosen | lenses[1])]


def test_errors_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    def error(*argv: str) -> str:
        assert cli.main(["reproduce", *argv, "--quiet", "--out", str(tmp_path / "x")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()[-1]

    missing = str(tmp_path / "missing.json")
    assert re.search(r"^backward-lens: error: .*missing\.json", error("fig4", "--data", missing))
    assert "error: " in error("fig4", "--model", str(tmp_path / "no-model"))
    assert not (tmp_path / "x").exists()
    # A wrong name is an error before the model is loaded.
    monkeypatch.setattr(loading, "load_model", None)
    assert "unknown experiment 'fig99'; allowed: fig3, fig1" in error("fig4", "fig99")


# --- everything -----------------------------------------------------------------------------------


def check_everything(out: Path, column: int, *options: str) -> dict[str, Any]:
    began = time.perf_counter()
    assert cli.main(["reproduce", "gradients", *options, "--out", str(out), "--quiet"]) == 0
    seconds = time.perf_counter() - began
    sys.stdout.write(f"{' '.join(options)}: {seconds:.0f} s\n")  # shown by -s
    assert seconds < 600
    findings = {each["name"]: each for each in folder.read_findings(out)}
    assert len(findings) == len(GRADIENTS)
    exceptions = read_csv(out / "fig4" / "exceptions.csv")
    law = findings["fig4"]
    if law["verdict"] != "holds":
        assert law["verdict"] == "holds with exceptions"
        assert exceptions
        assert all(check["holds"] and check["exceptions"] for check in law["checks"])
    assert all(row["cause"] for row in exceptions)
    verdicts = {name: each["verdict"] for name, each in findings.items()}
    assert verdicts.items() <= documented_verdicts(column).items()
    return verdicts


@pytest.mark.slow
@pytest.mark.usefixtures("as_for_a_user")
def test_everything_on_the_facts_model(tmp_path: Path):
    verdicts = check_everything(tmp_path, 0, "--model", "facts", "--prompts", "100")
    assert verdicts["fig4"] == verdicts["fig3"] == "holds"


@pytest.mark.slow
@pytest.mark.usefixtures("as_for_a_user")
def test_everything_on_a_local_folder(tmp_path: Path, shared: Path, stories_folder: Path):
    data = shared / "data" / "counterfact" / "counterfact_flat_1919.json"
    verdicts = check_everything(tmp_path, 1, "--model", str(stories_folder), "--data", str(data))
    assert verdicts["fig4"] == "holds"
    assert "does not hold here" in verdicts.values()  # it is a small model, and the report says so


# --- the documentation ----------------------------------------------------------------------------


def test_the_documentation_has_every_experiment():
    """The page's table has the names and titles of the code."""
    rows = re.findall(r"^\| `([^|]*)` \| ([^|]*) \|", section("Experiments"), flags=re.M)
    expected = [("`, `".join(experiment.covers), experiment.title) for experiment in EXPERIMENTS]
    assert rows == expected
    names = [experiment.name for experiment in (*GRADIENTS, *EXPLANATIONS)]
    assert list(documented_verdicts(0)) == list(documented_verdicts(2)) == names


def section(title: str) -> str:
    text = (Path(__file__).parents[2] / "docs" / "reproducing.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def documented_verdicts(column: int) -> dict[str, str]:
    """The verdicts of the page for a model, by experiment."""
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|",
        section("Results"),
        flags=re.M,
    )
    verdict_of = {
        "holds": "holds",
        "with exceptions": "holds with exceptions",
        "**does not hold**": "does not hold here",
        "not measured": "not measured",
    }
    return {name: verdict_of[columns[column]] for name, *columns in rows}
