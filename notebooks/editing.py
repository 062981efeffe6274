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
# The gradient of `W_out`, the second matrix of an MLP, adds the target's word to the MLP's output
# ([five minutes](five_minutes.ipynb) shows it). Then why compute a gradient? Write the word there
# yourself. At the end you know that edit, the *forward pass shift*, by hand and by this package, what it
# changes beside the fact, how it compares with a step of SGD, ROME and MEMIT, and how to undo it.

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
# The model is a small GPT-2 that ships in the package and knows facts about people, places and
# companies. All numbers that the text below speaks of are this model's.

# %%
import hashlib
import tempfile

import pandas as pd
import torch

import backward_lens_tl as blt
from backward_lens_tl import editing
from backward_lens_tl.editing import EditRequest, ForwardPassShift, preset_settings

model = blt.load_model("facts")  # with a network: "gpt2", or any name on the Hugging Face hub

# %% [markdown]
# ## By hand
#
# We want the model to answer " Paris" to this prompt. An update of `W_out` by `x^T v` changes what it
# writes where it reads `x` by `||x||^2 v`. So take for `x` what `W_out` reads at the prompt's last
# token, for `v` the target's row of the unembedding, `e_t`, and divide by `||x||^2`: then the output
# there changes by just `size` times `e_t`. The layer is three quarters up, about where the paper edits
# GPT-2 xl.

# %%
prompt, target = "Lionel Messi plays for", " Paris"
layer, size = 3 * model.cfg.n_layers // 4, 30.0

logits, cache = model.run_with_cache(prompt)
x = cache["post", layer][0, -1].detach()  # [d_mlp]
e_t = model.W_U[:, model.to_single_token(target)].detach()  # [d_model]
length = torch.einsum("m,m->", x, x)
delta = torch.einsum("m,d->md", x, size / length * e_t)  # [d_mlp, d_model], as W_out

# %% [markdown]
# That was the edit: one forward pass, no backward pass. To see what it does, two hooks stand in for the
# changed weight. At every position, one takes what `W_out` reads, the other adds that times `delta` to
# what it writes. The model's three most probable answers and their probabilities, before and after:

# %%
reads = {}


def keep(values, hook):
    reads["x"] = values


def write(values, hook):
    return values + torch.einsum("bpm,md->bpd", reads["x"], delta)


def top(logits, k=3):
    p, tokens = logits[0, -1].softmax(-1).topk(k)
    return {model.to_string([t]): round(p[i].item(), 3) for i, t in enumerate(tokens.tolist())}


hooks = [(f"blocks.{layer}.mlp.hook_post", keep), (f"blocks.{layer}.hook_mlp_out", write)]
with model.hooks(fwd_hooks=hooks):
    print("before", top(logits), "\nafter ", top(model(prompt)))

# %% [markdown]
# From " Miami" with a probability of 0.997 to " Paris" with 0.994. One outer product does it, and nothing
# was trained.
#
# ## With the package
#
# `ForwardPassShift` makes the same of a request. What it gives back is an object, and the model is as
# it was. Is it what we made by hand? The largest difference of any entry, and the largest entry (and
# `assert_close` would complain):

# %%
request = EditRequest(prompt, target, subject="Lionel Messi")
shift = ForwardPassShift(layer=layer, size=size, form="scale_free")
edit = shift(model, request)

made = edit["W_out", layer].dense()
torch.testing.assert_close(made, delta)
float((made - delta).abs().max()), float(made.abs().max())

# %% [markdown]
# The same, but for rounding. An edit can be scaled, so we can ask how much of it is needed:
# the probability of " Paris" (from 0 to 1) by size.

# %%
token = model.to_single_token(target)
probability = {}
for part in (5.0, 10.0, 15.0, 20.0, 25.0, 30.0):
    with edit.scale(part / size).applied(model):
        probability[part] = model(prompt)[0, -1].softmax(-1)[token].item()
pd.Series(probability, name="p(target)").rename_axis("size").round(3).to_frame().T

# %% [markdown]
# Next to nothing up to 10, and then all at once; half is reached at about 20. So 20 would have been enough
# here, and other facts need more or less. `ForwardPassShift(..., size=4.0, iterations=15)` adds 4 until
# the target leads, one forward pass each, and so finds for each fact what is enough.
#
# ## Undo it
#
# Inside of `with edit.applied(model):` the model is edited, and afterwards it is not, also if an error
# is raised within. `apply_` and `revert_` do the same by hand. A proof: a checksum of all bits of all
# parameters, before, while the edit is applied, and after.


# %%
def checksum():
    bits = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().cpu().contiguous().reshape(-1)
        bits.update(values.view(torch.uint8).numpy())
    return bits.hexdigest()[:12]


seen = {"before": [checksum(), blt.backward_lens(model, prompt).target()]}
edit.apply_(model)
seen["edited"] = [checksum(), blt.backward_lens(model, prompt).target()]
edit.revert_(model)
seen["after"] = [checksum(), blt.backward_lens(model, prompt).target()]
pd.DataFrame(seen, index=["checksum", "answer"]).T

# %% [markdown]
# The first checksum and the last are equal, so every bit is back. (A copy of the one weight is kept while
# the edit is applied. Subtracting it again would leave rounding behind.)
#
# ## Its rivals
#
# The fact could be taught otherwise:
#
# - `GradientStep`: one step of SGD on the `W_out` of the same layer. It takes a backward pass.
# - `ROME` looks for a vector that makes the model say the target, by gradient descent, and writes it into
#   an early `W_out`, where that matrix reads the subject's last token.
# - `MEMIT` does so for many facts, over several layers.
#
# The latter two need *second moments*, `E[x x^T]` of what `W_out` reads in ordinary text, so as to
# listen to what little else reads. Those of the facts model ship with the package. Of any other model
# they are collected here from the prompts of some records, which is quick; for GPT-2 in earnest take
# a text. `preset_settings` has the methods' settings: tuned for the facts model, and for others those
# published for GPT-2 xl, with layers as far up.

# %%
records = blt.read_records("facts")  # to be taught below, from row 0 on
others = [text for row in records.rows[200:] for text in (row.prompt, *row.generation_prompts)]
enough = 6 * model.cfg.d_mlp  # tokens; an inverse needs more than d_mlp
is_facts = model.cfg.model_name == "facts"
if is_facts:
    moments = editing.facts_moments()
else:
    moments = editing.second_moments(model, others, max_tokens=enough, progress=False)

settings = preset_settings(model.cfg.model_name, model.cfg.n_layers)
methods = {
    "shift": shift,
    "SGD step": editing.GradientStep(**{**settings["sgd_step"], "layers": layer}),
    "ROME": editing.ROME(moments=moments, **settings["rome"]),
    "MEMIT": editing.MEMIT(moments=moments, **settings["memit"]),
}
edits = {name: method(model, request) for name, method in methods.items()}

# %% [markdown]
# ## What else changes?
#
# All of them now say " Paris" to the prompt. What do they say to others? Here is the answer to each
# prompt, before and under each edit. The first column is a forecast for the shift: at another prompt,
# where `W_out` reads `x'`, the edit writes `<x', x> / ||x||^2` of what it writes at its own. This part
# is 1 where `W_out` cannot tell the two apart, and 0 where it reads something unrelated.

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
there = [model.run_with_cache(text)[1]["post", layer][0, -1].detach() for text in prompts]
answers = pd.DataFrame({"part": [float(each @ x / (x @ x)) for each in there]}, index=prompts)
answers["before"] = [blt.backward_lens(model, text).target() for text in prompts]
for name, one in edits.items():
    with one.applied(model):
        answers[name] = [blt.backward_lens(model, text).target() for text in prompts]
answers.round(2)

# %% [markdown]
# Every edit has side effects, and not the same ones:
#
# - **The shift teaches a phrase.** It listens to the prompt's last token, which reads much the same for
#   other players. At LeBron James 0.73 of it is written, more than the two thirds that were enough for
#   Messi, and he plays for " Paris" as well. Harry Kane, at 0.44, does not. What else is known about Messi
#   stays as it was. (The part is no threshold: at 0.58 the team of Messi is " Paris", and at 0.57 his
#   country is still " Argentina". It also depends on how far the old answer leads.)
# - **ROME and MEMIT teach a person.** They listen to the subject, and James and Kane are left alone. But
#   Messi is now a citizen of " France" and born in " Paris", which nobody asked for.
#   [Five minutes](five_minutes.ipynb) found the same in a gradient: at the subject's token, the way to
#   another answer is another subject.
# - **The SGD step**, with the learning rate that was tuned for its efficacy, says " Paris" to nearly
#   all that is asked about a person.
#
# Nothing happens to " Rome", where the shift writes 0.02 of itself.
#
# ## On more than one fact
#
# One fact decides nothing. `blt.evaluate` teaches each method one record after the other, each time from
# the unedited weights, and asks:
#
# - `efficacy`: is the new answer now the most probable? In per cent of records; high is good.
# - `paraphrase`: also if the prompt is said otherwise? In per cent of prompts; high is good.
# - `neighborhood`: do other subjects with the same old answer keep it? In per cent; high is good.
# - `corpus_perplexity`: that of 50 ordinary sentences; 1 at best, and the row `none` is the unedited
#   model. A rise is damage.
#
# `norm` is the Frobenius norm of the edit, `seconds` the time that one takes on this machine. The shift
# stands there twice: with the fixed size, and with as many steps of 4 as each fact needs.

# %%
methods["shift, least"] = ForwardPassShift(layer=layer, size=4.0, form="scale_free", iterations=15)
config = blt.EvaluationConfig(
    records=6, prepend_bos=None, generation_length=0, texts="facts", n_texts=50
)
scores = blt.evaluate(model, records, tempfile.mkdtemp(), methods, config, progress=False)
columns = ["efficacy", "paraphrase", "neighborhood", "corpus_perplexity", "norm", "seconds"]
scores.summary().set_index("method")[columns].round(2)

# %% [markdown]
# Six records are few, and the shift's size of 30 was not tuned.
# [Editing](../docs/editing.md#results-on-the-facts-model) has a hundred records and tuned settings, and
# other numbers: efficacy, paraphrase and neighborhood are 97, 87 and 18 there for a fixed shift, 100, 41 and
# 61 for the least size, 100, 95 and 96 for ROME, 97, 96 and 93 for MEMIT. Here:
#
# - The fixed size is enough for four facts of six; with the size that each needs it is all of them, in
#   much less time than ROME, which has all, or MEMIT, which misses one.
# - **The shift is weak in both other columns.** (A larger one, as in the docs, trades neighbors for
#   paraphrases.) Half of the paraphrases follow or fewer, and 67 % or 78 %
#   of the neighbors keep their answer. ROME and MEMIT reach 83 % and 92 % of the paraphrases, and leave
#   all neighbors alone. They edit where this model was trained to keep its facts, so do not expect as
#   much of them elsewhere.
# - The SGD step reaches all paraphrases and leaves no neighbor alone. It has not learnt a fact, but to
#   say one word.
# - Perplexity moves by 0.5 % at most, even for the SGD step (3 % with the docs' records): ordinary
#   sentences are not where these edits do their harm. Look at the neighbors.
# - MEMIT's edits are a hundred times as long as ROME's and do no more harm: what counts is not how much
#   is written, but how much of it is ever read.
#
# ## What each writes, in words
#
# An edit is a sum of outer products, and of each one vector is as wide as the residual stream, so the
# lens reads it like a gradient: what the edit makes `W_out` write. `target_rank` is the rank of " Paris"
# among all tokens, 0 for the first. Of the SGD step, which has an outer product for each token, the
# longest is shown.

# %%
words = [
    editing.delta_tokens(model, edits[name], k=4, target=target, most=1).assign(edit=name)
    for name in ("shift", "SGD step", "ROME")
]
pd.concat(words).set_index("edit")[
    ["layer", "norm", "top_tokens", "bottom_tokens", "target_rank"]
].round(2)

# %% [markdown]
# All three say " Paris" first. The shift writes the target's own row, so behind it come the words with
# similar rows: the country, the language, another city with a team. The gradient also pushes " Miami"
# away, the old answer, of which the shift does not know (third from the end: two words with rows near that
# direction, which nobody asked for, are even further off). ROME's vector reads otherwise: pieces of words,
# and " Piaf", the singer, who is French. It was found by what later layers make of it, and these do not
# need it to be legible.
#
# How near is the shift to the gradient that it stands for? `compare_tokens` compares edits of one matrix,
# all with the first: `top_energy` is the part of the squared norm in the largest singular value (1: a
# single outer product), `alignment` the cosine of the two edits as long vectors (1: the same direction),
# `overlap` the part of the top ten words that the first edit has, too.

# %%
pair = {name: edits[name] for name in ("shift", "SGD step")}
compared = editing.compare_tokens(model, pair, target).set_index("edit")
compared[["rank", "norm", "top_energy", "alignment", "overlap", "target_rank"]].round(2)

# %% [markdown]
# The step has rank 6, one for each token, but 97 % of its square is in one outer product, nearly that of the
# last token, where both listen to the same `x`. So the cosine of 0.67 is nearly that of what both write, the
# target's row and the step's `-delta_i`. A good part of a gradient step can be had without a backward pass,
# then, and a part cannot: of the top ten words, two are the same.
#
# ## A surprise to find yourself
#
# If an edit can write a word, it can take one away. With a negative size the model's own answer is
# subtracted. At first it said " Miami", then " Lakers", then " Barcelona". What will it say when it cannot
# say " Miami"?

# %%
answer = blt.backward_lens(model, prompt).target()
unlearn = ForwardPassShift(layer=layer, size=-20.0, form="scale_free")
with unlearn(model, EditRequest(prompt, answer)).applied(model):
    print(top(model(prompt), k=4))

# %% [markdown]
# Neither the second nor the third. Why " Munich"? (Compare the rows of the unembedding: the cosine of
# " Miami" with each of these words.) And where does " forward" come from, which is no team? Then try other
# sizes: at which one does the model give up on teams?
#
# ## Where to go from here
#
# - [Editing](../docs/editing.md): all methods, the shift's three forms, several facts at once, and
#   `edit.to_lora(...)` for plain `transformers` and `peft`.
# - [The benchmark](../docs/evaluation.md): its metrics and tables. From a shell, over a hundred records:
#   `backward-lens evaluate --model facts --methods all --records 100 --out edits/`
# - [Five minutes](five_minutes.ipynb) and [looking at gradients](looking.ipynb): what the shift was read
#   off from.
