"""Recall of the shipped model, in trained and in held-out phrasings.

Reads only the shipped folder, so the numbers are those of the installed model. Run with
``python -m facts_model.evaluate``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SHIPPED = Path(__file__).parent.parent / "backward_lens_tl" / "facts_model"
BATCH = 256
DISTRACTOR_SEED = 0
SAMPLE_PROMPTS = ("Lionel Messi plays for", "On Monday, Anna", "The capital of France is")


@dataclass(frozen=True)
class Shipped:
    """The shipped folder, loaded.

    Attributes:
        model: The model in evaluation mode.
        tokenizer: Its tokenizer.
        relations: For each relation its "trained" and "half" phrasings.
        facts: Entries with "relation", "subject", "answer" and "held_out".
        ordinary: Held-out ordinary sentences.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    relations: dict[str, dict[str, Any]]
    facts: list[dict[str, Any]]
    ordinary: list[str]


@dataclass(frozen=True)
class Prompt:
    """A question for the model.

    Attributes:
        text: The prompt, ending right before the answer.
        answer: The true answer, without its leading space.
        relation: Name of the relation.
    """

    text: str
    answer: str
    relation: str


@dataclass(frozen=True)
class Score:
    """The number of prompts whose true answer is the most probable next token.

    Attributes:
        right: Number of prompts answered correctly.
        total: Number of prompts.
    """

    right: int
    total: int

    def __str__(self) -> str:
        """Percentage with one decimal, and the counts."""
        return f"{100 * self.right / self.total:.1f} % ({self.right}/{self.total})"


@dataclass(frozen=True)
class Report:
    """All numbers of one evaluation.

    Attributes:
        recall: Scores by (row of the table, "with BOS" or "without BOS").
        by_relation: For each relation its scores on trained and on held-out prompts, without BOS.
        perplexity: Per token, on held-out ordinary sentences.
        samples: Greedy continuations.
    """

    recall: dict[tuple[str, str], Score]
    by_relation: dict[str, tuple[Score, Score]]
    perplexity: float
    samples: list[str]

    def recall_table(self) -> str:
        """Render recall in Markdown."""
        rows = dict.fromkeys(row for row, _ in self.recall)
        lines = ["| prompts | with BOS | without BOS |", "|---|---|---|"]
        lines += [
            f"| {row} | {self.recall[row, 'with BOS']} | {self.recall[row, 'without BOS']} |"
            for row in rows
        ]
        return "\n".join(lines)

    def relation_table(self) -> str:
        """Render recall by relation in Markdown."""
        lines = ["| relation | trained prompts | held-out paraphrases |", "|---|---|---|"]
        lines += [f"| {name} | {t} | {h} |" for name, (t, h) in self.by_relation.items()]
        return "\n".join(lines)


def load_shipped(folder: Path) -> Shipped:
    """Load the shipped folder.

    Args:
        folder: The folder that ``facts_model.train`` wrote.

    Returns:
        Its contents.
    """
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return Shipped(
        model=AutoModelForCausalLM.from_pretrained(folder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        relations=facts["relations"],
        facts=facts["facts"],
        ordinary=facts["ordinary_held_out"],
    )


def trained_prompts(shipped: Shipped) -> list[Prompt]:
    """List the prompts of all facts in their trained phrasings.

    Args:
        shipped: The shipped folder.

    Returns:
        The prompts.
    """
    prompts = []
    for fact in shipped.facts:
        relation = shipped.relations[fact["relation"]]
        templates = relation["trained"] + ([] if fact["held_out"] else relation["half"])
        prompts += _fill(fact, templates)
    return prompts


def held_out_prompts(shipped: Shipped) -> list[Prompt]:
    """List the paraphrases that were held out for their subject.

    Args:
        shipped: The shipped folder.

    Returns:
        The prompts.
    """
    prompts = []
    for fact in shipped.facts:
        if fact["held_out"]:
            prompts += _fill(fact, shipped.relations[fact["relation"]]["half"])
    return prompts


def _fill(fact: dict[str, Any], templates: Iterable[str]) -> list[Prompt]:
    """Fill a fact's subject into templates."""
    return [
        Prompt(template.replace("{}", fact["subject"]), fact["answer"], fact["relation"])
        for template in templates
    ]


def with_distractors(prompts: list[Prompt], sentences: list[str]) -> list[Prompt]:
    """Prepend a random sentence to every prompt.

    Args:
        prompts: The prompts.
        sentences: Sentences to draw from.

    Returns:
        The longer prompts, in the same order.
    """
    rng = random.Random(DISTRACTOR_SEED)
    return [Prompt(f"{rng.choice(sentences)} {p.text}", p.answer, p.relation) for p in prompts]


@torch.no_grad()
def answered(shipped: Shipped, prompts: list[Prompt], *, bos: bool) -> list[bool]:
    """Answer prompts with the model.

    Args:
        shipped: The shipped folder.
        prompts: The prompts.
        bos: Whether to prepend the end-of-text token.

    Returns:
        For each prompt, whether the true answer is the most probable next token.
    """
    start = [shipped.tokenizer.bos_token_id] if bos else []
    encoded = shipped.tokenizer([prompt.text for prompt in prompts])["input_ids"]
    answers = shipped.tokenizer([f" {prompt.answer}" for prompt in prompts])["input_ids"]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    right = [False] * len(prompts)
    # Batches of equal length need no padding.
    for indices in by_length.values():
        for offset in range(0, len(indices), BATCH):
            chunk = indices[offset : offset + BATCH]
            tokens = torch.tensor([start + encoded[index] for index in chunk])
            best = shipped.model(tokens, logits_to_keep=1).logits[:, -1].argmax(-1)
            for index, token in zip(chunk, best.tolist(), strict=True):
                right[index] = [token] == answers[index]
    return right


@torch.no_grad()
def perplexity(shipped: Shipped) -> float:
    """Measure perplexity on held-out ordinary sentences.

    Args:
        shipped: The shipped folder.

    Returns:
        Exponential of the mean loss per token (natural logarithm), each sentence after a BOS.
    """
    loss, count = 0.0, 0
    for sentence in shipped.ordinary:
        ids = [shipped.tokenizer.bos_token_id, *shipped.tokenizer(sentence)["input_ids"]]
        tokens = torch.tensor([ids])
        loss += shipped.model(tokens, labels=tokens).loss.item() * (len(ids) - 1)
        count += len(ids) - 1
    return math.exp(loss / count)


def greedy(shipped: Shipped, prompt: str, new_tokens: int = 30) -> str:
    """Continue a prompt greedily.

    Args:
        shipped: The shipped folder.
        prompt: The beginning of the text.
        new_tokens: Largest number of tokens to add.

    Returns:
        The prompt and its continuation.
    """
    tokens = shipped.tokenizer(prompt, return_tensors="pt")
    out = shipped.model.generate(
        **tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=shipped.tokenizer.eos_token_id,
    )
    return shipped.tokenizer.decode(out[0], skip_special_tokens=True)


def evaluate(shipped: Shipped) -> Report:
    """Evaluate the model.

    Args:
        shipped: The shipped folder.

    Returns:
        All numbers.
    """
    trained, held_out = trained_prompts(shipped), held_out_prompts(shipped)
    rows = {
        "trained": trained,
        "held-out paraphrases": held_out,
        "trained, sentence in front": with_distractors(trained, shipped.ordinary),
        "held-out, sentence in front": with_distractors(held_out, shipped.ordinary),
    }
    recall: dict[tuple[str, str], Score] = {}
    tallies: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row, prompts in rows.items():
        for bos, column in ((True, "with BOS"), (False, "without BOS")):
            right = answered(shipped, prompts, bos=bos)
            recall[row, column] = _score(right)
            if not bos:
                for prompt, ok in zip(prompts, right, strict=True):
                    tallies[prompt.relation][row].append(ok)
    return Report(
        recall=recall,
        by_relation={
            name: (_score(tally["trained"]), _score(tally["held-out paraphrases"]))
            for name, tally in tallies.items()
        },
        perplexity=perplexity(shipped),
        samples=[greedy(shipped, prompt) for prompt in SAMPLE_PROMPTS],
    )


def _score(right: list[bool]) -> Score:
    return Score(sum(right), len(right))


def main() -> None:
    """Evaluate a shipped folder and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=SHIPPED)
    report = evaluate(load_shipped(parser.parse_args().folder))
    print(report.recall_table(), "\n")
    print(report.relation_table(), "\n")
    print(f"perplexity of held-out ordinary sentences: {report.perplexity:.2f}\n")
    print("\n".join(report.samples))


if __name__ == "__main__":
    main()
