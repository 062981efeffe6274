"""MEND's networks, which turn the pairs that span a gradient into pairs that span an edit.

Mitchell et al., "Fast Model Editing at Scale" (ICLR 2022, arXiv 2110.11309), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from backward_lens_tl.editing.spanning_pairs import SpanningPairs
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.errors import EditError
from backward_lens_tl.files import storage
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.sites import MatrixName

LARGEST_RANK = 1920
"""Largest rank of a layer's factors, as published."""

N_LAYERS = 2


@dataclass(frozen=True, repr=False)
class ResidualLayer:
    """`y = z + relu(scale_k * (z V U + b) + shift_k)`, with scale and shift of each matrix `k`.

    `down` is `V`, `up` is `U`; `scale` and `shift` have one row per matrix.
    """

    down: Float[Tensor, "d_pair rank"]
    up: Float[Tensor, "rank d_pair"]
    bias: Float[Tensor, "d_pair"]
    scale: Float[Tensor, "matrix d_pair"]
    shift: Float[Tensor, "matrix d_pair"]

    @classmethod
    def identity(cls, width: int, n_matrices: int, generator: torch.Generator) -> ResidualLayer:
        """A layer that computes the identity; `V` has variance `1 / width`."""
        rank = min(LARGEST_RANK, width)
        return cls(
            down=torch.randn(width, rank, generator=generator) * width**-0.5,
            up=torch.zeros(rank, width),
            bias=torch.zeros(width),
            scale=torch.ones(n_matrices, width),
            shift=torch.zeros(n_matrices, width),
        )

    def __call__(
        self, pairs: Float[Tensor, "*rows d_pair"], matrix: int
    ) -> Float[Tensor, "*rows d_pair"]:
        """Transform concatenated pairs of the matrix with this index."""
        inner = (pairs @ self.down) @ self.up + self.bias
        # clamp has a gradient at 0, where every layer starts; relu has none there.
        return pairs + (self.scale[matrix] * inner + self.shift[matrix]).clamp(min=0)


@dataclass(frozen=True, repr=False)
class PairNetwork:
    """The network that matrices of one shape share: `places` names them with their layers."""

    places: tuple[tuple[MatrixName, int], ...]
    layers: tuple[ResidualLayer, ...]

    def __call__(
        self, place: tuple[str, int], pairs: Float[Tensor, "*rows d_pair"]
    ) -> Float[Tensor, "*rows d_pair"]:
        """Transform concatenated, standardised pairs of one matrix."""
        at = self.places.index((place[0], place[1]))
        for layer in self.layers:
            pairs = layer(pairs, at)
        return pairs


@dataclass(frozen=True, repr=False)
class MENDEditor(storage.Saved):
    """What MEND learns: a network for each matrix shape, and a learning rate for each matrix.

    Attributes:
        statistics: The statistics that standardise the pairs first.
        networks: One network per shape.
        rates: The learning rate of each of the statistics' matrices.
        training: Data and settings of the training; empty before.
        losses: Unweighted losses of each step of the training, of edits and of locality, in nats.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> requests = [
        ...     blt.editing.EditRequest("Obama grew up in", " Paris"),
        ...     blt.editing.EditRequest("Lionel Messi plays for", " Rome"),
        ... ]
        >>> statistics = blt.editing.pair_statistics(model, requests, progress=False)
        >>> blt.editing.MENDEditor.untrained(statistics).n_parameters
        3294726
    """

    WHAT = "MEND editor"
    PARTS = (PairStatistics, PairNetwork, ResidualLayer)

    statistics: PairStatistics
    networks: tuple[PairNetwork, ...]
    rates: Float[Tensor, "matrix"]
    training: Mapping[str, Any] = field(default_factory=dict)
    losses: Float[Tensor, "step 2"] = field(default_factory=lambda: torch.zeros(0, 2))

    @classmethod
    def untrained(
        cls, statistics: PairStatistics, *, lr: float = 1e-3, seed: int = 0
    ) -> MENDEditor:
        """Create an untrained editor, whose edits are those of `NormalizedGradient`.

        Args:
            statistics: Mean and standard deviation of the pairs at the matrices to edit.
            lr: The learning rate of every matrix.
            seed: Seed of the networks' weights.

        Returns:
            The editor, in the precision of the statistics.

        Examples:
            >>> editor = blt.editing.MENDEditor.untrained(statistics, lr=1e-2)
            >>> editor.rates  # one per matrix
            tensor([0.0100, 0.0100])
        """
        statistics.check_positions("all")
        shapes: dict[tuple[int, int], list[tuple[MatrixName, int]]] = {}
        for place, n_inputs, mean in zip(
            statistics.places, statistics.n_inputs, statistics.mean, strict=True
        ):
            shapes.setdefault((n_inputs, len(mean)), []).append(place)
        generator = torch.Generator().manual_seed(seed)
        networks = []
        for (_, width), places in shapes.items():
            layers = tuple(
                ResidualLayer.identity(width, len(places), generator) for _ in range(N_LAYERS)
            )
            networks.append(PairNetwork(tuple(places), layers))
        made = cls(statistics, tuple(networks), torch.full((len(statistics.places),), lr))
        dtype = statistics.mean[0].dtype
        return made.with_parameters([each.to(dtype) for each in made.parameters])

    @property
    def parameters(self) -> list[Tensor]:
        """All trained parameters: the networks' weights, then the learning rates."""
        layers = [layer for network in self.networks for layer in network.layers]
        return [getattr(layer, name) for layer in layers for name in _WEIGHTS] + [self.rates]

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(each.numel() for each in self.parameters)

    def with_parameters(self, parameters: Sequence[Tensor]) -> MENDEditor:
        """Replace the parameters.

        Args:
            parameters: New parameters, in the order of `parameters`.

        Returns:
            The editor with these tensors, not copies.

        Examples:
            >>> halved = editor.with_parameters([each / 2 for each in editor.parameters])
            >>> bool((halved.rates == editor.rates / 2).all())
            True
        """
        left = iter(parameters)
        networks = tuple(
            replace(
                network,
                layers=tuple(
                    replace(layer, **{name: next(left) for name in _WEIGHTS})
                    for layer in network.layers
                ),
            )
            for network in self.networks
        )
        return replace(self, networks=networks, rates=next(left))

    def to(self, device: torch.device) -> MENDEditor:
        """Move the parameters to a device.

        Args:
            device: The device.

        Returns:
            The editor on the device.

        Examples:
            >>> editor.to(torch.device("cpu")).rates.device
            device(type='cpu')
        """
        return self.with_parameters([each.to(device) for each in self.parameters])

    def factors(
        self, pairs: SpanningPairs
    ) -> tuple[Float[Tensor, "request pos d_in"], Float[Tensor, "request pos d_out"]]:
        """Compute the edit of one matrix for each request: `dW = sum_i outer(left_i, right_i)`.

        Args:
            pairs: The pairs that span the gradient of the matrix.

        Returns:
            Left and right factors, zero where the mask of the pairs is False. Differentiable in the
            editor's parameters.

        Examples:
            >>> from backward_lens_tl.editing.spanning_pairs import SpanningPairs
            >>> own = capture["W_out", 7]
            >>> pairs = SpanningPairs("W_out", 7, own.inputs, own.vjps, ~own.is_zero)
            >>> left, right = editor.factors(pairs)
            >>> left.shape, right.shape  # [request, pos, d_in], [request, pos, d_out]
            (torch.Size([1, 6, 512]), torch.Size([1, 6, 128]))
        """
        place = (pairs.matrix, pairs.layer)
        together = torch.cat(self.statistics.standardized(place, pairs.inputs, pairs.vjps), dim=-1)
        at = self.statistics.places.index(place)
        rate = self.rates[at].to(together.device)
        network = next(each for each in self.networks if place in each.places)
        widths = [pairs.inputs.shape[-1], pairs.vjps.shape[-1]]
        inputs, vjps = network(place, together.to(rate.dtype)).split(widths, dim=-1)
        hidden = ~pairs.mask[..., None]
        return inputs.masked_fill(hidden, 0), (-rate * vjps).masked_fill(hidden, 0)

    @property
    def fingerprint(self) -> str:
        """Checksum, steps and statistics in one line, for the settings of a method."""
        named = {str(at): each for at, each in enumerate(self.parameters)}
        steps = self.training.get("steps", 0)
        return f"{tensors_digest(named)[:12]} after {steps} steps, {self.statistics.fingerprint}"

    @classmethod
    def load(cls, path: str | Path) -> MENDEditor:
        """Read an editor that `save` wrote.

        Args:
            path: The file.

        Returns:
            The editor, on the CPU.

        Raises:
            EditError: If the file holds an unfinished training run.
            ResultFileError: If the file does not hold an editor, or is damaged.

        Examples:
            >>> editor.save(folder / "mend.safetensors")
            >>> again = blt.editing.MENDEditor.load(folder / "mend.safetensors")
            >>> again.fingerprint == editor.fingerprint
            True
        """
        found: MENDEditor | MENDCheckpoint = storage.read(path, (cls, MENDCheckpoint), cls.PARTS)
        if isinstance(found, MENDCheckpoint):
            raise EditError(
                f"{str(path)!r} holds an unfinished training run after {len(found.editor.losses)} "
                "steps; call train_mend with the same arguments to resume it"
            )
        return found

    def __repr__(self) -> str:
        return f"MENDEditor({self.fingerprint}; {self.n_parameters} parameters)"


@dataclass(frozen=True, repr=False)
class MENDCheckpoint(storage.Saved):
    """An unfinished training run: the editor, and Adam's running means of gradients and squares."""

    WHAT = "MEND training"
    PARTS = (MENDEditor, *MENDEditor.PARTS)

    editor: MENDEditor
    means: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]


_WEIGHTS = ("down", "up", "bias", "scale", "shift")
