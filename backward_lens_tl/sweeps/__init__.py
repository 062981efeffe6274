"""The lens over any number of prompts, as tables in a folder.

    records ── plan ──▶ parts of prompts ── measuring ──▶ rows ── folder ──▶ Parquet, part by part

Parts are independent: a sweep that was stopped goes on with those that are missing, and several
processes share them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from backward_lens_tl._checks import check_path
from backward_lens_tl.capture.memory import Memory
from backward_lens_tl.capture.objectives import target_nll
from backward_lens_tl.capture.run import plan_capture
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Records
from backward_lens_tl.errors import SweepError
from backward_lens_tl.files.distributed import own_device, this_process
from backward_lens_tl.files.shards import Tables, about_run, check_pyarrow
from backward_lens_tl.models import Host, host_of
from backward_lens_tl.models.loading import load_model
from backward_lens_tl.readout.topk import checked_k
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.folder import FORMAT_VERSION, Sweep
from backward_lens_tl.sweeps.measuring import measure_part
from backward_lens_tl.sweeps.plan import Item, Part, plan_digest, plan_parts

__all__ = ["Sweep", "SweepConfig", "sweep"]

_TRY = "SweepConfig(layers=[0, -1], k=3)"


def sweep(
    model: nn.Module | str,
    data: Any,
    out: str | Path,
    config: SweepConfig | None = None,
    *,
    progress: bool = True,
) -> Sweep:
    """Run the lens over a data set and write what it finds as Parquet.

    A sweep that was stopped, also by `kill -9`, goes on where it was when it is called again with
    the same arguments, and ends with the same files. Under `accelerate launch` each process takes
    its share of the parts.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, or a name as `load_model` takes it.
        data: What `read_records` reads: a file of CounterFact, CSV or JSON lines, a Hugging Face
            dataset, rows, `"facts"`; or its result.
        out: The folder; it is made if it is not there.
        config: The settings; by default those of `SweepConfig()`.
        progress: Whether a bar shows how far it is, and how long it will take.

    Returns:
        The folder's tables; several processes return together.

    Raises:
        SweepError: If the folder holds another sweep, or no row of the data is chosen.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> found = blt.sweep(model, "facts", out, blt.SweepConfig(prompts=10), progress=False)
        >>> len(found.prompts()) + len(found.rejects()), found.is_complete
        (10, True)
    """
    check_pyarrow(Sweep)
    check_path(out, SweepError)
    if not isinstance(config, SweepConfig | None):
        raise SweepError(f"config is a {type(config).__name__}; pass a SweepConfig, such as {_TRY}")
    config, state, folder = config or SweepConfig(), this_process(), Path(out)
    records = data if isinstance(data, Records) else read_records(data)
    if isinstance(model, str):
        model = load_model(model, device=own_device(state))
    host = host_of(model)
    parts = plan_parts(host, records, config)
    _check(host, parts, config)
    about = _about(host, records, config, parts)
    # The first process begins the folder; the others find it begun.
    with state.main_process_first():
        found = Sweep.begin(folder, about)
    found.write_missing(
        [len(part) for part in parts],
        lambda part: measure_part(model, parts[part], config),
        _described,
        state,
        unit="prompt",
        progress=progress,
    )
    return found


def _check(host: Host, parts: tuple[Part, ...], config: SweepConfig) -> None:
    """Refuse settings that no prompt could be analysed with, before anything is written."""
    checked_k(config.k, host.d_vocab_out)
    if not parts:
        raise SweepError("the data have no rows; pass at least one prompt with its target")
    shortest = next((entry for part in parts for entry in part if isinstance(entry, Item)), None)
    if shortest is None:
        return  # all rows are rejected
    plan_capture(
        host,
        shortest.record.prompt,
        target_nll(shortest.target),
        matrices=config.matrices,
        layers=config.layers,
        prepend_bos=config.prepend_bos,
        hook_points=None,
        memory=Memory(budget=config.budget),
    )


def _about(
    host: Host, records: Records, config: SweepConfig, parts: tuple[Part, ...]
) -> dict[str, Any]:
    """What `run.json` says."""
    return {
        "format": FORMAT_VERSION,
        "config": config.to_json(),
        **about_run(host, records),
        "tokens": {"sha256": plan_digest(parts)},
        "n_parts": len(parts),
    }


def _described(tables: Tables) -> str:
    return f"{len(tables['prompts'])} prompts and {len(tables['rejects'])} rejects"
