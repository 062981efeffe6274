"""An edit as an object: what is added to each weight matrix, and a model with it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from backward_lens_tl._checks import checked_number
from backward_lens_tl.editing.checkpoints import difference
from backward_lens_tl.editing.edited_sites import check_weights, editable_host, edited_site
from backward_lens_tl.editing.lora import adapted, write_adapter
from backward_lens_tl.editing.lora_reading import read_adapter
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.outcomes import EditOutcome, EditReport
from backward_lens_tl.errors import EditError, ModelStateError
from backward_lens_tl.files.storage import Saved
from backward_lens_tl.models.checksums import checksum
from backward_lens_tl.models.sites import MATRIX_NAMES
from backward_lens_tl.models.weight_patching import Change, add_in_place, changed, put_back


@dataclass(frozen=True, repr=False, eq=False)
class WeightDelta(Saved):
    """An edit: what is added to each weight matrix that it changes.

    It is not tied to a model, and changes one only on request: `applied` changes a model inside a
    context, `apply_` until `revert_`; both restore every bit.

    Attributes:
        matrices: What is added to each matrix, in the order of a forward pass; each matrix once.
        about: What computed it: settings of the method, name of the model.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> delta = blt.editing.ForwardPassShift(layer=6, size=20.0, key="plain")(model, request)
        >>> delta.rank
        1
        >>> with delta.applied(model):
        ...     blt.backward_lens(model, request.prompt).target()
        ' Paris'
    """

    WHAT = "weight delta"
    PARTS = (MatrixDelta,)

    matrices: tuple[MatrixDelta, ...]
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(self._by_place) < len(self.matrices):
            raise EditError("a matrix occurs twice in one edit; add its changes up with +")
        # Not a field: the saved state of edited models does not belong to the edit.
        kept: weakref.WeakKeyDictionary[nn.Module, list[_Kept]] = weakref.WeakKeyDictionary()
        object.__setattr__(self, "_kept", kept)

    def __reduce__(self) -> tuple[type[WeightDelta], tuple[object, ...]]:
        # A copy is another edit, which is applied to no model.
        return WeightDelta, (self.matrices, self.about)

    @property
    def _by_place(self) -> dict[tuple[str, int], MatrixDelta]:
        return {(each.matrix, each.layer): each for each in self.matrices}

    def __getitem__(self, key: tuple[str, int]) -> MatrixDelta:
        if key in self._by_place:
            return self._by_place[key]
        there = ", ".join(f"({each.matrix!r}, {each.layer})" for each in self.matrices)
        raise EditError(f"this edit does not change {key!r}; it changes {there or 'nothing'}")

    def __iter__(self) -> Iterator[MatrixDelta]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def outcomes(self) -> tuple[EditOutcome, ...]:
        """How the target of each request stands with this edit, if the method checked it."""
        report = EditReport.from_about(self.about)
        return () if report is None else report.outcomes

    # --- from files ----------------------------------------------------------------------------

    @classmethod
    def from_lora(cls, folder: str | Path, *, partial: bool = False) -> WeightDelta:
        """Read a LoRA adapter in PEFT's format.

        Layers are recognised by their names: attention and MLPs of the Llama family (Llama,
        Mistral, Qwen, Gemma, SmolLM, OLMo, StableLM), GPT-2, GPT-J, GPT-Neo, OPT and Phi. `peft`
        is not needed. Ranks and scales may differ between layers, with or without rsLoRA.

        Args:
            folder: The folder with `adapter_config.json`.
            partial: Whether to leave out what is not a change of such a matrix: a trained
                unembedding, experts, or whole tensors (`modules_to_save`, `bias="all"`).
                `about["left_out"]` names it.

        Returns:
            The change of the raw weights, as the adapter's own factors.

        Raises:
            EditError: If the adapter cannot be read, changes something else as well, or is not
                a sum of outer products (DoRA, PiSSA and others: merge it and use `between`).

        Examples:
            >>> from importlib.resources import files
            >>> base = files("backward_lens_tl") / "facts_model"
            >>> delta.to_lora(folder / "paris", model, base)
            >>> blt.editing.WeightDelta.from_lora(folder / "paris").matrices
            (MatrixDelta(W_out of layer 5, [512, 128], rank <= 1),)
        """
        return cls(*read_adapter(folder, partial=partial))

    @classmethod
    def between(cls, base: str | Path, tuned: str | Path, rank: int = 8) -> WeightDelta:
        """Compute what fine-tuning added to a checkpoint, as the best change of a given rank.

        Tensors are read one at a time from safetensors files, so neither model is in memory. Layers
        are recognised as by `from_lora`. A base of higher precision than the tuned model is first
        rounded to the tuned model's dtype, since training in half precision starts there; otherwise
        rounding would look like a change of all matrices.

        Args:
            base: Folder of the model before, `"facts"`, `"smollm2"`, or a name on the hub.
            tuned: Folder of the model after, or a name on the hub.
            rank: The number of singular vectors of each matrix that are kept.

        Returns:
            The change of the raw weights. `about["discarded"]` is the share of the squared norm
            that each matrix leaves out, `about["left_out"]` names other tensors that differ.
            `about["rounded"]` has the two types if the base was rounded. If it is stored with fewer
            digits than the tuned model, `about["rounding"]` is the largest share of the squared
            norm of each matrix that is rounding, in case the base is a rounded copy of the weights
            that training started from.

        Raises:
            EditError: If a checkpoint cannot be read, they are of different models, or no matrix of
                attention or the MLP differs.

        Examples:
            >>> from importlib.resources import files
            >>> from transformers import AutoModelForCausalLM
            >>> facts = files("backward_lens_tl") / "facts_model"
            >>> tuned = AutoModelForCausalLM.from_pretrained(facts)
            >>> tuned.transformer.h[5].mlp.c_proj.weight.data[0] += 1.0
            >>> tuned.save_pretrained(folder / "tuned")
            >>> found = blt.editing.WeightDelta.between("facts", folder / "tuned", rank=2)
            >>> found.matrices
            (MatrixDelta(W_out of layer 5, [512, 128], rank <= 1),)
        """
        return cls(*difference(base, tuned, rank))

    # --- arithmetic ----------------------------------------------------------------------------

    @property
    def norm(self) -> float:
        """Frobenius norm over all matrices, without biases."""
        return math.hypot(*(each.norm for each in self.matrices))

    @property
    def rank(self) -> int:
        """Sum of the ranks of the matrices' changes."""
        return sum(each.rank() for each in self.matrices)

    def scale(self, factor: int | float) -> WeightDelta:
        """Multiply the edit by a number.

        Args:
            factor: The number; -1 gives the opposite edit.

        Returns:
            The scaled edit.

        Raises:
            EditError: If the number is not finite.

        Examples:
            >>> opposite = delta.scale(-1)
            >>> round(opposite.norm / delta.norm, 3), (delta + opposite).norm < 1e-6 * delta.norm
            (1.0, True)
        """
        number = checked_number("factor", factor, error=EditError)
        scaled = tuple(each.scale(number) for each in self.matrices)
        in_all = number * float(self.about.get("scaled_by", 1))
        about = EditReport.removed_from(self.about)  # it is of another size
        return WeightDelta(scaled, {**about, "scaled_by": in_all})

    def __add__(self, other: object) -> WeightDelta:
        if not isinstance(other, WeightDelta):
            return NotImplemented
        found = dict(self._by_place)
        for key, each in other._by_place.items():
            found[key] = found[key] + each if key in found else each
        ordered = sorted(
            found.values(), key=lambda each: (each.layer, MATRIX_NAMES.index(each.matrix))
        )
        raw = [each.about["weights"] for each in (self, other) if "weights" in each.about]
        about = {"weights": raw[0]} if raw else {}
        return WeightDelta(tuple(ordered), {**about, "sum_of": (self.about, other.about)})

    # --- on a model ----------------------------------------------------------------------------

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Change a model inside a context, and restore every bit afterwards, even after exceptions.

        Contexts may be nested, even for the same edit.

        Args:
            model: A `HookedTransformer` or `TransformerBridge`.

        Yields:
            The model.

        Raises:
            EditError: If the model lacks a matrix, or it has another size there.
            UnsupportedModelError: If a matrix cannot be changed.

        Examples:
            >>> with delta.applied(model):
            ...     blt.backward_lens(model, "Lionel Messi plays for").target()
            ' Paris'
            >>> blt.backward_lens(model, "Lionel Messi plays for").target()
            ' Miami'
        """
        with changed(self._changes(model)):
            yield model

    def apply_(self, model: nn.Module) -> None:
        """Change a model until `revert_`.

        The parameters that change are kept, as long as the model and this edit exist.

        Args:
            model: A `HookedTransformer` or `TransformerBridge`.

        Raises:
            EditError: As for `applied`.
            ModelStateError: If this edit is already applied to the model.

        Examples:
            >>> delta.apply_(model)
            >>> blt.backward_lens(model, "Lionel Messi plays for").target()
            ' Paris'
            >>> delta.revert_(model)
        """
        if model in self._kept_by_model:
            raise ModelStateError(
                "this edit is already applied to the model; revert_ it first, or apply_ "
                "edit.scale(2) for twice the change"
            )
        kept: list[_Kept] = []
        try:
            for change in self._changes(model):
                kept.append(_Kept(*add_in_place(change)))
            self._kept_by_model[model] = [
                replace(each, seal=checksum(each.parameter)) for each in kept
            ]
        except BaseException:
            for each in reversed(kept):
                put_back(each.parameter, each.before)
            raise

    def revert_(self, model: nn.Module) -> None:
        """Restore every bit of what `apply_` changed.

        Args:
            model: The model.

        Raises:
            ModelStateError: If the edit is not applied to it, or the weights that it changed have
                changed since; then nothing changes.

        Examples:
            >>> before = model.W_out[5].clone()
            >>> delta.apply_(model)
            >>> delta.revert_(model)
            >>> torch.equal(model.W_out[5], before)
            True
        """
        if model not in self._kept_by_model:
            raise ModelStateError("this edit is not applied to the model: there is nothing to undo")
        kept = self._kept_by_model[model]
        if any(each.seal != checksum(each.parameter) for each in kept):
            raise ModelStateError(
                "the weights that this edit changed have changed again since; undo the later "
                "change first (for edits: in the opposite order)"
            )
        for each in reversed(kept):
            put_back(each.parameter, each.before)
        del self._kept_by_model[model]

    @property
    def _kept_by_model(self) -> weakref.WeakKeyDictionary[nn.Module, list[_Kept]]:
        kept: weakref.WeakKeyDictionary[nn.Module, list[_Kept]] = vars(self)["_kept"]
        return kept

    def _changes(self, model: nn.Module) -> Iterator[Change]:
        """What is added to each parameter, computed one at a time, after all checks."""
        host = editable_host(model)
        check_weights(host, self.matrices, self.about)
        sites = [edited_site(host, each) for each in self.matrices]
        for site, each in zip(sites, self.matrices, strict=True):
            yield site.weight.parameter, site.as_stored(each.dense())
            if each.bias is not None and site.bias is not None:
                yield site.bias, each.bias.reshape(site.bias.shape)

    # --- files ---------------------------------------------------------------------------------

    def to_lora(self, folder: str | Path, model: nn.Module, base: Any) -> None:
        """Write the edit as a LoRA adapter, which `transformers` and `peft` can load.

        The Hugging Face layer that holds a matrix is found by comparing weights, whatever the
        architecture calls it, as a whole or as some of its columns. For the matrices that the
        edit changes, this also proves that `base` is the model. Several matrices in one layer,
        such as those of GPT-2's `c_attn`, become one adapter, whose rank is the sum of theirs.
        An adapter's scale is 1. A dense change is written as its exact factors, usually as many as
        it has rows or columns.

        On a model that TransformerLens processed, matrices that write to the residual stream can
        still be found if only their mean over it was subtracted (`center_writing_weights`), to
        which LayerNorm is invariant. The logits of base and adapter are then those of the edited
        model up to the constant that `center_unembed` subtracts.

        Args:
            folder: Where `adapter_config.json` and `adapter_model.safetensors` are written; it is
                created if needed, and files of these names are replaced.
            model: The TransformerLens model that the edit is of, unedited.
            base: The Hugging Face model that the adapter is for, not one that a bridge has wrapped:
                a `PreTrainedModel`, a folder or a name on the hub.

        Raises:
            EditError: If the edit changes nothing, is applied to the model, `base` has no layer
                with a matrix's weights or several, or `peft` is missing.
            ResultFileError: If the folder cannot be written.

        Examples:
            >>> from importlib.resources import files
            >>> base = files("backward_lens_tl") / "facts_model"  # in Hugging Face's format
            >>> delta.to_lora(folder / "paris", model, base)
            >>> sorted(file.name for file in (folder / "paris").iterdir())
            ['adapter_config.json', 'adapter_model.safetensors']
        """
        if model in self._kept_by_model:
            raise EditError(
                "the edit is applied to the model, so its weights are no longer those of the base; "
                "revert_ it first"
            )
        host = editable_host(model)
        parts = [adapted(edited_site(host, each), each) for each in self.matrices]
        # Other norms than LayerNorm see the mean over the residual stream.
        has_layer_norm = str(host.model.cfg.normalization_type).startswith("LN")
        write_adapter(folder, base, parts, may_be_centered=has_layer_norm)

    def __repr__(self) -> str:
        touched = ", ".join(each.name for each in self.matrices)
        method, report = self.about.get("method", "edit"), EditReport.from_about(self.about)
        found = "" if report is None else f"; {report}"
        return f"WeightDelta({method}, {touched or 'nothing'}{found})"


@dataclass(frozen=True)
class _Kept:
    """A parameter that is changed, its values before, and a checksum of its values after."""

    parameter: Tensor
    before: Tensor
    seal: int | None = None
