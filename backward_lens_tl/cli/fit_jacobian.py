"""`backward-lens fit-jacobian`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass

from backward_lens_tl.cli.options import Command


@dataclass(frozen=True, kw_only=True)
class FitJacobianCommand(Command):
    """A Jacobian Lens of a model, fitted on texts.

    Attributes:
        kind: TransformerLens's model class; only a bridge can be fitted on.
        texts: A file with one text per line, facts (sentences of the facts model), or
            Salesforce/wikitext.
        out: The .pt file to write, or to resume from.
        prompts: Number of texts to use.
        max_length: Number of tokens of each text to read.
        skip: Number of positions at the start of each text to leave out.
        seed: Seed for drawing texts.
        dim_batch: Rows of a Jacobian per backward pass; as many as memory holds by default.
        device: Such as cuda; by default as load_model chooses.
        quiet: Show no progress bars.
    """

    texts: str
    out: str
    prompts: int = 100
    max_length: int = 128
    skip: int = 16
    seed: int = 0
    dim_batch: int | None = None
    device: str | None = None
    quiet: bool = False

    def run(self) -> None:
        """Fit the lens, and print what it was fitted on."""
        from backward_lens_tl.jacobians.fitting import fit_jacobian_lens
        from backward_lens_tl.models.loading import load_model, without_progress_bars

        with without_progress_bars() if self.quiet else nullcontext():
            model = load_model(self.model, self.kind, device=self.device)
        lens = fit_jacobian_lens(
            model,
            self.texts,
            self.out,
            prompts=self.prompts,
            max_length=self.max_length,
            skip=self.skip,
            seed=self.seed,
            dim_batch=self.dim_batch,
            progress=not self.quiet,
        )
        corpus, n_short = lens.metadata["corpus"], lens.metadata["n_too_short"]
        sys.stdout.write(
            f"fitted on {lens.n_prompts} of the texts in {corpus} (too short, with fewer than "
            f"{self.skip + 2} tokens: {n_short}): {self.out}\n"
        )
