"""Do the directions of a LoRA adapter name the answers that it was taught?

``python -m benchmarks.taught_adapters`` prints the table of docs/editing.md. It teaches the facts
model 20 false facts, and counts their answers among the tokens at both ends of the directions.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import backward_lens_tl as blt
from backward_lens_tl.editing import WeightDelta, delta_tokens

N, RANK, STEPS = 20, 4, 60
_FOLDER = Path(str(files("backward_lens_tl"))) / "facts_model"


@dataclass(frozen=True)
class Lesson:
    """Facts to teach, and answers of no fact among them.

    Attributes:
        prompts: The prompts.
        answers: Their false answers, which all differ and are one token.
        others: As many false answers of other prompts, which are neither taught nor true answers
            of these prompts: training makes the true ones less probable.
    """

    prompts: list[str]
    answers: list[str]
    others: list[str]

    @property
    def shuffled(self) -> list[str]:
        """The same answers for other prompts."""
        return self.answers[7:] + self.answers[:7]


def lesson(seed: int) -> Lesson:
    """Choose facts.

    Args:
        seed: Of the choice.

    Returns:
        The facts.
    """
    records = json.loads((_FOLDER / "records.json").read_text(encoding="utf-8"))
    rewrites = [record["requested_rewrite"] for record in records]
    random.Random(seed).shuffle(rewrites)
    by_answer: dict[str, dict[str, Any]] = {}
    for each in rewrites:
        answer = " " + each["target_new"]["str"]
        if len(_tokens(answer)) == 1:
            by_answer.setdefault(answer, each)
    answers = list(by_answer)[:N]
    taught = [by_answer[answer] for answer in answers]
    true = {" " + each["target_true"]["str"] for each in taught}
    return Lesson(
        prompts=[each["prompt"].replace("{}", each["subject"]) for each in taught],
        answers=answers,
        others=[answer for answer in list(by_answer)[N:] if answer not in true][:N],
    )


def adapter(
    prompts: Sequence[str], answers: Sequence[str], folder: Path, seed: int, steps: int = STEPS
) -> WeightDelta:
    """Train an adapter of all `W_out`.

    Args:
        prompts: The prompts.
        answers: Their answers, one token each.
        folder: Where the adapter is saved.
        seed: Of the factors before training.
        steps: Number of steps; with 0, both factors are random.

    Returns:
        The change of the weights.

    Raises:
        RuntimeError: If the adapted model does not give all answers after training.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
        init_lora_weights=steps > 0,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(_FOLDER), config)
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=5e-3, weight_decay=0
    )
    rows = [_tokens(prompt) for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    mask = (torch.arange(length) <= last[:, None]).long()
    wanted = torch.tensor([_tokens(answer)[0] for answer in answers])
    for _ in range(steps):
        logits = model(ids, attention_mask=mask).logits[torch.arange(len(rows)), last]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        optimizer.step()
    if steps:
        with torch.no_grad():
            logits = model.eval()(ids, attention_mask=mask).logits
        n_right = int((logits[torch.arange(len(rows)), last].argmax(-1) == wanted).sum())
        if n_right < len(rows):
            raise RuntimeError(f"the adapter gives {n_right} of {len(rows)} answers: more steps")
    model.save_pretrained(str(folder))
    return WeightDelta.from_lora(folder)


def named(model: nn.Module, delta: WeightDelta, texts: Sequence[str], k: int = 5) -> int:
    """Count texts among the top tokens at both ends of all directions.

    The sign of a singular vector is a convention, so neither end is preferred.

    Args:
        model: The facts model.
        delta: The adapter's change.
        texts: Tokens to look for.
        k: Number of tokens at either end.

    Returns:
        Their number.
    """
    table = delta_tokens(
        model, delta, k=k, components="singular", projection="normalized", most=None
    )
    ends = [*table["top_tokens"], *table["bottom_tokens"]]
    return len(set(texts) & {token for end in ends for token in end})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the counts.

    Args:
        arguments: Command-line arguments; `None` for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("-k", type=int, default=5, help="number of tokens at either end")
    options = parser.parse_args(arguments)
    model = blt.load_facts_model()
    for seed in range(options.seeds):
        facts = lesson(seed)
        taught = {"these": facts.answers, "shuffled": facts.shuffled, "others": facts.others}
        with tempfile.TemporaryDirectory() as folder:
            deltas = {
                name: adapter(facts.prompts, texts, Path(folder) / name, seed)
                for name, texts in taught.items()
            }
            deltas["untrained"] = adapter(
                facts.prompts, facts.answers, Path(folder) / "untrained", seed, steps=0
            )
        for name, delta in deltas.items():
            these, others = (
                named(model, delta, texts, options.k) for texts in (facts.answers, facts.others)
            )
            sys.stdout.write(f"seed {seed}, {name}: {these} of these answers, {others} others\n")


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(_FOLDER)


def _tokens(text: str) -> list[int]:
    found: list[int] = _tokenizer()(text).input_ids
    return found


if __name__ == "__main__":
    main()
