"""The rows of one shard of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from backward_lens_tl.capture.memory import is_lack_of_memory
from backward_lens_tl.choices import Measure
from backward_lens_tl.errors import BackwardLensError, UnsupportedModelError
from backward_lens_tl.lens import backward_lens
from backward_lens_tl.result import BackwardLensResult
from backward_lens_tl.runs.rejects import Reject
from backward_lens_tl.runs.shards import Rows
from backward_lens_tl.sweeps.columns import TABLES
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.factors import FACTORS, KeptFactors
from backward_lens_tl.sweeps.plan import Item, Shard

if TYPE_CHECKING:
    import pandas as pd

_Measured = tuple[dict[str, "pd.DataFrame"], KeptFactors | None]
_MEASURES: tuple[Measure, ...] = ("answer_rank", "entropy")


def measure_shard(
    model: nn.Module, shard: Shard, config: SweepConfig, for_lens: Mapping[str, Any]
) -> Rows:
    """Analyse the prompts of one shard.

    If they cannot be analysed together, each is analysed alone, and those that fail are rejected.

    Args:
        model: The model.
        shard: The shard.
        config: The settings.
        for_lens: Those that are arguments of `backward_lens`, with the Jacobian Lens loaded.

    Returns:
        The rows of each table, and the factors, if they are kept.

    Raises:
        UnsupportedModelError: If the model cannot be analysed, whatever the prompt.
    """
    import pandas as pd

    items = [entry for entry in shard if isinstance(entry, Item)]
    rejects = [entry for entry in shard if isinstance(entry, Reject)]
    measured = []
    measure = partial(_tried, model, config=config, for_lens=for_lens)
    together = measure(items) if items else ({}, None)
    if not isinstance(together, str):
        measured.append(together)
    else:  # the error has been freed, and with it the tensors in its frames
        for item in items:
            alone = measure([item])
            if isinstance(alone, str):
                rejects.append(Reject(item.row, item.record.id, "numbers", alone))
            else:
                measured.append(alone)
    tables: dict[str, Any] = {"rejects": rejects}
    for name in ("positions", "gradients", "prompts"):
        found = [each[name] for each, _ in measured if name in each]
        tables[name] = pd.concat(found) if found else []
    rows = {name: tables[name] for name in TABLES}
    if config.keep_factors is not None:
        rows[FACTORS] = [kept for _, kept in measured if kept is not None]
    return rows


def _tried(
    model: nn.Module, items: Sequence[Item], config: SweepConfig, for_lens: Mapping[str, Any]
) -> _Measured | str:
    """The rows of some prompts, or why there are none."""
    try:
        return _measured(model, items, config, for_lens)
    except UnsupportedModelError:
        raise
    except (BackwardLensError, MemoryError, RuntimeError) as error:
        if not isinstance(error, BackwardLensError) and not is_lack_of_memory(error):
            raise
        return str(error)


def _measured(
    model: nn.Module, items: Sequence[Item], config: SweepConfig, for_lens: Mapping[str, Any]
) -> _Measured:
    import pandas as pd

    position_columns = [column.name for column in config.columns("positions")]
    result = backward_lens(
        model,
        [item.record.prompt for item in items],
        [item.target for item in items],
        measures=[measure for measure in _MEASURES if measure in position_columns],
        **for_lens,
    )
    tables = {"prompts": pd.DataFrame(_prompt_rows(result, items))}
    if config.columns("gradients"):
        tables["gradients"] = result.capture.gradient_df()
    if position_columns:
        subjects = [item.subject for item in items]
        lenses = [result.under(lens) for lens in result.projections]
        tables["positions"] = pd.concat([lens.to_df(subjects) for lens in lenses])
    own = [item.row for item in items]
    numbered = {
        name: table.assign(prompt=table["prompt"].map(own.__getitem__))
        for name, table in tables.items()
    }
    if config.keep_factors is None:
        return numbered, None
    return numbered, KeptFactors.of(result.capture, own, config.keep_factors)


def _prompt_rows(result: BackwardLensResult, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    texts, answers = result.token_texts, result.capture.answers.tolist()
    for batch, (item, answer) in enumerate(zip(items, answers, strict=True)):
        yield {
            "prompt": batch,
            "id": item.record.id,
            "text": item.record.prompt,
            "subject": item.record.subject,
            "target": texts[item.target],
            "target_id": item.target,
            "answer": texts[answer],
            "answer_id": answer,
            "true_answer": item.record.answer,
            "is_correct": None if item.answer is None else item.answer == answer,
            "n_tokens": len(item.tokens),
            "loss": float(result.capture.loss[batch]),
        }
