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
# One prompt is a story; a data set is evidence. This notebook runs the Backward Lens over 600 prompts,
# stops on the way and goes on, and then asks a question of its own: which kinds of facts are written
# earliest into the layers of the model? At the end you can run a sweep over your own data, put its
# tables together with your own columns, and have seen an average fall for something that was not asked.

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
    subprocess.run([*pip, "backward-lens-tl[matplotlib]", *pins], check=True)

# %% [markdown]
# The model is a small GPT-2 of 8 layers that ships in the package and knows facts about people, places,
# companies and works. All that is said below about numbers and words is about this model.

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
model = blt.load_model("facts")  # with a network: "gpt2", or any name on the Hugging Face hub

# %% [markdown]
# ## The data, with a column of one's own
#
# A row needs a prompt and a target: what the model should say next, as it continues the prompt, so with
# its leading space. A subject and the true answer are welcome. The package's records are such rows, 600
# of them, in the format of CounterFact; `blt.sweep(model, "facts", ...)` takes them as they are. Here
# they become a table, because we want a column that no sweep knows: the *relation* that a fact is of.
# And three rows are added that are wrong, as some always are.

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
# Other data are a matter of the argument. Files, names and tables all go through `blt.read_records`,
# which tells the forms of CounterFact by their columns:
#
# ```python
# blt.sweep(model, "counterfact.json", out)  # as ROME published it, or flattened
# blt.sweep(model, "my-prompts.csv", out)  # also .jsonl, .tsv, .parquet, each with .gz or without
# blt.sweep(model, "NeelNanda/counterfact-tracing", out)  # a data set on the hub
# blt.sweep(model, datasets.load_from_disk("mine"), out)  # a datasets.Dataset
#
# fields = {"prompt": "question", "target": "new"}  # columns of other names
# blt.sweep(model, blt.read_records("my-prompts.csv", fields=fields), out)
# ```
#
# ## A sweep that is interrupted
#
# For each prompt, the loss is `-log p(target)` behind it. We ask for one matrix, the MLPs' `W_out`, in
# all layers, and for the columns that we need. A sweep writes its tables shard by shard, here 64 rows at a
# time. To stop it, a hook on the model presses Ctrl-C as soon as three shards are finished.

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


def press_ctrl_c(activation, hook):
    if len(blt.Sweep.load(out).finished) == 3:
        raise KeyboardInterrupt


with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", press_ctrl_c)]), suppress(KeyboardInterrupt):
    blt.sweep(model, data, out, config, progress=False)

begun = blt.Sweep.load(out)
{"finished shards": begun.finished, "of": begun.n_shards, "prompts so far": len(begun.prompts())}

# %% [markdown]
# What is finished can be read, without the model and while the sweep runs. The same call again goes on
# (that it is the same model, data and settings is checked). Are the files of the first run left alone?

# %%
written = {file: file.stat().st_mtime_ns for file in out.glob("*/*.parquet")}
sweep = blt.sweep(model, data, out, config, progress=False)
untouched = sum(file.stat().st_mtime_ns == when for file, when in written.items())
{
    "complete": sweep.is_complete,
    "prompts": len(sweep.prompts()),
    "files of the first run": len(written),
    "untouched": untouched,
}

# %% [markdown]
# All of them are. 600 prompts and 603 rows: nothing stops for a row that cannot be analysed, and none is
# lost. Each has a reason in one word, for counting, and a sentence, for mending:

# %%
sweep.rejects()[["prompt", "reason", "problem"]].tail(3)

# %% [markdown]
# `prompt` is the number of the row in *your* data, in every table. It is what joins them.
#
# ## Tables
#
# `prompts` has a row per prompt, `positions` one per prompt, matrix, layer and token (and `gradients`,
# which was left out here, one per prompt, matrix and layer). The columns are
# [documented](../docs/sweeps.md#tables). `loss` is in nats; it is high because targets are wrong answers
# to questions that the model knows.

# %%
sweep.prompts()[["prompt", "text", "target", "answer", "is_correct", "loss"]].head(3).round(
    {"loss": 2}
)

# %% [markdown]
# And the first cells of the first prompt:

# %%
sweep.positions().drop(columns="projection").head(4).round({"norm": 3})

# %% [markdown]
# `norm` is the length of `delta_i`, the error that comes back to the matrix's output at that token: how
# strongly the token writes. `top_tokens` is the first word of what a step of gradient descent adds there
# (`-delta_i` through the Logit Lens: final norm, unembedding), and `target_rank` where the target stands
# in that list, 0 for the top of 3,072. In the first row of the table above the target is at the very
# end of it, and in the third, where the subject ends, on top.
#
# The tables are Parquet in a folder, so pandas, Polars and DuckDB read them without this package:

# %%
cells = pd.read_parquet(out / "positions", columns=["layer", "norm"])
len(cells), round(float(cells.norm.mean()), 3)

# %% [markdown]
# ## Two figures first
#
# Figures take the analyses' small tables. A *segment* is a part of the prompt around its subject. How
# strongly does each segment write, as a mean over its tokens? (Figures are plotly's by default;
# matplotlib's are pictures, which stay in a notebook's file.)

# %%
figures.norms_by_segment(analysis.norms_by_segment(sweep), backend="matplotlib")

# %% [markdown]
# The last token, and up to layer 4 the subject's last token. And where does the target stand in what is
# written there? The lines are medians over tokens, the bands go from quartile to quartile, and the top of
# the vocabulary is at the top.

# %%
figures.token_ranks_by_segment(analysis.token_ranks_by_segment(sweep), backend="matplotlib")

# %% [markdown]
# Where most is written the update writes the target, and nowhere else. At the last token there is
# nothing to ask: the median and both quartiles are on top in every layer. At the subject's last token
# the band is wider: some targets lead and some do not. That is the place to ask at.
#
# ## Which relation's targets are written earliest?
#
# A target *leads* if it is the first word of what the update adds. Here are the cells of the subject's
# last token, joined with our own column, and the share of prompts whose target leads, by layer. The
# standard error is that of a mean of independent prompts.

# %%
about = sweep.prompts().set_index("prompt")[["subject", "target"]].join(data.relation)
cells = sweep.positions().query("segment == 'last subject token' and not is_zero")
cells = cells.join(about, on="prompt")
cells["leads"] = (cells.target_rank == 0).astype(float)
cells["first"] = cells.top_tokens.str[0]
by_layer = cells.groupby("layer").leads.agg(["mean", "sem", "size"]).round(3)
by_layer.rename(columns={"mean": "target leads", "sem": "standard error", "size": "prompts"})

# %% [markdown]
# Two thirds from layer 0 on, a little less in layer 4, and none at all from layer 5 on. (The prompts are
# the same in all layers, so the standard error of a *difference* between layers is another one.) So
# "earliest" may be a poor question. By relation: how many of its targets ever lead, and
# what is the first layer in which they do, on average over those (relations with 20 prompts or more)?

# %%
earliest = cells[cells.leads == 1].groupby("prompt").layer.min()
print(
    f"{len(earliest)} of {len(about)} targets ever lead, {(earliest == 0).sum()} of them in layer 0"
)
summary = about.assign(layer=earliest).groupby("relation").layer
summary = summary.agg(prompts="size", ever="count", mean_first_layer="mean")
summary[summary.prompts >= 20].sort_values("mean_first_layer").round(2)

# %% [markdown]
# **A negative answer.** 394 of 424, 93 %, are there in layer 0, and no relation's mean is above 0.45.
# Nothing is written early or late; the error arrives in all layers below the reading at once. What does
# differ is *whether* a target leads: 31 of 33 countries, and 10 of 28 languages spoken in a place.
#
# ## How sure is that?
#
# The share in layer 0, by relation, with two bootstrap intervals of 95 %. One draws prompts with
# replacement, as if each were independent. The other draws *targets*, each with all of its prompts,
# because prompts with the same target may succeed or fail together. (2,000 draws each. With four targets
# the second one is rough.)

# %%
generator = np.random.default_rng(0)


def interval(group, unit):
    sums = group.groupby(unit).leads.agg(["sum", "size"]).to_numpy()
    drawn = sums[generator.integers(len(sums), size=(2000, len(sums)))].sum(axis=1)
    return np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]).round(2).tolist()


lowest = cells[cells.layer == 0]
shares = {
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
shares = pd.DataFrame(shares).T.sort_values("leads")
shares

# %% [markdown]
# As a picture, with a dot for the share itself:

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
places = np.arange(len(shares))
for unit, offset in (("prompts", -0.12), ("targets", 0.12)):
    low, high = np.array(shares[f"95 %, {unit}"].tolist()).T
    axes.hlines(places + offset, low, high, f"C{int(offset > 0)}", lw=2, label=f"95 %, {unit}")
axes.plot(shares.leads.tolist(), places, "ko", markersize=4)
axes.set_yticks(places, shares.index)
axes.set_xlabel("share of prompts whose target leads at the subject's last token, layer 0")
axes.legend(loc="lower right")
plt.close(figure)  # or it would be shown twice
figure

# %% [markdown]
# By prompts, the lowest relation and the highest are far apart, and `language_spoken` (0.18 to 0.50) is
# clear of `work_language` (0.62 to 0.92), although both ask for a language. By targets most intervals
# are wider, for `born_century` more than twice as wide, and those two nearly touch. So prompts are not
# independent: which target is asked for matters, and each relation asks for its own.
#
# ## The relation, or the target?
#
# Three relations ask for languages: of places, of people, of books. Shares by target, for targets that at
# least two of them have, and the number of prompts:

# %%
kinds = {"language_spoken": "places", "mother_tongue": "people", "work_language": "books"}
languages = lowest[lowest.relation.isin(kinds)]
languages = languages.assign(of=languages.relation.map(kinds))
by_target = languages.groupby(["target", "of"]).leads.agg(["mean", "size"]).unstack()
shared = by_target[by_target["size"].notna().sum(axis=1) >= 2]
shared.apply(lambda column: column.map("{:.2g}".format, na_action="ignore")).fillna("")

# %% [markdown]
# Read it row by row. " Norwegian", " Portuguese" and " Spanish" lead always, " Dutch" never, " Czech"
# once in eleven times, be it about a place or a person. (" Italian" and " English" are not like that.)
# The difference of two kinds, plainly and as a mean over the targets that both have, each counted once,
# with its standard error over targets:

# %%
share = by_target["mean"].reindex(columns=list(kinds.values()))
plain = languages.groupby("of").leads.mean().reindex(share.columns)
pairs = [("people", "places"), ("books", "people")]
differences = {
    f"{one} minus {other}": {
        "plain": plain[one] - plain[other],
        "matched": (share[one] - share[other]).mean(),
        "standard error": (share[one] - share[other]).sem(),
        "targets": int((share[one] - share[other]).count()),
    }
    for one, other in pairs
}
pd.DataFrame(differences).T.round(2).astype({"targets": int})

# %% [markdown]
# **The relation may well have been the target in disguise.** Differences of 0.23 and 0.24 shrink to 0.08,
# about one standard error or less. (With so few targets in common, the second would also fit the plain 0.24.) A cell of one prompt counts as much here as one of thirteen, so this
# is crude; but it is enough not to trust the plain averages. Without the column `target` in the same
# table nobody would have noticed.
#
# (These relations were picked after a look at all shares, because they ask for the same targets. So their
# plain differences are flattered by the choice, and all of this is exploration: a claim about relations
# would need prompts that were not looked at.)
#
# ## What stands in front?
#
# If " Dutch" never leads, what does? The first word of what the update adds, where it is not the target,
# in layer 0, over the same three relations:

# %%
behind = languages[languages.leads == 0]
in_front = behind.groupby(["target", "first"]).size().sort_values(ascending=False)
in_front.rename("prompts").head(10).reset_index()

# %% [markdown]
# For " Danish" it is " Copenhagen", for " Swedish" " Stockholm", for " Dutch" " Netherlands": eight of
# these ten rows are the language's country or capital. The update at the subject does not so much write
# the answer as move the subject to Denmark. In one prompt, layer by layer:

# %%
number = behind[behind["first"] == behind["first"].mode()[0]].prompt.iloc[0]
record = sweep.prompts().set_index("prompt").loc[number]
blt.backward_lens(model, record.text, record.target, matrices="W_out", prepend_bos=False)

# %% [markdown]
# The two columns say two things. In the last one it is " Danish" in every layer: what is *said* should
# change. In that of " Curry" it is " Copenhagen" in layers 0 to 3, and " Danish" only in layer 4: what
# the subject *is* should change. That is a reading of words, though, not a proof. This model was trained
# to gather a subject's attributes at just that token ([model
# card](../backward_lens_tl/facts_model/MODEL_CARD.md)), so it may be tidier here than elsewhere. A test
# would edit the one and ask for the other: the [editing notebook](editing.ipynb) has the tools.
#
# ## On many GPUs
#
# From a shell the same sweep is one command, and a launcher spreads it over processes, each with its own
# share of the shards. A stopped sweep resumes, also with another number of processes.
#
# ```sh
# backward-lens sweep --model gpt2 --data counterfact.json --out sweep
# accelerate launch --multi_gpu --num_processes 4 \
#     -m backward_lens_tl sweep --model gpt2 --data counterfact.json --out sweep
# ```
#
# `SweepConfig(memory=Memory(budget=...))` limits the memory of a shard, and
# `prompts=1000` takes a random choice of rows. In a script, `blt.sweep` does the same under either launcher.
#
# ## What next
#
# - [Sweeps](../docs/sweeps.md): every setting, column and reason.
# - [Analyses](../docs/analysis.md): ranks, norms, neurons and steps, each with a figure.
# - [The paper, figure by figure](the_paper.ipynb): the questions that the paper asked of such tables.
# - [Five minutes](five_minutes.ipynb) and [looking](looking.ipynb) for one prompt at a time.
#
# **Exercise.** Make the last table for `born_century` and `work_century`, whose targets are " nineteenth"
# and its like. They have no capital. A surprise to find oneself: what stands in front of " seventeenth"?
