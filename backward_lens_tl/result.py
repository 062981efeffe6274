"""The result of `backward_lens`: readouts, tables, the page, and one file that holds everything.

A result is self-contained: it keeps the factors of the gradients and the text of every token that
it shows, but neither the model nor the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING

from backward_lens_tl._checks import shown
from backward_lens_tl.capture.coverage import Coverage
from backward_lens_tl.capture.gradient_capture import GradientCapture
from backward_lens_tl.capture.hook_points import AttentionGradient, HookPointGradient
from backward_lens_tl.capture.matrix_gradient import MatrixGradient
from backward_lens_tl.capture.predictions import Predictions
from backward_lens_tl.data.segments import Subject, batch_segments, turn_segments
from backward_lens_tl.errors import InputError
from backward_lens_tl.files.exports import write_csv, write_parquet
from backward_lens_tl.files.storage import read, replacing, write
from backward_lens_tl.readout.lens_readouts import LensReadouts
from backward_lens_tl.readout.readout import Reading, Readout

if TYPE_CHECKING:
    import pandas as pd

_SAVED_TYPES = (
    AttentionGradient,
    Coverage,
    GradientCapture,
    HookPointGradient,
    MatrixGradient,
    Predictions,
    Reading,
    Readout,
)
_DISTRIBUTIONS = ("backward-lens-tl", "transformer-lens", "torch")
_SHORT = Repr()
_SHORT.maxstring = 60


def check_result(result: object) -> None:
    """Refuse anything but a result.

    Args:
        result: The argument of a view.

    Raises:
        InputError: If it is something else.
    """
    if not isinstance(result, BackwardLensResult):
        raise InputError(
            f"the result is a {type(result).__name__}; pass what backward_lens returned"
        )


@dataclass(frozen=True, repr=False)
class BackwardLensResult(LensReadouts):
    """Gradients of weight matrices and their readouts over the vocabulary.

    Tensors of a matrix have the axes `layer batch pos`: the layers in `layers`, the prompts, and
    the positions in `positions`. Methods take the number of a layer in the model and a position in
    the prompt, negative ones from the end. The gradients themselves are in `capture`.

    Attributes:
        capture: The captured factors, with the sign of the raw gradient.
        readings: The readouts under each projection; methods use the first.
        positions: Index of each projected position in its prompt, -1 where there is none.
        token_texts: Text of every token that occurs in a readout or as a target.
        direction: `"update"` if the VJPs of `W_out` and `W_O` were negated before the projection,
            so that top tokens are those that a step of gradient descent adds; `"gradient"` if not.
        vjps_at: Which VJPs were projected: `"matrix"` for those at the matrix's own output,
            `"residual"` for those where the output is added to the residual stream.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
        >>> result.matrices, result.layers, result.projections
        (('W_in', 'W_out'), (0, 1, 2, 3, 4, 5, 6, 7), ('logit_lens', 'normalized'))
        >>> result.top_tokens("W_out", layer=6, pos=-1, k=2)
        [' Paris', ' France']
    """

    def to_df(
        self,
        subject: Subject | Sequence[Subject | None] | None = None,
        *,
        matrix: str | None = None,
        batch: int | None = None,
        turns: bool = False,
    ) -> pd.DataFrame:
        """A tidy table with one row per prompt, matrix, layer and position.

        Args:
            subject: The subject of the prompts, one for all or one per prompt: a text, or the span
                `(start, end)` of its characters in `capture.prompts`. It adds a column `segment`
                after `token`: the segment of the prompt, as in the paper's figures 6, 7 and 16 to
                21.
            matrix: Only the rows of this matrix; `None` for all.
            batch: Only the rows of this prompt; `None` for all.
            turns: Whether the column `segment` holds the turns of chats instead: `"system"`,
                `"user"`, `"assistant"` and other roles, `"template"` for what the chat template
                adds, and `"last token"`.

        Returns:
            Columns `prompt`, `matrix`, `layer`, `position`, `token`, `norm` (of `delta_i`),
            `input_norm` (of `x_i`), `write_norm` (`||x_i|| ||delta_i||`), `top_vjp_cosine` (of the
            raw spanning vector and the top layer's VJP at the last token; missing without `W_out`
            of the last layer), `is_zero`, `projection`, `is_faint`, `target` (of the position),
            `target_rank`, `answer` (the model's own), `answer_rank` and `entropy` (missing unless
            `measures` requests them), `top_tokens`, `top_scores`, `bottom_tokens`, `bottom_scores`.
            The last four hold lists, empty where a position adds nothing; there, and without a
            target, ranks are missing. With several projections the table has the first; use
            `under(name)` for the others.

        Raises:
            InputError: If a prompt lacks its subject or is not a chat, there is no such matrix or
                prompt, or both `subject` and `turns` are given.

        Examples:
            >>> table = result.to_df(subject="Lionel Messi", matrix="W_out")
            >>> table.loc[table["layer"] == 6, ["token", "segment"]].values.tolist()
            [['<|endoftext|>', 'before subject'], ['Li', 'first subject token'], ['onel',
            'middle subject tokens'], [' Messi', 'last subject token'], [' plays', 'after subject'],
            [' for', 'last token']]
        """
        import pandas as pd

        if batch is not None:
            self._check_prompt(batch)
        if matrix is not None:
            self.readout(matrix)
        matrices = self.matrices if matrix is None else [matrix]
        prompts = range(len(self.positions)) if batch is None else [int(batch)]
        columns = [
            self._reader.columns(name, layer, prompts) for name in matrices for layer in self.layers
        ]
        table = pd.DataFrame(
            {
                name: list(chain.from_iterable(each[name] for each in columns))
                for name in columns[0]
                if name not in ("top_ids", "bottom_ids")
            }
        )
        table = table.astype({"target_rank": "Int64", "answer_rank": "Int64"})
        table = table.sort_values("prompt", kind="stable", ignore_index=True)
        if subject is not None or turns:
            segments = self._segments(subject, turns, prompts)
            places = zip(table["prompt"], table["position"], strict=True)
            after = 1 + list(table.columns).index("token")
            table.insert(after, "segment", [segments[prompt][place] for prompt, place in places])
        return table

    def _segments(
        self,
        subject: Subject | Sequence[Subject | None] | None,
        turns: bool,
        prompts: Sequence[int],
    ) -> Mapping[int, Sequence[str | None]]:
        """The segment of each token of some prompts, by subject or by turn."""
        if subject is None:
            return {each: turn_segments(self.capture.turns[each], each) for each in prompts}
        if turns:
            raise InputError(
                f"subject is {shown(subject)} and turns is True, but a token has one segment; pass "
                "one of them"
            )
        return dict(enumerate(batch_segments(self.capture.prompts, self.capture.spans, subject)))

    def to_csv(
        self, path: str | Path, subject: Subject | Sequence[Subject | None] | None = None
    ) -> None:
        """Write `to_df` as CSV in UTF-8, with lists as JSON.

        Args:
            path: The file. An existing file is replaced atomically.
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
        """Write `to_df` as Parquet. Lists stay lists.

        Args:
            path: The file. An existing file is replaced atomically.
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
        # Views come from a later stage, but a notebook calls this method of the result.
        from backward_lens_tl.views.table import render_table

        return render_table(self)

    def to_html(self, batch: int = 0) -> str:
        """The layers x tokens table of one prompt as a self-contained page.

        Of a prompt with thousands of cells, the page holds fewer than `k` tokens of each cell, or
        only the last tokens of the prompt, and says so; it stays below 5 MB.

        Args:
            batch: Which prompt.

        Returns:
            The HTML document.

        Raises:
            InputError: If there is no such prompt.

        Examples:
            >>> page = result.to_html()
            >>> page[:15], "Paris" in page
            ('<!DOCTYPE html>', True)
        """
        from backward_lens_tl.views.table import render_page

        self._check_prompt(batch)
        return render_page(self, batch)

    def save_html(self, path: str | Path, batch: int = 0) -> None:
        """Write the layers x tokens table of one prompt as a self-contained page.

        Args:
            path: The file. An existing file is replaced atomically.
            batch: Which prompt.

        Raises:
            InputError: If there is no such prompt.
            ResultFileError: If the file cannot be written.

        Examples:
            >>> result.save_html(folder / "messi.html")
            >>> (folder / "messi.html").read_text(encoding="utf-8") == result.to_html()
            True
        """
        page = self.to_html(batch)
        with replacing(path) as partial:
            partial.write_text(page, encoding="utf-8")

    def __repr__(self) -> str:
        prompts, matrix = len(self.positions), self.matrices[-1]
        others = f" and {prompts - 1} more" if prompts > 1 else ""
        cell = f'"{matrix}", layer={self.layers[-1]}, pos={self.positions[0][-1]}'
        ranks = "" if self.capture.targets is None else f'.target_rank("{matrix}"), '
        return (
            f"BackwardLensResult({', '.join(self.matrices)} of {len(self.layers)} layers, "
            f"{_SHORT.repr(self.capture.prompt(0))}{others}, {self.capture.objective}, "
            f"{self.projection}, {self.direction})\n"
            f'Next: .top_tokens({cell}), {ranks}.to_df(), .save_html("page.html")'
        )

    def save(self, path: str | Path) -> None:
        """Write the whole result to one safetensors file.

        The file's metadata holds the versions of this package, TransformerLens and torch, the
        model, the prompts and the objective.

        Args:
            path: The file. An existing file is replaced atomically.

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
        """Read a saved result. No model is needed.

        Args:
            path: The file.

        Returns:
            The result, with its tensors on the CPU.

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
