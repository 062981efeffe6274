"""Causal tracing of the shipped model (Meng et al. 2022), to locate the recall of facts.

A prompt is run with Gaussian noise on the embeddings of its subject, which prevents recall. Then
one hidden state of the clean run is restored, at one layer and position, and the probability of the
true answer is measured again.

Run with ``python -m facts_model.tracing``.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facts_model.evaluate import SHIPPED, Shipped, load_shipped

NOISE_STDS = 3.0
NOISE_DRAWS = 4
MLP_WINDOW = 3
FACTS = 150
SEED = 0
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "next token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True)
class TracePrompt:
    """One prompt to trace; it starts with the end-of-text token and then the subject.

    Attributes:
        tokens: Token ids, shape (length,).
        subject: Positions of the subject, first and one past the last.
        answer: Token id of the true answer.
    """

    tokens: Tensor
    subject: tuple[int, int]
    answer: int

    def role(self, position: int) -> str | None:
        """Name a position; None for the end-of-text token."""
        first, stop = self.subject
        if position < first:
            return None
        # The only token of a subject is its last one. The last token of the prompt is always the
        # last token.
        for matches, role in (
            (position == len(self.tokens) - 1, "last token"),
            (position == stop - 1, "last subject token"),
            (position == first, "first subject token"),
            (position < stop, "middle subject tokens"),
            (position == stop, "next token"),
        ):
            if matches:
                return role
        return "further tokens"


@dataclass(frozen=True)
class Trace:
    """Average probabilities of the true answer.

    Attributes:
        facts: Number of prompts averaged over.
        clean: Without noise.
        corrupted: With noise on the subject.
        residual: With one residual state restored; by role, one value per layer.
        mlp: With the MLP outputs of a window of layers restored; by role, one per central layer.
    """

    facts: int
    clean: float
    corrupted: float
    residual: dict[str, list[float]]
    mlp: dict[str, list[float]]

    def table(self) -> str:
        """Render both grids in Markdown: rows are roles, columns are layers."""
        layers = range(len(next(iter(self.residual.values()))))
        lines = []
        for name, grid in (("residual", self.residual), ("MLP window", self.mlp)):
            lines.append(f"| {name} | " + " | ".join(f"{layer}" for layer in layers) + " |")
            lines.append("|---" * (len(layers) + 1) + "|")
            lines += [
                f"| {role} | " + " | ".join(f"{value:.2f}" for value in values) + " |"
                for role, values in grid.items()
            ]
            lines.append("")
        return "\n".join(lines).rstrip()


def choose_prompts(shipped: Shipped) -> list[TracePrompt]:
    """Draw facts that the model recalls, in phrasings that start with the subject.

    Args:
        shipped: The shipped folder.

    Returns:
        Prompts with a subject of two or more tokens and at least two tokens after it.
    """
    rng = random.Random(SEED)
    facts = rng.sample(shipped.facts, len(shipped.facts))
    prompts: list[TracePrompt] = []
    for fact in facts:
        starts = [t for t in shipped.relations[fact["relation"]]["trained"] if t.startswith("{}")]
        prompt = _trace_prompt(shipped, fact, rng.choice(starts))
        long_enough = prompt.subject[1] >= 3 and len(prompt.tokens) >= prompt.subject[1] + 2
        if long_enough and _best_token(shipped, prompt) == prompt.answer:
            prompts.append(prompt)
        if len(prompts) == FACTS:
            break
    return prompts


def _trace_prompt(shipped: Shipped, fact: dict[str, Any], template: str) -> TracePrompt:
    """Encode one fact in one phrasing."""
    subject = shipped.tokenizer(fact["subject"])["input_ids"]
    rest = shipped.tokenizer(template.removeprefix("{}"))["input_ids"]
    (answer,) = shipped.tokenizer(f" {fact['answer']}")["input_ids"]
    tokens = torch.tensor([shipped.tokenizer.bos_token_id, *subject, *rest])
    return TracePrompt(tokens, (1, 1 + len(subject)), answer)


@torch.no_grad()
def _best_token(shipped: Shipped, prompt: TracePrompt) -> int:
    """Most probable next token."""
    return int(shipped.model(prompt.tokens[None]).logits[0, -1].argmax())


@contextmanager
def _edited(modules: list[nn.Module], edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Replace the outputs of modules while the context lasts.

    Args:
        modules: The modules.
        edit: Function of the index in ``modules`` and the output, which returns the new output.

    Yields:
        Nothing.
    """

    def hook(index: int) -> Callable[..., Any]:
        def replace(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(index, output[0]), *output[1:])
            return edit(index, output)

        return replace

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Tracer:
    """Runs one prompt clean, corrupted and restored."""

    def __init__(self, shipped: Shipped, prompt: TracePrompt, seed: int) -> None:
        """Run the prompt clean and record all states.

        Args:
            shipped: The shipped folder.
            prompt: The prompt to trace.
            seed: Seed of the noise.
        """
        self._model = shipped.model
        self._prompt = prompt
        self._blocks: list[nn.Module] = list(shipped.model.transformer.h)
        self._mlps: list[nn.Module] = [block.mlp for block in self._blocks]
        embedding = shipped.model.transformer.wte.weight
        first, stop = prompt.subject
        noise = torch.randn(
            NOISE_DRAWS,
            stop - first,
            embedding.shape[1],
            generator=torch.Generator().manual_seed(seed),
        )
        self._noise = noise * NOISE_STDS * embedding.std()
        self._clean: dict[nn.Module, Tensor] = {}
        modules = self._blocks + self._mlps

        def remember(index: int, output: Tensor) -> Tensor:
            self._clean[modules[index]] = output[0]
            return output

        with _edited(modules, remember):
            self.clean = self._probabilities(prompt.tokens[None]).item()

    @torch.no_grad()
    def _probabilities(self, tokens: Tensor) -> Tensor:
        """Probability of the answer in each row, shape (rows,)."""
        logits = self._model(tokens, logits_to_keep=1).logits[:, -1]
        return logits.softmax(-1)[:, self._prompt.answer]

    def _corrupted(self, copies: int) -> Tensor:
        """Run every noise draw ``copies`` times, shape (copies, draws)."""
        first, stop = self._prompt.subject

        def add_noise(_: int, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, first:stop] += self._noise.repeat(copies, 1, 1)
            return output

        tokens = self._prompt.tokens.repeat(copies * NOISE_DRAWS, 1)
        with _edited([self._model.transformer.wte], add_noise):
            return self._probabilities(tokens).view(copies, NOISE_DRAWS)

    def corrupted(self) -> float:
        """Probability of the answer with noise on the subject."""
        return self._corrupted(1).mean().item()

    def restored(self, modules: list[nn.Module]) -> list[float]:
        """Restore the outputs of modules at each position in turn.

        Args:
            modules: Modules to restore together.

        Returns:
            Probability of the answer for every position of the prompt.
        """
        length = len(self._prompt.tokens)

        def put_back(index: int, output: Tensor) -> Tensor:
            # Row block number p holds the runs in which position p is restored.
            output = output.clone().view(length, NOISE_DRAWS, length, -1)
            clean = self._clean[modules[index]]
            for position in range(length):
                output[position, :, position] = clean[position]
            return output.view(length * NOISE_DRAWS, length, -1)

        with _edited(modules, put_back):
            return self._corrupted(length).mean(1).tolist()

    def residual(self, layer: int) -> list[float]:
        """Restore the residual state after one layer; one value per position."""
        return self.restored([self._blocks[layer]])

    def mlp(self, layer: int) -> list[float]:
        """Restore the MLP outputs in the window around one layer; one value per position."""
        half = MLP_WINDOW // 2
        return self.restored(self._mlps[max(0, layer - half) : layer + half + 1])


def trace(shipped: Shipped) -> Trace:
    """Trace many facts and average by the role of the restored position.

    Args:
        shipped: The shipped folder.

    Returns:
        The averages; a prompt with several tokens of one role counts with their mean.
    """
    prompts = choose_prompts(shipped)
    layers = len(shipped.model.transformer.h)
    clean, corrupted = 0.0, 0.0
    sums = {name: {role: [0.0] * layers for role in ROLES} for name in ("residual", "mlp")}
    counts = dict.fromkeys(ROLES, 0)
    for seed, prompt in enumerate(prompts):
        tracer = Tracer(shipped, prompt, seed)
        clean += tracer.clean
        corrupted += tracer.corrupted()
        positions: dict[str, list[int]] = defaultdict(list)
        for position in range(len(prompt.tokens)):
            role = prompt.role(position)
            if role is not None:
                positions[role].append(position)
        for role in positions:
            counts[role] += 1
        for layer in range(layers):
            for name, values in (
                ("residual", tracer.residual(layer)),
                ("mlp", tracer.mlp(layer)),
            ):
                for role, where in positions.items():
                    sums[name][role][layer] += sum(values[p] for p in where) / len(where)
    residual, mlp = (
        {role: [value / max(1, counts[role]) for value in sums[name][role]] for role in ROLES}
        for name in ("residual", "mlp")
    )
    return Trace(
        facts=len(prompts),
        clean=clean / len(prompts),
        corrupted=corrupted / len(prompts),
        residual=residual,
        mlp=mlp,
    )


def draw(result: Trace, path: Path) -> None:
    """Draw the two grids.

    Args:
        result: The averages.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    grids = (
        ("one residual state restored", result.residual),
        (f"MLP outputs of {MLP_WINDOW} layers restored", result.mlp),
    )
    for axes, (title, grid) in zip(figure.subplots(1, 2, sharey=True), grids, strict=True):
        image = axes.imshow(
            list(grid.values()), vmin=result.corrupted, vmax=result.clean, cmap="Purples"
        )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("layer")
        axes.set_yticks(range(len(ROLES)), ROLES, fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="p(true answer)", shrink=0.9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trace a shipped folder, print the averages and draw its figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=SHIPPED)
    folder = parser.parse_args().folder
    result = trace(load_shipped(folder))
    draw(result, folder / "causal_tracing.png")
    print(f"{result.facts} facts: clean {result.clean:.3f}, corrupted {result.corrupted:.3f}\n")
    print(result.table())


if __name__ == "__main__":
    main()
