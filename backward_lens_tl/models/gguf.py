"""Load GGUF files, llama.cpp's format, as Hugging Face models in float32."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from backward_lens_tl.errors import ModelNotFoundError, UnsupportedModelError, first_line
from backward_lens_tl.models.gguf_file import GGUFFile
from backward_lens_tl.models.gguf_tokenizer import byte_level_tokenizer, with_llamas_spaces

_WORTH_COPYING = 2**30
"""Bytes up to which a copy without the vocabulary takes less time than it saves."""

_INSTEAD = "Load the model's folder in Hugging Face format, or its name on the hub, instead"


def read_gguf(path: Path, folder: Path, *, with_weights: bool) -> tuple[GGUFFile, Any, Any]:
    """Load a model with its tokenizer; quantized weights become float32.

    Args:
        path: The file.
        folder: An empty folder, for the configuration and the tokenizer in Hugging Face format,
            from which TransformerLens reads them again.
        with_weights: Also write the weights there.

    Returns:
        The file's header, the Hugging Face model and its tokenizer.

    Raises:
        ModelNotFoundError: If the package `gguf` is missing, or the file is damaged.
        UnsupportedModelError: If transformers cannot read the architecture, or the tokenizer cannot
            be rebuilt.
    """
    if find_spec("gguf") is None:
        raise ModelNotFoundError(
            f"{str(path)!r} needs the package gguf: pip install 'backward-lens-tl[gguf]'"
        )
    file = GGUFFile.read(path)
    _check_rope(file)
    _tokenizer(file).save_pretrained(folder)
    model = _model(file)
    (model if with_weights else model.config).save_pretrained(folder)
    return file, model, AutoTokenizer.from_pretrained(folder)


def _check_rope(file: GGUFFile) -> None:
    """Raise if the file scales its rotary angles, which transformers ignores."""
    keys = (f"{file.architecture}.rope.{name}" for name in ("scaling.factor", "scale_linear"))
    is_scaled = any(file.metadata.get(key, 1) not in (0, 1) for key in keys)  # 0 is unset
    # Like llama.cpp, which scales linearly where a file has a factor but no type.
    scaling = file.metadata.get(
        f"{file.architecture}.rope.scaling.type", "linear" if is_scaled else "none"
    )
    factors = [each.name for each in file.tensors if each.name.startswith("rope_f")]
    if scaling != "none" or factors:
        raise UnsupportedModelError(
            f"{str(file.path)!r} scales its rotary angles ({', '.join(factors) or scaling}), which "
            f"transformers {version('transformers')} does not read from GGUF files. {_INSTEAD}"
        )


def _tokenizer(file: GGUFFile) -> Any:
    try:
        kind = file.metadata.get("tokenizer.ggml.model")
        if kind == "gpt2":
            return byte_level_tokenizer(file.metadata)
        found = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
        return with_llamas_spaces(found, file.metadata) if kind == "llama" else found
    # Metadata that do not fit together can make the libraries raise anything.
    except Exception as error:
        raise UnsupportedModelError(
            f"the tokenizer of {str(file.path)!r} cannot be rebuilt: {first_line(error)}. "
            f"{_INSTEAD}"
        ) from error


def _model(file: GGUFFile) -> Any:
    try:
        model, missing = _dequantized(file)
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers {version('transformers')} does not load {str(file.path)!r} "
            f"(architecture {file.architecture!r}): {first_line(error)}. {_INSTEAD}"
        ) from error
    if missing:
        raise UnsupportedModelError(
            f"transformers {version('transformers')} finds no tensor in {str(file.path)!r} for "
            f"{missing[0]} and {len(missing) - 1} other weights, which would be random"
        )
    n_read = sum(weight.numel() for weight in model.parameters())
    if n_read < file.n_values:
        raise UnsupportedModelError(
            f"transformers {version('transformers')} ignores {file.n_values - n_read:,} of "
            f"{file.n_values:,} values in {str(file.path)!r}, so the model would not compute what "
            f"llama.cpp does. {_INSTEAD}"
        )
    model.config.architectures = [type(model).__name__]
    # The weights are no longer quantized.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _dequantized(file: GGUFFile) -> tuple[Any, list[str]]:
    """The model as transformers loads it, and its weights that are not in the file."""
    auto: Any = AutoModelForCausalLM
    # The progress bar of dequantization has no switch.
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()), _one_table_of_names():
        path = file.path
        if path.stat().st_size <= _WORTH_COPYING:
            path = Path(folder) / "model.gguf"
            file.write_without_vocabulary(path)
        config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        config.vocab_size = file.d_vocab or config.vocab_size
        model, loaded = auto.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    return model, sorted(loaded["missing_keys"])


@contextmanager
def _one_table_of_names() -> Iterator[None]:
    """Keep gguf's table of tensor names, which transformers builds again for each module.

    This takes four seconds for 30 layers. The table depends only on its arguments.
    """
    library: Any = import_module("gguf")
    build = library.get_tensor_name_map
    library.get_tensor_name_map = functools.cache(build)
    try:
        yield
    finally:
        library.get_tensor_name_map = build
