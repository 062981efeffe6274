"""The comparison of readings, against the result's own tables and a loop over full scores."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median, pstdev
from typing import Any

import pytest
import torch

import backward_lens_tl as blt
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.smollm2 import find_smollm2
from backward_lens_tl.sweeps.plan import Item, plan_shards
from benchmarks import readings
from benchmarks.readings import as_markdown, compare_readings

N, SEED = 3, 4


@pytest.fixture(scope="module")
def items(facts_model: Any) -> list[Item]:
    config = blt.SweepConfig(prompts=N, seed=SEED, multi_token="first")
    shards = plan_shards(host_of(facts_model), read_records("facts"), config)
    return [item for shard in shards for item in shard if isinstance(item, Item)]


@pytest.fixture(scope="module")
def table(facts_model: Any) -> Any:
    found = compare_readings(facts_model, read_records("facts"), N, SEED)
    return found.set_index(["reading", "matrix"])


def share_of_ten(leaders: list[str]) -> float:
    return sum(count for _, count in Counter(leaders).most_common(10)) / len(leaders)


@pytest.mark.parametrize(
    ("reading", "projection"), [("logit lens", "normalized"), ("cosine", "cosine")]
)
def test_both_lenses_against_the_results_own_table(
    facts_model: Any, table: Any, items: list[Item], reading: str, projection: Any
) -> None:
    cells = []
    for item in items:
        result = blt.backward_lens(
            facts_model, item.record.prompt, item.target, projection=projection, k=1
        )
        own = result.to_df()
        own["is_last"] = own["position"] == own["position"].max()
        cells += own[~own["is_zero"]].to_dict("records")
    for matrix in ("W_in", "W_out"):
        here = [cell for cell in cells if cell["matrix"] == matrix]
        last = [cell for cell in here if cell["is_last"]]
        leaders = [cell["top_tokens"][0] for cell in here]
        row = table.loc[(reading, matrix)]
        assert row["cells"] == len(here)
        assert row["leaders"] == len(set(leaders))
        assert row["share_of_ten"] == pytest.approx(share_of_ten(leaders))
        assert row["target_leads"] == pytest.approx(
            sum(cell["target_rank"] == 0 for cell in last) / len(last)
        )
        for quarter in range(4):
            ranks = [c["target_rank"] for c in last if c["layer"] * 4 // 8 == quarter]
            assert row[f"rank_{quarter + 1}"] == median(ranks)


def full_scores(model: Any, item: Item) -> dict[tuple[str, int, int], list[float]]:
    """All scores of the normalized lens, of every vector of `W_out` and `W_in` that is not zero."""
    objective = blt.target_nll(item.target)
    capture = blt.capture_gradients(model, item.record.prompt, objective)
    found = {}
    for gradient in capture:
        sign = -1 if gradient.matrix == "W_out" else 1
        for position, vector in enumerate(gradient.spanning_set[0]):
            if bool(vector.any()) and bool(gradient.inputs[0, position].any()):
                if not bool(gradient.vjps[0, position].any()):
                    continue
                read = blt.read_vectors(
                    model, sign * vector, projection="normalized", k=model.cfg.d_vocab
                )
                scores = torch.empty(model.cfg.d_vocab).scatter(0, read.top_ids, read.top_scores)
                found[gradient.matrix, gradient.layer, position] = scores.tolist()
    return found


def test_means_and_deviations_against_a_loop(
    facts_model: Any, table: Any, items: list[Item]
) -> None:
    by_prompt = [full_scores(facts_model, item) for item in items]
    leaders: dict[str, list[int]] = {"own": [], "mean": [], "standardized": []}
    columns = [list(zip(*scores.values(), strict=True)) for scores in by_prompt]
    means = [[sum(column) / len(column) for column in own] for own in columns]
    for index, scores in enumerate(by_prompt):
        half = [by for at, by in enumerate(columns) if at % 2 != index % 2]
        others = [[value for own in half for value in own[t]] for t in range(len(columns[0]))]
        mean = [sum(values) / len(values) for values in others]
        deviation = [pstdev(values) for values in others]
        for (matrix, _, _), row in scores.items():
            if matrix == "W_out":
                centered = [value - each for value, each in zip(row, mean, strict=True)]
                own = [value - each for value, each in zip(row, means[index], strict=True)]
                scaled = [value / each for value, each in zip(centered, deviation, strict=True)]
                for name, found in (("own", own), ("mean", centered), ("standardized", scaled)):
                    leaders[name].append(found.index(max(found)))
    for name, reading in (
        ("own", "minus the mean over the prompt's own vectors"),
        ("mean", "minus the mean over other prompts"),
        ("standardized", "the same, divided by the standard deviation"),
    ):
        row = table.loc[(reading, "W_out")]
        assert row["leaders"] == len(set(leaders[name]))
        assert row["share_of_ten"] == pytest.approx(share_of_ten(list(map(str, leaders[name]))))


def test_one_prompt_has_no_others(facts_model: Any) -> None:
    with pytest.raises(InputError, match="1 prompts can be analysed; pass at least two"):
        compare_readings(facts_model, read_records("facts"), 1)


def test_the_table_in_the_docs_is_the_measured_one() -> None:
    docs = Path(__file__).parents[1] / "docs"
    held = json.loads((docs / "looking" / "readings.json").read_text(encoding="utf-8"))
    assert held["prompts"] == 100
    assert as_markdown(held["rows"]) in (docs / "looking.md").read_text(encoding="utf-8")


@pytest.mark.real
@pytest.mark.slow
def test_the_leaders_that_the_docs_name_have_long_columns() -> None:
    if find_smollm2() is None:
        pytest.skip("SmolLM2 is not installed: make real-model")
    docs = Path(__file__).parents[1] / "docs"
    rows = json.loads((docs / "looking" / "readings.json").read_text(encoding="utf-8"))["rows"]
    [leaders] = [
        row["most_frequent"][:3]
        for row in rows
        if (row["reading"], row["matrix"]) == ("logit lens", "W_out")
    ]
    first, second, third = (f'"{token}"' for token in leaders)
    assert f"{first}, {second} and {third} for `W_out`" in (docs / "looking.md").read_text("utf-8")
    host = host_of(blt.load_model("smollm2"))
    longest = host.model.W_U.norm(dim=0).topk(4).indices.tolist()
    assert set(leaders) < set(host.vocabulary.texts(longest))


def test_the_command_writes_what_it_measures(tmp_path: Path, capsys: Any) -> None:
    readings.main(["--model", "facts", "--prompts", "2", "--out", str(tmp_path)])
    held = json.loads((tmp_path / "readings.json").read_text(encoding="utf-8"))
    assert held["model"] == "facts"
    assert len(held["rows"]) == 10
    assert as_markdown(held["rows"]) in capsys.readouterr().out
