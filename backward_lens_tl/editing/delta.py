"""What an edit adds to weight matrices, as an object: low-rank factors, or dense where it must be.

In TransformerLens's orientation, `y = x @ W + b`, an edit is `W <- W + left @ right`. Heads of
attention lie side by side in the side of a matrix that they divide.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from backward_lens_tl._checks import plain, shown
from backward_lens_tl.capture.matrix_gradient import MatrixGradient, numerical_rank
from backward_lens_tl.editing.lora import Adapted, write_adapter
from backward_lens_tl.errors import EditError, ModelStateError, raised_as
from backward_lens_tl.files.storage import Saved
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.checksums import checksum
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.selection import find_editable
from backward_lens_tl.models.sites import MATRIX_NAMES, READING_MATRICES, MatrixName, MatrixSite
from backward_lens_tl.models.weight_patching import (
    Change,
    add_in_place,
    changed,
    put_back,
)


@dataclass(frozen=True, repr=False, eq=False)
class MatrixDelta:
    """What is added to one weight matrix, and to its bias.

    Either both factors are there or `values`.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        left: What the edit listens to, one column per outer product.
        right: What it writes, one row per outer product.
        values: The change as a matrix, of methods that make it so.
        bias: What is added to the matrix's bias, if anything is.

    Examples:
        >>> import torch
        >>> import backward_lens_tl as blt
        >>> left, right = torch.ones(512, 2), torch.ones(2, 128)
        >>> change = blt.editing.MatrixDelta("W_out", 5, left, right)
        >>> change.shape, change.rank()  # both outer products are the same
        ((512, 128), 1)
    """

    matrix: MatrixName
    layer: int
    left: Float[Tensor, "d_in rank"] | None = None
    right: Float[Tensor, "rank d_out"] | None = None
    values: Float[Tensor, "d_in d_out"] | None = None
    bias: Float[Tensor, "d_out"] | None = None

    def __post_init__(self) -> None:
        factors = [each is not None for each in (self.left, self.right)]
        if factors != [self.values is None] * 2:
            raise EditError(f"the delta of {self._name} needs both factors, or values instead")
        if self.layer < 0:
            raise EditError(f"the delta of {self._name} needs its layer counted from 0")
        parts = [each for each in (self.left, self.right, self.values) if each is not None]
        if any(each.ndim != 2 or not each.is_floating_point() for each in parts):
            shapes = ", ".join(f"{tuple(each.shape)} of {each.dtype}" for each in parts)
            raise EditError(f"the delta of {self._name} must be real matrices; it is {shapes}")
        if len(parts) == 2 and len(parts[1]) != parts[0].shape[1]:
            raise EditError(
                f"the factors of {self._name} have {parts[0].shape[1]} columns and "
                f"{len(parts[1])} rows; one row belongs to each column"
            )
        if self.bias is not None and self.bias.shape != (self.shape[1],):
            raise EditError(
                f"the delta of {self._name} has a bias of shape {tuple(self.bias.shape)}; it must "
                f"be ({self.shape[1]},)"
            )

    @property
    def _name(self) -> str:
        return f"{self.matrix} of layer {self.layer}"

    @property
    def is_low_rank(self) -> bool:
        """Whether it is held as factors."""
        return self.values is None

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`, heads side by side."""
        first, last = (self.left, self.right) if self.values is None else (self.values, self.values)
        return len(_there(first)), _there(last).shape[1]

    @cached_property
    def factors(self) -> tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank d_out"]]:
        """Two factors whose product the change is.

        Of a change that is held as a matrix they are `u` and `s * vh` of its singular value
        decomposition, of as many singular values as its dtype (at least float32) can tell from
        none: the product differs from the matrix by rounding alone.
        """
        if self.values is None:
            return _there(self.left), _there(self.right)
        wide = at_least_float32(self.values)
        u, s, vh = _svd(wide.double())
        # The length of all that is left out, from each place on.
        tail = s.flip(0).square().cumsum(0).sqrt().flip(0)
        n = int((tail > torch.finfo(wide.dtype).eps * s.norm()).sum())
        return u[:, :n].to(wide.dtype), (s[:, None] * vh)[:n].to(wide.dtype)

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The change as a matrix; makes `d_in * d_out` numbers of factors.

        Returns:
            The matrix.

        Examples:
            >>> delta["W_out", 5].dense().shape  # [d_in, d_out]
            torch.Size([512, 128])
        """
        if self.values is not None:
            return self.values
        left, right = self.factors
        with torch.autocast(left.device.type, enabled=False):
            return left @ right

    @property
    def rounding(self) -> float:
        """Singular values up to this part of the largest one count as zero in `rank`.

        It is that of gradients: `eps` of the dtype, or of float32 for half precision, times the
        number of outer products, or the larger side of a change that is held as a matrix.
        """
        if self.values is None:
            left = _there(self.left)
            return left.shape[1] * _eps(left)
        return max(self.shape) * _eps(self.values)

    def svd(
        self,
    ) -> tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank"], Float[Tensor, "rank d_out"]]:
        """The singular value decomposition, in float64, without making a matrix of factors.

        Each pair of singular vectors is so signed that the entry of the left one that is largest
        in size is positive: it says what is written where that number is read.

        Returns:
            `u`, `s`, `vh` with `u @ diag(s) @ vh` the change: the singular values that are more
            than rounding, largest first.

        Examples:
            >>> u, s, vh = delta["W_out", 5].svd()
            >>> u.shape, s.shape, vh.shape
            (torch.Size([512, 1]), torch.Size([1]), torch.Size([1, 128]))
            >>> torch.allclose(u * s @ vh, delta["W_out", 5].dense().double(), atol=1e-5)
            True
        """
        if self.values is not None:
            u, s, vh = _svd(self.values.double())
        else:
            left, right = (each.double() for each in self.factors)
            (q_in, r_in), (q_out, r_out) = torch.linalg.qr(left), torch.linalg.qr(right.T)
            u, s, vh = _svd(r_in @ r_out.T)
            u, vh = q_in @ u, vh @ q_out.T
        n = numerical_rank(s, self.rounding)
        u, s, vh = u[:, :n], s[:n], vh[:n]
        largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0] if n else s
        sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
        return u * sign, s, vh * sign[:, None]

    def singular_values(self) -> Float[Tensor, "rank_bound"]:
        """Singular values of the change, largest first, in float64.

        Returns:
            The values; of factors as many as there are outer products, at most.

        Examples:
            >>> len(delta["W_out", 5].singular_values())
            1
        """
        values: Tensor = torch.linalg.svdvals(self._core())
        return values

    def rank(self) -> int:
        """Number of singular values that are more than rounding.

        Returns:
            The number.

        Examples:
            >>> delta["W_out", 5].rank()
            1
        """
        return numerical_rank(self.singular_values(), self.rounding)

    @property
    def norm(self) -> float:
        """Frobenius norm of the change, the bias's apart."""
        return float(torch.linalg.norm(self._core()))

    def _core(self) -> Float[Tensor, "rows columns"]:
        """A matrix of the change's own singular values, in float64; of factors a small one."""
        if self.values is not None:
            return self.values.double()
        left, right = (each.double() for each in self.factors)
        r_in, r_out = (torch.linalg.qr(each, mode="r").R for each in (left, right.T))
        core: Tensor = r_in @ r_out.T
        return core

    def scale(self, factor: int | float) -> MatrixDelta:
        """The change times a number.

        Args:
            factor: The number.

        Returns:
            The scaled change.

        Raises:
            EditError: If it is no finite number.

        Examples:
            >>> change = delta["W_out", 5]
            >>> round(change.scale(0.5).norm / change.norm, 3)
            0.5
        """
        number = _checked_factor(factor)
        return replace(
            self,
            right=None if self.right is None else self.right * number,
            values=None if self.values is None else self.values * number,
            bias=None if self.bias is None else self.bias * number,
        )

    def __add__(self, other: object) -> MatrixDelta:
        if not isinstance(other, MatrixDelta):
            return NotImplemented
        if (self.matrix, self.layer, self.shape) != (other.matrix, other.layer, other.shape):
            raise EditError(f"{self!r} and {other!r} are not of one matrix")
        biases = [each.bias for each in (self, other) if each.bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        if self.is_low_rank and other.is_low_rank:
            (left, right), (more_left, more_right) = self.factors, other.factors
            both = torch.cat((left, more_left), dim=1), torch.cat((right, more_right))
            return replace(self, left=both[0], right=both[1], bias=bias)
        return replace(self, left=None, right=None, values=self.dense() + other.dense(), bias=bias)

    def gradient(self) -> MatrixGradient:
        """The gradient of which one step of gradient descent, at learning rate 1, is this change.

        Its positions are the outer products, its `inputs` are what they listen to, its `vjps` are
        `-right`. So it has all that gradients have: `spanning_set`, `norms`, `neuron_norms`,
        `singular_values`, ... For the words of an edit there is `delta_tokens`.

        Returns:
            The gradient of a batch of one.

        Examples:
            >>> delta["W_out", 5].gradient()
            MatrixGradient(W_out of layer 5, x [1, 1, 512], delta [1, 1, 128])
        """
        left, right = self.factors
        inputs, vjps = left.T[None], -right[None]
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        return MatrixGradient(self.matrix, self.layer, inputs.contiguous(), vjps, mask)

    def __repr__(self) -> str:
        kind = "dense" if self.left is None else f"rank <= {self.left.shape[1]}"
        bias = "" if self.bias is None else ", with bias"
        d_in, d_out = self.shape
        return f"MatrixDelta({self._name}, [{d_in}, {d_out}], {kind}{bias})"


def _there(tensor: Tensor | None) -> Tensor:
    """A part of a delta that its constructor has made sure of."""
    if tensor is None:
        raise EditError("a delta needs both factors, or values instead")
    return tensor


def _svd(matrix: Float[Tensor, "m n"]) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def _checked_factor(factor: object) -> float:
    """A number that an edit can be multiplied by."""
    number = plain(factor)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number):
        raise EditError(f"an edit is scaled by a finite number, and not by {shown(factor)}")
    return float(number)


@dataclass(frozen=True, repr=False, eq=False)
class WeightDelta(Saved):
    """An edit: what is added to each weight matrix that it touches.

    It belongs to no model and never changes one by itself: `applied` changes a model for a while,
    `apply_` until `revert_`; both put back every bit.

    Attributes:
        matrices: What is added to each matrix, in the order of a forward pass; each matrix once.
        about: What made it: settings of the method, name of the model.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> delta = blt.editing.ForwardPassShift(layer=6, size=20.0, form="scale_free")(
        ...     model, request
        ... )
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
        keys = [(each.matrix, each.layer) for each in self.matrices]
        if len(set(keys)) < len(keys):
            raise EditError("a matrix occurs twice in one edit; add its changes up with +")
        # Not a field: what is kept of models that are changed now is no part of the edit.
        kept: weakref.WeakKeyDictionary[nn.Module, list[_Kept]] = weakref.WeakKeyDictionary()
        object.__setattr__(self, "_kept", kept)

    def __reduce__(self) -> tuple[type[WeightDelta], tuple[object, ...]]:
        # A copy is another edit, which is applied to no model.
        return WeightDelta, (self.matrices, self.about)

    def __getitem__(self, key: tuple[str, int]) -> MatrixDelta:
        for each in self.matrices:
            if (each.matrix, each.layer) == key:
                return each
        there = ", ".join(f"({each.matrix!r}, {each.layer})" for each in self.matrices)
        raise EditError(f"this edit does not change {key!r}; it changes {there or 'nothing'}")

    def __iter__(self) -> Iterator[MatrixDelta]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    # --- arithmetic ----------------------------------------------------------------------------

    @property
    def norm(self) -> float:
        """Frobenius norm over all matrices, biases apart."""
        return math.hypot(*(each.norm for each in self.matrices))

    @property
    def rank(self) -> int:
        """Sum of the matrices' ranks: outer products that it needs at least."""
        return sum(each.rank() for each in self.matrices)

    def scale(self, factor: int | float) -> WeightDelta:
        """The edit times a number.

        Args:
            factor: The number; -1 is the opposite edit.

        Returns:
            The scaled edit.

        Raises:
            EditError: If it is no finite number.

        Examples:
            >>> opposite = delta.scale(-1)
            >>> round(opposite.norm / delta.norm, 3), (delta + opposite).norm < 1e-6 * delta.norm
            (1.0, True)
        """
        number = _checked_factor(factor)
        scaled = tuple(each.scale(number) for each in self.matrices)
        in_all = number * float(self.about.get("scaled_by", 1))
        return WeightDelta(scaled, {**self.about, "scaled_by": in_all})

    def __add__(self, other: object) -> WeightDelta:
        if not isinstance(other, WeightDelta):
            return NotImplemented
        found = {(each.matrix, each.layer): each for each in self.matrices}
        for each in other.matrices:
            key = (each.matrix, each.layer)
            found[key] = found[key] + each if key in found else each
        ordered = sorted(
            found.values(), key=lambda each: (each.layer, MATRIX_NAMES.index(each.matrix))
        )
        return WeightDelta(tuple(ordered), {"sum_of": (self.about, other.about)})

    # --- on a model ----------------------------------------------------------------------------

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Change a model inside of a context, and put back every bit afterwards, whatever happens.

        Contexts may be nested, also of one and the same edit.

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
            ModelStateError: If this edit is applied to the model already.

        Examples:
            >>> delta.apply_(model)
            >>> blt.backward_lens(model, "Lionel Messi plays for").target()
            ' Paris'
            >>> delta.revert_(model)
        """
        if model in self._kept_by_model:
            raise ModelStateError(
                "this edit is applied to the model already; revert_ it first, or apply_ "
                "edit.scale(2) to have it twice"
            )
        kept: list[_Kept] = []
        try:
            for change in self._changes(model):
                kept.append(_Kept(*add_in_place(change)))
            self._kept_by_model[model] = [each.sealed() for each in kept]
        except BaseException:
            for each in reversed(kept):
                each.put_back()
            raise

    def revert_(self, model: nn.Module) -> None:
        """Put back every bit of what `apply_` changed.

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
        if not all(each.is_untouched for each in kept):
            raise ModelStateError(
                "the weights that this edit changed have changed again since; undo the later "
                "change first (for edits: in the opposite order)"
            )
        for each in reversed(kept):
            each.put_back()
        del self._kept_by_model[model]

    @property
    def _kept_by_model(self) -> weakref.WeakKeyDictionary[nn.Module, list[_Kept]]:
        kept: weakref.WeakKeyDictionary[nn.Module, list[_Kept]] = vars(self)["_kept"]
        return kept

    def _changes(self, model: nn.Module) -> Iterator[Change]:
        """What is added to each parameter, made one after the other; all is checked first."""
        host = _editable(model)
        sites = [edited_site(host, each) for each in self.matrices]
        for site, each in zip(sites, self.matrices, strict=True):
            yield site.weight.parameter, site.weight.as_stored(by_head(site, each.dense()))
            if each.bias is not None and site.bias is not None:
                yield site.bias, each.bias.reshape(site.bias.shape)

    # --- files ---------------------------------------------------------------------------------

    def to_lora(self, folder: str | Path, model: nn.Module, base: Any) -> None:
        """Write the edit as a LoRA adapter, which `transformers` and `peft` load without us.

        The Hugging Face layer that holds a matrix is found by comparing weights, whatever the
        architecture calls it, as a whole or as some of its columns: this also proves, for the
        matrices that the edit changes, that `base` is the model. Several matrices in one layer,
        such as those of GPT-2's `c_attn`, become one adapter, whose rank is the sum of theirs.
        An adapter's scale is 1. A change that is held as a matrix is written as its exact factors,
        which as a rule are as many as it has rows or columns.

        On a model that TransformerLens processed, matrices that write to the residual stream can
        still be found where only their mean over it was taken off (`center_writing_weights`),
        which a LayerNorm does not see. The logits of base and adapter then are those of the edited
        model but for the constant that `center_unembed` takes off.

        Args:
            folder: Where `adapter_config.json` and `adapter_model.safetensors` are written; it is
                made if it is not there, and files of these names are replaced.
            model: The TransformerLens model that the edit is of, unedited.
            base: The Hugging Face model that the adapter is for, not one that a bridge has wrapped:
                a `PreTrainedModel`, a folder or a name on the hub.

        Raises:
            EditError: If the edit changes nothing, is applied to the model just now, `base` has no
                layer with a matrix's weights or several, or `peft` is missing.
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
        host = _editable(model)
        adapted = [_adapted(edited_site(host, each), each) for each in self.matrices]
        # Behind another norm than LayerNorm the mean over the residual stream counts.
        has_layer_norm = str(host.model.cfg.normalization_type).startswith("LN")
        write_adapter(folder, base, adapted, may_be_centered=has_layer_norm)

    def __repr__(self) -> str:
        touched = ", ".join(f"{each.matrix} of layer {each.layer}" for each in self.matrices)
        method = self.about.get("method", "edit")
        return f"WeightDelta({method}, {touched or 'nothing'})"


@dataclass(frozen=True)
class _Kept:
    """A parameter that is changed, and how it was.

    Attributes:
        parameter: The parameter.
        before: Its values before.
        seal: A checksum of its values after all changes.
    """

    parameter: Tensor
    before: Tensor
    seal: int | None = None

    def sealed(self) -> _Kept:
        """The same, with the checksum of its values now."""
        return replace(self, seal=checksum(self.parameter))

    @property
    def is_untouched(self) -> bool:
        """Whether nothing has changed it since."""
        return self.seal == checksum(self.parameter)

    def put_back(self) -> None:
        """Give it its values of before."""
        put_back(self.parameter, self.before)


def _editable(model: nn.Module) -> Host:
    """A model that is edited, also inside of a caller's inference mode: that takes no gradient."""
    with torch.inference_mode(mode=False):
        return host_of(model)


def _adapted(site: MatrixSite, delta: MatrixDelta) -> Adapted:
    """What an adapter needs to know of a matrix."""
    left, right = delta.factors
    if left.shape[1] > min(delta.shape):  # more outer products than any matrix needs
        left, right = replace(delta, left=None, right=None, values=delta.dense()).factors
    weight = site.weight.in_out(site.weight.parameter.detach())
    is_reading = site.matrix in READING_MATRICES
    return Adapted(
        name=f"{site.matrix} of layer {site.layer}",
        weight=side_by_side(site, weight),
        left=left,
        right=right,
        bias=delta.bias,
        n_parts=len(weight) if is_reading and weight.ndim == 3 else 1,
        writes=not is_reading,
    )


def edited_site(host: Host, delta: MatrixDelta) -> MatrixSite:
    """Where a model has the matrix that a delta changes.

    Args:
        host: The model.
        delta: The delta.

    Returns:
        The matrix.

    Raises:
        EditError: If it has none, of another size, or no bias where one is changed.
        UnsupportedModelError: If it cannot be changed.
    """
    with raised_as(EditError):
        [site] = find_editable(host, delta.matrix, delta.layer)
    shape = tuple(side_by_side(site, site.weight.in_out(site.weight.parameter.detach())).shape)
    if shape != delta.shape:
        raise EditError(
            f"the edit changes {delta.matrix} of layer {delta.layer} with shape {delta.shape}; "
            f"in {host.name!r} it has shape {shape}: the edit is of another model"
        )
    if delta.bias is not None and (site.bias is None or site.bias.numel() != delta.bias.numel()):
        raise EditError(
            f"the edit changes the bias of {delta.matrix} in layer {delta.layer}, and "
            f"{host.name!r} has none of that size there"
        )
    return site


def side_by_side(
    site: MatrixSite, weight: Float[Tensor, "*head d_in d_out"]
) -> Float[Tensor, "in_side out_side"]:
    """A matrix with its heads side by side in the side that they divide.

    Args:
        site: Where it is.
        weight: It, or something laid out like it.

    Returns:
        The same as one matrix.
    """
    if weight.ndim == 2:
        return weight
    return rearrange(weight, f"head d_in d_out -> {_divided(site)}")


def by_head(
    site: MatrixSite, matrix: Float[Tensor, "in_side out_side"]
) -> Float[Tensor, "*head d_in d_out"]:
    """What `side_by_side` made one matrix of, as TransformerLens lays it out.

    Args:
        site: Where it is.
        matrix: The matrix.

    Returns:
        The same, with an axis for heads where the site has one.
    """
    shape = site.weight.in_out(site.weight.parameter.detach()).shape
    if len(shape) == 2:
        return matrix
    return rearrange(matrix, f"{_divided(site)} -> head d_in d_out", head=shape[0])


def _divided(site: MatrixSite) -> str:
    is_reading = site.matrix in READING_MATRICES
    return "d_in (head d_out)" if is_reading else "(head d_in) d_out"


def total(deltas: Iterable[WeightDelta], about: Mapping[str, Any]) -> WeightDelta:
    """The sum of edits.

    Args:
        deltas: The edits; none is an edit that changes nothing.
        about: What the sum is.

    Returns:
        The sum.
    """
    added = WeightDelta((), about)
    for delta in deltas:
        added = added + delta
    return WeightDelta(added.matrices, about)


def _eps(tensor: Tensor) -> float:
    # The eps of half precision times a width is more than 1: nothing would count.
    return float(torch.finfo(at_least_float32(tensor[:0]).dtype).eps)
