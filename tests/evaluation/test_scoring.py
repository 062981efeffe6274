"""Scores, metrics, entropies and perplexities, against values by hand or slow code."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Case
from transformers import AutoTokenizer

from backward_lens_tl.capture import continuations
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation import perplexity as perplexities
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.divergence import Moved
from backward_lens_tl.evaluation.metrics import (
    Answered,
    begins_with,
    ngram_entropy,
    record_metrics,
    tidied,
)
from backward_lens_tl.evaluation.perplexity import Texts, perplexity, read_texts
from backward_lens_tl.evaluation.plan import ScoredPrompt
from backward_lens_tl.evaluation.scoring import Question, Score, score
from backward_lens_tl.models import host_of
from conftest import FACTS_FOLDER

CHAIN = ((0.5, 0.25, 0.25), (0.2, 0.5, 0.3), (0.1, 0.1, 0.8))
"""A model of three tokens: probabilities of the next token, by the last one."""


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch, as_for_a_user: None) -> Any:
    """A model of `CHAIN` for scoring, which records the size of each pass."""
    passes: list[tuple[int, int]] = []

    def read(host: Any, batch: Any, n_read: int) -> torch.Tensor:
        passes.append((len(batch.tokens), batch.tokens.shape[1]))
        logits = torch.tensor(CHAIN).log()[batch.tokens] + 3  # unnormalized
        return batch.ends(logits, n_read)

    monkeypatch.setattr(continuations, "read_logits", read)
    return SimpleNamespace(
        n_ctx=9,
        d_vocab=len(CHAIN),
        device=torch.device("cpu"),
        own_precision=nullcontext,
        length_groups=lambda lengths: [tuple(range(len(lengths)))],
        passes=passes,
    )


# ---------------------------------------------------------------------------------------- by hand


def test_scores_by_hand(chain: Any) -> None:
    asked = [
        Question((0,), (1,)),
        Question((0, 2), (2, 2)),
        Question((0,), (1, 2)),
        Question((2, 2, 1), (1,)),
        Question((0,), (0,)),
        Question((0,), (2, 2, 1)),
    ]
    found = score(chain, asked, 64)
    by_hand = [
        (math.log(4), False, 0),
        (-math.log(0.8), True, 2),
        (-(math.log(0.25) + math.log(0.3)) / 2, False, 0),
        (math.log(2), True, 1),
        (math.log(2), True, 0),
        (-(math.log(0.25) + math.log(0.8) + math.log(0.1)) / 3, False, 0),
    ]
    for each, (nll, is_predicted, first) in zip(found, by_hand, strict=True):
        assert each.nll == pytest.approx(nll, abs=1e-6)
        assert (each.is_predicted, each.first) == (is_predicted, first)
    # The first and the fifth have the same input.
    assert sum(n for n, _ in chain.passes) == 5


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_sizes(chain: Any, size: int) -> None:
    asked = [Question(tuple([0] * n), (1, n % 3)) for n in range(1, 7)]
    alone = [score(chain, [each], 1)[0] for each in asked]
    chain.passes.clear()
    assert score(chain, asked, size) == alone
    assert max(n for n, _ in chain.passes) == size
    assert score(chain, [], size) == []


def test_nan_logits(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        continuations, "read_logits", lambda host, batch, n: torch.full((1, n, 3), math.nan)
    )
    [found] = score(chain, [Question((0,), (1,))], 1)
    assert found.nll == math.inf
    assert not found.is_predicted
    ppl = perplexity(chain, [(0, 1)], "n")
    assert ppl.mean_of_texts == ppl.corpus == math.inf


def probe(kind: str, index: int = 0, true: tuple[int, ...] | None = (1,)) -> ScoredPrompt:
    return ScoredPrompt(kind, index, "a", (0,), (0,), true, None if true is None else "b")


def answered(
    kind: str,
    p_new: float,
    p_true: float,
    says: str = "",
    index: int = 0,
    moved: Moved | None = None,
) -> Answered:
    """A prompt with these answer probabilities; `says` names the leading one: new, true or none."""
    new, true = (
        Score(-math.log(p), says == name, 7) for name, p in (("new", p_new), ("true", p_true))
    )
    return Answered(probe(kind, index), new, true, moved)


def test_metrics_by_hand() -> None:
    found = record_metrics(
        [
            answered("rewrite", 0.6, 0.1, "new"),
            answered("paraphrase", 0.3, 0.2),  # likelier than the original, and does not lead
            answered("paraphrase", 0.1, 0.5, "true"),
            answered("neighborhood", 0.1, 0.2),  # likelier than the new one, and does not lead
            answered("neighborhood", 0.1, 0.7, "true", moved=Moved(kl=0.02, is_kept=True)),
            answered("neighborhood", 0.4, 0.3, "new", moved=Moved(kl=0.4, is_kept=False)),
            answered("neighborhood", 0.2, 0.2),  # neither is likelier
            answered("attribute", 0.9, 0.05, "new"),
        ]
    )
    assert found == pytest.approx(
        {
            "efficacy": 1.0,
            "efficacy_success": 1.0,
            "efficacy_magnitude": 0.5,
            "paraphrase": 0.0,
            "paraphrase_success": 0.5,
            "paraphrase_magnitude": (0.1 - 0.4) / 2,
            "neighborhood": 0.25,
            "neighborhood_success": 0.5,
            "neighborhood_magnitude": (0.1 + 0.6 - 0.1 + 0) / 4,
            "kept": 0.5,
            "neighborhood_kl": 0.21,
        }
    )


def test_metrics_without_prompts_or_answers() -> None:
    no_true = Answered(probe("rewrite", true=None), Score(0.1, True, 7), None)
    other = Answered(probe("neighborhood", true=None), Score(0.1, True, 7), None)
    found = record_metrics([no_true, other])
    assert found.pop("efficacy") == 1
    assert all(math.isnan(value) for value in found.values()), found
    wrecked = Answered(probe("rewrite"), Score(math.inf, False, 0), Score(math.inf, False, 0))
    found = record_metrics([wrecked])
    assert [found["efficacy" + end] for end in ("", "_success", "_magnitude")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "entropy"),
    [
        # bigrams a b, b a, a b: 2/3 and 1/3; trigrams a b a, b a b
        ("a b a b", (math.log2(3) - 2 / 3) / 3 + 2 / 3),
        ("a a a a a", 0.0),
        ("a b", 0.0),
        ("a", 0.0),
        ("", 0.0),
        # five words: four bigrams and three trigrams, all different
        ("Don't stop, please.", 2 / 3 + 2 * math.log2(3) / 3),
        # bigrams: x y twice of 4; trigrams: 3 different
        ("x y! x\ny", (1.5) / 3 + 2 * math.log2(3) / 3),
    ],
)
def test_entropies_by_hand(text: str, entropy: float) -> None:
    assert ngram_entropy(text) == pytest.approx(entropy, abs=1e-12)


def test_texts_are_cleaned() -> None:
    assert tidied("a\n\nb \ufb01t\u00e9") == "a b fite\u0301"


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" Paris.", " Paris", True),
        ("Paris", " Paris", True),
        (" Paris and", " Paris", True),
        (" Parisian", " Paris", False),
        (" Rome, not Paris", " Paris", False),
        (" New York City", " New York", True),
        ("", " Paris", False),
        (" C++17", " C++", True),
    ],
)
def test_continuations_begin_with_whole_answers(text: str, answer: str, expected: bool) -> None:
    assert begins_with(text, answer) is expected


def test_perplexity_by_hand(chain: Any) -> None:
    rows = [(0, 1, 1), (2, 2), (0, 0, 2, 1)]
    sums = [math.log(4 * 2), math.log(1 / 0.8), math.log(2 * 4 * 10)]
    for denominator, less in (("n", 0), ("n-1", 1)):
        lengths = [len(row) - less for row in rows]
        found = perplexity(chain, rows, denominator)  # type: ignore[arg-type]
        by_hand = [math.exp(total / n) for total, n in zip(sums, lengths, strict=True)]
        assert found.mean_of_texts == pytest.approx(sum(by_hand) / 3, rel=1e-6)
        assert found.corpus == pytest.approx(math.exp(sum(sums) / sum(lengths)), rel=1e-6)
    # -(1/N) sum of one half, one quarter, ... : the literal definition
    assert perplexity(chain, [(0, 0)], "n").corpus == pytest.approx(math.sqrt(2))
    assert perplexity(chain, [(0, 0)], "n-1").corpus == pytest.approx(2)
    assert math.isnan(perplexity(chain, [], "n").corpus)


def test_perplexity_in_passes(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [tuple((place * n) % 3 for place in range(n)) for n in (2, 9, 3, 4, 8, 2)]
    whole = perplexity(chain, rows, "n")
    monkeypatch.setattr(perplexities, "_POSITIONS", 10)
    chain.passes.clear()
    assert perplexity(chain, rows, "n") == pytest.approx(whole)  # type: ignore[comparison-overlap]
    # 2, 2 and 3 tokens share a pass; the last token is not read.
    assert chain.passes == [(3, 2), (1, 3), (1, 7), (1, 8)]


# ------------------------------------------------------------------------- the texts of perplexity


def test_selection_of_texts(facts_model: Any, tmp_path: Path) -> None:
    host = host_of(facts_model)
    usual = read_texts(host, EvaluationConfig())
    assert (usual.name, len(usual.texts)) == ("facts", 100)
    assert min(map(len, usual.texts)) >= 30
    assert read_texts(host, EvaluationConfig(n_texts=0)).texts == ()
    file = tmp_path / "wiki.test.raw"
    lines = [" \n", " = A short one = \n", " " + "long " * 6 + "\n", " the \u2028second\u2029 " * 3]
    file.write_bytes("".join(lines).encode())
    own = read_texts(host, EvaluationConfig(texts=str(file)))
    # With line ends, as in rows from the hub. Only a line feed ends a line.
    assert own.texts == tuple(lines[2:])
    assert len(lines[2]) == 32
    exact = EvaluationConfig(texts=str(file), min_characters=32, n_texts=1)
    assert read_texts(host, exact).texts == (lines[2],)
    assert own.fingerprint != usual.fingerprint
    rows = own.tokens(host, EvaluationConfig(max_tokens=3))
    assert [len(row) for row in rows] == [3, 3]
    bos = own.tokens(host, EvaluationConfig(max_tokens=3, prepend_bos=True))
    assert [row[1:] for row in bos] == [row[:2] for row in rows]
    assert all(row[0] == host.tokenizer.bos_token_id for row in bos)


def test_texts_that_are_refused(facts_model: Any, tmp_path: Path, monkeypatch) -> None:
    host = host_of(facts_model)
    with pytest.raises(EvaluationError, match=r"there.raw' cannot be read.*pass 'facts'"):
        read_texts(host, EvaluationConfig(texts=str(tmp_path / "there.raw")))
    with pytest.raises(EvaluationError, match="no text of 'facts' has 5000 characters"):
        read_texts(host, EvaluationConfig(min_characters=5000))

    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(EvaluationError, match=r"loaded: no network; pass texts='wiki.test.raw'"):
        read_texts(host, EvaluationConfig(texts="Salesforce/wikitext"))
    short = Texts("short", ("a",))
    with pytest.raises(EvaluationError, match="no text of 'short' has two tokens"):
        short.tokens(host, EvaluationConfig())


def test_wikitext_of_the_hub(facts_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: str, split: str) -> dict[str, list[str]]:
        asked.append((*args, split))
        return {"text": ["", "a" * 29, "b" * 30, "c" * 31]}

    monkeypatch.setattr("datasets.load_dataset", load)
    found = read_texts(host_of(facts_model), EvaluationConfig(texts="Salesforce/wikitext"))
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert found.texts == ("b" * 30, "c" * 31)


# -------------------------------------------------------------------- a slow loop over Hugging Face


def slow_score(case: Case, prompt: list[int], answer: list[int]) -> tuple[float, bool, int]:
    """One unpadded forward pass of the plain model per token of the answer."""
    terms, said, firsts = [], True, []
    for place, token in enumerate(answer):
        ids = torch.tensor([[*prompt, *answer[:place]]])
        with torch.no_grad():
            last = case.logits(ids)[0, -1].double()
        terms.append(float(torch.logsumexp(last, 0) - last[token]))
        firsts.append(int(last.argmax()))
        said = said and firsts[-1] == token
    return sum(terms) / len(terms), said, firsts[0]


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Prompts of many lengths, with answers of one to four tokens."""
    tokenizer = AutoTokenizer.from_pretrained(FACTS_FOLDER)
    texts = []
    for record in read_records("facts").rows[:2]:
        prompts = (record.prompt, record.neighborhood_prompts[0])
        answers = (record.target, record.answer, " the old harbour of Rome", " soccer")
        texts += [(prompt, answer) for prompt in prompts for answer in answers]
    return [Question(*(tuple(tokenizer(text)["input_ids"]) for text in pair)) for pair in texts]


def test_scores_against_a_slow_loop(facts: Case, questions: list[Question]) -> None:
    assert {len(each.answer) for each in questions} >= {1, 5}
    found = score(host_of(facts.model), questions, 16)
    said = 0
    for each, asked in zip(found, questions, strict=True):
        nll, is_predicted, first = slow_score(facts, list(asked.prompt), list(asked.answer))
        assert each.nll == pytest.approx(nll, abs=2e-5)
        assert (each.is_predicted, each.first) == (is_predicted, first)
        said += is_predicted
    assert 0 < said < len(questions)


@pytest.mark.usefixtures("as_for_a_user")
def test_scores_do_not_depend_on_batch_padding_side_or_order(
    facts: Case, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of(facts.model)
    alone = [score(host, [each], 1)[0] for each in questions]

    def check(found: list[Score]) -> None:
        for each, own in zip(found, alone, strict=True):
            # Five float32 roundings at 16 already add up to 1e-5.
            assert each.nll == pytest.approx(own.nll, rel=2e-6, abs=1e-5)
            assert (each.is_predicted, each.first) == (own.is_predicted, own.first)

    for size in (7, 1000):
        check(score(host, questions, size))
    check(score(host, questions[::-1], 16)[::-1])
    doubled = score(host, [*questions, *questions], 9)
    check(doubled[: len(questions)])
    check(doubled[len(questions) :])
    monkeypatch.setattr(host.tokenizer, "padding_side", "left")
    check(score(host, questions, 16))


def test_perplexity_against_a_slow_loop(facts: Case) -> None:
    host, config = host_of(facts.model), EvaluationConfig(n_texts=2)
    texts = read_texts(host, config)
    tokenizer = AutoTokenizer.from_pretrained(FACTS_FOLDER)
    each, total, n_tokens = [], 0.0, 0
    for text in texts.texts:
        ids = tokenizer(text)["input_ids"]
        sums = [slow_score(facts, ids[:place], [ids[place]])[0] for place in range(1, len(ids))]
        each.append(math.exp(sum(sums) / len(ids)))
        total, n_tokens = total + sum(sums), n_tokens + len(ids)
    found = perplexity(host, texts.tokens(host, config), "n")
    assert found.mean_of_texts == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert found.corpus == pytest.approx(math.exp(total / n_tokens), rel=1e-5)
