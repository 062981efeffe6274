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
# People look at a gradient before they compute with it. This notebook goes through the ways to do
# so: the table that a result shows by itself, CircuitsVis widgets beside it, figures, and tables
# for pandas. Nothing here asks for a network; every widget carries its JavaScript.

# %%
import backward_lens_tl as blt
from backward_lens_tl import figures, widgets

model = blt.load_facts_model()

# %% [markdown]
# ## The table
#
# Switch to the bottom tokens, to the normalized lens, or to linear colours above the tables. Point
# at a cell, or press Tab and then the arrow keys, for its ten tokens at either end.

# %%
result = blt.backward_lens(model, "Lionel Messi plays for", " Paris", matrices="all")
result

# %% [markdown]
# ## Widgets
#
# How strongly each token of the prompt writes into `W_out`, layer by layer: choose a layer, or point
# at a token for all of them.

# %%
widgets.norms(result)

# %% [markdown]
# The tokens themselves, at several positions side by side:

# %%
widgets.top_tokens(result)

# %% [markdown]
# Other numbers of the same table, one at a time:

# %%
widgets.quantities(result)

# %% [markdown]
# Attention has a backward pass, too. Reversed Attention is its map: where the error of one token goes
# on its way to earlier ones.

# %%
widgets.reversed_attention(result, layer=4)

# %% [markdown]
# ## Figures
#
# Figures are plotly's, for looking, or matplotlib's, for a paper. All of their numbers come from the
# result's tables.

# %%
figures.norms(result, backend="matplotlib")

# %%
figures.target_ranks(result, backend="matplotlib")

# %% [markdown]
# ## Tables and files
#
# `to_df` has one row per prompt, matrix, layer and position. `result.to_csv(path)` and
# `result.to_parquet(path)` write it, and `result.save(path)` writes the result with its gradients.

# %%
table = result.to_df(subject="Lionel Messi").query("matrix == 'W_out'")
table.pivot_table(index="layer", columns="segment", values="norm", sort=False).round(3)
