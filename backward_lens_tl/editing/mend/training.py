"""Training of MEND's networks on records with paraphrases and neighbors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import is_integer, shown
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.mend.data import TrainingData
from backward_lens_tl.editing.mend.hypernetwork import MENDCheckpoint, MENDEditor
from backward_lens_tl.editing.mend.losses import edit_losses
from backward_lens_tl.editing.mend.settings import MENDTraining
from backward_lens_tl.editing.statistics.pair_collection import (
    EDITED_LAYERS,
    EDITED_MATRICES,
    pair_statistics,
)
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.files import storage
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.matrix_selection import find_editable
from backward_lens_tl.models.sites import MatrixSite

_DEFAULT = MENDTraining()


@raised_as(EditError)
def train_mend(
    model: nn.Module,
    records: Iterable[Record],
    *,
    training: MENDTraining = _DEFAULT,
    matrices: str | Sequence[str] = EDITED_MATRICES,
    layers: int | Sequence[int] = EDITED_LAYERS,
    locality: Sequence[str] | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> MENDEditor:
    """Train MEND's networks for one model.

    The same arguments produce the same editor. With `out`, the training is saved regularly; the
    same call resumes it to the same editor, and returns a finished one from the file.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`; its parameters, their gradients and
            torch's random numbers do not change.
        records: Training records, other than those that the editor is tested on: requests with
            their paraphrases and neighborhood prompts (`read_records`).
        training: The settings.
        matrices: Names of matrices of the MLP that are edited, or `"mlp"` for all of them.
        layers: Their layers, negative ones from the end.
        locality: Texts that an edit should leave unchanged, in addition to the record's own
            neighborhood prompts; prompts of the other records by default. A text with the subject
            of an edit is not used for it.
        seed: Seed of the networks' weights, and of what each step draws.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.
        out: A file to save to and to resume from.
        progress: Whether to show a progress bar.

    Returns:
        The editor, on the CPU.

    Raises:
        EditError: If there is no record or nothing to leave unchanged, something is not a record,
            `out` holds another training run, or a setting is not usable.
        ResultFileError: If `out` holds something else.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> records = blt.read_records("facts").rows[:3]
        >>> training = blt.editing.MENDTraining(steps=2, edits_per_step=1, n_locality=1)
        >>> editor = blt.editing.train_mend(
        ...     model, records, training=training, layers=[-1], progress=False
        ... )
        >>> editor.losses.shape  # [step, 2], of edits and of locality
        torch.Size([2, 2])
    """
    host = host_of(model)
    if not is_integer(seed):
        raise EditError(f"seed is {shown(seed)}; pass an integer")
    sites = find_editable(host, matrices, layers, mlp_only=True)
    data = TrainingData.of(host, records, locality, prepend_bos)
    about = {
        **asdict(training),
        "seed": int(seed),
        "places": [[site.matrix, site.layer] for site in sites],
        "prepend_bos": prepend_bos,
        "records": data.digest,
        "n_records": len(data.examples),
        "model": host.fingerprint(),
    }
    file = None if out is None else Path(out)
    begun = None if file is None or not file.exists() else _resumed(file, about)
    if isinstance(begun, MENDEditor):
        return begun
    if begun is None:
        requests = [example.request.request for example in data.examples[: training.n_statistics]]
        statistics = pair_statistics(
            model,
            requests,
            matrices=matrices,
            layers=layers,
            prepend_bos=prepend_bos,
            progress=False,
        )
        editor = MENDEditor.untrained(statistics, lr=training.initial_rate, seed=int(seed))
        begun = MENDCheckpoint(replace(editor, training=about), (), ())
    work = _Training(host, sites, data, training, begun)
    with tqdm(total=training.steps, unit="step", disable=not progress, initial=work.n_done) as bar:
        while work.n_done < training.steps:
            work.step()
            bar.update()
            edit, kept = work.losses[-1]
            bar.set_postfix({"edit": f"{edit:.3f}", "locality": f"{kept:.3f}"}, refresh=False)
            is_last = work.n_done == training.steps
            if file is not None and not is_last and work.n_done % training.save_every == 0:
                work.checkpoint.save(file)
    finished = work.editor
    if file is not None:
        finished.save(file)
    return finished


def _resumed(file: Path, about: dict[str, Any]) -> MENDCheckpoint | MENDEditor:
    kinds = (MENDEditor, MENDCheckpoint)
    found: MENDEditor | MENDCheckpoint = storage.read(file, kinds, MENDEditor.PARTS)
    editor = found.editor if isinstance(found, MENDCheckpoint) else found
    wanted = json.loads(json.dumps(about))
    held = json.loads(json.dumps(dict(editor.training)))
    for name, value in wanted.items():
        if held.get(name) != value:
            raise EditError(
                f"{str(file)!r} holds a training run with {name} {held.get(name)!r}, not "
                f"{value!r}; choose another file"
            )
    return found


class _Training:
    """A training run in progress."""

    def __init__(
        self,
        host: Host,
        sites: Sequence[MatrixSite],
        data: TrainingData,
        training: MENDTraining,
        begun: MENDCheckpoint,
    ) -> None:
        self._host, self._sites, self._data, self._training = host, sites, data, training
        self._begun = begun.editor
        self.losses = [(float(edit), float(kept)) for edit, kept in begun.editor.losses]
        self._leaves = [
            each.detach().to(host.device, copy=True).requires_grad_()
            for each in begun.editor.parameters
        ]
        self._adam = torch.optim.Adam(
            [
                {"params": self._leaves[:-1], "lr": training.lr},
                {"params": self._leaves[-1:], "lr": training.rate_lr},
            ]
        )
        for leaf, mean, square in zip(self._leaves, begun.means, begun.squares, strict=False):
            self._adam.state[leaf] = {
                "step": torch.tensor(float(self.n_done)),
                "exp_avg": mean.to(leaf.device, copy=True),
                "exp_avg_sq": square.to(leaf.device, copy=True),
            }

    @property
    def n_done(self) -> int:
        """Number of steps so far."""
        return len(self.losses)

    @property
    def editor(self) -> MENDEditor:
        """A copy of the editor as it is now."""
        leaves = [each.detach().to("cpu", copy=True) for each in self._leaves]
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return replace(self._begun.with_parameters(leaves), losses=losses)

    @property
    def checkpoint(self) -> MENDCheckpoint:
        """What is needed to resume."""
        states = [self._adam.state[leaf] for leaf in self._leaves]
        return MENDCheckpoint(
            self.editor,
            tuple(state["exp_avg"].cpu() for state in states),
            tuple(state["exp_avg_sq"].cpu() for state in states),
        )

    def step(self) -> None:
        """Update the networks once."""
        training = self._training
        seed = int(self._begun.training["seed"])
        drawn = self._data.draw(training, seed, self.n_done)
        editor = self._begun.with_parameters(self._leaves)
        with self._host.own_precision(), torch.enable_grad():
            edit, kept = edit_losses(self._host, self._sites, editor, drawn)
            loss = training.edit_weight * edit + training.locality_weight * kept
            gradients = torch.autograd.grad(loss, self._leaves)
        for leaf, gradient in zip(self._leaves, gradients, strict=True):
            leaf.grad = gradient
        nn.utils.clip_grad_norm_(self._leaves, training.clip_norm)
        self._adam.step()
        self._adam.zero_grad()
        self.losses.append((float(edit.detach()), float(kept.detach())))
