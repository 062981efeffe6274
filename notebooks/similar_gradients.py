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
# # Similar gradients
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/similar_gradients.ipynb)
#
# Two facts have similar gradients if a step on one of them also teaches the other. This notebook compares the gradients
# of 240 facts and asks whether facts of the same relation are similar. It then finds the facts that help or hurt a new
# one, checks the prediction with real steps, and reads the gradient of a whole batch. The first answer
# is another example of a confounder, and permutation tests show it.

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
# The model is a GPT-2 with 8 layers that ships with the package and knows facts about people, places and
# works. All remarks about numbers and tokens below are about this model.

# %%
import json
from importlib.resources import files

import numpy as np
import pandas as pd

import backward_lens_tl as blt
from backward_lens_tl import analysis, editing, figures

pd.options.display.max_colwidth = 80
model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub

# %% [markdown]
# ## The gradients of 240 facts
#
# The package includes 600 facts in the format of CounterFact. We take 20 facts of each of the 12 relations that have as
# many, with their true answers, which the model knows. Each relation has several wordings.

# %%
path = files("backward_lens_tl") / "facts_model" / "records.json"
rows = [row["requested_rewrite"] for row in json.loads(path.read_text(encoding="utf-8"))]
facts = pd.DataFrame(
    {
        "prompt": [row["prompt"].replace("{}", row["subject"]) for row in rows],
        "target": [" " + row["target_true"]["str"] for row in rows],
        "relation": [row["relation_id"] for row in rows],
        "wording": [row["prompt"] for row in rows],
    }
)
ordered = facts.sort_values("relation", kind="stable").groupby("relation")
data = ordered.filter(lambda own: len(own) >= 20).groupby("relation").head(20)
data = data.reset_index(drop=True)
data.groupby("relation").agg(facts=("prompt", "size"), targets=("target", "nunique"))

# %% [markdown]
# One forward and one backward pass gives the gradients of all facts, as factors. `multi_token` is for other models,
# whose tokenizers may split a target.


# %%
def captured(prompts, targets):
    loss = blt.target_nll(list(targets), multi_token="first")
    return blt.capture_gradients(model, list(prompts), loss, prepend_bos=False)


capture = captured(data.prompt, data.target)
capture

# %% [markdown]
# The inner product of two gradients of a matrix follows from the factors, `(X_a X_b^T * D_a D_b^T).sum()`, so no gradient is
# ever a dense matrix. `similarity` sums it over all captured matrices; here these are `W_in` and `W_out` of the MLPs.
# The figure shows the cosines of the first 8 facts of each relation.

# %%
similarity = capture.similarity()
shown = data.index[data.groupby("relation").cumcount() < 8].tolist()
figures.similarity(similarity, data.relation, rows=shown, columns=shown, backend="matplotlib")

# %% [markdown]
# Most pairs of facts have a cosine near 0. There are blocks along the diagonal, but they contain negative cosines
# (orange) as well as positive ones (blue).
#
# ## Are facts of the same relation similar?
#
# The statistic is the mean cosine of pairs of the same relation, minus that of pairs of different relations. How large would it be by
# chance? Pairs are not independent, since each fact is in 239 of them. A permutation test takes this into account:
# it assigns the relations to the facts at random, 1,000 times, and computes the statistic each time.

# %%
cosine = similarity.cosine.cpu().numpy()
generator = np.random.default_rng(0)


def pairs_alike(labels):
    labels = np.asarray(labels)
    return labels[:, None] == labels


def difference(relations, among):
    same = pairs_alike(relations)
    return cosine[same & among].mean() - cosine[~same & among].mean()


different = ~np.eye(len(data), dtype=bool)
observed = difference(data.relation, different)
by_chance = [difference(generator.permutation(data.relation), different) for _ in range(1000)]
{
    "same minus other relation": round(float(observed), 4),
    "largest by chance": round(float(np.abs(by_chance).max()), 4),
}

# %% [markdown]
# Yes: the difference is many times larger than the largest one by chance. But facts of the same relation have more in
# common than the relation.
#
# ## Or facts with the same answer?
#
# Facts of one relation share a few targets, and some of the targets occur in several relations: three relations ask
# for languages, others for countries. The table separates the two.

# %%
same_relation, same_target = pairs_alike(data.relation), pairs_alike(data.target)
kinds = {
    "same target, same relation": same_target & same_relation & different,
    "same target, other relation": same_target & ~same_relation,
    "other target, same relation": ~same_target & same_relation,
    "other target, other relation": ~same_target & ~same_relation,
}
pd.DataFrame(
    {
        "mean cosine": {name: cosine[pairs].mean() for name, pairs in kinds.items()},
        "pairs": {name: pairs.sum() // 2 for name, pairs in kinds.items()},
    }
).round({"mean cosine": 3})

# %% [markdown]
# **It is the target.** Facts with the same target are similar, also if their relations differ. Facts of the same
# relation with *different* targets oppose each other: the answer to one of them is a wrong answer to the
# other, and a step that raises one lowers the other. The first statistic was the sum of both effects.
#
# Does the relation matter in addition? The second permutation test keeps the targets: it only looks at pairs with the
# same target, and it permutes relations among the facts of each target. Pairs with the same wording, which share
# most of their tokens, are left out.


# %%
def permuted_within(groups, labels):
    return labels.groupby(np.asarray(groups)).transform(generator.permutation)


among = same_target & ~pairs_alike(data.wording)
observed = difference(data.relation, among)
by_chance = [difference(permuted_within(data.target, data.relation), among) for _ in range(1000)]
{
    "same minus other relation, same target": round(float(observed), 4),
    "mean by chance": round(float(np.mean(by_chance)), 4),
    "largest by chance": round(float(np.max(by_chance)), 4),
}

# %% [markdown]
# It does: the difference is twice the largest one by chance. (The mean by chance is not 0, because some targets have
# more similar pairs than others and are asked by fewer relations.) So gradients have three parts: what the target
# needs, wherever it is asked; what the relation adds to it; and the competition of the answers to one question.
#
# ## In which layers?
#
# `by="layer"` gives a cosine for each layer.

# %%
by_layer = capture.similarity(by="layer").cosine.cpu().numpy()
table = pd.DataFrame(
    [
        {"layer": layer, "pairs": name, "cosine": np.nanmean(own[pairs])}
        for layer, own in zip(capture.layers, by_layer, strict=True)
        for name, pairs in kinds.items()
    ]
)
figures.layer_lines(
    table, "cosine", "pairs", title="Mean cosine of gradients", backend="matplotlib"
)

# %% [markdown]
# The order of the four kinds is the same in all layers, and layer 3 separates them most. Unrelated facts are
# orthogonal everywhere: the last line is at 0.
#
# ## Which facts help a new one?
#
# `most_similar` sorts the facts by the cosine with a query: those whose steps lower its loss, and those whose steps
# raise it. The query is the fact with the largest loss among those that we have not used.

# %%
unused = facts[~facts.prompt.isin(data.prompt)]
losses = captured(unused.prompt, unused.target).loss
query = unused.iloc[[int(losses.argmax())]]
asked = captured(query.prompt, query.target)
print(query.prompt.item(), query.target.item(), f"loss {losses.max():.3f}")
found = analysis.most_similar(capture, asked, k=4)
found.drop(columns="query").round({"cosine": 3, "inner": 4})

# %% [markdown]
# The facts that help are about other things in Germany, or have the same wording. Those that hurt are the close competitors:
# places that are in Austria, and German cities whose answer is " German", not " Germany". The list is short because facts of
# other kinds have no effect. The two facts about Austria have the largest inner products of all, since the model
# is less certain of them, so their gradients are longer.
#
# To first order, a step with learning rate `lr` on a fact changes the loss of the query by `-lr` times `inner`. Is this
# what really happens? We take a small step of SGD on each of these facts, on all matrices of the MLPs, and run the query
# again. The table has the changes of its loss in millionths.


# %%
def loss_after(prompt, target_id, lr):
    request = editing.EditRequest(prompt, target_id)
    step = editing.GradientStep("sgd", lr=lr, matrices="mlp", prepend_bos=False)
    with step(model, request).applied(model):
        return float(captured(query.prompt, query.target).loss)


lr, before = 0.001, float(asked.loss)
ids = capture.targets[found.prompt.tolist(), 0].tolist()
measured = [
    loss_after(prompt, token, lr) - before for prompt, token in zip(found.text, ids, strict=True)
]
changes = pd.DataFrame({"predicted": -lr * found.inner, "measured": measured})
changes.mul(1e6).round(1).set_index(found.text)

# %% [markdown]
# The predictions are exact to a few percent, in both directions, and a single fact about Innsbruck or Salzburg undoes more
# than all helpful ones add.
#
# ## What does a batch write?
#
# Now a batch that teaches something new: 12 facts, with three new targets. The gradient of their summed loss
# is still a sum of outer products, and `total()` keeps it as factors. Its singular vectors are the main directions of the update.

# %%
taught = data[data.relation == "citizenship"].head(12)
targets = np.repeat([" Russia", " Spain", " Japan"], 4).tolist()
batch = captured(taught.prompt, targets)
total = batch.total()
total["W_out", -2], total["W_out", -2].principal_directions(3)

# %% [markdown]
# `analysis.principal_directions` reads the directions of all layers. Of `W_out`, `top_tokens` are what the output
# gains for inputs along the direction, and `bottom_tokens` what it loses; `energy` is the share of the squared norm.

# %%
directions = analysis.principal_directions(model, batch, k=3, n_tokens=4)
columns = ["layer", "direction", "energy", "top_tokens", "bottom_tokens"]
directions.loc[directions.layer.isin(batch.layers[-4:]), columns].round({"energy": 2})

# %% [markdown]
# In each of these layers, the first direction has most of the energy and promotes the targets together, against tokens that do
# not name countries (in layers 4 and 6, Spain is not among its first four tokens). In layers 5 and 7, the second direction separates
# two targets: Spain against Japan. Not all of the smaller directions can be read: the third one of layer 5 cannot. `figures.principal_directions` shows which prompts contribute how much. Columns are the 12 prompts,
# labelled with their targets.

# %%
last = directions[directions.layer.isin(batch.layers[-4:])]
figures.principal_directions(last, targets, backend="matplotlib")

# %% [markdown]
# All prompts carry the first directions. The second one of layer 7 is carried by the prompts about Spain and
# Japan and hardly by those about Russia.
#
# The control has the same prompts and three other targets. If the directions read as the targets only because of the
# prompts, they would read as the first targets again.

# %%
control = captured(taught.prompt, np.repeat([" piano", " jazz", " basketball"], 4).tolist())
directions = analysis.principal_directions(model, control, k=3, n_tokens=4)
directions.loc[directions.layer.isin(batch.layers[-4:]), columns].round({"energy": 2})

# %% [markdown]
# The first directions read as the new targets. So those of `W_out` show what a batch teaches, without a look at its
# texts.
#
# - [Analyses](../docs/analysis.md#gradients-of-a-batch) describes the functions of this notebook.
# - Training batches of longer texts work in the same way: use `next_token_loss()` as the objective.
