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
# This notebook compares TransformerLens's activation patching with the Backward Lens, on the same prompts and
# activations. It shows what each of them measures, how well one backward pass predicts the effects of all
# patches, where and why it fails, and what gradients look like in a patched model.

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
# companies. All numbers below are about this model and these two prompts.

# %%
import pandas as pd
import torch
from transformer_lens import patching

import backward_lens_tl as blt
from backward_lens_tl import figures

model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub
layers = range(model.cfg.n_layers)

# %% [markdown]
# ## Two prompts and a logit difference
#
# The *clean* prompt has the answer " Paris", the *corrupt* prompt another one; both have the same number of
# tokens. The metric is a logit difference, " Paris" minus " Rome". The lens uses the same quantity as its
# objective, so that gradients and patches measure the same thing: an update raises the difference, and the
# loss is minus the difference. With `hook_points`, each run keeps the activations and gradients that we need
# below: the residual stream before each block, and the outputs of its attention and its MLP.

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
# The model knows both answers. The logit difference changes by about 21 between the two runs, and all effects
# below are fractions of this change.
#
# ## Patching: replace one activation by the clean one
#
# `transformer_lens.patching` runs the corrupt prompt once per layer, token and kind of activation, each time
# with that one vector taken from the clean run. 0 means that the patch has no effect, 1 that it recovers the
# whole difference.

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
# `figures.layer_maps` plots any values by layer and token. (It returns a plotly figure by default, like all
# figures; `backend="matplotlib"` returns an image that is stored in the notebook.) Where the prompts differ,
# the token of the clean prompt is in parentheses.

# %%
tokens = [
    one if one == other else f"{one} ({other.strip()})"
    for one, other in zip(*(run.capture.str_tokens[0] for run in (corrupt, clean)), strict=True)
]
recovery = "fraction recovered"
figures.layer_maps(
    {f"patching {kind}": effect for kind, effect in patched.items()},
    tokens,
    recovery,
    backend="matplotlib",
)

# %% [markdown]
# From top to bottom: the residual stream carries the landmark at its last token up to layer 5, and at the
# prompt's last token from layer 6 on. Attention of layer 5 moves it; a single vector recovers 0.92. The MLP of
# layer 0 writes what it moves, at the landmark's last token; this vector recovers 0.88. (A smaller fraction,
# about 0.15, is at the prompt's last token from layer 1 on, the pale column on the right. Layer 0 moves it
# there.) The two columns before the first different token are exactly 0, because the runs are equal
# there. Fractions above 1, such as 1.05 before layer 6, go beyond the clean run.
#
# ## One backward pass at the same activations
#
# The lens ran the corrupt prompt forward and backward *once*. This gives two maps. The norm of the *VJP*
# `delta_i`, the gradient of the objective at an activation, says how much the objective responds to a small
# change there. (At the output of the MLP, it is the colour of the lens's table.) *Attribution patching* is
# the first-order estimate of a patch: `(x_clean - x_corrupt) . delta_i`.


# %%
def by_layer(kind, read):
    return torch.stack([read(f"blocks.{layer}.hook_{kind}") for layer in layers])


at_corrupt, at_clean = corrupt.capture.hook_gradients, clean.capture.hook_gradients
change = corrupt.capture.attribution(clean.capture)
attributed = {kind: by_layer(kind, lambda name: change[name][0] / gap) for kind in kinds}
norm = {kind: by_layer(kind, lambda name: at_corrupt[name].vjp[0].norm(dim=-1)) for kind in kinds}
step = {
    kind: by_layer(
        kind, lambda name: (at_clean[name].value - at_corrupt[name].value)[0].norm(dim=-1)
    )
    for kind in kinds
}

# %% [markdown]
# The maps for the MLP outputs, with patching at the top:

# %%
figures.layer_maps(
    {
        "patching mlp_out": patched["mlp_out"],
        "attribution of mlp_out": attributed["mlp_out"],
        "norm of the VJP at mlp_out": norm["mlp_out"],
    },
    tokens,
    [recovery, recovery, "norm of δ_i"],
    backend="matplotlib",
)

# %% [markdown]
# Attribution is close to the map of patches. The norms differ. They are largest at the prompt's last token in
# *every* layer, where the patches of layers 1 to 5 recover less than 0.01, and they are not 0 in the columns in
# which the runs are equal. This is not an error: a norm says how much a change in the best direction would
# matter, and does not depend on the other prompt.
#
# ## Rank correlations
#
# Spearman's rank correlation measures whether two quantities order the cells in the same way: 1 is the same
# order, 0 is unrelated. Cells in which the runs are equal, or which receive no gradient, are 0 for all
# quantities and are excluded. The product `||x_clean - x_corrupt|| ||delta_i||` lies between the norm and the
# attribution: it is the attribution for two vectors that point in the same direction.

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
# Attribution orders the cells nearly as patching does, best of all for MLPs. The order gets worse without the
# angle between the two vectors, and worse again without the distance between the two runs. The norm alone says
# little about the effects of patches.
#
# ## Where the first-order estimate is wrong
#
# The five cells in which attribution and patching differ most:

# %%
cells["missed"] = cells["patched"] - cells["attributed"]
furthest = cells.sort_values("missed", key=abs, ascending=False)
furthest.head(5)[["kind", "layer", "token", "patched", "attributed", "missed"]].set_index(
    "kind"
).round(2)

# %% [markdown]
# The largest difference is at the residual stream before layer 0, at the landmark's last token: attribution
# predicts 0.50 of the difference, and the patch recovers 0.86. Two blocks further up, the error is less than
# half of that. In all five cells, attribution underestimates the effect.
#
# Why? Attribution extrapolates linearly from the slope at the corrupt run. To see how the effect bends, we patch
# partway: `x_corrupt + alpha (x_clean - x_corrupt)`. A hook sets this activation, and the lens, which keeps your
# hooks active, computes the slope there. We do the same at this token after block 0.


# %%
def interpolated(name, position, alpha):
    def patch(activation, hook):
        activation = activation.clone()
        activation[:, position] = start + alpha * (end - start)
        return activation

    start, end = (run[name].value[0, position] for run in (at_corrupt, at_clean))
    return name, patch


def slope_at(name, position, alpha):
    with model.hooks(fwd_hooks=[interpolated(name, position, alpha)]):
        run = blt.capture_gradients(model, prompts["corrupt"], objective, hook_points=[name])
    direction = (at_clean[name].value - at_corrupt[name].value)[0, position]
    slope = direction @ run.hook_gradients[name].vjp[0, position]
    recovered = (run.loss - corrupt.capture.loss).item() / gap
    return {"recovered": recovered, "slope": slope.item() / gap}


# %% [markdown]
# The table has nine points on each path. `recovered` is the fraction of the difference that is recovered there,
# and `slope` is its derivative with respect to alpha.

# %%
worst = furthest.iloc[0]
names = [f"blocks.{layer}.hook_{worst.kind}" for layer in (worst.layer, worst.layer + 1)]
alphas = [eighth / 8 for eighth in range(9)]
paths = {
    name: pd.DataFrame([slope_at(name, worst.position, alpha) for alpha in alphas], index=alphas)
    for name in names
    if name in at_corrupt  # no block follows the last layer
}
pd.concat(paths, axis=1).rename_axis("alpha").round(2)

# %% [markdown]
# The path is S-shaped. The `slope` at alpha 0 is the attribution, 0.50 before block 0. It reaches 1.38 past
# the middle and is back at 0.58 at the end. The model's answer flips on the way, and attribution only sees the
# start. The linear estimate would be exact if all slopes were equal. After block 0 they vary less, from 0.61
# to 1.04, and the error is smaller. So a large part of the nonlinearity is in block 0 itself, where the
# landmark's last token attends to those before it, and the rest is in later blocks.
#
# The mean of the slopes is the whole effect, up to the resolution of nine points. (These are *integrated
# gradients*, at nine backward passes per cell. Patching needs one forward pass.)

# %%
pd.DataFrame(
    {
        name: {
            "attribution": path["slope"].iloc[0],
            "mean slope": torch.trapezoid(torch.tensor(path["slope"].to_numpy()), dx=1 / 8).item(),
            "patching": path["recovered"].iloc[-1],
        }
        for name, path in paths.items()
    }
).T.round(3)

# %% [markdown]
# ## The lens under a patch
#
# Because hooks stay active, you can also run the lens on a patched model and see what a gradient would write
# there. We use the patch of attention or MLP outputs that recovers most.

# %%
best = cells[cells["kind"] != "resid_pre"].sort_values("patched", key=abs).iloc[-1]
patch = interpolated(f"blocks.{best.layer}.hook_{best.kind}", best.position, 1.0)
with model.hooks(fwd_hooks=[patch]):
    under_patch = blt.backward_lens(model, prompts["corrupt"], objective=objective)
best[["kind", "layer", "token", "patched"]].to_frame("the patch")

# %% [markdown]
# The norms at `W_out`, without and with the patch:

# %%
figures.layer_maps(
    {"corrupt": corrupt.norms("W_out")[:, 0], "patched": under_patch.norms("W_out")[:, 0]},
    tokens,
    "norm of δ_i of W_out",
    backend="matplotlib",
)

# %% [markdown]
# The objective is a logit difference, whose gradient at the logits is the same in both runs. So the changes come
# from the *backward path*. At the landmark's last token, the norms of layers 0 to 4 fall from 0.7 to 0.06 and
# less: the patched vector is a constant, so the inputs that attention of layer 5 read at that token no longer
# matter. At the prompt's last token, most of the norm remains, 0.73 to 0.83. So the dark column above was
# one path of the gradient, and the patch blocks it. The lens shows which paths remain.
#
# Next, the lens's default loss, `-log p(" Paris")`, in nats:

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
# With one patched vector, the model answers " Paris", at a loss of 0.0006 nats instead of 9.8. The gradient
# shrinks with the loss: the largest norm of `W_out` falls from 1.03 to 0.0003. The median rank over the layers
# is for the prompt's last token; 0 is the top. This is the table of the patched run:

# %%
after

# %% [markdown]
# The patch is visible in the upper half: from layer 5 on, the inputs of the MLPs at the last token are
# " Paris", while at the landmark's last token they are still " Rome".
#
# In the lower half, there is nothing left to write. The lens still shows a token in each cell, as the note
# below the table explains. The tokens of `W_out` are in italics because for such short vectors, the logit lens
# mostly shows the final norm's bias. Therefore the target's median rank is 22. The *normalized* lens projects
# only the direction, and still has the target on top, although the norm is almost zero.
#
# ## Summary
#
# | | question | needs | does not show |
# |---|---|---|---|
# | patching | what is the *effect* of this activation on the difference between two runs? | a second prompt, one run per cell | what else could change the answer |
# | attribution | the same, estimated from the slope at one run | a second prompt, one backward pass | nonlinear effects |
# | norm of `delta_i` | how strongly does the gradient *write* here? | one prompt, one backward pass | where the information is |
# | the lens | *which tokens* does it write here? | the same | whether the update would suffice |
#
# So a dark cell of the lens does not mean "the fact is here": the last token is dark in every layer because
# anything added there reaches the answer, and the patches of most of these cells have no effect. And a patch
# without effect does not mean "nothing can be written here".
#
# ## Where to go from here
#
# - The same for heads, in the forward and the backward pass:
#   [Attention backwards](attention_backwards.ipynb).
# - `attribution` by head, `to_cache` and hook points: [Attention](../docs/attention.md).
# - More figures and tables: [Looking at a result](../docs/looking.md).
#
# **Exercise.** Reverse the roles: capture the *clean* prompt with `blt.target_nll(" Paris")`, and use
# `clean.capture.attribution(corrupt.capture)` to find the activation of the corrupt run that would raise the loss most, in nats.
# Then run that patch and look at the loss. Before you do, estimate the factor by which the two will differ; the
# last table tells you why.
