"""The benchmark: tables against slow computations, and the output folder with interruptions."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import stopping
import torch
from models import HAS_BRIDGE, Case, build, small_tokenizer
from stopping import killed, second_of_two
from torch import nn

import backward_lens_tl as blt
from backward_lens_tl import cli
from backward_lens_tl.capture.sampling import sample
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.errors import EditError, EvaluationError, ModelStateError
from backward_lens_tl.evaluation import measuring
from backward_lens_tl.evaluation import run as evaluation_run
from backward_lens_tl.evaluation.columns import TABLES
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.metrics import ngram_entropy
from backward_lens_tl.evaluation.run import Evaluation, evaluate
from backward_lens_tl.evaluation.summary import METRICS, summarize
from backward_lens_tl.models import host_of, loading
from backward_lens_tl.models.checksums import checksum, tensors_checksum
from backward_lens_tl.runs import run as run_module

ROWS = [
    {
        "prompt": "The capital of France is", "target": " the", "answer": " Paris", "id": "f",
        "paraphrase_prompts": ["Paris is in"],
        "neighborhood_prompts": ["Rome is in", "A river runs through"],
        "attribute_prompts": ["The dog of"],
        "generation_prompts": ["The capital", "A river of"],
    },
    {
        "prompt": "Messi plays", "target": " Rome.", "answer": " in", "subject": "Messi",
        "neighborhood_prompts": ["The king plays", "The dog", "Rome is"],
        "generation_prompts": ["Messi"], "id": "m",
    },
    {"prompt": "Rome is in Italy and Paris is", "target": 40, "id": "r"},
]  # fmt: skip
"""With and without paraphrases, neighbors, generations, and an original answer."""


@dataclass(frozen=True)
class Nudge(EditMethod):
    """Write the target's unembedding row at the prompt's last token.

    One outer product per request, by a seeded random key: a valid but poor edit.
    """

    size: float = 3.0
    layer: int = 1
    prepend_bos: bool | None = field(default=False, kw_only=True)
    asked: list[list[str]] = field(default_factory=list, compare=False, repr=False)

    def settings(self) -> dict[str, Any]:
        return {"method": "Nudge", "size": self.size, "layer": self.layer}

    def compute(self, host: Any, requests: Sequence[Any]) -> list[MatrixDelta]:
        self.asked.append([each.request.prompt for each in requests])
        weight = host.model.blocks[self.layer].mlp.W_out
        columns = []
        for each in requests:
            generator = torch.Generator().manual_seed(sum(each.prompt))
            key = torch.randn(weight.shape[0], generator=generator, dtype=torch.float64)
            columns.append((self.size * key / key.norm()).to(weight.dtype))
        rows = [host.model.W_U[:, each.target[0]].detach() for each in requests]
        return [MatrixDelta("W_out", self.layer, torch.stack(columns, 1), torch.stack(rows))]


@dataclass(frozen=True)
class Failing(Nudge):
    """Refuse some prompts."""

    error: Exception = field(default_factory=lambda: EditError("not this one"), compare=False)
    when: str = ""

    def compute(self, host: Any, requests: Sequence[Any]) -> list[MatrixDelta]:
        if any(each.request.prompt.startswith(self.when) for each in requests):
            raise self.error
        return super().compute(host, requests)


@dataclass(frozen=True)
class Changing(Nudge):
    """Change one value of the model itself."""

    def compute(self, host: Any, requests: Sequence[Any]) -> list[MatrixDelta]:
        host.parameters()[sorted(host.parameters())[0]].data.view(-1)[3] += 0.25
        return super().compute(host, requests)


@dataclass(frozen=True)
class Nothing(Nudge):
    """Return an empty edit."""

    def compute(self, host: Any, requests: Sequence[Any]) -> list[MatrixDelta]:
        return []


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    """A random model in float64, of an available class."""
    return build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2").model


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of texts for perplexity."""
    file = tmp_path_factory.mktemp("texts") / "texts.raw"
    file.write_text("The capital of France is Paris.\nRome is in Italy.\nMessi plays the ball.\n")
    return str(file)


@pytest.fixture
def run(tiny: nn.Module, texts: str, tmp_path: Path, as_for_a_user: None) -> Callable[..., Any]:
    """Run evaluations of small data into separate folders."""

    def evaluated(
        methods: Any, data: Any = ROWS, folder: str | None = None, model: Any = None, **given: Any
    ) -> Evaluation:
        out = tmp_path / (folder or f"e{len(list(tmp_path.iterdir()))}")
        return evaluate(
            model or tiny, data, out, methods, small_config(texts, **given), progress=False
        )

    return evaluated


def small_config(texts: str, **given: Any) -> EvaluationConfig:
    usual = {"texts": texts, "min_characters": 1, "generation_length": 0}
    return EvaluationConfig(**(usual | given))


@dataclass(frozen=True)
class Small:
    """One evaluation that many tests inspect.

    Attributes:
        found: Its result.
        nudge: Its first method, which records its requests.
        before: The model's state before it.
        after: The model's state after it.
    """

    found: Evaluation
    nudge: Nudge
    before: tuple[Any, ...]
    after: tuple[Any, ...]


@pytest.fixture(scope="module")
def small(tiny: nn.Module, texts: str, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """All records by three methods, one of which refuses a record."""
    nudge = Nudge()
    methods = {"nudge": nudge, "a|b<i>": Nudge(size=9.0), "failing": Failing(6.0, when="Messi")}
    config = small_config(texts, attributes=True, generation_length=8)
    before = state_of(tiny)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["my script", "--fast"])
        out = tmp_path_factory.mktemp("small") / "out"
        found = evaluate(tiny, ROWS, out, methods, config, progress=False)
    return Small(found, nudge, before, state_of(tiny))


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """State that an evaluation must not change."""
    host = host_of(model)
    return (
        host.fingerprint(),
        len(host.hooked_modules),
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
    )


@pytest.fixture(scope="module")
def whole(tiny: nn.Module, texts: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Contents of the files of an uninterrupted evaluation: two records, one method."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate(tiny, ROWS[:2], out, {"nudge": Nudge()}, small_config(texts), progress=False)
    return digests(out)


def digests(folder: Path) -> dict[str, str]:
    """Contents of every table's files, except what differs between runs."""
    return stopping.digests(folder, [table for table in TABLES if table != "costs"])


def by_record(table: pd.DataFrame, method: str) -> pd.DataFrame:
    return table[table["method"] == method].set_index("record")


# ------------------------------------------------------------------------------------------ tables


def test_every_record_of_every_method(small: Small) -> None:
    found = small.found
    assert found.is_complete
    edits = found.edits()
    names = ("none", "nudge", "a|b<i>", "failing")
    assert edits["method"].tolist() == [name for name in names for _ in ROWS]
    assert edits["record"].tolist() == [0, 1, 2] * 4
    assert edits["id"].tolist() == ["f", "m", "r"] * 4
    assert small.nudge.asked == [[row["prompt"]] for row in ROWS]
    assert edits["target"].tolist()[:2] == [" the", " Rome."]
    prompts = found.prompts()
    kinds = {"paraphrase": 1, "neighborhood": 5, "attribute": 1, "rewrite": 3}
    assert prompts.groupby("kind").size().to_dict() == {kind: 4 * n for kind, n in kinds.items()}
    assert found.generations().groupby("method").size().to_dict() == dict.fromkeys(names, 3)
    assert len(found.rejects()) == 0
    unedited = edits[edits["method"] == "none"]
    assert unedited["seconds"].isna().all()
    assert (unedited["norm"] == 0).all()
    assert (unedited["rank"] == 0).all()
    assert unedited["perplexity"].nunique() == 1
    edited = edits[(edits["method"] != "none") & edits["error"].isna()]
    assert len(edited) == 8
    assert (edited["seconds"] > 0).all()
    assert (edited["rank"] == 1).all()
    assert edited["perplexity"].nunique() == 8
    assert (edited["perplexity"] != unedited["perplexity"].iloc[0]).all()


def test_metrics_are_those_of_the_prompts(small: Small) -> None:
    prompts = small.found.prompts()
    prompts["p_new"], prompts["p_true"] = np.exp(-prompts["nll_new"]), np.exp(-prompts["nll_true"])
    for row in small.found.edits().to_dict("records"):
        own = prompts[(prompts["method"] == row["method"]) & (prompts["record"] == row["record"])]
        for kind, name in (
            ("rewrite", "efficacy"),
            ("paraphrase", "paraphrase"),
            ("neighborhood", "neighborhood"),
        ):
            some = own[own["kind"] == kind]
            sign = -1 if kind == "neighborhood" else 1
            said = some["is_true" if kind == "neighborhood" else "is_new"]
            expected = {
                name: said.astype("Float64").mean(),
                f"{name}_magnitude": (sign * (some["p_new"] - some["p_true"])).mean(),
                f"{name}_success": (sign * (some["p_new"] - some["p_true"]) > 0).mean()
                if some["p_true"].notna().any()
                else math.nan,
            }
            for column, value in expected.items():
                value = math.nan if pd.isna(value) else float(value)
                assert row[column] == pytest.approx(value, nan_ok=True), column
        rewrite = own[own["kind"] == "rewrite"].iloc[0]
        assert row["answer"] == rewrite["answer"]
        assert row["prompt"] == rewrite["prompt"]


@pytest.mark.usefixtures("as_for_a_user")
def test_scores_under_an_edit_against_a_changed_model(gpt2: Case, tmp_path: Path) -> None:
    """The reference's weight is really changed, and prompts run one by one."""
    before = host_of(gpt2.model).fingerprint()
    config = EvaluationConfig(generation_length=0, n_texts=0)
    methods = {"n": Nudge(size=6.0)}
    found = evaluate(gpt2.model, ROWS[:2], tmp_path, methods, config, progress=False)
    assert host_of(gpt2.model).fingerprint() == before
    tokenizer, prompts = small_tokenizer(), found.prompts()
    weight = gpt2.weights["W_out", 1]
    for record, row in enumerate(ROWS[:2]):
        ids = tokenizer.encode(row["prompt"])
        target = tokenizer.encode(row["target"])
        key = torch.randn(
            52, generator=torch.Generator().manual_seed(sum(ids)), dtype=torch.float64
        )
        unembedding = gpt2.model.W_U[:, target[0]].detach()
        added = torch.outer(6.0 * key / key.norm(), unembedding)
        kept = weight.tensor.detach().clone()
        try:
            with torch.no_grad():
                weight.tensor.add_(weight.in_out(added))
                own = prompts[(prompts["method"] == "n") & (prompts["record"] == record)]
                paraphrases = row.get("paraphrase_prompts", [])
                assert len(own) == 1 + len(paraphrases) + len(row["neighborhood_prompts"])
                for asked in own.to_dict("records"):
                    ids = tokenizer.encode(asked["prompt"])
                    for side in ("new", "true"):
                        nll, is_predicted, first = slow_answer(
                            gpt2, ids, tokenizer.encode(asked[side])
                        )
                        assert asked[f"nll_{side}"] == pytest.approx(nll, abs=1e-9)
                        assert asked[f"is_{side}"] == is_predicted
                        assert asked["answer"] == tokenizer.decode([first])
        finally:
            with torch.no_grad():
                weight.tensor.copy_(kept)
        unedited = prompts[(prompts["method"] == "none") & (prompts["record"] == record)]
        assert (unedited["nll_new"].to_numpy() != own["nll_new"].to_numpy()).all()


@torch.no_grad()
def slow_answer(case: Case, prompt: list[int], answer: list[int]) -> tuple[float, bool, int]:
    """Mean loss of an answer, whether it is greedy, and the most probable first token."""
    lasts = [
        case.logits(torch.tensor([[*prompt, *answer[:place]]]))[0, -1].double()
        for place in range(len(answer))
    ]
    losses = [
        float(torch.logsumexp(last, 0) - last[token])
        for last, token in zip(lasts, answer, strict=True)
    ]
    said = [int(last.argmax()) for last in lasts]
    return sum(losses) / len(losses), said == answer, said[0]


def test_the_edit_of_several_records_at_once(run, small: Small) -> None:
    nudge = Nudge()
    found = run({"nudge": nudge}, edits_at_once=2)
    assert nudge.asked == [[ROWS[0]["prompt"], ROWS[1]["prompt"]], [ROWS[2]["prompt"]]]
    edits = by_record(found.edits(), "nudge")
    assert edits["block"].tolist() == [0, 0, 1]
    assert edits["rank"].tolist() == [2, 2, 1]
    assert edits["perplexity"].nunique() == edits["norm"].nunique() == 2
    one = by_record(small.found.edits(), "nudge")
    assert edits.loc[2, "efficacy_success":"norm"].equals(one.loc[2, "efficacy_success":"norm"])
    assert edits.loc[0, "perplexity"] != one.loc[0, "perplexity"]
    # Scores under the joint edit equal those under two nested single edits.
    keys = ["record", "kind", "index"]
    nll = found.prompts().set_index(["method", *keys])["nll_new"]
    alone = small.found.prompts().query("method == 'none'").set_index(keys)["nll_new"]
    assert np.allclose(nll["none"], alone[nll["none"].index], rtol=0, atol=1e-12)
    assert (nll["nudge"] != nll["none"]).all()


def test_failed_edits_count_as_not_edited(small: Small) -> None:
    edits, none = small.found.edits(), by_record(small.found.edits(), "none")
    own, same = by_record(edits, "failing"), slice("answer", "rank")
    assert own["error"].isna().tolist() == [True, False, True]
    assert own.loc[1, "error"] == "not this one"
    assert own.loc[1, same].equals(none.loc[1, same])
    assert not own.loc[0, same].equals(none.loc[0, same])
    assert small.found.summary().set_index("method")["failed"].to_dict() == {
        "none": 0, "nudge": 0, "a|b<i>": 0, "failing": 1
    }  # fmt: skip
    texts = small.found.generations()
    assert (
        by_record(texts, "failing")
        .loc[[1]]
        .drop(columns="method")
        .equals(by_record(texts, "none").loc[[1]].drop(columns="method"))
    )
    assert "3 (1 failed)" in small.found.to_markdown()


def test_every_kind_of_failure_fails_alone(run) -> None:
    """Exceptions of a method, NaN, and, last, edits that do not fail."""
    raised = [
        EditError("no statistics"),
        torch.linalg.LinAlgError("singular"),
        torch.OutOfMemoryError("too large"),
        MemoryError("too large"),
    ]
    failing: dict[str, EditMethod] = {
        type(error).__name__: Failing(error=error) for error in raised
    }
    failing |= {"nan": Nudge(size=math.nan), "inf": Nudge(size=math.inf)}
    methods = {**failing, "nothing": Nothing(), "huge": Nudge(size=1e300), "good": Nudge()}
    edits = run(methods, ROWS[:1]).edits().set_index("method")
    for name, error in zip(failing, raised, strict=False):
        assert edits.loc[name, "error"] == str(error)
    assert edits.loc[["nan", "inf"], "error"].str.contains("not finite").all()
    assert edits.loc[["nothing", "huge", "good"], "error"].isna().all()
    same = slice("answer", "rank")
    for name in (*failing, "nothing"):
        assert edits.loc[name, same].equals(edits.loc["none", same]), name
    for name in ("huge", "good"):
        assert not edits.loc[name, same].equals(edits.loc["none", same]), name
    # Edits that disable the model are measured.
    assert not math.isnan(edits.loc["huge", "perplexity"])


def test_a_bug_is_not_a_failed_edit(run) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run({"f": Failing(error=RuntimeError("shapes do not match"))}, ROWS[:1])


def test_a_method_that_changes_the_model_is_caught(run, tiny: nn.Module, tmp_path: Path) -> None:
    host = host_of(tiny)
    before, kept = host.fingerprint(), {k: v.detach().clone() for k, v in host.parameters().items()}
    try:
        with pytest.raises(ModelStateError, match=r"the weights of .* changed by the edit 'l'"):
            run({"l": Changing()}, ROWS[:1], folder="out")
        assert host.fingerprint() != before
    finally:
        for name, parameter in host.parameters().items():
            parameter.data.copy_(kept[name])
    assert host.fingerprint() == before
    found = Evaluation.load(tmp_path / "out")
    assert found.edits()["method"].unique().tolist() == ["none"]


def test_changes_between_shards_are_caught(run, tiny: nn.Module, monkeypatch) -> None:
    """Detected by fingerprints before and after the evaluation."""
    host = host_of(tiny)
    parameter = host.parameters()[sorted(host.parameters())[0]]
    real = measuring.Bench.measure

    def measure(self: Any, shard: Any) -> Any:
        found = real(self, shard)
        parameter.data.view(-1)[0] += 1
        return found

    monkeypatch.setattr(measuring.Bench, "measure", measure)
    kept = parameter.detach().clone()
    try:
        with pytest.raises(ModelStateError, match="changed by the edit 'none' or during it"):
            run({})
    finally:
        parameter.data.copy_(kept)


def test_the_model_is_unchanged_by_an_evaluation(small: Small) -> None:
    assert small.after == small.before
    *_, grads = small.after
    assert set(grads) == {None}


def test_one_bit_changes_the_checksum(tiny: nn.Module) -> None:
    tensors = {name: value.detach().clone() for name, value in host_of(tiny).parameters().items()}
    whole = tensors_checksum(tensors)
    assert tensors_checksum(dict(reversed(tensors.items()))) == whole
    for name in list(tensors)[::7]:
        flat = tensors[name].view(-1)
        for place in (0, len(flat) - 1):
            flat.view(torch.int64)[place] ^= 1
            assert tensors_checksum(tensors) != whole
            flat.view(torch.int64)[place] ^= 1
    assert tensors_checksum(tensors) == whole
    matrix = next(value for value in tensors.values() if value.ndim == 2)
    matrix[[0, 1]] = matrix[[1, 0]]
    assert tensors_checksum(tensors) != whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_signs_and_swaps_change_the_checksum(dtype: torch.dtype) -> None:
    values = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = values.clone().reshape(-1)
    turned[:2] *= -1
    swapped = values.clone().reshape(-1)
    swapped[[3, 70]] = swapped[[70, 3]]
    sums = {checksum(each) for each in (values, -values, turned, swapped, values.T.contiguous())}
    assert len(sums) == 5


def test_scores_do_not_depend_on_batch_or_padding_side(
    run, small: Small, tiny: nn.Module, monkeypatch
) -> None:
    def check(batch_size: int, n: int) -> None:
        """Evaluate the first records only; compare with the evaluation of all."""

        def those_of(found: Evaluation, table: str) -> pd.DataFrame:
            rows = getattr(found, table)()
            is_own = rows["method"].isin(["none", "nudge"]) & (rows["record"] < n)
            return rows[is_own].reset_index(drop=True)

        given = {"attributes": True, "generation_length": 8, "batch_size": batch_size}
        found = run({"nudge": Nudge()}, ROWS[:n], **given)
        prompts, expected = (those_of(each, "prompts") for each in (found, small.found))
        scores = ["nll_new", "nll_true", "kl"]
        assert prompts.drop(columns=scores).equals(expected.drop(columns=scores))
        assert np.allclose(prompts[scores], expected[scores], rtol=0, atol=1e-5, equal_nan=True)
        assert found.generations().equals(those_of(small.found, "generations"))
        perplexities = (those_of(each, "edits")["perplexity"] for each in (found, small.found))
        assert np.allclose(*perplexities)

    check(batch_size=1, n=1)
    monkeypatch.setattr(tiny.tokenizer, "padding_side", "left")
    check(batch_size=3, n=2)


def test_generations(run, small: Small, tiny: nn.Module) -> None:
    texts, host = small.found.generations(), host_of(tiny)
    none = texts[texts["method"] == "none"]
    assert none["prompt"].tolist() == ["The capital", "A river of", "Messi"]
    for row in texts.to_dict("records"):
        assert row["text"].startswith(row["prompt"])
        assert row["ngram_entropy"] == ngram_entropy(row["text"])
    lengths = [len(host.tokenize(text, False)) for text in texts["text"]]
    assert max(lengths) <= 8 + 4  # a sampled text may have fewer or more tokens
    assert min(lengths) > 4
    edits = small.found.edits().set_index(["method", "record"])
    assert edits.loc[("none", 0), "ngram_entropy"] == pytest.approx(
        none["ngram_entropy"][:2].mean()
    )
    assert math.isnan(edits.loc[("none", 2), "ngram_entropy"])
    # The continuation always takes the most probable token.
    ids = host.tokenize(ROWS[0]["prompt"], False)
    [drawn] = sample(host, [ids], [4], top_k=1, seeds=[5])
    expected = host.vocabulary.decode([*ids, *drawn])[len(ROWS[0]["prompt"]) :]
    assert edits.loc[("none", 0), "continuation"] == expected
    for changed in ({"seed": 1}, {"top_k": 2}):
        given = {"generation_length": 8, "n_texts": 0, **changed}
        other = run({}, ROWS[:1], **given).generations()["text"]
        assert other.tolist() != none["text"].tolist()[:2]
    bare = run({}, ROWS[:1], generation_length=0)
    assert len(bare.generations()) == 0
    assert bare.edits()["ngram_entropy"].isna().all()


def test_free_efficacy_is_measured_on_the_continuation(run, tiny: nn.Module) -> None:
    host = host_of(tiny)
    own = []
    for row in ROWS[:2]:
        ids = host.tokenize(row["prompt"], False)
        [drawn] = sample(host, [ids], [2], top_k=1, seeds=[0])
        own.append({"prompt": row["prompt"], "target": host.vocabulary.text(drawn[0])})
    edits = run({}, [own[0], {**own[1], "target": " the"}], n_texts=0).edits()
    first = edits.iloc[0]
    assert first["efficacy"] == 1
    continues = first["continuation"][len(first["target"]) :][:1].isalnum()
    assert first["free_efficacy"] == float(not continues)
    assert edits["free_efficacy"].iloc[1] == edits["efficacy"].iloc[1]


def test_costs(run) -> None:
    @dataclass(frozen=True)
    class Costly(Nudge):
        def compute(self, host: Any, requests: Sequence[Any]) -> list[MatrixDelta]:
            large = torch.ones(12 * 2**20)  # 48 MiB
            time.sleep(0.6)  # much more than the noise of a busy machine
            return super().compute(host, requests) if large.sum() else []

    rows = [{"prompt": row["prompt"], "target": row["target"]} for row in ROWS]
    found = run({"costly": Costly(), "nudge": Nudge()}, rows, edits_at_once=2, n_texts=0)
    edits = found.edits()
    costly = by_record(edits, "costly")
    assert (costly["seconds"] >= [0.3, 0.3, 0.6]).all()
    assert costly["seconds"].max() < 5
    assert costly.loc[0, "seconds"] < 0.8 * costly.loc[2, "seconds"]  # two share the first edit
    if Path("/proc/self/clear_refs").exists():
        assert costly["memory"].between(40 * 2**20, 120 * 2**20).all()
        assert (by_record(edits, "nudge")["memory"] < 20 * 2**20).all()
        assert 40 < found.summary().set_index("method").loc["costly", "memory"] < 120


# --------------------------------------------------------------------------------- selected records


def test_selection_of_records(run) -> None:
    rows = [{"prompt": "Rome is in", "target": " the", "id": f"{n}"} for n in range(4)]

    def ids(**settings: Any) -> list[str]:
        return run({}, rows, n_texts=0, **settings).edits()["id"].tolist()

    assert ids(records=2) == ["0", "1"]
    assert ids(rows=range(2, 4)) == ["2", "3"]
    assert ids(rows=[3, 0]) == ["3", "0"]
    assert ids(records=100) == [str(n) for n in range(4)]
    shuffled = list(range(4))
    random.Random("a split").shuffle(shuffled)
    assert shuffled != [0, 1, 2, 3]
    for selected, places in (
        ({"records": 2}, [0, 1]),
        ({"rows": [3, 1]}, [3, 1]),
        ({}, range(4)),
    ):
        assert ids(shuffle="a split", **selected) == [str(shuffled[at]) for at in places]
    with pytest.raises(EvaluationError, match="row 4 does not exist; 'rows' has 4 rows"):
        ids(rows=[4])


def test_rows_that_cannot_be_evaluated(run) -> None:
    bad = [
        ("row", {"prompt": "Rome is in"}),
        ("target", {"prompt": "Rome is in", "target": 97}),
        ("target", {"prompt": "Rome is i", "target": "n the"}),
        ("target", {**ROWS[0], "neighborhood_prompts": ["Rome is in", "Rome is in th"],
                    "answer": "e"}),
        ("length", {"prompt": "the " * 70 + "the", "target": " the"}),
        ("length", {**ROWS[0], "generation_prompts": ["the " * 70]}),
        ("length", {"prompt": "the" + " the" * 62, "target": " Rome. the"}),  # 64 tokens by itself
        ("row", {**ROWS[0], "paraphrase_prompts": [""]}),
    ]  # fmt: skip
    found = run({"nudge": Nudge()}, [*(row for _, row in bad), ROWS[0]], generation_length=4)
    rejects = found.rejects()
    assert rejects["record"].tolist() == list(range(len(bad)))
    assert rejects["reason"].tolist() == [reason for reason, _ in bad]
    assert found.edits()["record"].tolist() == [len(bad)] * 2
    assert "'n the' changes the tokens of the prompt 'Rome is i'" in rejects["problem"][2]
    nothing = run({"nudge": Nudge()}, [row for _, row in bad], generation_length=4)
    assert nothing.is_complete
    assert len(nothing.rejects()) == len(bad)
    assert len(nothing.edits()) == len(nothing.summary()) == 0
    assert nothing._repr_html_()


def test_answers_with_their_own_leading_space(run) -> None:
    """A token id as target is used unchanged."""
    [row] = by_record(run({}, [ROWS[2]]).edits(), "none").to_dict("records")
    assert isinstance(row["target"], str)
    assert math.isnan(row["efficacy_success"])
    assert row["efficacy"] in (0, 1)


def test_neighbors_that_are_left_out(run) -> None:
    prompts = run({}, neighbors=1, n_texts=0).prompts()
    assert prompts.groupby("kind").size().to_dict() == {"neighborhood": 2, "paraphrase": 1,
                                                        "rewrite": 3}  # fmt: skip
    assert "neighborhood" not in run({}, neighbors=0, n_texts=0).prompts()["kind"].tolist()


def test_flattened_counterfact_has_a_neighbor_with_its_own_answer(run) -> None:
    row = {
        "case_id": 3, "prompt": "The capital of France is", "target_new": "the",
        "subject": "France", "ground_truth": "Paris", "rephrase_prompt": "France is",
        "locality_prompt": "The capital of Italy is", "locality_ground_truth": "in",
    }  # fmt: skip
    prompts = run({}, [row]).prompts().set_index("kind")
    assert prompts["true"].to_dict() == {
        "rewrite": " Paris", "paraphrase": " Paris", "neighborhood": " in"
    }  # fmt: skip
    plain = {"prompt": row["locality_prompt"], "target": " the", "answer": " in"}
    expected = run({}, [plain]).prompts().iloc[0]
    own = prompts.loc["neighborhood"]
    assert own["nll_true"] == pytest.approx(expected["nll_true"])
    assert own["is_true"] == expected["is_true"]


# --------------------------------------------------------------------------------------- summary


def edits_of(values: dict[str, Sequence[float]], blocks: Sequence[int] | None = None) -> Any:
    """A table of edits by one method, with these columns; the others are missing."""
    n = len(next(iter(values.values())))
    frame = {metric.name: [math.nan] * n for metric in METRICS} | values
    return pd.DataFrame({"method": "m", "block": blocks or range(n), "error": None, **frame})


def test_means_deviations_and_the_score_by_hand() -> None:
    found = summarize(
        edits_of(
            {
                "efficacy": [1, 1, 1, 0],
                "efficacy_success": [1, 1, 1, 0],
                "paraphrase_success": [1, 0.5, 0.5, 0],
                "neighborhood_success": [0.2, 0.4, math.nan, 0.6],
                "ngram_entropy": [6, 6.5, 6.5, 7],
                "perplexity": [10, 20, 10, 20],
                "memory": [2**20, 2**20, 3 * 2**20, 3 * 2**20],
            }
        ),
        seed=0,
        resamples=200,
    ).iloc[0]
    assert (found["records"], found["failed"]) == (4, 0)
    assert (found["efficacy"], found["efficacy_std"]) == (75, pytest.approx(100 * 0.75**0.5 / 2))
    assert found["paraphrase_success"] == 50
    assert found["neighborhood_success"] == pytest.approx(40)  # of those that have one
    assert found["neighborhood_success_std"] == pytest.approx(100 * (0.08 / 3) ** 0.5)
    assert (found["ngram_entropy"], found["perplexity"], found["memory"]) == (650, 15, 2)
    assert (found["perplexity_std"], found["memory_std"]) == (5, 1)
    assert found["score"] == pytest.approx(3 / (1 / 75 + 1 / 50 + 1 / 40))
    assert math.isnan(found["paraphrase"])
    zero = summarize(
        edits_of({"efficacy_success": [0], "paraphrase_success": [1], "neighborhood_success": [1]}),
        seed=0,
        resamples=9,
    )
    assert zero["score"].tolist() == [0]


def test_intervals_match_the_binomial() -> None:
    """A resampled rate is binomial, so its quantiles are known exactly."""
    n, hits = 40, 29
    table = edits_of({"efficacy": [1] * hits + [0] * (n - hits)})
    found = summarize(table, seed=3, resamples=5000).iloc[0]
    p = hits / n
    chances = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    for end, level in (("low", 0.025), ("high", 0.975)):
        exact = int(np.searchsorted(chances, level))
        assert abs(found[f"efficacy_{end}"] - 100 * exact / n) <= 100 / n
    assert found["efficacy_low"] < found["efficacy"] < found["efficacy_high"]
    first, again, other = (summarize(table, seed=seed, resamples=50).iloc[0] for seed in (4, 4, 5))
    assert first.equals(again)
    assert not first.equals(other)


def test_records_of_one_edit_are_resampled_together() -> None:
    """Copies within a block add no evidence: the interval is that of the blocks."""
    values = [0.1, 0.9, 0.4, 0.7, 0.2, 0.8]
    blocks = [block for block in range(6) for _ in range(10)]
    alone = summarize(edits_of({"paraphrase": values}), seed=0, resamples=500)
    copied = summarize(
        edits_of({"paraphrase": np.repeat(values, 10).tolist()}, blocks), seed=0, resamples=500
    )
    free = summarize(
        edits_of({"paraphrase": np.repeat(values, 10).tolist()}), seed=0, resamples=500
    )
    ends = ["paraphrase_low", "paraphrase_high"]
    assert copied[ends].to_numpy().ravel() == pytest.approx(alone[ends].to_numpy().ravel())
    width = {name: float(np.ptp(table[ends])) for name, table in
             (("copied", copied), ("free", free))}  # fmt: skip
    assert width["free"] < 0.5 * width["copied"]


def test_infinite_perplexities_are_not_hidden() -> None:
    found = summarize(
        edits_of({"perplexity": [5.0, math.inf, 6.0, 7.0]}), seed=0, resamples=100
    ).iloc[0]
    assert (found["perplexity"], found["perplexity_high"]) == (math.inf, math.inf)
    assert math.isnan(found["perplexity_std"])


def test_two_methods_compared(small: Small) -> None:
    """On the records of this evaluation; the formulas are tested in test_comparison.py."""
    found = small.found.compare("nudge", "none").set_index(["metric", "statistic"])
    summary = small.found.summary().set_index("method")
    for statistic, column in (("mean", "text_kl"), ("median", "text_kl_median")):
        row = found.loc[("text_kl", statistic)]
        assert row["first"] == row["difference"] == summary.loc["nudge", column] > 0
        assert (row["second"], row["ratio"], row["records"]) == (0, math.inf, 3)
    with pytest.raises(EvaluationError, match="no method 'rome'; it has none, nudge"):
        small.found.compare("rome", "none")


def test_the_readable_table(small: Small) -> None:
    found = small.found
    lines = found.to_markdown().splitlines()
    assert len(lines) == 6
    assert len({len(line) for line in lines}) == 1
    names = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert names[:6] == ["Method", "Records", "Efficacy", "Paraphrase", "Neighborhood",
                         "Free efficacy"]  # fmt: skip
    assert names[names.index("NS") + 1] == "S"
    assert r"| a\|b<i> " in lines[4]
    row = found.summary().iloc[2]
    assert f"| {row['efficacy']:.1f} ({row['efficacy_std']:.1f})" in lines[4]
    assert f"{row['perplexity']:.2f} ({row['perplexity_std']:.2f})" in lines[4]
    page = found._repr_html_()
    assert "a|b&lt;i&gt;" in page
    assert "<i>" not in page
    assert "texts.raw" in page
    assert repr(found).startswith("Evaluation(")


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("backend", ["plotly", "matplotlib"])
def test_the_figure(small: Small, tmp_path: Path, backend: Any) -> None:
    figure = blt.figures.edit_scores(small.found, backend=backend)
    summary = small.found.summary()
    if backend == "matplotlib":
        left, right = figure.axes
        for axes, names in ((left, ("efficacy", "paraphrase", "neighborhood")),
                            (right, ("efficacy_success",))):  # fmt: skip
            points = [line for line in axes.lines if line.get_marker() != "none"]
            assert len(points) == 3
            for line, name in zip(points, names, strict=False):
                assert line.get_ydata().tolist() == summary[name].tolist()
        figure.savefig(tmp_path / "figure.png")
        return
    points = [trace for trace in figure.data if "markers" in trace.mode]
    assert len(points) == 6
    assert list(points[0].y) == summary["efficacy"].tolist()
    assert list(points[3].y) == summary["efficacy_success"].tolist()
    ends = next(trace for trace in figure.data if "markers" not in trace.mode)
    low, high = summary["efficacy_low"][1], summary["efficacy_high"][1]
    assert list(ends.y)[3:5] == [low, high]
    assert figure.layout.xaxis.ticktext[:2] == ("none", "nudge")
    assert sum(bool(trace.showlegend) for trace in figure.data) == 3
    with pytest.raises(EvaluationError, match="pass what evaluate returned"):
        blt.figures.edit_scores(summary)


# ---------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("moment", "when"),
    [(0, "written"), (3, "placed"), (5, "written"), (5, "placed")],
)
def test_killed_at_any_file_it_resumes_with_the_same_result(
    run, whole: dict[str, str], tmp_path: Path, moment: int, when: str
) -> None:
    """Kill at `run.json`, and at some of the five tables of each of four shards."""
    nudge, again, last = Nudge(), Nudge(), Nudge()
    out = tmp_path / "out"
    killed(lambda: run({"nudge": nudge}, ROWS[:2], "out"), moment, when)
    # A shard whose last table is in place is finished and kept.
    n_shards = max(0, (moment - (when == "written")) // 5)
    assert len(list((out / "edits").glob("shard-*"))) == n_shards
    if (out / "run.json").exists():
        half = Evaluation.load(out)
        assert half.finished == tuple(range(n_shards))
        assert not half.is_complete
        assert len(half.edits()) == n_shards
        half.summary()
    finished = [f"*/shard-{shard:06d}.parquet" for shard in range(n_shards)]
    before = {file: file.stat().st_mtime_ns for each in finished for file in out.glob(each)}
    done = run({"nudge": again}, ROWS[:2], "out")
    assert done.is_complete
    assert digests(out) == whole
    assert len(again.asked) == min(2, 4 - n_shards)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    run({"nudge": last}, ROWS[:2], "out")
    assert last.asked == []


def test_a_process_measures_its_share(run, whole: dict[str, str], monkeypatch) -> None:
    """Run the second of two processes; later, one process does the first one's share."""
    with monkeypatch.context() as patched:
        second = second_of_two()
        patched.setattr(run_module, "this_process", lambda: second)
        assert run({"nudge": Nudge()}, ROWS[:2], "out").finished == (1, 3)
        assert len(second.waits) == 2
    done = run({"nudge": Nudge()}, ROWS[:2], "out")
    assert "process 1 of 2: 2 of the 4 shards" in (done.folder / "log-1.txt").read_text()
    assert digests(done.folder) == whole


def test_only_the_same_evaluation_is_resumed(run, tmp_path: Path) -> None:
    run({"nudge": Nudge()}, ROWS[:1], "out")
    other = tmp_path / "other.raw"
    other.write_text("The capital of France is Rome.\n")
    for change, message in (
        (
            {"methods": {"nudge": Nudge(size=4.0)}},
            r"other settings \(methods\): nudge was .*3\.0.*is .*4\.0",
        ),
        ({"methods": {}}, r"other settings \(methods\)"),
        ({"data": ROWS[:2]}, r"other settings \(data\)"),
        ({"top_k": 3}, r"other settings \(config\): top_k was 5, is 3"),
        (
            {"prepend_bos": True, "methods": {"nudge": Nudge(prepend_bos=True)}},
            r"other settings \(config\): prepend_bos was False, is True",
        ),
        (
            {"model": build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-llama").model},
            r"other settings \(model\)",
        ),
    ):
        given = {"methods": {"nudge": Nudge()}, "data": ROWS[:1], **change}
        with pytest.raises(EvaluationError, match=f"holds an evaluation of {message}"):
            run(folder="out", **given)
    # Texts are compared by content, not only by file name.
    file = Path(Evaluation.load(tmp_path / "out").config.texts or "")
    kept = file.read_text()
    try:
        file.write_text(other.read_text())
        with pytest.raises(EvaluationError, match=r"other settings \(texts\): n was 3, is 1"):
            run({"nudge": Nudge()}, ROWS[:1], "out")
    finally:
        file.write_text(kept)


def test_folders_of_something_other_than_an_evaluation(run, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is not the folder of an evaluation"):
        Evaluation.load(tmp_path)
    found = run({}, ROWS[:1], "out", n_texts=0)
    [file] = (found.folder / "prompts").iterdir()
    file.write_bytes(b"PAR1 not")
    with pytest.raises(EvaluationError, match=r"is damaged.*run the evaluation again: it resumes"):
        found.prompts()
    (found.folder / "run.json").unlink()
    with pytest.raises(EvaluationError, match=r"has shards of an evaluation but no run.json"):
        run({}, ROWS[:1], "out", n_texts=0)


def test_run_json(small: Small, texts: str) -> None:
    found = small.found
    held = json.loads((found.folder / "run.json").read_text())
    assert held["command"] == "'my script' --fast"
    assert list(held["methods"]) == ["nudge", "a|b<i>", "failing"]
    assert held["methods"]["nudge"] == {"method": "Nudge", "size": 3.0, "layer": 1}
    assert (held["texts"]["name"], held["texts"]["n"]) == (texts, 3)
    assert held["config"]["generation_length"] == found.config.generation_length == 8
    assert EvaluationConfig.from_json(held["config"]) == found.config
    log = (found.folder / "log-0.txt").read_text()
    assert "process 0 of 1: 12 of the 12 shards that are left" in log
    assert "shard 5: 1 records by nudge, 0 failed" in log
    assert "shard 10: 1 records by failing, 1 failed" in log


DRIVER = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = sys.argv[2].split(os.pathsep)
import accelerate, pandas, pyarrow.parquet
import torch
torch.set_num_threads(1)
from test_evaluation import ROWS, Nudge
from models import HAS_BRIDGE, build
from backward_lens_tl.files import storage
from backward_lens_tl.runs import shards
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.run import evaluate

out, texts = Path(sys.argv[1]), sys.argv[3]
model = build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2").model
config = EvaluationConfig(texts=texts, min_characters=1, generation_length=0, records=2)


def forked(action):
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(name):
    evaluate(model, ROWS, out / name, {"nudge": Nudge()}, config, progress=False)


def killed(name, moment, when):
    real, left = storage.replacing, iter(range(moment))

    @contextmanager
    def replacing(path):
        is_last = next(left, None) is None
        with real(path) as partial:
            yield partial
            if is_last and when == "written":
                os.kill(os.getpid(), signal.SIGKILL)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    storage.replacing = shards.replacing = replacing
    whole(name)


def ranked(rank, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )
    whole("two")


# run.json, and five tables of each of four shards: some of the moments, all kinds of them.
for moment in (0, 3, 5, 12):
    for when in ("written", "placed"):
        name = f"{moment}-{when}"
        assert forked(lambda: killed(name, moment, when)) == -signal.SIGKILL, name
        done = len(list((out / name / "edits").glob("shard-*")))
        # A shard whose last table is in place is finished, and not lost.
        assert done == max(0, (moment - (when == "written")) // 5), (name, done)
        assert forked(lambda: whole(name)) == 0, name
assert forked(lambda: whole("whole")) == 0

import socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
first = os.fork()
if first == 0:
    os._exit(forked(lambda: ranked(0, port)))
second = forked(lambda: ranked(1, port))
assert second == os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_no_finished_record(tmp_path: Path, texts: str) -> None:
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    here = Path(__file__).parent
    shared = os.pathsep.join(map(str, (here, here.with_name("support"))))
    command = [sys.executable, "-c", DRIVER, str(tmp_path), shared, texts]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **own}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = digests(tmp_path / "whole")
    assert len(expected) == 4 * 4
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 4 * 2 + 2
    for folder in folders:
        assert digests(folder) == expected, folder.name
        assert Evaluation.load(folder).is_complete
    logs = [(tmp_path / "two" / f"log-{rank}.txt").read_text() for rank in range(2)]
    assert all("2 of the 4 shards that are left" in log for log in logs)


# ------------------------------------------------------------------------------ settings, methods


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"records": 0}, "records is 0; it should be greater than or equal to 1, or None"),
        ({"rows": []}, "rows is empty or names a row twice"),
        ({"rows": [1, 1]}, "rows is empty or names a row twice"),
        ({"rows": [-1]}, "rows is [-1]; it should be greater than or equal to 0"),
        ({"rows": [0], "records": 1}, "records and rows are both given"),
        ({"edits_at_once": 0}, "edits_at_once is 0"),
        ({"generation_length": -1}, "generation_length is -1"),
        ({"top_k": True}, "top_k is True"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"prepend_bos": 1}, "prepend_bos is 1; it should be a valid boolean, or None"),
        ({"attributes": None}, "attributes is None"),
        ({"denominator": "m"}, "denominator is 'm'; it should be 'n' or 'n-1'"),
        ({"max_tokens": 1}, "max_tokens is 1; it should be greater than or equal to 2"),
        ({"texts": 3}, "texts is 3; it should be a valid string, or None"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"resamples": 0}, "resamples is 0"),
    ],
)
@pytest.mark.usefixtures("as_for_a_user")
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(message)):
        EvaluationConfig(**settings)


@pytest.mark.usefixtures("as_for_a_user")
def test_settings_by_name() -> None:
    with pytest.raises(EvaluationError, match="unknown setting 'record'; allowed: records"):
        EvaluationConfig.from_json({"record": 3})
    config = EvaluationConfig(rows=np.arange(3), records=None, seed=np.int64(4))
    assert config == EvaluationConfig(rows=[0, 1, 2], seed=4)
    assert EvaluationConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_methods_that_are_refused(run, tmp_path: Path) -> None:
    for methods, message in (
        ({"none": Nudge()}, "'none' is the unedited model's own name"),
        ({"a": 3}, "methods has 'a': 3; pass names with methods"),
        ([Nudge()], "pass a method, a mapping of names to methods, or names of presets"),
        ([], "pass a method, a mapping"),
        (7, "methods is 7"),
    ):
        with pytest.raises(EvaluationError, match=re.escape(message)):
            run(methods)
    for methods in ({}, Nudge()):
        for name, given in (("jacobian", "facts"), ("statistics", ["a text"])):
            with pytest.raises(EvaluationError, match=f"{name} is .*, but only presets read it"):
                evaluate("facts", ROWS, tmp_path, methods, progress=False, **{name: given})
    with pytest.raises(EvaluationError, match="the data have no rows"):
        run({}, blt.Records("empty", (), "0"))
    with pytest.raises(EvaluationError, match="config is a dict; pass an EvaluationConfig"):
        evaluate("facts", ROWS, "out", {}, {"records": 3})  # type: ignore[arg-type]


def test_a_single_method_uses_its_own_name(run) -> None:
    found = run(Nudge(), ROWS[2:], n_texts=0)
    assert found.edits()["method"].unique().tolist() == ["none", "Nudge"]


def test_presets_are_trained_on_other_rows_and_saved_in_the_folder(run, tiny, monkeypatch) -> None:
    asked = []

    def preset_methods(model: Any, names: Any, **given: Any) -> dict[str, EditMethod]:
        (given["folder"] / "prepared.bin").write_bytes(b"x")
        asked.append((model, names, given))
        return {"shift": Nudge()}

    monkeypatch.setattr(evaluation_run, "preset_methods", preset_methods)
    again = {**ROWS[1], "prompt": "The king of Messi is", "id": "same subject"}
    found = run(
        "all",
        [*ROWS, again, {**again, "subject": "river", "prompt": "A river is"}],
        rows=(1, 2),
        folder="out",
    )
    [(model, names, given)] = asked
    assert (model, names) == (tiny, ["all"])
    assert [row.subject for row in given.pop("training")] == [None, "river"]
    assert given == {
        "folder": found.folder,
        "prepend_bos": False,
        "texts": None,
        "jacobian": None,
        "progress": False,
    }
    assert found.edits()["method"].unique().tolist() == ["none", "shift"]
    run(["shift", "rome"], rows=[2], n_texts=0)
    assert asked[1][1] == ["shift", "rome"]


# -------------------------------------------------------------------------- command, documentation


@pytest.mark.usefixtures("as_for_a_user")
def test_the_command_prints_the_table(facts_model: Any, tmp_path: Path, monkeypatch, capfd) -> None:
    found = {"nudge": Nudge(layer=6), "failing": Failing(when="Porsche")}
    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: facts_model)
    asked: list[Any] = []

    def preset_methods(*args: Any, **given: Any) -> Any:
        asked.append((given["texts"], given["jacobian"]))
        return found

    monkeypatch.setattr(evaluation_run, "preset_methods", preset_methods)
    argv = ["evaluate", "--model", "facts", "--methods", "all", "--rows", "0:2", "--neighbors",
            "1", "--generation-length", "0", "--n-texts", "2", "--seed", "3", "--statistics",
            "texts.txt", "--jacobian", "lens.pt", "--no-continuations", "--quiet"]  # fmt: skip
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert asked == [("texts.txt", "lens.pt")]
    out, _ = capfd.readouterr()
    done = Evaluation.load(tmp_path / "out")
    assert out.startswith(done.to_markdown())
    assert f"perplexity of facts; tables: {tmp_path / 'out'}" in out
    assert "  failing failed, first at row 0: not this one" in out
    expected = EvaluationConfig(
        rows=(0, 1), neighbors=1, continuations=False, generation_length=0, n_texts=2, seed=3
    )
    assert done.config == expected
    for wrong, message in (
        (["--rows", "4"], "error: --rows 4 is not FIRST:END"),
        (["--top-k", "0"], "error: top_k is 0"),
        (["--seed", "5"], "other settings (config): seed was 3, is 5"),
    ):
        assert cli.main([*argv, *wrong, "--out", str(tmp_path / "out")]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert message in err


def test_the_documentation_has_the_schema() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, columns in TABLES.items():
        section = text.split(f"### `{name}`\n")[1].split("\n### ")[0].split("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+) \|$", section, re.MULTILINE)
        assert rows == [(column.name, column.dtype, column.meaning) for column in columns]


def test_numbers_of_tables_have_one_type(small: Small) -> None:
    found = small.found
    for name in ("edits", "prompts", "generations", "rejects"):
        assert set(getattr(found, name)().columns) >= {column.name for column in TABLES[name]}
    assert str(found.prompts()["is_true"].dtype) == "boolean"
    assert found.prompts()["is_true"].isna().sum() == 4  # of the record without an answer
    assert replace(found.config, seed=1) != found.config
