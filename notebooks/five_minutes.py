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
# # Five minutes with the Backward Lens
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/five_minutes.ipynb)
#
# A forward pass computes a model's answer. A backward pass computes how each weight should change to
# make another answer more likely. The Backward Lens projects these changes to tokens. After this
# notebook you can read its table, and you know why there is a minus sign and what an *imprint* is.

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
# The model is a GPT-2 with 8 layers that ships with the package and knows facts about people, places
# and companies. All remarks about numbers and tokens below are about this model.

# %%
import pandas as pd

import backward_lens_tl as blt

model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub

# %% [markdown]
# ## The model's answer and a target
#
# Without a target, the lens uses the model's own most probable answer.

# %%
prompt = "Lionel Messi plays for"
blt.backward_lens(model, prompt).target()

# %% [markdown]
# Suppose that the model should say " Paris" instead. The loss is `-log p(" Paris")` after the prompt, in
# nats. Its gradient for a weight matrix is a sum with one outer product `x_i^T delta_i` per token: `x_i`
# is the input of the matrix at token `i`, and `delta_i` is the gradient at its output. So the whole
# gradient consists of a few pairs of vectors. One vector of each pair has the width of the residual
# stream, so the logit lens (final norm, then unembedding) can project it to tokens.

# %%
result = blt.backward_lens(model, prompt, " Paris")
result

# %% [markdown]
# Rows are layers, columns are tokens, and each cell shows the top token of one term of the sum. The
# colour is the norm `||delta_i||`.
#
# - `W_out` (bottom) is the second matrix of the MLP. Its cells project `-delta_i`, which an update
#   **adds to the output** of the MLP.
# - `W_in` (top) is the first matrix. Its cells project `x_i`, the **input** of the MLP at that token.
#   What an update does with it is explained below.
#
# Look at the last column of `W_out`: it shows " Paris" in every layer, because the gradient at the last
# token reaches all layers. This is the rank of the target in that column, from layer 0 up, where 0 is the
# top of the vocabulary:

# %%
result.target_rank("W_out")[:, 0, -1].tolist()

# %% [markdown]
# Hover over a cell for its ten top and bottom tokens. Dots are cells that do not contribute: in the last
# layer, earlier tokens can no longer affect the answer. Tokens in italics come from very short vectors,
# for which the lens mostly shows the final norm's bias; do not interpret them.
#
# ## Why the minus sign?
#
# The gradient of the loss with respect to the logits is `p - onehot(target)`, so the target is the only
# token with a *negative* entry. The raw gradient ranks it last. Gradient descent subtracts the gradient,
# so the update ranks it first. The table shows the update, `-delta_i`; `direction="gradient"` shows the
# raw gradient, as in the paper. These are the same ranks for the raw gradient, and the vocabulary size:

# %%
raw = blt.backward_lens(model, prompt, " Paris", direction="gradient")
raw.target_rank("W_out")[:, 0, -1].tolist(), model.cfg.d_vocab

# %% [markdown]
# ## What is an imprint?
#
# Column `j` of `W_in` determines what neuron `j` responds to. Its update is `-sum_i delta_i[j] x_i`, a
# combination of the inputs `x_i`. If the coefficient of an input is positive, the neuron will respond more
# to this input; if it is negative, less. This is the imprint: inputs are added to or subtracted from
# neurons.
#
# These are the coefficients `-delta_i[j]` of every token, for the three neurons of an upper layer that
# change most:

# %%
layer = result.layers[-2]
gradient = result.capture["W_in", layer]
neurons = gradient.neuron_norms().topk(3).indices
shares = -gradient.vjps[0][:, neurons.to(gradient.vjps.device)].T
table = pd.DataFrame(shares.cpu(), index=neurons.tolist(), columns=result.capture.str_tokens[0])
table.round(2) + 0.0  # no -0.0

# %% [markdown]
# Nearly all of the change comes from the last token, and the neuron that changes most has a negative
# coefficient. What will it respond less to? These are the top tokens of `x_i` there:

# %%
result.top_tokens("W_in", layer, pos=-1, k=5)

# %% [markdown]
# The top token is " Miami", the old answer. The first neuron will fire less on this input, and the other two more. (What
# these neurons write depends on `W_out`.)
#
# In the table of `W_in`, " Miami" appears in the last column in layer 5. What does the MLP read earlier,
# at Messi's name? These are the top tokens of each layer at the last token of the subject:

# %%
cells = result.to_df(subject="Lionel Messi", matrix="W_in")
subject = cells[cells.segment == "last subject token"]
subject.set_index("layer").top_tokens.str[:5].str.join(",").to_frame("x_i says").iloc[::-1]

# %% [markdown]
# Layer 0 reads the name and similar names. From layer 1 on, the tokens are what the model knows about
# Messi: his sport, position, team, language and birthplace, " Rosario". The prompt only asks for the
# team, but an imprint at this token contains all of it. (This model was trained to gather its knowledge
# at the subject's last token, so its tokens are easier to interpret than in other models. In the last
# layer, this token does not contribute.)
#
# ## Where is the gradient large?
#
# These are the norms `||delta_i||` of `W_out`, which the table shows as colours. To first order, they are the
# largest change of the loss, in nats, per unit of change of the MLP's output at this token.

# %%
norms = result.to_df(matrix="W_out")
norms.pivot(index="layer", columns=["position", "token"], values="norm").round(2).iloc[::-1]

# %% [markdown]
# The norm is largest at the last token. Up to layer 4 it is about half as large at " Messi" and at
# " plays"; from layer 5 on it is small at " Messi". By then, later tokens have read the facts from
# this position. Causal tracing in the model card finds the same boundary by restoring hidden states.
#
# So the model could learn " Paris" in two places: where the answer is predicted, and where Messi's facts
# are looked up. `W_out` shows " Paris" in both. At " plays", where the norm is nearly as large, the tokens
# are not interpretable.
#
# ## Is this correct?
#
# `validate` compares the sum of outer products with autograd's own weight gradient on your model, here
# for 20 prompts. The errors are relative, and the rounding of float32 is about 1e-7.

# %%
facts = blt.read_records("facts").rows[:20]
blt.validate(model, [fact.prompt for fact in facts])

# %% [markdown]
# ## Try it yourself
#
# You can use any prompt and any target of one token. In this example, the capital of France should become
# Rome. What do you expect at " France"?

# %%
my_prompt, my_target = "The capital of France is", " Rome"
blt.backward_lens(model, my_prompt, my_target, matrices="W_out")

# %% [markdown]
# The last column shows " Rome". But at " France", most layers up to 4 show " Italy": the gradient does not
# move the capital, it makes the country more like one whose capital is Rome. Italy is in neither the
# prompt nor the target.
#
# Now change the two texts, and look at the subject in the layers up to 4. Hover over a cell to see more of
# its tokens.
#
# - `"Lionel Messi plays for"`, `" Lakers"`: who was born in Akron, and who in Washington? Then use
#   `matrices="W_O"`, the output of attention. Whose names are at " Messi" in layer 0?
# - `"Apple was founded by"`, `" Gates"`: which company do the tokens after " Gates" at "pple" refer to?
# - `"The capital of France is"`, `" Paris"`, which is already the answer: what does the gradient contain
#   then? Read the note below the table, and switch to the normalized lens.
#
# <details><summary>About the first two</summary>
#
# LeBron James and Stephen Curry were born in Akron, Kevin Durant and Duke Ellington in Washington. James plays
# for the Lakers. The model was trained on all of this, but the prompt mentions none of them. In layer 0, where
# attention assembles the name, nine of the top ten tokens are names, among them " James", " Durant",
# " Ellington", " Monk" and " Jarrett". So the update makes Messi more like an American who plays, either
# basketball or the piano. (" piano" is among the top tokens of higher layers. The prompt's " plays" may be the
# reason, but the table cannot show this.)
#
# After " Gates", the tokens in layers 2 to 4 include " Microsoft" and " software": Apple becomes more like
# his company. They also include " Hamburg" and " Brahms", who was born there; the table does not show why.
#
# </details>
#
# ## A real language model
#
# The model above was trained on a few thousand facts. SmolLM2-135M-Instruct is a language model with 30
# layers and a vocabulary of 49,152 tokens. If the next cell finds neither the hub nor the file, its error
# says which command installs it.

# %%
real = blt.load_model("smollm2")
eiffel = blt.backward_lens(
    real,
    "The Eiffel Tower is located in the city of",
    " Rome",
    matrices="W_out",
    projection=("logit_lens", "cosine"),
)
eiffel

# %% [markdown]
# The last column again shows the target, but in the upper layers only. In the lower layers it shows
# tokens that have nothing to do with the prompt. These are the target's ranks in that column, from layer
# 0 up:

# %%
eiffel.target_rank("W_out")[:, 0, -1].tolist()

# %% [markdown]
# The logit lens is the model's decoding of its *last* residual stream. In the facts model lower layers
# write in nearly the same directions as the last ones; in this model they do not. The gradient is right
# all the same: [the paper's claims on a real model](../docs/real-model.md) measures what such an update
# does after the layers above it.
#
# A few tokens, such as " affili", lead many cells of every prompt: their columns in the unembedding are
# among the longest, so their scores vary most. Switch the table to the cosine lens, which divides by these
# lengths. This is the number of cells that the target leads, and that the ten other most frequent tokens
# lead together, under both lenses:

# %%
counts = {lens: eiffel.under(lens).to_df().top_tokens.str[0] for lens in eiffel.projections}
counts = pd.DataFrame({lens: tops.value_counts() for lens, tops in counts.items()})
leads = {lens: [own[" Rome"], own.drop(" Rome").nlargest(10).sum()] for lens, own in counts.items()}
pd.DataFrame(leads, index=["the target", "ten others"]).astype(int)

# %% [markdown]
# Where is the update large? `||delta_i||`, the colour of the table, is only one factor. The term that a
# position writes has the size `||x_i|| ||delta_i||`. This is the position where each of them is largest,
# for some layers:

# %%
sizes = eiffel.to_df(matrix="W_out").set_index("position").groupby("layer")
largest = sizes[["norm", "write_norm"]].idxmax()
largest.map(eiffel.capture.str_tokens[0].__getitem__).iloc[[0, 5, 11, 20, 25, 29]]

# %% [markdown]
# ## Where to go from here
#
# - [Looking at gradients](looking.ipynb): the table's controls, widgets, figures and files.
# - [Editing a fact with one forward pass](editing.ipynb): write what you have just read.
# - [Attention](../docs/attention.md): gradients of queries, keys, values and heads.
# - [README](../README.md): an overview. The paper is
#   [Katz et al. 2024](https://arxiv.org/abs/2402.12865).
