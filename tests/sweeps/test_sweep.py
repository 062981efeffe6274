"""A sweep's tables against slow computations, and its folder with and without interruption."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shlex
import shutil
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.utils
import datasets
import numpy as np
import pandas as pd
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from models import HAS_BRIDGE, Case, build, nll, small_tokenizer
from stopping import digests, killed, second_of_two
from sweep_cases import ROWS, assert_close
from torch import Tensor, nn

import backward_lens_tl as blt
from backward_lens_tl import cli
from backward_lens_tl.capture.prompts import Prompt
from backward_lens_tl.data.records import Record, Records
from backward_lens_tl.errors import (
    BackwardLensError,
    BackwardLensWarning,
    InputError,
    SweepError,
    UnsupportedModelError,
)
from backward_lens_tl.models import loading
from backward_lens_tl.runs import distributed, rejects
from backward_lens_tl.runs import run as run_module
from backward_lens_tl.runs.distributed import own_device
from backward_lens_tl.sweeps import measuring
from backward_lens_tl.sweeps.columns import TABLES
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.run import Sweep

BAD = [
    ("row", {"prompt": "Rome is in"}),
    ("target", {"prompt": "Rome is in", "target": " Italy"}),
    ("row", "no mapping"),
    ("subject", {"prompt": "Rome is in", "target": " the", "subject": "Paris"}),
    ("length", {"prompt": "the " * 80, "target": " the"}),
    ("target", {"prompt": "Rome is in", "target": 97}),
    ("row", {"prompt": 7, "target": " the"}),
    ("row", {"prompt": "", "target": " the"}),
    ("row", None),
    ("row", {"prompt": "Rome \ud800", "target": " the"}),
    ("row", {"prompt": "Rome is", "target": " the", "subject": "is", "subject_start": 0}),
]
"""Rows that cannot be analysed, with reasons."""

KEYS = ["prompt", "matrix", "layer", "position", "projection"]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    """A random model in float64, of an available class."""
    return build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2").model


@pytest.fixture
def swept(tiny: nn.Module, tmp_path: Path) -> Callable[..., Sweep]:
    """Run sweeps of small data into separate folders."""

    def run(
        rows: Any = ROWS, folder: str | None = None, model: nn.Module | None = None, **settings: Any
    ) -> Sweep:
        out = tmp_path / (folder or f"sweep-{len(list(tmp_path.iterdir()))}")
        return blt.sweep(model or tiny, rows, out, SweepConfig(**settings), progress=False)

    return run


@pytest.fixture(scope="module")
def plain(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """`ROWS` in one shard, which many tests inspect."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return blt.sweep(tiny, ROWS, out, SweepConfig(layers=0), progress=False)


@pytest.fixture(scope="module")
def in_shards(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Sweep]:
    """Good rows among bad ones, by the size of a shard.

    Computed with the run-time type checks on, if they are on.
    """
    names = [column.name for column in TABLES["gradients"]]
    found = {}
    for size in (2, 64):
        config = SweepConfig(layers=0, shard_size=size, gradient_columns=names)
        out = tmp_path_factory.mktemp("shards") / "out"
        found[size] = blt.sweep(tiny, mixed()[0], out, config, progress=False)
    return found


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, facts_model: nn.Module) -> None:
    """Give the command the loaded facts model, so that it does not load one."""
    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: facts_model)


def mixed() -> tuple[list[Any], dict[int, str]]:
    """Good rows among bad ones, and the reason for each bad row."""
    rows: list[Any] = []
    reasons: dict[int, str] = {}
    for place in range(max(len(ROWS), len(BAD))):
        if place < len(BAD):
            reason, row = BAD[place]
            reasons[len(rows)] = reason
            rows.append(row)
        rows += ROWS[place : place + 1]
    return rows, reasons


def fail_on(
    monkeypatch: pytest.MonkeyPatch, failing: Callable[[Sequence[str]], BaseException | None]
) -> list[list[str]]:
    """Make the lens fail on some prompts; return the prompts of each call."""
    real, calls = measuring.backward_lens, []

    def lens(model: nn.Module, prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        calls.append(prompts)
        error = failing(prompts)
        if error is not None:
            raise error
        return real(model, prompts, *args, **kwargs)

    monkeypatch.setattr(measuring, "backward_lens", lens)
    return calls


# -------------------------------------------------------------------------- every row, exactly once


@pytest.mark.parametrize("shard_size", [2, 64])
def test_every_row_is_analysed_or_rejected_with_a_reason(
    in_shards: dict[int, Sweep], shard_size: int
):
    rows, reasons = mixed()
    found = in_shards[shard_size]
    prompts, rejects = found.prompts(), found.rejects()
    assert found.is_complete
    assert found.n_shards == -(-len(rows) // shard_size)
    assert sorted([*prompts["prompt"], *rejects["prompt"]]) == list(range(len(rows)))
    assert dict(zip(rejects["prompt"], rejects["reason"], strict=True)) == reasons
    assert rejects["problem"].str.len().min() > 10
    good = [place for place in range(len(rows)) if place not in reasons]
    assert prompts["prompt"].tolist() == good
    assert prompts["id"].tolist() == [row["id"] for row in ROWS]
    for table in (found.gradients(), found.positions()):
        assert table["prompt"].drop_duplicates().tolist() == good
        assert not table.duplicated([key for key in KEYS if key in table]).any()


@pytest.mark.usefixtures("as_for_a_user")
def test_reasons_specific_to_records(swept):
    def record(index: int, **values: Any) -> Record:
        usual = Record(index, str(index), "Rome is in", " the", None, None, None)
        return replace(usual, **values)

    rows = (record(0, prompt=""), record(1), record(2, subject="is", subject_start=5))
    found = swept(Records("own", rows, "0"), layers=0)
    assert found.rejects()[["prompt", "reason"]].to_numpy().tolist() == [[0, "prompt"]]
    assert found.prompts()["prompt"].tolist() == [1, 2]


@pytest.mark.usefixtures("as_for_a_user")
def test_a_target_without_its_space_is_warned_of_once(swept, facts_model):
    rows = [{"prompt": "Lionel Messi was", "target": target} for target in (" The", "The", "The")]
    with pytest.warns(BackwardLensWarning, match="target 'The' of prompt 1 is read") as warned:
        swept(rows, model=facts_model, layers=0)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackwardLensWarning)
        swept(rows[:1], model=facts_model, layers=0)


def test_data_without_usable_rows_are_swept(swept):
    found = swept([row for _, row in BAD], shard_size=4)
    assert found.is_complete
    assert len(found.rejects()) == len(BAD)
    assert len(found.prompts()) == len(found.positions()) == len(found.gradients()) == 0


@pytest.mark.usefixtures("as_for_a_user")
def test_a_sample_of_the_rows(swept):
    rows = [{**row, "id": f"{n}"} for n in range(2) for row in mixed()[0] if isinstance(row, dict)]

    def chosen(**settings: Any) -> list[int]:
        found = swept(rows, layers=0, position_columns=(), gradient_columns=(), **settings)
        both = [*found.prompts()["prompt"], *found.rejects()["prompt"]]
        assert len(both) == len(set(both))
        assert set(both) <= set(range(len(rows)))
        return sorted(both)

    first = chosen(prompts=10, seed=1)
    assert len(first) == 10
    assert first != list(range(10))
    assert chosen(prompts=10, seed=1, shard_size=3) == first
    assert chosen(prompts=10, seed=2) != first
    assert len(chosen(prompts=1000)) == len(rows)


# ------------------------------------------------------------------------- prompts that fail to run


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    "error",
    [
        InputError("too odd"),
        torch.OutOfMemoryError("too large"),
        MemoryError("too large"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_prompt_that_fails_is_rejected_alone(swept, plain, monkeypatch, error: Exception):
    bad = ROWS[1]["prompt"]
    fail_on(monkeypatch, lambda prompts: error if bad in prompts else None)
    found = swept(ROWS[:3], layers=0)
    [reject] = found.rejects().to_dict("records")
    assert reject == {"prompt": 1, "id": "r", "reason": "numbers", "problem": str(error)}
    for name in ("prompts", "gradients", "positions"):
        expected, left = getattr(plain, name)(), getattr(found, name)()
        expected = expected[expected["prompt"].isin([0, 2])].reset_index(drop=True)
        # Single and joint runs differ by rounding.
        assert_close(left, expected)


@pytest.mark.usefixtures("as_for_a_user")
def test_a_bug_does_not_reject_prompts(swept, monkeypatch):
    fail_on(monkeypatch, lambda prompts: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        swept(layers=0)


@pytest.mark.usefixtures("as_for_a_user")
def test_a_prompt_too_long_for_the_budget_is_rejected_alone(swept):
    rows = [*ROWS, {"prompt": "the " * 60, "target": " the"}]
    found = swept(rows, layers=0, memory=blt.Memory(budget=1_200_000), shard_size=2)
    [reject] = found.rejects().to_dict("records")
    assert (reject["prompt"], reject["reason"]) == (5, "numbers")
    assert "the budget is" in reject["problem"]
    assert len(found.prompts()) == len(ROWS)


@pytest.mark.usefixtures("as_for_a_user")
def test_only_prompts_of_the_shard_that_fails_run_alone(swept, monkeypatch):
    bad = "Messi plays"
    calls = fail_on(monkeypatch, lambda prompts: InputError("odd") if bad in prompts else None)
    found = swept(layers=0, shard_size=2)
    assert [len(call) for call in calls] == [2, 1, 1, 2, 1]
    assert found.rejects()["prompt"].tolist() == [2]


@pytest.mark.usefixtures("as_for_a_user")
def test_memory_of_the_failed_pass_is_free_before_prompts_run_alone(swept, monkeypatch):
    real, held, alive = measuring.backward_lens, [], []

    def lens(model: nn.Module, prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        if len(prompts) > 1:
            large = torch.zeros(10)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("too large")
        alive.append(held[0]() is not None)
        return real(model, prompts, *args, **kwargs)

    monkeypatch.setattr(measuring, "backward_lens", lens)
    assert len(swept(layers=0).prompts()) == len(ROWS)
    assert alive == [False] * len(ROWS)


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("first", [None, InputError("odd")])
def test_a_model_that_cannot_be_analysed_stops_the_sweep(swept, monkeypatch, first):
    error = UnsupportedModelError("an odd model")
    fail_on(monkeypatch, lambda prompts: first or error if len(prompts) > 1 else error)
    with pytest.raises(UnsupportedModelError, match="an odd model"):
        swept(folder="out")
    monkeypatch.undo()
    assert swept(folder="out").is_complete


# ---------------------------------------------------------------------- values, by slow computation


def slow_factors(
    case: Case, ids: Tensor, target: int
) -> tuple[dict[tuple[str, int], tuple[Tensor, Tensor]], Tensor]:
    """`x_i` and autograd's `delta_i` of the reference model, and its last logits."""
    inputs: dict[Any, Tensor] = {}
    outputs: dict[Any, Tensor] = {}
    handles = []

    def before(key: Any) -> Any:
        return lambda module, args: inputs.__setitem__(key, args[0].detach()[0])

    def after(held: dict[Any, Tensor], key: Any) -> Any:
        return lambda module, args, output: held.__setitem__(key, output)

    for (matrix, layer), module in case.outputs.items():
        handles.append(module.register_forward_hook(after(outputs, (matrix, layer))))
        mlp = case.outputs["W_out", layer]
        is_hooked = hasattr(mlp, "hook_post")
        if is_hooked and matrix == "W_out":
            hook = after(inputs, (matrix, layer))
            handles.append(mlp.hook_post.register_forward_hook(hook))
        else:
            owner = mlp if is_hooked else module
            handles.append(owner.register_forward_pre_hook(before((matrix, layer))))
    with torch.enable_grad():
        logits = case.logits(ids)
        loss = nll(target)(logits, ids).sum()
        keys = [key for key in case.weights if key in outputs]
        gradients = torch.autograd.grad(loss, [outputs[key] for key in keys])
    for handle in handles:
        handle.remove()
    factors = {
        key: (inputs[key].detach().reshape(-1, inputs[key].shape[-1]), delta[0])
        for key, delta in zip(keys, gradients, strict=True)
    }
    return factors, logits[0, -1].detach()


def assert_rank(found: object, scores: Tensor, token: int) -> None:
    """Compare ranks up to tokens that float32 rounding could move across."""
    margin = 1e-5 * float(scores.abs().max())
    above = int((scores > scores[token] + margin).sum())
    level = int((scores > scores[token] - margin).sum()) - 1
    assert above <= int(found) <= level


def assert_ends(tokens: Any, values: Any, scores: Tensor, texts: list[str]) -> None:
    """Compare the first tokens of an order; of two equal scores either may come first."""
    best = scores.sort(descending=True, stable=True)
    k = len(values)
    torch.testing.assert_close(
        torch.tensor(np.array(values)), best.values[:k].float(), rtol=1e-5, atol=1e-5
    )
    gaps = (best.values[:k] - best.values[1 : k + 1]) > 1e-4
    for place in range(k):
        if gaps[place] and (place == 0 or gaps[place - 1]):
            assert tokens[place] == texts[int(best.indices[place])]


def slow_segments(case: Case, row: dict[str, Any], ids: list[int]) -> list[str | None]:
    """Segments by the tokenizer's offsets, with the paper's names."""
    if "subject" not in row:
        return [None] * len(ids)
    text, encoding = row["prompt"], small_tokenizer()(row["prompt"], return_offsets_mapping=True)
    shift = len(ids) - len(encoding["input_ids"])
    start = text.index(row["subject"])
    end = start + len(row["subject"])
    inside = [
        shift + at
        for at, (left, right) in enumerate(encoding["offset_mapping"])
        if left < end and right > start
    ]
    names: list[str | None] = ["before subject"] * inside[0]
    names += ["middle subject tokens"] * len(inside)
    names += ["after subject"] * (len(ids) - len(names))
    names[inside[0]] = "first subject token"
    names[inside[-1]] = "last subject token"
    names[-1] = "last token"
    return names


def check_values(case: Case, found: Sweep, rows: list[dict[str, Any]]) -> None:
    """Check every column of every row, one prompt at a time, with the reference model only."""
    tokenizer = small_tokenizer()
    prompts, gradients, positions = found.prompts(), found.gradients(), found.positions()
    assert len(prompts) == len(rows)
    top = case.n_layers - 1
    close = {"rel": 1e-5, "abs": 1e-7}  # columns of float32; HF's RMS norms round to it, too
    for prompt, row in enumerate(rows):
        ids = tokenizer.encode(row["prompt"], add_special_tokens=False)
        ids = [tokenizer.bos_token_id, *ids]
        target = row["target"]
        target = target if isinstance(target, int) else tokenizer.encode(target)[-1]
        factors, logits = slow_factors(case, torch.tensor([ids]), target)
        texts = [tokenizer.decode([token]) for token in range(case.d_vocab)]
        answer = int(logits.argmax())
        loss = float(-torch.log_softmax(logits.double(), -1)[target])
        true = row.get("answer")
        is_first = None if true is None else answer == tokenizer.encode(true)[0]
        assert prompts.iloc[prompt].replace({np.nan: None}).to_dict() == {
            "prompt": prompt,
            "id": row["id"],
            "text": row["prompt"],
            "subject": row.get("subject"),
            "target": texts[target],
            "target_id": target,
            "answer": texts[answer],
            "answer_id": answer,
            "true_answer": true,
            "is_correct": is_first,
            "n_tokens": len(ids),
            "loss": pytest.approx(loss, **close),
        }
        segments = slow_segments(case, row, ids)
        top_vjp = factors["W_out", top][1][-1]
        own = gradients[gradients["prompt"] == prompt].set_index(["matrix", "layer"])
        assert sorted(own.index) == sorted(factors)
        cells = positions[positions["prompt"] == prompt].set_index(KEYS[1:]).to_dict("index")
        assert len(cells) == len(factors) * len(ids) * 2
        for (matrix, layer), (x, delta) in factors.items():
            lengths = delta.norm(dim=-1)
            writes = lengths > 1e-12 * lengths.max()
            values = torch.linalg.svdvals(x.T @ delta)
            shares = values.square() / values.square().sum()
            line = own.loc[(matrix, layer)]
            assert line["is_last_layer"] == (layer == top)
            assert line["n_tokens"] == len(ids)
            assert line["n_writing"] == int(writes.sum())
            assert line["loss"] == pytest.approx(loss, **close)
            assert line["rank"] == int((values > 1e-9 * values[0]).sum())
            assert line["largest_rank"] == min(int(writes.sum()), x.shape[1], delta.shape[1])
            assert line["input_rank"] == int(torch.linalg.matrix_rank(x, rtol=1e-9))
            assert line["vjp_rank"] == int(torch.linalg.matrix_rank(delta, rtol=1e-9))
            assert line["norm"] == pytest.approx(float((x.T @ delta).norm()), **close)
            assert line["top_energy"] == pytest.approx(float(shares[0]), **close)
            assert line["rank_99"] == 1 + int((shares.cumsum(0) < 0.99).sum())
            listed = np.array(line["singular_values"])
            expected = values.numpy()
            assert np.allclose(listed, expected[: len(listed)], rtol=1e-5, atol=1e-7)
            assert expected[len(listed) :].max(initial=0) < 1e-9 * expected[0]
            raw = delta if matrix == "W_out" else x
            sign = -1 if matrix == "W_out" and found.config.direction == "update" else 1
            for lens in ("logit_lens", "normalized"):
                vectors = raw / raw.norm(dim=-1, keepdim=True) if lens == "normalized" else raw
                for place in range(len(ids)):
                    cell = cells[matrix, layer, place, lens]
                    assert cell["token"] == texts[ids[place]]
                    held = cell["segment"]
                    assert (None if pd.isna(held) else held) == segments[place]
                    assert cell["norm"] == pytest.approx(float(lengths[place]), **close)
                    assert cell["input_norm"] == pytest.approx(float(x[place].norm()), **close)
                    written = float(x[place].outer(delta[place]).norm())
                    assert cell["write_norm"] == pytest.approx(written, **close)
                    assert cell["is_zero"] == (not writes[place])
                    if float(raw[place].norm()) > 0:
                        cosine = torch.cosine_similarity(raw[place], top_vjp, dim=0)
                        assert cell["top_vjp_cosine"] == pytest.approx(float(cosine), abs=1e-5)
                    if not writes[place]:
                        assert pd.isna(cell["target_rank"])
                        assert pd.isna(cell["answer_rank"])
                        assert pd.isna(cell["entropy"])
                        assert all(len(cell[f"{end}_tokens"]) == 0 for end in ("top", "bottom"))
                        continue
                    scores = case.lens(sign * vectors[place][None])[0].double()
                    logs = torch.log_softmax(scores, -1)
                    entropy = float(-(logs.exp() * logs).sum())
                    assert cell["entropy"] == pytest.approx(entropy, rel=1e-4, abs=1e-5)
                    assert_rank(cell["target_rank"], scores, target)
                    assert_rank(cell["answer_rank"], scores, answer)
                    assert_ends(cell["top_tokens"], cell["top_scores"], scores, texts)
                    lowest = -np.array(cell["bottom_scores"])
                    assert_ends(cell["bottom_tokens"], lowest, -scores, texts)
                    assert len(cell["top_tokens"]) == len(cell["bottom_tokens"]) == found.config.k


@pytest.mark.usefixtures("as_for_a_user")
def test_every_column_against_the_reference_model(gpt2: Case, tmp_path: Path):
    config = SweepConfig(
        projection=("logit_lens", "normalized"),
        k=3,
        shard_size=3,
        prepend_bos=True,
        gradient_columns=[column.name for column in TABLES["gradients"]],
    )
    check_values(gpt2, blt.sweep(gpt2.model, ROWS, tmp_path, config, progress=False), ROWS)


@pytest.mark.usefixtures("as_for_a_user")
def test_every_column_of_a_gated_model(llama: Case, tmp_path: Path):
    """Also of the gradient instead of the update."""
    config = SweepConfig(
        matrices="mlp",
        projection=("normalized", "logit_lens"),
        direction="gradient",
        k=3,
        prepend_bos=True,
        gradient_columns=[column.name for column in TABLES["gradients"]],
    )
    rows = ROWS[1:3]
    check_values(llama, blt.sweep(llama.model, rows, tmp_path, config, progress=False), rows)


@pytest.mark.usefixtures("as_for_a_user")
def test_faint_vectors_are_those_below_the_final_norms_eps(swept):
    cells = swept(projection=("logit_lens", "normalized")).positions()
    is_lens = cells["projection"] == "logit_lens"
    spanning = cells["norm"].where(cells["matrix"] == "W_out", cells["input_norm"])
    shortest = (1e-5 * 24) ** 0.5  # a variance of GPT-2's eps over 24 dimensions
    expected = is_lens & ~cells["is_zero"] & (spanning < shortest)
    assert cells["is_faint"].tolist() == expected.tolist()


@pytest.mark.usefixtures("as_for_a_user")
def test_no_cosine_without_w_out_of_the_last_layer(swept):
    for settings in ({"layers": (0, 1)}, {"matrices": "W_in"}):
        assert swept(ROWS[2:3], **settings).positions()["top_vjp_cosine"].isna().all()
    found = swept(ROWS[2:3], matrices="W_out", layers=-1)
    assert found.positions()["top_vjp_cosine"].notna().any()


# ------------------------------------------------------------------- shards and order do not matter


@pytest.mark.usefixtures("as_for_a_user")
def test_numbers_do_not_depend_on_shards_or_the_order_of_rows(swept):
    whole, alone = swept(layers=(0, -1)), swept(layers=(0, -1), shard_size=1)
    backwards = swept(ROWS[::-1], layers=(0, -1), shard_size=2)
    for name in ("prompts", "gradients", "positions"):
        table = getattr(whole, name)()
        assert_close(getattr(alone, name)(), table)
        turned = getattr(backwards, name)()
        turned["prompt"] = len(ROWS) - 1 - turned["prompt"]
        turned = turned.sort_values("prompt", kind="stable", ignore_index=True)
        if name == "prompts":
            assert turned["id"].tolist() == table["id"].tolist()
        assert_close(turned, table)


# ---------------------------------------------------------------------------------- columns, schema

SCHEMA = {
    "positions": """prompt int64, matrix string, layer int32, position int32, token string,
        segment string, projection string, norm float, input_norm float, write_norm float,
        top_vjp_cosine float, is_zero bool, is_faint bool, target_rank int32, answer_rank int32,
        entropy float,
        top_tokens list<element: string>, top_scores list<element: float>,
        bottom_tokens list<element: string>, bottom_scores list<element: float>""",
    "gradients": """prompt int64, matrix string, layer int32, is_last_layer bool, n_tokens int32,
        n_writing int32, loss double, rank int32, largest_rank int32, input_rank int32,
        vjp_rank int32, norm double, top_energy double, rank_99 int32,
        singular_values list<element: double>""",
    "rejects": "prompt int64, id string, reason string, problem string",
    "prompts": """prompt int64, id string, text string, subject string, target string,
        target_id int64, answer string, answer_id int64, true_answer string, is_correct bool,
        n_tokens int32, loss double""",
}


def test_the_schema_is_the_same_in_every_shard_empty_or_not(in_shards: dict[int, Sweep]):
    found = in_shards[2]
    for table, expected in SCHEMA.items():
        counts = []
        for file in sorted((found.folder / table).iterdir()):
            schema = pq.read_schema(file)
            # The name of a list's element is the library's.
            found_schema = re.sub(
                r"<\w+: ", "<element: ", ", ".join(f"{f.name} {f.type}" for f in schema)
            )
            assert found_schema == " ".join(expected.split())
            counts.append(pq.read_metadata(file).num_rows)
        assert len(counts) == found.n_shards > 2
        assert table == "rejects" or 0 in counts, "the test is to have a shard without rows"
        assert max(counts) > 0


@pytest.mark.usefixtures("as_for_a_user")
def test_singular_values_are_saved_only_on_request(swept, plain):
    assert "singular_values" not in plain.gradients()
    found = swept(ROWS[:1], layers=0, gradient_columns=["singular_values"])
    assert list(found.gradients()) == ["prompt", "matrix", "layer", "singular_values"]


@pytest.mark.usefixtures("as_for_a_user")
def test_each_single_column_equals_that_of_the_whole_table(swept):
    """One column of each table at a time."""
    settings: dict[str, Any] = {"layers": -1, "matrices": "W_out"}
    rows = ROWS[2:3]
    whole = swept(rows, **settings)
    names = [
        [column.name for column in TABLES[table] if column.is_default and not column.is_key]
        for table in ("positions", "gradients")
    ]
    for pair in itertools.zip_longest(*names):
        given = [() if name is None else (name,) for name in pair]
        found = swept(rows, **settings, position_columns=given[0], gradient_columns=given[1])
        for table, name in zip(("positions", "gradients"), pair, strict=True):
            if name is None:
                continue
            keys = [column.name for column in TABLES[table] if column.is_key]
            own = getattr(found, table)()
            assert list(own) == [*keys, name]
            assert_close(own, getattr(whole, table)()[[*keys, name]])


@pytest.mark.usefixtures("as_for_a_user")
def test_omitted_tables(swept):
    found = swept(layers=0, position_columns=(), gradient_columns=[])
    assert found.is_complete
    assert len(found.prompts()) == len(ROWS)
    for name in ("positions", "gradients"):
        assert not list((found.folder / name).iterdir())
        with pytest.raises(SweepError, match=f"no table of {name}: its settings leave"):
            getattr(found, name)()


def test_reading_chosen_columns(plain: Sweep):
    assert list(plain.positions(["entropy", "norm"])) == [
        *("prompt", "matrix", "layer", "position", "token", "segment", "projection"),
        *("norm", "entropy"),
    ]
    assert list(plain.gradients([])) == ["prompt", "matrix", "layer"]
    with pytest.raises(SweepError, match=r"no column 'nope'; it has prompt, matrix, .*entropy"):
        plain.positions(["nope"])
    with pytest.raises(SweepError, match="no column 'singular_values'; it has"):
        plain.gradients(["singular_values"])


def test_dtypes_do_not_depend_on_shards_without_rows(in_shards: dict[int, Sweep]):
    one, many = in_shards[64], in_shards[2]
    for name in ("prompts", "rejects", "gradients", "positions"):
        tables = getattr(one, name)(), getattr(many, name)()
        assert dict(tables[0].dtypes.astype(str)) == dict(tables[1].dtypes.astype(str)), name
    assert str(one.prompts()["is_correct"].dtype) == "boolean"
    assert str(one.positions()["target_rank"].dtype) == "Int64"


def test_other_readers_of_the_folder_see_the_same_rows(in_shards: dict[int, Sweep], tmp_path: Path):
    found = Sweep.load(shutil.copytree(in_shards[2].folder, tmp_path / "copy"))
    for table in TABLES:
        folder = found.folder / table
        (folder / ".0f.partial.shard-000000.parquet").write_bytes(b"half a file")
        n_rows = len(getattr(found, table)())
        assert len(pd.read_parquet(folder)) == n_rows
        assert pads.dataset(folder).count_rows() == n_rows
    entropies = pads.dataset(found.folder / "positions").to_table(
        columns=["entropy"], filter=pads.field("position") == 0
    )
    assert entropies.num_rows == (found.positions()["position"] == 0).sum()


def test_the_documentation_has_the_schema():
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    shards = re.findall(r"^### `(\w+)`(.*?)(?=^##|\Z)", page, flags=re.M | re.S)
    assert [name for name, _ in shards] == list(TABLES)[::-1]
    for name, text in shards:
        lines = re.findall(r"^\| `(\w+)` \| `([\w<>]+)` \| (.+) \|$", text, flags=re.M)
        expected = [
            (
                column.name,
                column.dtype,
                column.meaning + ("" if column.is_default else " (only if selected)"),
            )
            for column in TABLES[name]
        ]
        assert lines == expected


# ------------------------------------------------------------------------------ ------- resuming


@pytest.fixture(scope="module")
def whole(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """An uninterrupted sweep of three shards."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return blt.sweep(tiny, ROWS, out, SweepConfig(**THREE_SHARDS), progress=False)


THREE_SHARDS: dict[str, Any] = {"layers": -1, "matrices": "W_out", "k": 2, "shard_size": 2}


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("moment", "when"),
    [(0, "written"), (0, "placed"), (2, "written"), (4, "written"), (4, "placed"), (10, "placed")],
)
def test_killed_at_any_file_it_resumes_with_the_same_result(
    swept, whole: Sweep, tmp_path: Path, moment: int, when: str
):
    """Kill at `run.json`, and at some of the four tables of each of three shards."""
    out = tmp_path / "out"
    killed(lambda: swept(folder="out", **THREE_SHARDS), moment, when)
    n_shards = max(0, (moment - (when == "written")) // 4)
    finished = [file for n in range(n_shards) for file in out.glob(f"*/shard-{n:06d}.parquet")]
    assert len(finished) == 4 * n_shards
    if (out / "run.json").exists():
        half = Sweep.load(out)
        assert half.finished == tuple(range(n_shards))
        assert not half.is_complete
        assert f"{n_shards} of 3 shards" in repr(half)
        assert len(half.prompts()) + len(half.rejects()) == 2 * n_shards
        assert len(half.positions()) == len(half.positions(["norm"]))
    before = {file: file.stat().st_mtime_ns for file in finished}
    assert swept(folder="out", **THREE_SHARDS).is_complete
    assert digests(out) == digests(whole.folder)
    assert {file: file.stat().st_mtime_ns for file in finished} == before


@pytest.mark.usefixtures("as_for_a_user")
def test_a_process_analyses_its_share(swept, whole: Sweep, monkeypatch):
    """Run the second of two processes; later, one process does the first one's share."""
    with monkeypatch.context() as patched:
        second = second_of_two()
        patched.setattr(run_module, "this_process", lambda: second)
        found = swept(folder="out", **THREE_SHARDS)
        assert found.finished == (1,)
        assert len(second.waits) == 2
    assert "process 1 of 2: 1 of the 3 shards" in (found.folder / "log-1.txt").read_text()
    assert digests(swept(folder="out", **THREE_SHARDS).folder) == digests(whole.folder)


@pytest.mark.usefixtures("as_for_a_user")
def test_a_complete_sweep_is_not_recomputed(swept, monkeypatch):
    first = swept(folder="out", layers=0)
    calls = fail_on(monkeypatch, lambda prompts: InputError("called"))
    before = digests(first.folder)
    assert len(swept(folder="out", layers=0).prompts()) == len(ROWS)
    assert not calls
    assert digests(first.folder) == before


@pytest.mark.usefixtures("as_for_a_user")
def test_only_the_same_sweep_is_resumed(swept, tiny: nn.Module):
    swept(folder="out", layers=0)
    other = build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2", seed=1).model
    changed = [*ROWS[:-1], {**ROWS[-1], "target": 41}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": 1}, r"other settings \(config\): layers was \[0\], is \[1\]"),
        ({"layers": 0, "k": 4}, r"other settings \(config\): k was 10, is 4"),
        ({"layers": 0, "shard_size": 2}, r"other settings \(config\): shard_size was 64, is 2"),
        ({"layers": 0, "model": other}, r"other settings \(model\): sha256 was"),
        ({"layers": 0, "rows": changed}, r"other settings \(data\): sha256 was"),
        ({"layers": 0, "rows": ROWS[:-1]}, r"other settings \(data\): rows was 5, is 4"),
        ({"layers": 0, "rows": ROWS[::-1]}, r"other settings \(data\): sha256 was"),
    ]
    for arguments, message in cases:
        with pytest.raises(SweepError, match=message) as caught:
            swept(folder="out", **arguments)
        assert "choose another folder" in str(caught.value)
    assert swept(folder="out", layers=(0,)).is_complete  # the same, written another way


@pytest.mark.usefixtures("as_for_a_user")
def test_other_tokens_of_the_same_texts_are_not_resumed(swept, tiny: nn.Module, monkeypatch):
    """As when the model's default for BOS or its tokenizer has changed."""
    swept(folder="out", layers=0)
    tokenized = rejects.tokenize_prompts

    def with_bos(host: Any, prompts: Any, prepend_bos: Any) -> list[Prompt]:
        return [
            replace(own, ids=(0, *own.ids), spans=((0, 0), *own.spans))
            for own in tokenized(host, prompts, prepend_bos)
        ]

    monkeypatch.setattr(rejects, "tokenize_prompts", with_bos)
    with pytest.raises(SweepError, match=r"other settings \(tokens\): sha256 was"):
        swept(folder="out", layers=0)


@pytest.mark.usefixtures("as_for_a_user")
def test_shards_without_run_json_are_refused(swept):
    found = swept(folder="out", layers=0)
    (found.folder / "run.json").unlink()
    with pytest.raises(SweepError, match=r"has shards of a sweep but no run\.json"):
        swept(folder="out", layers=1)


@pytest.mark.usefixtures("as_for_a_user")
def test_a_damaged_shard_is_named(swept):
    found = swept(layers=0, shard_size=2)
    (found.folder / "positions" / "shard-000001.parquet").write_bytes(b"")
    with pytest.raises(SweepError, match=r"a shard of '.*positions' is damaged: .*Delete the"):
        found.positions()
    assert len(found.prompts()) == len(ROWS)


@pytest.mark.usefixtures("as_for_a_user")
def test_a_sweep_of_moved_data_is_resumed(swept, tmp_path: Path):
    for name in ("here.jsonl", "there.jsonl"):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    first = swept(tmp_path / "here.jsonl", folder="out", layers=0)
    again = swept(tmp_path / "there.jsonl", folder="out", layers=0)
    assert again.about["data"]["name"] == first.about["data"]["name"]  # with its original settings


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("name", ["torch", "backward-lens-tl"])
def test_another_version_is_not_resumed(swept, name: str):
    found = swept(folder="out", layers=0)
    file = found.folder / "run.json"
    run = json.loads(file.read_text())
    run["versions"][name] = "0.0.0"
    file.write_text(json.dumps(run))
    with pytest.raises(SweepError, match=rf"other settings \(versions\): {name} was '0.0.0', is "):
        swept(folder="out", layers=0)


@pytest.mark.usefixtures("as_for_a_user")
def test_a_shard_without_its_last_table_is_rewritten(swept):
    """The state after a kill between two tables of a shard."""
    found = swept(folder="out", layers=0, shard_size=2)
    before = digests(found.folder)
    (found.folder / "prompts" / "shard-000001.parquet").unlink()
    (found.folder / "rejects" / "shard-000001.parquet").unlink()
    (found.folder / "gradients" / "shard-000001.parquet").write_bytes(b"half")
    left = found.folder / "gradients" / ".0f.partial.shard-000001.parquet"
    left.write_bytes(b"half")
    assert Sweep.load(found.folder).finished == (0, 2)
    again = swept(folder="out", layers=0, shard_size=2)
    assert digests(again.folder) == before
    assert not left.exists()


@pytest.mark.usefixtures("as_for_a_user")
def test_folders_of_something_other_than_a_sweep(swept, tiny: nn.Module, tmp_path: Path):
    with pytest.raises(SweepError, match="is not the folder of a sweep"):
        Sweep.load(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    with pytest.raises(SweepError, match="is not the folder of a sweep"):
        Sweep.load(broken)
    for text in ("[1]", "{}", "3"):
        (broken / "run.json").write_text(text)
        with pytest.raises(SweepError, match="is not the folder of a sweep"):
            Sweep.load(broken)
    (broken / "run.json").write_text('{"format": 1, "versions": {"backward-lens-tl": "0.0.1"}}')
    message = r"has format 1, but this version reads \d; install backward-lens-tl 0\.0\.1, which"
    with pytest.raises(SweepError, match=message):
        Sweep.load(broken)
    with pytest.raises(SweepError, match=message):
        swept(folder="broken")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(SweepError, match="cannot be created"):
        swept(folder="file")
    assert file.read_text() == "mine"
    with pytest.raises(SweepError, match="path is None"):
        blt.sweep(tiny, ROWS, None)  # type: ignore[arg-type]


def test_an_error_of_the_first_process_ends_the_others(monkeypatch: pytest.MonkeyPatch):
    """`test_sweep_processes.py` has the same with two processes."""
    sent: list[Any] = []
    done: list[str] = []

    def in_process(is_main: bool, received: str | None, action: Any) -> Any:
        def broadcast(objects: list[Any]) -> list[Any]:
            sent.extend(objects)
            return objects if is_main else [received]

        state = SimpleNamespace(is_main_process=is_main)
        monkeypatch.setattr(distributed, "this_process", lambda: state)
        monkeypatch.setattr(accelerate.utils, "broadcast_object_list", broadcast)
        return distributed.in_turn(action, SweepError)

    def failing() -> None:
        raise OSError("no room\nat all")

    with pytest.raises(OSError, match="no room"):
        in_process(True, None, failing)
    assert sent.pop() == "no room at all"
    with pytest.raises(SweepError, match=r"^the first process failed: no room at all\n"):
        in_process(False, "no room at all", lambda: done.append("other"))
    assert done == []
    assert in_process(True, None, lambda: 1) == in_process(False, None, lambda: 1) == 1
    assert sent == [None, None, None]


# ------------------------------------------------------------------------------------ run.json, log


@pytest.mark.usefixtures("as_for_a_user")
def test_run_json_describes_the_sweep(swept, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my script", "--fast"])
    found = swept(seed=7, prompts=4, layers=(0, -1))
    run = json.loads((found.folder / "run.json").read_text())
    assert run == found.about
    assert run["config"]["seed"] == 7
    assert run["config"]["layers"] == [0, -1]
    assert shlex.split(run["command"]) == ["my script", "--fast"]
    assert run["model"]["n_layers"] == 3
    assert run["data"]["rows"] == len(ROWS)
    assert all(re.fullmatch("[0-9a-f]{64}", run[name]["sha256"]) for name in ("model", "data"))
    assert run["versions"]["torch"] == torch.__version__
    assert {"backward-lens-tl", "transformer-lens", "pyarrow"} <= set(run["versions"])
    assert found.config == SweepConfig(seed=7, prompts=4, layers=(0, -1))
    assert SweepConfig.load(found.folder / "run.json") == found.config
    log = (found.folder / "log-0.txt").read_text()
    assert "shard 0: 120 positions, 16 gradients, 0 rejects, 4 prompts in " in log


@pytest.mark.usefixtures("as_for_a_user")
def test_fingerprints_change_with_one_bit_of_model_or_data(swept, plain):
    settings: dict[str, Any] = {"layers": 0, "position_columns": (), "gradient_columns": ()}
    same = swept([dict(row) for row in ROWS], **settings)
    assert plain.about["data"]["sha256"] == same.about["data"]["sha256"]
    assert plain.about["model"] == same.about["model"]
    changed = swept([{**ROWS[0], "id": "F"}, *ROWS[1:]], **settings)
    assert plain.about["data"]["sha256"] != changed.about["data"]["sha256"]
    case = build(f"{'bridge' if HAS_BRIDGE else 'hooked'}-gpt2")
    with torch.no_grad():
        case.own["W_in", 0].tensor[0, 0] += 1e-15
    other = swept(model=case.model, **settings)
    assert plain.about["model"]["sha256"] != other.about["model"]["sha256"]


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"projection": "nope"},
            "projection is 'nope'; it should be 'logit_lens', 'normalized' or 'cosine'",
        ),
        ({"projection": ()}, r"projection is \(\); pass .* or several of these"),
        ({"projection": ("normalized", "normalized")}, "pass .* or several of these"),
        ({"direction": "up"}, "direction is 'up'; it should be 'update' or 'gradient'"),
        ({"vjps_at": "mlp"}, "vjps_at is 'mlp'; it should be 'matrix' or 'residual'"),
        ({"prepend_bos": "yes"}, "prepend_bos is 'yes'; it should be a valid boolean, or None"),
        (
            {"multi_token": "middle"},
            "multi_token is 'middle'; it should be 'first' or 'last', or None",
        ),
        ({"position_columns": "nope"}, "the table of positions has no column 'nope'; it has prom"),
        (
            {"gradient_columns": ("rank", 3)},
            r"gradient_columns is \('rank', 3\); it should be a valid string",
        ),
        ({"k": 0}, "k is 0; it should be greater than or equal to 1"),
        ({"k": None}, "k is None; it should be a valid integer"),
        ({"k": True}, "k is True; it should be a valid integer"),
        ({"prompts": 0}, "prompts is 0; it should be greater than or equal to 1, or None"),
        ({"prompts": 1.5}, "prompts is 1.5; it should be a valid integer"),
        ({"shard_size": 0}, "shard_size is 0; it should be greater"),
        ({"shard_size": "8"}, "shard_size is '8'; it should be a valid integer"),
        ({"memory": 10**9}, "memory is 1000000000; pass a Memory"),
        ({"memory": {"budgte": 1}}, "memory has no setting 'budgte'; allowed: budget, factor_"),
        ({"memory": {"budget": "1"}}, "budget is '1'; pass a number of bytes"),
        ({"memory": {"factor_dtype": "int8"}}, "factor_dtype is torch.int8; allowed: None"),
        ({"seed": "now"}, "seed is 'now'; it should be a valid integer"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(SweepError, match=message):
        SweepConfig(**settings)


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrices": "W_up"}, "unknown matrix 'W_up'; allowed:"),
        ({"matrices": ()}, "matrices is empty"),
        ({"layers": 3}, "layer 3 does not exist; allowed: -3 to 2"),
        ({"memory": blt.Memory(budget=1000)}, "the budget is 1,000 bytes"),
    ],
)
def test_settings_that_the_model_refuses(swept, tmp_path: Path, settings, message: str):
    """Immediately, not by rejecting every prompt."""
    with pytest.raises(InputError, match=message):
        swept(folder="out", **settings)
    assert not (tmp_path / "out").exists(), "nothing may be written before settings are checked"


@pytest.mark.usefixtures("as_for_a_user")
def test_settings_that_compare_equal(swept):
    assert SweepConfig(matrices="mlp", layers=[0, 1]) == SweepConfig(("mlp",), (0, 1))
    assert SweepConfig(layers=torch.tensor([0, 1])) == SweepConfig(layers=range(2))
    memory = blt.Memory(budget=10**9, factor_dtype=torch.bfloat16, factor_device="cpu")
    given = SweepConfig(k=np.int64(4), layers=(np.int64(1),), seed=np.int32(2), memory=memory)
    assert given == SweepConfig.from_json(json.loads(json.dumps(given.to_json())))
    assert swept(k=np.int64(4)).config.k == 4
    with pytest.raises(SweepError, match="config is a dict; pass a SweepConfig"):
        blt.sweep(None, ROWS, "nowhere", {"k": 3})  # type: ignore[arg-type]


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"colour": 3}', r"unknown setting 'colour'; allowed: matrices, layers, .*memory"),
        ('{"config": {"colour": 3}}', "unknown setting 'colour'"),
        ('{"config": 3}', "has 3 for settings"),
        ("[1]", r"has \[1\] for settings; write a JSON object"),
        ("{", "cannot be read"),
        ('{"k": 0}', "k is 0"),
    ],
)
def test_files_of_settings_that_are_refused(tmp_path: Path, text: str, message: str):
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(SweepError, match=message):
        SweepConfig.load(file)
    with pytest.raises(SweepError, match="cannot be read"):
        SweepConfig.load(tmp_path / "none.json")


# ----------------------------------------------------------------------------------------- the data

FACTS = [
    ("Rome is in", " Paris", "Rome", " the"),
    ("A river runs through Rome", " in", "river", " Paris"),
]


def as_counterfact(row: tuple[str, str, str, str]) -> dict[str, Any]:
    prompt, target, subject, answer = row
    rewrite = {
        "prompt": prompt.replace(subject, "{}"),
        "subject": subject,
        "target_new": {"str": target.strip()},
        "target_true": {"str": answer.strip()},
    }
    return {"case_id": prompt, "requested_rewrite": rewrite}


def as_flat(row: tuple[str, str, str, str]) -> dict[str, Any]:
    prompt, target, subject, answer = row
    own = {"target_new": target.strip(), "subject": subject, "ground_truth": answer.strip()}
    return {"case_id": prompt, "prompt": prompt, **own}


def as_plain(row: tuple[str, str, str, str]) -> dict[str, Any]:
    prompt, target, subject, answer = row
    return {"id": prompt, "prompt": prompt, "target": target, "subject": subject, "answer": answer}


@pytest.mark.usefixtures("as_for_a_user")
def test_every_format_of_the_data_gives_the_same_tables(swept, tmp_path: Path):
    plain = [as_plain(row) for row in FACTS]
    original, flat, lines, cells = (
        tmp_path / name for name in ("cf.json", "flat.json", "rows.jsonl", "rows.csv")
    )
    original.write_text(json.dumps([as_counterfact(row) for row in FACTS]))
    flat.write_text(json.dumps([as_flat(row) for row in FACTS]))
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in plain))
    with cells.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(plain[0]))
        writer.writeheader()
        writer.writerows(plain)
    hub = datasets.Dataset.from_list(plain)
    first = swept(plain, layers=0)
    assert first.prompts()["true_answer"].tolist() == [" the", " Paris"]
    for data in (original, flat, lines, cells, hub, pd.DataFrame(plain), iter(plain)):
        found = swept(data, layers=0)
        assert digests(found.folder) == digests(first.folder)
        assert found.about["data"]["sha256"]


@pytest.mark.usefixtures("as_for_a_user")
def test_a_template_selects_the_occurrence_of_the_subject(swept):
    rewrite = {"subject": "Rome", "target_new": {"str": "the"}, "target_true": {"str": "Paris"}}
    original = {"case_id": 1, "requested_rewrite": {"prompt": "Rome is in {} of", **rewrite}}
    plain = {"prompt": "Rome is in Rome of", "target": " the", "subject": "Rome"}
    for row in (original, {**plain, "subject_start": 11}):
        cells = swept([row], layers=0, matrices="W_out").positions()
        [subject] = cells["token"][cells["segment"] == "last subject token"].index
        assert cells["token"][subject] == " Rome"
        assert cells["token"][subject - 1] == " in"
    cells = swept([plain], layers=0, matrices="W_out").positions()
    [subject] = cells["token"][cells["segment"] == "last subject token"].index
    assert cells["token"][subject + 1] != " of"  # otherwise the first one


@pytest.mark.usefixtures("as_for_a_user")
def test_a_broken_line_of_a_file_is_one_reject(swept, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    good = [json.dumps(row) for row in ROWS]
    file.write_text("\n".join([good[0], '{"prompt": "Rom', "[]", *good[1:]]))
    found = swept(file, layers=0, shard_size=2)
    assert found.rejects()[["prompt", "reason"]].to_numpy().tolist() == [[1, "row"], [2, "row"]]
    assert "line 2 is not valid JSON" in found.rejects()["problem"][0]
    assert found.prompts()["prompt"].tolist() == [0, 3, 4, 5, 6]


@pytest.mark.usefixtures("as_for_a_user")
def test_targets_of_several_tokens_when_one_is_chosen(swept):
    rows = [{"prompt": "Rome is in", "target": " Italy", "subject": "Rome"}]
    encoded = small_tokenizer().encode(" Italy")
    assert len(encoded) > 1
    assert swept(rows).rejects()["reason"].tolist() == ["target"]
    for position, token in (("first", encoded[0]), ("last", encoded[-1])):
        found = swept(rows, multi_token=position)
        assert found.prompts()["target_id"].tolist() == [token]


# ------------------------------------------------------------------------------------ command lines


def called(argv: list[str], capfd) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command."""
    capfd.readouterr()
    status = cli.main(["sweep", *argv])
    out, err = capfd.readouterr()
    return status, out, err


@pytest.mark.usefixtures("as_for_a_user", "loaded")
def test_the_command_prints_a_summary_and_nothing_else(tmp_path: Path, capfd):
    data = tmp_path / "data.jsonl"
    rows = [
        {"question": "Porsche was set up in", "new": " Spain", "about": "Porsche"},
        {"question": "Porsche was set up in", "new": " Spain", "about": "Audi"},
        {"question": "Porsche was set up in", "new": " somewhere in the middle of nowhere"},
        {"question": "Porsche was set up in", "new": " somewhere near the middle of it"},
        {"new": " Spain"},
    ]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    argv = f"--data {data} --layers 0 -1 --matrices W_out --k 2 --quiet".split()
    argv += ["--field", "prompt=question", "target=new", "subject=about"]
    status, out, _ = called([*argv, "--out", str(tmp_path / "a")], capfd)
    assert status == 0
    first, *reasons = out.splitlines()
    assert first == f"1 prompts analysed, 4 rejected: {tmp_path / 'a'}"
    assert reasons[0].startswith("  2 rejected for their target, such as row 2: target ' somewhere")
    assert Counter(line.split(",")[0] for line in reasons[1:]) == Counter(
        ["  1 rejected for their subject", "  1 rejected for their row"]
    )
    found = Sweep.load(tmp_path / "a")
    assert found.config == SweepConfig(layers=(0, -1), matrices="W_out", k=2)
    assert found.prompts()["subject"].tolist() == ["Porsche"]
    status, again, _ = called([*argv, "--out", str(tmp_path / "b")], capfd)
    assert (status, again.splitlines()[1:]) == (0, reasons)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.usefixtures("as_for_a_user")
def test_the_model_is_loaded_with_the_given_options(
    facts_model: nn.Module, tmp_path: Path, monkeypatch, capfd
):
    asked: list[tuple[Any, ...]] = []
    own = loading.load_model

    def load(name: str, kind: str | None, *, device: str | None, n_devices: int) -> nn.Module:
        asked.append((name, kind, device, n_devices))
        return own(name) if kind is None else facts_model

    monkeypatch.setattr(loading, "load_model", load)
    argv = ["--prompts", "1", "--layers", "0", "--quiet", "--out", str(tmp_path / "a")]
    status, _, err = called(argv, capfd)
    assert (status, asked) == (0, [("facts", None, None, 1)])
    assert "Loading" not in err
    argv += ["--kind", "bridge", "--device", "cuda:1", "--n-devices", "2"]
    assert called(argv, capfd)[0] == 0
    assert asked[1] == ("facts", "bridge", "cuda:1", 2)


def test_each_process_has_its_own_device() -> None:
    devices = {"cpu": None, "mps": None, "cuda:1": "cuda:1", "xpu:0": "xpu:0"}
    for device, expected in devices.items():
        assert own_device(SimpleNamespace(device=torch.device(device))) == expected


@pytest.mark.usefixtures("as_for_a_user", "loaded")
def test_settings_of_another_sweep_reproduce_its_tables(tmp_path: Path, monkeypatch, capfd):
    argv = "--prompts 2 --seed 4 --layers -1 --projection normalized --direction gradient --k 2"
    argv += " --shard-size 1 --no-bos --position-columns norm top_tokens --gradient-columns"
    argv += " --vjps-at residual --multi-token last --budget 100000000"
    first, second, third = (tmp_path / name for name in "abc")
    assert called([*argv.split(), "--out", str(first)], capfd)[0] == 0
    found = Sweep.load(first)
    assert found.config == SweepConfig(
        prompts=2,
        seed=4,
        layers=-1,
        projection="normalized",
        direction="gradient",
        k=2,
        shard_size=1,
        prepend_bos=False,
        position_columns=("norm", "top_tokens"),
        gradient_columns=(),
        vjps_at="residual",
        multi_token="last",
        memory=blt.Memory(budget=100_000_000),
    )
    settings = ["--config", str(first / "run.json"), "--quiet"]
    assert called([*settings, "--out", str(second)], capfd)[0] == 0
    assert digests(first) == digests(second)
    own = tmp_path / "settings.json"
    own.write_text(json.dumps(found.config.to_json()))
    argv = ["--config", str(own), "--quiet", "--out", str(third), "--k", "1"]
    assert called(argv, capfd)[0] == 0
    assert Sweep.load(third).config == replace(found.config, k=1)


@pytest.mark.usefixtures("as_for_a_user", "loaded")
def test_errors_are_one_line_and_status_2(tmp_path: Path, capfd):
    out = ["--out", str(tmp_path / "out"), "--quiet"]
    odd = tmp_path / "odd.json"
    odd.write_text('{"colour": 1}')
    for argv, message in [
        (["--config", str(odd)], "unknown setting 'colour'; allowed: matrices"),
        (["--config", str(tmp_path / "none")], "cannot be read"),
        (["--data", str(tmp_path / "none.csv")], "does not exist; the current folder"),
        (["--field", "prompt"], "--field prompt names no column; write prompt=question"),
        (["--field", "colour=red"], "fields names 'colour'"),
        (["--k", "0"], "k is 0"),
        (["--layers", "99", "--prompts", "2"], "layer 99 does not exist"),
        (["--position-columns", "nope"], "no column 'nope'"),
    ]:
        status, printed, err = called([*argv, *out], capfd)
        assert (status, printed) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith("backward-lens: error: ")
        assert message in err


def test_a_bar_shows_progress(tiny: nn.Module, tmp_path: Path, capfd):
    config = SweepConfig(layers=0, shard_size=2)
    blt.sweep(tiny, ROWS, tmp_path / "a", config, progress=False)
    assert "prompt" not in capfd.readouterr().err
    (tmp_path / "a" / "prompts" / "shard-000002.parquet").unlink()
    blt.sweep(tiny, ROWS, tmp_path / "a", config)
    out, err = capfd.readouterr()
    assert out == ""
    assert "4/5" in err  # it starts at the existing rows
    assert "5/5" in err


def test_without_pyarrow_it_says_what_to_install(tiny: nn.Module, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    with pytest.raises(BackwardLensError, match=r"backward-lens-tl\[parquet\]"):
        blt.sweep(tiny, ROWS, tmp_path)
