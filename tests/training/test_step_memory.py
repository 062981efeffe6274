"""The memory of a watched step: the estimate, and steps that would take more."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any
from weakref import ref

import pytest
import torch
from architectures import N_LAYERS, hf_model

from backward_lens_tl.errors import BackwardLensWarning, InputError
from backward_lens_tl.training import TrainingWatch, watch

D_MODEL, D_MLP = 24, 52
IDS = torch.arange(3, 15).reshape(2, 6)


def backward(model: Any, positions: int) -> None:
    ids = torch.arange(positions)[None] + 3
    model(ids, labels=ids).loss.backward()


def needed(positions: int, itemsize: int = 4) -> int:
    """Factors of W_out: those of all layers, and one layer twice more while they are joined."""
    return (N_LAYERS + 2) * positions * (D_MODEL + D_MLP) * itemsize


@pytest.mark.parametrize("passes", [1, 3])
def test_a_step_above_the_budget_is_not_watched(passes: int) -> None:
    model = hf_model("llama")
    budget = needed(5 * passes)
    with watch(model, "W_out", every=1, budget=budget) as watched:
        for positions in (5, 6, 5):
            for _ in range(passes):
                backward(model, positions)
            if positions == 5:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    step = watched.step()
                assert step is not None
                assert len(step.positions) == 4 * passes  # the last one predicts nothing
            else:
                message = r"step 2 is not watched: its factors would take [\d,]+ bytes or more, "
                message += rf"and budget is {budget:,}; watch fewer matrices or layers"
                with pytest.warns(BackwardLensWarning, match=message):
                    assert watched.step() is None


def test_the_training_goes_on_as_without_the_watch() -> None:
    model = hf_model("llama")
    plain = copy.deepcopy(model)
    with watch(model, "all", budget=25_000, reference=([5, 6], 7)) as watched:
        for _ in range(2):
            backward(model, 6)
        with pytest.warns(BackwardLensWarning, match="not watched"):
            assert watched.step() is None
    for _ in range(2):
        backward(plain, 6)
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(own.grad, other.grad) for own, other in pairs)


def test_copies_of_the_weights_count() -> None:
    model = hf_model("llama")
    copies = (N_LAYERS + 1) * D_MODEL * D_MLP * 4  # and one change
    message = rf"reference, take {copies:,} bytes, and budget is {copies - 1}; watch fewer"
    with (
        pytest.raises(InputError, match=message),
        watch(model, "W_out", budget=copies - 1, changes=True),
    ):
        pass
    with watch(model, "W_out", budget=copies + needed(5), changes=True) as watched:
        backward(model, 5)
        assert watched.step() is not None
    with watch(model, "W_out", budget=copies + needed(5) - 1, changes=True) as watched:
        backward(model, 5)
        with pytest.warns(BackwardLensWarning, match="not watched"):
            assert watched.step() is None
    half = hf_model("llama").bfloat16()  # changes are kept in float32
    with pytest.raises(InputError, match=f"take {copies:,} bytes"):
        watch(half, "W_out", budget=copies - 1, changes=True).__enter__()


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1 GB"])
def test_budgets_that_are_not_bytes(value: Any) -> None:
    with pytest.raises(InputError, match=r"budget is .*; pass an integer of at least 1"):
        watch(hf_model("llama"), budget=value).__enter__()


def kept_bytes(watched: TrainingWatch) -> int:
    """Sizes of the tensors that the watch really keeps."""
    pairs = [pair for recorder in watched._recorders for pair in recorder.pairs]
    storages = [each.untyped_storage() for pair in pairs for each in (pair.x, pair.delta)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def passes(model: Any, kind: str) -> None:
    """Two microbatches, and what must not be counted."""
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            model(IDS, labels=IDS).loss.backward()
    if kind == "unused":
        model(IDS)


@pytest.mark.parametrize(
    ("family", "matrices", "kind"),
    [
        ("llama", "all", "plain"),
        ("llama", "all", "autocast"),
        ("llama", "mlp", "unused"),
        ("llama", "W_out", "reentrant"),
        ("llama", "all", "not reentrant"),
        ("gpt2", "W_Q", "plain"),
        ("gpt2", "all", "plain"),
    ],
)
def test_the_tensors_that_are_kept_are_counted(family: str, matrices: str, kind: str) -> None:
    model = hf_model(family).train()
    if "reentrant" in kind:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    with watch(model, matrices) as watched:
        passes(model, kind)
        kept = kept_bytes(watched)
        assert kept > 0
        assert watched._memory.kept == kept
        assert watched.step() is not None


def test_the_reference_leaves_nothing_behind() -> None:
    model = hf_model("llama")
    outputs: list[ref[Any]] = []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_hook(lambda module, args, output: outputs.append(ref(output)))
    with watch(model, "W_out", reference=([5, 6], 7)) as watched:
        backward(model, 5)
        watched.step()
    gc.collect()
    assert [each() for each in outputs] == [None, None]
