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
# # Looking at gradients
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/looking.ipynb)
#
# This notebook shows the views of a result and the question that each of them answers: the layers x tokens
# table, CircuitsVis widgets, figures, and tables for pandas and files. For an introduction to the lens,
# see [five minutes](five_minutes.ipynb).

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
# companies. All remarks below are about this model. The notebook works offline, because every widget
# includes its JavaScript.

# %%
import backward_lens_tl as blt
from backward_lens_tl import figures, widgets

model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub

# %% [markdown]
# ## The table: what does each place write?
#
# The model's answer to this prompt is " Miami", and the loss is `-log p(" Paris")`. The gradient of a weight
# matrix is a sum of `x_i^T delta_i` over tokens `i`, where `x_i` is the input of the matrix and `delta_i` the
# gradient at its output. A cell shows the top token of one of these vectors, and `||delta_i||` as its colour.
# `matrices="all"` includes the matrices of attention.

# %%
result = blt.backward_lens(model, "Lionel Messi plays for", " Paris", matrices="all")
result

# %% [markdown]
# Use the controls above the table to select one matrix, the bottom of the vocabulary, the normalized lens
# (which projects the direction of a vector, whatever its norm), or a linear colour scale. Hover over a cell, or press
# Tab and then the arrow keys, for its ten top and bottom tokens.
#
# `W_Q`, `W_K` and `W_V` show the same tokens, except for dots, because they read the same `x_i`. For `W_O` and
# `W_out`, the tokens are what an update adds to the output. Both show " Paris" (with a star) at the last token,
# and up to layer 4 at " Messi", except for one row: layer 0 of `W_O`. We will come back to that row. Tokens in
# italics come from very short vectors; do not interpret them. A dot is a cell that does not contribute.
#
# ## Widgets: one question at a time
#
# How large is the gradient at each token for `W_out`? Select a layer, or hover over a token to see all layers.

# %%
widgets.norms(result)

# %% [markdown]
# In layer 0 the norm is largest at " for", the last token, followed by " Messi" and " plays". From layer 5 on,
# nearly all of it is at " for".
#
# What are the top tokens at several positions? This widget shows the ten top and bottom tokens by layer.
# Select positions 1 to 5 to include the last token.

# %%
widgets.top_tokens(result, matrices="W_out")

# %% [markdown]
# In layer 0, " Messi" and " for" both have " Paris" on top. The next tokens at " Messi" are about France:
# " France", " French", " Rodin", " Mbappe". Those at " for" are fields of work: " painting", " philosophy",
# " physics". The other columns have no such clear interpretation.
#
# Other quantities of the same table, one at a time: norms, the rank of the target (0 is the top of the vocabulary),
# and the score of the top token.

# %%
widgets.quantities(result)

# %% [markdown]
# Hover over a token to see its value. Red marks negative values, which scores may have.
#
# Attention has a backward pass, too. *Reversed Attention* is its attention map: for each head, the gradient at
# the attention scores, divided by `sqrt(d_head)`. Row `i` and column `j` belong to the query at token `i` and
# the key at token `j`. Where it is negative, more attention would lower the loss; where it is positive, less
# attention would. This is the layer with the largest entry:

# %%
size = {layer: result.capture.reversed_attention(layer).abs().max() for layer in result.layers}
widgets.reversed_attention(result, layer=max(size, key=size.get))

# %% [markdown]
# The largest entry, 0.067, is in head 3 of layer 0, from " for" to " Messi". It is positive: to predict
# " Paris", the last token should attend *less* to " Messi" there. (The unit is nats per unit of the score, up to
# the factor.)
#
# ## Figures: for a paper
#
# Every figure is interactive (plotly) by default. With `backend="matplotlib"` it is an image that is stored in the
# notebook. The numbers come from the tables of the result. First the norms of `W_out`, on one scale:

# %%
figures.norms(result, backend="matplotlib")

# %% [markdown]
# The norm at " Messi" drops sharply between layers 4 and 5.
#
# Next, the rank of the target in what each token adds to the output of `W_out`, by layer. The top of the figure is
# rank 1, the top of the vocabulary.

# %%
figures.target_ranks(result, backend="matplotlib")

# %% [markdown]
# At " for", " Paris" is on top in all layers, and at " Messi" up to layer 4. At the other tokens, it is among the
# last of the 3072 tokens in the lower layers, so the update avoids it there. This figure does not show why. (In
# layer 6 most of them are in the middle. Their vectors are so short that the table shows them in italics.)
#
# ## Tables and files: for further analysis
#
# `to_df` has one row per prompt, matrix, layer and position, with norms, ranks and tokens. If you pass a subject,
# it also has the segment of each token, as in the paper's figures. These are mean norms `||delta_i||` of `W_out` by
# layer and segment:

# %%
table = result.to_df(subject="Lionel Messi", matrix="W_out")
table.pivot_table(index="layer", columns="segment", values="norm", sort=False).round(2).iloc[::-1]

# %% [markdown]
# Up to layer 4, the norm at the subject's last token is more than half of that at the prompt's last token, and
# at the subject's other tokens about a tenth or less. Segments make prompts of different lengths comparable.
#
# `result.to_csv(path)` and `result.to_parquet(path)` write the table, and `result.save_html(path)` writes the page.
# `result.save(path)` writes the whole result with its gradients, and `blt.BackwardLensResult.load(path)` reads it
# without the model.
#
# ## Try it yourself
#
# In which cell of all six panels is `||delta_i||` largest? Guess the matrix, the layer and the token first.

# %%
largest = result.to_df().nlargest(4, "norm")
largest["top tokens"] = largest.top_tokens.str[:6].str.join(",")
largest[["matrix", "layer", "token", "norm", "top tokens"]].round(2)

# %% [markdown]
# It is neither at the last token nor near the answer. The output of attention in layer 0 at " Messi" has a norm of
# about 16 times that of the cells of `W_out` that show " Paris" at the last token. There is a simple reason: the
# residual stream there still has the small norm of the embedding, and the layer norm before the MLP divides by
# its scale, so a small change has a large effect.
#
# The tokens are a question for you. This is the one row without a star, and its tokens are names of people that
# the prompt does not mention. Who are they, and why would the update write *them* where the name " Messi" is
# assembled? Then replace the target by " Lakers" and look at the same cell.
#
# <details><summary>Who they are</summary>
#
# In the facts that this model knows, Hakimi plays for Paris, and Truffaut, Sartre, Piaf and Degas were born
# there. With " Lakers", the cell has " James", who plays for the Lakers, " Durant", another American basketball
# player, and American pianists. The gradient replaces Messi's name by another one.
#
# </details>
#
# ## Where to go from here
#
# - [Looking at a result](../docs/looking.md): all widgets, figures and files with their options.
# - [Attention](../docs/attention.md): heads, and a patch with Reversed Attention.
# - [Analyses](../docs/analysis.md) and [sweeps](../docs/sweeps.md): the same tables over thousands of prompts.
# - [Editing a fact with one forward pass](editing.ipynb): write what the table shows.
