"""What the experiments share: one sweep over the prompts, evaluations, and single prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from backward_lens_tl._checks import listed
from backward_lens_tl.choices import Lens
from backward_lens_tl.data.records import Record, Records
from backward_lens_tl.editing.methods.memit import MEMIT
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.presets import preset_methods
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.requests import EditRequest
from backward_lens_tl.errors import InputError, JacobianLensError, UnsupportedModelError
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.perplexity import perplexity, read_texts
from backward_lens_tl.evaluation.plan import unused_records
from backward_lens_tl.evaluation.run import Evaluation, evaluate
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.loading import FACTS_MODEL
from backward_lens_tl.readout.jacobian_projection import (
    CarriedLens,
    JacobianProjection,
    jacobian_lens,
)
from backward_lens_tl.reproduction.vectors import PromptVjps, prompt_vjps
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.run import Sweep, sweep

if TYPE_CHECKING:
    import pandas as pd

EXAMPLE = ("Lionel Messi plays for", " Paris")
"""The paper's prompt and its target."""

_LENSES: tuple[Lens, ...] = ("logit_lens", "normalized")
_END = 0.01
_NORMS = ("norm", "input_norm", "is_zero")


@dataclass(eq=False)
class Evidence:
    """The measurements that experiments share, each computed when it is first used.

    Args:
        model: The model.
        records: The data that prompts and edits come from.
        folder: Folder for sweeps and evaluations.
        n_prompts: Number of prompts.
        seed: Seed for choosing them.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's default.
        progress: Whether to show progress bars.
        jacobian: Fits of the Jacobian Lens, as for `reproduce`.
        statistics: Texts of second moments, as for `reproduce`.
        texts: Texts of perplexity, as for `reproduce`.
    """

    model: nn.Module
    records: Records
    folder: Path
    n_prompts: int
    seed: int
    prepend_bos: bool | None
    progress: bool
    jacobian: Any = None
    statistics: Any = None
    texts: str | None = None

    # --- the model -----------------------------------------------------------------------------

    @cached_property
    def _host(self) -> Host:
        return host_of(self.model)

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self._host.name

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return self._host.n_layers

    @property
    def d_vocab(self) -> int:
        """The size of the vocabulary."""
        return self._host.d_vocab_out

    @property
    def near_end(self) -> float:
        """The highest rank among the most probable 1 % of the vocabulary."""
        return _END * (self.d_vocab - 1)

    @property
    def far_end(self) -> float:
        """The lowest rank among the least probable 1 % of the vocabulary."""
        return (1 - _END) * (self.d_vocab - 1)

    def layers(self, begin: float, end: float) -> tuple[int, ...]:
        """The layers in a fraction of the model, at least one.

        Args:
            begin: Beginning of the range, 0 for the first layer.
            end: End of the range, 1 for the last layer.

        Returns:
            The layers whose middle is in the range, otherwise the layer at the middle of the range.
        """
        inside = [
            layer for layer in range(self.n_layers) if begin <= (layer + 0.5) / self.n_layers < end
        ]
        return tuple(inside) or (int((begin + end) / 2 * self.n_layers),)

    # --- many prompts --------------------------------------------------------------------------

    @cached_property
    def sweep(self) -> Sweep:
        """The raw gradients of the MLPs' matrices under both lenses, as in the paper."""
        return self._sweep(
            "sweep",
            matrices="mlp",
            projection=_LENSES,
            position_columns=(*_NORMS, "target_rank", "answer_rank"),
        )

    @cached_property
    def attention_sweep(self) -> Sweep | None:
        """The norms at attention's matrices; `None` if they cannot be analysed."""
        try:
            return self._sweep(
                "sweep-attention",
                matrices="attn",
                position_columns=_NORMS,
                gradient_columns=(),
                k=1,
            )
        except UnsupportedModelError:
            return None

    def _sweep(self, name: str, **settings: Any) -> Sweep:
        config = SweepConfig(
            direction="gradient",
            prepend_bos=self.prepend_bos,
            multi_token="first",  # as in the paper's own edits
            prompts=self.n_prompts,
            seed=self.seed,
            **{"k": 5, **settings},
        )
        return sweep(self.model, self.records, self.folder / name, config, progress=self.progress)

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

    @cached_property
    def vjps(self) -> list[PromptVjps]:
        """`W_out`'s VJPs of the prompts as tensors."""
        return self.capture_vjps()

    def capture_vjps(self) -> list[PromptVjps]:
        """Capture `W_out`'s VJPs of the prompts with the model's present weights."""
        texts, targets = self.prompts["text"].tolist(), self.prompts["target_id"].tolist()
        return prompt_vjps(self.model, texts, targets, self.prepend_bos)

    @cached_property
    def jacobian_lenses(self) -> list[CarriedLens]:
        """The fits of the Jacobian Lens, the one on most prompts last; at least one.

        Raises:
            JacobianLensError: If there is none, or one is not of this model.
        """
        fits = [] if self.jacobian is None else listed(self.jacobian)
        if not fits and self.model_name == FACTS_MODEL:
            fits = [FACTS_MODEL]
        if not fits:
            raise JacobianLensError(
                f"no Jacobian Lens of {self.model_name!r} was passed; fit one with backward-lens "
                "fit-jacobian --model MODEL --texts FILE --out lens.pt, and pass --jacobian "
                "lens.pt (in Python, jacobian='lens.pt')"
            )
        lenses = [
            (each if isinstance(each, JacobianProjection) else jacobian_lens(each)).bound(
                self._host
            )
            for each in fits
        ]
        return sorted(lenses, key=lambda lens: lens.jacobians.n_prompts)

    @property
    def n_cut_targets(self) -> int:
        """The number of prompts of which only the target's first token was used."""
        rows = self.records.rows
        used = zip(self.prompts["prompt"], self.prompts["target"], strict=True)
        targets = ((getattr(rows[row], "target", None), target) for row, target in used)
        return sum(isinstance(text, str) and text != target for text, target in targets)

    @cached_property
    def correct_prompts(self) -> list[int]:
        """Rows of the prompts that the model answers as the data do."""
        correct = self.prompts["is_correct"].fillna(False).astype(bool)
        rows: list[int] = self.prompts.loc[correct, "prompt"].tolist()
        return rows

    # --- edits ---------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> list[EditRequest]:
        """The facts in the first rows of the data, at least one.

        Raises:
            InputError: If none of the rows is a record.
        """
        rows = self.records.rows[: self.n_prompts]
        found = [EditRequest.of(row) for row in rows if isinstance(row, Record)]
        if not found:
            raise InputError(f"none of the first rows of {self.records.name!r} can be edited")
        return found

    def evaluation_config(self, **settings: Any) -> EvaluationConfig:
        """Settings for evaluations on the first rows.

        Args:
            **settings: Further settings.

        Returns:
            The settings.
        """
        shared = {"prepend_bos": self.prepend_bos, "seed": self.seed, "texts": self.texts}
        return EvaluationConfig(**{"records": self.n_prompts, **shared, **settings})

    def evaluation(
        self, name: str, methods: Mapping[str, EditMethod], **settings: Any
    ) -> Evaluation:
        """Evaluate methods on the first rows of the data.

        Args:
            name: Name of the evaluation's folder.
            methods: The methods by name.
            **settings: As in `evaluation_config`.

        Returns:
            The evaluation, of at least one record.

        Raises:
            InputError: If none of the rows can be evaluated.
        """
        config = self.evaluation_config(**settings)
        out = self._edits / name
        out.mkdir(exist_ok=True)
        found = evaluate(self.model, self.records, out, methods, config, progress=self.progress)
        if found.edits().empty:
            problem = found.rejects()["problem"].iloc[0]
            raise InputError(f"none of the records can be evaluated; the first: {problem}")
        return found

    def presets(self, names: str | Sequence[str] = "all") -> dict[str, EditMethod]:
        """Methods with settings for the model.

        Args:
            names: Names of presets.

        Returns:
            The methods by name. Those that need training use the rows that are not evaluated.
        """
        return preset_methods(
            self.model,
            names,
            folder=self._edits,
            training=self._training_records,
            jacobian=self.jacobian_lenses[-1].jacobians if self._has_fits else None,
            prepend_bos=self.prepend_bos,
            texts=self.statistics,
            progress=self.progress,
        )

    @property
    def _has_fits(self) -> bool:
        return self.jacobian is not None and bool(listed(self.jacobian))

    @cached_property
    def _edits(self) -> Path:
        folder = self.folder / "edits"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def _training_records(self) -> tuple[Record, ...]:
        return unused_records(self.records, self.evaluation_config())

    def shift_preset(self, name: str) -> ForwardPassShift:
        """A forward pass shift with settings for the model.

        Args:
            name: Name of the preset.

        Returns:
            The method.

        Raises:
            InputError: If the preset is another method.
        """
        method = self.presets((name,))[name]
        if not isinstance(method, ForwardPassShift):
            raise InputError(f"preset {name!r} is {method.name}, not a forward pass shift")
        return method

    def memit_preset(self) -> MEMIT:
        """MEMIT with settings for the model, which searches for the value of each fact once.

        Returns:
            The method.

        Raises:
            InputError: If the preset is another method.
        """
        method = self.presets(("memit",))["memit"]
        if not isinstance(method, MEMIT):
            raise InputError(f"preset 'memit' is {method.name}, not MEMIT")
        return replace(method, value_folder=self._edits / "memit-values")

    @cached_property
    def perplexity(self) -> float:
        """Perplexity of the unedited model on all texts together."""
        config = self.evaluation_config()
        texts = read_texts(self._host, config).tokens(self._host, config)
        return perplexity(self._host, texts, config.denominator).corpus

    # --- single prompts ------------------------------------------------------------------------

    @cached_property
    def example(self) -> BackwardLensResult:
        """The gradients of the paper's own prompt."""
        return self.result(*EXAMPLE)

    @cached_property
    def example_layer(self) -> int:
        """The layer whose neurons are shown, at the relative depth of layer 14 in GPT2-medium's 24.

        It is not the last layer, whose gradient is one VJP, unless there is only one.
        """
        return min(round(14 / 24 * self.n_layers), max(0, self.n_layers - 2))

    def result(self, prompt: str, target: str | int) -> BackwardLensResult:
        """The gradients of one prompt as updates, under both lenses.

        Args:
            prompt: The prompt.
            target: The target, of which the first token is used.

        Returns:
            The result.
        """
        return backward_lens(
            self.model,
            prompt,
            target,
            projection=_LENSES,
            prepend_bos=self.prepend_bos,
            multi_token="first",
        )
