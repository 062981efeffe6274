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
# # Attention backwards
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/attention_backwards.ipynb)
#
# In the forward pass a head moves information from one token to another. What does it do with the error
# that comes back? At the end you can read Reversed Attention, the attention map of the backward pass; you
# know which ranks the gradients of `W_Q`, `W_K`, `W_V` and `W_O` have, why a head that decides the answer
# may be invisible in that map, and what happens when the map is added to a forward pass.

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
# The model is a small GPT-2 of 8 layers with 4 heads each that ships in the package. All numbers below are
# about this model and this prompt.

# %%
import pandas as pd
import torch
from transformer_lens import patching

import backward_lens_tl as blt
from backward_lens_tl import figures, widgets

model = blt.load_model("facts")  # with a network: "gpt2", or any name on the Hugging Face hub
layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)

# %% [markdown]
# ## The error on its way through a head
#
# The prompt is about a place in Rome, and the target is " Paris", so the loss `-log p(" Paris")` is large
# and much error comes back. `matrices="attn"` has the lens read the four matrices of attention, and
# `hook_points` keeps the activations and gradients inside the heads.

# %%
prompt, target = "The Colosseum is in the city of", " Paris"
points = [f"blocks.{layer}.attn.hook_{name}" for layer in layers for name in ("pattern", *"qkvz")]
result = blt.backward_lens(model, prompt, target, matrices="attn", hook_points=points)
tokens = result.capture.str_tokens[0]
result.capture.loss.item()  # in nats; 0 is the best

# %% [markdown]
# Forward, a head mixes values with its pattern `A`: `z = A V`. Backward, the error `delta_z` at its output
# goes two ways. To the values it goes through the same pattern, transposed: `delta_v = A^T delta_z`. And to
# the pattern itself: `E = delta_z V^T` says for each pair of query and key how the loss would change if the
# query looked there a little more. The softmax turns that into a gradient at the scores, and divided by
# `sqrt(d_head)` this is **Reversed Attention** (Katz and Wolf, NAACL 2025):
#
#     RA = A * (E - rowsum(A * E)) / sqrt(d_head)
#
# With it, the errors at queries and keys are mixed as values are forward: `delta_q = RA K` and
# `delta_k = RA^T Q`. All of this can be checked on what the hooks have kept. The layer is the one with the
# largest Reversed Attention; errors are the largest anywhere in it, relative to the largest entry.

# %%
maps = torch.stack([result.reversed_attention(layer)[0] for layer in layers])  # [layer, head, q, k]
layer = int(maps.abs().amax(dim=(1, 2, 3)).argmax())
kept = {
    name: result.capture.hook_gradients[f"blocks.{layer}.attn.hook_{name}"]
    for name in ("pattern", *"qkvz")
}
A, Q, K, V = (kept[name].value[0] for name in ("pattern", "q", "k", "v"))
E = torch.einsum("qhd,khd->hqk", kept["z"].vjp[0], V)
by_formula = {
    "RA": (A * (E - (A * E).sum(-1, keepdim=True)) / model.cfg.d_head**0.5, maps[layer]),
    "delta_v": (torch.einsum("hqk,qhd->khd", A, kept["z"].vjp[0]), kept["v"].vjp[0]),
    "delta_q": (torch.einsum("hqk,khd->qhd", maps[layer], K), kept["q"].vjp[0]),
    "delta_k": (torch.einsum("hqk,qhd->khd", maps[layer], Q), kept["k"].vjp[0]),
}
pd.Series(
    {
        name: f"{((ours - autograd).abs().max() / autograd.abs().max()).item():.0e}"
        for name, (ours, autograd) in by_formula.items()
    },
    name=f"relative error, layer {layer}",
).to_frame()

# %% [markdown]
# Float32 rounds to 1e-7 of each term, so these are equal.
#
# ## The map of the forward pass and that of the backward pass
#
# All heads of this layer, at the prompt's last token, where the loss is. Above how much that token attends
# to each of the others, between 0 and 1; below Reversed Attention. An update *lowers* the loss, so it wants
# more attention where Reversed Attention is negative (orange), and less where it is positive (blue).

# %%
figures.layer_maps(
    {
        f"attention of layer {layer}, last token": A[:, -1],
        f"Reversed Attention of layer {layer}, last token": maps[layer][:, -1],
    },
    tokens,
    ["A", "RA"],
    rows="head",
    backend="matplotlib",
)

# %% [markdown]
# Heads 0 and 3 look at the last token of the landmark, with nearly all of their attention. The backward map
# has its largest entry elsewhere: head 2, which looks at " city" with 0.76, should look there even more
# (-0.06), and head 1 less at " is" (0.04). Each row of Reversed Attention sums to 0, because each row of
# the pattern sums to 1: attention can only be moved. What is missing in the lower map will be the point of
# this notebook: head 0 is white there, and head 3 nearly.
#
# (`layer_maps` returns a plotly figure unless it is asked for matplotlib, as all figures do. A picture
# stays in the file.) The widget has Reversed Attention for every query, not only the last; choose among the
# heads above it. Its colours have the same signs.

# %%
widgets.reversed_attention(result, layer=layer)

# %% [markdown]
# ## Rank laws
#
# A gradient is a sum of one outer product per token, so its rank is at most the number of tokens. The four
# matrices differ in how far they stay below. (A singular value counts if it is above 1e-5 of the largest.)

# %%
ranks = {
    matrix: [result.capture[matrix, n].rank(rtol=1e-5) for n in layers]
    for matrix in result.matrices
}
pd.DataFrame(ranks).rename_axis("layer").assign(tokens=len(tokens), heads=len(heads))

# %% [markdown]
# All in one table: `W_V` and `W_O` reach the number of tokens. `W_Q` stays one below, because the first
# token sees only itself and its scores have no gradient; `W_K` stays one below, because the scores'
# gradients of a query sum to 0 over its keys. In the last layer only the last token's error is left: rank 1
# for `W_Q` and `W_O`, and one per head for `W_K` and `W_V`. [Attention](../docs/attention.md#rank) has
# the reasons, and what rotary embeddings or grouped queries change.
#
# ## Which heads decide, and which does the error reach?
#
# Forward: `transformer_lens.patching` replaces the output of one head, at all tokens, by that of a clean
# prompt about Paris, and measures which share of the difference of the logits of " Paris" and " Rome" comes
# back. 0 is nothing and 1 all of it.

# %%
paris, rome = model.to_single_token(" Paris"), model.to_single_token(" Rome")


def difference(logits):
    return logits[0, -1, paris] - logits[0, -1, rome]


with torch.no_grad():
    logits, cache = model.run_with_cache(model.to_tokens("The Eiffel Tower is in the city of"))
    start, end = difference(model(result.capture.tokens)), difference(logits)
    patched = patching.get_act_patch_attn_head_out_all_pos(
        model,
        result.capture.tokens,
        cache,
        lambda logits: (difference(logits) - start) / (end - start),
    )

# %% [markdown]
# Backward, from the one capture above: the norms of the errors at a head's values and queries, over all
# tokens; and at the last token the norm of Reversed Attention, the largest attention, and the *range of E*:
# by how many nats, to first order, the loss would change if all attention went from one token to another.


# %%
def by_layer(name, read):
    points = [result.capture.hook_gradients[f"blocks.{n}.attn.hook_{name}"] for n in layers]
    return torch.stack([read(point) for point in points])


pattern = by_layer("pattern", lambda point: point.value[0])  # [layer, head, query, key], as maps
asked = by_layer("pattern", lambda point: point.vjp[0])  # E
numbers = {
    "patched": patched,
    "norm of delta_v": by_layer("v", lambda point: point.vjp[0].norm(dim=(0, 2))),
    "norm of delta_q": by_layer("q", lambda point: point.vjp[0].norm(dim=(0, 2))),
    "norm of RA": maps[:, :, -1].norm(dim=-1),
    "largest attention": pattern[:, :, -1].amax(-1),
    "range of E": asked[:, :, -1].amax(-1) - asked[:, :, -1].amin(-1),
}
table = pd.DataFrame(
    {name: values.flatten().tolist() for name, values in numbers.items()},
    index=[f"L{n}H{head}" for n in layers for head in heads],
)
best = table["patched"].abs().nlargest(3).index
table.loc[best].round(3)

# %% [markdown]
# Where do these three stand among all heads? 1 is the largest:

# %%
table.abs().rank(ascending=False).astype(int).loc[best].assign(heads=len(table))

# %% [markdown]
# Two heads of layer 5 bring back 0.49 and 0.44 of the difference: they read the landmark. Nowhere else would
# it matter more where a head looks: they are first and second in the range of `E`. And in Reversed Attention
# one of the two is the *last* of 32 heads, the other is 17th. The reason is the factor `A` in its formula,
# which is the softmax's: at an attention of 0.999 nothing moves any more. The error takes the other way, to
# the values, where these heads are among the first six.
#
# So Reversed Attention shows which heads can still be *turned*, not which ones matter. Over all heads, how
# far does each of these numbers sort them as patching does? (Spearman's rank correlation of absolute values:
# 1 is the same order, 0 none.)

# %%
table.abs().corr(method="spearman")["patched"].drop("patched").round(2).to_frame("with patching")

# %% [markdown]
# The order of Reversed Attention has nothing to do with that of patching, and that of the error at queries
# hardly anything. Errors at values sort the heads better, but far from well: a norm says how much could be
# written somewhere, and the heads that decide are few. As maps, by layer and head:

# %%
figures.layer_maps(
    {
        "patching the head's output": patched,
        "range of E at the last token": numbers["range of E"],
        "Reversed Attention at the last token": numbers["norm of RA"],
    },
    [str(head) for head in heads],
    ["share recovered", "nats", "norm of RA"],
    columns="head",
    backend="matplotlib",
)

# %% [markdown]
# Layer 5 tells it: what patching finds in heads 0 and 3 is where `E` is largest, and Reversed Attention has
# its maximum in their neighbour, head 2.
#
# ## Adding it to a forward pass
#
# `result.attention_patch(layer, scale)` is a hook that adds `scale` times Reversed Attention to the pattern.
# A negative scale is what an update would want. All layers at once, over a range of scales, with what first
# order foretells, and a control of the same size: each head gets the map of its neighbour in the same layer.

# %%
token = model.to_single_token(target)


def scored(hooks):
    with model.hooks(fwd_hooks=hooks), torch.no_grad():
        scores = model(result.capture.tokens)[0, -1].log_softmax(-1)
    return {"loss": -scores[token].item(), "rank": int((scores > scores[token]).sum())}


def neighbour_patch(layer, scale):
    added = scale * maps[layer].roll(1, dims=0)
    return f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: pattern + added


# %% [markdown]
# Losses are in nats, and the rank is the target's among all tokens, 0 at the top.

# %%
slope = (maps * asked).sum().item()
scales = [-30.0, -20.0, -10.0, -5.0, -1.0, 0.0, 1.0, 5.0, 10.0, 20.0]
foretold = [{"loss": result.capture.loss.item() + scale * slope} for scale in scales]
real = [scored([result.attention_patch(n, scale=scale) for n in layers]) for scale in scales]
control = [scored([neighbour_patch(n, scale) for n in layers]) for scale in scales]
columns = {"first order": foretold, "Reversed Attention": real, "its neighbour's": control}
pd.concat(
    {name: pd.DataFrame(rows, index=scales) for name, rows in columns.items()}, axis=1
).rename_axis("scale").round(2)

# %% [markdown]
# To first order the map is right: at scales of -1 and 1 the loss moves as foretold, to 8.53 and 11.06. At
# -20 " Paris" leads, with a loss of 0.33 nats in place of 9.81, and no weight was changed: attention alone
# was moved, mixing values of the same prompt's tokens. (First order is of no use by
# then: no loss is below 0.) At -30 the loss rises again. The opposite sign does the opposite, down to rank
# 2889 of 3072. The control, of the same size, never brings the target up: its loss falls to 6.30 at -30, but
# by then the rank is 21, worse than the 4 without any patch. A model that becomes unsure of its answer
# lowers any large loss.
#
# And this is no attention any more. What the map makes of the unpatched patterns:

# %%
pd.DataFrame(
    {
        "lowest entry": [(pattern + scale * maps).min().item() for scale in scales],
        "highest entry": [(pattern + scale * maps).max().item() for scale in scales],
        "mean sum of a row": [(pattern + scale * maps).sum(-1).mean().item() for scale in scales],
    },
    index=pd.Index(scales, name="scale"),
).round(2)

# %% [markdown]
# Rows still sum to 1, but at -20 entries lie between -0.37 and 2.04. No softmax gives that. It is a probe of
# which direction in the pattern leads to the target, not a thing that the model could do by itself.
#
# ## What it imprints on queries and keys
#
# `W_Q`, `W_K` and `W_V` read the residual stream, so an update imprints what was read, `x_i`, on them: the
# next time that something like `x_i` comes along, its query is moved by a multiple of `-delta_q`, that is of
# keys mixed by `-RA`, and its key by queries mixed by `-RA`. `W_O` writes to the residual stream: an update
# shifts its output by `-delta_i`. The lens puts the side of the residual stream into words: for `W_Q` and
# `W_O` at the last token, and for `W_K` at the token that the most decisive head looks at. (`W_V` reads what
# `W_K` reads, so its words are the same.)

# %%
source = int(pattern.flatten(0, 1)[table.index.get_loc(best[0]), -1].argmax())
read_at = {"W_Q": -1, "W_K": source, "W_O": -1}
pd.DataFrame(
    {
        f"{matrix} at {tokens[pos].strip()!r}": [
            ", ".join(word.strip() for word in result.top_tokens(matrix, n, pos, k=3))
            for n in layers
        ]
        for matrix, pos in read_at.items()
    }
).rename_axis("layer")

# %% [markdown]
# In layer 0 keys take in the token itself, "um" and tokens like it. From layer 1 to 6 they take in what the
# model knows about it: " Rome", " Italy". So what an update does to these keys, it does to the keys of
# whatever reads as Roman, not of the Colosseum alone. Queries take in what is expected next, from layer 1 on a
# mixture of Rome, Paris and the like, and from layer 6 on, behind the heads that read the landmark, the
# answer " Rome". Neither depends on the target: `x_i` is what the forward pass read, and the target is in
# the other factor, `delta_q` or `delta_k`, which has no words. `W_O` says the target itself, " Paris" in
# every layer but the first.
#
# The whole table, for every token:

# %%
result

# %% [markdown]
# ## What to try next
#
# - Attribution patching by head, biases, and the same factors head by head:
#   [Attention](../docs/attention.md).
# - Patches, attributions and norms at the same places of the residual stream:
#   [With activation patching](activation_patching.ipynb).
# - Reversed Attention is from Shahar Katz and Lior Wolf, NAACL 2025
#   ([arXiv 2412.17019](https://arxiv.org/abs/2412.17019)).
#
# **Exercise.** Does moving attention always suffice? Take `"Lionel Messi plays for"` with the same target, and
# look for the scale at which " Paris" leads. Then go back to the landmark and patch one layer at a time, with
# scales up to -100. Which layers can do it alone?
