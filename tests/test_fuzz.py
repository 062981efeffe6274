"""Any input gives a valid result or one of the package's errors.

The error names the value, and the model is unchanged. Only exceptions of the caller's code, in an
objective or a projection, and Python's error for an unknown keyword are not the package's.

Every argument is tried with all of `VALUES`, chosen to be difficult, and in the complete
run with all of `RARE`. Values from hypothesis are tried in many arguments at once and in files; the
examples are the same in every run.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import itertools
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_state import assert_same, make_busy, snapshot
from models import D_VOCAB, HAS_BRIDGE, build, require_kind, small_tokenizer
from sampling import examples
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.objectives import (
    Objective,
    logit_difference,
    sequence_nll,
    target_nll,
)
from backward_lens_tl.capture.plan import capture_gradients
from backward_lens_tl.errors import BackwardLensError, ResultFileError
from backward_lens_tl.files.storage import FORMAT_VERSION
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models.loading import load_facts_model, load_model
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.validation import ValidationReport, validate

pytestmark = [
    pytest.mark.usefixtures("as_for_a_user"),
    # Warnings of torch and numpy about values that nobody should pass.
    pytest.mark.filterwarnings("ignore"),
]

IDS = torch.tensor([[3, 4, 5]])
TEXTS = ["Rome is", "Messi plays for"]
HOOK = "blocks.0.hook_resid_pre"
DEFAULT = "bridge" if HAS_BRIDGE else "hooked"
KINDS = ("bridge-gpt2", "hooked-llama")


# ------------------------------------------------------------------------------------------- values


class Colour(enum.Enum):
    RED = 1


def ones(*shape: int, dtype: torch.dtype = torch.long, **options: Any) -> Tensor:
    return torch.ones(shape, dtype=dtype, **options)


VALUES: dict[str, Callable[[], Any]] = {
    # --- numbers
    "none": lambda: None,
    "true": lambda: True,
    "zero": lambda: 0,
    "one": lambda: 1,
    "minus one": lambda: -1,
    "large": lambda: 10**30,
    "float": lambda: 1.0,
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "complex": lambda: 1j,
    "decimal": lambda: decimal.Decimal(1),
    # --- texts
    "empty text": lambda: "",
    "name of a matrix": lambda: "W_in",
    "name of a hook point": lambda: HOOK,
    "lone surrogate": lambda: "\ud800",
    "null character": lambda: "\x00",
    "markup": lambda: "</script>",
    "bytes": lambda: b"Rome",
    # --- collections
    "empty list": list,
    "empty range": lambda: range(0),
    "empty list in a list": lambda: [[]],
    "none in a list": lambda: [None],
    "true in a list": lambda: [True],
    "empty text in a list": lambda: ["", "a"],
    "surrogate in a list": lambda: ["\ud800"],
    "text and number": lambda: ["W_in", 3],
    "range": lambda: range(99),
    "dict": lambda: {"W_up": 1},
    "set": lambda: {0},
    "slice": lambda: slice(None),
    # --- numpy, pandas
    "numpy integer": lambda: np.int64(1),
    "numpy float": lambda: np.float32(1),
    "array of no axis": lambda: np.array(1),
    "array": lambda: np.array([0, 1]),
    "empty array": lambda: np.array([]),
    "array of two axes": lambda: np.array([[0, 1]]),
    "series": lambda: pd.Series([0, 1]),
    "table": lambda: pd.DataFrame({"a": [1]}),
    # --- tensors
    "tensor": lambda: torch.tensor([0, 1]),
    "ids": lambda: torch.tensor([[0, 1]]),
    "tensor of three axes": lambda: ones(1, 1, 2),
    "empty tensor": lambda: torch.zeros(0),
    "no prompts": lambda: ones(0, 3),
    "floats": lambda: torch.tensor([[0.5]]),
    "booleans": lambda: ones(1, 2, dtype=torch.bool),
    "complex tensor": lambda: ones(1, 2, dtype=torch.complex64),
    "sparse": lambda: ones(1, 2).to_sparse(),
    "meta": lambda: ones(1, 2, device="meta"),
    "ids too large": lambda: ones(1, 2) * 2**40,
    # --- other things
    "object": object,
    "type": lambda: int,
    "module": torch.nn.Identity,
    "callable": lambda: lambda *args, **options: None,
    "enum": lambda: Colour.RED,
    "path": lambda: Path("x"),
}
RARE: dict[str, Callable[[], Any]] = {
    # --- numbers
    "false": lambda: False,
    "half": lambda: 0.5,
    "fraction": lambda: fractions.Fraction(1, 2),
    # --- texts
    "space": lambda: " ",
    "emoji": lambda: "é☃🏳️‍🌈",
    "long text": lambda: "a" * 5000,
    # --- collections
    "empty dict": dict,
    "exhausted": lambda: iter(()),
    "list in a list": lambda: [[0]],
    "float in a list": lambda: [0.0],
    # --- numpy
    "numpy bool": lambda: np.bool_(True),
    "array of texts": lambda: np.array(["W_in", "x"]),
    "array in a list": lambda: [np.array([0, 1])],
    # --- tensors
    "tensor of no axis": lambda: torch.tensor(1),
    "nans": lambda: torch.tensor([[math.nan]]),
    "unsigned": lambda: ones(1, 2, dtype=torch.uint16),
    "tensor in a list": lambda: [torch.tensor([0, 1])],
    # --- other things
    "ellipsis": lambda: ...,
    "date": lambda: datetime.date(2024, 2, 29),
    "exception": lambda: ValueError("x"),
}
"""Values similar to some of `VALUES`; tried in the complete run."""

RAISING = {"type", "module"}
"""Callables that raise their own errors, which are allowed where a callable is expected."""

HUGE = 10**5000
"""Python refuses to print it: `repr` raises a `ValueError`."""

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=8),
    st.text(alphabet=st.characters(categories=["Cs", "Cc", "Lu"]), max_size=3),
    st.binary(max_size=3),
    st.sampled_from(["W_in", "W_out", "all", "attn", "first", "update", HOOK, " Paris"]),
    st.builds(
        lambda shape, dtype: torch.zeros(shape).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.long, torch.float32, torch.bool, torch.int8, torch.bfloat16]),
    ),
)
junk = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
    max_leaves=4,
)


def names(value: Any, depth: int = 0) -> Iterator[str]:
    """Ways in which a message may name a value."""
    yield from (type(value).__name__, repr(value), str(value))
    if isinstance(value, Tensor | np.ndarray):
        yield from (str(tuple(value.shape)), str(value.dtype))
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            yield from ("meta", str(value.layout))
            return
        yield from map(str, value.flatten().tolist())
        yield from map(str, value.tolist() if value.ndim else ())
    if isinstance(value, str):
        yield from ("empty", "no token", "at least two tokens", f"{len(value) + 1} tokens")
        yield f"{len(value) + 2} tokens"
    if callable(value):  # by what it returns, or by its class
        yield from ("NoneType", "objective=")
    if isinstance(value, os.PathLike):
        yield repr(os.fspath(value))
    is_sized = hasattr(value, "__len__") and getattr(value, "shape", (1,)) != ()
    if is_sized:
        yield str(len(value))
    if isinstance(value, Iterable) and not isinstance(value, str) and depth < 3 and is_sized:
        yield from itertools.chain.from_iterable(
            names(entry, depth + 1) for entry in itertools.islice(iter(value), 5)
        )
    if isinstance(value, Iterable) and not isinstance(value, str) and not list_of(value):
        yield from ("no", "empty", "at least one")


def list_of(value: Any) -> list[Any]:
    return [] if getattr(value, "shape", None) == () else list(itertools.islice(value, 1))


def is_word(name: str, message: str) -> bool:
    """Whether a message has a name as a whole word: `int` does not match `point`."""
    before = r"(?<!\w)" if name[:1].isalnum() else ""
    after = r"(?!\w)" if name[-1:].isalnum() else ""
    return bool(name) and re.search(before + re.escape(name) + after, message) is not None


def outcome(call: Callable[[Any], object], value: Any, also: str = "") -> str | None:
    """The problem with the outcome of a call, if any; `also` is another name of the value."""
    try:
        check(call(value))
    except BackwardLensError as error:
        message = str(error)
        if not any(is_word(name, message) for name in (also, *names(value))):
            return f"{type(error).__name__} does not name it: {message[:200]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def check(found: object) -> None:
    """Check that a result is usable."""
    if isinstance(found, BackwardLensResult):
        check(found.capture)
        assert len(found.to_df()) > 0
        assert found._repr_html_()
        assert "BackwardLensResult" in repr(found)
        assert set(found.layers) <= {0, 1}
        for matrix in found.matrices:
            assert found.norms(matrix).isfinite().all()
    elif isinstance(found, GradientCapture):
        assert found.loss.isfinite().all()
        assert "GradientCapture" in repr(found)
        for gradient in found:
            assert gradient.inputs.isfinite().all()
            assert gradient.vjps.isfinite().all()
            assert gradient.rank(0) <= int(found.mask[0].sum())
    elif isinstance(found, ValidationReport):
        assert found.passed


# --------------------------------------------------------------------------------- one bad argument


class Projecting:
    """A projection with a fixed result."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def project(self, vectors: Tensor, layer: int) -> object:
        return self.answer


class Unprojectable:
    """A projection whose `project` is not callable."""

    def __init__(self, method: object) -> None:
        self.project = method


class Faint(Projecting):
    """A valid projection with an attribute that the Logit Lens also has."""

    def __init__(self, faint_norm: object) -> None:
        self.faint_norm = faint_norm

    def project(self, vectors: Tensor, layer: int) -> Tensor:
        return vectors.new_zeros(len(vectors), D_VOCAB)


ModelCall = Callable[[Any, Any], object]
LITTLE: dict[str, Any] = {"matrices": "W_out", "layers": -1}
"""The request: one matrix, since values are refused before or after the passes."""


def lens(argument: str) -> ModelCall:
    def call(model: Any, value: Any) -> object:
        options = LITTLE | {"prompts": IDS, "target": 5, "k": 2} | {argument: value}
        return backward_lens(model, **options)

    return call


def lens_of_texts(argument: str) -> ModelCall:
    def call(model: Any, value: Any) -> object:
        options = LITTLE | {"prompts": TEXTS, "target": " Paris", "k": 2} | {argument: value}
        return backward_lens(model, **options)

    return call


def capture(argument: str) -> ModelCall:
    def call(model: Any, value: Any) -> object:
        options = LITTLE | {"prompts": IDS, "objective": target_nll(5)} | {argument: value}
        return capture_gradients(model, **options)

    return call


def capture_with(objective: Callable[[Any], Any], prompts: Any = IDS) -> ModelCall:
    return lambda model, value: capture_gradients(model, prompts, objective(value), **LITTLE)


LENS = (
    "prompts",
    "target",
    "objective",
    "matrices",
    "layers",
    "positions",
    "projection",
    "direction",
    "k",
    "multi_token",
    "vjps_at",
    "hook_points",
)
MODEL_CALLS: dict[str, ModelCall] = {
    **{f"backward_lens {argument}": lens(argument) for argument in LENS},
    **{
        f"backward_lens of texts, {argument}": lens_of_texts(argument)
        for argument in ("target", "prepend_bos", "multi_token")
    },
    **{
        f"capture_gradients {argument}": capture(argument)
        for argument in ("prompts", "objective", "matrices", "layers", "hook_points")
    },
    "validate prompts": lambda model, value: validate(model, value),
    "validate objective": lambda model, value: validate(model, IDS, objective=value),
    "validate matrices": lambda model, value: validate(model, IDS, matrices=value),
    "target_nll": capture_with(target_nll),
    "target_nll per prompt": capture_with(target_nll, TEXTS),
    "target_nll position": capture_with(lambda value: target_nll(" river of", value)),
    "logit_difference promoted": capture_with(lambda value: logit_difference(value, 5)),
    "logit_difference demoted": capture_with(lambda value: logit_difference(5, value)),
    "logit_difference position": capture_with(lambda value: logit_difference(5, 6, value)),
    "sequence_nll": capture_with(sequence_nll),
    "Objective bind": capture_with(lambda value: Objective("fuzzed", value)),
    "Objective bound": capture_with(lambda value: Objective("fuzzed", lambda *args: value)),
    "loss": capture_with(lambda value: lambda logits, tokens: value),
    "scores": lambda model, value: lens("projection")(model, Projecting(value)),
    "project": lambda model, value: lens("projection")(model, Unprojectable(value)),
    "faint_norm": lambda model, value: lens("projection")(model, Faint(value)),
}


TAKES_CALLABLES = ("objective", "hook_points", "bind", "project")
ALSO = {"project": "Unprojectable", "target_nll position": "' river of'"}
"""Names that messages use instead of the value, where it is part of something else."""


@functools.cache
def busy_model(name: str) -> Any:
    """A model in use by a caller."""
    require_kind(name.split("-")[0])
    return make_busy(build(name, n_layers=2)).model


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert_same(before, snapshot(model))


def failures(
    call: Callable[[Any], object],
    skipped: Iterable[str] = (),
    also: str = "",
    values: dict[str, Callable[[], Any]] = VALUES,
) -> dict[str, str]:
    """Problems with the outcome of the call, for each of the values."""
    tried = {name: make() for name, make in values.items() if name not in skipped}
    found = {name: outcome(call, value, also) for name, value in tried.items()}
    return {name: problem for name, problem in found.items() if problem is not None}


# These pass the argument unchanged to a function that another call tests: one value per type.
PASSED_ON = (
    "capture_gradients",
    "logit_difference",
    "target_nll position",
    "validate matrices",
    "validate objective",
)
# Almost valid results of a caller's code are below, in LOSSES and SCORES.
OWN_CODE = ("loss", "scores", "faint_norm", "Objective")
ONE_OF_EACH_KIND = {"none", "true", "nan", "lone surrogate", "empty list", "text and number"}
ONE_OF_EACH_KIND |= {"array of two axes", "tensor of three axes", "object"}


@pytest.mark.parametrize("name", MODEL_CALLS)
def test_a_bad_argument_is_refused_by_name(name: str) -> None:
    model, call = busy_model(f"{DEFAULT}-gpt2"), MODEL_CALLS[name]
    skipped = RAISING if name.endswith(TAKES_CALLABLES) else set()
    if name.startswith(PASSED_ON + OWN_CODE):
        skipped = VALUES.keys() - ONE_OF_EACH_KIND
    with unchanged(model):
        found = failures(functools.partial(call, model), skipped, ALSO.get(name, ""))
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_argument_is_used_or_refused_by_name(kind: str, name: str) -> None:
    model = busy_model(kind)
    call = functools.partial(MODEL_CALLS[name], model)
    skipped = RAISING if name.endswith(TAKES_CALLABLES) else set()
    with unchanged(model):
        found = failures(call, skipped, ALSO.get(name, ""), VALUES | RARE)
    assert not found


@pytest.mark.parametrize("kind", KINDS)
@examples(30)
@given(arguments=st.fixed_dictionaries({}, optional=dict.fromkeys(LENS, junk)))
def test_many_bad_arguments_at_once_change_nothing(kind: str, arguments: dict[str, Any]) -> None:
    model = busy_model(kind)
    with unchanged(model), suppress(BackwardLensError):
        check(backward_lens(model, **({"prompts": IDS, "target": 5} | arguments)))


@pytest.mark.parametrize("function", [backward_lens, capture_gradients, validate])
def test_objects_that_are_not_models_are_refused_by_name(function: Callable[..., object]) -> None:
    rest = {backward_lens: (IDS, 5), capture_gradients: (IDS, target_nll(5)), validate: ()}
    assert not failures(lambda value: function(value, *rest[function]))


# ------------------------------------------------------------ results of objectives and projections

LOSSES: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda logits: logits[:, -1, 0] * 1j,
    "sparse": lambda logits: logits[:, -1, 0].to_sparse(),
    "meta": lambda logits: logits[:, -1, 0].to("meta"),
    "infinite": lambda logits: logits[:, -1, 0] * math.inf,
    "not a number": lambda logits: logits[:, -1, 0] * math.nan,
    "a column": lambda logits: logits[:, -1, :1],
    "transposed": lambda logits: logits[None, :, -1, 0],
    "none of the prompts": lambda logits: logits[:0, -1, 0],
    "numpy": lambda logits: logits[:, -1, 0].detach().numpy(),
    "parameter": lambda logits: torch.nn.Parameter(logits[:, -1, 0]),
    "list": lambda logits: list(logits[:, -1, 0]),
    "detached": lambda logits: logits[:, -1, 0].detach(),
    "rounded": lambda logits: logits[:, -1, 0].long(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_an_almost_valid_loss_is_refused(loss: str) -> None:
    model = busy_model(f"{DEFAULT}-gpt2")
    with unchanged(model), pytest.raises(BackwardLensError):
        capture_gradients(model, IDS, lambda logits, tokens: LOSSES[loss](logits))


SCORES: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda scores: scores * 1j,
    "sparse": lambda scores: scores.to_sparse(),
    "meta": lambda scores: scores.to("meta"),
    "not a number": lambda scores: scores * math.nan,
    "integers": lambda scores: scores.long(),
    "booleans": lambda scores: scores > 0,
    "transposed": lambda scores: scores.T,
    "one vector less": lambda scores: scores[1:],
    "one token less": lambda scores: scores[:, 1:],
    "an axis more": lambda scores: scores[None],
    "numpy": lambda scores: scores.numpy(),
    "eight bits": lambda scores: scores.to(torch.float8_e4m3fn),
}


class Nearly:
    """A projection that is almost valid."""

    def __init__(self, spoil: Callable[[Tensor], Any]) -> None:
        self.spoil = spoil

    def project(self, vectors: Tensor, layer: int) -> Any:
        scores = torch.arange(len(vectors) * D_VOCAB).reshape(-1, D_VOCAB) + 0.5
        return self.spoil(scores)


@pytest.mark.parametrize("scores", SCORES)
def test_almost_valid_scores_are_refused(scores: str) -> None:
    model = busy_model(f"{DEFAULT}-gpt2")
    with unchanged(model), pytest.raises(BackwardLensError):
        backward_lens(model, IDS, 5, projection=Nearly(SCORES[scores]))


def test_valid_scores_are_accepted() -> None:
    """Negative control: without the error the scores above are valid."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        nearly = Nearly(lambda scores, dtype=dtype: scores.to(dtype))
        check(backward_lens(busy_model(f"{DEFAULT}-gpt2"), IDS, 5, projection=nearly))


def test_projections_and_objectives_that_write_into_their_arguments_change_nothing() -> None:
    model = busy_model(f"{DEFAULT}-gpt2")

    class Writing(Nearly):
        def project(self, vectors: Tensor, layer: int) -> Any:
            scores = super().project(vectors, layer)
            vectors.zero_()
            return scores

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        tokens.zero_()
        return -logits[:, -1].log_softmax(-1)[:, 5]

    spoilt = backward_lens(
        model, IDS, objective=loss, projection=Writing(lambda scores: scores)
    ).capture
    clean = capture_gradients(model, IDS, target_nll(5))
    assert torch.equal(spoilt.tokens, IDS)
    for gradient in clean:
        found = spoilt[gradient.matrix, gradient.layer]
        assert torch.equal(found.inputs, gradient.inputs)
        # A callable reads all logits, and the other objective only the last.
        torch.testing.assert_close(found.vjps, gradient.vjps, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------ results and their methods


@pytest.fixture(scope="module")
def result() -> BackwardLensResult:
    model = busy_model(f"{DEFAULT}-gpt2")
    return backward_lens(model, TEXTS, [" Paris", " the"], matrices="all", hook_points=HOOK, k=3)


ResultCall = Callable[[BackwardLensResult, Any], object]


def method(name: str) -> ResultCall:
    """A method of the result, of its capture, or of one gradient, with one argument."""
    part, _, last = name.rpartition(".")

    def call(result: BackwardLensResult, value: Any) -> object:
        capture = result.capture
        parts = {
            "result": result,
            "capture": capture,
            "dense": capture["W_in", 0],
            "heads": capture["W_O", 1],
        }
        # A neuron also needs a prompt.
        return getattr(parts[part], last)(value, *([0] if last == "neuron" else []))

    return call


def at(name: str, argument: str) -> ResultCall:
    """A method for one cell or row of cells, with one bad argument."""
    keys = ("matrix", "layer", "batch") if name == "cells" else ("matrix", "layer", "pos", "batch")
    right = {"matrix": "W_in", "layer": 0, "pos": 0, "batch": 0}

    def call(result: BackwardLensResult, value: Any) -> object:
        options = {key: right[key] for key in keys} | {argument: value}
        return getattr(result, name)(**options)

    return call


def patched(result: BackwardLensResult, scale: Any) -> object:
    _, hook = result.capture.attention_patch(0, scale)
    pattern = torch.zeros_like(result.capture.reversed_attention(0))
    found = hook(pattern, None)
    assert found.shape == pattern.shape
    assert found.isfinite().all(), f"a pattern of {scale!r}"
    assert not isinstance(scale, complex), "half of the number is lost"
    return found


RESULT_CALLS: dict[str, ResultCall] = {
    **{
        name: method(name)
        for name in (
            "result.readout",
            "result.target_rank",
            "result.norms",
            "result.is_zero",
            "result.target",
            "result.save",
            "result.save_html",
            "result.load",
            "capture.__getitem__",
            "capture.attention_of",
            "capture.reversed_attention",
            "capture.attribution",
            *(
                f"{gradient}.{name}"
                for gradient in ("dense", "heads")
                for name in ("factored", "dense", "bias", "neuron", "singular_values", "rank")
            ),
            "heads.head",
        )
    },
    **{
        f"result.{name} {argument}": at(name, argument)
        for name, arguments in {
            "cell": ("matrix", "layer", "pos", "batch"),
            "cells": ("matrix", "layer", "batch"),
            "top_tokens": ("matrix", "layer", "pos", "batch", "k"),
            "bottom_tokens": ("k",),
        }.items()
        for argument in arguments
    },
    "capture[matrix]": lambda result, value: result.capture[value, 0],
    "capture[layer]": lambda result, value: result.capture["W_in", value],
    "result.save_html batch": lambda result, value: result.save_html("page.html", value),
    "capture.attention_patch layer": lambda result, value: result.capture.attention_patch(
        value, 1.0
    ),
    "capture.attention_patch scale": patched,
    "pattern": lambda result, value: result.capture.attention_patch(0, 1.0)[1](value, None),
    "dense.neuron batch": lambda result, value: result.capture["W_in", 0].neuron(0, value),
}


@pytest.mark.parametrize("name", RESULT_CALLS)
def test_a_method_refuses_a_bad_argument_by_name(
    result: BackwardLensResult, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some values are valid file names
    before = about(saved(result, tmp_path / "before"))
    assert not failures(functools.partial(RESULT_CALLS[name], result))
    assert about(saved(result, tmp_path / "after")) == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULT_CALLS)
def test_a_method_uses_any_argument_or_refuses_it(
    result: BackwardLensResult, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = about(saved(result, tmp_path / "before"))
    assert not failures(functools.partial(RESULT_CALLS[name], result), values=VALUES | RARE)
    assert about(saved(result, tmp_path / "after")) == before


INDICES = [
    name for name in RESULT_CALLS if name.endswith(("layer", "layer]", "pos", "batch", " k"))
]


@pytest.mark.parametrize("value", [True, False, 1.0, np.float32(1), decimal.Decimal(1)], ids=repr)
@pytest.mark.parametrize("name", [*INDICES, "capture.attention_of", "capture.reversed_attention"])
def test_values_that_only_equal_an_index_are_refused(
    result: BackwardLensResult, name: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(BackwardLensError):
        RESULT_CALLS[name](result, value)


PRINTED = {
    "backward_lens layers",
    "backward_lens positions",
    "backward_lens target",
    "result.cell layer",
    "result.cell pos",
    "result.top_tokens k",
    "dense.neuron",
    "heads.head",
}


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_a_number_too_large_to_print_is_refused(result: BackwardLensResult, name: str) -> None:
    subject = busy_model(f"{DEFAULT}-gpt2") if name in MODEL_CALLS else result
    with pytest.raises(BackwardLensError, match="int"):
        (MODEL_CALLS | RESULT_CALLS)[name](subject, HUGE)


@pytest.mark.parametrize("name", ["dense.head", "dense.expert", "heads.expert"])
def test_heads_and_experts_that_a_matrix_lacks_are_refused(
    result: BackwardLensResult, name: str
) -> None:
    matrix = "W_in" if name.startswith("dense") else "W_O"
    assert not failures(functools.partial(method(name), result), also=matrix)


def test_attribution_between_models_of_different_widths_is_refused(
    result: BackwardLensResult,
) -> None:
    capture = result.capture
    narrow = {
        name: replace(point, value=point.value[..., :-1], vjp=point.vjp[..., :-1])
        for name, point in capture.hook_gradients.items()
    }
    with pytest.raises(BackwardLensError, match=HOOK):
        capture.attribution(replace(capture, hook_gradients=narrow))


# -------------------------------------------------------------------------------------------- files


def saved(result: BackwardLensResult, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


def about(contents: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header and its tensors."""
    size = struct.unpack("<Q", contents[:8])[0]
    return json.loads(contents[8 : 8 + size]), contents[8 + size :]


@pytest.fixture(scope="module")
def good(result: BackwardLensResult, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A saved result of one layer."""
    small = replace(
        result,
        capture=replace(
            result.capture,
            gradients={key: g for key, g in result.capture.gradients.items() if key[1] == 0},
        ),
        readings=tuple(
            replace(
                reading,
                readouts={
                    name: type(readout)(
                        **{field: values[:1] for field, values in vars(readout).items()}
                    )
                    for name, readout in reading.readouts.items()
                },
            )
            for reading in result.readings
        ),
    )
    return saved(small, tmp_path_factory.mktemp("good") / "result")


def assert_refused_or_unharmed(contents: bytes, good: bytes, path: Path) -> None:
    """A file that can be read has the contents of the valid one."""
    path.write_bytes(contents)
    loaded, message = None, ""
    try:
        loaded = BackwardLensResult.load(path)
    except ResultFileError as error:
        message = str(error)
    if loaded is None:
        assert str(path) in message
    else:
        again = about(saved(loaded, path))
        assert again == about(good), "a damaged file was read as if nothing had happened"


def test_a_valid_file_is_read(good: bytes, tmp_path: Path) -> None:
    """Negative control for the tests below."""
    (tmp_path / "good").write_bytes(good)
    loaded = BackwardLensResult.load(tmp_path / "good")
    assert about(saved(loaded, tmp_path / "again")) == about(good)


@examples(40)
@given(contents=st.binary(max_size=200))
def test_random_bytes_are_refused(good: bytes, tmp_path: Path, contents: bytes) -> None:
    assert_refused_or_unharmed(contents, good, tmp_path / "file")


@examples(40)
@given(data=st.data())
def test_a_truncated_file_is_refused(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    start = data.draw(st.sampled_from([0, 0, 8, 1]))
    stop = data.draw(st.integers(start, len(good) - 1))
    assert_refused_or_unharmed(good[start:stop], good, tmp_path / "file")
    assert_refused_or_unharmed(good + good[start:stop], good, tmp_path / "file")


@examples(60)
@given(data=st.data())
def test_flipped_bits_are_detected(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    header = 8 + struct.unpack("<Q", good[:8])[0]
    place = st.one_of(st.integers(0, header - 1), st.integers(header, len(good) - 1))
    contents = bytearray(good)
    for index in data.draw(st.lists(place, min_size=1, max_size=3, unique=True)):
        contents[index] ^= data.draw(st.integers(1, 255))
    assert_refused_or_unharmed(bytes(contents), good, tmp_path / "file")


def with_text(good: bytes, text: str) -> bytes:
    """The file with another text instead of the package's header."""
    header, tensors = about(good)
    header["__metadata__"]["backward_lens_tl"] = text
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + tensors


json_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**30),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["backward_lens_tl.positions", "Readout", "MatrixGradient", "os.system", "W_in"]
    ),
)
json_junk = st.recursive(
    json_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["tensor", "mapping", "dataclass", "fields"]), inner),
    ),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path in a JSON document, parents before children."""
    yield path
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        entry = tree[key]
        yield from places(entry, (*path, key))


@examples(60)
@given(data=st.data())
def test_an_edited_header_is_detected(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    tree = json.loads(about(good)[0]["__metadata__"]["backward_lens_tl"])
    path = data.draw(st.sampled_from(list(places(tree))))
    new = data.draw(json_junk)
    if not path:
        tree = new
    else:
        parent = functools.reduce(lambda node, key: node[key], path[:-1], tree)
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                parent[path[-1]] = new
            case "remove":
                del parent[path[-1]]
            case "add" if isinstance(parent, list):
                parent.insert(path[-1], new)
            case "add":
                parent[data.draw(st.text(max_size=3))] = new
    assert_refused_or_unharmed(with_text(good, json.dumps(tree)), good, tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "1", '"x"', "[]", "[" * 100_000),
        *(f'{{"format": {FORMAT_VERSION}{more}}}' for more in ("", ', "tree": 1', ', "tree": {}')),
    ],
    ids=lambda text: text[:24],
)
def test_a_header_that_is_something_else_is_refused(good: bytes, tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(with_text(good, text))
    with pytest.raises(ResultFileError, match="file"):
        BackwardLensResult.load(path)


# ---------------------------------------------------------------------------------- names of models


@pytest.mark.parametrize(
    "load",
    [load_model, lambda value: load_model("facts", value), load_facts_model],
    ids=["name", "kind of a name", "kind"],
)
def test_a_name_without_a_model_is_refused(
    load: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not failures(load)


@examples(40)
@given(name=st.one_of(st.text(max_size=12), st.text(alphabet="ab/.-\\:", max_size=12)))
def test_any_name_is_refused_by_name(name: str) -> None:
    assert outcome(load_model, name, also=repr(str(Path(name)))) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer in Hugging Face format."""
    path = tmp_path_factory.mktemp("model")
    config = GPT2Config(
        vocab_size=D_VOCAB, n_positions=16, n_ctx=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


@pytest.mark.versions
def test_a_valid_folder_is_loaded(folder: Path) -> None:
    """Negative control for the test below."""
    model = load_model(str(folder))
    check(backward_lens(model, IDS, 5))


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "no weights": ("model.safetensors", lambda old: None),
    "empty weights": ("model.safetensors", lambda old: b""),
    "half of the weights": ("model.safetensors", lambda old: old[: len(old) // 2]),
    "random weights file": ("model.safetensors", lambda old: b"random" * 50),
    "weights of other sizes": (
        "config.json",
        lambda old: old.replace(b'"vocab_size": 97', b'"vocab_size": 98'),
    ),
    "no configuration": ("config.json", lambda old: None),
    "empty configuration": ("config.json", lambda old: b""),
    "a list for a configuration": ("config.json", lambda old: b"[]"),
    "a text for a size": ("config.json", lambda old: old.replace(b'"n_head": 2', b'"n_head": "x"')),
    "another type of model": ("config.json", lambda old: old.replace(b'"gpt2"', b'"nonsense"')),
    "no heads": ("config.json", lambda old: old.replace(b'"n_head": 2', b'"n_head": 0')),
    "three heads of eight": (
        "config.json",
        lambda old: old.replace(b'"n_head": 2', b'"n_head": 3'),
    ),
    "no tokenizer": ("tokenizer.json", lambda old: None),
    "empty tokenizer": ("tokenizer.json", lambda old: b""),
    "half of the tokenizer": ("tokenizer.json", lambda old: old[: len(old) // 2]),
    "no model in the tokenizer": ("tokenizer.json", lambda old: b'{"model": 1}'),
    "a number for a token": (
        "tokenizer_config.json",
        lambda old: old.replace(b'"bos_token": "<bos>"', b'"bos_token": 0'),
    ),
    "a list for a tokenizer's settings": ("tokenizer_config.json", lambda old: b"[]"),
}


@pytest.mark.versions
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(damage: str, folder: Path, tmp_path: Path) -> None:
    name, spoil = DAMAGE[damage]
    path = shutil.copytree(folder, tmp_path / "model")
    old = (path / name).read_bytes()
    new = spoil(old)
    assert new != old
    (path / name).unlink()
    if new is not None:
        (path / name).write_bytes(new)
    with pytest.raises(BackwardLensError) as raised:
        load_model(str(path))
    assert str(path) in str(raised.value)
