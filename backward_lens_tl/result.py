"""What the lens found, as tensors, as words, as a table.

A result stands alone: it keeps the gradients' factors and the text of every token that it shows,
and neither the model nor the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from backward_lens_tl._checks import check_index, is_index, is_integer, shown
from backward_lens_tl.capture.gradient_capture import Coverage, GradientCapture
from backward_lens_tl.capture.hook_points import (
    AttentionGradient,
    HookFunction,
    HookPointGradient,
    attention_patch,
)
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.selection import position_index
from backward_lens_tl.data.segments import Subject, batch_segments
from backward_lens_tl.errors import InputError
from backward_lens_tl.files.exports import write_csv, write_parquet
from backward_lens_tl.files.storage import read, replacing, write
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import MatrixName
from backward_lens_tl.readout.cells import Cell, TokenScore
from backward_lens_tl.readout.readout import Reading, Readout
from backward_lens_tl.readout.tables import PositionTable, gradient_table, neuron_table

if TYPE_CHECKING:
    import pandas as pd

_SAVED_TYPES = (
    AttentionGradient,
    Coverage,
    GradientCapture,
    HookPointGradient,
    MatrixGradient,
    Reading,
    Readout,
)
_DISTRIBUTIONS = ("backward-lens-tl", "transformer-lens", "torch")
_SHORT = Repr()
_SHORT.maxstring = 60


def check_result(result: object) -> None:
    """Refuse what is no result.

    Args:
        result: What a view was given.

    Raises:
        InputError: If it is something else.
    """
    if not isinstance(result, BackwardLensResult):
        raise InputError(
            f"the result is a {type(result).__name__}; pass what backward_lens returned"
        )


@dataclass(frozen=True, repr=False)
class BackwardLensResult:
    """Gradients of weight matrices and what they say over the vocabulary.

    Tensors of a matrix have the axes `layer batch pos`: the layers in `layers`, the prompts, and
    the positions in `positions`. Methods take a layer's own number and a position in the prompt,
    negative ones from the end.

    Attributes:
        capture: The captured factors, with the raw gradient's sign.
        readings: What each projection reads; the methods speak of the first.
        positions: Index of each projected position in its prompt, -1 where there is none.
        token_texts: Text of every token that occurs in a readout or as a target.
        direction: `"update"` if the VJPs of `W_out` and `W_O` were negated before the projection,
            so that top tokens are those that a step of gradient descent adds; `"gradient"` if not.
        vjps_at: Which VJPs were projected, `"matrix"` for those at the matrix's own output or
            `"residual"` for those where that is added to the residual stream.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> result.matrices, result.layers, result.projections
        (('W_in', 'W_out'), (0, 1, 2, 3, 4, 5, 6, 7), ('logit_lens', 'normalized'))
        >>> result.top_tokens("W_out", layer=6, pos=-1, k=2)
        [' Paris', ' France']
    """

    capture: GradientCapture
    readings: tuple[Reading, ...]
    positions: Int[Tensor, "batch pos"]
    token_texts: Mapping[int, str]
    direction: str
    vjps_at: str = "matrix"

    # --- what there is -------------------------------------------------------------------------

    @property
    def matrices(self) -> tuple[MatrixName, ...]:
        """Names of the matrices, in the order in which a layer uses them."""
        return self.capture.matrices

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return self.capture.layers

    @property
    def projection(self) -> str:
        """Name of the projection that the methods speak of."""
        return self.readings[0].projection

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all projections that vectors were read by."""
        return tuple(reading.projection for reading in self.readings)

    @property
    def readouts(self) -> Mapping[str, Readout]:
        """The projected spanning set of each matrix."""
        return self.readings[0].readouts

    @property
    def faint_norm(self) -> float:
        """Length below which a projected vector is faint; 0 if the projection has none."""
        return self.readings[0].faint_norm

    def under(self, projection: str) -> BackwardLensResult:
        """The same result, speaking of another projection.

        Args:
            projection: Its name, such as `"normalized"`.

        Returns:
            A result that shares all tensors with this one.

        Raises:
            InputError: If vectors were not read by it.

        Examples:
            >>> result.cell("W_out", layer=6, pos=0).is_faint
            True
            >>> result.top_tokens("W_out", layer=6, pos=0, k=1)  # mostly the final norm's bias
            [' English']
            >>> result.under("normalized").top_tokens("W_out", layer=6, pos=0, k=1)
            [' child']
        """
        if projection not in self.projections:
            raise InputError(
                f"{projection!r} was not asked for; there is {', '.join(self.projections)}, and "
                "backward_lens(..., projection=...) takes several"
            )
        first = self.readings[self.projections.index(projection)]
        others = (reading for reading in self.readings if reading is not first)
        return replace(self, readings=(first, *others))

    @property
    def k(self) -> int:
        """Number of tokens kept at either end."""
        return int(self.readouts[self.matrices[0]].top_ids.shape[-1])

    def layer_number(self, layer: int) -> int:
        """The number of a layer in the model.

        Args:
            layer: A layer of the model, or a negative index into the analysed layers.

        Returns:
            Its number, from 0.

        Raises:
            InputError: If it was not analysed.

        Examples:
            >>> result.layer_number(-1)
            7
        """
        return self.layers[self._layer_index(layer)]

    def target(self, batch: int = 0) -> str | None:
        """Text of a prompt's target, if there is one.

        Args:
            batch: Which prompt.

        Returns:
            The text; `None` if the objective is not about one token and no target was given.

        Raises:
            InputError: If there is no such prompt.

        Examples:
            >>> result.target()
            ' Paris'
        """
        self._check_prompt(batch)
        targets = self.capture.targets
        return None if targets is None else self.token_texts[int(targets[batch])]

    # --- tensors -------------------------------------------------------------------------------

    def readout(self, matrix: str) -> Readout:
        """The projected spanning set of a matrix.

        Args:
            matrix: Its name.

        Returns:
            Token ids and scores, `[layer, batch, pos, k]`, and target ranks, `[layer, batch, pos]`.

        Raises:
            InputError: If the matrix was not asked for.

        Examples:
            >>> result.readout("W_out").top_ids.shape  # [layer, batch, pos, k]
            torch.Size([8, 1, 6, 10])
        """
        if isinstance(matrix, str) and matrix in self.readouts:
            return self.readouts[matrix]
        raise InputError(
            f"{matrix!r} is not in this result; it has {', '.join(self.matrices)}: name one of "
            "these as the matrix, or ask for it with backward_lens(..., matrices=...)"
        )

    def target_rank(self, matrix: str) -> Int[Tensor, "layer batch pos"]:
        """Rank of the target among all tokens, 0 for the largest score.

        Where `is_zero` is true the rank is that of the final norm's bias and means nothing.

        Args:
            matrix: Its name.

        Returns:
            The ranks; -1 at padding.

        Raises:
            InputError: If the objective has no target and none was given.

        Examples:
            >>> result.target_rank("W_out")[:, 0, -1].tolist()  # at the last token, layer by layer
            [0, 0, 0, 0, 0, 0, 0, 0]
        """
        if self.capture.targets is None:
            raise InputError(
                f"{self.capture.objective} is not about one token, so there is no target to "
                "rank; pass target=... beside the objective"
            )
        return self.readout(matrix).target_rank

    def norms(self, matrix: str) -> Float[Tensor, "layer batch pos"]:
        """`||delta_i||_2`, how strongly each position writes into a matrix; 0 at padding.

        Args:
            matrix: Its name.

        Returns:
            The norms.

        Raises:
            InputError: If the matrix was not asked for.

        Examples:
            >>> norms = result.norms("W_out")
            >>> norms.shape  # [layer, batch, pos]
            torch.Size([8, 1, 6])
            >>> norms[:, 0].argmax(-1).tolist()  # where each layer is written to most
            [5, 5, 5, 5, 5, 5, 5, 5]
        """
        return self._by_layer(matrix, [gradient.norms for gradient in self._of(matrix)])

    def is_zero(self, matrix: str) -> Bool[Tensor, "layer batch pos"]:
        """Where a position adds nothing to a matrix's gradient; true at padding.

        Args:
            matrix: Its name.

        Returns:
            Where it does.

        Raises:
            InputError: If the matrix was not asked for.

        Examples:
            >>> result.is_zero("W_out")[-1, 0].tolist()  # only the last token writes there
            [True, True, True, True, True, False]
        """
        zero = self._by_layer(matrix, [gradient.is_zero for gradient in self._of(matrix)])
        return zero | (self.positions < 0)

    def _of(self, matrix: str) -> Iterator[MatrixGradient]:
        self.readout(matrix)
        return (self.capture[matrix, layer] for layer in self.layers)

    def _by_layer(self, matrix: str, values: list[Tensor]) -> Tensor:
        chosen = torch.stack(values).gather(
            2, self.positions.clamp_min(0).expand(len(values), *self.positions.shape)
        )
        return chosen.masked_fill(self.positions < 0, 0)

    # --- attention and TransformerLens's cache --------------------------------------------------

    @property
    def coverage(self) -> Coverage:
        """Which of the model's parameters these gradients are of, and which they are not."""
        return self.capture.coverage

    def reversed_attention(self, layer: int) -> Float[Tensor, "batch head query key"]:
        """Reversed Attention, the attention map of the backward pass.

        Args:
            layer: A layer of the model, or a negative index into the analysed layers.

        Returns:
            The gradient at the attention scores divided by `sqrt(d_head)`;
            `GradientCapture.reversed_attention` has the formula.

        Raises:
            InputError: If no attention matrix of the layer was asked for.

        Examples:
            >>> result = blt.backward_lens(
            ...     model, "Lionel Messi plays for", " Paris", matrices="attn"
            ... )
            >>> result.reversed_attention(5).shape  # [batch, head, query, key]
            torch.Size([1, 4, 6, 6])
        """
        return self.capture.reversed_attention(self.layer_number(layer))

    def attention_patch(self, layer: int, scale: float) -> tuple[str, HookFunction]:
        """A hook that adds Reversed Attention to the attention pattern of a forward pass.

        Use it as `with model.hooks(fwd_hooks=[result.attention_patch(5, scale=-10.0)]): ...`. A
        negative `scale` lowers the loss: to first order it changes by `scale` times the inner
        product of Reversed Attention and the gradient at the pattern.

        Args:
            layer: A layer of the model, or a negative index into the analysed layers.
            scale: What Reversed Attention is multiplied by.

        Returns:
            The name of the hook point and the hook; it takes a pattern of the same prompts, or one
            prompt's for any number of copies.

        Raises:
            InputError: If no attention matrix of the layer was asked for; by the hook, if the
                pattern is of other prompts.
            UnsupportedModelError: If the model does not go on with what a hook makes of its
                pattern, as GPT-Neo, GPT-J and OPT as a TransformerBridge.

        Examples:
            >>> result = blt.backward_lens(
            ...     model, "Lionel Messi plays for", " Paris", matrices="attn"
            ... )
            >>> with model.hooks(fwd_hooks=[result.attention_patch(5, scale=-10.0)]):
            ...     patched = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
            >>> bool(patched.capture.loss < result.capture.loss)
            True
        """
        number = self.layer_number(layer)
        return attention_patch(self.capture.attention_of(number), number, scale)

    def to_cache(self, model: object = None) -> ActivationCache:
        """Activations and gradients as TransformerLens's `ActivationCache`.

        Args:
            model: The model, for those of the cache's own methods that need it.

        Returns:
            Activations under their hook point's name, gradients under that name and `_grad`.

        Examples:
            >>> cache = result.to_cache(model)
            >>> cache["blocks.6.hook_mlp_out_grad"].shape  # [batch, pos, d_model]
            torch.Size([1, 6, 128])
        """
        return self.capture.to_cache(model)

    def attribution(self, other: BackwardLensResult) -> dict[str, Float[Tensor, "batch *shape"]]:
        """Attribution patching: how a patch of each hook point would change this run's loss.

        Args:
            other: The result of the run that the patch comes from, with the same hook points.

        Returns:
            `(x_other - x) . delta` by hook point; `GradientCapture.attribution` has the details.

        Raises:
            InputError: If `other` is no result, or the two do not fit together.

        Examples:
            >>> point = "blocks.0.hook_resid_post"
            >>> italy, france = (
            ...     blt.backward_lens(model, prompt, " Paris", hook_points=point)
            ...     for prompt in ("The capital of Italy is", "The capital of France is")
            ... )
            >>> change = italy.attribution(france)[point]  # [batch, pos]
            >>> italy.capture.str_tokens[0][int(change[0].argmin())]  # to be patched for " Paris"
            ' Italy'
        """
        if not isinstance(other, BackwardLensResult):
            raise InputError(
                f"{other!r} is a {type(other).__name__}; pass the result of the other run"
            )
        return self.capture.attribution(other.capture)

    # --- words ---------------------------------------------------------------------------------

    def cell(self, matrix: str, layer: int, pos: int, batch: int = 0) -> Cell:
        """One matrix, layer and position, in words.

        Args:
            matrix: Name of the matrix.
            layer: A layer of the model, or a negative index into the analysed layers.
            pos: Position in the prompt, negative from its end.
            batch: Which prompt.

        Returns:
            Its tokens, norm and rank.

        Raises:
            InputError: If it was not analysed.

        Examples:
            >>> cell = result.cell("W_out", layer=6, pos=-1)
            >>> cell.token, cell.top[0].token, cell.target_rank
            (' for', ' Paris', 0)
        """
        cells = self.cells(matrix, layer, batch)
        position = self._analysed_position(pos, batch)
        return next(cell for cell in cells if cell.position == position)

    def cells(self, matrix: str, layer: int, batch: int = 0) -> list[Cell]:
        """The cells of one matrix and layer, in the order of the analysed positions.

        Args:
            matrix: Name of the matrix.
            layer: A layer of the model, or a negative index into the analysed layers.
            batch: Which prompt.

        Returns:
            One cell per analysed position.

        Raises:
            InputError: If it was not analysed.

        Examples:
            >>> [(cell.token, cell.target_leads) for cell in result.cells("W_out", layer=6)]
            [('<|endoftext|>', False), ('Li', False), ('onel', False), (' Messi', False), (' plays',
            False), (' for', True)]
        """
        readout, row = self.readout(matrix), self._layer_index(layer)
        self._check_prompt(batch)
        gradient = self.capture[matrix, self.layers[row]]
        column = (self.positions[batch] >= 0).nonzero()[:, 0]
        at = self.positions[batch, column]
        here = row, batch, column
        # Lists first: asking a tensor for one number after the other takes many times as long.
        zero = gradient.is_zero[batch, at].tolist()
        projected = at_least_float32(self._position_table.projected(gradient)[batch, at])
        lengths = torch.linalg.vector_norm(projected, dim=-1).tolist()
        columns = zip(
            at.tolist(),
            gradient.norms[batch, at].tolist(),
            gradient.input_norms[batch, at].tolist(),
            self._tokens(readout.top_ids[here], readout.top_scores[here]),
            self._tokens(readout.bottom_ids[here], readout.bottom_scores[here]),
            readout.target_rank[here].tolist(),
            zero,
            (length < self.faint_norm for length in lengths),
            strict=True,
        )
        has_target = self.capture.targets is not None
        return [
            Cell(
                matrix=gradient.matrix,
                layer=gradient.layer,
                position=position,
                token=self.capture.str_tokens[batch][position],
                top=() if is_zero else top,
                bottom=() if is_zero else bottom,
                norm=norm,
                input_norm=input_norm,
                target_rank=rank if has_target and not is_zero else None,
                is_zero=is_zero,
                is_faint=is_short and not is_zero,
            )
            for position, norm, input_norm, top, bottom, rank, is_zero, is_short in columns
        ]

    def top_tokens(
        self, matrix: str, layer: int, pos: int, k: int | None = None, batch: int = 0
    ) -> list[str]:
        """The most promoted tokens of one cell.

        Args:
            matrix: Name of the matrix.
            layer: A layer of the model, or a negative index into the analysed layers.
            pos: Position in the prompt, negative from its end.
            k: How many; by default all that were kept.
            batch: Which prompt.

        Returns:
            Texts, best first; none where the position adds nothing to the gradient.

        Examples:
            >>> result.top_tokens("W_out", layer=6, pos=-1, k=2)
            [' Paris', ' France']
        """
        entries = self.cell(matrix, layer, pos, batch).top
        return [entry.token for entry in entries[: self._kept(k)]]

    def bottom_tokens(
        self, matrix: str, layer: int, pos: int, k: int | None = None, batch: int = 0
    ) -> list[str]:
        """The least promoted tokens of one cell.

        Args:
            matrix: Name of the matrix.
            layer: A layer of the model, or a negative index into the analysed layers.
            pos: Position in the prompt, negative from its end.
            k: How many; by default all that were kept.
            batch: Which prompt.

        Returns:
            Texts, smallest score first; none where the position adds nothing to the gradient.

        Examples:
            >>> result.bottom_tokens("W_out", layer=6, pos=-1, k=1)
            [' Belgrade']
        """
        entries = self.cell(matrix, layer, pos, batch).bottom
        return [entry.token for entry in entries[: self._kept(k)]]

    def _tokens(
        self, ids: Int[Tensor, "pos k"], scores: Float[Tensor, "pos k"]
    ) -> list[tuple[TokenScore, ...]]:
        return [
            tuple(
                TokenScore(self.token_texts[token], token, score)
                for token, score in zip(*row, strict=True)
            )
            for row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def _kept(self, k: int | None) -> int:
        if k is None:
            return self.k
        if not is_index(k, self.k + 1) or k < 1:
            raise InputError(
                f"k is {shown(k)}; {self.k} tokens were kept, and backward_lens(..., k=...) keeps "
                "more"
            )
        return k

    def _layer_index(self, layer: int) -> int:
        if is_integer(layer) and layer in self.layers:
            return self.layers.index(layer)
        if not (is_index(layer, len(self.layers)) and layer < 0):
            raise InputError(
                f"layer {shown(layer)} was not analysed; there are "
                f"{', '.join(map(str, self.layers))}"
            )
        return layer % len(self.layers)

    def _check_prompt(self, batch: int) -> None:
        check_index("prompt", batch, len(self.positions))

    def _analysed_position(self, pos: int, batch: int) -> int:
        self._check_prompt(batch)
        wanted = position_index(pos, len(self.capture.str_tokens[batch]), batch)
        analysed = self.positions[batch].tolist()
        if wanted not in analysed:
            raise InputError(
                f"position {shown(pos)} was not analysed in prompt {batch}; there are {analysed}"
            )
        return wanted

    # --- tables --------------------------------------------------------------------------------

    def to_df(
        self,
        subject: Subject | Sequence[Subject | None] | None = None,
        *,
        matrix: str | None = None,
        batch: int | None = None,
    ) -> pd.DataFrame:
        """A tidy table, one row per prompt, matrix, layer and position.

        Args:
            subject: What the prompts are about, one for all or one per prompt: a text, or the span
                `(start, end)` of its characters in `gradients.prompts`. It gives a column
                `segment` behind `token`: the part of the prompt, as the paper's figures 6, 7 and
                16 to 21 divide it.
            matrix: The one matrix to have rows of; `None` for all.
            batch: The one prompt to have rows of; `None` for all.

        Returns:
            Columns `prompt`, `matrix`, `layer`, `position`, `token`, `norm` (of `delta_i`),
            `input_norm` (of `x_i`), `top_vjp_cosine` (of the raw spanning vector and the top
            layer's VJP at the last token; missing without `W_out` of the last layer), `is_zero`,
            `projection`, `is_faint`, `target`, `target_rank`, `answer` (the model's own),
            `answer_rank` and `entropy` (missing unless `measures` asked for them), `top_tokens`,
            `top_scores`, `bottom_tokens`, `bottom_scores`. The last four hold lists, empty where a
            position adds nothing; there, and without a target, ranks are missing. Of several
            projections it has the first; `under(name)` has the others.

        Raises:
            InputError: If a prompt lacks its subject, or there is no such matrix or prompt.

        Examples:
            >>> table = result.to_df(subject="Lionel Messi", matrix="W_out")
            >>> table.loc[table["layer"] == 6, ["token", "segment"]].values.tolist()
            [['<|endoftext|>', 'before subject'], ['Li', 'first subject token'], ['onel',
            'middle subject tokens'], [' Messi', 'last subject token'], [' plays', 'after subject'],
            [' for', 'last token']]
        """
        segments = None
        if subject is not None:
            segments = batch_segments(self.capture.prompts, self.capture.spans, subject)
        if batch is not None:
            self._check_prompt(batch)
        if matrix is not None:
            self.readout(matrix)
        return self._position_table.rows(
            self.matrices if matrix is None else [matrix],
            range(len(self.positions)) if batch is None else [int(batch)],
            segments,
        )

    @property
    def _position_table(self) -> PositionTable:
        return PositionTable(
            self.capture,
            self.readings[0],
            self.positions,
            self.token_texts,
            reads_joins=self.vjps_at == "residual",
        )

    def gradient_df(self, *, matrix: str | None = None, batch: int | None = None) -> pd.DataFrame:
        """Each gradient as a whole, one row per prompt, matrix and layer.

        Args:
            matrix: The one matrix to have rows of; `None` for all.
            batch: The one prompt to have rows of; `None` for all.

        Returns:
            Columns `prompt`, `matrix`, `layer`, `is_last_layer`, `n_tokens`, `n_writing`, `loss`,
            `rank`, `largest_rank`, `input_rank`, `vjp_rank`, `norm`, `top_energy`, `rank_99`,
            `singular_values`; `tables.gradient_table` says more.

        Raises:
            InputError: If there is no such matrix or prompt.

        Examples:
            >>> gradients = result.gradient_df(matrix="W_out")
            >>> gradients[["layer", "n_tokens", "rank"]].tail(2).values.tolist()
            [[6, 6, 6], [7, 6, 1]]
        """
        if matrix is not None:
            self.readout(matrix)
        return gradient_table(self.capture, matrix, batch)

    def neuron_df(self, matrix: str, layer: int, batch: int = 0) -> pd.DataFrame:
        """The neurons of one gradient beside its spanning vectors (paper, figures 8 to 10).

        Args:
            matrix: Name of the matrix.
            layer: A layer of the model, or a negative index into the analysed layers.
            batch: Which prompt.

        Returns:
            One row per neuron and position: `neuron`, `neuron_norm`, `norm_order`, `position`,
            `token`, `similarity`; `tables.neuron_table` says more.

        Raises:
            InputError: If it was not analysed, or heads or experts have factors of their own.

        Examples:
            >>> neurons = result.neuron_df("W_out", layer=6)
            >>> longest = neurons[neurons["norm_order"] == 0].set_index("token")
            >>> longest["similarity"].idxmax()
            ' for'
        """
        self.readout(matrix)
        self._check_prompt(batch)
        return neuron_table(self.capture, matrix, self.layer_number(layer), batch)

    def to_csv(
        self, path: str | Path, subject: Subject | Sequence[Subject | None] | None = None
    ) -> None:
        """Write `to_df` as CSV in UTF-8; its lists become JSON.

        Args:
            path: The file; one that exists is replaced, at once and as a whole.
            subject: As in `to_df`.

        Raises:
            InputError: If a prompt lacks its subject.
            ResultFileError: If the file cannot be written.

        Examples:
            >>> import pandas as pd
            >>> result.to_csv(folder / "messi.csv", subject="Lionel Messi")
            >>> len(pd.read_csv(folder / "messi.csv"))  # 2 matrices x 8 layers x 6 tokens
            96
        """
        write_csv(self.to_df(subject), path)

    def to_parquet(
        self, path: str | Path, subject: Subject | Sequence[Subject | None] | None = None
    ) -> None:
        """Write `to_df` as Parquet; its lists stay lists.

        Args:
            path: The file; one that exists is replaced, at once and as a whole.
            subject: As in `to_df`.

        Raises:
            InputError: If a prompt lacks its subject.
            ResultFileError: If the file cannot be written, or pyarrow is not installed.

        Examples:
            >>> import pandas as pd
            >>> result.to_parquet(folder / "messi.parquet")
            >>> tokens = pd.read_parquet(folder / "messi.parquet")["top_tokens"]
            >>> len(tokens), len(tokens[0])  # lists of k tokens
            (96, 10)
        """
        write_parquet(self.to_df(subject), path)

    def _repr_html_(self) -> str:
        # The one place where data looks ahead to a view: a result shows itself in a notebook.
        from backward_lens_tl.views.table import render_table

        return render_table(self)

    def save_html(self, path: str | Path, batch: int = 0) -> None:
        """Write the layers x tokens table of one prompt as a page that needs nothing else.

        Args:
            path: The file; one that exists is replaced, at once and as a whole.
            batch: Which prompt.

        Raises:
            ResultFileError: If the file cannot be written.

        Examples:
            >>> result.save_html(folder / "messi.html")
            >>> "Paris" in (folder / "messi.html").read_text(encoding="utf-8")
            True
        """
        from backward_lens_tl.views.table import render_page

        self._check_prompt(batch)
        page = render_page(self, batch)
        with replacing(path) as partial:
            partial.write_text(page, encoding="utf-8")

    def __repr__(self) -> str:
        prompts, matrix = len(self.positions), self.matrices[-1]
        others = f" and {prompts - 1} more" if prompts > 1 else ""
        cell = f'"{matrix}", layer={self.layers[-1]}, pos={self.positions[0][-1]}'
        ranks = "" if self.target() is None else f'.target_rank("{matrix}"), '
        return (
            f"BackwardLensResult({', '.join(self.matrices)} of {len(self.layers)} layers, "
            f"{_SHORT.repr(self.capture.prompt(0))}{others}, {self.capture.objective}, "
            f"{self.projection}, {self.direction})\n"
            f'Next: .top_tokens({cell}), {ranks}.to_df(), .save_html("page.html")'
        )

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the whole result to one safetensors file.

        Its metadata names the versions of this package, TransformerLens and torch, the model, the
        prompts and the objective.

        Args:
            path: The file; one that exists is replaced, at once and as a whole.

        Examples:
            >>> result.save(folder / "messi.safetensors")
            >>> [file.name for file in folder.iterdir()]
            ['messi.safetensors']
        """
        about: dict[str, object] = {
            name.replace("-", "_"): version(name) for name in _DISTRIBUTIONS
        }
        about["model"] = self.capture.model_name
        about["prompts"] = [self.capture.prompt(batch) for batch in range(len(self.positions))]
        about["objective"] = self.capture.objective
        write(path, self, about)

    @classmethod
    def load(cls, path: str | Path) -> BackwardLensResult:
        """Read a saved result, on the CPU; no model is needed.

        Args:
            path: The file.

        Returns:
            The result.

        Raises:
            ResultFileError: If the file is missing, damaged, or not a saved result.

        Examples:
            >>> result.save(folder / "messi.safetensors")
            >>> again = blt.BackwardLensResult.load(folder / "messi.safetensors")
            >>> again.top_tokens("W_out", layer=6, pos=-1, k=1)
            [' Paris']
        """
        found: BackwardLensResult = read(path, (cls,), _SAVED_TYPES)
        return found
