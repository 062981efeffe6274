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
# In the forward pass, a head moves information between tokens. What happens in the backward pass? This notebook
# introduces Reversed Attention, the attention map of the backward pass. It shows the ranks of the gradients of
# `W_Q`, `W_K`, `W_V` and `W_O`, why a head that decides the answer may not appear in that map, and what happens
# if the map is added to the attention pattern.

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
# The model is a GPT-2 with 8 layers of 4 heads that ships with the package. All numbers below are about this
# model and this prompt.

# %%
import einops
import pandas as pd
import torch
from transformer_lens import patching

import backward_lens_tl as blt
from backward_lens_tl import figures, widgets

model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub
layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)

# %% [markdown]
# ## The gradient inside a head
#
# The prompt is about a place in Rome and the target is " Paris", so the loss `-log p(" Paris")` is large, and so
# are the gradients. `matrices="attn"` selects the four matrices of attention, and `hook_points` keeps the
# activations and gradients inside the heads: the pattern `A`, queries, keys, values and the heads' outputs `z`.
# (With rotary embeddings, queries and keys are rotated before they meet in the scores.)

# %%
prompt, target = "The Colosseum is in the city of", " Paris"
rotated = "rot_" if model.cfg.positional_embedding_type == "rotary" else ""
hooks = {"A": "pattern", "Q": f"{rotated}q", "K": f"{rotated}k", "V": "v", "z": "z"}
points = {(name, n): f"blocks.{n}.attn.hook_{hooks[name]}" for name in hooks for n in layers}
result = blt.backward_lens(model, prompt, target, matrices="attn", hook_points=[*points.values()])
tokens = result.capture.str_tokens[0]
result.capture.loss.item()  # in nats; 0 is the best

# %% [markdown]
# In the forward pass, a head mixes values with its pattern `A`: `z = A V`. In the backward pass, the gradient
# `delta_z` at its output takes two paths. The gradient of the values uses the transposed pattern:
# `delta_v = A^T delta_z`. The gradient of the pattern is `E = delta_z V^T`: for each query and key, it says how
# the loss would change with more attention to that key. The backward pass of the softmax turns `E` into the
# gradient at the attention scores. Divided by `sqrt(d_head)`, this is **Reversed Attention** (Katz and Wolf,
# NAACL 2025):
#
#     RA = A * (E - rowsum(A * E)) / sqrt(d_head)
#
# Reversed Attention mixes keys and queries like the pattern mixes values: `delta_q = RA K` and
# `delta_k = RA^T Q`. With grouped-query attention, a group of heads shares its keys and values, so `delta_k` and
# `delta_v` are sums over the heads of the group. (In this model, each head has its own.) The next cell checks all
# of this with the activations and gradients from the hooks, in the layer with the largest Reversed Attention. It
# shows the largest error relative to the largest entry.

# %%
maps = torch.stack([result.capture.reversed_attention(n)[0] for n in layers])  # [layer, head, q, k]
layer = int(maps.abs().amax(dim=(1, 2, 3)).argmax())
hooked = {name: result.capture.hook_gradients[points[name, layer]] for name in hooks}
A, Q, K, V = (hooked[name].value[0] for name in "AQKV")
delta_q, delta_k, delta_v, delta_z = (hooked[name].vjp[0] for name in "QKVz")
size = len(heads) // K.shape[1]  # heads in a group; here 1
K, V = (einops.repeat(each, "k group d -> k (group size) d", size=size) for each in (K, V))
E = torch.einsum("qhd,khd->hqk", delta_z, V)


def over_group(by_head):
    return einops.reduce(by_head, "k (group size) d -> k group d", "sum", size=size)


by_formula = {
    "RA": (A * (E - (A * E).sum(-1, keepdim=True)) / model.cfg.d_head**0.5, maps[layer]),
    "delta_v": (over_group(torch.einsum("hqk,qhd->khd", A, delta_z)), delta_v),
    "delta_q": (torch.einsum("hqk,khd->qhd", maps[layer], K), delta_q),
    "delta_k": (over_group(torch.einsum("hqk,qhd->khd", maps[layer], Q)), delta_k),
}
errors = {
    name: float((ours - autograd).abs().max() / autograd.abs().max())
    for name, (ours, autograd) in by_formula.items()
}
pd.Series(errors).map("{:.0e}".format).to_frame(f"relative error, layer {layer}")

# %% [markdown]
# The rounding of float32 is about 1e-7, so these are equal.
#
# ## Attention forward and backward
#
# The figure shows all heads of this layer at the prompt's last token, where the loss is: above, the attention to
# each token, between 0 and 1; below, Reversed Attention. An update *lowers* the loss, so it increases attention
# where Reversed Attention is negative (orange) and decreases it where it is positive (blue).

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
# Heads 0 and 3 attend almost only to the last token of the landmark. The largest entries of the backward map are
# in other heads: head 2, which attends to " city" with 0.76, should attend to it even more (-0.06), and head 1
# should attend less to " is" (0.04). Each row of Reversed Attention sums to 0, because each row of the pattern
# sums to 1. But head 0 is white in the lower map, and head 3 nearly so. The rest of this notebook explains why.
#
# (`layer_maps` returns a plotly figure by default, like all figures; a matplotlib figure is an image that is
# stored in the notebook.) The widget shows Reversed Attention for all queries. Select a head at the top. The
# colours have the same signs.

# %%
widgets.reversed_attention(result, layer=layer)

# %% [markdown]
# ## Ranks of the gradients
#
# A gradient is a sum of one outer product per token, so its rank is at most the number of tokens. Some of the
# four matrices have a lower rank. (Singular values above 1e-5 times the largest one are counted.)

# %%
ranks = {
    matrix: [result.capture[matrix, n].rank(rtol=1e-5) for n in layers]
    for matrix in result.matrices
}
pd.DataFrame(ranks).rename_axis("layer").assign(tokens=len(tokens), heads=len(heads))

# %% [markdown]
# `W_V` and `W_O` reach the number of tokens. `W_Q` has one less, because the first token attends only to itself
# and its scores have no gradient. `W_K` has one less, because the score gradients of a query sum to 0 over its
# keys. In the last layer, only the last token has a gradient: rank 1 for `W_Q` and `W_O`, and one per head for
# `W_K` and `W_V`. [Attention](../docs/attention.md#rank) explains this, and the effect of rotary embeddings and
# grouped-query attention.
#
# ## Which heads decide, and which have large gradients?
#
# Forward: `transformer_lens.patching` replaces the output of one head, at all tokens, by its output for a clean
# prompt about Paris. It measures the fraction of the logit difference between " Paris" and " Rome" that is
# recovered, from 0 (nothing) to 1 (all of it).

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
# Backward, from the single capture above: the norms of the gradients at a head's values and queries over all
# tokens; and, at the last token, the norm of Reversed Attention, the largest attention, and the *range of E*: by
# how many nats, to first order, the loss would change if all attention moved from one token to another. (Heads
# that share their values have the same norm at values.)


# %%
def by_layer(name, read):
    return torch.stack([read(result.capture.hook_gradients[points[name, n]]) for n in layers])


pattern = by_layer("A", lambda point: point.value[0])  # [layer, head, query, key], as maps
asked = by_layer("A", lambda point: point.vjp[0])  # E
at_values = by_layer("V", lambda point: point.vjp[0].norm(dim=(0, 2)))
numbers = {
    "patched": patched,
    "norm of delta_v": einops.repeat(at_values, "layer group -> layer (group size)", size=size),
    "norm of delta_q": by_layer("Q", lambda point: point.vjp[0].norm(dim=(0, 2))),
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
# The ranks of these three among all heads, where 1 is the largest:

# %%
table.abs().rank(ascending=False).astype(int).loc[best].assign(heads=len(table))

# %% [markdown]
# Two heads of layer 5 recover 0.49 and 0.44 of the difference: they read the landmark. Where they attend matters
# more than for any other head: they are first and second by the range of `E`. But by Reversed Attention, one of
# the two is the *last* of 32 heads and the other is 17th. The reason is the factor `A` in its formula, which
# comes from the softmax: at an attention of 0.999, the softmax is saturated and its gradient vanishes. The gradient takes
# the path through the values instead, where these heads are among the first six.
#
# So Reversed Attention shows where attention can still *change*, not which heads matter. How well does each of
# these quantities order all heads, compared with patching? (Spearman's rank correlation of absolute values: 1 is
# the same order, 0 is unrelated.)

# %%
table.abs().corr(method="spearman")["patched"].drop("patched").round(2).to_frame("with patching")

# %% [markdown]
# The order by Reversed Attention is unrelated to that by patching, and the order by gradients at queries nearly
# so. Gradients at values order the heads better, but far from well: a norm says how much a change could matter, and only
# a few heads decide. As maps, by layer and head:

# %%
figures.layer_maps(
    {
        "patching the head's output": patched,
        "range of E at the last token": numbers["range of E"],
        "Reversed Attention at the last token": numbers["norm of RA"],
    },
    [str(head) for head in heads],
    ["fraction recovered", "nats", "norm of RA"],
    columns="head",
    backend="matplotlib",
)

# %% [markdown]
# Layer 5 shows it best: patching finds heads 0 and 3, where `E` is largest, but Reversed Attention has its
# maximum in head 2.
#
# ## Adding Reversed Attention to a forward pass
#
# `result.capture.attention_patch(layer, scale)` returns a hook that adds `scale` times Reversed Attention to the pattern.
# An update corresponds to a negative scale. The next cells patch all layers at once over a range of scales, and
# compare with the first-order estimate and with a control of the same size, in which each head gets the map of
# the next head in the same layer.

# %%
token = model.to_single_token(target)


def scored(hooks):
    with model.hooks(fwd_hooks=hooks), torch.no_grad():
        scores = model(result.capture.tokens)[0, -1].log_softmax(-1)
    return {"loss": -scores[token].item(), "rank": int((scores > scores[token]).sum())}


def control_patch(layer, scale):
    added = scale * maps[layer].roll(1, dims=0)
    return f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: pattern + added


# %% [markdown]
# Losses are in nats, and the rank is that of the target among all tokens, 0 at the top.

# %%
slope = (maps * asked).sum().item()
scales = [-30.0, -20.0, -10.0, -5.0, -1.0, 0.0, 1.0, 5.0, 10.0, 20.0]
predicted = [{"loss": result.capture.loss.item() + scale * slope} for scale in scales]
real = [
    scored([result.capture.attention_patch(n, scale=scale) for n in layers]) for scale in scales
]
control = [scored([control_patch(n, scale) for n in layers]) for scale in scales]
columns = {"first order": predicted, "Reversed Attention": real, "control": control}
pd.concat(
    {name: pd.DataFrame(rows, index=scales) for name, rows in columns.items()}, axis=1
).rename_axis("scale").round(2)

# %% [markdown]
# The first-order estimate is right for small scales: at -1 and 1, the loss is 8.53 and 11.06, as predicted. At
# -20, " Paris" is the answer with a loss of 0.33 nats instead of 9.81. No weights were changed; only attention
# moved, between tokens of the same prompt. (The first-order estimate is useless by then, since no loss is below
# 0.) At -30, the loss rises again. The opposite sign does the opposite, down to rank 2889 of 3072. The control never
# brings up the target: its loss falls to 6.30 at -30, but the rank is 21, worse than 4 without a patch. A large
# loss falls whenever the model becomes less confident in its answer.
#
# The patched patterns are no longer valid attention. These are the entries for each scale, computed from the
# unpatched patterns:

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
# The rows still sum to 1, but at -20 the entries lie between -0.37 and 2.04, which no softmax produces. The
# patch shows which direction of the pattern leads to the target; the model cannot produce this pattern by itself.
#
# ## What is imprinted on queries and keys
#
# `W_Q`, `W_K` and `W_V` read the residual stream, so an update imprints their inputs `x_i`. For similar inputs,
# the query then changes by a multiple of `-delta_q`, which is a mixture of keys with weights `-RA`, and the key
# changes by a mixture of queries with weights `-RA`. `W_O` writes to the residual stream, and an update shifts
# its output by `-delta_i`. The lens projects the factor of width `d_model`: the table shows `W_Q` and `W_O` at
# the last token, and `W_K` at the token that the most decisive head attends to. (`W_V` has the same inputs as
# `W_K`, so its tokens are the same.)

# %%
source = int(pattern.flatten(0, 1)[table.index.get_loc(best[0]), -1].argmax())
read_at = {"W_Q": -1, "W_K": source, "W_O": -1}
pd.DataFrame(
    {
        f"{matrix} at {tokens[pos].strip()!r}": [
            ", ".join(token.strip() for token in result.top_tokens(matrix, n, pos, k=3))
            for n in layers
        ]
        for matrix, pos in read_at.items()
    }
).rename_axis("layer")

# %% [markdown]
# In layer 0, the input of the keys is the token itself, "um" and similar tokens. In layers 1 to 6, it is what the
# model knows about the landmark: " Rome", " Italy". So an update affects the keys of anything Roman, not only of
# the Colosseum. The inputs of queries are predictions of the next token: from layer 1 on a mixture of Rome, Paris
# and similar cities, and from layer 6 on, after the heads that read the landmark, the answer " Rome". Neither
# depends on the target, because `x_i` comes from the forward pass. The target is in the other factor, `delta_q`
# or `delta_k`, which cannot be projected to tokens. `W_O` shows the target itself, " Paris" in every layer except
# the first.
#
# The whole table, for every token:

# %%
result

# %% [markdown]
# ## Where to go from here
#
# - Attribution patching by head, biases, and the factors of each head: [Attention](../docs/attention.md).
# - Patches, attributions and norms at the residual stream:
#   [With activation patching](activation_patching.ipynb).
# - Reversed Attention: Shahar Katz and Lior Wolf, NAACL 2025
#   ([arXiv 2412.17019](https://arxiv.org/abs/2412.17019)).
#
# **Exercise.** Is moving attention always enough? Use `"Lionel Messi plays for"` with the same target, and look
# for the scale at which " Paris" is the answer. Then return to the landmark and patch one layer at a time, with
# scales up to -100. Which layers are sufficient alone?
