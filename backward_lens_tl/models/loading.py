"""Load models by name: the facts model of this package, local folders, the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import as_file, files
from importlib.util import find_spec
from os.path import isdir
from pathlib import Path
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
from backward_lens_tl.models.vocabulary import Vocabulary

FACTS_MODEL = "facts"
"""Name of the model that ships with the package."""


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
        name: `"facts"`, a local folder in Hugging Face format, or a name on the hub such as
            `"gpt2"`.
        kind: `"bridge"`, `"hooked"`, or `None` for a bridge if the installed TransformerLens has
            one.
        device: The device, such as `"cuda:1"`; `None` is the CPU for a folder, and for a hub
            name what TransformerLens chooses.
        n_devices: Number of GPUs to split the layers over, starting at `device`.

    Returns:
        The model, in eval mode.

    Raises:
        ModelNotFoundError: If there is no such model, or the hub cannot be reached.
        UnsupportedModelError: If the installed versions cannot load a folder, or load it wrongly:
            its logits are compared with those of the plain Hugging Face model.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_model("facts")  # or "gpt2", or a folder
        >>> model.cfg.n_layers, model.cfg.d_model
        (8, 128)
    """
    if not isinstance(name, str):
        raise ModelNotFoundError(f"{name!r} is a {type(name).__name__}; pass a name or a folder")
    check_text("model name", name, ModelNotFoundError)
    kind = _checked_kind(kind)
    if name == FACTS_MODEL:
        return load_facts_model(kind, device)
    model: nn.Module = (
        _load_folder(Path(name), kind, device, n_devices)
        if isdir(name)
        else _load_from_hub(name, kind, device, n_devices)
    )
    return model.eval()


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
        hf_model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    # A damaged file can make the libraries that read it raise anything.
    except Exception as error:
        raise ModelNotFoundError(
            f"folder {str(folder)!r} does not hold a model and a tokenizer in Hugging Face format "
            f"that transformers {version('transformers')} reads: {first_line(error)}; "
            f"{FACTS_MODEL!r} is the model that ships with this package"
        ) from error
    _check_rope(folder, hf_model.config)
    rows = hf_model.get_input_embeddings().weight.shape[0]
    n_ctx = getattr(hf_model.config, "max_position_embeddings", None) or rows
    tokens = probe_tokens(rows, n_ctx, Vocabulary(tokenizer, rows).special_ids)
    with torch.no_grad():
        expected = hf_model(tokens).logits  # before a bridge takes the model apart
    load = _bridge_from_folder if kind == "bridge" else _hooked_from_folder
    model = load(folder, hf_model, tokenizer, device or "cpu", n_devices)
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

    try:
        cfg = loading_from_pretrained.get_pretrained_model_config(
            str(folder), device=device, n_devices=n_devices
        )
        weights = loading_from_pretrained.get_pretrained_state_dict(str(folder), cfg, hf_model)
    except (AttributeError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"TransformerLens cannot turn {str(folder)!r} into a HookedTransformer ({error}); "
            "load it with kind='bridge' (TransformerLens 3.6 or newer)"
        ) from error
    model = HookedTransformer(cfg, tokenizer)
    model.load_and_process_state_dict(
        weights,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def _load_from_hub(name: str, kind: Kind, device: str | None, n_devices: int) -> Any:
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
            "network)"
        ) from error
