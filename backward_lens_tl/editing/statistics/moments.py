"""Second moments of what matrices read: which directions a model uses, and how much.

`C = E[x x^T]` over tokens of a text, uncentred. An edit along `C^-1 k` changes what is read along
`k` and as little as possible of all else that the text makes the matrix read (ROME, equation 2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import is_integer, shown
from backward_lens_tl.capture.forward_backward import read_logits
from backward_lens_tl.capture.prompts import PromptBatch, pad_prompts, tokenize_prompts
from backward_lens_tl.editing.statistics.probes import PROBE_TOKENS, is_alike, last_reads
from backward_lens_tl.errors import EditError, UnsupportedModelError, raised_as
from backward_lens_tl.files.storage import Saved
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.selection import find_editable
from backward_lens_tl.models.sites import MatrixName, MatrixSite
from backward_lens_tl.models.taps import hooked

RIDGE = 1e-6
"""Part of the mean variance that is added to every direction, so that the inverse exists."""

_BATCH = 16

FACTS_MOMENTS = "second_moments.safetensors"
"""Name of the file that ships with the facts model."""


@dataclass(frozen=True, repr=False)
class SecondMoments(Saved):
    """Uncentred second moments `E[x x^T]` of what one matrix per layer reads, and of which text.

    Attributes:
        matrix: The matrix that reads.
        layers: The layers.
        moments: The upper triangle of each layer's moments, row by row, in the order of `layers`.
        n_tokens: Tokens seen.
        n_texts: Texts seen.
        texts: SHA-256 of the texts, one after the other.
        model: SHA-256 of the model's parameters.
        name: The model's name.
        prepend_bos: Whether the texts got a BOS token.
        probe: Token ids of a short prompt, by which the model is known again.
        probe_inputs: What the matrix reads at its last position, in the order of `layers`.

    Examples:
        >>> import backward_lens_tl as blt
        >>> moments = blt.editing.facts_moments()
        >>> moments.of(3).shape
        torch.Size([512, 512])
    """

    WHAT = "second moments"

    matrix: MatrixName
    layers: tuple[int, ...]
    moments: tuple[Float[Tensor, "triangle"], ...]
    n_tokens: int
    n_texts: int
    texts: str
    model: str
    name: str
    prepend_bos: bool | None
    probe: tuple[int, ...]
    probe_inputs: tuple[Float[Tensor, "d_in"], ...]

    @cached_property
    def fingerprint(self) -> str:
        """What they are of, in one line, and a checksum, for the settings of a method."""
        held = dict(zip(map(str, self.layers), self.moments, strict=True))
        digest = tensors_digest(held, f"{self.matrix} {self.layers} {self.prepend_bos}")
        return (
            f"{self.matrix} of {self.name} ({self.model[:12]}), {self.n_tokens} tokens of "
            f"{self.n_texts} texts ({self.texts[:12]}), {digest[:12]}"
        )

    def of(self, layer: int) -> Float[Tensor, "d_in d_in"]:
        """The moments of one layer.

        Args:
            layer: The layer, from 0.

        Returns:
            `E[x x^T]`, in float64.

        Raises:
            EditError: If they were not collected at this layer.

        Examples:
            >>> second = moments.of(5)
            >>> second.shape, torch.equal(second, second.T)
            (torch.Size([512, 512]), True)
        """
        self._check_layers([layer])
        packed = self.moments[self.layers.index(layer)].double()
        size = _side(len(packed))
        upper = packed.new_zeros(size, size)
        upper[tuple(torch.triu_indices(size, size))] = packed
        return upper + upper.triu(1).T

    def solve(
        self, layer: int, keys: Float[Tensor, "d_in n"], ridge: float = RIDGE
    ) -> Float[Tensor, "d_in n"]:
        """`C^-1 K`, by a Cholesky factorisation in float64.

        Args:
            layer: The layer, from 0.
            keys: The keys, as columns.
            ridge: Part of the mean variance `tr(C) / d_in` that is added to the diagonal. With
                no more tokens than dimensions it decides what comes out, and has to be given.

        Returns:
            The solution, in float64.

        Raises:
            EditError: If there are no statistics of the layer, or too few for an inverse.

        Examples:
            >>> keys = gradient.inputs[0].T  # [d_in, n]
            >>> whitened = moments.solve(6, keys)
            >>> torch.allclose(moments.of(6) @ whitened, keys.double(), atol=1e-3)
            True
        """
        moments = self.of(layer)
        if len(moments) != len(keys):
            raise EditError(
                f"the statistics have width {len(moments)}, the keys of layer {layer} have "
                f"{len(keys)}: they are of different models"
            )
        if self.n_tokens <= len(moments) and ridge <= RIDGE:
            raise EditError(
                f"the second moments of layer {layer} are of {self.n_tokens} tokens, and "
                f"{len(moments)} dimensions need more; collect more text, or give a larger ridge"
            )
        mean = moments.diagonal().mean()
        moments.diagonal().add_(ridge * mean)
        factor, info = torch.linalg.cholesky_ex(moments)
        if int(info):
            raise EditError(
                f"the second moments of layer {layer} cannot be inverted ({self.n_tokens} tokens "
                f"for {len(moments)} dimensions); collect more text, or give a larger ridge"
            )
        solution: Tensor = torch.cholesky_solve(keys.double().cpu(), factor).to(keys.device)
        return solution

    def check(self, host: Host, layers: Sequence[int]) -> None:
        """Refuse a model that the statistics are not of.

        A model is known by what the matrix reads in a short prompt, which neither TransformerLens's
        class nor (for `W_out`) its weight processing changes, and a few edits hardly.

        Args:
            host: The model.
            layers: The layers whose statistics are wanted.

        Raises:
            EditError: If the matrix reads something else there, or there are no statistics of a
                layer.

        Examples:
            >>> from backward_lens_tl.models import host_of
            >>> moments.check(host_of(model), layers=[5, 6])  # raises if they are another model's
        """
        self._check_layers(layers)
        fits = max(self.probe) < host.d_vocab and len(self.probe) <= host.n_ctx
        if not fits or max(self.layers) >= host.n_layers:
            raise self._foreign(host)
        sites = find_editable(host, self.matrix, self.layers)
        found = last_reads(host, sites, self.probe)
        if not all(map(is_alike, self.probe_inputs, found)):
            raise self._foreign(host)

    def _check_layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if layer not in self.layers:
                raise EditError(
                    f"these statistics are of layers {', '.join(map(str, self.layers))}, not of "
                    f"layer {layer}; collect them with second_moments(model, texts, "
                    f"layers=[{layer}])"
                )

    def _foreign(self, host: Host) -> EditError:
        return EditError(
            f"these statistics were collected with {self.name!r}, and {host.name!r} reads "
            "something else in the same prompt: it is another model. Collect them again with "
            "second_moments(model, texts)"
        )

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"SecondMoments({self.fingerprint}; layers {layers})"


def facts_moments() -> SecondMoments:
    """Second moments of `W_out`'s inputs in the facts model; they ship inside the package.

    Returns:
        The statistics, of all layers.

    Examples:
        >>> import backward_lens_tl as blt
        >>> moments = blt.editing.facts_moments()
        >>> moments.matrix, moments.layers
        ('W_out', (0, 1, 2, 3, 4, 5, 6, 7))
    """
    with as_file(files("backward_lens_tl") / "facts_model" / FACTS_MOMENTS) as path:
        return SecondMoments.load(path)


@raised_as(EditError)
@torch.no_grad()
def second_moments(
    model: nn.Module,
    texts: Iterable[str],
    *,
    matrix: MatrixName = "W_out",
    layers: int | Sequence[int] | None = None,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    out: str | Path | None = None,
    save_every: int = 1000,
    progress: bool = True,
) -> SecondMoments:
    """Collect `E[x x^T]` of what a matrix reads, over all tokens of some texts.

    Texts are taken one after the other, from any iterator, and cut at the model's context. With
    `out`, what was collected is saved now and then; called again with the same arguments and the
    same texts, it goes on from there.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        texts: The texts; empty ones are skipped.
        matrix: The matrix that reads, one of the MLP's.
        layers: Layers, negative ones from the end; `None` for all.
        max_tokens: Stop after so many tokens; `None` for all texts. An inverse needs more tokens
            than the matrix has inputs (`d_mlp` for `W_out`).
        prepend_bos: Whether texts get a BOS token; `None` is the model's own default.
        out: A file to save to and to go on from.
        save_every: Texts after which it is saved.
        progress: Whether a bar shows how far it is.

    Returns:
        The statistics.

    Raises:
        EditError: If there is no text, `out` holds other statistics or was collected from other
            texts, or a setting is not usable.
        UnsupportedModelError: If the matrix is one of experts.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> texts = ["Lionel Messi plays for Barcelona.", "The capital of France is Paris."]
        >>> moments = blt.editing.second_moments(model, texts, layers=[5], progress=False)
        >>> moments.n_texts, moments.of(5).shape
        (2, torch.Size([512, 512]))
    """
    for name, value, or_none in (
        ("max_tokens", max_tokens, True),
        ("save_every", save_every, False),
    ):
        if not (or_none and value is None) and (not is_integer(value) or int(value) < 1):
            raise EditError(f"{name} is {shown(value)}; pass an integer from 1 on")
    if isinstance(texts, str):
        raise EditError("texts is one text; pass a list of texts, or any other iterable of them")
    host = host_of(model)
    sites = find_editable(host, matrix, layers, mlp_only=True)
    chosen = tuple(site.layer for site in sites)
    file = None if out is None else Path(out)
    begun = _Collected.begin(host, matrix, chosen, prepend_bos)
    stream = (text for text in texts if text)
    if file is not None and file.exists():
        begun = _Collected.resumed(SecondMoments.load(file), begun, stream)
    with tqdm(total=max_tokens, unit="token", disable=not progress, initial=begun.n_tokens) as bar:
        n_saved = begun.n_texts
        while max_tokens is None or begun.n_tokens < max_tokens:
            some = list(islice(stream, _BATCH))
            if not some:
                break
            before = begun.n_tokens
            begun.add(host, some)
            bar.update(begun.n_tokens - before)
            if file is not None and begun.n_texts - n_saved >= save_every:
                begun.finished().save(file)
                n_saved = begun.n_texts
    found = begun.finished()
    if file is not None:
        found.save(file)
    return found


@dataclass
class _Collected:
    """Means over the tokens that were seen so far.

    They are kept as they are saved, so that going on from a file gives the same bits.
    """

    about: SecondMoments
    means: list[Float[Tensor, "triangle"]]
    n_tokens: int
    n_texts: int
    texts: str

    @classmethod
    def begin(
        cls, host: Host, matrix: MatrixName, layers: tuple[int, ...], prepend_bos: bool | None
    ) -> _Collected:
        """Nothing seen yet."""
        about = SecondMoments(
            matrix, layers, (), 0, 0, "", host.fingerprint(), host.name, prepend_bos, (), ()
        )
        return cls(about, [], 0, 0, "")

    @classmethod
    def resumed(cls, saved: SecondMoments, begun: _Collected, texts: Iterable[str]) -> _Collected:
        """What a file holds, with the texts that it was collected from taken off the stream."""
        about = begun.about
        for name in ("matrix", "layers", "prepend_bos", "model"):
            if getattr(saved, name) != getattr(about, name):
                raise EditError(
                    f"the file holds statistics with {name} {getattr(saved, name)!r}, and "
                    f"{getattr(about, name)!r} is asked for; choose another file"
                )
        digest = ""
        for text in islice(texts, saved.n_texts):
            digest = _digest(digest, text)
        if digest != saved.texts:
            raise EditError(
                f"the file holds statistics of {saved.n_texts} other texts than these begin with; "
                "choose another file"
            )
        means = [own.double() for own in saved.moments]
        about = replace(about, probe=saved.probe, probe_inputs=saved.probe_inputs)
        return cls(about, means, saved.n_tokens, saved.n_texts, digest)

    def add(self, host: Host, texts: Sequence[str]) -> None:
        """Add what the matrix reads in some texts."""
        prompts = tokenize_prompts(host, texts, self.about.prepend_bos)
        rows = [prompt.ids[: host.n_ctx] for prompt in prompts]
        sites = find_editable(host, self.about.matrix, self.about.layers)
        if not self.about.probe:
            probe = tuple(rows[0][:PROBE_TOKENS])
            inputs = last_reads(host, sites, probe)
            self.about = replace(self.about, probe=probe, probe_inputs=inputs)
        products = [torch.zeros((), dtype=torch.float64)] * len(sites)
        for group in host.length_groups(list(map(len, rows))):
            some = _grams(host, pad_prompts(host, [rows[at] for at in group]), sites)
            products = [product + own for product, own in zip(products, some, strict=True)]
        before = self.n_tokens
        self.n_tokens += sum(map(len, rows))
        means = self.means or [torch.zeros_like(product) for product in products]
        self.means = [
            (mean * before + product) / self.n_tokens
            for mean, product in zip(means, products, strict=True)
        ]
        self.n_texts += len(texts)
        for text in texts:
            self.texts = _digest(self.texts, text)

    def finished(self) -> SecondMoments:
        """The means."""
        if not self.n_tokens:
            raise EditError("there is no text to collect statistics from; pass at least one")
        return replace(
            self.about,
            moments=tuple(self.means),
            n_tokens=self.n_tokens,
            n_texts=self.n_texts,
            texts=self.texts,
        )


def _grams(
    host: Host, batch: PromptBatch, sites: Sequence[MatrixSite]
) -> list[Float[Tensor, "triangle"]]:
    """`X^T X` of what each matrix reads at real tokens: the upper triangle, row by row."""
    found: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    with ExitStack() as hooks, host.own_precision():
        for site in sites:
            # What it reads is not kept: that of all layers of a large model is many times larger.
            def see(values: Tensor, into: list[Tensor] = found[site.layer]) -> None:
                rows = values.detach().reshape(*batch.mask.shape, -1)
                reads = at_least_float32(rows[batch.mask.to(rows.device)])
                # Products of a few thousand tokens keep float32's digits; sums of many do not.
                product = (reads.T @ reads).cpu().double()
                into.append(product[tuple(torch.triu_indices(*product.shape))])

            hooks.enter_context(hooked(site.input, see))
        read_logits(host, batch, n_read=1)
    for site in sites:
        if len(found[site.layer]) != 1:
            raise UnsupportedModelError(
                f"{site.matrix} of layer {site.layer} was used {len(found[site.layer])} times in "
                "a forward pass; statistics are of matrices that are used once per token"
            )
    return [found[site.layer][0] for site in sites]


def _side(n: int) -> int:
    """Rows of a matrix whose upper triangle has `n` entries."""
    return (math.isqrt(8 * n + 1) - 1) // 2


def _digest(before: str, text: str) -> str:
    """A checksum of texts in their order, from that of those before."""
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
