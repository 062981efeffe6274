# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A whole data set
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/data_set.ipynb)
#
# This notebook runs the Backward Lens over 600 prompts, interrupts the sweep and resumes it, and then asks a new
# question: which kinds of facts are written into the earliest layers? It shows how to run a sweep over your
# own data and how to join its tables with your own columns. It is also an example of an average that is
# explained by a confounder.

# %%
import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec

if find_spec("backward_lens_tl") is None:  # for example on Colab
    # Keep the installed versions, so that the runtime need not be restarted.
    kept = ("torch", "numpy", "transformers")
    pins = [f"{d.name}=={d.version}" for d in distributions() if d.name in kept]
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "backward-lens-tl[matplotlib,lora]", *pins], check=True)

# %% [markdown]
# The model is a GPT-2 with 8 layers that ships with the package and knows facts about people, places, companies
# and works. All remarks about numbers and tokens below are about this model.

# %%
import json
import tempfile
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

import backward_lens_tl as blt
from backward_lens_tl import analysis, figures

pd.options.display.max_colwidth = 300
model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub

# %% [markdown]
# ## The data, with a column of your own
#
# A row needs a prompt and a target, the text that the model should predict, with its leading space. A subject and
# the true answer are optional. The package includes 600 such rows in the format of CounterFact;
# `blt.sweep(model, "facts", ...)` uses them directly. Here we turn them into a table, because we want to add a column that sweeps do not have, the *relation* of
# each fact. We also add three invalid rows, which real data often contain.

# %%
path = files("backward_lens_tl") / "facts_model" / "records.json"
facts = [row["requested_rewrite"] for row in json.loads(path.read_text(encoding="utf-8"))]
rows = [
    {
        "prompt": fact["prompt"].replace("{}", fact["subject"]),
        "subject": fact["subject"],
        "target": " " + fact["target_new"]["str"],
        "answer": " " + fact["target_true"]["str"],
        "relation": fact["relation_id"],
    }
    for fact in facts
]
wrong = [
    {"prompt": "Lionel Messi plays for", "subject": "Diego Maradona", "target": " Paris"},
    {"prompt": "Ferrari was set up in", "subject": "Ferrari", "target": " the middle of nowhere"},
    {"prompt": "The capital of France is", "subject": "France", "target": None},
]
data = pd.DataFrame([*rows, *wrong])
data.iloc[[0, 1, -3, -2, -1]]

# %% [markdown]
# You can pass other data in the same way. Files, names and tables are read by `blt.read_records`, which recognizes
# the formats of CounterFact by their columns:
#
# ```python
# blt.sweep(model, "counterfact.json", out)  # as published with ROME, or flattened
# blt.sweep(model, "my-prompts.csv", out)  # also .jsonl, .tsv, .parquet, optionally .gz
# blt.sweep(model, "NeelNanda/counterfact-tracing", out)  # a data set on the hub
# blt.sweep(model, datasets.load_from_disk("mine"), out)  # a datasets.Dataset
#
# fields = {"prompt": "question", "target": "new"}  # other column names
# blt.sweep(model, blt.read_records("my-prompts.csv", fields=fields), out)
# ```
#
# ## Interrupting a sweep
#
# For each prompt, the loss is `-log p(target)` after it. We select one matrix, `W_out` of the MLPs, in all layers,
# and the columns that we need. A sweep writes its tables in shards, here of 64 rows. To interrupt it, a hook on the
# model raises `KeyboardInterrupt`, like Ctrl-C, as soon as three shards are finished.

# %%
config = blt.SweepConfig(
    matrices="W_out",
    position_columns=["segment", "norm", "is_zero", "target_rank", "top_tokens"],
    gradient_columns=(),
    k=1,
    prepend_bos=False,
    shard_size=64,
)
out = Path(tempfile.mkdtemp())


def interrupt(activation, hook):
    if len(blt.Sweep.load(out).finished) == 3:
        raise KeyboardInterrupt


with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", interrupt)]), suppress(KeyboardInterrupt):
    blt.sweep(model, data, out, config, progress=False)

partial = blt.Sweep.load(out)
{"finished shards": partial.finished, "of": partial.n_shards, "prompts": len(partial.prompts())}

# %% [markdown]
# You can read the finished shards without the model, even while the sweep runs. The same call resumes the sweep,
# after checking that the model, data and settings are the same. Are the files of the first run unchanged?

# %%
written = {file: file.stat().st_mtime_ns for file in out.glob("*/*.parquet")}
sweep = blt.sweep(model, data, out, config, progress=False)
unchanged = sum(file.stat().st_mtime_ns == when for file, when in written.items())
{
    "complete": sweep.is_complete,
    "prompts": len(sweep.prompts()),
    "files of the first run": len(written),
    "unchanged": unchanged,
}

# %% [markdown]
# They are. There are 600 prompts for 603 rows: a row that cannot be analysed does not stop the sweep, and no row
# is lost. Each rejected row has a reason for counting and a sentence that describes the problem:

# %%
sweep.rejects()[["prompt", "reason", "problem"]].tail(3)

# %% [markdown]
# In every table, `prompt` is the row number in *your* data. Use it to join tables.
#
# ## Tables
#
# `prompts` has one row per prompt, and `positions` one per prompt, matrix, layer and token. (`gradients`, which we
# omitted, has one per prompt, matrix and layer.) The columns are [documented](../docs/sweeps.md#tables). `loss` is
# in nats; it is high because the targets are wrong answers to questions that the model can answer.

# %%
sweep.prompts()[["prompt", "text", "target", "answer", "is_correct", "loss"]].head(3).round(
    {"loss": 2}
)

# %% [markdown]
# The first cells of the first prompt:

# %%
sweep.positions().drop(columns="projection").head(4).round({"norm": 3})

# %% [markdown]
# `norm` is the norm of `delta_i`, the gradient at the matrix's output at that token. `top_tokens` holds the top token
# of what a step of gradient descent adds there (`-delta_i` through the logit lens: final norm, then unembedding), and
# `target_rank` is the rank of the target, 0 for the top of 3,072. In the first row of the table, the target is at
# the very bottom, and in the third row, where the subject ends, it is on top.
#
# The tables are Parquet files in a folder, so pandas, Polars and DuckDB can read them without this package:

# %%
cells = pd.read_parquet(out / "positions", columns=["layer", "norm"])
len(cells), round(float(cells.norm.mean()), 3)

# %% [markdown]
# ## Two figures
#
# Figures accept the small tables of `blt.analysis`. A *segment* is a group of tokens relative to the subject. How
# large is the norm in each segment, as a mean over its tokens? (Figures use plotly by default; matplotlib figures
# are images that are stored in the notebook.)

# %%
figures.norms_by_segment(analysis.norms_by_segment(sweep), backend="matplotlib")

# %% [markdown]
# It is largest at the last token and, up to layer 4, at the subject's last token. What is the rank of the target there?
# The lines are medians over tokens, the bands lie between the quartiles, and the top of the vocabulary is at the
# top.

# %%
figures.token_ranks_by_segment(analysis.token_ranks_by_segment(sweep), backend="matplotlib")

# %% [markdown]
# The target is on top where the norms are large, and nowhere else. At the last token, there is nothing to compare:
# the median and both quartiles are at the top in every layer. At the subject's last token, the band is wider, so the target is
# on top for some prompts only. We use this position for our question.
#
# ## Which relations have their targets in the earliest layers?
#
# A target *leads* if it is the top token of what the update adds. We take the cells of the subject's last token, join
# them with our own column, and compute the fraction of prompts whose target leads, by layer. The standard error
# is that of a mean of independent prompts.

# %%
about = sweep.prompts().set_index("prompt")[["subject", "target"]].join(data.relation)
cells = sweep.positions().query("segment == 'last subject token' and not is_zero")
cells = cells.join(about, on="prompt")
cells["leads"] = (cells.target_rank == 0).astype(float)
cells["first"] = cells.top_tokens.str[0]
by_layer = cells.groupby("layer").leads.agg(["mean", "sem", "size"]).round(3)
by_layer.rename(columns={"mean": "target leads", "sem": "standard error", "size": "prompts"})

# %% [markdown]
# Two thirds of the targets lead from layer 0 on, slightly fewer in layer 4, and none from layer 5 on. (The prompts
# are the same in all layers, so this is not the standard error of a *difference* between layers.) So "earliest"
# may be the wrong question. For each relation with at least 20 prompts: how many targets lead in any layer, and what
# is the first such layer on average?

# %%
earliest = cells[cells.leads == 1].groupby("prompt").layer.min()
print(
    f"{len(earliest)} of {len(about)} targets ever lead, {(earliest == 0).sum()} of them in layer 0"
)
summary = about.assign(layer=earliest).groupby("relation").layer
summary = summary.agg(prompts="size", ever="count", mean_first_layer="mean")
summary[summary.prompts >= 20].sort_values("mean_first_layer").round(2)

# %% [markdown]
# **No relation is earlier than another.** 394 of 424 targets that lead, 93 %, do so in layer 0, and no relation has a mean above 0.45. The
# gradient reaches all layers below the readout of the subject simultaneously. What differs is *whether* a target leads:
# 31 of 33 countries, and 10 of 28 languages spoken in a place.
#
# ## How certain is this?
#
# The table shows the fraction in layer 0 for each relation, with two 95 % bootstrap intervals. The first one
# resamples prompts as if they were independent. The second one resamples *targets*, each with all of its
# prompts, because prompts with the same target may succeed or fail together. (There are 2,000 resamples each. With
# four targets, the second interval is rough.)

# %%
generator = np.random.default_rng(0)


def interval(group, unit):
    sums = group.groupby(unit).leads.agg(["sum", "size"]).to_numpy()
    drawn = sums[generator.integers(len(sums), size=(2000, len(sums)))].sum(axis=1)
    return np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]).round(2).tolist()


lowest = cells[cells.layer == 0]
fractions = {
    relation: {
        "prompts": len(group),
        "targets": group.target.nunique(),
        "leads": round(group.leads.mean(), 2),
        "95 %, prompts": interval(group, "prompt"),
        "95 %, targets": interval(group, "target"),
    }
    for relation, group in lowest.groupby("relation")
    if len(group) >= 20
}
fractions = pd.DataFrame(fractions).T.sort_values("leads")
fractions

# %% [markdown]
# The same as a figure, with a dot for the fraction itself:

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
rows_at = np.arange(len(fractions))
for unit, offset in (("prompts", -0.12), ("targets", 0.12)):
    low, high = np.array(fractions[f"95 %, {unit}"].tolist()).T
    axes.hlines(rows_at + offset, low, high, f"C{int(offset > 0)}", lw=2, label=f"95 %, {unit}")
axes.plot(fractions.leads.tolist(), rows_at, "ko", markersize=4)
axes.set_yticks(rows_at, fractions.index)
axes.set_xlabel("fraction of prompts whose target leads at the subject's last token, layer 0")
axes.legend(loc="lower right")
plt.close(figure)  # otherwise it is shown twice
figure

# %% [markdown]
# With prompts as units, the lowest and the highest relation are far apart, and `language_spoken` (0.18 to 0.50) is
# clearly separated from `work_language` (0.62 to 0.92), although both ask for a language. With targets as units,
# most intervals are wider, for `born_century` more than twice as wide, and those of the two language relations nearly touch. So prompts are
# not independent: the target matters, and each relation has its own targets.
#
# ## The relation, or the target?
#
# Three relations ask for languages: of places, of people, of books. The table has the fractions by target, for
# targets that at least two of them share, and the number of prompts:

# %%
kinds = {"language_spoken": "places", "mother_tongue": "people", "work_language": "books"}
languages = lowest[lowest.relation.isin(kinds)]
languages = languages.assign(of=languages.relation.map(kinds))
by_target = languages.groupby(["target", "of"]).leads.agg(["mean", "size"]).unstack()
shared = by_target[by_target["size"].notna().sum(axis=1) >= 2]
shared.apply(lambda column: column.map("{:.2g}".format, na_action="ignore")).fillna("")

# %% [markdown]
# Look at the rows. " Norwegian", " Portuguese" and " Spanish" always lead, " Dutch" never, and " Czech" once in
# eleven prompts, for a place as well as for a person. (" Italian" and " English" differ between relations.) The next table
# has the difference between two relations, both plainly and as a mean over the targets that both share, each
# counted once, with its standard error over targets:

# %%
fraction = by_target["mean"].reindex(columns=list(kinds.values()))
plain = languages.groupby("of").leads.mean().reindex(fraction.columns)
pairs = [("people", "places"), ("books", "people")]
differences = {
    f"{one} minus {other}": {
        "plain": plain[one] - plain[other],
        "matched": (fraction[one] - fraction[other]).mean(),
        "standard error": (fraction[one] - fraction[other]).sem(),
        "targets": int((fraction[one] - fraction[other]).count()),
    }
    for one, other in pairs
}
pd.DataFrame(differences).T.round(2).astype({"targets": int})

# %% [markdown]
# **The relation may only be a proxy for the target.** The differences of 0.23 and 0.24 shrink to 0.08, which is
# about one standard error or less. (With so few shared targets, the second one would also be compatible with 0.24.) A cell
# with one prompt counts as much here as one with thirteen, so this is a rough estimate, but it shows that the plain
# averages are not reliable. Without the `target` column in the same table, we would not have noticed.
#
# (We selected these relations after looking at all fractions, because they ask for the same targets. Their plain
# differences are therefore biased by selection, and all of this is exploratory: a claim about relations would need
# new prompts.)
#
# ## Which token leads instead?
#
# If " Dutch" never leads, which token does? These are the top tokens of the update that are not the target, in layer
# 0, for the same three relations:

# %%
others = languages[languages.leads == 0]
leading = others.groupby(["target", "first"]).size().sort_values(ascending=False)
leading.rename("prompts").head(10).reset_index()

# %% [markdown]
# For " Danish" it is " Copenhagen", for " Swedish" " Stockholm", for " Dutch" " Netherlands": eight of these ten
# rows are the country or the capital of the language. At the subject, the update does not write the answer but moves the
# subject to Denmark. This is one of these prompts, layer by layer:

# %%
number = others[others["first"] == others["first"].mode()[0]].prompt.iloc[0]
record = sweep.prompts().set_index("prompt").loc[number]
blt.backward_lens(model, record.text, record.target, matrices="W_out", prepend_bos=False)

# %% [markdown]
# Two columns differ. In the last one, the top token is " Danish" in every layer: the update changes what is
# *predicted*. In the column of " Curry", it is " Copenhagen" in layers 0 to 3, and " Danish" only in layer 4: the update
# changes what the subject *is*. But this is an interpretation of tokens, not a proof. This model was trained to
# gather the attributes of a subject at this token ([model
# card](../backward_lens_tl/facts_model/MODEL_CARD.md)), so the result may be clearer than in other models. To test
# it, edit one attribute and ask for the other, with the tools of the [editing notebook](editing.ipynb).
#
# ## Many GPUs
#
# From a shell, the same sweep is one command, and a launcher distributes its shards over several processes. An
# interrupted sweep resumes, also with another number of processes.
#
# ```sh
# backward-lens sweep --model gpt2 --data counterfact.json --out sweep
# accelerate launch --multi_gpu --num_processes 4 \
#     -m backward_lens_tl sweep --model gpt2 --data counterfact.json --out sweep
# ```
#
# `SweepConfig(memory=blt.Memory(budget=...))` limits the memory of a shard, and `prompts=1000` selects rows at random. In a
# script, `blt.sweep` works the same under either launcher.
#
# ## Where to go from here
#
# - [Sweeps](../docs/sweeps.md): all settings, columns and reasons.
# - [Analyses](../docs/analysis.md): ranks, norms, neurons and steps, with figures.
# - [The paper, figure by figure](the_paper.ipynb): the paper's own questions.
# - [Five minutes](five_minutes.ipynb) and [looking](looking.ipynb): one prompt at a time.
#
# **Exercise.** Make the last table for `born_century` and `work_century`, whose targets are " nineteenth" and
# similar tokens, which have no capital. Which token leads instead of " seventeenth"?
