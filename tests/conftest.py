"""Models shared by the tests; no test may change them (test_state.py checks the package)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import (
    HAS_HOOKED,
    NAMES,
    Case,
    Parameter,
    build,
    hf_matrices,
    hf_reading,
    hf_weights,
    hooked_case,
    readable,
    require_kind,
)
from transformers import AutoModelForCausalLM
from type_checks import type_checks_off

from backward_lens_tl.models.loading import load_facts_model, load_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FACTS_FOLDER = Path(__file__).parents[1] / "backward_lens_tl" / "facts_model"
KINDS = ("bridge", "hooked")


@pytest.fixture
def as_for_a_user() -> Iterator[None]:
    """Switch off the tests' run-time type checks, which stay on in the other files.

    They run before the package's own checks, beartype uses Python's random numbers, and
    they make small models several times slower.
    """
    with type_checks_off():
        yield


@pytest.fixture
def not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the probing passes of a new model, so that only the other passes are counted."""
    monkeypatch.setattr("backward_lens_tl.models.probing._probed", lambda host: None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; skipped where there is none."""
    # Only here, so that the other tests run without playwright.
    from browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    """Every random model, in float64."""
    return build(request.param)


@pytest.fixture(scope="session", params=("bridge-gpt2", "hooked-gpt2"))
def gpt2(request: pytest.FixtureRequest) -> Case:
    """A dense random model of each class, in float64."""
    return build(request.param)


@pytest.fixture(scope="session")
def one_gpt2() -> Case:
    """A dense random model of an available class, for tests that do not depend on the class."""
    return build("hooked-gpt2" if HAS_HOOKED else "bridge-gpt2")


@pytest.fixture(scope="session", params=("bridge-llama", "hooked-llama"))
def llama(request: pytest.FixtureRequest) -> Case:
    """A gated random model of each class, in float64."""
    return build(request.param)


@pytest.fixture(scope="session")
def stories_folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained Llama, in a format that the installed transformers reads."""
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set BACKWARD_LENS_SHARED to the folder of test data")
    return readable(folder, tmp_path_factory)


@pytest.fixture(scope="session", params=KINDS)
def stories(request: pytest.FixtureRequest, stories_folder: Path) -> Case:
    """A trained Llama architecture of 260 k parameters, in float32."""
    return trained_case(stories_folder, request.param)


@pytest.fixture(scope="session", params=KINDS)
def facts(request: pytest.FixtureRequest) -> Case:
    """The trained GPT-2 architecture shipped in the package, in float32."""
    return trained_case(FACTS_FOLDER, request.param)


@pytest.fixture(scope="session")
def facts_model() -> Any:
    """The model shipped in the package, as users load it; no test changes it."""
    return load_facts_model()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test data outside the repository."""
    default = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("BACKWARD_LENS_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is not there; set BACKWARD_LENS_SHARED")
    return folder


def trained_case(folder: Path, kind: str) -> Case:
    """A model as the package loads it, and the raw Hugging Face model as its reference."""
    require_kind(kind)
    model = load_facts_model(kind) if folder == FACTS_FOLDER else load_model(str(folder), kind)
    if kind == "hooked":
        return hooked_case(model, name=folder.name)
    raw = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    own: dict[tuple[str, int], Parameter] = {}  # not accessible from a loaded bridge
    norm, unembed = hf_reading(raw)
    return Case(
        folder.name,
        model,
        own,
        logits=lambda tokens: raw(tokens).logits,
        weights=hf_weights(raw),
        outputs=hf_matrices(raw),
        norm=norm,
        unembed=unembed,
    )
