"""What an edit does to other prompts and to texts, against slow computations in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Case, small_tokenizer
from test_evaluation import ROWS, Nudge, small_config

from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.outcomes import EditOutcome, EditReport
from backward_lens_tl.evaluation import text_scores
from backward_lens_tl.evaluation.divergence import kl_divergence
from backward_lens_tl.evaluation.run import Evaluation, evaluate

TEXTS = ("The capital of France is Paris.", "Rome is in Italy.", "Messi plays the ball.")


@dataclass(frozen=True)
class Reporting(Nudge):
    """Say that the first target is reached, and others are not."""

    def reported(self, host: Any, requests: Sequence[Any]) -> tuple[list[MatrixDelta], EditReport]:
        outcomes = tuple(
            EditOutcome(each.request.prompt, each.request.target, (1.0,), 0.0, 0, 0.5, at == 0)
            for at, each in enumerate(requests)
        )
        return self.compute(host, requests), EditReport(outcomes, 4, 1, contrast_prompts=16)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    file = tmp_path / "texts.raw"
    file.write_text("\n".join(TEXTS) + "\n")
    return str(file)


def evaluated(case: Case, folder: Path, texts: str, methods: Any, **given: Any) -> Evaluation:
    config = small_config(texts, records=2, **given)
    return evaluate(case.model, ROWS, folder, methods, config, progress=False)


def slow_kl(before: Sequence[float], after: Sequence[float]) -> float:
    """The divergence of two lists of logits, term by term."""
    sums = [math.fsum(math.exp(value) for value in values) for values in (before, after)]
    p, q = (
        [math.exp(value) / total for value in values]
        for values, total in zip((before, after), sums, strict=True)
    )
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def logits_of(case: Case, ids: list[int]) -> Any:
    with torch.no_grad():
        return case.logits(torch.tensor([ids]))[0].double()


def reference(case: Case, texts: Sequence[list[int]], added: Any) -> list[tuple[Any, Any]]:
    """Logits of each text, before and after a weight is really changed."""
    weight = case.weights["W_out", 1]
    kept = weight.tensor.detach().clone()
    before = [logits_of(case, ids) for ids in texts]
    try:
        with torch.no_grad():
            weight.tensor.add_(weight.in_out(added))
        after = [logits_of(case, ids) for ids in texts]
    finally:
        with torch.no_grad():
            weight.tensor.copy_(kept)
    return list(zip(before, after, strict=True))


def nudge_of(case: Case, row: Any, size: float) -> Any:
    """What `Nudge` adds to `W_out`."""
    ids = small_tokenizer().encode(row["prompt"])
    target = small_tokenizer().encode(row["target"])[0]
    key = torch.randn(52, generator=torch.Generator().manual_seed(sum(ids)), dtype=torch.float64)
    return torch.outer(size * key / key.norm(), case.model.W_U[:, target].detach())


@pytest.mark.usefixtures("as_for_a_user")
def test_neighbors_and_texts_against_a_changed_model(
    gpt2: Case, tmp_path: Path, texts: str
) -> None:
    encode = small_tokenizer().encode
    found = evaluated(gpt2, tmp_path / "out", texts, {"n": Nudge(size=60.0)})
    prompts = found.prompts().query("method == 'n' and kind == 'neighborhood'")
    edits = found.edits().query("method == 'n'")
    read = [encode(text) for text in TEXTS]
    kept = []
    for record, row in enumerate(ROWS[:2]):
        added = nudge_of(gpt2, row, 60.0)
        asked = [encode(text) for text in row["neighborhood_prompts"]]
        pairs = [
            (before[-1].tolist(), after[-1].tolist())
            for before, after in reference(gpt2, asked, added)
        ]
        own = prompts[prompts["record"] == record]
        divergences = [slow_kl(*pair) for pair in pairs]
        assert min(divergences) > 1e-3
        assert own["kl"].tolist() == pytest.approx(divergences, rel=1e-9)
        same = [max(pair[0]) == pair[0][pair[1].index(max(pair[1]))] for pair in pairs]
        assert own["is_kept"].tolist() == same
        kept += same
        edit = edits.iloc[record]
        assert edit["neighborhood_kl"] == pytest.approx(math.fsum(divergences) / len(divergences))
        assert edit["kept"] == sum(same) / len(same)
        on_texts = [
            slow_kl(before[at].tolist(), after[at].tolist())
            for before, after in reference(gpt2, read, added)
            for at in range(len(before) - 1)
        ]
        assert edit["text_kl"] == pytest.approx(math.fsum(on_texts) / len(on_texts), rel=1e-9)
    assert {*kept} == {True, False}  # otherwise the edit is too small or too large to test it
    others = found.prompts().query("kind != 'neighborhood'")
    assert others["kl"].isna().all()
    assert others["is_kept"].isna().all()


@pytest.mark.usefixtures("as_for_a_user")
def test_the_unedited_model_does_not_diverge(gpt2: Case, tmp_path: Path, texts: str) -> None:
    edits = evaluated(gpt2, tmp_path / "out", texts, {}).edits()
    assert edits["kept"].tolist() == [1, 1]
    assert edits["neighborhood_kl"].tolist() == edits["text_kl"].tolist() == [0, 0]


@pytest.mark.usefixtures("as_for_a_user")
def test_at_most_so_many_positions_of_texts(
    gpt2: Case, tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third position, in the order in which texts are read: by their length."""
    encode = small_tokenizer().encode
    read = sorted((encode(text) for text in TEXTS), key=len)
    n_predicted = sum(len(ids) - 1 for ids in read)
    monkeypatch.setattr(text_scores, "_MOST_POSITIONS", math.ceil(n_predicted / 3))
    monkeypatch.setattr(text_scores, "_AT_ONCE", 2)
    monkeypatch.setattr("backward_lens_tl.evaluation.perplexity._POSITIONS", 1)
    found = evaluated(gpt2, tmp_path / "out", texts, {"n": Nudge(size=60.0)}).edits()
    own = found[found["method"] == "n"].iloc[0]
    divergences = [
        slow_kl(before[at].tolist(), after[at].tolist())
        for before, after in reference(gpt2, read, nudge_of(gpt2, ROWS[0], 60.0))
        for at in range(len(before) - 1)
    ][::3]
    assert own["text_kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-9)


def test_small_divergences_in_float32() -> None:
    """The second-order term of a small change is right although float32 rounds larger numbers."""
    generator = torch.Generator().manual_seed(0)
    before = 3 * torch.randn(5000, generator=generator)
    after = before + 1e-4 * torch.randn(5000, generator=generator)
    p, moved = before.double().softmax(-1), after.double() - before.double()
    expected = float((p * moved**2).sum() - (p * moved).sum() ** 2) / 2
    # 1e-4 is the size of the third-order term.
    assert float(kl_divergence(before, after)) == pytest.approx(expected, rel=1e-3)
    assert float(kl_divergence(before, before + 7)) == pytest.approx(0, abs=1e-12)


def test_impossible_tokens_and_broken_models() -> None:
    before = torch.tensor([0.0, 0.0, -torch.inf])
    for after, expected in (
        ([1.0, 1.0, -math.inf], 0.0),
        ([0.0, -math.inf, -math.inf], math.inf),
        ([math.nan] * 3, math.inf),
    ):
        assert float(kl_divergence(before, torch.tensor(after))) == pytest.approx(expected)


@pytest.mark.usefixtures("as_for_a_user")
def test_what_a_method_reports(gpt2: Case, tmp_path: Path, texts: str) -> None:
    methods = {"silent": Nudge(), "reporting": Reporting(size=4.0)}
    found = evaluated(gpt2, tmp_path / "out", texts, methods, edits_at_once=2)
    edits = found.edits().set_index("method")
    names = ["is_reached", "forward_passes", "backward_passes", "contrast_prompts"]
    assert edits.loc[["none", "silent"], names].isna().all().all()
    assert edits.loc["reporting", names].to_numpy().tolist() == [
        [True, 4, 1, 16],
        [False, 4, 1, 16],
    ]
    summary = found.summary().set_index("method")
    assert summary.loc["reporting", ["is_reached", "forward_passes"]].tolist() == [50, 4]
    assert math.isnan(summary.loc["silent", "forward_passes"])


@pytest.mark.usefixtures("as_for_a_user")
def test_without_continuations(gpt2: Case, tmp_path: Path, texts: str) -> None:
    edits = evaluated(gpt2, tmp_path / "out", texts, {}, continuations=False).edits()
    assert edits["free_efficacy"].isna().all()
    assert edits["continuation"].isna().all()
