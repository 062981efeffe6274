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
# People look at a gradient before they compute with it. At the end you know the ways to do so, and which
# question each of them answers: the table that a result shows by itself, CircuitsVis widgets, figures for a
# paper, and tables for pandas and files. What the words mean is told in
# [five minutes](five_minutes.ipynb).

# %%
import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec

if find_spec("backward_lens_tl") is None:  # on Colab, say
    # What is installed stays as it is, so nothing that runs has to be restarted.
    kept = ("torch", "numpy", "transformers")
    pins = [f"{d.name}=={d.version}" for d in distributions() if d.name in kept]
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "backward-lens-tl[matplotlib]", *pins], check=True)

# %% [markdown]
# The model is a small GPT-2 of 8 layers that ships in the package and knows facts about people, places
# and companies. The remarks below are about this model. Nothing here asks for a network: every widget
# carries its JavaScript.

# %%
import backward_lens_tl as blt
from backward_lens_tl import figures, widgets

model = blt.load_model("facts")  # with a network: "gpt2", or any name on the Hugging Face hub

# %% [markdown]
# ## The table: what does each place write?
#
# The model says " Miami" to this prompt; the loss is `-log p(" Paris")`. The gradient of a weight matrix is a
# sum of `x_i^T delta_i` over tokens `i`: what the matrix read there, and the error that came back to its
# output. A cell shows one of these pairs by its most probable word, and by `||delta_i||` as its colour.
# `matrices="all"` takes those of attention, too.

# %%
result = blt.backward_lens(model, "Lionel Messi plays for", " Paris", matrices="all")
result

# %% [markdown]
# Six panels are many. The switches above the table choose one matrix, the bottom of the vocabulary, the
# normalized lens (which reads a vector's direction whatever its length), or linear colours. Point at a cell,
# or press Tab and then the arrow keys, for its ten tokens at either end.
#
# `W_Q`, `W_K` and `W_V` have the same words, but for dots: they read the same `x_i`, which an update adds to them or subtracts.
# `W_O` and `W_out` have what an update adds to their output. Both say " Paris" (with a star) at the last token,
# and up to layer 4 at " Messi", but for one row: layer 0 of `W_O`. Hold that row in mind. Words in italics
# are of vectors too short to tell; do not read much into them. A dot is a cell that adds nothing.
#
# ## Widgets: one question at a time
#
# How strongly does each token of the prompt write into `W_out`, layer by layer? Choose a layer, or point at a
# token for all of them.

# %%
widgets.norms(result)

# %% [markdown]
# In layer 0 the fullest blue is at " for", the last token; " Messi" and " plays" come next. From layer 5 on
# " for" is nearly alone.
#
# What do several positions say, side by side? Here are the ten words at either end of the vocabulary, by layer.
# Choose positions 1 to 5, to have the last token, too.

# %%
widgets.top_tokens(result, matrices="W_out")

# %% [markdown]
# In layer 0, " Messi" and " for" have " Paris" on top. Below it " Messi" has more of France: " France", " French",
# " Rodin", " Mbappe". " for" has fields of work instead: " painting", " philosophy", " physics". The other columns
# have no such plain reading.
#
# Other numbers of the same table, one at a time: norms, the target's rank (0 is the first of the vocabulary,
# so low is good), the score of the top word.

# %%
widgets.quantities(result)

# %% [markdown]
# The numbers at the tokens come as one points at them. Red marks what is negative, as scores may be.
#
# Attention has a backward pass, too. *Reversed Attention* is its map: by head, the gradient at the attention
# scores, divided by `sqrt(d_head)`. Row `i`, column `j` belongs to token `i` looking back at token `j`. Where
# it is negative, more attention would lower the loss; where it is positive, less. Here is the layer with the
# largest entry:

# %%
size = {layer: result.reversed_attention(layer).abs().max() for layer in result.layers}
widgets.reversed_attention(result, layer=max(size, key=size.get))

# %% [markdown]
# It is layer 0, and the largest entry, 0.067, is in head 3, from " for" back to " Messi". It is positive: to say
# " Paris", the last token should look *less* at " Messi" there. (Numbers are nats per unit of the score,
# up to that factor.)
#
# ## Figures: for a paper
#
# Every figure is plotly's by default, to point at. With `backend="matplotlib"` it is a picture that stays in
# a file and prints. All numbers come from the result's tables. First the norms of `W_out`, which the colours of
# the table show, on one scale:

# %%
figures.norms(result, backend="matplotlib")

# %% [markdown]
# The border between layers 4 and 5 at " Messi" is sharp: above it the error does not come back there.
#
# Then where the target stands in what each token writes to `W_out`'s output, by layer: 1 is the first of the
# vocabulary, on top.

# %%
figures.target_ranks(result, backend="matplotlib")

# %% [markdown]
# " for" has " Paris" first in all layers, and " Messi" up to layer 4. The others are not indifferent: in
# the lower layers they have it among the last of the 3072, as if they were to write anything else. This
# figure does not say why. (In layer 6 most are in the middle. There their vectors are so short that the
# table has them in italics.)
#
# ## Tables and files: to compute with
#
# `to_df` has one row per prompt, matrix, layer and position, with norms, ranks and words. With a subject it
# also tells the part of the prompt that a token belongs to, as the paper's figures divide it. Mean
# `||delta_i||` of `W_out` by layer and part:

# %%
table = result.to_df(subject="Lionel Messi", matrix="W_out")
table.pivot_table(index="layer", columns="segment", values="norm", sort=False).round(2).iloc[::-1]

# %% [markdown]
# Up to layer 4 the subject's last token has more than half of what the prompt's last token has, and the
# subject's other tokens about a tenth or less. Parts of prompts are what makes prompts of different lengths comparable.
#
# `result.to_csv(path)` and `result.to_parquet(path)` write the table, `result.save_html(path)` the page, and
# `result.save(path)` the whole result with its gradients, which `blt.BackwardLensResult.load(path)` reads
# without the model.
#
# ## A surprise to find yourself
#
# In which cell of all six panels is `||delta_i||` largest? Guess first: which matrix, which layer, which token?

# %%
largest = result.to_df().nlargest(4, "norm")
largest["words"] = largest.top_tokens.str[:6].str.join(",")
largest[["matrix", "layer", "token", "norm", "words"]].round(2)

# %% [markdown]
# Not at the last token, and not near the answer: what attention writes in layer 0, at " Messi", counts some 16
# times as much as the cells of `W_out` that say " Paris" at the last token. One reason is plain. The residual stream is still as short there as
# the embedding, and the norm in front of the MLP divides by its length, so that any nudge is a large one.
#
# The other half is for you. This is the one row without a star, and its words are names, of people that the
# prompt does not mention. Who are they, and why would *they* be written where the name " Messi" is put
# together? Then take the target " Lakers" in the place of " Paris", and look at the same cell.
#
# <details><summary>Who they are</summary>
#
# In the facts that this model knows, Hakimi plays for Paris, and Truffaut, Sartre, Piaf and Degas were born
# there. With " Lakers" the cell has " James", who plays for the Lakers, " Durant", another American who plays
# basketball, and Americans who play the piano. The gradient would put another name in the place of Messi's.
#
# </details>
#
# ## Where to go from here
#
# - [Looking at a result](../docs/looking.md): all widgets, figures and files with their options.
# - [Attention](../docs/attention.md): heads, and a patch with Reversed Attention.
# - [Analyses](../docs/analysis.md) and [sweeps](../docs/sweeps.md): the same tables over thousands of prompts.
# - [Editing a fact with one forward pass](editing.ipynb): write what the table says.
