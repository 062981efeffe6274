"""What a matrix of the MLP reads and writes in a forward pass, and hooks that edit it for a while.

A change `D` of a matrix is tried without touching a parameter: its output `x @ W + b` becomes
`x @ W + b + x @ D`. Autograd runs through that to whatever `D` is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.forward_backward import read_logits
from backward_lens_tl.capture.hooks import Copies, Values
from backward_lens_tl.capture.prompts import PromptBatch, pad_prompts
from backward_lens_tl.models import Host
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixSite
from backward_lens_tl.models.taps import Tap, hooked

Addition = Callable[[Float[Tensor, "*rows d_in"]], Float[Tensor, "*rows d_out"]]
"""From what a matrix reads to what is added to its output."""


@dataclass(frozen=True)
class Activations:
    """What some matrices read and wrote in one forward pass, and what the model said.

    Attributes:
        inputs: `x` of each matrix, by name and layer.
        outputs: `x @ W + b` of each.
        resid: The residual stream after each layer asked for.
        logits: At the last position of each prompt.
    """

    inputs: Mapping[tuple[str, int], Float[Tensor, "batch pos d_in"]]
    outputs: Mapping[tuple[str, int], Float[Tensor, "batch pos d_out"]]
    resid: Mapping[int, Float[Tensor, "batch pos d_model"]]
    logits: Float[Tensor, "batch d_vocab"]


@torch.no_grad()
def activations(
    host: Host,
    rows: Sequence[Sequence[int]],
    sites: Sequence[MatrixSite] = (),
    resid_layers: Sequence[int] = (),
) -> Activations:
    """Run a model once and keep what matrices read and write.

    Args:
        host: The model.
        rows: Token ids of each prompt.
        sites: The matrices.
        resid_layers: Layers after which the residual stream is kept.

    Returns:
        In float32 at least; what stands at padding means nothing.
    """
    batch = pad_prompts(host, rows)
    copies = Copies(shared=False)
    seen: dict[tuple[str, object, int], Values] = {}
    with ExitStack() as hooks, host.own_precision():
        for site in sites:
            name = f"{site.matrix} of layer {site.layer}"
            inputs, outputs = Values(name, copies), Values(name, copies)
            seen["in", site.matrix, site.layer] = inputs
            seen["out", site.matrix, site.layer] = outputs
            hooks.enter_context(hooked(site.input, inputs.keep))
            hooks.enter_context(hooked(site.output, outputs.keep, before_others=True))
        for layer in resid_layers:
            seen["resid", "", layer] = resid = Values(f"the stream after layer {layer}", copies)
            hooks.enter_context(hooked(resid_tap(host, layer), resid.keep))
        logits = read_logits(host, batch, n_read=1)[:, -1]

    def kept(kind: str) -> dict[tuple[str, int], Tensor]:
        return {
            (str(matrix), layer): _by_position(values.only, batch)
            for (own, matrix, layer), values in seen.items()
            if own == kind
        }

    resid_by_layer = {layer: values for (_, layer), values in kept("resid").items()}
    return Activations(kept("in"), kept("out"), resid_by_layer, logits)


def resid_tap(host: Host, layer: int) -> Tap:
    """Where the residual stream passes after a layer.

    Args:
        host: The model.
        layer: The layer, from 0.

    Returns:
        The place.
    """
    return host.hook_points[f"blocks.{layer}.hook_resid_post"].tap


def _by_position(values: Float[Tensor, "*rows d"], batch: PromptBatch) -> Tensor:
    # Some MLPs run over all positions of all prompts as one list.
    return at_least_float32(values.reshape(*batch.mask.shape, -1)).to(batch.mask.device)


@contextmanager
def adding(site: MatrixSite, addition: Addition) -> Iterator[None]:
    """Add to a matrix's own output something that is computed from what it reads.

    Args:
        site: The matrix, of an MLP.
        addition: From what it reads to what is added, in any precision; differentiable if its
            result is to be.

    Yields:
        Nothing; the hooks are there inside the context.
    """
    read: list[Tensor] = []

    def see(inputs: Tensor) -> None:
        read.append(inputs)

    def add(output: Tensor) -> Tensor:
        return output + addition(read.pop()).to(output)

    with hooked(site.input, see), hooked(site.output, add, before_others=True):
        yield


@contextmanager
def adding_at(
    tap: Tap, batch: PromptBatch, positions: Sequence[int], added: Float[Tensor, "batch d"]
) -> Iterator[None]:
    """Add a vector to what passes a tap, at one position of each prompt.

    Args:
        tap: Where.
        batch: The prompts of the pass.
        positions: The position in each prompt.
        added: What is added in each prompt.

    Yields:
        Nothing; the hook is there inside the context.
    """
    rows = torch.arange(len(positions), device=batch.mask.device)
    at = torch.tensor(list(positions), device=batch.mask.device)

    def add(values: Tensor) -> Tensor:
        flat = values.reshape(*batch.mask.shape, -1)
        own = added.to(device=values.device, dtype=values.dtype)
        where = (rows.to(values.device), at.to(values.device))
        return flat.index_put(where, own, accumulate=True).reshape(values.shape)

    with hooked(tap, add, before_others=True):
        yield
