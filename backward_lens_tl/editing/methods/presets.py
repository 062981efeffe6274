"""Every method with settings for a model: tuned, published, or scaled by depth.

`shift_auto` is the forward pass shift with its own defaults on every model. Settings of the facts
model, and some of SmolLM2's, were chosen on records that the benchmark does not use
(`benchmarks/tuning.py`); docs/editing.md shows what was tried. Those of GPT-2 xl are the published
ones. Other models are edited at the same relative depth as GPT-2 xl, and sizes of the shift are
searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from backward_lens_tl._checks import listed
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.mend.hypernetwork import MENDEditor
from backward_lens_tl.editing.mend.mend import MEND
from backward_lens_tl.editing.mend.settings import MENDTraining
from backward_lens_tl.editing.mend.training import train_mend
from backward_lens_tl.editing.methods.fine_tuning import FineTuning
from backward_lens_tl.editing.methods.memit import MEMIT
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.normalized_gradient import NormalizedGradient
from backward_lens_tl.editing.methods.rome import ROME
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.methods.steps import GradientStep
from backward_lens_tl.editing.methods.ultraedit import UltraEdit
from backward_lens_tl.editing.requests import EditRequest, tokenize_requests
from backward_lens_tl.editing.spanning_pairs import Positions
from backward_lens_tl.editing.statistics.moment_cache import cached_moments
from backward_lens_tl.editing.statistics.moments import SecondMoments, facts_moments
from backward_lens_tl.editing.statistics.pair_collection import (
    EDITED_LAYERS,
    pair_statistics,
    requests_digest,
)
from backward_lens_tl.editing.statistics.standardization import PairStatistics
from backward_lens_tl.errors import EditError
from backward_lens_tl.models import host_of
from backward_lens_tl.models.loading import FACTS_MODEL

_GPT2_XL_LAYERS = 48
TOKENS_PER_INPUT = 16
"""Tokens of second moments per dimension of `W_out`'s input: 102,400 for GPT-2 xl."""

_STATISTICS_REQUESTS = 300
_TRAINING_RECORDS = 1000

Settings = Mapping[str, Any]

METHODS: Mapping[str, type[EditMethod]] = {
    "ft_first": FineTuning,
    "ft_late": FineTuning,
    "ft_constrained": FineTuning,
    "sgd_step": GradientStep,
    "adam_step": GradientStep,
    "muon_step": GradientStep,
    "mend": MEND,
    "normalized_gradient": NormalizedGradient,
    "ultraedit": UltraEdit,
    "rome": ROME,
    "memit": MEMIT,
    "shift": ForwardPassShift,
    "shift_auto": ForwardPassShift,
    "shift_iterated": ForwardPassShift,
    "shift_whitened": ForwardPassShift,
}
"""The presets, in the order of tables."""

_PAPER: Settings = {"key": "paper", "target_tokens": "first"}
_SIZES = ("size", "iterations", "skip_if_answered")

_FACTS: Mapping[str, Settings] = {
    "ft_first": {"layers": 0, "lr": 5e-4},
    "ft_late": {"layers": 6, "lr": 2e-3},
    "ft_constrained": {"layers": 0, "lr": 2e-3, "norm_constraint": 7e-3},
    "sgd_step": {"optimizer": "sgd", "layers": 6, "lr": 2.0},
    "adam_step": {"optimizer": "adam", "layers": 6, "lr": 0.08},
    "muon_step": {"optimizer": "muon", "layers": 6, "lr": 3.0},
    "mend": {"layers": 0, "training": MENDTraining(lr=1e-3)},
    "normalized_gradient": {"layers": (5, 6, 7), "lr": 3e-3},
    "ultraedit": {"layers": (6,), "lr": 3e-3},
    "rome": {"layer": 0, "key_mode": "bare", "prefixes": ((5, 3), (10, 3))},
    "memit": {"layers": (0, 1), "regularization": 5.0},
    "shift": {"layer": 6, "size": 1.0, **_PAPER},
    "shift_auto": {},
    "shift_iterated": {"layer": 7, "size": 4.0, "key": "plain", "iterations": 25},
    "shift_whitened": {"layer": 6, "size": 4.0, "key": "whitened", "iterations": 25},
}

_GPT2_XL: Mapping[str, Settings] = {
    "ft_first": {"layers": 0, "objective": "prompt_last"},
    "ft_late": {"layers": 35, "objective": "prompt_last"},
    "ft_constrained": {"layers": 0, "norm_constraint": 5e-4, "objective": "prompt_last"},
    "sgd_step": {"optimizer": "sgd", "layers": 35, "lr": 0.1},
    "adam_step": {"optimizer": "adam", "layers": 35, "lr": 1e-3},
    "muon_step": {"optimizer": "muon", "layers": 35, "lr": 1.0},
    "mend": {"layers": (45, 46, 47)},
    "normalized_gradient": {"lr": 1e-3},
    "ultraedit": {},
    "rome": {"layer": 17, "key_mode": "rome"},
    "memit": {"layers": (13, 14, 15, 16, 17), "regularization": 20000.0},
    "shift": {"layer": 35, "size": 0.24, "skip_if_answered": True, **_PAPER},
    "shift_auto": {},
    "shift_iterated": {"layer": 35, "size": 4.0, "key": "plain", "iterations": 15},
    "shift_whitened": {"layer": 35, "size": 4.0, "key": "whitened", "iterations": 15},
}

_SMOLLM2_NAME, _SMOLLM2_LAYERS = "smollm2-135m", 30

_SMOLLM2: Mapping[str, Settings] = {
    "ft_first": {"layers": 0, "lr": 5e-4},
    "ft_late": {"layers": 22, "lr": 5e-4},
    "ft_constrained": {"layers": 0, "norm_constraint": 5e-3},
    "sgd_step": {"optimizer": "sgd", "layers": 22, "lr": 4.0},
    "adam_step": {"optimizer": "adam", "layers": 22, "lr": 0.03},
    "muon_step": {"optimizer": "muon", "layers": 22, "lr": 4.0},
    "mend": {"layers": (27, 28, 29), "training": MENDTraining()},
    "normalized_gradient": {"layers": (27, 28, 29), "lr": 1e-3},
    "ultraedit": {"layers": (27, 28, 29), "lr": 3e-3},
    "rome": {"layer": 9, "key_mode": "mean", "prefixes": ((5, 3), (10, 3))},
    "memit": {"layers": (5, 6, 7, 8, 9), "regularization": 500.0},
}
"""Chosen on a tuning split of CounterFact; the other presets are those by depth."""


def preset_methods(
    model: nn.Module,
    names: str | Sequence[str] = "all",
    *,
    folder: str | Path,
    training: Iterable[Record] = (),
    jacobian: object = None,
    prepend_bos: bool | None = False,
    texts: str | Path | Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, EditMethod]:
    """Create methods with settings for a model, and the statistics and networks that they need.

    Statistics and networks are computed when a method first needs them, and saved for the next
    time: second moments, which depend on the model and the texts only, in the folder in the
    environment variable `BACKWARD_LENS_CACHE` (`~/.cache/backward-lens-tl` by default), the others
    in `folder`.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        names: Names in `METHODS`, or `"all"`.
        folder: For `pairs.safetensors`, `pairs-answer.safetensors` and `mend.safetensors`; it must
            exist.
        training: Records for MEND's training and for the statistics of gradients, other than those
            that the methods are tested on.
        jacobian: A Jacobian Lens of the model for `shift_auto`, as in `ForwardPassShift`. The facts
            model's ships with it; without one, other models are edited without.
        prepend_bos: Whether prompts get a BOS token; the paper's had none.
        texts: The texts of second moments: texts, a file with one per line, `"facts"`, or
            `"Salesforce/wikitext"` (WikiText-2's test split). By default those that ship with the
            facts model; for other models WikiText-103's training split on the hub.
        progress: Whether to show progress bars.

    Returns:
        The methods by name, in the order of `METHODS`.

    Raises:
        EditError: If there is no such preset, or what a method needs is not available.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> names, folder = ["rome", "shift_iterated"], tempfile.mkdtemp()
        >>> methods = blt.editing.preset_methods(model, names, folder=folder, progress=False)
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris", "Lionel Messi")
        >>> with methods["rome"](model, request).applied(model):
        ...     blt.backward_lens(model, request.prompt).target()
        ' Paris'
    """
    asked = [names] if isinstance(names, str) else list(names)
    for name in asked:
        if name not in (*METHODS, "all"):
            raise EditError(f"unknown method {name!r}; allowed: {', '.join(METHODS)}, all")
    host = host_of(model)
    settings = preset_settings(host.name, host.n_layers)
    needs = _Needs(
        model,
        Path(folder),
        tuple(training),
        jacobian,
        prepend_bos,
        texts,
        _whitened_layers(settings),
        progress,
    )
    return {
        name: _with_needs(METHODS[name], settings[name], needs)
        for name in METHODS
        if name in asked or "all" in asked
    }


def preset_settings(model: str, n_layers: int) -> Mapping[str, Settings]:
    """Return the settings of each preset, without statistics and networks.

    Args:
        model: The model's name, with or without its owner's.
        n_layers: Its number of layers.

    Returns:
        Arguments of the method's class, or of the training for MEND, by the preset's name.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> settings = blt.editing.preset_settings(model.cfg.model_name, model.cfg.n_layers)
        >>> blt.editing.ROME(moments=blt.editing.facts_moments(), **settings["rome"]).layer
        0
    """
    if model == FACTS_MODEL:
        return _FACTS
    own_name = model.rpartition("/")[2]
    if own_name == "gpt2-xl":
        return _GPT2_XL
    by_depth = {name: _by_depth(own, n_layers) for name, own in _GPT2_XL.items()}
    # Its GGUF file, its hub name and fine-tuned copies have different names, but the same depth.
    if _SMOLLM2_NAME in own_name.casefold() and n_layers == _SMOLLM2_LAYERS:
        return {**by_depth, **_SMOLLM2}
    return by_depth


def _by_depth(settings: Settings, n_layers: int) -> Settings:
    """GPT-2 xl's settings with layers at the same relative depth."""

    def scaled(layer: int) -> int:
        return min(n_layers - 1, round(layer * n_layers / _GPT2_XL_LAYERS))

    own = {**settings}
    for name in ("layer", "layers"):
        if isinstance(own.get(name), int):
            own[name] = scaled(own[name])
        elif name in own:
            own[name] = tuple(dict.fromkeys(map(scaled, own[name])))
    if own.pop("regularization", None) is not None:
        own["regularization"] = None  # which scales with the width
    if "key" in own:  # sizes of a shift do not carry over
        own = {name: value for name, value in own.items() if name not in _SIZES} | {"size": "auto"}
    return own


@dataclass
class _Needs:
    """The statistics and networks of methods, computed on demand; see `preset_methods`."""

    model: nn.Module
    folder: Path
    training: tuple[Record, ...]
    given_jacobian: object
    prepend_bos: bool | None
    texts: str | Path | Sequence[str] | None
    whitened_layers: Sequence[int]
    progress: bool

    @cached_property
    def moments(self) -> SecondMoments:
        """Second moments of the inputs of `W_out`."""
        host = host_of(self.model)
        if host.name == FACTS_MODEL and self.texts is None:
            return facts_moments()
        return cached_moments(
            self.model,
            self.texts,
            layers=self.whitened_layers,
            max_tokens=TOKENS_PER_INPUT * host.d_mlp,
            prepend_bos=self.prepend_bos,
            progress=self.progress,
        )

    @property
    def jacobian(self) -> object:
        """The Jacobian Lens, if there is one."""
        is_facts = host_of(self.model).name == FACTS_MODEL
        return "facts" if self.given_jacobian is None and is_facts else self.given_jacobian

    def pairs(self, positions: Positions, file_name: str) -> Settings:
        """Statistics of the pairs of all layers, and the last layers as those to edit."""
        file, host = self.folder / file_name, host_of(self.model)
        records = self.needed_training[:_STATISTICS_REQUESTS]
        requests = [EditRequest.of(record) for record in records]
        if file.exists():
            found = PairStatistics.load(file)
            tokenized = tokenize_requests(host, requests, self.prepend_bos)
            same = (requests_digest(tokenized), host.fingerprint())
            if (found.requests, found.model) != same:
                raise EditError(
                    f"{str(file)!r} holds statistics of other records than the training records "
                    "of this call, or of another model; choose another folder"
                )
        else:
            found = pair_statistics(
                self.model,
                requests,
                layers=range(host.n_layers),
                positions=positions,
                prepend_bos=self.prepend_bos,
                progress=self.progress,
            )
            found.save(file)
        layers = range(max(0, host.n_layers - len(EDITED_LAYERS)), host.n_layers)
        return {"statistics": found, "layers": tuple(layers)}

    def editor(self, settings: Settings) -> MENDEditor:
        """MEND's networks, trained with these settings."""
        return train_mend(
            self.model,
            self.needed_training,
            **settings,
            prepend_bos=self.prepend_bos,
            out=self.folder / "mend.safetensors",
            progress=self.progress,
        )

    @property
    def needed_training(self) -> tuple[Record, ...]:
        """The training records; an `EditError` if there are none."""
        if not self.training:
            raise EditError(
                "MEND and the other gradient editors need records to learn from that are not "
                "evaluated, and there are none left; evaluate fewer records, or pass methods that "
                "need none, such as 'shift'"
            )
        return self.training[:_TRAINING_RECORDS]


def _with_needs(kind: type[EditMethod], settings: Settings, needs: _Needs) -> EditMethod:
    if kind is MEND:  # its settings are those of the training
        return MEND(needs.editor(settings), prepend_bos=needs.prepend_bos)
    needed: Settings = {}
    if kind is NormalizedGradient:
        needed = needs.pairs("all", "pairs.safetensors")
    elif kind is UltraEdit:
        needed = needs.pairs("answer", "pairs-answer.safetensors")
    elif kind is ForwardPassShift and not settings:
        needed = {"jacobian": needs.jacobian}
    elif _needs_moments(kind, settings):
        needed = {"moments": needs.moments}
    create: Callable[..., EditMethod] = kind
    return create(**{**needed, **settings}, prepend_bos=needs.prepend_bos)


def _needs_moments(kind: type[EditMethod], settings: Settings) -> bool:
    return kind in (ROME, MEMIT) or settings.get("key") == "whitened"


def _whitened_layers(settings: Mapping[str, Settings]) -> tuple[int, ...]:
    """Layers whose moments a preset needs, of all presets, so that one collection serves all."""
    found: set[int] = set()
    for name, own in settings.items():
        if _needs_moments(METHODS[name], own):
            found.update(listed(own.get("layers", own.get("layer"))))
    return tuple(sorted(found))
