"""The lens over any number of prompts, as tables in a folder.

    records ── plan ──▶ parts of prompts ── measuring ──▶ rows ── folder ──▶ Parquet, part by part

Parts are independent: a sweep that was stopped goes on with those that are missing, and several
processes share them.
"""

from __future__ import annotations

import logging
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from backward_lens_tl.arguments import check_path
from backward_lens_tl.capture import plan_capture
from backward_lens_tl.errors import SweepError
from backward_lens_tl.host import Host, host_of
from backward_lens_tl.loading import load_model
from backward_lens_tl.memory import Memory
from backward_lens_tl.objectives import target_nll
from backward_lens_tl.readout import check_k
from backward_lens_tl.records import Records, read_records
from backward_lens_tl.sweep.config import SweepConfig
from backward_lens_tl.sweep.folder import FORMAT_VERSION, Sweep, open_folder
from backward_lens_tl.sweep.measuring import measure_part
from backward_lens_tl.sweep.plan import Item, Part, plan_digest, plan_parts
from backward_lens_tl.sweep.processes import own_device, this_process

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["Sweep", "SweepConfig", "sweep"]

_DISTRIBUTIONS = ("backward-lens-tl", "transformer-lens", "torch", "transformers", "pyarrow")
_TRY = "SweepConfig(layers=[0, -1], k=3)"
_log = logging.getLogger(__name__)


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

    Example:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> found = blt.sweep(model, "facts", out, blt.SweepConfig(prompts=20), progress=False)
        >>> len(found.prompts()) + len(found.rejects()), found.is_complete
        (20, True)
    """
    _check_pyarrow()
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
        found = open_folder(folder, about)
    with _logged_to(folder / f"log-{state.process_index}.txt"):
        _write_parts(model, parts, found, state, progress)
    state.wait_for_everyone()
    return found


def _check_pyarrow() -> None:
    if find_spec("pyarrow") is None:
        raise SweepError('a sweep needs pyarrow: pip install "backward-lens-tl[parquet]"')


def _check(host: Host, parts: tuple[Part, ...], config: SweepConfig) -> None:
    """Refuse settings that no prompt could be analysed with, before anything is written."""
    check_k(config.k, host.d_vocab_out)
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
        "command": shlex.join(sys.argv),
        "model": {
            "name": host.name,
            "class": type(host.model).__name__,
            "n_layers": host.n_layers,
            "d_model": host.d_model,
            "d_vocab": host.d_vocab_out,
            "sha256": host.fingerprint(),
        },
        "data": {"name": records.name, "rows": len(records), "sha256": records.fingerprint},
        "tokens": {"sha256": plan_digest(parts)},
        "versions": {name: version(name) for name in _DISTRIBUTIONS},
        "python": platform.python_version(),
        "n_parts": len(parts),
    }


def _write_parts(
    model: nn.Module, parts: tuple[Part, ...], found: Sweep, state: PartialState, progress: bool
) -> None:
    """Measure and write this process's share of what is not written yet."""
    missing = [part for part in range(len(parts)) if not found.has_part(part)]
    state.wait_for_everyone()  # before anybody writes, so that all have the same list
    own = missing[state.process_index :: state.num_processes]
    _log.info(
        "process %d of %d: %d of the %d parts that are left",
        state.process_index,
        state.num_processes,
        len(own),
        len(missing),
    )
    n_own, n_missing, n_all = (
        sum(len(parts[part]) for part in some) for some in (own, missing, range(len(parts)))
    )
    with tqdm(
        total=n_all - n_missing + n_own,
        initial=n_all - n_missing,
        unit="prompt",
        disable=not (progress and state.is_main_process),
    ) as bar:
        for part in own:
            began = time.perf_counter()
            tables = measure_part(model, parts[part], found.config)
            found.write_part(part, tables)
            bar.update(len(parts[part]))
            _log.info(
                "part %d: %d prompts and %d rejects in %.1f s",
                part,
                len(tables["prompts"]),
                len(tables["rejects"]),
                time.perf_counter() - began,
            )


@contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Write this package's messages to a file as well."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = _log.level, _log.propagate
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False  # TransformerLens 2 prints what reaches the root
    try:
        yield
    finally:
        _log.setLevel(before[0])
        _log.propagate = before[1]
        _log.removeHandler(handler)
        handler.close()
