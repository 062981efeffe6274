"""What an edit did to its own requests, as far as the method looked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from backward_lens_tl.errors import warn

_ENTRIES = ("outcomes", "forward_passes", "backward_passes", "contrast_prompts")
"""What a report adds to a delta's `about`."""

_MOST_NAMED = 3
_MOST_SIZES = 5


@dataclass(frozen=True)
class EditOutcome:
    """How the target of one request stands in the edited model, by the method's own check.

    Attributes:
        prompt: The request's prompt.
        target: Its target.
        sizes: The size of the outer product for each token of the target; 0 if none is written.
        margin: Logit of the target minus the largest other logit, the least over its tokens;
            `None` if it was not checked.
        rank: Number of tokens that are more probable, the largest over the target's tokens.
        probability: Probability of the whole target.
        is_reached: Whether every token of the target is the most probable one, or has the
            probability that was asked for; `None` if it was not checked.
        tried: For each forward pass, the largest size for a token of this target, and the margin.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> request = blt.editing.EditRequest("Lionel Messi plays for", " Paris")
        >>> [outcome] = blt.editing.ForwardPassShift(layer=5)(model, request).outcomes
        >>> outcome.is_reached, outcome.rank
        (True, 0)
    """

    prompt: str
    target: str | int
    sizes: tuple[float, ...]
    margin: float | None
    rank: int | None
    probability: float | None
    is_reached: bool | None
    tried: tuple[tuple[float, float], ...] = ()

    @property
    def size(self) -> float:
        """The largest size, by absolute value."""
        return max(self.sizes, key=abs)


@dataclass(frozen=True)
class EditReport:
    """What a method found out about an edit while it computed it.

    Attributes:
        outcomes: One per request, and then one per phrasing of it that was added.
        forward_passes: Number of forward passes.
        backward_passes: Number of backward passes, each of which needs one of the forward passes.
        contrast_prompts: Number of additional prompts, about other subjects.
    """

    outcomes: tuple[EditOutcome, ...]
    forward_passes: int
    backward_passes: int = 0
    contrast_prompts: int = 0

    def to_about(self) -> dict[str, Any]:
        """The report as entries of a delta's `about`."""
        return {
            "outcomes": tuple(asdict(each) for each in self.outcomes),
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "contrast_prompts": self.contrast_prompts,
        }

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> EditReport | None:
        """Read the report of a delta; `None` if the method made none."""
        if "outcomes" not in about:
            return None
        outcomes = tuple(EditOutcome(**each) for each in about["outcomes"])
        return cls(outcomes, *(about[name] for name in _ENTRIES[1:]))

    @staticmethod
    def removed_from(about: Mapping[str, Any]) -> dict[str, Any]:
        """A delta's `about` without the report."""
        return {key: value for key, value in about.items() if key not in _ENTRIES}

    def __str__(self) -> str:
        passes = _counted(self.forward_passes, "forward pass", "es")
        if self.backward_passes:
            passes += f" and {_counted(self.backward_passes, 'backward pass', 'es')}"
        if self.contrast_prompts:
            passes += f", {_counted(self.contrast_prompts, 'contrast prompt', 's')}"
        sizes = [each.size for each in self.outcomes]
        checked = [each for each in self.outcomes if each.margin is not None]
        if len(self.outcomes) == 1:
            prompts, size = "", f"size {sizes[0]:.3g}"
        else:
            prompts = f"{len(sizes)} prompts, "
            size = f"sizes {min(sizes):.3g} to {max(sizes):.3g}"
        if not checked:
            return f"{prompts}{size}, not checked, {passes}"
        margin = min(each.margin for each in checked if each.margin is not None)
        rank = max(each.rank for each in checked if each.rank is not None)
        return f"{prompts}{size}, margin {margin:.3g}, rank {rank}, {passes}"

    def warn_if_missed(self, advice: str) -> None:
        """Warn once about the targets that were not reached.

        Args:
            advice: What to do about it.
        """
        missed = [each for each in self.outcomes if each.is_reached is False]
        if missed:
            named = "; ".join(map(_described, missed[:_MOST_NAMED]))
            more = "" if len(missed) <= _MOST_NAMED else f"; and {len(missed) - _MOST_NAMED} more"
            warn(
                f"{len(missed)} of {len(self.outcomes)} targets were not reached: {named}{more}. "
                f"{advice}"
            )


def _counted(n: int, noun: str, plural: str) -> str:
    return f"{n} {noun}{'' if n == 1 else plural}"


def _described(missed: EditOutcome) -> str:
    nearest = sorted(missed.tried, key=lambda each: each[1], reverse=True)[:_MOST_SIZES]
    tried = ", ".join(f"{size:.3g} ({margin:.3g})" for size, margin in nearest)
    more = (
        "" if len(nearest) == len(missed.tried) else f" and {len(missed.tried) - len(nearest)} more"
    )
    return (
        f"{missed.target!r} after {missed.prompt!r} has rank {missed.rank} and margin "
        f"{missed.margin:.3g} at size {missed.size:.3g}; sizes tried, with margins: {tried}{more}"
    )
