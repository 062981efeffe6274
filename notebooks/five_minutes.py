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
# A forward pass says what a model answers. A backward pass says how each weight should move to make
# another answer more likely, and the Backward Lens reads those movements as words. In five minutes
# you can read its table, know why there is a minus sign in it and what an *imprint* is, and have
# found something in a gradient that nobody asked the model for.

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
# The model is a small GPT-2 of 8 layers that ships in the package and knows facts about people,
# places and companies. All that is said below about numbers and words is about this model.

# %%
import pandas as pd

import backward_lens_tl as blt

model = blt.load_model("facts")  # with a network: "gpt2", or any name on the Hugging Face hub

# %% [markdown]
# ## What does it say, and what would it have to learn?
#
# Without a target, the lens takes the model's own most probable answer.

# %%
prompt = "Lionel Messi plays for"
blt.backward_lens(model, prompt).target()

# %% [markdown]
# Now suppose that it should say " Paris". The loss is `-log p(" Paris")` behind the prompt, in nats.
# Its gradient for a weight matrix is a sum with one term per token, the outer product
# `x_i^T delta_i`: what the matrix read at token `i`, times the error that came back to its output
# there. A gradient of any size is no more than these few pairs of vectors. One of each pair is as
# wide as the residual stream, so the Logit Lens can read it: final norm, unembedding, the most
# probable words.

# %%
result = blt.backward_lens(model, prompt, " Paris")
result

# %% [markdown]
# Layers go up, tokens go right, and each cell is one term of the sum, by its most probable word. The
# colour is `||delta_i||`, how strongly the token writes into the gradient.
#
# - `W_out`, below, is the MLP's second matrix. Of its pairs the table reads `-delta_i`: the words that
#   an update **adds to the output** of the MLP.
# - `W_in`, above, is the first. Of its pairs the table reads `x_i`: what the MLP **reads** at that
#   token. What an update does with it comes further down.
#
# Look at the last column of `W_out`. It says " Paris" from the first layer to the last: the error
# carries the answer to all layers at once. As numbers, here is the target's rank among all tokens of
# the vocabulary in that column, 0 for the first, from layer 0 on:

# %%
result.target_rank("W_out")[:, 0, -1].tolist()

# %% [markdown]
# Point at a cell for its ten words at either end. Dots are cells that add nothing: the last layer's
# earlier tokens have no way to the answer any more. Words in italics come from vectors so short that
# they mostly show the final norm's bias; do not read much into them.
#
# ## Why the minus sign?
#
# The gradient of the loss with respect to the logits is `p - onehot(target)`: the target is the only
# token with a *negative* number. So the raw gradient has it last, and gradient descent, which
# subtracts, puts it first. The table shows what descent adds, `-delta_i`; `direction="gradient"`
# shows the raw side, as the paper does. The same ranks there, and the size of the vocabulary:

# %%
raw = blt.backward_lens(model, prompt, " Paris", direction="gradient")
raw.target_rank("W_out")[:, 0, -1].tolist(), model.cfg.d_vocab

# %% [markdown]
# ## What is an imprint?
#
# Column `j` of `W_in` is what neuron `j` listens for. Its update is `-sum_i delta_i[j] x_i`: some of
# each `x_i`, and nothing else. With a positive share the neuron turns towards what it has just read,
# with a negative one away from it. That is the imprint: inputs are added to neurons or subtracted.
#
# Here are the shares `-delta_i[j]` of every token, for the three neurons of one upper layer that
# change most:

# %%
layer = result.layers[-2]
gradient = result.capture["W_in", layer]
neurons = gradient.neuron_norms().topk(3).indices
shares = -gradient.vjps[0][:, neurons.to(gradient.vjps.device)].T
table = pd.DataFrame(shares.cpu(), index=neurons.tolist(), columns=result.capture.str_tokens[0])
table.round(2) + 0.0  # no -0.0

# %% [markdown]
# Nearly all of it is the last token's, and the neuron that changes most has a negative share. What
# does it turn away from? The words of `x_i` there:

# %%
result.top_tokens("W_in", layer, pos=-1, k=5)

# %% [markdown]
# " Miami", the old answer. The first neuron is to fire less when it reads this, the other two more.
# (What a neuron then writes is `W_out`'s business.)
#
# In the table of `W_in`, " Miami" comes to the last column in layer 5. What does the MLP read before, where the
# prompt names Messi? Each layer's words at the subject's last token, best first:

# %%
cells = result.to_df(subject="Lionel Messi", matrix="W_in")
subject = cells[cells.segment == "last subject token"]
subject.set_index("layer").top_tokens.str[:5].str.join(",").to_frame("x_i says").iloc[::-1]

# %% [markdown]
# Layer 0 reads the name, and names like it. From layer 1 on it is what the model knows about him: his
# sport, his position, his team, his language, the town where he was born, " Rosario". The prompt asked
# for the team alone. An imprint at this token is of all of it, since the gradient has nothing else to
# write there. (This model was trained to gather what it knows at the subject's last token, so it is
# more legible here than in others. In the last layer this token adds nothing.)
#
# ## Where does the error go?
#
# `||delta_i||` of `W_out`, the table's colours as numbers: by how many nats, to first order,
# the loss changes at most per unit of length that the MLP's output at this token moves.

# %%
norms = result.to_df(matrix="W_out")
norms.pivot(index="layer", columns=["position", "token"], values="norm").round(2).iloc[::-1]

# %% [markdown]
# The last token has most of it. Up to layer 4 about half as much comes back to " Messi", and to " plays"
# behind it; from layer 5 on " Messi" has hardly any: by then its facts have been read out. The model
# card's causal tracing finds the same border from the other side, by restoring hidden states.
#
# So there are two places where the model could learn " Paris": where the answer is said, and where
# Messi is looked up. `W_out` says " Paris" in both. At " plays", where the error is nearly as large, it
# says nothing that helps a reader.
#
# ## Is all of this true?
#
# You need not trust it. `validate` compares the sum of outer products with autograd's own weight
# gradient, on the very model that you have, here for the first 20 prompts of the facts that ship with it. The
# errors are relative, and float32 rounds to some 1e-7.

# %%
facts = blt.read_records("facts").rows[:20]
blt.validate(model, [fact.prompt for fact in facts])

# %% [markdown]
# ## A surprise to find yourself
#
# Any prompt and any target will do, if the target is one token. This one asks that the capital of France
# be Rome. What would you expect at " France"?

# %%
my_prompt, my_target = "The capital of France is", " Rome"
blt.backward_lens(model, my_prompt, my_target, matrices="W_out")

# %% [markdown]
# The last column says " Rome". But at " France" most layers up to 4 say " Italy" first: the gradient does
# not move the capital, it turns the country into another one, which has that capital already. Nobody
# named Italy.
#
# Now change the two texts, and look where the subject is, in the layers up to 4; point at a cell for
# more of its words.
#
# - `"Lionel Messi plays for"`, `" Lakers"`: who was born in Akron, and who in Washington? Then, with
#   `matrices="W_O"`, the output of attention, whose names are those at " Messi" in layer 0?
# - `"Apple was founded by"`, `" Gates"`: whose company do the words behind " Gates" at "pple" speak of?
# - `"The capital of France is"`, `" Paris"`, which it says already: what is left when there is nothing
#   to learn? Read the note below the table, and switch to the normalized lens.
#
# <details><summary>About the first two</summary>
#
# LeBron James and Stephen Curry were born in Akron, Kevin Durant and Duke Ellington in Washington. James plays
# for the Lakers. The model was taught all of this, but the prompt names none of them. In layer 0, where
# attention puts the name together, nine of the first ten words are names, " James", " Durant", " Ellington", " Monk" and
# " Jarrett" among them.
# So Messi is to become an American who plays, be it basketball or the piano. (" piano" is among the first words
# further up. That the prompt says " plays" may be the reason; the table cannot tell.)
#
# Behind " Gates" there are " Microsoft" and " software", from layer 2 to 4: Apple is to become his company.
# There are also " Hamburg" and " Brahms", who was born there; why, the table cannot tell either.
#
# </details>
#
# ## Where to go from here
#
# - [Looking at gradients](looking.ipynb): the table's switches, widgets, figures and files.
# - [Editing a fact with one forward pass](editing.ipynb): write what you have just read.
# - [Attention](../docs/attention.md): the same for queries, keys, values and heads.
# - [README](../README.md): the rest in a page; the paper is
#   [Katz et al. 2024](https://arxiv.org/abs/2402.12865).
