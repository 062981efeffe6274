"""What the experiments share: one sweep over the prompts, and a few prompts in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from backward_lens_tl.choices import Lens, MultiToken
from backward_lens_tl.data.records import Record, Records
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.presets import preset_methods
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.errors import InputError, TargetError, UnsupportedModelError
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.perplexity import perplexity, read_texts
from backward_lens_tl.evaluation.plan import unused_records
from backward_lens_tl.evaluation.run import Evaluation, evaluate
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models import host_of
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.run import Sweep, sweep

if TYPE_CHECKING:
    import pandas as pd

EXAMPLE = ("Lionel Messi plays for", " Paris")
"""The paper's prompt and the answer that it is taught."""

_LENSES: tuple[Lens, ...] = get_args(Lens)
_END = 0.01
_KEPT = 5
_NORMS = ("norm", "input_norm", "is_zero")


class Evidence:
    """The measurements that experiments are read off, each made when it is first asked for.

    Args:
        model: The model.
        records: The data that the prompts are taken from.
        folder: Where sweeps are written.
        prompts: How many prompts.
        seed: Of their choice.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.
        progress: Whether sweeps show a bar.

    Attributes:
        model: As given.
        records: As given.
        prompts_asked: How many prompts were asked for.
        seed: As given.
        prepend_bos: As given.
        progress: As given.
    """

    def __init__(
        self,
        model: nn.Module,
        records: Records,
        folder: Path,
        *,
        prompts: int,
        seed: int,
        prepend_bos: bool | None,
        progress: bool,
    ) -> None:
        self.model, self.records = model, records
        self.prompts_asked, self.seed, self.prepend_bos = prompts, seed, prepend_bos
        self._folder, self.progress = folder, progress
        self._host = host_of(model)

    # --- the model -----------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self._host.name

    @property
    def n_layers(self) -> int:
        """How many layers it has."""
        return self._host.n_layers

    @property
    def d_vocab(self) -> int:
        """How many tokens it chooses among."""
        return self._host.d_vocab_out

    @property
    def near_end(self) -> float:
        """Rank up to which a token is among the most probable 1 % of the vocabulary."""
        return _END * (self.d_vocab - 1)

    @property
    def far_end(self) -> float:
        """Rank from which a token is among the least probable 1 % of the vocabulary."""
        return (1 - _END) * (self.d_vocab - 1)

    def layers(self, begin: float, end: float) -> tuple[int, ...]:
        """The layers of a part of the model, at least one.

        Args:
            begin: Where the part begins, 0 for the first layer.
            end: Where it ends, 1 for the last layer.

        Returns:
            The layers whose middle is in the part, or else the one that the part's middle is in.
        """
        inside = [
            layer for layer in range(self.n_layers) if begin <= (layer + 0.5) / self.n_layers < end
        ]
        return tuple(inside) or (int((begin + end) / 2 * self.n_layers),)

    # --- many prompts ----------------------------------------------------------------------------

    @cached_property
    def sweep(self) -> Sweep:
        """The raw gradients of the MLPs' matrices, under both lenses, as the paper reads them."""
        return self._sweep(
            "sweep",
            matrices="mlp",
            projection=_LENSES,
            position_columns=(*_NORMS, "target_rank", "answer_rank"),
        )

    @cached_property
    def attention_sweep(self) -> Sweep | None:
        """The norms at attention's matrices; `None` if the model's cannot be analysed."""
        columns = {"position_columns": _NORMS, "gradient_columns": (), "k": 1}
        try:
            return self._sweep("sweep-attention", matrices="attn", **columns)
        except UnsupportedModelError:
            return None

    def _sweep(self, name: str, **settings: Any) -> Sweep:
        config = SweepConfig(
            direction="gradient",
            prepend_bos=self.prepend_bos,
            # Datasets have answers of several tokens, whose first one is taught, as in the paper's
            # own editing.
            multi_token="first",
            prompts=self.prompts_asked,
            seed=self.seed,
            **{"k": _KEPT, **settings},
        )
        out = self._folder / name
        return sweep(self.model, self.records, out, config, progress=self.progress)

    @cached_property
    def positions(self) -> pd.DataFrame:
        """The sweep's table of positions."""
        return self.sweep.positions()

    @cached_property
    def gradients(self) -> pd.DataFrame:
        """The sweep's table of gradients."""
        return self.sweep.gradients()

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """The prompts that were analysed."""
        return self.sweep.prompts()

    @property
    def n_cut_targets(self) -> int:
        """Of how many prompts only the first token of the target is taught."""
        rows = self.records.rows
        taught = zip(self.prompts["prompt"], self.prompts["target"], strict=True)
        wanted = ((getattr(rows[row], "target", None), target) for row, target in taught)
        return sum(isinstance(text, str) and text != target for text, target in wanted)

    @cached_property
    def correct_prompts(self) -> list[int]:
        """Rows of the prompts that the model answers with the data's own answer."""
        correct = self.prompts["is_correct"].fillna(False).astype(bool)
        rows: list[int] = self.prompts.loc[correct, "prompt"].tolist()
        return rows

    # --- edits -----------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> list[EditRequest]:
        """What the first rows of the data teach, at least one fact.

        Raises:
            InputError: If none of the rows is a record.
        """
        rows = self.records.rows[: self.prompts_asked]
        found = [EditRequest.of(row) for row in rows if isinstance(row, Record)]
        if not found:
            raise InputError(f"none of the first rows of {self.records.name!r} can be edited")
        return found

    def evaluation_config(self, **settings: Any) -> EvaluationConfig:
        """Settings of an evaluation of the first rows.

        Args:
            **settings: Those that are not the same for all.

        Returns:
            The settings.
        """
        shared = {"prepend_bos": self.prepend_bos, "seed": self.seed}
        return EvaluationConfig(**{"records": self.prompts_asked, **shared, **settings})

    def evaluation(
        self, name: str, methods: Mapping[str, EditMethod], **settings: Any
    ) -> Evaluation:
        """Evaluate methods on the first rows of the data.

        Args:
            name: Of the folder.
            methods: The methods by name.
            **settings: Of the evaluation, beside those that are the same for all.

        Returns:
            What was measured, of one record or more.

        Raises:
            InputError: If none of the rows can be evaluated.
        """
        config = self.evaluation_config(**settings)
        out = self._folder / "edits" / name
        out.mkdir(parents=True, exist_ok=True)
        found = evaluate(self.model, self.records, out, methods, config, progress=self.progress)
        if found.edits().empty:
            problem = found.rejects()["problem"].iloc[0]
            raise InputError(f"none of the records can be evaluated; the first: {problem}")
        return found

    def presets(self, names: str | Sequence[str] = "all") -> dict[str, EditMethod]:
        """Methods with settings for the model.

        Args:
            names: Their names.

        Returns:
            The methods by name; what they learn, they learn from the rows that are left.
        """
        folder = self._folder / "edits"
        folder.mkdir(parents=True, exist_ok=True)
        return preset_methods(
            self.model,
            names,
            folder=folder,
            training=self._training_records,
            prepend_bos=self.prepend_bos,
            progress=self.progress,
        )

    @cached_property
    def _training_records(self) -> tuple[Record, ...]:
        return unused_records(self.records, self.evaluation_config())

    def shift_preset(self, name: str) -> ForwardPassShift:
        """A form of the forward pass shift with settings for the model.

        Args:
            name: Of the preset.

        Returns:
            The method.

        Raises:
            InputError: If the preset is another method.
        """
        method = self.presets((name,))[name]
        if not isinstance(method, ForwardPassShift):
            raise InputError(f"preset {name!r} is {method.name}, and no forward pass shift")
        return method

    @cached_property
    def perplexity(self) -> float:
        """That of all texts together, of the unedited model."""
        config = self.evaluation_config()
        texts = read_texts(self._host, config).tokens(self._host, config)
        return perplexity(self._host, texts, config.denominator).corpus

    # --- single prompts --------------------------------------------------------------------------

    @cached_property
    def example(self) -> BackwardLensResult:
        """The gradients of the paper's own prompt."""
        return self.result(*EXAMPLE)

    @cached_property
    def example_layer(self) -> int:
        """The layer whose neurons are shown, as far up as layer 14 in the 24 of GPT2-medium.

        It is not the last one, whose gradient is one VJP, unless there is no other.
        """
        return min(round(14 / 24 * self.n_layers), max(0, self.n_layers - 2))

    def result(self, prompt: str, target: str | int) -> BackwardLensResult:
        """The gradients of one prompt, read as what an update adds, under both lenses.

        Args:
            prompt: The prompt.
            target: What it is taught.

        Returns:
            The result.
        """
        try:
            return self._result(prompt, target, None)
        except TargetError:
            return self._result(prompt, target, "first")

    def _result(
        self, prompt: str, target: str | int, position: MultiToken | None
    ) -> BackwardLensResult:
        return backward_lens(
            self.model,
            prompt,
            target,
            projection=_LENSES,
            prepend_bos=self.prepend_bos,
            multi_token=position,
        )
