"""Editing record after record: the run of an evaluation from its arguments to its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from backward_lens_tl._checks import check_path, listed, shown
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.data.records import Records
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.presets import preset_methods
from backward_lens_tl.errors import EvaluationError, ModelStateError
from backward_lens_tl.evaluation.columns import NONE
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.folder import FORMAT_VERSION, Evaluation
from backward_lens_tl.evaluation.measuring import Bench
from backward_lens_tl.evaluation.perplexity import read_texts
from backward_lens_tl.evaluation.plan import plan_digest, plan_parts, unused_records
from backward_lens_tl.files.distributed import own_device, this_process
from backward_lens_tl.files.shards import Tables, about_run, check_pyarrow
from backward_lens_tl.models import host_of
from backward_lens_tl.models.loading import load_model

_TRY = "EvaluationConfig(records=100)"

Methods = EditMethod | Mapping[str, EditMethod] | str | Sequence[str]


def evaluate(
    model: nn.Module | str,
    data: Any,
    out: str | Path,
    methods: Methods,
    config: EvaluationConfig | None = None,
    *,
    progress: bool = True,
) -> Evaluation:
    """Edit record after record, measure what each edit does, and write it as Parquet.

    Every edit begins with the unedited weights, which a checksum proves, and the unedited model has
    rows of its own, `"none"`. An evaluation that was stopped, also by `kill -9`, goes on where it
    was when it is called again with the same arguments. Under `accelerate launch` each process
    takes its share of the edits.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, or a name as `load_model` takes it.
        data: What `read_records` reads: a file of CounterFact, `"facts"`, rows; or its result.
        out: The folder; it is made if it is not there.
        methods: Methods by the names that tables call them; one method; or names of presets, such
            as `"all"` or `["shift", "rome"]`. What presets need to have learnt, they learn from
            rows that are not evaluated, and keep in `out`.
        config: The settings; by default those of `EvaluationConfig()`, which takes all records.
        progress: Whether a bar shows how far it is.

    Returns:
        The folder's tables; several processes return together.

    Raises:
        EvaluationError: If the folder holds another evaluation, there is no method or one that
            edits with another `prepend_bos` than prompts are scored with, or no row of the data is
            chosen.
        ModelStateError: If the model is not afterwards what it was before.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> config = blt.EvaluationConfig(records=2, generation_length=0, n_texts=0)
        >>> found = blt.evaluate(model, "facts", out, {}, config, progress=False)
        >>> found.summary()[["method", "records", "efficacy"]].values.tolist()
        [['none', 2, 0.0]]
    """
    check_pyarrow(Evaluation)
    check_path(out, EvaluationError)
    if not isinstance(config, EvaluationConfig | None):
        raise EvaluationError(
            f"config is a {type(config).__name__}; pass an EvaluationConfig, such as {_TRY}"
        )
    config, state, folder = config or EvaluationConfig(), this_process(), Path(out)
    records = data if isinstance(data, Records) else read_records(data)
    if isinstance(model, str):
        model = load_model(model, device=own_device(state))
    host = host_of(model)
    host.check_state()
    texts = read_texts(host, config)
    # What presets prepare, and the folder itself, the first process makes and the others find.
    with state.main_process_first():
        named = _named_methods(
            model, methods, records, folder, config, progress and state.is_main_process
        )
        parts = plan_parts(host, records, named, config)
        about = {
            "format": FORMAT_VERSION,
            "config": config.to_json(),
            "methods": {name: method.settings() for name, method in named.items()},
            **about_run(host, records),
            "texts": {"name": texts.name, "n": len(texts.texts), "sha256": texts.fingerprint},
            "tokens": {"sha256": plan_digest(parts)},
            "n_parts": len(parts),
        }
        bench = Bench(model, config, texts)
        found = Evaluation.begin(folder, about)
    found.write_missing(
        [len(part.items) for part in parts],
        lambda part: bench.measure(parts[part]),
        _described,
        state,
        unit="edit",
        progress=progress,
    )
    if host.fingerprint() != about["model"]["sha256"]:
        raise ModelStateError(
            f"{host.name!r} is not what it was before the evaluation; load it anew, and trust no "
            "part that was written since"
        )
    return found


def _described(tables: Tables) -> str:
    edits = tables["edits"]
    names = ", ".join(edits["method"].unique()) or NONE
    return f"{len(edits)} records by {names}, {edits['error'].notna().sum()} failed"


def _named_methods(
    model: nn.Module,
    methods: Methods,
    records: Records,
    folder: Path,
    config: EvaluationConfig,
    progress: bool,
) -> dict[str, EditMethod]:
    if isinstance(methods, EditMethod):
        named = {methods.name: methods}
    elif isinstance(methods, Mapping):
        named = dict(methods)
    else:
        names = listed(methods)
        if not names or not all(isinstance(name, str) for name in names):
            raise EvaluationError(
                f"methods is {shown(methods)}; pass a method, a mapping of names to methods, or "
                "names of presets such as 'all' or ['shift', 'rome']"
            )
        folder.mkdir(parents=True, exist_ok=True)
        named = preset_methods(
            model,
            names,
            folder=folder,
            training=unused_records(records, config),
            prepend_bos=config.prepend_bos,
            progress=progress,
        )
    for name, method in named.items():
        if not isinstance(name, str) or not isinstance(method, EditMethod):
            raise EvaluationError(
                f"methods has {shown(name)}: {shown(method)}; pass names with methods, such as "
                "{'shift': ForwardPassShift(layer=6, size=20)}"
            )
        if name == NONE:
            raise EvaluationError(f"{NONE!r} is the unedited model's own name; choose another")
    return {name: _with_bos(name, method, config) for name, method in named.items()}


def _with_bos(name: str, method: EditMethod, config: EvaluationConfig) -> EditMethod:
    """The method, editing prompts as they are scored: with a BOS token or without."""
    if method.prepend_bos is None and is_dataclass(method):
        own: EditMethod = replace(method, prepend_bos=config.prepend_bos)
        return own
    if method.prepend_bos != config.prepend_bos:
        raise EvaluationError(
            f"method {name!r} edits with prepend_bos={method.prepend_bos}, and prompts are scored "
            f"with prepend_bos={config.prepend_bos}; leave it out of the method, or set it in "
            "EvaluationConfig(prepend_bos=...) too"
        )
    return method
