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
# # The paper, figure by figure
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/the_paper.ipynb)
#
# *Backward Lens: Projecting Language Model Gradients into the Vocabulary Space* (Katz, Belinkov, Geva
# and Wolf, [EMNLP 2024](https://arxiv.org/abs/2402.12865)) reads gradients as words. This notebook goes
# through its claims in its order, measures each in a few lines, and says where a small model agrees
# and where it does not. At the end you know what the paper says, which of it is algebra and which is
# an observation, and how to measure it on a model of your own.

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
# The paper has GPT-2 (medium and xl) and Llama2-7B, and 100 prompts of CounterFact. Here it is a GPT-2
# of 8 layers, width 128 and 3,072 tokens that ships in the package, and 30 prompts of its own records.
# It was trained on facts and little else, and it was *made* to gather what it knows of a subject at the
# subject's last token by the middle of its layers ([model
# card](../backward_lens_tl/facts_model/MODEL_CARD.md)). So it can show that a claim does not need size,
# but not that it holds of models in general. What the text says about numbers is about this model; the
# code runs on any.

# %%
import tempfile
from textwrap import fill

import pandas as pd
import torch

import backward_lens_tl as blt
from backward_lens_tl import analysis, figures
from backward_lens_tl.editing import EditRequest, ForwardPassShift

model = blt.load_model("facts")  # with a network: "gpt2", or any name on the Hugging Face hub

# %% [markdown]
# ## Figures 1 and 5: a gradient in words
#
# The prompt of the paper is "Lionel Messi plays for", and the loss is `-log p(" Paris")` behind it. For
# each matrix `y = x @ W` of an MLP, `x_i` is what it reads at token `i`, and `delta_i = dL/dy_i` is the
# error that comes back to its output there, the *vector-Jacobian product* or VJP. The paper reads the
# one of the two that is as wide as the residual stream, with the Logit Lens: final norm, unembedding,
# most probable token. That is `x_i` for `W_in` (the paper's FF1) and `delta_i` for `W_out` (FF2).
#
# > *The paper:* across most layers the VJPs of `W_out` project to "Paris" and to words like it; in the
# > top layers only the last token still writes.
#
# The paper's prompts have no BOS token, so `prepend_bos=False` throughout. The table shows `-delta_i`,
# what gradient descent adds; the paper shows `delta_i`, and says to look at its *least* probable tokens.

# %%
prompt, target = "Lionel Messi plays for", " Paris"
result = blt.backward_lens(model, prompt, target, prepend_bos=False)
result

# %% [markdown]
# **Agrees.** In the last column of `W_out` the first word is " Paris" in all 8 layers; in most of
# them " France" and " painting" stand behind it (point at a cell). A second column says " Paris", that of " Messi", but
# only up to layer 4. From layer 5 on all columns but the last grow paler, and in layer 7 they are empty.
#
# `W_in` above is another thing: words that the forward pass was thinking of, such as " soccer" and
# " Miami". They come from no target. An update *imprints* them: it adds them to neurons, or subtracts
# them, so that these fire more, or less, when the same is read again.
#
# ## Lemma 4.1: thin gradients
#
# > *The paper:* the gradient of a matrix is `sum_i x_i^T delta_i`, one outer product per token, so its
# > rank is at most the number of tokens, `n`.
#
# This is algebra, if the `x_i` and `delta_i` are the right ones. So here are the sizes of one gradient,
# its rank as linear algebra finds it in the full matrix, and the largest relative error of any such sum
# against autograd's own weight gradient, over both matrices of all layers:

# %%
gradient = result.capture["W_out", 1]
x, delta = gradient.inputs[0], gradient.vjps[0]
dense = x.T @ delta
report = blt.validate(model, prompt, objective=blt.target_nll(target), matrices="mlp")
pd.Series(
    {
        "tokens of the prompt": str(len(x)),
        "rank of the gradient": str(int(torch.linalg.matrix_rank(dense))),
        "numbers in the gradient": f"{dense.numel():,}",
        "numbers in its two factors": f"{x.numel() + delta.numel():,}",
        "largest error, all layers": f"{report.max_error:.0e}",
    }
).to_frame("W_out of layer 1")

# %% [markdown]
# A matrix of 65,536 numbers is 3,200 of them, up to float32's rounding. Everything below reads the
# factors alone.
#
# ## Figure 4: is the rank really n?
#
# > *The paper:* almost always exactly `n`, with a drop of one or two in a few dozen examples, and 1 in
# > the last layer.
#
# One sweep measures all that follows: 30 prompts, raw gradients as in the paper, both of its lenses.

# %%
config = blt.SweepConfig(
    prompts=30,
    direction="gradient",
    projection=["logit_lens", "normalized"],
    k=1,
    prepend_bos=False,
    multi_token="first",  # of a target of several tokens, as in the paper
)
sweep = blt.sweep(model, "facts", tempfile.mkdtemp(), config, progress=False)
sweep.prompts()[["text", "target", "answer", "n_tokens", "loss"]].head(4).round(2)

# %% [markdown]
# Targets are answers that are wrong but of the right kind; the loss, in nats, is high because the model
# knows better. Figures are plotly's by default; matplotlib's are pictures, which stay in a notebook's
# file. The dashed line is `rank = n`:

# %%
figures.gradient_ranks(sweep.gradients(), backend="matplotlib")

# %% [markdown]
# How many gradients are that, and how many of them are off the law?

# %%
ranks = analysis.gradient_ranks(sweep)
{"gradients": int(ranks.prompts.sum()), "off the law": int(ranks.exceptions.sum())}

# %% [markdown]
# **Agrees, without a single drop.** (`analysis.rank_exceptions` would say why there is one.) In the last
# layer the rank is 1 because nothing of the other tokens is read after it: attention has no way back
# from there, so every `delta_i` but the last token's is zero. The same follows for any causal model
# with the loss on its last token.
#
# A rank of `n` is not yet `n` directions that matter. How many singular values hold 99 % of the
# gradient's sum of squares (`rank_99`), and which part of it (0 to 1) the largest one holds by itself
# (`top_energy`), as means over prompts of 8.4 tokens on average:

# %%
spectra = sweep.gradients(["rank_99", "top_energy"]).groupby(["matrix", "layer"])
spectra[["rank_99", "top_energy"]].mean().unstack("matrix").astype(float).round(2)

# %% [markdown]
# Beyond the paper, and the more telling number: in layers 5 and 6 two or three directions are all, and
# one of them has 95 % or more. Up to layer 4 it takes four to six. The next figure suggests whose
# they are.
#
# ## Figures 6 and 16: who writes where?
#
# > *The paper:* most is written by the subject's tokens in the first layers, and by the last token
# > around the second quarter of the layers. Most other tokens have a VJP close to zero.
#
# A *segment* is a part of the prompt around its subject. The figure has the mean length `||delta_i||` of
# the VJPs of `W_out`; more is more writing.

# %%
norms = analysis.norms_by_segment(sweep)
figures.norms_by_segment(norms, matrix="W_out", backend="matplotlib")

# %% [markdown]
# **Agrees in who, differs in where.** After the last token the subject's last token writes most, and all
# others little. But the two areas are not bumps: the last token writes nearly the same in every layer,
# with its maximum in layer 4, just behind the second quarter. And the subject's part is a plateau with a
# cliff: nearly 0.5 up to layer 4, next to nothing from layer 5 on. There this model reads its subject
# out: attention of layer 5 fetches the facts, and no error goes back for more. Causal tracing in the
# model card finds the same border by restoring hidden states.
#
# For `W_in` (figure 16) the paper sees the same pattern as for `W_out`:

# %%
figures.norms_by_segment(norms, matrix="W_in", backend="matplotlib")

# %% [markdown]
# **Differs.** The cliff is there, smaller. But the last token writes most in layer 0, and then again in
# the upper three layers, not around the middle. The VJP of `W_in` has passed the neurons' slopes and
# `W_out`, so it is small wherever the MLP itself is weak, and layers 1 to 4 seem to be: see the next
# table. That is a guess, which nothing here tests.
#
# ## Figure 17: long inputs, long errors?
#
# > *The paper:* there is no correlation between the norms of `x_i` and `delta_i`.
#
# Spearman's coefficient over all tokens of all prompts (from -1 to 1; in the last layer over last tokens
# alone), and the mean length of what either matrix reads:

# %%
lengths = analysis.norms_by_segment(sweep, of="input").query("segment == 'last token'")
pd.concat(
    {
        "spearman": analysis.norm_correlation(sweep).pivot(
            index="layer", columns="matrix", values="spearman"
        ),
        "norm of x_i, last token": lengths.pivot(index="layer", columns="matrix", values="mean"),
    },
    axis=1,
).round(2)

# %% [markdown]
# **Holds for most layers only.** There is no common rule, and signs differ, but zero it is not everywhere:
# -0.48 for `W_out` in layer 4, 0.43 for `W_in` in layer 5. Tokens of one prompt are no independent draws, so take
# these coefficients as descriptions. The neurons of layers 1 to 4 are indeed nearly silent at the last
# token: what `W_out` reads there has a length of 1.5 to 2.6, against 15 in layer 0.
#
# ## Figures 20 and 21: what is imprinted
#
# > *The paper:* the inputs `x_i` of `W_in` show how the forward pass builds up its own answer, layer by
# > layer. Of the target they show what the forward pass thinks of it, and no more.
#
# Median rank at the last token, 0 for the most probable of the model's tokens. `W_in` is read through
# `x_i`, `W_out` through the raw `delta_i`; *answer* is what the model said itself.

# %%
by_segment = [analysis.token_ranks_by_segment(sweep, of=of) for of in ("answer", "target")]
at_last = pd.concat(by_segment).query("segment == 'last token' and projection == 'logit_lens'")
at_last.pivot(index="layer", columns=["matrix", "of"], values="median")

# %% [markdown]
# **Agrees.** The answer climbs from the median rank 56 in layer 0 to 1.5 in layer 1, so attention of layer 0
# brings a first part of it, and from layer 5 on, behind the read-out of the subject, it is 0. And the target, a wrong answer of the right kind, is behind it in all layers.
#
# The columns of `W_out` are figures 18 and 19, and the other half of the mechanism. In raw VJPs the
# target has rank 3071: the very last of 3,072, in every layer. The model's own answer has a median rank
# of 3 or better. Descent subtracts: the update takes the one away and adds the other. The paper saw the
# target's rank get worse in the first few layers of its models, and put it down to the Logit Lens, which
# is poor in early layers. Here it does not: also in layer 0 the VJP can be read as it is.
#
# ## Lemma 5.1: why the target is at the far end
#
# > *The paper:* the first VJP of a backward pass is a sum of all tokens' embeddings. The target's
# > coefficient is `p(target) - 1`, the only negative one; every other token has its probability `p`.
#
# The smallest coefficient and the three largest, for the prompt above:

# %%
with torch.no_grad():
    logits = model(model.to_tokens(prompt, prepend_bos=False))[0, -1].float().cpu()
coefficients = logits.softmax(-1)
coefficients[model.to_single_token(target)] -= 1
order = coefficients.argsort().tolist()
ends = {
    repr(model.to_string([token])): float(coefficients[token]) for token in order[:1] + order[-3:]
}
pd.Series(ends, name="coefficient").round(4).to_frame()

# %% [markdown]
# It is a difference of two embeddings, in effect: " Miami" minus " Paris". Which words does such a vector
# have at its ends? Cosines with the rows of the decoding matrix:

# %%
rows = model.W_U.detach().float().cpu().T
first = coefficients @ rows
cosines = torch.cosine_similarity(rows, first[None], dim=-1)
ends = [*cosines.topk(4).indices.tolist(), *(-cosines).topk(4).indices.tolist()]
words = {repr(model.to_string([token])): float(cosines[token]) for token in ends}
pd.Series(words, name="cosine with the first VJP").round(2).to_frame().T

# %% [markdown]
# " Belgrade", " Hungary" and " dinar" have nothing to do with football in Miami. Their rows lie near
# the difference of the two, and that is all: whoever meets them at the far end of a table of this prompt,
# as you will below, need not look for a reason in the model's knowledge.
#
# How much of that first vector is left in the VJPs below it? The cosine with the last token's VJP of
# `W_out`, by layer:

# %%
vjps = {layer: result.capture["W_out", layer].vjps[0, -1].cpu() for layer in result.layers}
cosines = {layer: float(torch.cosine_similarity(first, vjps[layer], dim=0)) for layer in vjps}
pd.Series(cosines, name="cosine with the first VJP").round(2).to_frame().T

# %% [markdown]
# **Agrees.** 0.92 in the last layer, where only the final norm (which the lemma leaves out) stands
# between, and 0.61 or more all the way down: the residual stream carries the vector past the layers, as
# the paper says. (Cosines of random directions in 128 dimensions scatter about 0 by `1 / sqrt(128)`,
# which is 0.09.)
#
# ## Figure 7: and the other tokens?
#
# > *The paper:* the last token's VJPs consistently rank the target among the least probable tokens; those
# > of the other tokens behave alike.
#
# Median rank of the target in raw VJPs of `W_out`, with a band from quartile to quartile. The far end
# of the vocabulary is at the bottom.

# %%
targets = by_segment[1]
figures.token_ranks_by_segment(targets, matrix="W_out", scale="linear", backend="matplotlib")

# %% [markdown]
# **The first half agrees, the second does not.** The last token is at the bottom in all layers, and the
# subject's last token up to the cliff. All others are near the *top*, in layers 0 to 3 the subject's
# first token most of all: there the update takes the target away. (Zero vectors are left out here. The paper has them in,
# which is why its lines meet in the last layer.)
#
# Why? The error reaches an earlier token on two ways through attention: by what is carried from it, the
# values, and by how much is looked at it, the pattern. Hooks act on the run that is analysed, so one
# that detaches a tensor closes a way for the backward pass, and leaves the forward pass as it is. The
# same median ranks, of layer 0:

# %%
prompts = sweep.prompts()
ways = {"as it is": None, "no way by patterns": "hook_pattern", "no way by values": "hook_v"}
medians = {}
for name, point in ways.items():
    points = [f"blocks.{layer}.attn.{point}" for layer in result.layers if point]
    with model.hooks(fwd_hooks=[(point, lambda value, hook: value.detach()) for point in points]):
        cut = blt.backward_lens(
            model,
            prompts.text.tolist(),
            prompts.target_id.tolist(),
            matrices="W_out",
            layers=0,
            direction="gradient",
            prepend_bos=False,
        )
    table = analysis.token_ranks_by_segment(cut.to_df(subject=prompts.subject.tolist()))
    medians[name] = table.set_index("segment")["median"]
pd.DataFrame(medians)

# %% [markdown]
# Either sign comes with the values. Without the patterns the picture stays, and is even sharper;
# without the values no segment but the last token has the target near an end. So this is no matter of
# attention looking elsewhere: something in what the heads carry turns the target round on its way to
# these tokens. What does so, and whether larger models have it, is not known here.
#
# ## Figures 22 and 23: the Normalized Logit Lens
#
# > *The paper:* short vectors read like the zero vector, whatever their direction. If vectors are made
# > unit length first, most VJPs have the target among the least probable tokens.
#
# The part of `W_out`'s VJPs, without those that are zero, that have the target among the least probable
# 1 % of tokens (`at the far end`), and that are so short that the final norm's `eps` blurs them
# (`faint`):

# %%
cells = sweep.positions(["segment", "target_rank", "is_zero", "is_faint"])
cells = cells[(cells.matrix == "W_out") & ~cells.is_zero.astype(bool)]
cells = cells.assign(
    of=cells.segment.eq("last token").map({True: "last token", False: "other tokens"}),
    far=cells.target_rank >= 0.99 * (model.cfg.d_vocab - 1),
)
parts = cells.groupby(["of", "projection"])[["far", "is_faint"]].mean().astype(float).round(3)
parts.rename(columns={"far": "at the far end", "is_faint": "faint"})

# %% [markdown]
# **Does not hold here.** The last token's VJPs are all at the far end under either lens, and a tenth of
# the others, under either lens. More than a quarter of the others are faint as they are, so there would
# be something to mend. But what normalizing brings out is their direction, and their direction is not
# against the target: that was figure 7.
#
# ## Tables 2 and 3, figures 8 and 9: neurons, and the few vectors that span them
#
# > *The paper:* each neuron of the gradient is a combination of the `n` spanning vectors, and looks like
# > one or two of them. The longest are copies of the last token's VJP up to the sign, with "Paris" at one
# > end. The shortest read like the zero vector.
#
# The paper takes layer 14 of GPT2-medium's 24; this is the layer as far up. Three neurons (rows of the
# gradient of `W_out`) of each group by length:

# %%
layer = model.cfg.n_layers * 14 // 24
words = analysis.neuron_tokens(model, result, "W_out", layer, k=2)
words.round({"norm": 4})

# %% [markdown]
# **Agrees.** " Paris" leads at one end of the three longest. One of the three middle ones says other
# things, and the shortest three have the zero vector's words, which come from the final norm's bias.
# (Some tokens of this vocabulary are single bytes, which show as blanks.) And the five vectors that all
# 512 neurons are made of:

# %%
analysis.spanning_tokens(model, result, "W_out", layer, k=3).round({"norm": 3})

# %% [markdown]
# Three of them have the target first at one end: those of " Messi" and " for" at the bottom, which the
# update adds, and that of "Li", a tenth as long, at the top, which it takes away. The figure puts every
# neuron beside every vector, the longest neuron on the left: above, which part of their 100 most
# probable tokens the two share (0 to 1); below, the cosine.

# %%
overlap = analysis.neuron_overlap(model, result, "W_out", layer, k=100)
figures.neuron_overlap(overlap, "W_out", layer, backend="matplotlib")

# %% [markdown]
# Dark at the lower right of the upper map: the shortest hundred read like the zero vector, though the
# lower map has colours there. That is the paper's own remark, that short neurons may look like a vector
# of the span and still say nothing. On the left the dark cells are those of " Messi" and of " for".
#
# How much is lost by reading five vectors instead of 512 neurons? By quarters of the neurons, longest
# first: the median cosine, in size, with the most similar of the vectors, and the part of the gradient's
# sum of squares:

# %%
by_neuron = overlap.assign(cosine=overlap.similarity.abs()).groupby("norm_order")
neurons = by_neuron.agg(cosine=("cosine", "max"), energy=("neuron_norm", "first")).reset_index()
neurons["energy"] = neurons.energy**2 / (neurons.energy**2).sum()
neurons["quarter"] = 1 + 4 * neurons.norm_order // len(neurons)
neurons.groupby("quarter").agg({"cosine": "median", "energy": "sum"}).round(3)

# %% [markdown]
# **Agrees.** A typical neuron of the longest quarter, which holds 88 % of the gradient, has a cosine of
# 0.92 with one single vector. It is not a copy of it, since here *two* tokens write, and neurons mix
# them. Figure 10 is the same for `W_in` and its inputs:

# %%
overlap = analysis.neuron_overlap(model, result, "W_in", layer, k=100)
figures.neuron_overlap(overlap, "W_in", layer, backend="matplotlib")

# %% [markdown]
# **Agrees**, and the zero vector's corner is there again. But a column of the lower map often has one
# colour from top to bottom: the five inputs `x_i` are similar among themselves, so a neuron that is like
# one is like all of them, and "which token was imprinted" has a weaker answer than "which token shifts".
#
# ## Lemma 5.2: imprint and shift
#
# > *The paper:* after a step `W <- W - eta dL/dW`, run again on the same prompt, the matrix's output at
# > a token with input `x` has moved by `-eta sum_i (x . x_i) delta_i`. `W_in` recognises what was
# > imprinted, `W_out` is shifted against its VJPs, towards the target.
#
# `step_changes` takes such a step on one matrix at a time, runs the model again, and puts every bit
# back. Three prompts, all layers, both matrices; `eta` is chosen so that the loss should fall by 1 %.

# %%
some = prompts.head(3)
steps = analysis.step_changes(model, some.text.tolist(), some.target_id.tolist(), prepend_bos=False)
figures.step_changes(steps, backend="matplotlib")

# %% [markdown]
# Points on the line are steps that did to the loss what was predicted. One group per prompt; the loss is
# in nats. The prediction of the *loss* is only right to first order; that of the matrix's own *output*
# is exact. Over all steps of a matrix: `output_error`, the predicted change of the output against the
# measured one (relative, 0 is exact); `rounding`, what float32 alone would make of that;
# `self_imprint`, the cosine at the last token of the change with that token's own term; and `of_loss`,
# the measured fall of the loss as a part of the predicted one.

# %%
steps["of_loss"] = steps.loss_change / steps.predicted_loss_change
columns = ["output_error", "rounding", "self_imprint", "of_loss"]
ends = steps.groupby("matrix")[columns].agg(["min", "max"])
ends.apply(lambda column: column.map("{:.4g}".format)).T.unstack()

# %% [markdown]
# **Agrees, as algebra must.** Outputs move as predicted, up to the order of rounding. What algebra does
# not say is that the loss follows so well, within 0.2 % for `W_out`, and within 5 % for `W_in`, which
# has the activation behind it. Nor does it say anything of `self_imprint`: at least 0.71 for `W_in` and
# 0.94 for `W_out`, the last token answers mostly to its own imprint. How often is the target the most
# probable token of what was added to the output of `W_out` at the last token?

# %%
shifts = steps[steps.matrix == "W_out"]
f"{int((shifts.shift_target_rank == 0).sum())} of {len(shifts)} steps"

# %% [markdown]
# ## Section 7 and table 1: an edit without a backward pass
#
# > *The paper:* if `W_out` is shifted towards the target's embedding anyway, write it there at once, with
# > the last token's input as the other factor. One forward pass does it, about as reliably as ROME, with
# > less generalization and more damage to neighbors.
#
# The *forward pass shift* in the last layer but one, with its size grown until the target leads:

# %%
shift = ForwardPassShift(layer=-2, size=4.0, form="scale_free", iterations=15, prepend_bos=False)
edited = prompts[["text", "answer", "target"]].head(6)
after = []
for row in edited.itertuples():
    with shift(model, EditRequest(row.text, row.target)).applied(model):
        after.append(blt.backward_lens(model, row.text, layers=-1, prepend_bos=False).target())
edited.assign(after=after)

# %% [markdown]
# **Agrees** as far as this goes: all six say what was wanted. What becomes of paraphrases, of neighbors
# and of other text, and how ROME, MEMIT and fine-tuning do (table 1, figure 24), takes more than six
# prompts. That is the [editing notebook](editing.ipynb), and [all numbers for this
# model](../docs/editing.md#results-on-the-facts-model).
#
# ## All of it, with verdicts
#
# So far a reader had to believe "agrees". `reproduce` makes each statement of the paper into claims with
# thresholds, the same ones for every model, and writes a report. On the same 30 prompts:

# %%
names = ["fig4", "fig5", "fig6", "fig7", "fig8", "fig10", "fig17", "fig18", "fig20", "fig22"]
out = tempfile.mkdtemp()
found = blt.reproduce(model, "facts", out, names, prompts=config.prompts, progress=False)
pd.DataFrame(
    [
        (name, finding.verdict, sum(check.holds for check in finding.checks), len(finding.checks))
        for name, finding in found.items()
    ],
    columns=["experiment", "verdict", "claims that hold", "claims"],
).set_index("experiment")

# %% [markdown]
# The first claim decides whether a statement holds. "With exceptions" means that another one does not,
# or that a claim holds on the whole and lists what departs from it, as figure 17's coefficients. What
# does not hold, in full:

# %%
for name, finding in found.items():
    for check in finding.checks:
        if not check.holds:
            print(
                fill(f"{name}: {check.claim}"),
                fill(check.found, initial_indent="found: "),
                sep="\n",
            )

# %% [markdown]
# Read together: the algebra holds, as it must, and the last token's story holds in every layer. What
# departs is *where in depth* things happen (that the subject is read out behind the middle was trained
# into this model), and what the *other* tokens' VJPs say, which is not what the paper saw in larger
# ones.
#
# ## What next
#
# Everything here, attention, editing and optimizers too, with a report that puts the paper's statement
# beside what was found, is one command; so is another model:
#
# ```sh
# backward-lens reproduce all --model facts
# backward-lens reproduce gradients --model gpt2-xl
# ```
#
# - [The paper's experiments](../docs/reproducing.md): every claim with its threshold, and what was found
#   on two small models.
# - [Analyses](../docs/analysis.md): the functions of this notebook, one by one.
# - [A whole data set](data_set.ipynb): sweeps, and questions that the paper did not ask.
# - [Editing](editing.ipynb): section 7 at length.
# - [Five minutes](five_minutes.ipynb) and [looking](looking.ipynb), if the first table was new to you.
#
# **Exercise.** Figure 7's other tokens had the target turned round, and it came with the values. Close
# the way through the values of *one* layer at a time, and look at the subject's first token. Is it one
# layer's doing? A surprise to find oneself: look, in the same runs, at what becomes of the subject's
# *last* token.
