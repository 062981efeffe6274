"""MEND's networks: they turn the pairs that span a gradient into those that span an edit.

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

from backward_lens_tl.editing.statistics.spanning import SpanningPairs
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.errors import EditError
from backward_lens_tl.files import storage
from backward_lens_tl.models.checksums import tensors_digest
from backward_lens_tl.models.sites import MatrixName

LARGEST_RANK = 1920
"""Rank of each layer's factors at most, as published."""

N_LAYERS = 2


@dataclass(frozen=True, repr=False)
class ResidualLayer:
    """`y = z + relu(scale_k * (z V U + b) + shift_k)`, with scale and shift of each matrix `k`.

    Attributes:
        down: `V`.
        up: `U`.
        bias: `b`.
        scale: One row for each matrix.
        shift: Likewise.
    """

    down: Float[Tensor, "d_pair rank"]
    up: Float[Tensor, "rank d_pair"]
    bias: Float[Tensor, "d_pair"]
    scale: Float[Tensor, "matrix d_pair"]
    shift: Float[Tensor, "matrix d_pair"]

    @classmethod
    def identity(cls, width: int, n_matrices: int, generator: torch.Generator) -> ResidualLayer:
        """A layer that changes nothing yet: `U` and `b` are zero.

        Args:
            width: Of the pairs.
            n_matrices: Matrices that share it.
            generator: Draws `V`, with variance `1 / width`.

        Returns:
            The layer, in float32.
        """
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
        """Transform the pairs of one matrix.

        Args:
            pairs: The pairs, side by side.
            matrix: Its place among the matrices that share the layer.

        Returns:
            As many pairs.
        """
        inner = (pairs @ self.down) @ self.up + self.bias
        # clamp has a gradient at 0, where every layer begins; relu has none there.
        return pairs + (self.scale[matrix] * inner + self.shift[matrix]).clamp(min=0)


@dataclass(frozen=True, repr=False)
class PairNetwork:
    """The network of all matrices of one shape.

    Attributes:
        places: The matrices with their layers.
        layers: Its layers, one after the other.
    """

    places: tuple[tuple[MatrixName, int], ...]
    layers: tuple[ResidualLayer, ...]

    def __call__(
        self, place: tuple[str, int], pairs: Float[Tensor, "*rows d_pair"]
    ) -> Float[Tensor, "*rows d_pair"]:
        """Transform the pairs of one matrix.

        Args:
            place: The matrix and its layer.
            pairs: The standardised pairs, side by side.

        Returns:
            As many pairs.
        """
        at = self.places.index((place[0], place[1]))
        for layer in self.layers:
            pairs = layer(pairs, at)
        return pairs


@dataclass(frozen=True, repr=False)
class MENDEditor(storage.Saved):
    """What MEND learns: a network for each shape of a matrix, and a learning rate for each matrix.

    Attributes:
        statistics: How pairs are standardised before the networks see them.
        networks: One for each shape.
        rates: The learning rate of each of the statistics' matrices.
        training: What it was trained on and how; empty before.
        losses: Of each step of the training: of the edits, and of what is to stay as it is, in
            nats; without the factors that they are weighted with.

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
        """An editor that has learned nothing: its edits are those of `NormalizedGradient`.

        Args:
            statistics: Mean and standard deviation of the pairs at the matrices to edit.
            lr: The learning rate of every matrix.
            seed: Of the networks' weights.

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
        """Everything that is learned: the networks' weights, and the learning rates last."""
        layers = [layer for network in self.networks for layer in network.layers]
        return [getattr(layer, name) for layer in layers for name in _WEIGHTS] + [self.rates]

    @property
    def n_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(each.numel() for each in self.parameters)

    def with_parameters(self, parameters: Sequence[Tensor]) -> MENDEditor:
        """The same editor with other numbers.

        Args:
            parameters: As `parameters` lists them.

        Returns:
            The editor, which holds these very tensors.

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
        """The same on a device.

        Args:
            device: The device.

        Returns:
            The editor there.

        Examples:
            >>> editor.to(torch.device("cpu")).rates.device
            device(type='cpu')
        """
        return self.with_parameters([each.to(device) for each in self.parameters])

    def factors(
        self, pairs: SpanningPairs
    ) -> tuple[Float[Tensor, "request pos d_in"], Float[Tensor, "request pos d_out"]]:
        """The edit of one matrix for each request by itself: `dW = sum_i outer(l_i, r_i)`.

        Args:
            pairs: What spans the gradient there.

        Returns:
            What the edit listens to, and what it writes; zeros where the mask of the pairs is
            False. Differentiable in the editor's parameters.

        Examples:
            >>> from backward_lens_tl.editing.statistics.spanning import SpanningPairs
            >>> own = capture["W_out", 7]
            >>> pairs = SpanningPairs("W_out", 7, own.inputs, own.vjps, ~own.is_zero)
            >>> listens, writes = editor.factors(pairs)
            >>> listens.shape, writes.shape  # [request, pos, d_in], [request, pos, d_out]
            (torch.Size([1, 6, 512]), torch.Size([1, 6, 128]))
        """
        place = (pairs.matrix, pairs.layer)
        together = self.statistics.standardized(place, pairs.inputs, pairs.vjps)
        at = self.statistics.places.index(place)
        rate = self.rates[at].to(together.device)
        network = next(each for each in self.networks if place in each.places)
        inputs, vjps = self.statistics.split(place, network(place, together.to(rate.dtype)))
        hidden = ~pairs.mask[..., None]
        return inputs.masked_fill(hidden, 0), (-rate * vjps).masked_fill(hidden, 0)

    @property
    def fingerprint(self) -> str:
        """What it is, in one line, for the settings of a method."""
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
            EditError: If the file holds a training that has not come to its end.
            ResultFileError: If the file holds no editor, or is damaged.

        Examples:
            >>> editor.save(folder / "mend.safetensors")
            >>> again = blt.editing.MENDEditor.load(folder / "mend.safetensors")
            >>> again.fingerprint == editor.fingerprint
            True
        """
        found: MENDEditor | MENDCheckpoint = storage.read(path, (cls, MENDCheckpoint), cls.PARTS)
        if isinstance(found, MENDCheckpoint):
            raise EditError(
                f"{str(path)!r} holds a training after {len(found.editor.losses)} steps, which has "
                "not come to its end; call train_mend with the same arguments to go on with it"
            )
        return found

    def __repr__(self) -> str:
        return f"MENDEditor({self.fingerprint}; {self.n_parameters} parameters)"


@dataclass(frozen=True, repr=False)
class MENDCheckpoint(storage.Saved):
    """A training that has not come to its end.

    Attributes:
        editor: The editor as it is so far.
        means: Adam's running mean of each parameter's gradient.
        squares: Adam's running mean of its square.
    """

    WHAT = "MEND training"
    PARTS = (MENDEditor, *MENDEditor.PARTS)

    editor: MENDEditor
    means: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]


_WEIGHTS = ("down", "up", "bias", "scale", "shift")
