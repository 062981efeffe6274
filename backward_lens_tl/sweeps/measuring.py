"""One part of a sweep: the rows of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from backward_lens_tl.capture.memory import Memory, is_lack_of_memory
from backward_lens_tl.errors import BackwardLensError, UnsupportedModelError
from backward_lens_tl.files.shards import Reject, Tables, reject_rows
from backward_lens_tl.lens import Measure, backward_lens
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.plan import Item, Part

if TYPE_CHECKING:
    import pandas as pd

_MEASURES: tuple[Measure, ...] = ("answer_rank", "entropy")


def measure_part(model: nn.Module, part: Part, config: SweepConfig) -> Tables:
    """Analyse the prompts of one part.

    Where they cannot be analysed together each is tried alone, and those that fail are rejected.

    Args:
        model: The model.
        part: The part.
        config: The settings.

    Returns:
        The rows of each table, by its name.

    Raises:
        UnsupportedModelError: If the model cannot be analysed; that is not the prompts' fault.
    """
    items = [entry for entry in part if isinstance(entry, Item)]
    rejects = [entry for entry in part if isinstance(entry, Reject)]
    found: list[Tables] = []
    together = _tried(model, items, config) if items else None
    if isinstance(together, str):
        # Here the error is gone, and with it the tensors that its frames held.
        for item in items:
            alone = _tried(model, [item], config)
            if isinstance(alone, str):
                rejects.append(Reject(item.index, item.record.id, "numbers", alone))
            else:
                found.append(alone)
    elif together is not None:
        found.append(together)
    return {**_joined(found, config), "rejects": reject_rows("prompt", rejects)}


def _tried(model: nn.Module, items: Sequence[Item], config: SweepConfig) -> Tables | str:
    """The rows of some prompts, or why there are none."""
    try:
        return _measured(model, items, config)
    except UnsupportedModelError:
        raise
    except (BackwardLensError, MemoryError, RuntimeError) as error:
        if not isinstance(error, BackwardLensError) and not is_lack_of_memory(error):
            raise
        return str(error)


def _measured(model: nn.Module, items: Sequence[Item], config: SweepConfig) -> Tables:
    result = backward_lens(
        model,
        [item.record.prompt for item in items],
        [item.target for item in items],
        matrices=config.matrices,
        layers=config.layers,
        projection=config.projection,
        direction=config.direction,
        vjps_at=config.vjps_at,
        k=config.k,
        measures=[measure for measure in _MEASURES if config.measures(measure)],
        prepend_bos=config.prepend_bos,
        memory=Memory(budget=config.budget),
    )
    tables = {"prompts": _prompt_rows(result, items)}
    if config.columns("gradients"):
        tables["gradients"] = result.gradient_df()
    if config.columns("positions"):
        tables["positions"] = _position_rows(result, items)
    own = [item.index for item in items]
    return {
        name: table.assign(prompt=table["prompt"].map(own.__getitem__))
        for name, table in tables.items()
    }


def _position_rows(result: BackwardLensResult, items: Sequence[Item]) -> pd.DataFrame:
    import pandas as pd

    subjects = [item.subject for item in items]
    by_lens: list[pd.DataFrame] = [
        result.under(lens).to_df(subjects) for lens in result.projections
    ]
    return pd.concat(by_lens)


def _prompt_rows(result: BackwardLensResult, items: Sequence[Item]) -> pd.DataFrame:
    import pandas as pd

    capture, texts = result.capture, result.token_texts
    rows: list[dict[str, Any]] = [
        {
            "prompt": place,
            "id": item.record.id,
            "text": item.record.prompt,
            "subject": item.record.subject,
            "target": texts[item.target],
            "target_id": item.target,
            "answer": texts[answer],
            "answer_id": answer,
            "true_answer": item.record.answer,
            "is_correct": None if item.answer is None else item.answer == answer,
            "n_tokens": item.n_tokens,
            "loss": loss,
        }
        for place, (item, answer, loss) in enumerate(
            zip(items, capture.answers.tolist(), capture.loss.tolist(), strict=True)
        )
    ]
    return pd.DataFrame(rows)


def _joined(found: Sequence[Tables], config: SweepConfig) -> dict[str, pd.DataFrame]:
    """The rows of all, table by table; tables without rows where there are none."""
    import pandas as pd

    return {
        name: pd.concat([tables[name] for tables in found])
        if found
        else pd.DataFrame(columns=list(config.columns(name)))
        for name in ("positions", "gradients", "prompts")
        if config.columns(name)
    }
