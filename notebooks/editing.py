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
# # Editing a fact with one forward pass
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/editing.ipynb)
#
# The gradient of `W_out`, the second matrix of an MLP, adds the target's embedding to the output of the MLP
# ([five minutes](five_minutes.ipynb)). So why compute a gradient? You can add the embedding directly. This
# notebook makes this edit, the *forward pass shift*, by hand and with the package. It shows how to undo the edit,
# what else it changes, and how it compares with a step of SGD, ROME and MEMIT.

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
# The model is a small GPT-2 that ships with the package and knows facts about people, places and companies. All
# numbers in the text are for this model.

# %%
import hashlib
import tempfile

import pandas as pd
import torch

import backward_lens_tl as blt
from backward_lens_tl import editing
from backward_lens_tl.editing import EditRequest, ForwardPassShift, preset_settings

model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub

# %% [markdown]
# ## By hand
#
# The model should answer " Paris" to this prompt. An update of `W_out` by `x^T v` changes the output for the input
# `x` by `||x||^2 v`. Let `x` be the input of `W_out` at the last token of the prompt and `v` the target's row of
# the unembedding, `e_t`, and divide by `||x||^2`. Then the output changes by exactly `size` times `e_t`. The layer
# is at three quarters of the depth, about where the paper edits GPT-2 xl.

# %%
prompt, target = "Lionel Messi plays for", " Paris"
layer, size = 3 * model.cfg.n_layers // 4, 30.0

logits, cache = model.run_with_cache(prompt)
x = cache["post", layer][0, -1].detach()  # [d_mlp]
e_t = model.W_U[:, model.to_single_token(target)].detach()  # [d_model]
squared_norm = torch.einsum("m,m->", x, x)
delta = torch.einsum("m,d->md", x, size / squared_norm * e_t)  # [d_mlp, d_model], as W_out

# %% [markdown]
# This is the edit. It needs one forward pass and no backward pass. To see its effect without changing the weight,
# we use two hooks: at every position, one stores the input of `W_out`, and the other adds that input times `delta` to
# the output. These are the three most probable answers with their probabilities, before and after:

# %%
inputs = {}


def keep(values, hook):
    inputs["x"] = values


def write(values, hook):
    return values + torch.einsum("bpm,md->bpd", inputs["x"], delta)


def top(logits, k=3):
    p, tokens = logits[0, -1].softmax(-1).topk(k)
    return {model.to_string([t]): round(p[i].item(), 3) for i, t in enumerate(tokens.tolist())}


hooks = [(f"blocks.{layer}.mlp.hook_post", keep), (f"blocks.{layer}.hook_mlp_out", write)]
with model.hooks(fwd_hooks=hooks):
    print("before", top(logits), "\nafter ", top(model(prompt)))

# %% [markdown]
# The answer changes from " Miami" with a probability of 0.997 to " Paris" with 0.994, with one outer product and
# without training.
#
# ## With the package
#
# `ForwardPassShift` computes the same edit from a request. It returns an object and leaves the model unchanged.
# Is it the edit that we made by hand? The cell shows the largest difference between entries, and the largest entry
# (`assert_close` would raise an error if they differed):

# %%
request = EditRequest(prompt, target, subject="Lionel Messi")
shift = ForwardPassShift(layer=layer, size=size, key="plain")
edit = shift(model, request)

made = edit["W_out", layer].dense()
torch.testing.assert_close(made, delta)
float((made - delta).abs().max()), float(made.abs().max())

# %% [markdown]
# They are equal up to rounding. An edit can be scaled, so we can find out how large it needs to be. This is the
# probability of " Paris" (from 0 to 1) by size:

# %%
token = model.to_single_token(target)
probability = {}
for smaller in (5.0, 10.0, 15.0, 20.0, 25.0, 30.0):
    with edit.scale(smaller / size).applied(model):
        probability[smaller] = model(prompt)[0, -1].softmax(-1)[token].item()
pd.Series(probability, name="p(target)").rename_axis("size").round(3).to_frame().T

# %% [markdown]
# Sizes up to 10 have almost no effect, and then the probability rises quickly, to a half at about 20. So 20 would be enough
# here, and other facts need more or less. Without settings, `ForwardPassShift()` finds the least sufficient size
# of each fact, and adds a tenth. It also chooses the layer, and responds less to the same prompt about other
# subjects. What it found is in the delta's representation:

# %%
own_choice = ForwardPassShift()(model, request)
own_choice

# %% [markdown]
# ## Undo the edit
#
# Inside `with edit.applied(model):` the model is edited. Afterwards the weights are restored, also after an
# exception. `apply_` and `revert_` do the same without a block. To check this, we compute a checksum of all
# parameters and the answer before, during and after the edit. (The lens of one layer is enough for the answer.)


# %%
def answer(text):
    return blt.backward_lens(model, text, layers=-1).target()


def checksum():
    bits = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().cpu().contiguous().reshape(-1)
        bits.update(values.view(torch.uint8).numpy())
    return bits.hexdigest()[:12]


seen = {"before": [checksum(), answer(prompt)]}
edit.apply_(model)
seen["edited"] = [checksum(), answer(prompt)]
edit.revert_(model)
seen["after"] = [checksum(), answer(prompt)]
pd.DataFrame(seen, index=["checksum", "answer"]).T

# %% [markdown]
# The first and the last checksum are equal, so every bit is restored. (A copy of the weight is kept while the edit
# is applied, because subtracting the edit would leave rounding errors.)
#
# ## Other methods
#
# There are other ways to edit the fact:
#
# - `GradientStep`: one step of SGD on the `W_out` of the same layer. It needs a backward pass.
# - `ROME` finds a vector that makes the model predict the target, by gradient descent, and writes it into an
#   early `W_out`, at the input of the subject's last token.
# - `MEMIT` does this for many facts, over several layers.
#
# ROME and MEMIT need *second moments*, `E[x x^T]` of the inputs of `W_out` on ordinary text, so that the edit
# responds as little as possible to other inputs. Those of the facts model ship with the package. For other models,
# this cell collects them from the prompts of some records, in the layers that are edited, which takes less than a
# minute; for serious use, collect them from a text corpus. `preset_settings` returns the settings of each method:
# tuned for the facts model, and for other models those published for GPT-2 xl, with layers at the same relative
# depth. Two of them are replaced: the SGD step edits the layer of the shift, and ROME searches with the six sampled
# prefixes of the facts model's settings for all models, because the published 20 take much longer.

# %%
records = blt.read_records("facts")  # edited below, from row 0 on
others = [text for row in records.rows[200:] for text in (row.prompt, *row.generation_prompts)]
enough = 3 * model.cfg.d_mlp  # tokens; an inverse needs more than d_mlp
settings = preset_settings(model.cfg.model_name, model.cfg.n_layers)
is_facts = model.cfg.model_name == "facts"
if is_facts:
    moments = editing.facts_moments()
else:
    layers = [settings["rome"]["layer"], *settings["memit"]["layers"]]
    moments = editing.second_moments(
        model, others, layers=layers, max_tokens=enough, progress=False
    )

prefixes = ((5, 3), (10, 3))  # of five tokens, three; of ten tokens, three
methods = {
    "shift": shift,
    "SGD step": editing.GradientStep(**{**settings["sgd_step"], "layers": layer}),
    "ROME": editing.ROME(moments=moments, **{**settings["rome"], "prefixes": prefixes}),
    "MEMIT": editing.MEMIT(moments=moments, **settings["memit"]),
}
edits = {name: method(model, request) for name, method in methods.items()}

# %% [markdown]
# ## What else changes?
#
# All methods make the model answer " Paris" to the prompt. How do they change other answers? The table has the
# answer to each prompt, before and under each edit. Its first column is a prediction for the shift: at another
# prompt with the input `x'` of `W_out`, the edit writes `<x', x> / ||x||^2` times what it writes at its own prompt.
# This fraction is 1 if the inputs are equal, and 0 if they are orthogonal.

# %%
prompts = [
    "Lionel Messi plays for",
    "Lionel Messi wears the colours of",
    "The team of Lionel Messi is",
    "LeBron James plays for",
    "Harry Kane plays for",
    "Lionel Messi is a citizen of",
    "Lionel Messi was born in",
    "The capital of Italy is",
]
inputs_at = [model.run_with_cache(text)[1]["post", layer][0, -1].detach() for text in prompts]
answers = pd.DataFrame(
    {"fraction": [float(each @ x / (x @ x)) for each in inputs_at]}, index=prompts
)
answers["before"] = [answer(text) for text in prompts]
for name, one in edits.items():
    with one.applied(model):
        answers[name] = [answer(text) for text in prompts]
answers.round(2)

# %% [markdown]
# Every edit has side effects, and they differ:
#
# - **The shift edits a phrase.** It responds to the input at the prompt's last token, which is similar for other players. For
#   LeBron James, the fraction is 0.73, more than the two thirds that were enough for Messi, and the answer becomes
#   " Paris" as well. For Harry Kane, at 0.44, it does not. Other facts about Messi are unchanged. (The fraction is
#   not a threshold: at 0.58 the team of Messi is " Paris", and at 0.57 his country is still " Argentina". It also
#   depends on the margin of the old answer.)
# - **ROME and MEMIT edit a person.** They respond to the subject, so James and Kane are unchanged. But Messi is now
#   a citizen of " France" and born in " Paris", which was not requested. [Five minutes](five_minutes.ipynb) found
#   the same in a gradient: at the subject's token, the gradient changes the answer by changing the subject.
# - **The SGD step**, with a learning rate tuned for efficacy, answers " Paris" to nearly every question about a
#   person.
#
# The answer " Rome" does not change; the fraction of the shift is 0.02 there.
#
# ## More than one fact
#
# One fact is not enough to compare methods. `blt.evaluate` applies each method to one record at a time, always
# starting from the unedited weights, and measures:
#
# - `efficacy`: is the new answer now the most probable? In percent of records; higher is better.
# - `paraphrase`: is it also for paraphrases of the prompt? In percent of prompts; higher is better.
# - `neighborhood`: do other subjects with the same old answer keep it? In percent; higher is better.
# - `corpus_perplexity`: the perplexity of 50 ordinary sentences, at least 1. The row `none` is the unedited
#   model; an increase is damage.
#
# `norm` is the Frobenius norm of the edit, and `seconds` the time per edit on this machine. The shift is included
# twice: with a fixed size, and with its own choices. (Models other than the facts model are
# evaluated on fewer records and sentences, to save time.)

# %%
methods["shift, own choice"] = ForwardPassShift()
config = blt.EvaluationConfig(
    records=6 if is_facts else 2,
    prepend_bos=None,
    generation_length=0,
    texts="facts",
    n_texts=50 if is_facts else 10,
)
scores = blt.evaluate(model, records, tempfile.mkdtemp(), methods, config, progress=False)
columns = ["efficacy", "paraphrase", "neighborhood", "corpus_perplexity", "norm", "seconds"]
scores.summary().set_index("method")[columns].round(2)

# %% [markdown]
# Six records are few, and the size of 30 was not tuned.
# [Editing](../docs/editing.md#results-on-the-facts-model) has results for a hundred records and tuned settings,
# which differ: there, efficacy, paraphrase and neighborhood are 97, 87 and 18 for a fixed shift, 100, 41 and 61 for
# the least size with the same key, 100, 95 and 96 for ROME, and 97, 96 and 93 for MEMIT. In this table:
#
# - The fixed size is enough for four of six facts. With the size that each fact needs, it is all of them, in
#   much less time than ROME, which edits all facts, or MEMIT, which misses one.
# - **The shift is weak in both other columns.** Half of the paraphrases change, and 67 % of the neighbors keep their
#   answer. Its own choices are better in both, 58 % and 85 %, because it responds less to other subjects. ROME and
#   MEMIT reach 83 % and 92 % of the paraphrases and change no neighbors. They edit where this model was trained to
#   store its facts, so do not expect the same for other models.
# - The SGD step reaches all paraphrases and changes all neighbors. The model has not learned a fact, but to
#   say one token.
# - Perplexity changes by at most 0.5 %, even for the SGD step (3 % for the records in the docs). The damage of
#   these edits is not in ordinary sentences, but in the neighbors.
# - The edits of MEMIT have a hundred times the norm of ROME's and do no more damage: what matters is how strongly
#   other inputs activate an edit, not its norm.
#
# ## The tokens of an edit
#
# An edit is a sum of outer products with one factor of width `d_model`, so the lens can project it like a gradient.
# The tokens are what the edit makes `W_out` write. `target_rank` is the rank of " Paris" among all tokens, where 0 is the
# top. The SGD step has an outer product for each token; the table shows the one with the largest norm.

# %%
tokens = [
    editing.delta_tokens(model, edits[name], k=4, target=target, most=1).assign(edit=name)
    for name in ("shift", "SGD step", "ROME")
]
pd.concat(tokens).set_index("edit")[
    ["layer", "norm", "top_tokens", "bottom_tokens", "target_rank"]
].round(2)

# %% [markdown]
# All three have " Paris" on top. The shift writes the target's own row, so the next tokens have similar rows: the
# country, the language, another city with a team. The gradient also decreases " Miami", the old answer, which the
# shift does not know. (It is third from the bottom; two tokens with rows close to that direction are even lower.)
# The tokens of ROME's vector are different: fragments of words, and " Piaf", the French singer. It was optimized
# for its effect in later layers, which does not require interpretable tokens.
#
# How similar is the shift to the gradient that it replaces? `compare_tokens` compares edits of one matrix with the
# first one. `top_energy` is the fraction of the squared norm in the largest singular value (1 for a single outer
# product), `alignment` is the cosine between the two edits as flat vectors, and `overlap` is the fraction of
# the top ten tokens that they share.

# %%
pair = {name: edits[name] for name in ("shift", "SGD step")}
compared = editing.compare_tokens(model, pair, target).set_index("edit")
compared[["rank", "norm", "top_energy", "alignment", "overlap", "target_rank"]].round(2)

# %% [markdown]
# The step has rank 6, one for each token, but 97 % of its squared norm is in one outer product, which is nearly
# that of the last token, where both edits have the same input `x`. So the cosine of 0.67 is nearly the cosine
# between the target's row and the step's `-delta_i`. You get a large part of a gradient step without a backward
# pass, but not all of it: only two of the top ten tokens are the same.
#
# ## Try it yourself
#
# An edit can also remove an answer. With a negative size, the model's own answer is subtracted. Before, the top
# answers were " Miami", " Lakers" and " Barcelona". What will the model answer without " Miami"?

# %%
unlearn = ForwardPassShift(layer=layer, size=-20.0, key="plain")
with unlearn(model, EditRequest(prompt, answer(prompt))).applied(model):
    print(top(model(prompt), k=4))

# %% [markdown]
# Neither the second nor the third. Why " Munich"? (Compare the rows of the unembedding: the cosine of " Miami"
# with each of these tokens.) And where does " forward" come from, which is not a team? Then try other sizes. At
# which size does the model stop answering with teams?
#
# ## Where to go from here
#
# - [Editing](../docs/editing.md): all methods, the three forms of the shift, several facts at once, and
#   `edit.to_lora(...)` for plain `transformers` and `peft`.
# - [Evaluating edits](../docs/evaluation.md): metrics and tables. From a shell, for a hundred records:
#   `backward-lens evaluate --model facts --methods all --records 100 --out edits/`
# - [Five minutes](five_minutes.ipynb) and [looking at gradients](looking.ipynb): the analysis that the shift is
#   based on.
