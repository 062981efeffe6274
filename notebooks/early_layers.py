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
# # What the early layers are told
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/early_layers.ipynb)
#
# The Logit Lens reads a vector of any layer as if it belonged to the last one. The *Jacobian Lens* (Gurnee et al.
# 2026; in TransformerLens) first carries it there with an average Jacobian. This notebook reads gradients through
# it. You will learn which Jacobian belongs to which matrix, how to find out whether a model needs it, what it cannot
# see, and why a readable early layer proves less than it seems to.

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
# The model is a GPT-2 with 8 layers that ships with the package, as do its average Jacobians. All remarks about
# numbers and tokens are about this model. The Logit Lens reads its early layers well, so it shows how the method
# works and where it fails, but not its benefit. For that, run the notebook on SmolLM2: change the lines `model = ...`
# and `fit = ...`. This command fits the Jacobians on 32 texts, in less than an hour on one core
# ([more about fits](../docs/jacobian_lens.md#fit)); `fit` is then `"smollm2.pt"`:
#
# ```sh
# backward-lens fit-jacobian --model smollm2 --texts Salesforce/wikitext --prompts 32 --max-length 40 --out smollm2.pt
# ```

# %%
import pandas as pd
import torch

import backward_lens_tl as blt
from backward_lens_tl import analysis, figures

model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub
fit = "facts"  # for another model, the file of its Jacobian Lens, or its name on the hub
layers = range(model.cfg.n_layers)

# %% [markdown]
# ## One prompt, three readings
#
# The [model card](../backward_lens_tl/facts_model/MODEL_CARD.md#gradients) lists prompts with the layers in which
# the target leads the update of `W_out`. For this prompt, it leads in the upper layers only. The table has a switch
# for the three lenses: logit lens, normalized and jacobian lens.

# %%
prompt, target = "Jack Dorsey founded", " Apple"
lens = blt.jacobian_lens(fit)
result = blt.backward_lens(
    model,
    prompt,
    target,
    matrices=["W_V", "W_O", "W_out"],
    projection=("logit_lens", "normalized", lens),
)
result

# %% [markdown]
# `W_out` and `W_O` show the updates `-delta_i`, which gradient descent adds to their outputs. We start with `W_out`
# at the last token, and compare the three lenses with the *exact effect*: the prompt's own later layers carry the
# update to the logits, to first order. Its column shows the tokens whose logits increase most.

# %%
NAMES = {"logit_lens": "Logit Lens", "normalized": "normalized", lens.name: "through J_l"}
effects = analysis.exact_effects(model, prompt, target, matrices=["W_O", "W_out"], k=3)


def side_by_side(matrix):
    tokens = {
        NAMES[name]: [result.under(name).top_tokens(matrix, n, -1, k=3) for n in layers]
        for name in result.projections
    }
    exact = effects[effects["matrix"] == matrix]["top_tokens"].tolist()
    table = pd.DataFrame({**tokens, **({"exact effect": exact} if exact else {})})
    return table.map(lambda row: ", ".join(token.strip() for token in row)).rename_axis("layer")


side_by_side("W_out")

# %% [markdown]
# The exact effect has " Apple" first in every layer. The Logit Lens has it first from layer 5 on, and " physics"
# below. These are the places of the target as a figure:


# %%
def place_figure(matrix):
    ranks = {
        NAMES[name]: result.under(name).target_rank(matrix)[:, 0, -1].tolist()
        for name in result.projections
    }
    ranks["exact effect"] = effects[effects["matrix"] == matrix]["target_rank"].tolist()
    places = (1 + pd.DataFrame(ranks)).rename_axis("layer").reset_index()
    return figures.layer_lines(
        places.melt("layer", var_name="reading", value_name="place"),
        "place",
        "reading",
        title=f"{matrix}, last token: place of {target!r}",
        unit="place, 1 is the top",
        scale="log",
        backend="matplotlib",
    )


place_figure("W_out")

# %% [markdown]
# The normalized lens agrees with the Logit Lens in all layers. Through `J_l`, the target is as high or higher, but
# first only from layer 5 on, too.
#
# ## Why `J_l`
#
# Let `h_l` be the residual stream after block `l`, and `h_final` that after the last block. To first order, adding a
# vector `v` to `h_l` changes `h_final` by `J_p v`, where `J_p = d h_final / d h_l` is the Jacobian of the prompt. The
# Logit Lens assumes that it is the identity. The Jacobian Lens uses `J_l`, its average over positions and texts. So
# it reads `J_l (-delta_l)`: what the update adds to the *last* residual stream, on average.
#
# Does a model need it? These are the cosines between `J_l` and the identity, as vectors of their entries:

# %%
d_model = model.cfg.d_model
J = torch.stack(
    [*lens.jacobians.matrices.values(), torch.eye(d_model)]
)  # [layer, d_model, d_model]
cosines = [float(matrix.trace() / matrix.norm() / d_model**0.5) for matrix in J]
pd.Series(cosines, name="cosine with the identity").round(2).rename_axis("layer").to_frame().T

# %% [markdown]
# Here, `J_l` is nearly a multiple of the identity in all layers, so the two lenses have to be similar. (The model was
# trained to predict with the last layer's unembedding at a middle layer, which may be the reason.) In SmolLM2, the
# cosine is small in the lower layers. There, the Logit Lens reads vectors in the wrong basis.
#
# ### Which Jacobian for which matrix
#
# Every vector belongs to a point of the residual stream. From there, it is carried along the stream to the next
# output of a block, because only these have a Jacobian:
#
# | matrix of layer `l` | vector | its point in the stream | Jacobian | what is left out |
# |---|---|---|---|---|
# | `W_out` | `-delta_i` | output of block `l` | `J_l` | nothing |
# | `W_O` | `-delta_i` | after attention | `J_l` | the MLP of layer `l` |
# | `W_in`, `W_gate` | `x_i` | after attention | `J_l` | the MLP of layer `l` |
# | `W_Q`, `W_K`, `W_V` | `x_i` | output of block `l - 1` | `J_{l-1}` | nothing; in layer 0, which uses `J_0`, block 0 |
#
# The last block needs no Jacobian. (If attention and MLP are parallel, as in GPT-J, `W_in` uses `J_{l-1}` and nothing
# is left out for `W_O`.) The next cell repeats the reading of a middle layer by hand: multiply by one of the two
# Jacobians, then use the Logit Lens. Which of them gives the package's ranks of the target at all tokens?

# %%
layer = len(layers) // 2
middle = blt.backward_lens(model, prompt, target, matrices="all", layers=layer, projection=lens)
same = {}
for matrix in middle.matrices:
    sign = -1 if matrix in ("W_O", "W_out") else 1
    vectors = sign * middle.capture[matrix, layer].spanning_set[0].cpu()
    shown = middle.target_rank(matrix)[0, 0].cpu()
    same[matrix] = {
        name: torch.equal(blt.read_vectors(model, vectors @ J[n].T, target).target_rank, shown)
        for name, n in {"J_{l-1}": layer - 1, "J_l": layer}.items()
    }
pd.DataFrame.from_dict(same, orient="index").rename_axis("read through")

# %% [markdown]
# ## The attention side
#
# The inputs of `W_V` are what attention can move to other tokens. They come from the forward pass and do not depend on
# the target. At the last token:

# %%
side_by_side("W_V")

# %% [markdown]
# In layers 1 to 5, the Logit Lens shows words that often follow " founded", such as " by". Through `J_{l-1}`, these
# layers show companies, as both lenses do from layer 6 on. That looks like a success. Is it typical? We will count
# below. These are the updates of `W_O`:

# %%
side_by_side("W_O")

# %% [markdown]
# From layer 1 on, they are similar to those of `W_out`. In layer 0, the lenses show fragments of words, and the target
# is far from the top:

# %%
place_figure("W_O")

# %% [markdown]
# But the exact effect of this update has " Apple" first. Both lenses miss it. According to the table above, `J_0`
# leaves out the MLP of layer 0; the next section shows how much that is.
#
# ## One hundred prompts
#
# We take every sixth of the 600 records of the facts model, and keep the factors of the gradients.

# %%
records = blt.read_records("facts").rows[::6]
prompts, targets, answers, subjects = (
    [getattr(record, name) for record in records]
    for name in ("prompt", "target", "answer", "subject")
)
capture = blt.capture_gradients(
    model, prompts, blt.target_nll(targets, "first"), matrices=["W_V", "W_O", "W_out"]
)


def at(positions, matrix):
    """The vectors at one position per prompt, `[prompt, layer, d_model]`."""
    rows = range(len(prompts))
    found = [capture[matrix, n].spanning_set[rows, positions] for n in layers]
    return torch.stack(found, dim=1).cpu()


def times(matrices, vectors):
    return torch.einsum("lij,plj->pli", matrices, vectors)


# %% [markdown]
# ### How much of the effect does a reading see?
#
# Let `g` be the update of the last layer's `W_out` at the last token: minus the gradient at `h_final`. The backward
# pass computes `-delta_l = J_p^T g`. So if `v = -delta_l` is added, the loss falls, to first order, by
#
#     g . J_p v = (J_p^T g) . v = ||v||^2
#
# A reading that replaces `J_p` by the identity or by `J_l` sees `g . v` or `g . J_l v` of it. The table shows medians
# over prompts, as fractions of `||v||^2`. For `W_O`, the last column is the fraction that does not pass the MLP of
# the same layer: the inner product with the update of `W_out`, which is that of the block's output.

# %%
last = (capture.prompt_lengths - 1).tolist()
written, attended = -at(last, "W_out"), -at(last, "W_O")
g = written[:, -1:].expand_as(written)


def seen(vectors, update):
    inner = (vectors * update).sum(-1) / (update * update).sum(-1)
    return inner.double().quantile(0.5, dim=0).tolist()


fractions = {
    ("W_out", "Logit Lens"): seen(g, written),
    ("W_out", "through J_l"): seen(times(J.mT, g), written),
    ("W_O", "Logit Lens"): seen(g, attended),
    ("W_O", "through J_l"): seen(times(J.mT, g), attended),
    ("W_O", "past its own MLP"): seen(written, attended),
}
pd.DataFrame(fractions).round(2).rename_axis("layer")

# %% [markdown]
# The exact effect would be 1 everywhere. Except in layer 0 of `W_O`, the Logit Lens sees 0.78 or more of it. Below the
# last layer, `J_l` sees more than the Logit Lens in layer 4 only: if the identity is close, an average over other texts
# need not be closer. In layer 0 of `W_O`, both see 0.02, because nothing else avoids the MLP of this layer. So this
# update is not written in the basis of the last layer, nor in that of `h_0`: the first MLP has to turn it into the
# target. In all other layers, 0.88 or more avoids the MLP.
#
# ### What attention reads
#
# Is the prompt about Apple typical? The inputs of `W_V` should show the *true* answer, so we rank it, at the last token
# and at the subject's last token. The positions are in the tables of results, whose column `segment` needs the
# subjects. Later, we use these tables again.

# %%
early = list(layers[: len(layers) // 2])
by_token = blt.backward_lens(
    model,
    prompts,
    targets,
    matrices="W_out",
    layers=early,
    projection=("logit_lens", lens),
    multi_token="first",
    k=1,
)
cells = {NAMES[name]: by_token.under(name).to_df(subjects) for name in by_token.projections}
positions = {}
for segment in ("last token", "last subject token"):
    rows = cells["Logit Lens"].query("layer == 0 and segment == @segment")
    positions[segment] = rows.sort_values("prompt")["position"].tolist()


def ranks(vectors, wanted):
    each = [[token] * vectors.shape[1] for token in wanted]
    return blt.read_vectors(model, vectors, each, multi_token="first", k=1).target_rank


# %% [markdown]
# The median ranks of the true answer, where 0 is the top:

# %%
before = [max(n - 1, 0) for n in layers]
medians = {}
for segment, places in positions.items():
    inputs = at(places, "W_V")
    for name, vectors in {
        "Logit Lens": inputs,
        "through J_{l-1}": times(J[before], inputs),
    }.items():
        found = ranks(vectors, answers)
        medians[segment, name] = found.double().quantile(0.5, dim=0).tolist()
pd.DataFrame(medians).rename_axis("layer")

# %% [markdown]
# It is not typical. In layers 1 to 4, the average makes the ranks worse at both tokens, most of all at the last token,
# where they fall from 3 or 4 to as low as 67.5. It helps in layer 0, most of all at the subject's last token. One
# convincing prompt proves little. (An input `x_i` is also a harder case than an update: it is the whole normalized
# stream, not a small change, and `J_l` describes small changes.)
#
# ## Segments: what is the subject told?
#
# The gradient reaches the earlier tokens through attention. Does it tell the subject's last token something in early
# layers that the Logit Lens hides? The table shows the median rank of the target in the updates of `W_out`, in the
# lower half of the layers, for every segment of the prompts.

# %%
by_segment = {name: analysis.token_ranks_by_segment(table) for name, table in cells.items()}
order = by_segment["Logit Lens"]["segment"].unique()
pd.concat(
    {
        name: table.pivot(index="segment", columns="layer", values="median").loc[order]
        for name, table in by_segment.items()
    },
    axis=1,
)

# %% [markdown]
# At the last token and at the subject's last token, both lenses have the target at the top in all of these layers. The
# subject is told to become one whose answer is the target, and the Logit Lens hides nothing of it. At all other tokens,
# the target is far from the top under both lenses, and in layer 0 near the bottom of the 3,072 tokens, as if the update
# decreased it. Does it? This is the exact effect on the logits of the last token, for every tenth prompt and two layers
# (median ranks):

# %%
some = list(range(0, len(prompts), 10))
exact = analysis.exact_effects(
    model,
    [prompts[n] for n in some],
    [targets[n] for n in some],
    layers=[0, len(layers) // 4],
    positions=None,
    multi_token="first",
    k=1,
)
exact["prompt"] = exact["prompt"].map(some.__getitem__)
key = ["prompt", "layer", "position"]
compared = {name: table.set_index(key)["target_rank"] for name, table in cells.items()}
compared["exact effect"] = exact.set_index(key)["target_rank"]
compared["segment"] = cells["Logit Lens"].set_index(key)["segment"]
of_some = pd.DataFrame(compared).dropna().groupby(["layer", "segment"]).median()
of_some.unstack("layer").reindex(order)

# %% [markdown]
# It does not. In layer 0, the update raises the target more than nearly all other tokens, with a median rank of 58 or
# better in all segments. (That the target's probability rises is certain, because `delta_i` is its gradient. Its rank
# is not.) Both lenses miss this. `J_l` is close to the identity, the path from a position to itself. But an earlier
# token changes the answer only through later tokens of *this* prompt that attend to it.
#
# So the answer for this model is no: where the Logit Lens hides the target, `J_l` does, too. On SmolLM2, it is yes: in
# most of the lower half of its layers, `J_l` has the target near the top at the subject's last token, and the Logit
# Lens does not ([measured with controls](../docs/real-model.md#average-jacobians)).
#
# ## Controls
#
# Each control lacks one property of the reading: the Jacobian of the same layer (it has that of a layer half of the
# depth higher), any Jacobian (it has a random matrix `R_l` with the singular values of `J_l`), or the target of the
# same prompt (it has that of the next one).

# %%
generator = torch.Generator().manual_seed(0)


def rotation():
    gaussian = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].float()


R = torch.stack([rotation() @ matrix @ rotation() for matrix in J])
higher = [min(n + len(layers) // 2, len(layers) - 1) for n in layers]
others = [*targets[1:], targets[0]]


def shares(vectors, wanted=targets):
    found = ranks(vectors[:, early], wanted)
    near = {"top 1 %": found < model.cfg.d_vocab // 100, "first": found == 0}
    return pd.Series({name: 100 * each.double().mean().item() for name, each in near.items()})


# %% [markdown]
# The table shows the fraction of updates of `W_out`, in percent, that have the target among the top 1 % of the
# vocabulary, or first, in the lower half of the layers:

# %%
readings = {
    "Logit Lens": lambda update: shares(update),
    "through J_l": lambda update: shares(times(J, update)),
    "through J of a higher layer": lambda update: shares(times(J[higher], update)),
    "through a random matrix R_l": lambda update: shares(times(R, update)),
    "another prompt's target, through J_l": lambda update: shares(times(J, update), others),
}
updates = {segment: -at(places, "W_out") for segment, places in positions.items()}
pd.DataFrame(
    {
        name: pd.concat({segment: read(update) for segment, update in updates.items()})
        for name, read in readings.items()
    }
).T.round(1)

# %% [markdown]
# Through random matrices, and for the targets of other prompts, the target is hardly ever first, and seldom in the top
# 1 %. (9.2 % is more than chance: updates often raise the targets of other prompts, too.) But the Jacobian of another
# layer reads the updates as well as the layer's own. All Jacobians of this model are similar to each other and to the
# identity, so this control cannot tell them apart.
#
# ### What is circular
#
# The controls leave one question open. An update is `J_p^T g`, and `g` has the target in it, because the gradient at
# the logits is `p - onehot(target)`. Reading it gives `J_l J_p^T g`. If the prompt's Jacobian were the average one, this
# would be `J_l J_l^T g`, which never points away from `g`: their inner product is `||J_l^T g||^2`. The next table reads
# vectors that no backward pass through the blocks has computed; only `g` depends on the prompt.

# %%
made = times(J.mT, g)
circular = {
    "g": g,
    "J_l g": times(J, g),
    "J_l J_l^T g": times(J, made),
    "R_l R_l^T g": times(R, times(R.mT, g)),
}
pd.DataFrame({name: shares(vectors) for name, vectors in circular.items()}).T.round(1)

# %% [markdown]
# In nearly all of them, the target is first, even in `R_l R_l^T g`. (A rotation times its transpose is the identity, and
# `R_l` is nearly a multiple of a rotation, because `J_l` is nearly a multiple of the identity.) So no property of the
# early layers is needed to find the target in vectors that are made in this way. How similar are the true updates to
# `J_l^T g`? These are mean cosines:

# %%
cosines = {
    segment: torch.cosine_similarity(made, update, dim=-1).mean(0)
    for segment, update in updates.items()
}
cosines["last token, another prompt's g"] = torch.cosine_similarity(
    made.roll(1, 0), written, dim=-1
).mean(0)
pd.DataFrame(cosines).round(2).rename_axis("layer").T

# %% [markdown]
# At the last token, the cosine is 0.84 or more. At the subject's last token, it is 0.68 to 0.75 up to layer 4, although
# `J_l^T g` knows neither the subject nor where it is. This is about half of the squared norm. With the `g` of another
# prompt, the cosine is nearly 0. (From layer 5 on, later layers no longer read the subject, and the cosine is not
# positive.)
#
# ## What a readable early layer proves
#
# | observation | shows | does not show |
# |---|---|---|
# | the target leads through `J_l` | on average, later layers turn this update into the target, in other texts, too | that the layer knows the target: `g` has it, and `J_l^T` brings it to every layer |
# | it leads through `J_l`, but not in the Logit Lens | the layer writes in another basis than the last one | that `J_l` sees the whole effect: measure the fraction |
# | it does not lead | the average has no path to it | that there is no effect: see `W_O` of layer 0, and the other tokens |
# | it leads through the Jacobian of another layer, too | the bases of these layers are similar | that the layer's own Jacobian is needed |
#
# To show that an early layer is told something about *this* prompt, look at what its update contains beyond
# `J_l^T g`, or at the exact effect.
#
# ## Where to go from here
#
# - [The Jacobian Lens](../docs/jacobian_lens.md): files, published lenses, fits, and how many texts they need.
# - [SmolLM2 through average Jacobians](../docs/real-model.md#average-jacobians): more controls, which
#   `backward-lens reproduce early_layers` repeats on other models.
# - [What a readable token does not prove](../docs/limitations.md#early-layers-through-average-jacobians).
# - [Five minutes](five_minutes.ipynb): what the updates at the subject contain in addition to the target.
#
# **Exercise.** `J_0` leaves out the first MLP, and the updates of `W_O` in layer 0 cannot be read. Include it: carry the
# updates through it exactly, with `torch.func.jvp`, and read the result through `J_0`. How many targets are in the top
# 1 % before and after? Then run the notebook on SmolLM2. Which observations of the table above do you make there, and
# how much of the effect does `J_l` see in layers in which the target leads?
#
# <details><summary>The first part</summary>
#
# ```python
# name, rows = "blocks.0.hook_resid_mid", range(len(prompts))
# first = blt.capture_gradients(
#     model, prompts, blt.target_nll(targets), matrices="W_O", layers=0, hook_points=[name]
# )
# stream = first.hook_gradients[name].value[rows, last]
# update = -first["W_O", 0].vjps[rows, last]
# block = model.blocks[0]
#
#
# def after_mlp(stream):
#     return stream + block.mlp(block.ln2(stream[:, None]))[:, 0]
#
#
# _, after = torch.func.jvp(after_mlp, (stream,), (update,))
# for vectors in (update, after):
#     found = blt.read_vectors(model, vectors.detach().cpu() @ J[0].T, targets).target_rank
#     print((found < model.cfg.d_vocab // 100).double().mean())
# ```
#
# Before, about a quarter of the targets are in the top 1 %; after, nearly all of them.
#
# </details>
