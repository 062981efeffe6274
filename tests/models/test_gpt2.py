"""The numbers that the authors' demo printed for GPT-2 small.

GPT-2's weights are only on the Hugging Face hub. The comparison itself is tested on the facts
model as well, against a loop over Hugging Face's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import require_kind
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import backward_lens_tl
from backward_lens_tl.errors import ModelNotFoundError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models import host_of
from backward_lens_tl.models.loading import load_facts_model, load_model
from backward_lens_tl.result import BackwardLensResult

FACTS_FOLDER = Path(backward_lens_tl.__file__).parent / "facts_model"
KINDS = ["bridge", "hooked"]

pytestmark = pytest.mark.versions


@dataclass(frozen=True)
class Printed:
    """Printed output of a demo: a row per token, a column per layer."""

    loss: float
    answer: str
    ranks: Sequence[Sequence[int]]
    norms: Sequence[Sequence[float]]


PROMPT, TARGET = "Obama grew up in", " Paris"
GPT2 = Printed(
    loss=7.421401500701904,
    answer=" a",
    ranks=[
        [42090, 50228, 50247, 50251, 50252, 50250, 50252, 50252, 50252, 50253, 50250, 2913],
        [40829, 47609, 48615, 48238, 44731, 50095, 50172, 50085, 50235, 50255, 50244, 2913],
        [47637, 47588, 49012, 47465, 48453, 50023, 50013, 50220, 50236, 50222, 50170, 2913],
        [49593, 50250, 50243, 50255, 50255, 50255, 50256, 50256, 50256, 50256, 50255, 50255],
    ],
    norms=[
        [0.0992, 0.0600, 0.0499, 0.0492, 0.0497, 0.0498, 0.0473, 0.0405, 0.0340, 0.0248, 0.0147, 0],
        [0.1788, 0.1843, 0.1659, 0.1378, 0.1257, 0.1178, 0.0922, 0.0880, 0.0724, 0.0271, 0.0159, 0],
        [0.1332, 0.2126, 0.2134, 0.1803, 0.1530, 0.1311, 0.1189, 0.0933, 0.0581, 0.0317, 0.0221, 0],
        [
            0.1152, 0.1888, 0.2457, 0.2588, 0.2834, 0.2969, 0.3333, 0.3002, 0.2762, 0.2441, 0.2107,
            0.1932,
        ],
    ],
)  # fmt: skip


def analysed(model: nn.Module, prompt: str, target: str) -> BackwardLensResult:
    return backward_lens(
        model, prompt, target, projection="logit_lens", direction="gradient", prepend_bos=False
    )


def compare(model: nn.Module, result: BackwardLensResult, printed: Printed) -> None:
    """Ranks are equal up to ties and rounding, norms to 1e-3, the loss to 1e-4."""
    capture = result.capture
    assert capture.loss.item() == pytest.approx(printed.loss, abs=1e-4)
    assert result.token_texts[int(capture.answers[0])] == printed.answer
    norms = result.norms("W_out")[:, 0].T
    torch.testing.assert_close(norms, torch.tensor(printed.norms), rtol=0, atol=1e-3)
    token = int(capture.targets[0, -1])
    for layer in result.layers:
        scores = host_of(model).unembedding.logits(capture["W_out", layer].vjps[0]).detach()
        # Tolerance between two float32 implementations, relative to the range of the scores.
        near = 1e-4 * (scores.amax(1) - scores.amin(1))
        lowest = (scores > (scores[:, token] + near)[:, None]).sum(1)
        highest = (scores > (scores[:, token] - near)[:, None]).sum(1)
        for position, ranks in enumerate(printed.ranks):
            assert lowest[position] <= ranks[layer] <= highest[position], (layer, position)
            own = result.target_rank("W_out")[layer, 0, position]
            assert lowest[position] <= own <= highest[position]


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_that_the_authors_printed(kind: str) -> None:
    require_kind(kind)
    try:
        model = load_model("gpt2", kind)
    except ModelNotFoundError as error:
        pytest.skip(f"GPT-2 cannot be loaded here: {error}")
    compare(model, analysed(model, PROMPT, TARGET), GPT2)


# --------------------------------------------------------------------------- test of the comparison


FACTS_PROMPT = "Lionel Messi plays for"


def printed_by_a_loop(prompt: str, target: str) -> Printed:
    """What a demo on Hugging Face's model prints, one vector at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(FACTS_FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FACTS_FOLDER)
    kept: list[torch.Tensor] = []
    for block in model.transformer.h:
        block.mlp.c_proj.register_full_backward_hook(lambda module, into, out: kept.append(out[0]))
    [token] = tokenizer(target)["input_ids"]
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    loss = -logits.log_softmax(0)[token]
    loss.backward()
    ranks, norms = [], []
    with torch.no_grad():
        for vjps in zip(*(delta[0] for delta in reversed(kept)), strict=True):
            scores = [model.lm_head(model.transformer.ln_f(delta)) for delta in vjps]
            ranks.append([int((each > each[token]).sum()) for each in scores])
            norms.append([float(delta.norm()) for delta in vjps])
    return Printed(loss.item(), tokenizer.decode(logits.argmax()), ranks, norms)


@pytest.fixture(scope="module")
def printed() -> Printed:
    return printed_by_a_loop(FACTS_PROMPT, TARGET)


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_on_the_facts_model(kind: str, printed: Printed) -> None:
    require_kind(kind)
    model = load_facts_model(kind)
    result = analysed(model, FACTS_PROMPT, TARGET)
    compare(model, result, printed)
    shifted = [[rank + 40 * (rank < 1000) - 40 for rank in row] for row in printed.ranks]
    wrong = (
        Printed(printed.loss + 2e-4, printed.answer, printed.ranks, printed.norms),
        Printed(printed.loss, " Paris", printed.ranks, printed.norms),
        Printed(printed.loss, printed.answer, shifted, printed.norms),
        Printed(printed.loss, printed.answer, printed.ranks, [
            [norm + 2e-3 for norm in row] for row in printed.norms
        ]),
    )  # fmt: skip
    for each in wrong:
        with pytest.raises(AssertionError):
            compare(model, result, each)
