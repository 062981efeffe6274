"""The most similar examples against a sort of dense inner products, and against real steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from architecture_table import find_weight, loss
from dense_gradients import dense
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.analysis import most_similar
from backward_lens_tl.errors import InputError

PROMPTS = [
    *("The capital of France is", "Obama grew up in", "Lionel Messi plays for"),
    *("The capital of Italy is", "Rome is the capital of", "Boeing was set up in"),
]
TARGETS = [" Paris", " Hawaii", " Barcelona", " Rome", " Italy", " Seattle"]


@pytest.fixture(scope="module")
def examples(facts_model: Any) -> Any:
    return blt.backward_lens(facts_model, PROMPTS, TARGETS)


@pytest.fixture(scope="module")
def queries(facts_model: Any) -> Any:
    return blt.backward_lens(facts_model, ["The capital of Spain is", "Ferrari is in"], " Milan")


def vectors(result: Any) -> Tensor:
    """The gradient of all matrices of each prompt as one long vector."""
    return torch.stack(
        [
            torch.cat([each.dense(batch).double().flatten() for each in result.capture])
            for batch in range(len(result.capture.mask))
        ]
    )


@pytest.mark.parametrize("of", ["cosine", "inner"])
@pytest.mark.parametrize("k", [2, 50])
def test_against_a_sort_of_dense_products(examples: Any, queries: Any, of: Any, k: int) -> None:
    found = most_similar(examples, queries, k, of=of)
    here, there = vectors(examples), vectors(queries)
    inner = here @ there.T
    cosine = inner / here.norm(dim=1)[:, None] / there.norm(dim=1)
    scores = cosine if of == "cosine" else inner
    for query in range(2):
        rows = found[found["query"] == query]
        order = scores[:, query].argsort(descending=True).tolist()
        helping = [each for each in order if inner[each, query] > 0][:k]
        hurting = [each for each in order if inner[each, query] < 0][-k:]
        assert rows["prompt"].tolist() == helping + hurting
        assert rows["text"].tolist() == [PROMPTS[each] for each in helping + hurting]
        assert rows["target"].tolist() == [TARGETS[each] for each in helping + hurting]
        effects = ["lowers the loss"] * len(helping) + ["raises the loss"] * len(hurting)
        assert rows["effect"].tolist() == effects
        for column, expected in (("cosine", cosine), ("inner", inner)):
            wanted = expected[helping + hurting, query].tolist()
            assert rows[column].tolist() == pytest.approx(wanted, rel=1e-4)


def test_both_effects_occur_and_the_orders_differ(examples: Any, queries: Any) -> None:
    """Otherwise the test above would prove less."""
    by_cosine, by_inner = (most_similar(examples, queries, of=of) for of in ("cosine", "inner"))
    assert by_cosine["effect"].nunique() == 2
    assert by_cosine["prompt"].tolist() != by_inner["prompt"].tolist()


def test_a_step_on_an_example_has_its_effect() -> None:
    """A real step on all weights, small enough for the first order."""
    case = dense("gpt2", "hooked")
    tensors = [find_weight(case.model, "gpt2", *key).tensors[0] for key in case.gradients]
    table = most_similar(case.capture, k=9)
    assert len(table) == 6
    for row in table.itertuples():
        tokens = case.capture.tokens[row.query, case.capture.mask[row.query]][None]
        step = [1e-4 * each[row.prompt] for each in case.gradients.values()]
        with torch.no_grad():
            before = float(loss(case.model(tokens), tokens))
            for tensor, change in zip(tensors, step, strict=True):
                tensor -= change
            after = float(loss(case.model(tokens), tokens))
            for tensor, change in zip(tensors, step, strict=True):
                tensor += change
        assert row.effect == ("lowers the loss" if after < before else "raises the loss")
        assert after - before == pytest.approx(-1e-4 * row.inner, rel=0.05)


def test_examples_among_themselves(examples: Any) -> None:
    found = most_similar(examples, k=50)
    assert (found["query"] != found["prompt"]).all()
    assert found["query"].value_counts().tolist() == [len(PROMPTS) - 1] * len(PROMPTS)
    with_itself = most_similar(examples, examples, k=1)
    helping = with_itself[with_itself["effect"] == "lowers the loss"]
    assert (helping["query"] == helping["prompt"]).all()


def test_gradients_of_zero_are_left_out() -> None:
    capture = dense("gpt2", "hooked").capture
    silent = {}
    for key, each in capture.gradients.items():
        vjps = each.vjps.clone()
        vjps[1] = 0
        silent[key] = replace(each, vjps=vjps)
    one_silent = replace(capture, gradients=silent)
    found = most_similar(one_silent, k=9)
    assert sorted(zip(found["query"], found["prompt"], strict=True)) == [(0, 2), (2, 0)]
    alone = blt.capture_gradients(
        dense("gpt2", "hooked").model, "Rome", blt.next_token_loss(), matrices="all"
    )
    assert most_similar(alone).empty
    assert list(most_similar(alone).columns) == list(found.columns)


def test_examples_without_a_target() -> None:
    capture = dense("gpt2", "hooked").capture
    assert capture.target_texts is None
    assert most_similar(capture)["target"].isna().all()


@pytest.mark.usefixtures("as_for_a_user")
def test_arguments_that_are_not_usable(examples: Any, facts_model: Any) -> None:
    one = blt.backward_lens(facts_model, "Rome is in", " Paris", matrices="W_out")
    refused: list[tuple[str, dict[str, Any]]] = [
        ("k is 0", {"k": 0}),
        ("of is 'norm'; allowed: 'cosine', 'inner'", {"of": "norm"}),
        ("queries is a str; pass what capture_gradients", {"queries": "Rome"}),
        ("W_in of layer 0 is only in this capture", {"queries": one}),
    ]
    for message, options in refused:
        with pytest.raises(InputError, match=message):
            most_similar(examples, **options)
    with pytest.raises(InputError, match="examples is a dict"):
        most_similar({})
