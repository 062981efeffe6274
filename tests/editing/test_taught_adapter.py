"""Twenty facts taught to the facts model with LoRA: do the directions of `W_out` name the answers?

`docs/editing.md` has the numbers of three seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backward_lens_tl.editing import EditRequest, ForwardPassShift
from benchmarks.taught_adapters import STEPS, N, adapter, lesson, named
from conftest import FACTS_FOLDER

SEED = 0


@pytest.mark.parametrize("seed", range(3))
def test_the_others_are_neither_taught_nor_true(seed: int) -> None:
    facts = lesson(seed)
    assert len(set(facts.prompts)) == len(set(facts.answers)) == len(set(facts.others)) == N
    assert sorted(facts.shuffled) == sorted(facts.answers)
    assert all(map(str.__ne__, facts.shuffled, facts.answers))
    records = json.loads((FACTS_FOLDER / "records.json").read_text(encoding="utf-8"))
    rewrites = [record["requested_rewrite"] for record in records]
    true = {
        " " + each["target_true"]["str"]
        for each in rewrites
        if each["prompt"].replace("{}", each["subject"]) in facts.prompts
    }
    assert true
    assert not set(facts.others) & (true | set(facts.answers))


def test_both_ends_of_a_direction_count(facts_model: Any) -> None:
    """The shift writes the embedding of its target; with the other sign, it is at the other end."""
    shift = ForwardPassShift(layer=6, size=20.0, key="plain")
    delta = shift(facts_model, EditRequest("Lionel Messi plays for", " Paris"))
    for sign in (1, -1):
        assert named(facts_model, delta.scale(sign), [" Paris", " Rome"], k=1) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_directions_name_what_was_taught(facts_model: Any, tmp_path: Path) -> None:
    """Controls: an adapter that was taught other answers, and a random one."""
    facts = lesson(SEED)
    own = adapter(facts.prompts, facts.answers, tmp_path / "own", SEED)
    other = adapter(facts.prompts, facts.others, tmp_path / "other", SEED)
    untrained = adapter(facts.prompts, facts.answers, tmp_path / "untrained", SEED, steps=0)
    assert STEPS == 60
    assert named(facts_model, own, facts.answers) >= 16
    assert named(facts_model, other, facts.others) >= 16
    assert named(facts_model, own, facts.others) <= 13
    assert named(facts_model, other, facts.answers) <= 13
    assert named(facts_model, untrained, facts.answers) <= 10
