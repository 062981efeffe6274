"""Interventions in forward passes: what is added to activations, and what requires gradients.

A change `D` of a weight matrix is tried without changing a parameter: its output `x @ W + b`
becomes `x @ W + b + x @ D`. Autograd runs through that to whatever `D` is computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.capture.prompts import PromptBatch
from backward_lens_tl.models.hooks import Tap, hooked
from backward_lens_tl.models.sites import MatrixSite

Addition = Callable[[Float[Tensor, "*rows d_in"]], Float[Tensor, "*rows d_out"]]
"""Maps the input of a matrix to what is added to its output."""


@contextmanager
def adding(site: MatrixSite, addition: Addition) -> Iterator[None]:
    """Add to a matrix's output a function of what the matrix reads.

    Args:
        site: The matrix, of an MLP.
        addition: The function; its result may have any precision, and may require a gradient.

    Yields:
        Nothing; the hooks exist inside the context.
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
    """Add a vector to an activation at one position of each prompt.

    Args:
        tap: Where the activation is computed.
        batch: The prompts of the pass.
        positions: The position in each prompt.
        added: The vector for each prompt.

    Yields:
        Nothing; the hook exists inside the context.
    """

    def add(values: Tensor) -> Tensor:
        flat = values.reshape(*batch.mask.shape, -1)
        at = torch.arange(len(positions)), torch.tensor(positions)
        where = tuple(each.to(values.device) for each in at)
        return flat.index_put(where, added.to(values), accumulate=True).reshape(values.shape)

    with hooked(tap, add, before_others=True):
        yield


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], *, among: Iterable[Tensor]) -> Iterator[None]:
    """Let only some parameters require gradients, and restore everything afterwards.

    Args:
        parameters: Those that do, frozen ones too.
        among: Those that do not, unless they are in `parameters`.

    Yields:
        Nothing; the parameters are in this state inside the context.
    """
    with ExitStack() as as_before:
        for wanted, tensors in ((False, among), (True, parameters)):
            for tensor in tensors:
                # Also if nothing changes here: an interrupted run may leave it changed.
                as_before.callback(tensor.requires_grad_, tensor.requires_grad)
                tensor.requires_grad_(wanted)
        yield
