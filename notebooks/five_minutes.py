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
# A forward pass says what a model answers. A backward pass says how every weight should move to make
# another answer more likely. The Backward Lens reads those movements as words.
#
# This notebook needs no network: the package ships a small GPT-2 that knows some facts. With one,
# `TransformerBridge.boot_transformers("gpt2")` in the next cell does as well.

# %%
import backward_lens_tl as blt

model = blt.load_facts_model()

# %% [markdown]
# ## What would the model have to learn to say " Paris"?
#
# The loss is `-log p(" Paris")` right after the prompt. For each layer and each token of the prompt,
# the upper table shows what the gradient *imprints* into `W_in`, and the lower one which words it
# adds to the output of `W_out`. The colour is the size of the error that came back to that place.

# %%
result = blt.backward_lens(model, "Lionel Messi plays for", " Paris")
result

# %% [markdown]
# Read the last column of `W_out`: an update adds " Paris" there, in nearly every layer at once, and
# no layer had to be told. The target's rank among all tokens, from the first layer to the last:

# %%
result.target_rank("W_out")[:, 0, -1].tolist()

# %% [markdown]
# ## Why the minus sign?
#
# The gradient of the loss with respect to the logits is `p - onehot(target)`: the target is the only
# token with a *negative* coefficient. So the raw gradient ranks it last, and the update, which
# subtracts the gradient, ranks it first. `direction="gradient"` shows the raw side.

# %%
raw = blt.backward_lens(model, "Lionel Messi plays for", " Paris", direction="gradient")
raw.target_rank("W_out")[:, 0, -1].tolist(), "of", model.cfg.d_vocab

# %% [markdown]
# ## Thin gradients
#
# Each gradient is a sum of one outer product per token, so its rank is at most the number of tokens.
# In the last layer only the last position takes part: rank 1.

# %%
[(gradient.matrix, gradient.layer, gradient.rank()) for gradient in result.gradients]

# %% [markdown]
# ## Where does the error go?
#
# As a table for pandas: how much of the error arrives at which token, layer by layer?

# %%
table = result.to_df().query("matrix == 'W_out'")
table.pivot(index="layer", columns=["position", "token"], values="norm").round(3)

# %% [markdown]
# The last token takes the most. But up to layer 4 the error also comes back to " Messi", the
# subject's last token, and from layer 5 on it does not: by then the answer has been read out there.
# The model card's causal tracing says the same from the other side, by restoring hidden states.
# And in that column, too, the update adds " Paris" up to layer 4:

# %%
[result.top_tokens("W_out", layer, pos=3, k=3) for layer in result.layers]

# %% [markdown]
# In the last layer there is nothing to show: attention has no way back from there.
#
# ## And is all of this true?
#
# `validate` compares each pair of factors with autograd's own weight gradient, on this very model.

# %%
blt.validate(model)
