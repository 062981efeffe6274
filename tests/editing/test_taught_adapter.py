"""Twenty facts taught to the facts model with LoRA: do the directions of `W_out` name the answers?

`docs/editing.md` has the numbers of three seeds.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from backward_lens_tl.editing import WeightDelta, delta_tokens
from conftest import FACTS_FOLDER

N, RANK, STEPS, SEED = 20, 4, 60, 0

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def taught() -> tuple[list[str], list[str], list[str]]:
    """Prompts, false answers of one token that all differ, and as many other answers."""
    records = json.loads((FACTS_FOLDER / "records.json").read_text(encoding="utf-8"))
    rewrites = [record["requested_rewrite"] for record in records]
    generator = random.Random(SEED)
    generator.shuffle(rewrites)
    by_answer: dict[str, str] = {}
    for each in rewrites:
        answer = " " + each["target_new"]["str"]
        if len(by_answer) < N and is_one_token(answer):
            by_answer.setdefault(answer, each["prompt"].replace("{}", each["subject"]))
    others = {" " + each["target_true"]["str"] for each in rewrites} - by_answer.keys()
    others = sorted(filter(is_one_token, others))
    return list(by_answer.values()), list(by_answer), generator.sample(others, N)


def is_one_token(text: str) -> bool:
    return len(tokens(text)) == 1


def tokens(text: str) -> list[int]:
    found: list[int] = tokenizer()(text).input_ids
    return found


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FACTS_FOLDER)


def adapter(prompts: list[str], answers: list[str], folder: Path, steps: int) -> WeightDelta:
    """Train an adapter of all `W_out` until it gives all answers; without steps, a random one."""
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
        init_lora_weights=steps > 0,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(FACTS_FOLDER), config)
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=5e-3, weight_decay=0
    )
    rows = [tokens(prompt) for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    mask = (torch.arange(length) <= last[:, None]).long()
    wanted = torch.tensor([tokens(answer)[0] for answer in answers])
    for _ in range(steps):
        logits = model(ids, attention_mask=mask).logits[torch.arange(N), last]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        optimizer.step()
    if steps:
        with torch.no_grad():
            logits = model.eval()(ids, attention_mask=mask).logits[torch.arange(N), last]
        assert torch.equal(logits.argmax(-1), wanted)
    model.save_pretrained(folder)
    return WeightDelta.from_lora(folder)


def named(model: Any, delta: WeightDelta, answers: list[str]) -> int:
    """How many answers are among the top 10 tokens of any direction."""
    table = delta_tokens(
        model, delta, k=10, components="singular", projection="normalized", most=None
    )
    assert len(table) == 8 * RANK
    return len(set(answers) & {token for row in table["top_tokens"] for token in row})


def test_directions_name_what_was_taught(facts_model: Any, taught: Any, tmp_path: Path) -> None:
    """Controls: an adapter that was taught other answers, and a random one."""
    prompts, answers, others = taught
    own = adapter(prompts, answers, tmp_path / "own", STEPS)
    other = adapter(prompts, others, tmp_path / "other", STEPS)
    untrained = adapter(prompts, answers, tmp_path / "untrained", 0)
    assert named(facts_model, own, answers) >= 16
    assert named(facts_model, other, others) >= 16
    assert named(facts_model, other, answers) <= 11
    assert named(facts_model, untrained, answers) <= 11
