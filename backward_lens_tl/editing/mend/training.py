"""How MEND's networks learn: through the edited forward pass, from records with their neighbors.

    L = c_edit NLL(target | outer prompt, edited) + c_locality KL(original || edited)

The outer prompt is the request's own or a paraphrase; the divergence is the mean over all positions
of prompts that the edit should leave alone. Both are differentiated through `x @ W + x @ dW`, with
the pairs that `dW` is made of held fixed; the model's parameters are only read.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from backward_lens_tl._checks import check_choice, check_number, is_integer, shown
from backward_lens_tl.capture.continuations import Continuations
from backward_lens_tl.capture.forward_backward import selected_logits
from backward_lens_tl.capture.hooks import requiring_grad
from backward_lens_tl.capture.prompts import PromptBatch, pad_prompts, tokenize_prompts
from backward_lens_tl.data.records import Record
from backward_lens_tl.editing.mend.hypernetwork import MENDCheckpoint, MENDEditor
from backward_lens_tl.editing.requests import EditRequest, TokenizedRequest, tokenize_request
from backward_lens_tl.editing.statistics.activations import adding
from backward_lens_tl.editing.statistics.spanning import SpanningPairs, spanning_pairs
from backward_lens_tl.editing.statistics.standardization import (
    EDITED_LAYERS,
    EDITED_MATRICES,
    pair_statistics,
)
from backward_lens_tl.errors import EditError, raised_as
from backward_lens_tl.files import storage
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.selection import find_editable
from backward_lens_tl.models.sites import MatrixSite


@dataclass(frozen=True)
class MENDTraining:
    """Settings of a training.

    Attributes:
        steps: Updates of the networks.
        edits_per_step: Edits whose mean loss an update lowers.
        lr: Adam's learning rate for the networks. The published 1e-6 is for models of some billion
            parameters and a million edits.
        rate_lr: Adam's learning rate for the learning rates of the edits.
        initial_rate: The learning rate of every matrix at the start.
        edit_weight: `c_edit`.
        locality_weight: `c_locality`.
        n_locality: Prompts per edit that it should leave alone; half of them neighbors, if the
            record has so many.
        n_statistics: Requests that pairs are standardised by, at most.
        clip_norm: The gradient is scaled down to this length if it is longer.
        save_every: Steps after which a training with `out` is saved.

    Examples:
        >>> import backward_lens_tl as blt
        >>> training = blt.editing.MENDTraining(steps=500, edits_per_step=5)
        >>> training.steps, training.lr
        (500, 0.0003)
    """

    steps: int = 200
    edits_per_step: int = 10
    lr: float = 3e-4
    rate_lr: float = 1e-4
    initial_rate: float = 1e-3
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    n_locality: int = 8
    n_statistics: int = 300
    clip_norm: float = 100.0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "edits_per_step", "n_locality", "n_statistics", "save_every"):
            value = getattr(self, name)
            if not is_integer(value) or int(value) < 1:
                raise EditError(f"{name} is {shown(value)}; pass an integer from 1 on")
        for name in ("lr", "rate_lr", "initial_rate", "clip_norm"):
            check_number(name, getattr(self, name), zero=False, error=EditError)
        for name in ("edit_weight", "locality_weight"):
            check_number(name, getattr(self, name), zero=True, error=EditError)


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

    The same arguments give the same editor. With `out`, the training is saved now and then; called
    again with the same arguments, it goes on from there to the same editor, and gives back a
    finished one as it is.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`; its parameters, their gradients and
            torch's random numbers stay as they are.
        records: What to train on, and not what the editor is tested on: requests with their
            paraphrases and neighborhood prompts (`read_records`).
        training: How.
        matrices: Names of matrices of the MLP that are edited, or `"mlp"` for all of them.
        layers: Their layers, negative ones from the end.
        locality: Texts that an edit should leave alone, beside the record's own neighborhood
            prompts; `None` takes those of the other records. A text that holds the subject of an
            edit is not used for it.
        seed: Of the networks' weights, and of what is drawn in each step.
        prepend_bos: Whether prompts get a BOS token; `None` is the model's own default.
        out: A file to save to and to go on from.
        progress: Whether a bar shows how far it is.

    Returns:
        The editor, on the CPU.

    Raises:
        EditError: If there is no record or nothing to be left alone, something is no record, `out`
            holds another training, or a setting is not usable.
        ResultFileError: If `out` holds something else.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> records = blt.read_records("facts").rows[:3]
        >>> training = blt.editing.MENDTraining(steps=2, edits_per_step=1, n_locality=1)
        >>> editor = blt.editing.train_mend(
        ...     model, records, training=training, layers=[-1], progress=False
        ... )
        >>> editor.losses.shape  # [step, 2], of the edits and of what is to stay as it is
        torch.Size([2, 2])
    """
    host = host_of(model)
    check_choice("prepend_bos", prepend_bos, (True, False, None), EditError)
    if not is_integer(seed):
        raise EditError(f"seed is {shown(seed)}; pass an integer")
    sites = find_editable(host, matrices, layers, mlp_only=True)
    data = _Data.of(host, records, locality, prepend_bos)
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
                f"{str(file)!r} holds a training with {name} {held.get(name)!r}, and {value!r} is "
                "asked for; choose another file"
            )
    return found


@dataclass(frozen=True)
class _Example:
    """One record in tokens.

    Attributes:
        request: The request.
        outer: It and its paraphrases, each with the same target.
        subject: What it is about.
        neighbors: Prompts that share the relation.
    """

    request: TokenizedRequest
    outer: tuple[TokenizedRequest, ...]
    subject: str | None
    neighbors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Data:
    """All that is trained on.

    Attributes:
        examples: The records.
        texts: Texts that edits should leave alone.
        tokens: The same in tokens.
        digest: SHA-256 of all of it.
    """

    examples: tuple[_Example, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    digest: str

    @classmethod
    def of(
        cls,
        host: Host,
        records: Iterable[Record],
        locality: Sequence[str] | None,
        prepend_bos: bool | None,
    ) -> _Data:
        """Bring records into tokens."""
        rows = list(records)
        for row in rows:
            if not isinstance(row, Record):
                raise EditError(
                    f"{shown(row)} is a {type(row).__name__}; pass Records, such as the rows of "
                    "read_records that are no BadRecord"
                )
        if not rows:
            raise EditError("there is no record to train on; pass at least one")
        if isinstance(locality, str):
            raise EditError("locality is one text; pass a list of texts")
        texts = locality
        if texts is None:
            texts = [text for row in rows for text in (row.prompt, *row.generation_prompts)]
        texts = list(dict.fromkeys(texts))
        known: dict[str, tuple[int, ...]] = {}

        def tokens(text: str) -> tuple[int, ...]:
            if text not in known:
                [prompt] = tokenize_prompts(host, text, prepend_bos)
                known[text] = prompt.ids[: host.n_ctx]
            return known[text]

        examples = []
        for row in rows:
            request = EditRequest.of(row)
            outer = [request] + [
                EditRequest(prompt, row.target) for prompt in row.paraphrase_prompts
            ]
            inside = [tokenize_request(host, each, prepend_bos) for each in outer]
            neighbors = tuple(tokens(text) for text in row.neighborhood_prompts)
            examples.append(_Example(inside[0], tuple(inside), row.subject, neighbors))
        listing = [
            [[[own.prompt, own.target] for own in each.outer], each.subject, each.neighbors]
            for each in examples
        ]
        digest = hashlib.sha256(json.dumps([listing, texts]).encode()).hexdigest()
        return cls(tuple(examples), tuple(texts), tuple(map(tokens, texts)), digest)

    def draw(self, training: MENDTraining, seed: int, step: int) -> list[_Drawn]:
        """What one step is trained on; the same whatever was drawn before.

        Args:
            training: The settings.
            seed: The seed of the training.
            step: The step, from 0.

        Returns:
            One edit each.
        """
        first, n = step * training.edits_per_step, len(self.examples)
        orders: dict[int, list[int]] = {}
        drawn = []
        for place in range(first, first + training.edits_per_step):
            epoch, at = divmod(place, n)
            if epoch not in orders:
                orders[epoch] = random.Random(f"{seed} {epoch}").sample(range(n), n)
            chance = random.Random(f"{seed} {epoch} {at}")
            drawn.append(self._drawn(self.examples[orders[epoch][at]], training, chance))
        return drawn

    def _drawn(self, example: _Example, training: MENDTraining, chance: random.Random) -> _Drawn:
        half = min(len(example.neighbors), training.n_locality // 2)
        near = chance.sample(example.neighbors, half)
        own = {outer.prompt for outer in example.outer}
        others = [
            ids
            for text, ids in zip(self.texts, self.tokens, strict=True)
            if ids not in own and (example.subject is None or example.subject not in text)
        ]
        others = others or list(example.neighbors)
        if not others:
            raise EditError(
                f"there is nothing that the edit of {example.request.request.prompt!r} should "
                "leave alone; pass records with neighborhood prompts, or locality texts"
            )
        missing = training.n_locality - half
        far = (
            chance.sample(others, missing)
            if len(others) >= missing
            else chance.choices(others, k=missing)
        )
        return _Drawn(example.request, chance.choice(example.outer), tuple(near + far))


@dataclass(frozen=True)
class _Drawn:
    """One edit of a step.

    Attributes:
        request: What the edit is made of.
        outer: What the edited model is to say.
        locality: Prompts that it is to read as before.
    """

    request: TokenizedRequest
    outer: TokenizedRequest
    locality: tuple[tuple[int, ...], ...]


class _Training:
    """A training as far as it has come."""

    def __init__(
        self,
        host: Host,
        sites: Sequence[MatrixSite],
        data: _Data,
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
        """Steps so far."""
        return len(self.losses)

    @property
    def editor(self) -> MENDEditor:
        """The editor as it is."""
        made = self._begun.with_parameters(
            [each.detach().to("cpu", copy=True) for each in self._leaves]
        )
        return replace(made, losses=torch.tensor(self.losses, dtype=torch.float64))

    @property
    def checkpoint(self) -> MENDCheckpoint:
        """All that is needed to go on."""
        states = [self._adam.state[leaf] for leaf in self._leaves]
        return MENDCheckpoint(
            self.editor,
            tuple(state["exp_avg"].cpu() for state in states),
            tuple(state["exp_avg_sq"].cpu() for state in states),
        )

    def step(self) -> None:
        """Lower the mean loss of some edits once."""
        training = self._training
        drawn = self._data.draw(training, int(self._begun.training["seed"]), self.n_done)
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


def edit_losses(
    host: Host, sites: Sequence[MatrixSite], editor: MENDEditor, drawn: Sequence[_Drawn]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What an editor is trained to make small, the mean over some edits.

    All edits' prompts go through the model together, each under its own edit.

    Args:
        host: The model.
        sites: The matrices that are edited.
        editor: The editor; the losses are differentiable in its parameters.
        drawn: The edits, each with as many prompts to leave alone.

    Returns:
        The negative log-likelihood of the outer examples, and the divergence from the unedited
        model on the others, in nats.
    """
    pairs = spanning_pairs(host, [each.request for each in drawn], sites)
    outer = Continuations.of(
        host, [each.outer.prompt for each in drawn], [each.outer.target for each in drawn]
    )
    # In a pass of their own: prompts to leave alone are many, and often shorter.
    others = pad_prompts(host, [row for each in drawn for row in each.locality])
    with torch.no_grad():
        before = _real_logits(host, others).log_softmax(-1)
    with requiring_grad((), among=host.trained()), edited(editor, pairs, sites):
        nll = outer.nll(outer.logits(host)).mean()
        after = _real_logits(host, others).log_softmax(-1)
    return nll, _divergence(before, after, others.mask, len(drawn))


@contextmanager
def edited(
    editor: MENDEditor, pairs: Sequence[SpanningPairs], sites: Sequence[MatrixSite]
) -> Iterator[None]:
    """Edit a model for passes whose prompts belong to several edits, as many to each.

    Args:
        editor: The editor.
        pairs: What spans the gradients of the edits' requests, at each matrix.
        sites: The matrices.

    Yields:
        Nothing; the model is edited inside the context.
    """
    with ExitStack() as hooks:
        for own, site in zip(pairs, sites, strict=True):
            hooks.enter_context(adding(site, partial(_addition, *editor.factors(own))))
        yield


def _addition(
    left: Float[Tensor, "edit pair d_in"],
    right: Float[Tensor, "edit pair d_out"],
    inputs: Float[Tensor, "*rows d_in"],
) -> Float[Tensor, "*rows d_out"]:
    """`x @ dW` with the edit of each prompt."""
    by_edit = inputs.reshape(len(left), -1, inputs.shape[-1]).to(left.dtype)
    added = (by_edit @ left.mT) @ right
    return added.reshape(*inputs.shape[:-1], -1)


def _real_logits(host: Host, batch: PromptBatch) -> Float[Tensor, "n d_vocab"]:
    """The logits at all positions of all prompts, one after the other, without those of padding."""

    def real(values: Tensor) -> Tensor:
        return values[batch.mask.to(values.device)][None]

    return selected_logits(host, batch, real)[0]


def _divergence(
    before: Float[Tensor, "n d_vocab"],
    after: Float[Tensor, "n d_vocab"],
    mask: Bool[Tensor, "row pos"],
    n_edits: int,
) -> Float[Tensor, ""]:
    """`KL(before || after)`, the mean over each edit's positions and then over edits.

    Args:
        before: Log-probabilities of the unedited model at each real position.
        after: Those of the edited one.
        mask: The real positions.
        n_edits: How many edits the rows belong to, as many to each.

    Returns:
        The divergence in nats.
    """
    lengths = mask.reshape(n_edits, -1).sum(1)
    own = (before.exp() * (before - after)).sum(-1).split(lengths.tolist())
    return torch.stack([each.mean() for each in own]).mean()
