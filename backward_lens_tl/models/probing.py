"""Probe a model with a few tokens: is it causal, and does the Logit Lens read it correctly?"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from backward_lens_tl.errors import UnsupportedModelError
from backward_lens_tl.models.hooks import hooked
from backward_lens_tl.models.host import Host

_N_TOKENS = 6
_CANDIDATES = 64

_ROUNDINGS = 4
"""Differences of up to this many `eps` of a number count as rounding."""

_ROWS = 16

_TO_NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4}
_HALF_PRECISION_TOLERANCE = 0.3
_PLAIN_TOLERANCE = 1e-3
"""TransformerLens computes some operations in another order, or in float32."""


@dataclass(frozen=True)
class Probe:
    """Errors of a model on a few tokens, in units of the spread of the logits.

    Attributes:
        causality_error: Largest change of the logits before the last token when the last token
            changes.
        forward_error: Largest difference between the analysed logits and those of a plain call of
            the model.
        vjp_error: Relative difference between the VJPs of both at the last residual stream.
        readout_error: Largest difference between the logits and the Logit Lens of the last
            residual stream.
        tolerance: The largest error that can be rounding in the model's dtype.
    """

    causality_error: float
    forward_error: float
    vjp_error: float
    readout_error: float
    tolerance: float

    def check_forward(self, host: Host) -> None:
        """Refuse a model whose factors would not be its gradients.

        Args:
            host: The model.

        Raises:
            UnsupportedModelError: If tokens attend to later ones, or the analysed forward pass
                differs from that of a plain call.
        """
        if not self.causality_error <= self.tolerance:  # NaN fails
            raise UnsupportedModelError(
                f"{host.name!r} is not causal as it is loaded: another last token changes the "
                f"logits before it by {self.causality_error:.1g} times their spread, so losses and "
                f"gradients would be wrong.{host.causality_advice}"
            )
        if not max(self.forward_error, self.vjp_error) <= self.tolerance:
            raise UnsupportedModelError(
                f"the forward pass that would be analysed is not the one that {host.name!r} makes "
                f"when it is called: logits differ by {self.forward_error:.1g} times their spread, "
                f"and gradients by {self.vjp_error:.1g} of their size"
            )

    def check_readout(self, host: Host) -> None:
        """Refuse the Logit Lens if it does not read the model's own last residual stream.

        Args:
            host: The model.

        Raises:
            UnsupportedModelError: If the logits are not the final norm and the unembedding of the
                last residual stream.
        """
        if not self.readout_error <= self.tolerance:
            raise UnsupportedModelError(
                f"{host.name!r} does not read its last residual stream with its final norm and "
                f"unembedding alone: these give logits that differ from its own by "
                f"{self.readout_error:.1g} times their spread, so the Logit Lens would show wrong "
                "tokens. capture_gradients gives the factors, and projection=... takes an object "
                "of your own that reads them as the model does"
            )


def logit_error(found: Float[Tensor, "*n d_vocab"], expected: Float[Tensor, "*n d_vocab"]) -> float:
    """The largest difference between two sets of logits, in units of their spread.

    The spread is the median absolute deviation, scaled to the standard deviation of a normal
    distribution, so that logits of padded vocabularies, which may be minus infinity, do not affect
    it. Equal infinities and numbers that are equal up to rounding do not count as different.

    Args:
        found: The logits.
        expected: The expected logits.

    Returns:
        The error; NaN if either holds NaN.
    """
    roundings = _ROUNDINGS * torch.finfo(expected.dtype).eps
    found, expected = (each.reshape(-1, each.shape[-1]) for each in (found, expected))
    largest = torch.stack(
        [
            ((own - other).abs() - roundings * other.abs().nan_to_num(posinf=0))
            .masked_fill(own == other, 0)
            .max()
            for own, other in zip(found.split(_ROWS), expected.split(_ROWS), strict=True)
        ]
    ).max()  # unlike Python's, it propagates NaN
    return float(largest.clamp_min(0)) / _spread(expected[:_ROWS].double())


def _spread(logits: Float[Tensor, "n d_vocab"]) -> float:
    real = logits[logits.isfinite()]
    if not len(real):
        return 1.0
    spreads = (
        float((real - real.median()).abs().median()) * _TO_NORMAL,
        float(real.std(unbiased=False)),  # where more than half of the tokens have one logit
        float(real.abs().max()),
        1.0,
    )
    return next(spread for spread in spreads if spread > 0)


_PROBES: WeakKeyDictionary[nn.Module, tuple[object, Probe]] = WeakKeyDictionary()
_PLAIN: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def check_plain(
    host: Host, tokens: Int[Tensor, "2 pos"], expected: Float[Tensor, "2 pos d_vocab"]
) -> None:
    """Refuse a model that does not compute what the Hugging Face model that it wraps computes.

    Args:
        host: The model.
        tokens: The tokens from `probe_tokens`.
        expected: The logits of the Hugging Face model.

    Raises:
        UnsupportedModelError: If the logits differ by more than rounding.
    """
    with torch.no_grad():
        error = logit_error(host.logits(tokens.to(host.device)).to(expected.device), expected)
    if not error <= _PLAIN_TOLERANCE and not bool(expected.isnan().any()):
        raise UnsupportedModelError(
            f"{host.name!r} as TransformerLens {version('transformer-lens')} turns it into a "
            f"{type(host.model).__name__} gives logits that differ from those of Hugging Face's "
            f"own model by {error:.1g} times their spread; try the other kind, 'bridge' or 'hooked'"
        )
    _PLAIN[host.model] = error


def plain_error(model: nn.Module) -> float | None:
    """The error of a model's logits against Hugging Face's, measured when it was loaded.

    Args:
        model: The model.

    Returns:
        The error, in units of the spread of the logits; `None` if it was not loaded from a folder.
    """
    return _PLAIN.get(model)


def probe(host: Host) -> Probe | None:
    """Probe a model once, and cache the errors.

    Args:
        host: The model.

    Returns:
        The errors; `None` if the model returns NaN, or while hooks of the caller are on it, which
        would see the tokens of the probe.
    """
    state = (host.attention_implementation, host.model.W_U.dtype, *_forwards(host))
    known = _PROBES.get(host.model)
    if known is not None and known[0] == state:
        return known[1]
    if host.hooked_modules:
        return None
    seen = _probed(host)
    if seen is not None:
        _PROBES[host.model] = state, seen
    return seen


def _forwards(host: Host) -> Iterator[object]:
    """What a call would run, as far as that is cheap to check; users may replace `forward`."""
    modules = (host.model, host.model.unembed, host.unembedding.input.module)
    for module in (*modules, *(getattr(each, "original_component", None) for each in modules)):
        yield type(module).forward if isinstance(module, nn.Module) else None
        yield vars(module).get("forward") if isinstance(module, nn.Module) else None
        yield type(module)


@torch.no_grad()
def _probed(host: Host) -> Probe | None:
    tokens = probe_tokens(host.d_vocab, host.n_ctx, host.vocabulary.special_ids).to(host.device)
    # First: a bridge keeps its last attention pattern, and one with a graph cannot be copied.
    vjp_error = _vjp_error(host, tokens)
    with host.own_precision():
        logits = host.logits_of(tokens, lambda values: values)
    called, read = logits_and_readout(
        host, lambda: host.model(tokens, return_type="logits"), torch.ones_like(tokens).bool()
    )
    if bool(logits.isnan().any()):
        return None  # the run on the user's own prompts reports where NaN comes from
    first, second = logits
    return Probe(
        causality_error=logit_error(first[:-1], second[:-1]) if len(first) > 1 else 0.0,
        forward_error=logit_error(logits.flatten(0, 1), called.to(logits.device)),
        vjp_error=vjp_error,
        readout_error=logit_error(read, called),
        tolerance=_TOLERANCES.get(host.model.W_U.dtype, _HALF_PRECISION_TOLERANCE),
    )


@torch.no_grad()
def logits_and_readout(
    host: Host, run: Callable[[], Tensor], mask: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "n d_vocab"], Float[Tensor, "n d_vocab"]]:
    """Run the model, and read its last residual stream with the Logit Lens.

    Args:
        host: The model.
        run: Runs the model and returns its logits, `[batch, pos, d_vocab]`.
        mask: The positions to compare.

    Returns:
        The logits, and the scores of the Logit Lens, at these positions.

    Raises:
        UnsupportedModelError: If the model does not run its own final norm.
    """
    streams: list[Tensor] = []
    with host.own_precision(), hooked(host.unembedding.input, streams.append):
        logits = run().to(mask.device)[mask]
        if not streams:
            raise UnsupportedModelError(
                f"{host.name!r} does not run its own final norm; if its Hugging Face model was "
                "wrapped by a second bridge, load it again for each"
            )
        stream = streams[0].reshape(*mask.shape, -1).to(mask.device)
        return logits, host.unembedding.logits(stream[mask]).to(logits.device)


def _vjp_error(host: Host, tokens: Int[Tensor, "2 pos"]) -> float:
    """Relative error of the gradient at the last residual stream against that of a plain call."""
    analysed = _stream_vjp(host, lambda: host.logits_of(tokens, lambda values: values))
    called = _stream_vjp(host, lambda: host.model(tokens, return_type="logits"))
    if analysed is None or called is None:
        return 0.0  # this architecture does not expose its stream there
    difference, size = (analysed - called).norm(), called.norm()
    return float(difference / size if size > 0 else difference)


@torch.enable_grad()
def _stream_vjp(host: Host, run: Callable[[], Tensor]) -> Tensor | None:
    """The VJP of logits at the last block's output; `None` if the model does not expose it."""
    streams: list[Tensor] = []

    def begin(stream: Tensor) -> Tensor:
        streams.append(stream.detach().requires_grad_())
        return streams[-1]

    site = host.hook_points[f"blocks.{host.n_layers - 1}.hook_resid_post"]
    with hooked(site.tap, begin), host.own_precision():
        logits = run()
    if not streams:
        return None
    # Any upstream gradient that differs between tokens will do.
    upstream = torch.linspace(-1, 1, logits.shape[-1], device=logits.device).exp()
    real = logits.isfinite()
    [vjp] = torch.autograd.grad(
        logits.masked_fill(~real, 0), streams, (upstream * real).to(logits.dtype)
    )
    return vjp.double()


def probe_tokens(d_vocab: int, n_ctx: int, special_ids: Container[int]) -> Int[Tensor, "2 pos"]:
    """Two prompts that differ in their last token only.

    Args:
        d_vocab: Number of token ids that the model reads.
        n_ctx: Longest prompt that it accepts.
        special_ids: Tokens to leave out; HookedTransformer may mask padding tokens.

    Returns:
        Their ids.
    """
    n = min(_N_TOKENS, n_ctx)
    some = range(0, d_vocab, max(1, d_vocab // _CANDIDATES))
    usual = [token for token in some if token not in special_ids] or list(some)
    *first, other = (usual[at * (len(usual) - 1) // n] for at in range(n + 1))
    return torch.tensor([first, [*first[:-1], other]])
