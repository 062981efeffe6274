"""Collecting second moments from texts.

Only the layers up to the last one that is asked for run, on texts of similar length together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import checked_count
from backward_lens_tl.capture.batching import PASS_TOKENS, token_batches
from backward_lens_tl.capture.forward import forward_pass
from backward_lens_tl.capture.prompts import pad_prompts, tokenize_prompts
from backward_lens_tl.data.texts import read_lines
from backward_lens_tl.editing.statistics.moments import SecondMoments
from backward_lens_tl.editing.statistics.provenance import PROBE_TOKENS, last_inputs
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.resumption import stopped_after
from backward_lens_tl.models.sites import MatrixName

_CHUNK = 16
"""Texts that are read at once, and sorted by length."""


@raised_as(EditError)
@torch.no_grad()
def second_moments(
    model: nn.Module,
    texts: str | Path | Iterable[str],
    *,
    matrix: MatrixName = "W_out",
    layers: int | Sequence[int] | None = None,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    out: str | Path | None = None,
    save_every: int = 1000,
    progress: bool = True,
) -> SecondMoments:
    """Collect `E[x x^T]` of the inputs of a matrix, over all tokens of some texts.

    Texts are read in order, and cut at the model's context. Layers above the last one that is asked
    for do not run. With `out`, the statistics are saved regularly; the same call with the same
    texts resumes from the file.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        texts: The texts, from any iterator; empty ones are skipped. Or a file with one text per
            line, `"facts"` (sentences of the facts model), or `"Salesforce/wikitext"` (WikiText-2's
            test split).
        matrix: Name of a matrix of the MLP.
        layers: Layers, negative ones from the end; `None` for all.
        max_tokens: Stop after this many tokens; `None` for all texts. An inverse needs more tokens
            than the matrix has inputs (`d_mlp` for `W_out`).
        prepend_bos: Whether texts get a BOS token; `None` is the model's own default.
        out: A file to save to and to resume from.
        save_every: Save after this many texts.
        progress: Whether to show a progress bar.

    Returns:
        The statistics.

    Raises:
        EditError: If there is no text, texts cannot be read, `out` holds other statistics or
            statistics of other texts, or a setting is not usable.
        UnsupportedModelError: If the matrix belongs to a mixture of experts, or is used several
            times in a forward pass.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> texts = ["Lionel Messi plays for Barcelona.", "The capital of France is Paris."]
        >>> moments = blt.editing.second_moments(model, texts, layers=[5], progress=False)
        >>> moments.n_texts, moments.of(5).shape
        (2, torch.Size([512, 512]))
    """
    if max_tokens is not None:
        max_tokens = checked_count("max_tokens", max_tokens, EditError)
    save_every = checked_count("save_every", save_every, EditError)
    if isinstance(texts, str | Path):
        texts = map(str.strip, read_lines(str(texts)))
    host = host_of(model)
    sites = find_editable(host, matrix, layers, mlp_only=True)
    file = None if out is None else Path(out)
    stream = (text for text in texts if text)
    collected = _Collected(
        SecondMoments(
            model=host.fingerprint(),
            name=host.name,
            prepend_bos=prepend_bos,
            probe=(),
            probe_inputs=(),
            matrix=matrix,
            layers=tuple(site.layer for site in sites),
            moments=(),
            n_tokens=0,
            n_texts=0,
            texts="",
        )
    )
    if file is not None and file.exists():
        collected.resume(SecondMoments.load(file), stream)
    found = collected.found
    with tqdm(total=max_tokens, unit="token", disable=not progress, initial=found.n_tokens) as bar:
        n_saved = found.n_texts
        while max_tokens is None or found.n_tokens < max_tokens:
            some = list(islice(stream, _CHUNK))
            if not some:
                break
            n_before = found.n_tokens
            collected.add(host, some)
            found = collected.found
            bar.update(found.n_tokens - n_before)
            if file is not None and found.n_texts - n_saved >= save_every:
                found.save(file)
                n_saved = found.n_texts
    if not found.n_tokens:
        raise EditError("texts has no non-empty text; pass at least one")
    if file is not None:
        found.save(file)
    return found


@dataclass
class _Collected:
    """Means over the tokens so far, kept as they are saved, so resuming changes no bit.

    Attributes:
        found: The means.
        upper: Where a flattened matrix has its upper triangle, by size.
    """

    found: SecondMoments
    upper: dict[int, Tensor] = field(default_factory=dict)

    def resume(self, saved: SecondMoments, texts: Iterable[str]) -> None:
        """Resume from a file, and skip the texts that it was collected from."""
        for name in ("matrix", "layers", "prepend_bos", "model"):
            held, asked = getattr(saved, name), getattr(self.found, name)
            if held != asked:
                raise EditError(
                    f"the file holds statistics with {name} {held!r}, not {asked!r}; "
                    "choose another file"
                )
        digest = ""
        for text in islice(texts, saved.n_texts):
            digest = _digest(digest, text)
        if digest != saved.texts:
            raise EditError(
                f"the file holds statistics of {saved.n_texts} other texts; "
                "pass the same texts, or choose another file"
            )
        moments = tuple(own.double() for own in saved.moments)
        self.found = replace(saved, moments=moments, name=self.found.name)

    def add(self, host: Host, texts: Sequence[str]) -> None:
        """Add the inputs of the matrix in some texts."""
        found = self.found
        prompts = tokenize_prompts(host, texts, found.prepend_bos)
        rows = [prompt.ids[: host.n_ctx] for prompt in prompts]
        sites = find_editable(host, found.matrix, found.layers)
        if not found.probe:
            probe = tuple(rows[0][:PROBE_TOKENS])
            found = replace(found, probe=probe, probe_inputs=last_inputs(host, sites, probe))
        last = max(site.layer for site in sites)
        sums = [torch.zeros((), dtype=torch.float64)] * len(sites)
        for some in token_batches(host, list(map(len, rows)), PASS_TOKENS):
            batch = pad_prompts(host, [rows[at] for at in some])
            # Only the products are kept: the inputs of all layers are many times larger.
            with stopped_after(host, last):
                seen = forward_pass(host, batch, inputs=sites, keep=partial(self._gram, batch.mask))
            sums = [total + own for total, own in zip(sums, seen.inputs, strict=True)]
        before, n_tokens = found.n_tokens, found.n_tokens + sum(map(len, rows))
        means = found.moments or [torch.zeros_like(total) for total in sums]
        digest = found.texts
        for text in texts:
            digest = _digest(digest, text)
        self.found = replace(
            found,
            moments=tuple(
                (mean * before + total) / n_tokens for mean, total in zip(means, sums, strict=True)
            ),
            n_tokens=n_tokens,
            n_texts=found.n_texts + len(texts),
            texts=digest,
        )

    def _gram(
        self, mask: Bool[Tensor, "batch pos"], values: Float[Tensor, "batch pos d_in"]
    ) -> Float[Tensor, "triangle"]:
        """`X^T X` over real tokens: the upper triangle, row by row, in float64 on the CPU."""
        inputs = at_least_float32(values[mask.to(values.device)])
        # Products over a few thousand tokens are accurate in float32; sums of many are not.
        product = (inputs.T @ inputs).cpu()
        size = len(product)
        if size not in self.upper:
            row, column = torch.triu_indices(size, size)
            self.upper[size] = row * size + column
        return product.flatten()[self.upper[size]].double()


def _digest(before: str, text: str) -> str:
    """A checksum of texts in their order, from the checksum of the texts before."""
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
