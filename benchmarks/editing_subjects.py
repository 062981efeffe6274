"""The models that the benchmark of docs/editing.md edits, and the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from backward_lens_tl.data.texts import read_lines
from backward_lens_tl.editing.methods.memit import MEMIT
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.presets import preset_methods
from backward_lens_tl.editing.methods.shift import ForwardPassShift
from backward_lens_tl.models import host_of

SHARED = Path(__file__).parents[2] / "shared" / "data"
COUNTERFACT = SHARED / "counterfact" / "counterfact_flat_1919.json"
WIKITEXT = SHARED / "wikitext2" / "wiki.test.raw"

_PERPLEXITY_LINES = 100
"""Lines that perplexity's texts come from."""


@dataclass(frozen=True)
class Subject:
    """A model that is edited, and its data.

    Attributes:
        model: Its name in `load_model`.
        data: The data.
        texts: The texts of perplexity, and of second moments; `None` for its own.
        shuffle: The seed of the split.
        first: The first row, in shuffled order, that no choice was made on.
        spare: The first of the rows, in the same order, that neither choices nor other tables use.
        jacobian: Its lens.
    """

    model: str
    data: str
    texts: str | None
    shuffle: str | None
    first: int
    spare: int
    jacobian: str | None

    def statistics(self) -> list[str] | None:
        """Texts of second moments, other than those that perplexity is measured on."""
        return None if self.texts is None else read_lines(self.texts)[_PERPLEXITY_LINES:]


SUBJECTS: Mapping[str, Subject] = {
    # The first 300 rows in this order are for choices; see benchmarks/tuning.py.
    "SmolLM2": Subject(
        "smollm2", str(COUNTERFACT), str(WIKITEXT), "F counterfact split 1", 300, 140, None
    ),
    "facts": Subject("facts", "facts", None, None, 0, 250, "facts"),
}


@dataclass(frozen=True)
class Methods:
    """Creates the methods of the benchmark.

    Attributes:
        model: The model.
        subject: The same with its data.
        folder: For what presets learn.
    """

    model: Any
    subject: Subject
    folder: Path

    def lens(self, **settings: Any) -> ForwardPassShift:
        """The shift with its defaults and a Jacobian Lens."""
        return ForwardPassShift(jacobian=self.subject.jacobian, **settings)

    def paper(self, **settings: Any) -> ForwardPassShift:
        """The paper's key and value, with a size that is searched for."""
        return ForwardPassShift(key="paper", value="embedding", **settings)

    def published(self) -> ForwardPassShift:
        """The paper's own setting for GPT-2 xl, in the layer at the same depth."""
        return ForwardPassShift.paper(round(35 / 48 * host_of(self.model).n_layers), 0.24)

    def preset(self, name: str) -> EditMethod:
        """A preset of the model."""
        texts = self.subject.statistics()
        return preset_methods(self.model, name, folder=self.folder, texts=texts)[name]

    def memit(self) -> MEMIT:
        """MEMIT's preset; a value that was found for one fact also serves edits of several."""
        method = cast(MEMIT, self.preset("memit"))
        return replace(method, value_folder=self.folder / "memit-values")
