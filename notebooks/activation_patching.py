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
# # With activation patching
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/activation_patching.ipynb)
#
# TransformerLens's own patching and the Backward Lens, on the same two prompts and at the same places.
# At the end you know what each of them measures, how far one backward pass foretells all the patches,
# where it fails and why, and what a gradient looks like in a model that is being patched.

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
# The model is a small GPT-2 of 8 layers that ships in the package and knows facts about people,
# places and companies. All numbers below are about this model and these two prompts.

# %%
import pandas as pd
import torch
from transformer_lens import patching

import backward_lens_tl as blt
from backward_lens_tl import figures

model = blt.load_model("facts")  # with a network: "gpt2", or any name on the Hugging Face hub
layers = range(model.cfg.n_layers)

# %% [markdown]
# ## Two prompts, one number
#
# The *clean* prompt has the answer that we look for, the *corrupt* one another; they have the same
# number of tokens. The number is the difference of two logits, " Paris" minus " Rome". The lens's
# objective is the same number, so that gradients and patches measure one thing: an update raises the
# difference, and the loss is minus the difference. `hook_points` makes each run keep the activations and
# gradients that we will need: the residual stream before each block, and what its attention and its MLP
# add to it.

# %%
prompts = {
    "clean": "The Eiffel Tower is in the city of",
    "corrupt": "The Colosseum is in the city of",
}
objective = blt.logit_difference(" Paris", " Rome")
kinds = ("resid_pre", "attn_out", "mlp_out")
points = [f"blocks.{layer}.hook_{kind}" for kind in kinds for layer in layers]
clean, corrupt = (
    blt.backward_lens(model, prompt, objective=objective, hook_points=points)
    for prompt in prompts.values()
)
pd.DataFrame(
    {
        "prompt": prompts.values(),
        "answer": [model.to_string(run.capture.answers) for run in (clean, corrupt)],
        "logit difference": [round(-run.capture.loss.item(), 2) for run in (clean, corrupt)],
    },
    index=list(prompts),
)

# %% [markdown]
# The model knows both. Between the two runs the difference changes by some 21 logits, and all effects
# below are shares of that.
#
# ## Patching: what if this one activation were the clean one?
#
# `transformer_lens.patching` runs the corrupt prompt once per layer, token and kind of activation, each
# time with that one vector taken from the clean run. 0: the patch changes nothing. 1: it brings the
# whole difference back.

# %%
paris, rome = model.to_single_token(" Paris"), model.to_single_token(" Rome")
gap = (clean.capture.loss - corrupt.capture.loss).item()


def recovered(logits):
    loss = logits[0, -1, rome] - logits[0, -1, paris]
    return (loss - corrupt.capture.loss[0]) / gap


with torch.no_grad():
    _, clean_cache = model.run_with_cache(clean.capture.tokens)
    patched = {
        kind: getattr(patching, f"get_act_patch_{kind}")(
            model, corrupt.capture.tokens, clean_cache, recovered
        )
        for kind in kinds
    }

# %% [markdown]
# `figures.layer_maps` draws any numbers by layer and token. (It returns a plotly figure, as all figures
# do by default; `backend="matplotlib"` gives a picture, which stays in the file.) Where the prompts
# differ, the clean prompt's token is in brackets.

# %%
tokens = [
    here if here == there else f"{here} ({there.strip()})"
    for here, there in zip(*(run.capture.str_tokens[0] for run in (corrupt, clean)), strict=True)
]
share = "share recovered"
figures.layer_maps(
    {f"patching {kind}": effect for kind, effect in patched.items()},
    tokens,
    share,
    backend="matplotlib",
)

# %% [markdown]
# From top to bottom: the residual stream carries the landmark at its last token up to layer 5, and at
# the prompt's last token from layer 6 on. Attention of layer 5 moves it, 0.92 in a single vector. And
# what it moves was written by the MLP of layer 0 at the landmark's last token, 0.88. (A smaller part, some
# 0.15, is at the prompt's last token from layer 1 on: the pale column on the right. Layer 0 brings it.) The two columns in
# front of the first different token are exactly 0: both runs are the same there. A share above 1, as 1.05
# in front of layer 6, goes beyond the clean run.
#
# ## One backward pass at the same places
#
# The lens has run the corrupt prompt forward and backward *once*. Two maps come out of that. The *VJP*
# `delta_i`, the gradient of the objective at an activation, has a norm: how strongly the objective
# would answer a small change there. (At the MLP's output it is the colour of the lens's table.) And
# *attribution patching* is the first-order guess of a patch: `(x_clean - x_corrupt) . delta_i`.


# %%
def by_layer(kind, read):
    return torch.stack([read(f"blocks.{layer}.hook_{kind}") for layer in layers])


here, there = corrupt.capture.hook_gradients, clean.capture.hook_gradients
change = corrupt.attribution(clean)
attributed = {kind: by_layer(kind, lambda name: change[name][0] / gap) for kind in kinds}
norm = {kind: by_layer(kind, lambda name: here[name].vjp[0].norm(dim=-1)) for kind in kinds}
step = {
    kind: by_layer(kind, lambda name: (there[name].value - here[name].value)[0].norm(dim=-1))
    for kind in kinds
}

# %% [markdown]
# One below the other for the MLPs' outputs, patching on top:

# %%
figures.layer_maps(
    {
        "patching mlp_out": patched["mlp_out"],
        "attribution of mlp_out": attributed["mlp_out"],
        "norm of the VJP at mlp_out": norm["mlp_out"],
    },
    tokens,
    [share, share, "norm of δ_i"],
    backend="matplotlib",
)

# %% [markdown]
# Attribution is nearly the map of patches. The norms are another picture. They are largest at the
# prompt's last token in *every* layer, where the patches of layers 1 to 5 recover less than 0.01, and
# they are not 0 in the columns in which the runs do not differ at all. That is no error: a norm says how
# much could be written at a place, in the best direction, and knows nothing of the other prompt.
#
# ## In numbers
#
# A rank correlation (Spearman) asks whether two quantities sort the cells alike: 1 is the same order, 0
# none. Cells in which the runs are equal, or to which no error comes back, are 0 for everyone and are
# left out. Between norm and attribution stands the product `||x_clean - x_corrupt|| ||delta_i||`, which
# is how large an attribution could be if the two vectors pointed the same way.

# %%
cells = pd.DataFrame(
    {
        "kind": kind,
        "layer": layer,
        "position": position,
        "token": token,
        "patched": patched[kind][layer, position].item(),
        "attributed": attributed[kind][layer, position].item(),
        "norm": norm[kind][layer, position].item(),
        "norm x distance": (norm[kind] * step[kind])[layer, position].item(),
    }
    for kind in kinds
    for layer in layers
    for position, token in enumerate(tokens)
)
cells = cells[cells["attributed"] != 0]
sizes = cells[["patched", "attributed", "norm", "norm x distance"]].abs()
orders = sizes.groupby(cells["kind"], sort=False).corr(method="spearman")["patched"].unstack()
orders[["attributed", "norm x distance", "norm"]].assign(cells=cells["kind"].value_counts()).round(
    2
)

# %% [markdown]
# Attribution sorts the cells nearly as patching does, for MLPs best of all. Each thing that is taken
# away costs: without the angle between the two vectors, and then without the distance of the two runs,
# the order gets worse, and the norm alone knows little of what patching finds.
#
# ## Where first order is wrong
#
# The five cells in which attribution and patching are furthest apart:

# %%
cells["missed"] = cells["patched"] - cells["attributed"]
furthest = cells.sort_values("missed", key=abs, ascending=False)
furthest.head(5)[["kind", "layer", "token", "patched", "attributed", "missed"]].set_index(
    "kind"
).round(2)

# %% [markdown]
# The largest is the residual stream in front of layer 0, at the landmark's last token: attribution
# foretells 0.50 of the difference, and the patch brings back 0.86. Two blocks further up the miss is
# less than half of that. In all five, attribution promises too little.
#
# Why? Attribution draws a straight line with the slope at the corrupt run. If the path from one
# activation to the other bends, the line misses, and a patch of only a part of the way shows it:
# `x_corrupt + alpha (x_clean - x_corrupt)`. A hook sets it, and the lens, which runs under any hook,
# gives the slope at that very point. The second place is the same token behind block 0.


# %%
def part_of_the_way(name, position, alpha):
    def patch(activation, hook):
        activation = activation.clone()
        activation[:, position] = start + alpha * (end - start)
        return activation

    start, end = (run[name].value[0, position] for run in (here, there))
    return name, patch


def slope_at(name, position, alpha):
    with model.hooks(fwd_hooks=[part_of_the_way(name, position, alpha)]):
        run = blt.capture_gradients(model, prompts["corrupt"], objective, hook_points=[name])
    way = (there[name].value - here[name].value)[0, position]
    slope = way @ run.hook_gradients[name].vjp[0, position]
    recovered = (run.loss - corrupt.capture.loss).item() / gap
    return {"recovered": recovered, "slope": slope.item() / gap}


# %% [markdown]
# Nine points of each way. `recovered` is the share of the difference that is back there, and `slope` how
# fast it grows, as a share per whole way.

# %%
worst = furthest.iloc[0]
names = [f"blocks.{layer}.hook_{worst.kind}" for layer in (worst.layer, worst.layer + 1)]
alphas = [eighth / 8 for eighth in range(9)]
walks = {
    name: pd.DataFrame([slope_at(name, worst.position, alpha) for alpha in alphas], index=alphas)
    for name in names
    if name in here  # the last layer has none behind it
}
pd.concat(walks, axis=1).rename_axis("alpha").round(2)

# %% [markdown]
# The path is an S, not a line. `slope` at alpha 0 is the attribution, 0.50 in front of block 0. Behind the
# middle it reaches 1.38, and at the end it is back at 0.58: the model changes its mind on the way, and
# attribution asks at the beginning. A straight line would be right if all slopes were equal. Behind
# block 0 they differ less, from 0.61 to 1.04, and less is missed. So a good part of the bend is block 0
# itself, where the landmark's last token meets those before it, and the rest is what comes later.
#
# The mean of the slopes is the whole effect, up to the coarseness of nine points. (These are
# *integrated gradients*, at nine backward passes for one cell. Patching needs one forward pass.)

# %%
pd.DataFrame(
    {
        name: {
            "attribution": walk["slope"].iloc[0],
            "mean slope": torch.trapezoid(torch.tensor(walk["slope"].to_numpy()), dx=1 / 8).item(),
            "patching": walk["recovered"].iloc[-1],
        }
        for name, walk in walks.items()
    }
).T.round(3)

# %% [markdown]
# ## The lens under a patch
#
# Hooks act on the run that the lens reads, so it can be asked what a gradient wants to write in a model
# that *is* patched. The patch is the one of attention or MLP that recovers most.

# %%
best = cells[cells["kind"] != "resid_pre"].sort_values("patched", key=abs).iloc[-1]
patch = part_of_the_way(f"blocks.{best.layer}.hook_{best.kind}", best.position, 1.0)
with model.hooks(fwd_hooks=[patch]):
    rerouted = blt.backward_lens(model, prompts["corrupt"], objective=objective)
best[["kind", "layer", "token", "patched"]].to_frame("the patch")

# %% [markdown]
# How strongly each place writes into `W_out`, without the patch and with it:

# %%
figures.layer_maps(
    {"corrupt": corrupt.norms("W_out")[:, 0], "patched": rerouted.norms("W_out")[:, 0]},
    tokens,
    "norm of δ_i of W_out",
    backend="matplotlib",
)

# %% [markdown]
# The objective is a difference of logits, whose gradient at the logits is the same in both runs, so what
# changed is the *way back*. At the landmark's last token the norms of layers 0 to 4 fall from 0.7 to 0.06
# and less: the patched vector is a constant, and what attention of layer 5 had read at that token to make
# it no longer counts. The prompt's last token keeps most of its norm, 0.73 to 0.83. So the dark column
# above was one road for the error, and a patch closes it. What other roads there are, the lens shows.
#
# Now with the loss that the lens takes by default, `-log p(" Paris")`, in nats:

# %%
before = blt.backward_lens(model, prompts["corrupt"], " Paris")
with model.hooks(fwd_hooks=[patch]):
    after = blt.backward_lens(model, prompts["corrupt"], " Paris")
pd.DataFrame(
    {
        "loss": [run.capture.loss.item() for run in (before, after)],
        "answer": [model.to_string(run.capture.answers) for run in (before, after)],
        "largest norm": [run.norms("W_out").max().item() for run in (before, after)],
        "median rank of the target": [
            run.target_rank("W_out")[:, 0, -1].median().item() for run in (before, after)
        ],
        "the same, normalized": [
            run.under("normalized").target_rank("W_out")[:, 0, -1].median().item()
            for run in (before, after)
        ],
    },
    index=["corrupt", "patched"],
).round(4)

# %% [markdown]
# One patched vector makes the model say " Paris", at a loss of 0.0006 nats in place of 9.8, and with the
# loss goes the gradient: the largest norm of `W_out` falls from 1.03 to 0.0003. The median rank over the
# layers (0 is the top) is of the prompt's last token. The lens of the patched run, as a table:

# %%
after

# %% [markdown]
# In the upper half the patch can be seen: from layer 5 on, what the MLPs read at the last token is " Paris",
# while at the landmark's last token it is " Rome" still.
#
# In the lower half there is nothing left to write. The lens still has a word for each cell, and the note below the table
# says what to think of it: the words of `W_out` are in italics, because vectors as short as these tell
# the Logit Lens more of the final norm's bias than of themselves, and so the target's median rank is 22.
# The *normalized* lens reads the direction alone: there the target still leads, without any force
# behind it.
#
# ## What each of them is for
#
# | | asks | needs | says nothing about |
# |---|---|---|---|
# | patching | what did this activation *do* for the difference between two runs? | a second prompt, one run per cell | what else could change the answer |
# | attribution | the same, guessed from the slope at one run | a second prompt, one backward pass | what bends on the way |
# | norm of `delta_i` | how strongly does the gradient *write* here? | one prompt, one backward pass | where the information is |
# | the lens | *what* does it write here, in words? | the same | whether it would be enough |
#
# So do not read a dark cell of the lens as "here the fact is": the last token is dark in every layer,
# because whatever is added there reaches the answer, and the patches of most of those cells do nothing.
# And do not read a patch without effect as "here nothing can be written".
#
# ## What to try next
#
# - The same for heads, in their forward and their backward pass:
#   [Attention backwards](attention_backwards.ipynb).
# - `attribution` by head, `to_cache` and the hook points: [Attention](../docs/attention.md).
# - More figures and tables of a result: [Looking at a result](../docs/looking.md).
#
# **Exercise.** Turn it round: capture the *clean* prompt with `blt.target_nll(" Paris")`, and ask
# `clean.attribution(corrupt)` which activation of the corrupt run would hurt most, in nats. Then do
# that patch and look at the loss. Before you run it, write down by which factor you expect the two to
# differ; the last table has all you need to guess why.
