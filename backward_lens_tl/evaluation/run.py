"""An evaluation, from its arguments to its tables."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from backward_lens_tl._checks import listed, shown, truncated
from backward_lens_tl.editing.methods.method import EditMethod
from backward_lens_tl.editing.methods.presets import preset_methods
from backward_lens_tl.errors import EvaluationError
from backward_lens_tl.evaluation.columns import NONE, TABLES
from backward_lens_tl.evaluation.comparison import compare
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.evaluation.measuring import Bench
from backward_lens_tl.evaluation.perplexity import read_texts
from backward_lens_tl.evaluation.plan import Shard, plan_shards, unused_records
from backward_lens_tl.evaluation.summary import shown_table, summarize, to_markdown
from backward_lens_tl.runs.distributed import in_turn
from backward_lens_tl.runs.run import Job, Plan, Run
from backward_lens_tl.runs.shards import Rows

if TYPE_CHECKING:
    import pandas as pd

Methods = EditMethod | Mapping[str, EditMethod] | str | Sequence[str]


@dataclass(frozen=True, repr=False)
class Evaluation(Run):
    """An evaluation's folder, complete or not.

    Attributes:
        folder: Where it is.
        about: The contents of `run.json`: settings, methods, versions, command, the texts of
            perplexity, checksums of model and data.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> config = blt.EvaluationConfig(records=1, neighbors=1, generation_length=0, n_texts=0)
        >>> evaluation = blt.evaluate(model, "facts", out, {}, config, progress=False)
        >>> blt.Evaluation.load(out).is_complete  # later, without model or data
        True
    """

    NOUN = "evaluation"
    UNIT = "edit"
    TABLES = TABLES
    READ_BY = ("summary", "compare", "edits", "prompts", "generations", "rejects")
    CONFIG = EvaluationConfig

    @property
    def config(self) -> EvaluationConfig:
        """The settings."""
        return EvaluationConfig.from_json(self.about["config"])

    def edits(self) -> pd.DataFrame:
        """Read one row per method and record: all metrics, and `seconds` and `memory` per edit.

        Returns:
            The rows of all finished shards: the unedited model (`"none"`), then method by method.

        Examples:
            >>> evaluation.edits()[["method", "record", "efficacy"]].values.tolist()
            [['none', 0, 0.0], ['none', 1, 0.0], ['shift', 0, 1.0], ['shift', 1, 1.0]]
        """
        return self._table("edits").merge(
            self._table("costs"), on=["method", "block"], how="left", validate="many_to_one"
        )

    def prompts(self) -> pd.DataFrame:
        """Read one row per method, record and prompt, with the scores of both answers.

        Returns:
            The rows of all finished shards.

        Examples:
            >>> asked = evaluation.prompts().query("record == 0 and kind == 'rewrite'")
            >>> asked[["method", "answer"]].values.tolist()
            [['none', ' Germany'], ['shift', ' Spain']]
        """
        return self._table("prompts")

    def generations(self) -> pd.DataFrame:
        """Read one row per method, record and generation prompt, with the text.

        Returns:
            The rows of all finished shards.

        Examples:
            >>> list(evaluation.generations().columns)
            ['method', 'record', 'index', 'prompt', 'text', 'ngram_entropy']
        """
        return self._table("generations")

    def rejects(self) -> pd.DataFrame:
        """Read one row per row of the data that was not evaluated, with the reason.

        Returns:
            The rows of all finished shards.

        Examples:
            >>> len(evaluation.rejects())
            0
        """
        return self._table("rejects")

    def summary(self) -> pd.DataFrame:
        """Summarize each method in one row: means, deviations and intervals of all metrics.

        Returns:
            `method`, `records`, `failed` (edits that a method refused, which count as not edited),
            and for each metric its mean under its name, the population standard deviation over
            records (`_std`), and a 95 % bootstrap interval (`_low`, `_high`). KL divergences also
            have a median (`_median`, `_median_low`, `_median_high`). Rates, magnitudes and n-gram
            entropy are times 100, memory is in MiB. `score` is the harmonic mean of the
            three success rates.

        Examples:
            >>> evaluation.summary()[["method", "records", "efficacy"]].values.tolist()
            [['none', 2, 0.0], ['shift', 2, 100.0]]
        """
        config = self.config
        return summarize(self.edits(), seed=config.seed, resamples=config.resamples)

    def compare(self, first: str, second: str) -> pd.DataFrame:
        """Compare two methods on the same records, with intervals of the paired differences.

        Args:
            first: A method.
            second: The method that it is compared with.

        Returns:
            One row per metric, and another one for the median of skewed metrics: `metric`,
            `statistic` (`"mean"` or `"median"`), `records`, the values of `first` and `second`, and
            their `difference` and `ratio` (first to second) with 95 % bootstrap intervals (`_low`,
            `_high`). The scales are those of `summary`.

        Raises:
            EvaluationError: If there is no such method.

        Examples:
            >>> found = evaluation.compare("shift", "none").set_index("metric")
            >>> float(found.loc["efficacy", "difference"])
            100.0
        """
        edits, config = self.edits(), self.config
        names = list(dict.fromkeys(edits["method"]))
        for name in (first, second):
            if name not in names:
                raise EvaluationError(
                    f"this evaluation has no method {name!r}; it has {', '.join(names)}"
                )
        return compare(edits, first, second, seed=config.seed, resamples=config.resamples)

    def to_markdown(self) -> str:
        """Return the summary as a Markdown table, with standard deviations in brackets.

        Returns:
            The table.

        Examples:
            >>> [line.split("|")[1].strip() for line in evaluation.to_markdown().splitlines()]
            ['Method', '------', 'none', 'shift']
        """
        return to_markdown(shown_table(self.summary()))

    def _repr_html_(self) -> str:
        table: str = shown_table(self.summary()).to_html(index=False, border=0)
        of = f"{self.about['model']['name']} on {self.about['data']['name']}"
        done = "" if self.is_complete else f", {len(self.finished)} of {self.n_shards} shards"
        caption = f"{of}; perplexity of {self.about['texts']['name']}{done}"
        return f"{table}\n<p>{html.escape(caption)}</p>"

    def _described(self, rows: Rows) -> str:
        edits: Any = rows["edits"]
        names = ", ".join(dict.fromkeys(each["method"] for each in edits)) or NONE
        n_failed = sum(each["error"] is not None for each in edits)
        return f"{len(edits)} records by {names}, {n_failed} failed"


def evaluate(
    model: nn.Module | str,
    data: Any,
    out: str | Path,
    methods: Methods,
    config: EvaluationConfig | None = None,
    *,
    statistics: str | Path | Sequence[str] | None = None,
    jacobian: object = None,
    progress: bool = True,
) -> Evaluation:
    """Edit record after record, measure what each edit does, and write the results as Parquet.

    Every edit starts from the unedited weights, which a checksum verifies, and the unedited model
    has its own rows, `"none"`. An evaluation that was stopped, even by `kill -9`, resumes when
    it is called again with the same arguments. Under `accelerate launch` the processes share the
    edits.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, or a name as in `load_model`.
        data: What `read_records` reads: a file of CounterFact, `"facts"`, rows; or its result.
        out: The folder; it is created if needed.
        methods: Methods by the names to use in tables; one method; or names of presets, such
            as `"all"` or `["shift", "rome"]`. Presets that need training use rows that are not
            evaluated, and keep what they learn in `out`.
        config: The settings; `EvaluationConfig()` by default, which uses all records.
        statistics: Texts that presets collect second moments from, or a file with one text per
            line; see `texts` of `preset_methods`.
        jacobian: A Jacobian Lens for presets; see `preset_methods`.
        progress: Whether to show a progress bar.

    Returns:
        The folder's tables; all processes of a launch return together.

    Raises:
        EvaluationError: If the folder holds another evaluation, a method is not usable or edits
            with another `prepend_bos` than prompts are scored with, `statistics` or `jacobian` is
            given without presets, or no row is chosen.
        ModelStateError: If the model's weights change during the evaluation.

    Examples:
        >>> import tempfile
        >>> import backward_lens_tl as blt
        >>> model, out = blt.load_facts_model(), tempfile.mkdtemp()
        >>> config = blt.EvaluationConfig(records=2, generation_length=0, n_texts=0)
        >>> found = blt.evaluate(model, "facts", out, {}, config, progress=False)
        >>> found.summary()[["method", "records", "efficacy"]].values.tolist()
        [['none', 2, 0.0]]
    """

    def prepare(job: Job[EvaluationConfig]) -> Plan[Shard]:
        job.host.check_state()
        texts = read_texts(job.host, job.config)
        needs = {"statistics": statistics, "jacobian": jacobian}
        named = _named_methods(job, methods, needs)
        shards = plan_shards(job.host, job.records, named, job.config)
        unedited = [shard for shard in shards if shard.method is None]
        return Plan(
            shards,
            Bench(job.model, job.config, texts).measure,
            entries=[each for shard in unedited for each in (*shard.items, *shard.rejects)],
            about={
                "methods": {name: method.settings() for name, method in named.items()},
                "texts": {"name": texts.name, "n": len(texts.texts), "sha256": texts.fingerprint},
            },
        )

    return Evaluation._perform(model, data, out, config, prepare, progress=progress)


def _named_methods(
    job: Job[EvaluationConfig], methods: Methods, needs: Mapping[str, Any]
) -> dict[str, EditMethod]:
    if isinstance(methods, EditMethod | Mapping):
        _check_unused(needs)
        named = {methods.name: methods} if isinstance(methods, EditMethod) else dict(methods)
    else:
        names = listed(methods)
        if not names or not all(isinstance(name, str) for name in names):
            raise EvaluationError(
                f"methods is {shown(methods)}; pass a method, a mapping of names to methods, or "
                "names of presets such as 'all' or ['shift', 'rome']"
            )
        named = in_turn(partial(_presets, job, names, needs), EvaluationError)
    for name, method in named.items():
        if not isinstance(name, str) or not isinstance(method, EditMethod):
            raise EvaluationError(
                f"methods has {shown(name)}: {shown(method)}; pass names with methods, such as "
                "{'shift': ForwardPassShift(layer=6, size=20)}"
            )
        if name == NONE:
            raise EvaluationError(f"{NONE!r} is the unedited model's own name; choose another")
    return {name: _with_bos(name, method, job.config) for name, method in named.items()}


def _check_unused(needs: Mapping[str, Any]) -> None:
    """Refuse what only presets read."""
    for name, value in needs.items():
        if value is not None:
            raise EvaluationError(
                f"{name} is {truncated(shown(value))}, but only presets read it, and methods has "
                "objects; pass names of presets, or leave it out and pass it to the method, such "
                "as ForwardPassShift(jacobian=lens) or ROME(moments=second_moments(model, texts))"
            )


def _presets(
    job: Job[EvaluationConfig], names: Sequence[str], needs: Mapping[str, Any]
) -> dict[str, EditMethod]:
    """Preset methods; what they learn from records is written to the run's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    return preset_methods(
        job.model,
        names,
        folder=job.folder,
        training=unused_records(job.records, job.config),
        prepend_bos=job.config.prepend_bos,
        progress=job.progress,
        texts=needs["statistics"],
        jacobian=needs["jacobian"],
    )


def _with_bos(name: str, method: EditMethod, config: EvaluationConfig) -> EditMethod:
    """The method, with the BOS setting that prompts are scored with."""
    if method.prepend_bos is None and is_dataclass(method):
        own: EditMethod = replace(method, prepend_bos=config.prepend_bos)
        return own
    if method.prepend_bos != config.prepend_bos:
        raise EvaluationError(
            f"method {name!r} edits with prepend_bos={method.prepend_bos}, but prompts are scored "
            f"with prepend_bos={config.prepend_bos}; leave it out of the method, or set it in "
            "EvaluationConfig(prepend_bos=...)"
        )
    return method
