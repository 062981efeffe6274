"""Attempts at edits that also change paraphrases, for the table in docs/editing.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from backward_lens_tl.editing import WeightDelta
from backward_lens_tl.editing.matrix_delta import MatrixDelta
from backward_lens_tl.editing.methods.method import UNRECORDED, EditMethod
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.editing.requests import TokenizedRequest, tokenize_requests
from backward_lens_tl.editing.statistics.provenance import last_inputs
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import find_editable
from benchmarks.editing_subjects import Methods

_BEFORE = (
    "As everybody knows, ",
    "I have read that ",
    "In the news today: ",
    "It is true. ",
    '"Yes", she said. ',
)
"""Beginnings of texts in which the prompt comes later."""


@dataclass(frozen=True, kw_only=True)
class InTexts(EditMethod):
    """A shift of the prompt alone and of the prompt later in other texts, together.

    Attributes:
        shift: The shift.
    """

    shift: ForwardPassShift

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """Compute the edit of all of these prompts."""
        longer = [
            replace(each.request, prompt=before + each.request.prompt, subject_start=None)
            for each in requests
            for before in _BEFORE
        ]
        others = tokenize_requests(host, longer, self.prepend_bos)
        return self.shift.compute(host, [*requests, *others])


@dataclass(frozen=True, kw_only=True)
class Remembered(EditMethod):
    """A method whose edit of a fact is computed once for all attempts that need it.

    Attributes:
        method: The method.
        found: Its edits.
    """

    method: EditMethod
    found: dict[tuple[TokenizedRequest, ...], Sequence[MatrixDelta]] = field(
        default_factory=dict, metadata=UNRECORDED
    )

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """Compute the edit, or return it again."""
        key = tuple(requests)
        if key not in self.found:
            self.found[key] = self.method.compute(host, requests)
        return self.found[key]


@dataclass(frozen=True, kw_only=True)
class ValueInKey(EditMethod):
    """What another method writes at the subject's last token, where a key of the shift responds.

    Attributes:
        method: The other method, for one fact and one `W_out`.
        key: The shift's key.
    """

    method: EditMethod
    key: Literal["plain", "contrast"]

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """Compute the edit."""
        [request] = requests
        [other] = self.method.compute(host, requests)
        sites = find_editable(host, "W_out", [other.layer])
        [inputs] = last_inputs(host, sites, request.prompt[: request.needed_subject + 1])
        written = inputs.to(other.dense()) @ other.dense()
        shift = ForwardPassShift(
            layer=other.layer,
            size=1.0,
            key=self.key,
            fact_token="subject_last",
            target_tokens="first",
            prepend_bos=self.prepend_bos,
        )
        [own] = shift.compute(host, requests)
        return [replace(own, right=written[None])]


@dataclass(frozen=True, kw_only=True)
class HalfBefore(EditMethod):
    """Half of a method's edit, and then a shift of what is missing.

    Attributes:
        method: The method.
        shift: The shift, in another layer.
    """

    method: EditMethod
    shift: ForwardPassShift

    def compute(self, host: Host, requests: Sequence[TokenizedRequest]) -> Sequence[MatrixDelta]:
        """Compute both edits."""
        half = WeightDelta(tuple(self.method.compute(host, requests)), {}).scale(0.5)
        with half.applied(host.model):
            return [*half.matrices, *self.shift.compute(host, requests)]


def _layer(methods: Methods, depth: float) -> int:
    return round(depth * host_of(methods.model).n_layers)


def _at_the_subject(methods: Methods) -> ForwardPassShift:
    return methods.lens(fact_token="subject_last", layer=_layer(methods, 0.5), prepend_bos=False)


@cache
def _rome(methods: Methods) -> EditMethod:
    return Remembered(method=methods.preset("rome"), prepend_bos=False)


ATTEMPTS: Mapping[str, Callable[[Methods], EditMethod]] = {
    "shift with a lens": Methods.lens,
    "in five texts": lambda methods: InTexts(shift=methods.lens(prepend_bos=False)),
    "phrasings": lambda methods: methods.lens(phrasings="generic"),
    "phrasings, 1.5 times the least size": lambda methods: methods.lens(
        phrasings="generic", margin=1.5
    ),
    "phrasings, at two thirds of the layers": lambda methods: methods.lens(
        phrasings="generic", layer=_layer(methods, 2 / 3)
    ),
    "phrasings, embedding as the value": lambda _: ForwardPassShift(phrasings="generic"),
    "at the subject's last token, in the middle layer": _at_the_subject,
    "half of that, then the shift": lambda methods: HalfBefore(
        method=_at_the_subject(methods), shift=methods.lens(prepend_bos=False)
    ),
    "`rome`": _rome,
    "`rome`'s value, contrast key": lambda methods: ValueInKey(
        method=_rome(methods), key="contrast"
    ),
    "`rome`'s value, plain key": lambda methods: ValueInKey(method=_rome(methods), key="plain"),
    "half of `rome`, then the shift": lambda methods: HalfBefore(
        method=_rome(methods), shift=methods.lens(prepend_bos=False)
    ),
    "`memit`": Methods.memit,
}
"""What was tried, by the name in the table."""
