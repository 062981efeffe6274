"""Small results with awkward tokens, and parsed HTML, for tests of views."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import torch

from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.predictions import Predictions
from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell
from backward_lens_tl.readout.readout import Reading, Readout
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.views.text import pieces

PARIS = " Paris"


NASTY = (
    "</script>", "<s>", "<b>", "\"'&amp;", "\n", "\t", " ", "    ", "", "\x1e", "\u202eevil",
    " مرحبا", "x" * 60, " 👩\u200d👩\u200d👧", "\ufffd", "\u0301", "\ud800", "[/bold]", "[red]",
    "</td><img src=x onerror=1>", "\u200b", "ab\u00a0c", PARIS,
)  # fmt: skip


def make_result(
    layers: int = 4,
    pos: int = 5,
    k: int = 3,
    batch: int = 1,
    vocab: tuple[str, ...] = NASTY,
    direction: str = "update",
    matrices: tuple[MatrixName, ...] = ("W_in", "W_out"),
) -> BackwardLensResult:
    """Random numbers; the last layer is zero except at the last position, as in appendix A."""
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, pos, dtype=torch.bool)
    decades = torch.logspace(-2, 0, pos)[None, :, None]
    gradients = {}
    for layer in range(layers):
        for matrix in matrices:
            vjps = torch.randn(batch, pos, 6, generator=random) * decades
            if layer == layers - 1:
                vjps[:, :-1] = 0
            inputs = torch.randn(batch, pos, 6, generator=random)
            gradients[matrix, layer] = MatrixGradient(matrix, layer, inputs, vjps, mask)
    target = vocab.index(PARIS)
    capture = GradientCapture(
        gradients=gradients,
        tokens=torch.zeros(batch, pos, dtype=torch.long),
        mask=mask,
        str_tokens=(tuple(vocab[index % len(vocab)] for index in range(pos)),) * batch,
        loss=torch.full((batch,), 1.25),
        targets=torch.full((batch, pos), target),
        target_texts=(PARIS,) * batch,
        predictions=Predictions(
            answers=torch.zeros(batch, dtype=torch.long),
            answer_probs=torch.full((batch,), 0.5),
            target_probs=torch.full((batch,), 0.25),
            target_ranks=torch.ones(batch, dtype=torch.long),
        ),
        prompt_lengths=torch.full((batch,), pos),
        n_layers=layers,
        objective="target_nll(' Paris')",
        model_name="a <model>",
    )
    readings = []
    for lens in ("logit_lens", "normalized"):
        readouts = {}
        for matrix in matrices:
            scores = torch.randn(layers, batch, pos, len(vocab), generator=random)
            scores[: 2 + len(readings), :, -1, target] += 10
            top, bottom = scores.topk(k), scores.topk(k, largest=False)
            rank = (scores > scores[..., target, None]).sum(-1)
            readouts[matrix] = Readout(
                top.indices,
                top.values,
                bottom.indices,
                bottom.values,
                rank,
                rank,
                top.values[..., 0],
                torch.zeros_like(rank, dtype=torch.bool),
            )
        readings.append(Reading(lens, readouts))
    return BackwardLensResult(
        capture=capture,
        readings=tuple(readings),
        positions=torch.arange(pos).expand(batch, pos),
        token_texts=dict(enumerate(vocab)),
        direction=direction,
    )


def with_faint_cells(result: BackwardLensResult, shortest: float) -> BackwardLensResult:
    """The result as if under its first lens vectors shorter than a length were faint."""
    first, *others = result.readings
    readouts = {}
    for matrix, read in first.readouts.items():
        gradients = (result.capture[matrix, layer] for layer in result.layers)
        lengths = torch.stack([gradient.spanning_set.norm(dim=-1) for gradient in gradients])
        readouts[matrix] = replace(read, is_faint=lengths < shortest)
    faint = replace(first, readouts=readouts, faint_norm=shortest)
    return replace(result, readings=(faint, *others))


def make_long_result(layers: int, pos: int, k: int = 10) -> BackwardLensResult:
    """A gated model's result with random tokens of a vocabulary as large as that of SmolLM2."""
    random = torch.Generator().manual_seed(0)
    vocab = (PARIS, *(f" w{index * 7919:x}" for index in range(49_151)))
    small = make_result(
        layers, pos, k=2, vocab=(PARIS, " a", " b"), matrices=("W_in", "W_gate", "W_out")
    )

    def ids() -> torch.Tensor:
        # As on real models, a few tokens are frequent and most are rare.
        share = torch.rand(layers, 1, pos, k, generator=random)
        return (share**3 * len(vocab)).long()

    def scores() -> torch.Tensor:
        return torch.randn(layers, 1, pos, k, generator=random).sort(descending=True)[0] * 10

    readings = tuple(
        replace(
            reading,
            readouts={
                matrix: replace(
                    read,
                    top_ids=ids(), top_scores=scores(), bottom_ids=ids(), bottom_scores=scores(),
                )
                for matrix, read in reading.readouts.items()
            },
        )
        for reading in small.readings
    )  # fmt: skip
    return replace(small, readings=readings, token_texts=dict(enumerate(vocab)))


def with_answer(result: BackwardLensResult, length: int) -> BackwardLensResult:
    """The same numbers, as if the last tokens were an appended answer, as in `sequence_nll`."""
    capture = result.capture
    targets = capture.targets.clone()
    pos = targets.shape[1]
    targets[:, pos - length :] = torch.arange(length) % len(result.token_texts)
    return replace(
        result,
        capture=replace(
            capture,
            targets=targets,
            prompt_lengths=torch.full_like(capture.prompt_lengths, pos - length),
        ),
    )


def without_target(result: BackwardLensResult) -> BackwardLensResult:
    capture = replace(result.capture, targets=None, target_texts=None)
    readings = tuple(
        replace(
            reading,
            readouts={
                matrix: replace(readout, target_rank=torch.full_like(readout.target_rank, -1))
                for matrix, readout in reading.readouts.items()
            },
        )
        for reading in result.readings
    )
    return replace(result, capture=capture, readings=readings)


def all_cells(result: BackwardLensResult, matrix: str) -> list[Cell]:
    """In the order of the tables: last layer first."""
    return [cell for layer in reversed(result.layers) for cell in result.cells(matrix, layer)]


def shown(token: str) -> str:
    return "".join(piece.text for piece in pieces(token))


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.children)

    def all(self, tag: str, name: str | None = None) -> list[Node]:
        found = []
        for child in self.children:
            if isinstance(child, Node):
                classes = (child.attributes.get("class") or "").split()
                if child.tag == tag and (name is None or name in classes):
                    found.append(child)
                found += child.all(tag, name)
        return found

    def tags(self) -> set[str]:
        nodes = [child for child in self.children if isinstance(child, Node)]
        return {self.tag}.union(*(node.tags() for node in nodes))


class Tree(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Node("root")
        self._open = [self.root]
        self.feed(html)
        self.close()
        assert self._open == [self.root], "an element was not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self._open[-1].children.append(node)
        if tag not in ("meta", "input"):
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parsed(html: str) -> Node:
    return Tree(html).root
