"""Factors that a sweep keeps, and a query compared with them, against captures in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import digests, killed
from torch import Tensor

import backward_lens_tl as blt
from backward_lens_tl.analysis import most_similar
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.errors import InputError, SweepError
from backward_lens_tl.sweeps import measuring
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.factors import ShardFactors, factors_file, read_factors
from backward_lens_tl.sweeps.run import Sweep

ROWS = [
    {"prompt": "The capital of France is", "target": " Paris"},
    {"prompt": "Rome is the capital of the country that is called", "target": " Italy"},
    {"prompt": "", "target": " Paris"},  # rejected
    {"prompt": "Obama grew up in", "target": " Hawaii"},
    {"prompt": "Messi plays for", "target": " Barcelona"},
]
"""Shards of two have another order, by length."""

ANALYSED = [0, 1, 3, 4]
QUERIES = ["The capital of Italy is", "Messi"]
LAYERS = (0, 5)


@pytest.fixture(scope="module")
def run(facts_model: Any) -> Callable[..., Sweep]:
    def swept(out: Path, keep: Any = "float32", **settings: Any) -> Sweep:
        config = SweepConfig(layers=LAYERS, shard_size=2, keep_factors=keep, **settings)
        return blt.sweep(facts_model, ROWS, out, config, progress=False)

    return swept


@pytest.fixture(scope="module")
def kept(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return run(tmp_path_factory.mktemp("kept") / "out")


def captured(model: Any, prompts: Any, targets: Any, **options: Any) -> GradientCapture:
    options = {"layers": LAYERS, **options}
    return blt.capture_gradients(model, prompts, blt.target_nll(targets), **options)


@pytest.fixture(scope="module")
def query(facts_model: Any) -> GradientCapture:
    return captured(facts_model, QUERIES, [" Rome", " Paris"])


def vectors(captures: list[GradientCapture], layer: int | None = None) -> Tensor:
    """The gradient of each prompt as one long vector, from dense matrices."""
    return torch.stack(
        [
            torch.cat(
                [
                    each.dense(batch).double().flatten()
                    for each in capture
                    if layer in (None, each.layer)
                ]
            )
            for capture in captures
            for batch in range(len(capture.mask))
        ]
    )


def alone(model: Any) -> list[GradientCapture]:
    """Each prompt of the sweep by itself."""
    rows = [ROWS[row] for row in ANALYSED]
    return [captured(model, row["prompt"], row["target"]) for row in rows]


def cosines(here: Tensor, there: Tensor) -> Tensor:
    return here @ there.T / here.norm(dim=1)[:, None] / there.norm(dim=1)


def test_a_query_against_dense_gradients(facts_model: Any, kept: Sweep, query: Any) -> None:
    assert kept.prompts()["prompt"].tolist() == ANALYSED
    here, there = vectors(alone(facts_model)), vectors([query])
    found = kept.similarity(query)
    # A padded batch and a single prompt round differently.
    torch.testing.assert_close(found.cosine, cosines(here, there), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.norms, here.norm(dim=1), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.other_norms, there.norm(dim=1), rtol=1e-5, atol=0)
    # Shards have another order: a wrong one would be noticed.
    assert [each.rows for each in read_factors(kept.folder, kept.finished)] != [(0, 1), (3, 4)]
    assert (cosines(here, there) - cosines(here.flip(0), there)).abs().max() > 0.1


def test_one_shard_is_in_memory_at_a_time(
    kept: Sweep, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loaded, alive = ShardFactors.load, [], []

    def load(file: Path) -> ShardFactors:
        alive.append(sum(reference() is not None for reference in loaded))
        shard = real(file)
        loaded.append(weakref.ref(shard.parts[0].capture["W_out", 0].inputs))
        return shard

    monkeypatch.setattr(ShardFactors, "load", load)
    kept.similarity(query)
    assert alive == [0] * len(kept.finished)
    assert len(alive) > 1


def test_a_query_of_another_model(kept: Sweep, query: GradientCapture) -> None:
    with pytest.raises(
        InputError, match=r"sweep is of model .*, and the query of 'other'; capture"
    ):
        kept.similarity(replace(query, model_name="other"))


def test_by_layer(facts_model: Any, kept: Sweep, query: Any) -> None:
    found = kept.similarity(query, by="layer")
    assert found.parts == LAYERS
    for place, layer in enumerate(LAYERS):
        expected = cosines(vectors(alone(facts_model), layer), vectors([query], layer))
        torch.testing.assert_close(found.cosine[place], expected, rtol=0, atol=1e-4)


def test_bfloat16_halves_the_files(run: Any, kept: Sweep, query: Any, tmp_path: Path) -> None:
    half = run(tmp_path / "half", "bfloat16")
    sizes = [
        sum(file.stat().st_size for file in (each.folder / "factors").iterdir())
        for each in (half, kept)
    ]
    assert 0.5 < sizes[0] / sizes[1] < 0.65
    difference = (half.similarity(query).cosine - kept.similarity(query).cosine).abs().max()
    assert 0 < difference < 0.01  # 8 bits
    # The tables are those of the factors before they were rounded.
    assert digests(half.folder) == digests(kept.folder)


def test_inputs_that_matrices_share_are_written_once(run: Any, query: Any, tmp_path: Path) -> None:
    attention = run(tmp_path / "attention", matrices=("W_Q", "W_K", "W_V"))
    for part in read_factors(attention.folder, attention.finished):
        inputs = [part.capture[matrix, 0].inputs for matrix in ("W_Q", "W_K", "W_V")]
        assert inputs[0] is inputs[1] is inputs[2]
        assert not part.capture.attention
    with pytest.raises(InputError, match="is only in"):
        attention.similarity(query)


def test_most_similar_names_the_rows(facts_model: Any, kept: Sweep, query: Any) -> None:
    found = most_similar(kept, query, k=9)
    targets = [ROWS[row]["target"] for row in ANALYSED]
    prompts = [ROWS[row]["prompt"] for row in ANALYSED]
    expected = most_similar(captured(facts_model, prompts, targets), query, k=9)
    assert found["prompt"].tolist() == [ANALYSED[place] for place in expected["prompt"]]
    for column in ("query", "text", "target", "effect"):
        assert found[column].tolist() == expected[column].tolist()
    assert found["inner"].tolist() == pytest.approx(expected["inner"].tolist(), rel=1e-3)
    with pytest.raises(InputError, match="queries is None; pass the gradients to compare a sweep"):
        most_similar(kept)


@pytest.mark.parametrize("moment", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("when", ["written", "placed"])
def test_killed_at_any_file_it_resumes(
    run: Any, kept: Sweep, query: Any, tmp_path: Path, moment: int, when: str
) -> None:
    """A shard has its factors, then four tables; file 0 is `run.json`."""
    killed(lambda: run(tmp_path / "out"), moment, when)
    half = Sweep.load(tmp_path / "out")
    n_files = moment - (when == "written")
    assert half.finished == tuple(range(n_files // 5))
    if half.finished:
        assert half.similarity(query).inner.shape[0] == len(half.prompts())
    again = run(tmp_path / "out")
    assert again.is_complete
    assert digests(again.folder) == digests(kept.folder)
    # The header of a safetensors file has its entries in any order.
    assert [file.name for file in sorted((again.folder / "factors").iterdir())] == [
        f"shard-{shard:06d}.safetensors" for shard in range(3)
    ]
    assert torch.equal(again.similarity(query).inner, kept.similarity(query).inner)


def test_prompts_that_fail_together_are_kept_alone(
    run: Any, kept: Sweep, query: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measuring.backward_lens

    def lens(model: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        if len(prompts) > 1:
            raise MemoryError
        if prompts[0].startswith("Obama"):
            raise InputError("not finite")
        return real(model, prompts, *args, **options)

    monkeypatch.setattr(measuring, "backward_lens", lens)
    found = run(tmp_path / "out")
    assert found.prompts()["prompt"].tolist() == [0, 1, 4]
    expected = kept.similarity(query).cosine[[0, 1, 3]]
    torch.testing.assert_close(found.similarity(query).cosine, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("as_for_a_user")
def test_what_is_refused(run: Any, query: Any, tmp_path: Path, facts_model: Any) -> None:
    without = run(tmp_path / "without", None)
    assert not (without.folder / "factors").exists()
    with pytest.raises(SweepError, match=r'not kept the factors.*keep_factors="bfloat16"'):
        without.similarity(query)
    with pytest.raises(SweepError, match="keep_factors is 'float16'"):
        SweepConfig(keep_factors="float16")
    found = run(tmp_path / "out")
    with pytest.raises(InputError, match="query is 'Rome'; pass GradientCapture, as returned by"):
        found.similarity("Rome")
    with pytest.raises(InputError, match="by is 'head'"):
        found.similarity(query, by="head")
    with pytest.raises(InputError, match="W_in of layer 1 is only in the other capture"):
        found.similarity(captured(facts_model, "Rome", " Paris", layers=(0, 1, 5)))
    factors_file(found.folder, 1).unlink()
    with pytest.raises(SweepError, match=r"is missing, damaged.*Delete the shard's files in pos"):
        found.similarity(query)
    for table in found.TABLES:
        for file in (found.folder / table).iterdir():
            file.unlink()
    with pytest.raises(SweepError, match=r"no prompt of the sweep in .* has been analysed yet"):
        Sweep.load(found.folder).similarity(query)
