"""Fit a Jacobian Lens: TransformerLens's own estimator, one prompt at a time, saved as it goes.

The estimate is an average over prompts. A file with the average over the first prompts is therefore
a lens itself, and all that a fit needs to resume: after a stop, even by `kill -9`, the same call
continues with the next prompt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_path, checked_count, is_integer, shown, truncated
from backward_lens_tl.errors import (
    JacobianLensError,
    ModelStateError,
    UnsupportedModelError,
    first_line,
    raised_as,
)
from backward_lens_tl.files.storage import remove_partials, replacing
from backward_lens_tl.jacobians.average import WEIGHTS, Jacobians
from backward_lens_tl.jacobians.corpus import Corpus, draw_corpus
from backward_lens_tl.jacobians.loading import SUFFIX, load_jacobians
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.own_passes import own_passes
from backward_lens_tl.models.transformer_bridge import TransformerBridgeHost

if TYPE_CHECKING:
    from transformer_lens.tools.analysis import JacobianLens

_TEXTS, _TOO_SHORT = "texts_sha256", "n_too_short"
"""Entries of the metadata that depend on the number of prompts."""

_ARGUMENTS = {"max_seq_len": "max_length", "skip_first_positions": "skip"}
"""Our names of arguments that TransformerLens's metadata calls otherwise."""

_DISTRIBUTIONS = ("backward-lens-tl", "transformer-lens", "torch", "transformers")

_MOST_ROWS_ON_CPU, _MOST_ROWS = 16, 128
"""Rows of a Jacobian per backward pass; more of them take no less time per row."""


@raised_as(JacobianLensError)
def fit_jacobian_lens(
    model: nn.Module,
    texts: str | Path | Sequence[str],
    out: str | Path,
    *,
    prompts: int = 100,
    max_length: int = 128,
    skip: int = 16,
    seed: int | None = 0,
    dim_batch: int | None = None,
    save_every: int = 4,
    progress: bool = True,
) -> JacobianLens:
    """Fit a Jacobian Lens with TransformerLens's `JacobianLens.fit`, or resume a fit.

    `J_l` is the average over prompts and positions of `d h_final / d h_l`, where `h_l` is the
    output of block `l`. The effects of a position on all later ones of its prompt are added.

    `out` is replaced after every few prompts, and is a lens of the prompts so far. The same call
    resumes from it, and a call with more `prompts` continues a finished fit.

    Args:
        model: A `TransformerBridge` with unprocessed weights, of TransformerLens 3.9 or newer.
        texts: Texts, or a file with one text per line, `"facts"` (sentences of the facts model), or
            `"Salesforce/wikitext"`. They get a BOS token if `model.to_tokens(text)` adds one.
        out: The file to write, or to resume from; its name ends in `.pt`.
        prompts: Number of texts to use; fewer if there are not as many that are long enough.
        max_length: Number of tokens of each text to read, with BOS.
        skip: Number of positions at the start of each text to leave out. The last position is left
            out too, and a text that has no others is not used.
        seed: Seed for drawing texts; `None` takes them in their order.
        dim_batch: Rows of `J_l` per backward pass. `None` is as many as memory holds, or the number
            with which the fit began.
        save_every: Save after this many prompts.
        progress: Whether to show a progress bar.

    Returns:
        TransformerLens's `JacobianLens`. Its metadata says what it was fitted on.

    Raises:
        JacobianLensError: If no text is long enough, `out` holds another fit, or a setting is not
            usable.
        UnsupportedModelError: If TransformerLens cannot fit a lens on the model.
        ModelStateError: If the weights were processed, the model has hooks, or it is in another
            state in which the result would be wrong.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model("bridge")
        >>> out = f"{tempfile.mkdtemp()}/lens.pt"
        >>> lens = blt.fit_jacobian_lens(model, "facts", out, prompts=2, skip=4, progress=False)
        >>> lens.n_prompts, lens.source_layers
        (2, [0, 1, 2, 3, 4, 5, 6])
    """
    prompts, save_every = checked_count("prompts", prompts), checked_count("save_every", save_every)
    max_length = checked_count("max_length", max_length)
    if not is_integer(skip) or not 0 <= skip < max_length - 1:
        raise JacobianLensError(
            f"skip is {shown(skip)}, but must be from 0 to {max_length - 2}: of the {max_length} "
            "tokens of max_length, the first ones and the last one are left out"
        )
    file = _checked_file(out)
    host = _checked_host(model)
    corpus = draw_corpus(host, texts, prompts, skip + 2, seed)
    held = load_jacobians(file) if file.exists() else None
    if dim_batch is not None:
        dim_batch = checked_count("dim_batch", dim_batch)
    elif held is not None and is_integer(held.metadata.get("dim_batch")):
        dim_batch = held.metadata["dim_batch"]
    fit = _Fit(
        model=model,
        corpus=corpus,
        settings={
            "corpus": corpus.name,
            "max_seq_len": max_length,
            "skip_first_positions": int(skip),
            "dim_batch": dim_batch or _rows_in_memory(host, max_length),
        },
        about={
            WEIGHTS: host.fingerprint(),
            "prepend_bos": bool(getattr(host.model.cfg, "default_prepend_bos", True)),
            "seed": None if seed is None else int(seed),
            "versions": {name: version(name) for name in _DISTRIBUTIONS},
        },
    )
    found = [] if held is None else [fit.resumed(file, held)]
    n_done, n_prompts = sum(lens.n_prompts for lens in found), len(corpus.texts)
    with tqdm(total=n_prompts, initial=n_done, unit="prompt", disable=not progress) as bar:
        for n in range(n_done, n_prompts):
            found = [fit.merged(found, corpus.texts[n])]
            if (n + 1) % save_every == 0 or n + 1 == n_prompts:
                fit.save(file, found[0])
            bar.update()
    return fit.described(found[0])


@dataclass(frozen=True)
class _Fit:
    """What a fit is of.

    Attributes:
        model: The model.
        corpus: The texts.
        settings: Arguments of `JacobianLens.fit`, which its metadata has too.
        about: Further metadata.
    """

    model: Any
    corpus: Corpus
    settings: Mapping[str, Any]
    about: Mapping[str, Any]

    def resumed(self, file: Path, held: Jacobians) -> JacobianLens:
        """The lens in a file, if it is of this fit's first prompts."""
        from transformer_lens.tools.analysis import JacobianLens

        name, metadata, n = repr(os.fspath(file)), dict(held.metadata), held.n_prompts
        if _TEXTS not in metadata:
            raise JacobianLensError(
                f"{name} holds a lens that fit_jacobian_lens did not write; choose another file"
            )
        asked = {"model_name": self.model.cfg.model_name, **self.about, **self.settings}
        for entry, now in asked.items():
            if metadata.get(entry) != now:
                raise JacobianLensError(
                    f"{name} holds a fit with another {_ARGUMENTS.get(entry, entry)}: it was "
                    f"{metadata.get(entry)!r}, and is {now!r}. Resume it with the original "
                    "values, or choose another file"
                )
        if metadata[_TEXTS] != self.corpus.fingerprint(n):
            raise JacobianLensError(
                f"{name} holds a fit on {n} prompts, which are not the first of the "
                f"{len(self.corpus.texts)} that are asked for. Pass the same texts and at least "
                "as many prompts, or choose another file"
            )
        del metadata[_TEXTS], metadata[_TOO_SHORT]
        own = {layer: matrix.clone() for layer, matrix in held.matrices.items()}
        return JacobianLens(own, n_prompts=n, d_model=held.d_model, metadata=metadata)

    def merged(self, found: Sequence[JacobianLens], text: str) -> JacobianLens:
        """The average of lenses and of one more prompt."""
        from transformer_lens.tools.analysis import JacobianLens

        try:
            with own_passes():
                own = JacobianLens.fit(
                    self.model,
                    [text],
                    show_progress=False,
                    metadata=dict(self.about),
                    **self.settings,
                )
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"TransformerLens cannot fit a Jacobian Lens on {self.model.cfg.model_name!r}: "
                f"{first_line(error)}"
            ) from error
        if not all(bool(matrix.isfinite().all()) for matrix in own.jacobians.values()):
            raise JacobianLensError(
                f"the Jacobian of text {truncated(text)!r} is not finite; leave the text out, or "
                "fit the model in float32"
            )
        return JacobianLens.merge([*found, own])

    def described(self, lens: JacobianLens) -> JacobianLens:
        """A lens with the metadata that depends on the number of prompts."""
        found = {
            _TEXTS: self.corpus.fingerprint(lens.n_prompts),
            _TOO_SHORT: self.corpus.n_too_short,
        }
        return type(lens)(
            lens.jacobians,
            n_prompts=lens.n_prompts,
            d_model=lens.d_model,
            metadata={**lens.metadata, **found},
        )

    def save(self, file: Path, lens: JacobianLens) -> None:
        """Write a lens atomically, in float32: the fit resumes from it."""
        remove_partials(file)
        with replacing(file) as partial, partial.open("wb") as opened:
            stream: Any = opened  # torch would store the random name of a path in the file
            self.described(lens).save(stream, dtype=torch.float32)


def _checked_file(out: object) -> Path:
    check_path(out, JacobianLensError)
    file = Path(str(out))
    if file.suffix != SUFFIX:
        raise JacobianLensError(
            f"out is {os.fspath(file)!r}; the name of a lens's file ends in {SUFFIX!r}"
        )
    if not os.path.isdir(file.parent):
        raise JacobianLensError(
            f"out is {os.fspath(file)!r}, but folder {os.fspath(file.parent)!r} does not exist"
        )
    return file


def _checked_host(model: nn.Module) -> Host:
    """The host of a model that TransformerLens can fit a lens on."""
    advice = (
        "Fit it on the TransformerBridge of the same model, load_model(name, kind='bridge'); the "
        "file can be used with this model too"
    )
    host = host_of(model)
    try:
        from transformer_lens.tools.analysis import JacobianLens  # noqa: F401
    except ImportError as error:
        raise UnsupportedModelError(
            f"TransformerLens {version('transformer-lens')} cannot fit a Jacobian Lens; install "
            f"3.9 or newer. {advice}"
        ) from error
    if not isinstance(host, TransformerBridgeHost):
        raise UnsupportedModelError(
            f"TransformerLens cannot fit a Jacobian Lens on a {type(model).__name__}. {advice}"
        )
    if any(getattr(model, each, False) for each in ("compatibility_mode", "_weights_processed")):
        raise ModelStateError(
            f"the weights of {host.name!r} were processed, which changes the residual stream that "
            f"a Jacobian Lens is fitted on. {advice}"
        )
    if host.hooked_modules:
        raise ModelStateError(
            f"{host.name!r} has hooks, so the lens would be one of the model with these hooks, "
            "which its file cannot record; remove them with model.reset_hooks(), or fit outside "
            "model.hooks(...)"
        )
    return host


def bytes_per_row(host: Host, n_tokens: int) -> int:
    """What autograd keeps for one row of a Jacobian: a copy of the prompt's forward pass.

    Args:
        host: The model.
        n_tokens: Tokens of the prompt.

    Returns:
        Bytes, as measured on GPT-2 and Llama architectures in float32, and those of the logits.
    """
    per_layer = 8 * host.d_model + 2 * host.d_mlp + 2 * host.n_heads * n_tokens
    return 4 * n_tokens * (host.n_layers * per_layer + 2 * host.d_vocab_out)


def _rows_in_memory(host: Host, n_tokens: int) -> int:
    """Rows of a Jacobian per backward pass, such that half of the free memory is enough."""
    if host.device.type == "cuda":
        free, most = torch.cuda.mem_get_info(host.device)[0], _MOST_ROWS
    else:
        free, most = psutil.virtual_memory().available, _MOST_ROWS_ON_CPU
    return max(1, min(most, host.d_model, free // 2 // bytes_per_row(host, n_tokens)))
