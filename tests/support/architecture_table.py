"""Measure `X^T Delta` against autograd on every architecture, and write docs/architectures.md.

    python tests/support/architecture_table.py

measures with the installed TransformerLens and writes docs/architectures/tl-VERSION.json;
the page combines all of these. `test_architectures.py` checks every cell against its tolerance.

Expected values are computed here without the package: weights are looked up in the model,
the model runs normally, and autograd differentiates a loss that is written out below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from architectures import FAMILIES, KINDS, NotAvailable, build_model
from models import relative_error
from torch import Tensor, nn

from backward_lens_tl import capture_gradients
from backward_lens_tl.errors import UnsupportedModelError

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")
MATRICES = (*ATTENTION, "W_in", "W_gate", "W_out")
WITHOUT_GATE = (
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom"),
    *("falcon", "falcon_new", "falcon_alibi", "phi"),
)
N_LAYERS = 2

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A tolerance for rounding only: at least 70 times the measured error. It also fits families that
# compute parts in float32 in a float64 model (RMS norms, rotary angles, softmax, routers): both
# sides see the same rounded `x`, and their `delta` goes back through the same operations.
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PARTS = DOCS / "architectures.md", DOCS / "architectures"

Cells = dict[str, float | str]
"""By matrix, the largest error over layers, or the reason for its absence."""

Row = dict[str, Any]
"""`family`, `kind`, `dtype` and their `cells`; these are a reason if the model is unavailable."""


# ------------------------------------------------------------------------------------ the reference


@dataclass(frozen=True)
class Weight:
    """One matrix of one layer: where and how the model stores it.

    Attributes:
        tensors: The tensors that the model multiplies by, one or one per expert.
        turn: From tensors laid out like these to `[*head_or_expert, d_in, d_out]`.
    """

    tensors: tuple[Tensor, ...]
    turn: Callable[..., Tensor]


def matrices_of(family: str) -> tuple[str, ...]:
    return tuple(name for name in MATRICES if name != "W_gate" or family not in WITHOUT_GATE)


def find_weight(model: Any, family: str, matrix: str, layer: int) -> Weight:
    find = hooked_weight if type(model).__name__ == "HookedTransformer" else bridge_weight
    return find(model, family, matrix, layer)


def hooked_weight(model: Any, family: str, matrix: str, layer: int) -> Weight:
    block = model.blocks[layer]
    if matrix in ATTENTION:
        # With grouped queries W_K and W_V are computed: repeated for every query head.
        stored = f"_{matrix}" if hasattr(block.attn, f"_{matrix}") else matrix
        return Weight((getattr(block.attn, stored),), as_it_is)
    if hasattr(block.mlp, "experts"):
        linears = tuple(getattr(expert, matrix).weight for expert in block.mlp.experts)
        return Weight(linears, lambda *weights: torch.stack([weight.T for weight in weights]))
    return Weight((getattr(block.mlp, matrix),), as_it_is)


def bridge_weight(model: Any, family: str, matrix: str, layer: int) -> Weight:
    block, name = model.blocks[layer], matrix.removeprefix("W_")
    if matrix in ATTENTION:
        linear = getattr(block.attn, name.lower()).original_component
        d_head, orient = model.cfg.d_head, orientation(linear)
        if matrix == "W_O":
            return Weight((linear.weight,), lambda w: orient(w).unflatten(0, (-1, d_head)))
        return Weight(
            (linear.weight,), lambda w: orient(w).unflatten(1, (-1, d_head)).transpose(0, 1)
        )
    if (stack := stacked_experts(model, layer)) is not None:
        tensor = stack.down_proj if matrix == "W_out" else stack.gate_up_proj
        return Weight((tensor,), lambda weight: expert_slice(weight, family, matrix))
    # Gated MLPs with processed weights multiply by copies in TransformerLens 3.
    copied = getattr(block.mlp, f"_processed_{matrix}", None)
    if copied is not None:
        return Weight((copied,), lambda weight: weight.T)
    # A dense layer among layers of experts has different names.
    projection = getattr(block.mlp, f"dense_{name}", None) or getattr(block.mlp, name)
    linear = projection.original_component
    return Weight((linear.weight,), orientation(linear))


def stacked_experts(model: Any, layer: int) -> Any:
    """The module of a layer that holds all experts in its parameters, if there is one."""
    modules = model.blocks[layer].modules()
    return next((module for module in modules if "gate_up_proj" in module._parameters), None)


def expert_slice(weight: Tensor, family: str, matrix: str) -> Tensor:
    """`[expert, d_in, d_out]` of a matrix from the parameter in which it is stacked."""
    if family == "gpt_oss":  # stored in this orientation, gate and up interleaved
        return {"W_out": weight, "W_gate": weight[..., ::2], "W_in": weight[..., 1::2]}[matrix]
    turned = weight.transpose(1, 2)
    gate, up = turned.chunk(2, dim=-1)
    return {"W_out": turned, "W_gate": gate, "W_in": up}[matrix]


def orientation(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """Convert to `[d_in, d_out]`, the layout of Hugging Face's Conv1D but not of torch's Linear."""
    return (lambda weight: weight.T) if isinstance(linear, nn.Linear) else as_it_is


def as_it_is(weight: Tensor) -> Tensor:
    return weight


def prompts() -> Tensor:
    """Two rows of token ids, longer than any family's sliding window."""
    return torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token, per prompt."""
    scores = logits[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (torch.logsumexp(logits[:, :-1], -1) - scores).mean(-1)


def weight_gradients(
    model: Any,
    weights: Sequence[Weight],
    tokens: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = loss,
) -> list[Tensor]:
    """Autograd's gradient of each weight, from a plain run."""
    tensors = [tensor.requires_grad_() for weight in weights for tensor in weight.tensors]
    # An expert without tokens is not in the graph. Neither is a weight that was looked up
    # in the wrong place, but then the error is NaN, which fails every comparison.
    flat = torch.autograd.grad(loss(model(tokens), tokens).sum(), tensors, materialize_grads=True)
    left = iter(flat)
    return [weight.turn(*(next(left) for _ in weight.tensors)) for weight in weights]


# -------------------------------------------------------------------------------------- measurement


def measure(
    family: str, kind: str, dtype: str, build: Callable[..., Any] = build_model
) -> Cells | str:
    """The cells of one model, or the reason for their absence."""
    try:
        model = build(family, kind, DTYPES[dtype])
    except NotAvailable as error:
        return str(error)
    return errors(model, family)


def errors(model: Any, family: str) -> Cells:
    matrices = matrices_of(family)
    try:
        return matrix_errors(model, family, matrices)
    except UnsupportedModelError:  # of which of them?
        return {matrix: error_or_reason(model, family, matrix) for matrix in matrices}


def error_or_reason(model: Any, family: str, matrix: str) -> float | str:
    try:
        return matrix_errors(model, family, [matrix])[matrix]
    except UnsupportedModelError as error:
        return str(error)


def matrix_errors(model: Any, family: str, matrices: Sequence[str]) -> Cells:
    capture = capture_gradients(model, prompts(), loss, matrices=matrices)
    keys = keys_of(matrices)
    weights = [find_weight(model, family, *key) for key in keys]
    expected = weight_gradients(model, weights, prompts())
    return largest_errors(capture, dict(zip(keys, expected, strict=True)))


def keys_of(matrices: Sequence[str]) -> list[tuple[str, int]]:
    return [(matrix, layer) for matrix in matrices for layer in range(N_LAYERS)]


def largest_errors(capture: Any, expected: dict[tuple[str, int], Tensor]) -> Cells:
    """The largest error of every matrix over its layers; NaN counts as the largest."""
    errors = [relative_error(summed(capture[key]), gradient) for key, gradient in expected.items()]
    worst = torch.tensor(errors, dtype=torch.float64).unflatten(0, (-1, N_LAYERS)).amax(1)
    matrices = list(dict.fromkeys(matrix for matrix, _ in expected))
    return dict(zip(matrices, worst.tolist(), strict=True))


def summed(gradient: Any) -> Tensor:
    """`X^T Delta` summed over all prompts."""
    return sum(gradient.dense(prompt) for prompt in range(len(gradient.mask)))


# -------------------------------------------------------------------------------------------- parts


def measure_all() -> Iterator[Row]:
    for family, kind, dtype in product(FAMILIES, KINDS, DTYPES):
        cells = measure(family, kind, dtype)
        if isinstance(cells, dict):
            cells = {matrix: rounded_up(cell) for matrix, cell in cells.items()}
        yield {"family": family, "kind": kind, "dtype": dtype, "cells": cells}


def rounded_up(cell: float | str) -> float | str:
    """To 2 or 5 times a power of ten, so that the page does not depend on the machine."""
    if isinstance(cell, str) or not 0 < cell < math.inf:
        return cell
    power = math.floor(math.log10(cell))
    return next(bound for step in (2, 5, 20) if cell <= (bound := float(f"{step}e{power}")))


def part_of(transformer_lens: str) -> Path:
    return PARTS / f"tl-{transformer_lens}.json"


def write_part() -> None:
    packages = ("transformer-lens", "transformers", "torch")
    versions = {package: version(package).partition("+")[0] for package in packages}
    lines = ",\n".join(json.dumps(row) for row in measure_all())
    PARTS.mkdir(exist_ok=True)
    part_of(versions["transformer-lens"]).write_text(
        f'{{"versions": {json.dumps(versions)},\n"rows": [\n{lines}\n]}}\n'
    )


def read_parts() -> list[dict[str, Any]]:
    """The committed measurements, oldest TransformerLens first."""
    parts = [json.loads(path.read_text()) for path in PARTS.glob("tl-*.json")]
    return sorted(parts, key=lambda part: version_key(part["versions"]["transformer-lens"]))


def version_key(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("."))


# --------------------------------------------------------------------------------------------- page

CLASS_NAMES = {
    "hooked": "`HookedTransformer`",
    "hooked-processed": "`HookedTransformer`, processed",
    "bridge": "`TransformerBridge`",
    "bridge-compat": "`TransformerBridge`, compatibility mode",
}

HEAD = """\
# Architectures

Generated, do not edit. `python tests/support/architecture_table.py` measures with the installed
TransformerLens, writes `docs/architectures/tl-VERSION.json`, and generates this page from all such
files. `tests/models/test_architectures.py` checks every number against its tolerance, {tolerances}.

Each number is the relative Frobenius error `||X^T Delta - dL/dW|| / ||dL/dW||` of the captured
factors against autograd's own weight gradient: the maximum over the two layers of the model,
rounded up to 2 or 5 times a power of ten, in **float32 / float64**. The models have small random
weights and the code of the architecture: grouped queries, sliding windows, softcaps, ALiBi,
attention sinks, shared experts. The prompts are two of 11 tokens, and the loss is the mean
next-token loss, which involves every position.

*Processed* means weights as loaded by `from_pretrained`, with folded norms, and *compatibility
mode* is `enable_compatibility_mode()` of a bridge. Processing steps that would change the output of
a family are omitted. For mixtures of experts, the matrices of all experts are included; `qwen3_moe`
has a dense MLP in its first layer here. `falcon_new` has one key-value head, because for several,
as in Falcon-40B, `TransformerBridge` splits the fused matrix wrongly.

Some families compute norms, rotary embeddings, softmaxes or routers in float32 even in a float64
model. This does not affect the errors, because both gradients are computed from the same
activations.

`[n]` refers to the reason for a missing number at the end of the page. `·`: the architecture has no
such matrix.

Measured with

{versions}
"""


class Notes:
    """Reasons, numbered by first use."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        return f"[{self.numbers.setdefault(reason, len(self.numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for reason, number in self.numbers.items()]


def render(parts: Sequence[dict[str, Any]]) -> str:
    notes = Notes()
    columns = [(part, kind) for part in parts for kind in KINDS if has_class(part, kind)]
    sections = [HEAD.format(tolerances=as_text(TOLERANCES), versions=versions_of(parts))]
    sections += ["## Every architecture\n", "Maximum over all matrices.\n"]
    sections.append(overview(columns, notes))
    sections += ["## Every matrix\n"]
    for part, kind in columns:
        sections += [f"### {column_name(part, kind, ', ')}\n", details(part, kind, notes)]
    sections += ["## Missing numbers\n", *without_class(parts), "", *notes.lines()]
    return "\n".join(sections) + "\n"


def as_text(tolerances: dict[str, float]) -> str:
    return " and ".join(f"{number(bound)} in {dtype}" for dtype, bound in tolerances.items())


def versions_of(parts: Sequence[dict[str, Any]]) -> str:
    line = "- TransformerLens {transformer-lens} (transformers {transformers}, torch {torch})"
    return "\n".join(line.format(**part["versions"]) for part in parts)


def column_name(part: dict[str, Any], kind: str, between: str) -> str:
    return f"{part['versions']['transformer-lens']}{between}{CLASS_NAMES[kind]}"


def has_class(part: dict[str, Any], kind: str) -> bool:
    """Whether a version of TransformerLens has the class."""
    return any(isinstance(row["cells"], dict) for row in part["rows"] if row["kind"] == kind)


def without_class(parts: Sequence[dict[str, Any]]) -> list[str]:
    """The reason why a version of TransformerLens has fewer columns."""
    lines = [
        f"- TransformerLens {part['versions']['transformer-lens']}: "
        + cells_of(part, next(iter(FAMILIES)), kind, "float32")
        for part in parts
        for kind in KINDS
        if not has_class(part, kind)
    ]
    return list(dict.fromkeys(lines))


def overview(columns: Sequence[tuple[dict[str, Any], str]], notes: Notes) -> str:
    def row(family: str) -> list[str]:
        return [
            f"`{family}`",
            *(pair(largest, part, family, kind, notes) for part, kind in columns),
        ]

    head = ["", *(column_name(part, kind, "<br>") for part, kind in columns)]
    return table(head, [row(family) for family in FAMILIES])


def details(part: dict[str, Any], kind: str, notes: Notes) -> str:
    def row(family: str) -> list[str]:
        picks = [methodcaller("get", matrix) for matrix in MATRICES]
        return [f"`{family}`", *(pair(pick, part, family, kind, notes) for pick in picks)]

    return table(["", *(f"`{matrix}`" for matrix in MATRICES)], [row(name) for name in FAMILIES])


def pair(
    pick: Callable[[Cells], float | str | None],
    part: dict[str, Any],
    family: str,
    kind: str,
    notes: Notes,
) -> str:
    """One cell of a table, `float32 / float64`."""
    texts = []
    for dtype in DTYPES:
        cells = cells_of(part, family, kind, dtype)
        cell = cells if isinstance(cells, str) else pick(cells)
        texts.append(notes.mark(cell) if isinstance(cell, str) else number(cell))
    return texts[0] if texts[0] == texts[1] else " / ".join(texts)


def largest(cells: Cells) -> float | str:
    """The largest error; if a matrix is refused, the reason."""
    refused = [cell for cell in cells.values() if isinstance(cell, str)]
    return refused[0] if refused else max(cells.values())


def cells_of(part: dict[str, Any], family: str, kind: str, dtype: str) -> Cells | str:
    wanted = {"family": family, "kind": kind, "dtype": dtype}
    return next(row["cells"] for row in part["rows"] if row.items() >= wanted.items())


def number(value: float | None) -> str:
    return "·" if value is None else f"{value:.0e}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_part()
    PAGE.write_text(render(read_parts()))
