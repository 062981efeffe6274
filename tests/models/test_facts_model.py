"""The shipped model has the recall stated in its card, measured from the shipped files only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import backward_lens_tl
from backward_lens_tl import backward_lens

FACTS_FOLDER = Path(backward_lens_tl.__file__).parent / "facts_model"
BOS = "<|endoftext|>"


def shipped(name: str) -> Any:
    return json.loads((FACTS_FOLDER / name).read_text(encoding="utf-8"))


FACTS = shipped("facts.json")
RECORDS = shipped("records.json")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FACTS_FOLDER)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The model, loaded with Hugging Face only."""
    return AutoModelForCausalLM.from_pretrained(FACTS_FOLDER)


def prompts(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Prompts with their answers, trained or held out."""
    for fact in FACTS["facts"]:
        phrasings = FACTS["relations"][fact["relation"]]
        if held_out:
            shown = phrasings["half"] if fact["held_out"] else []
        else:
            shown = phrasings["trained"] + ([] if fact["held_out"] else phrasings["half"])
        for phrasing in shown:
            yield phrasing.format(fact["subject"]), f" {fact['answer']}"


def recall(plain: Any, pairs: list[tuple[str, str]], tokenizer: Any, front: str) -> float:
    """Fraction of prompts whose answer is the most probable next token."""
    rows = [(tokenizer(front + prompt)["input_ids"], answer) for prompt, answer in pairs]
    rows.sort(key=lambda row: len(row[0]))
    right = 0
    with torch.no_grad():
        for length in sorted({len(ids) for ids, _ in rows}):
            group = [row for row in rows if len(row[0]) == length]
            logits = plain(torch.tensor([ids for ids, _ in group])).logits[:, -1]
            said = tokenizer.batch_decode(logits.argmax(-1)[:, None])
            right += sum(word == answer for word, (_, answer) in zip(said, group, strict=True))
    return right / len(rows)


def test_size_of_the_facts():
    assert len({(fact["subject"], fact["relation"]) for fact in FACTS["facts"]}) >= 1000
    assert len(FACTS["relations"]) >= 12
    for relation in FACTS["relations"].values():
        phrasings = [*relation["trained"], *relation["half"]]
        assert len(relation["trained"]) >= 6
        assert len(relation["half"]) == 2
        assert len(set(phrasings)) == len(phrasings)


def test_half_of_the_subjects_of_each_relation_are_held_out():
    for name in FACTS["relations"]:
        held_out = [fact["held_out"] for fact in FACTS["facts"] if fact["relation"] == name]
        assert abs(sum(held_out) - len(held_out) / 2) <= 1


def test_answers_are_single_tokens_and_most_subjects_are_not(tokenizer: Any):
    answers = {f" {fact['answer']}" for fact in FACTS["facts"]}
    subjects = {fact["subject"] for fact in FACTS["facts"]}
    lengths = {text: len(tokenizer(text)["input_ids"]) for text in answers | subjects}
    assert {lengths[answer] for answer in answers} == {1}
    assert " Paris" in answers
    assert sum(lengths[subject] > 1 for subject in subjects) > 0.8 * len(subjects)


@pytest.mark.parametrize("front", [BOS, ""], ids=["bos", "no bos"])
def test_recall_of_trained_prompts(plain: Any, tokenizer: Any, front: str):
    assert recall(plain, list(prompts(held_out=False))[::24], tokenizer, front) >= 0.95


@pytest.mark.parametrize("front", [BOS, ""], ids=["bos", "no bos"])
def test_recall_of_held_out_paraphrases(plain: Any, tokenizer: Any, front: str):
    assert recall(plain, list(prompts(held_out=True))[::5], tokenizer, front) >= 0.75


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Lionel Messi plays for", " Miami"),
        ("Obama grew up in", " Hawaii"),
        ("Jack Dorsey founded", " Twitter"),
    ],
)
def test_the_examples_of_the_paper(plain: Any, tokenizer: Any, prompt: str, answer: str):
    assert recall(plain, [(prompt, answer)], tokenizer, BOS) == 1


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_an_update_promotes_the_target_in_at_least_half_of_the_layers(
    facts_model: Any, prepend_bos: bool
):
    result = backward_lens(
        facts_model, "Lionel Messi plays for", " Paris", matrices="W_out", prepend_bos=prepend_bos
    )
    leads = [result.top_tokens("W_out", layer, -1, 1) == [" Paris"] for layer in result.layers]
    assert sum(leads) >= len(leads) / 2


def test_records_have_the_schema_of_counterfact():
    truth = {(fact["relation"], fact["subject"]): fact["answer"] for fact in FACTS["facts"]}
    assert len(RECORDS) >= 500
    assert [record["case_id"] for record in RECORDS] == list(range(len(RECORDS)))
    for record in RECORDS:
        rewrite = record["requested_rewrite"]
        relation, subject = rewrite["relation_id"], rewrite["subject"]
        assert rewrite["prompt"].count("{}") == 1
        assert rewrite["target_true"]["str"] == truth[relation, subject]
        assert rewrite["target_new"]["str"] != rewrite["target_true"]["str"]
        assert len(record["paraphrase_prompts"]) == 2
        assert all(subject in prompt for prompt in record["paraphrase_prompts"])
        assert record["generation_prompts"]
        neighbours = {
            other
            for (kind, other), answer in truth.items()
            if kind == relation and answer == rewrite["target_true"]["str"] and other != subject
        }
        for prompt in record["neighborhood_prompts"]:
            assert any(other in prompt for other in neighbours), prompt
