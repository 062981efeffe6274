"""`backward-lens adapter`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backward_lens_tl.choices import Lens
from backward_lens_tl.cli.options import Command

if TYPE_CHECKING:
    from backward_lens_tl.editing.weight_delta import WeightDelta


@dataclass(frozen=True, kw_only=True)
class ChangeCommand(Command):
    """Options of commands that show a change of weights.

    Attributes:
        model: The model whose vocabulary reads the change, as for other commands; by default the
            base of the change.
        html: A file to write the table to as a page.
        save: A .safetensors file to write the change to; WeightDelta.load reads it.
        projection: How vectors are read.
        most: Number of singular vectors to show of each matrix.
        k: Tokens to show at either end.
    """

    model: str = ""
    html: str | None = None
    save: str | None = None
    projection: Lens = "normalized"
    most: int = 2
    k: int = 6

    def run(self) -> None:
        """Print the main directions of the change, and write what was asked for."""
        from backward_lens_tl._checks import checked_count
        from backward_lens_tl.files.storage import check_place

        # First: a change of a large model takes minutes.
        checked_count("most", self.most)
        checked_count("k", self.k)
        for file in (self.html, self.save):
            if file is not None:
                check_place(file)
        self._show(self.change())

    def change(self) -> WeightDelta:
        """Read the change."""
        raise NotImplementedError

    def _show(self, delta: WeightDelta) -> None:
        from rich.console import Console

        from backward_lens_tl.cli.show import quiet
        from backward_lens_tl.editing.tokens import delta_tokens
        from backward_lens_tl.files.storage import write_text
        from backward_lens_tl.models.loading import load_model
        from backward_lens_tl.views.weight_changes import (
            summary,
            title,
            weight_change_page,
            weight_change_table,
        )

        with quiet():
            table = delta_tokens(
                load_model(self.model or str(delta.about["base"]), self.kind),
                delta,
                self.k,
                self.projection,
                components="singular",
                most=self.most,
            )
        if self.html is not None:
            write_text(self.html, weight_change_page(table, delta))
        if self.save is not None:
            delta.save(self.save)
        console = Console()
        for text in (title(delta), *summary(delta)):
            console.print(text, markup=False, highlight=False)
        console.print(weight_change_table(table, delta))
        for kind, file in (("page", self.html), ("change", self.save)):
            if file is not None:
                console.print(f"{kind}: {file}", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class AdapterCommand(ChangeCommand):
    """The tokens that a LoRA adapter writes, layer by layer.

    Attributes:
        folder: The folder of the adapter, in PEFT's format.
        partial: Leave out what is not a matrix of attention or the MLP.
    """

    POSITIONAL = ("folder",)

    folder: str
    partial: bool = False

    def change(self) -> WeightDelta:
        """Read the adapter."""
        from backward_lens_tl.editing.weight_delta import WeightDelta
        from backward_lens_tl.errors import InputError

        delta = WeightDelta.from_lora(self.folder, partial=self.partial)
        if not self.model and not delta.about["base"]:
            raise InputError("the adapter does not name its base; pass it as --model")
        return delta
