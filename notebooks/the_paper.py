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
# and Wolf, [EMNLP 2024](https://arxiv.org/abs/2402.12865)) projects gradients to tokens. This notebook
# goes through the claims of the paper in order, measures each in a few lines, and says where a small
# model agrees and where it does not. It shows which claims are algebra and which are observations, and
# how to measure them on your own model.

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
# The paper uses GPT-2 (medium and xl) and Llama2-7B with 100 prompts of CounterFact. This notebook uses
# 30 prompts and a GPT-2 with 8 layers, width 128 and 3,072 tokens that ships with the package. The model
# was trained on facts and little else, and it was *trained* to gather its knowledge of a subject at the
# subject's last token by the middle of its layers ([model
# card](../backward_lens_tl/facts_model/MODEL_CARD.md)). It can show that a claim does not need a large
# model, but not that the claim holds in general. All remarks about numbers are about this model; the code
# runs on any model.

# %%
import tempfile
from textwrap import fill

import pandas as pd
import torch

import backward_lens_tl as blt
from backward_lens_tl import analysis, figures
from backward_lens_tl.editing import EditRequest, ForwardPassShift

model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub

# %% [markdown]
# ## Figures 1 and 5: a gradient as tokens
#
# The paper's prompt is "Lionel Messi plays for", and the loss is `-log p(" Paris")` after it. For each
# matrix `y = x @ W` of an MLP, `x_i` is the input at token `i`, and `delta_i = dL/dy_i` is the gradient at
# the output, the *vector-Jacobian product* or VJP. The paper takes the one with the width of the residual
# stream and projects it with the logit lens (final norm, then unembedding). That is `x_i` for `W_in` (the
# paper's FF1) and `delta_i` for `W_out` (FF2).
#
# > *The paper:* across most layers the VJPs of `W_out` project to "Paris" and related tokens; in the top
# > layers only the last token still writes.
#
# The paper's prompts have no BOS token, so this notebook uses `prepend_bos=False`. The table shows
# `-delta_i`, which gradient descent adds. The paper shows `delta_i` and looks at its *least* probable
# tokens.

# %%
prompt, target = "Lionel Messi plays for", " Paris"
result = blt.backward_lens(model, prompt, target, prepend_bos=False)
result

# %% [markdown]
# **Agrees.** In the last column of `W_out`, the top token is " Paris" in all 8 layers, followed by
# " France" and " painting" in most of them (hover over a cell). The column of " Messi" also shows " Paris",
# but only up to layer 4. From layer 5 on, the norms of all columns except the last decrease, and in layer
# 7 they are zero.
#
# The tokens of `W_in` (top) describe the forward pass, such as " soccer" and " Miami". They do not depend
# on the target. An update *imprints* them: it adds these inputs to neurons or subtracts them, so that the
# neurons respond more or less to the same inputs.
#
# ## Lemma 4.1: low-rank gradients
#
# > *The paper:* the gradient of a matrix is `sum_i x_i^T delta_i`, one outer product per token, so its
# > rank is at most the number of tokens, `n`.
#
# This is algebra, provided that the `x_i` and `delta_i` are correct. The next cell shows the sizes of one
# gradient, its rank computed from the dense matrix, and the largest relative error against autograd's own
# weight gradient over both matrices of all layers:

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
# A matrix of 65,536 numbers is determined by 3,200 numbers, up to the rounding of float32. Everything
# below uses only the factors.
#
# ## Figure 4: is the rank really n?
#
# > *The paper:* almost always exactly `n`, with a drop of one or two in a few dozen examples, and 1 in
# > the last layer.
#
# One sweep provides all measurements below: 30 prompts, raw gradients as in the paper, and both of its
# lenses.

# %%
config = blt.SweepConfig(
    prompts=30,
    direction="gradient",
    projection=["logit_lens", "normalized"],
    k=1,
    prepend_bos=False,
    multi_token="first",  # the first token of longer targets, as in the paper
)
sweep = blt.sweep(model, "facts", tempfile.mkdtemp(), config, progress=False)
sweep.prompts()[["text", "target", "answer", "n_tokens", "loss"]].head(4).round(2)

# %% [markdown]
# The targets are wrong answers of the right kind. The loss, in nats, is high because the model knows the
# right answer. Figures use plotly by default; matplotlib figures are images that are stored in the
# notebook. The dashed line is `rank = n`:

# %%
figures.gradient_ranks(sweep.gradients(), backend="matplotlib")

# %% [markdown]
# How many gradients are there, and how many of them have another rank?

# %%
ranks = analysis.gradient_ranks(sweep)
{"gradients": int(ranks.prompts.sum()), "of another rank": int(ranks.exceptions.sum())}

# %% [markdown]
# **Agrees, without exception.** (`analysis.rank_exceptions` would list exceptions with their cause.) In the
# last layer the rank is 1, because no attention follows it: all `delta_i` are zero except at the last
# token. The same holds for any causal model with a loss at its last token.
#
# A rank of `n` does not mean that `n` directions matter. The next table shows how many singular values
# hold 99 % of the gradient's squared norm (`rank_99`) and the fraction in the largest one
# (`top_energy`), as means over prompts, which have 8.4 tokens on average:

# %%
spectra = sweep.gradients(["rank_99", "top_energy"]).groupby(["matrix", "layer"])
spectra[["rank_99", "top_energy"]].mean().unstack("matrix").astype(float).round(2)

# %% [markdown]
# This goes beyond the paper and is more informative: in layers 5 and 6, two or three directions hold
# nearly everything, and one of them holds 95 % or more. Up to layer 4 it takes four to six. The next
# figure suggests which tokens they come from.
#
# ## Figures 6 and 16: which tokens write?
#
# > *The paper:* the subject's tokens write most in the first layers, and the last token around the second
# > quarter of the layers. Most other tokens have a VJP close to zero.
#
# A *segment* is a group of tokens relative to the subject of the prompt. The figure shows the mean norm
# `||delta_i||` of the VJPs of `W_out`.

# %%
norms = analysis.norms_by_segment(sweep)
figures.norms_by_segment(norms, matrix="W_out", backend="matplotlib")

# %% [markdown]
# **Agrees on the tokens, differs in the layers.** The last token has the largest norm, followed by the
# subject's last token; all others have small norms. But the norms do not peak as in the paper. At the
# last token, the norm is nearly constant, with its maximum in layer 4, just after the second quarter. At
# the subject's last token, it is nearly 0.5 up to layer 4 and close to zero from layer 5 on. In this model,
# attention of layer 5 reads the facts from the subject, and later layers do not. Causal tracing in the
# model card finds the same boundary by restoring hidden states.
#
# For `W_in` (figure 16), the paper finds the same pattern as for `W_out`:

# %%
figures.norms_by_segment(norms, matrix="W_in", backend="matplotlib")

# %% [markdown]
# **Differs.** The drop is smaller. The last token has its largest norm in layer 0, and large norms again
# in the upper three layers, not around the middle. The VJP of `W_in` has passed through `W_out` and the
# activation function, so it is small where the MLP itself contributes little. Layers 1 to 4 may be such
# layers; see the next table. This notebook does not test that.
#
# ## Figure 17: are the norms of inputs and VJPs related?
#
# > *The paper:* there is no correlation between the norms of `x_i` and `delta_i`.
#
# The table shows Spearman's coefficient over all tokens of all prompts (between -1 and 1; in the last layer,
# over last tokens only) and the mean norm of each matrix's input at the last token:

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
# **Holds for most layers only.** There is no common trend, and signs differ, but the coefficients are not
# zero everywhere: -0.48 for `W_out` in layer 4, 0.43 for `W_in` in layer 5. Tokens of one prompt are not
# independent, so these coefficients are only descriptive. The MLPs of layers 1 to 4 are indeed nearly
# inactive at the last token: the input of `W_out` has a norm of 1.5 to 2.6 there, against 15 in layer 0.
#
# ## Figures 20 and 21: what is imprinted
#
# > *The paper:* the inputs `x_i` of `W_in` show how the forward pass builds up its own answer, layer by
# > layer. For the target, they show only how the forward pass ranks it.
#
# The table shows median ranks at the last token; 0 is the most probable token. For `W_in`, the `x_i` are
# projected, and for `W_out`, the raw `delta_i`. *answer* is the model's own answer.

# %%
by_segment = [analysis.token_ranks_by_segment(sweep, of=of) for of in ("answer", "target")]
at_last = pd.concat(by_segment).query("segment == 'last token' and projection == 'logit_lens'")
at_last.pivot(index="layer", columns=["matrix", "of"], values="median")

# %% [markdown]
# **Agrees.** The median rank of the answer improves from 56 in layer 0 to 1.5 in layer 1, so attention of
# layer 0 already provides a part of it. From layer 5 on, after the subject has been read, it is 0. The
# target, a wrong answer of the right kind, has a worse rank in all layers.
#
# The columns of `W_out` correspond to figures 18 and 19. In raw VJPs, the target has rank 3071, the last of
# 3,072, in every layer, and the model's own answer has a median rank of 3 or better. Gradient descent
# subtracts: the update removes the answer and adds the target. In the paper's models, the rank of the
# target gets worse in the first few layers, which the paper attributes to the logit lens being poor in
# early layers. This does not happen here: the VJP can be projected in layer 0, too.
#
# ## Lemma 5.1: why the target is at the bottom
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
# This is essentially a difference of two embeddings, " Miami" minus " Paris". Which tokens are at the ends
# of such a vector? These are cosines with the rows of the decoding matrix:

# %%
rows = model.W_U.detach().float().cpu().T
first = coefficients @ rows
cosines = torch.cosine_similarity(rows, first[None], dim=-1)
ends = [*cosines.topk(4).indices.tolist(), *(-cosines).topk(4).indices.tolist()]
named = {repr(model.to_string([token])): float(cosines[token]) for token in ends}
pd.Series(named, name="cosine with the first VJP").round(2).to_frame().T

# %% [markdown]
# " Belgrade", " Hungary" and " dinar" have nothing to do with football in Miami. Their rows happen to be
# close to the difference of the two embeddings. If you see such tokens in a table of this prompt, as you
# will below, they do not say anything about the model's knowledge.
#
# How much of this first vector is left in the VJPs of lower layers? This is the cosine with the last token's VJP
# of `W_out`, by layer:

# %%
vjps = {layer: result.capture["W_out", layer].vjps[0, -1].cpu() for layer in result.layers}
cosines = {layer: float(torch.cosine_similarity(first, vjps[layer], dim=0)) for layer in vjps}
pd.Series(cosines, name="cosine with the first VJP").round(2).to_frame().T

# %% [markdown]
# **Agrees.** The cosine is 0.92 in the last layer, where only the final norm (which the lemma leaves out)
# comes in between, and 0.61 or more in all others: the residual stream carries the vector past the
# layers, as the paper says. (The cosines of random directions in 128 dimensions have a standard deviation
# of `1 / sqrt(128)`, which is 0.09.)
#
# ## Figure 7: the other tokens
#
# > *The paper:* the last token's VJPs consistently rank the target among the least probable tokens; those
# > of the other tokens behave alike.
#
# The figure shows the median rank of the target in raw VJPs of `W_out`, with a band between the quartiles.
# The least probable tokens are at the bottom.

# %%
targets = by_segment[1]
figures.token_ranks_by_segment(targets, matrix="W_out", scale="linear", backend="matplotlib")

# %% [markdown]
# **The first half agrees, the second does not.** The target is at the bottom for the last token in all
# layers, and for the subject's last token up to layer 4. For all other tokens it is near the *top*, most of all for the
# subject's first token in layers 0 to 3: there the update decreases the target. (Zero vectors are excluded
# here. The paper includes them, so its lines meet in the last layer.)
#
# Why? The gradient reaches an earlier token through attention in two ways: through the values and through
# the attention pattern. Hooks stay active in the run that is analysed, so a hook that detaches a tensor
# blocks one of the two in the backward pass and leaves the forward pass unchanged. These are the same
# median ranks in layer 0:

# %%
prompts = sweep.prompts()
ways = {"unchanged": None, "patterns detached": "hook_pattern", "values detached": "hook_v"}
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
# The effect comes from the values. Without the patterns it stays and gets even clearer; without the values,
# only the last token has the target near an end. So it is not about where attention looks: something in
# the values that heads move inverts the target on the way to these tokens. It is not known what causes
# this, or whether larger models do the same.
#
# ## Figures 22 and 23: the normalized logit lens
#
# > *The paper:* short vectors project to the same tokens as the zero vector, whatever their direction. If
# > vectors are normalized first, most VJPs have the target among the least probable tokens.
#
# For the nonzero VJPs of `W_out`, the table shows the fraction that has the target among the least probable
# 1 % of tokens (`at the bottom`), and the fraction that is so short that the final norm's `eps` dominates
# (`faint`):

# %%
cells = sweep.positions(["segment", "target_rank", "is_zero", "is_faint"])
cells = cells[(cells.matrix == "W_out") & ~cells.is_zero.astype(bool)]
cells = cells.assign(
    of=cells.segment.eq("last token").map({True: "last token", False: "other tokens"}),
    far=cells.target_rank >= 0.99 * (model.cfg.d_vocab - 1),
)
parts = cells.groupby(["of", "projection"])[["far", "is_faint"]].mean().astype(float).round(3)
parts.rename(columns={"far": "at the bottom", "is_faint": "faint"})

# %% [markdown]
# **Does not hold here.** All VJPs of the last token have the target at the bottom under either lens, and a
# tenth of the others do, under either lens. More than a quarter of the others are faint, so normalization
# could make a difference. But it only reveals their direction, and their direction is not against the
# target, as figure 7 showed.
#
# ## Tables 2 and 3, figures 8 and 9: neurons and their spanning vectors
#
# > *The paper:* each neuron of the gradient is a combination of the `n` spanning vectors, and resembles
# > one or two of them. The neurons with the largest norms are copies of the last token's VJP up to the
# > sign, with "Paris" at one end. Those with the smallest norms project like the zero vector.
#
# The paper uses layer 14 of 24 of GPT2-medium; this is the layer at the same relative depth. The table has
# three neurons (rows of the gradient of `W_out`) per group, grouped by norm:

# %%
layer = model.cfg.n_layers * 14 // 24
neurons = analysis.neuron_tokens(model, result, "W_out", layer, k=2)
neurons.round({"norm": 4})

# %% [markdown]
# **Agrees.** " Paris" is at one end of the three neurons with the largest norms. One of the three in the
# middle has other tokens, and the three with the smallest norms have the tokens of the zero vector, which
# come from the final norm's bias. (Some tokens of this vocabulary are single bytes, which show as blanks.)
# These are the five vectors that span all 512 neurons:

# %%
analysis.spanning_tokens(model, result, "W_out", layer, k=3).round({"norm": 3})

# %% [markdown]
# Three of them have the target at one end. Those of " Messi" and " for" have it at the bottom, so the
# update adds it. That of "Li", which has a tenth of their norm, has it at the top, so the update subtracts it. The figure
# compares every neuron with every vector, sorted by the norm of the neuron, largest on the left. Above is
# the fraction of their top 100 tokens that they share (0 to 1), below the cosine.

# %%
overlap = analysis.neuron_overlap(model, result, "W_out", layer, k=100)
figures.neuron_overlap(overlap, "W_out", layer, backend="matplotlib")

# %% [markdown]
# The dark area at the lower right of the upper map shows that the hundred neurons with the smallest norms
# project like the zero vector, although their cosines with other vectors are not zero. The paper makes the same remark: neurons with small norms may be similar to
# a spanning vector and still project to meaningless tokens. On the left, the dark cells are those of " Messi"
# and of " for".
#
# How much information is lost if you look at five vectors instead of 512 neurons? The table groups neurons
# into quarters by norm, largest first. It shows the median absolute cosine with the most similar vector, and
# the fraction of the gradient's squared norm:

# %%
by_neuron = overlap.assign(cosine=overlap.similarity.abs()).groupby("norm_order")
neurons = by_neuron.agg(cosine=("cosine", "max"), energy=("neuron_norm", "first")).reset_index()
neurons["energy"] = neurons.energy**2 / (neurons.energy**2).sum()
neurons["quarter"] = 1 + 4 * neurons.norm_order // len(neurons)
neurons.groupby("quarter").agg({"cosine": "median", "energy": "sum"}).round(3)

# %% [markdown]
# **Agrees.** The quarter with the largest norms holds 88 % of the gradient, and its typical neuron has a
# cosine of 0.92 with a single vector. It is not an exact copy, because *two* tokens write here and neurons
# mix them. Figure 10 is the same for `W_in` and its inputs:

# %%
overlap = analysis.neuron_overlap(model, result, "W_in", layer, k=100)
figures.neuron_overlap(overlap, "W_in", layer, backend="matplotlib")

# %% [markdown]
# **Agrees**, and neurons with small norms again project like the zero vector. But many columns of the lower
# map have a single colour: the five inputs `x_i` are similar to each other, so a neuron that is similar to
# one is similar to all of them. For `W_in`, it is less clear which token a neuron corresponds to than for
# `W_out`.
#
# ## Lemma 5.2: imprint and shift
#
# > *The paper:* after a step `W <- W - eta dL/dW`, run again on the same prompt, the matrix's output at
# > a token with input `x` has changed by `-eta sum_i (x . x_i) delta_i`. `W_in` recognizes what was
# > imprinted, `W_out` is shifted against its VJPs, towards the target.
#
# `step_changes` takes such a step on one matrix at a time, runs the model again, and restores the exact
# weights. This uses three prompts, all layers and both matrices; `eta` is chosen so that the loss should fall
# by 1 %.

# %%
some = prompts.head(3)
steps = analysis.step_changes(model, some.text.tolist(), some.target_id.tolist(), prepend_bos=False)
figures.step_changes(steps, backend="matplotlib")

# %% [markdown]
# Points on the line are steps that changed the loss as predicted, one group per prompt; the loss is in
# nats. The prediction of the *loss* is only a first-order estimate; that of the matrix's own *output* is
# exact. The table has the range over all steps of a matrix: `output_error` is the relative difference of the
# predicted and the measured change of the output; `rounding` is the error expected from float32;
# `self_imprint` is the cosine, at the last token, of the change with the term of that token's own input; and
# `of_loss` is the ratio of the measured and the predicted change of the loss.

# %%
steps["of_loss"] = steps.loss_change / steps.predicted_loss_change
columns = ["output_error", "rounding", "self_imprint", "of_loss"]
ends = steps.groupby("matrix")[columns].agg(["min", "max"])
ends.apply(lambda column: column.map("{:.4g}".format)).T.unstack()

# %% [markdown]
# **Agrees, as it must by algebra.** Outputs change as predicted, up to rounding. Algebra does not imply
# that the loss also follows this well, within 0.2 % for `W_out` and within 5 % for `W_in`, whose output
# passes through the activation function. Nor does it imply the values of `self_imprint`: at least 0.71 for `W_in`
# and 0.94 for `W_out`, so the last token responds mostly to its own imprint. How often is the target the
# top token of the change at the output of `W_out` at the last token?

# %%
shifts = steps[steps.matrix == "W_out"]
f"{int((shifts.shift_target_rank == 0).sum())} of {len(shifts)} steps"

# %% [markdown]
# ## Section 7 and table 1: an edit without a backward pass
#
# > *The paper:* since the update shifts the output of `W_out` towards the target's embedding, add that
# > embedding directly, with the last token's input as the other factor. This needs one forward pass and
# > is about as reliable as ROME, with less generalization and more damage to neighbors.
#
# This is the *forward pass shift* in the second-to-last layer, repeated until the target is the answer:

# %%
shift = ForwardPassShift(layer=-2, size=4.0, key="plain", iterations=15, prepend_bos=False)
edited = prompts[["text", "answer", "target"]].head(6)
after = []
for row in edited.itertuples():
    with shift(model, EditRequest(row.text, row.target)).applied(model):
        after.append(blt.backward_lens(model, row.text, layers=-1, prepend_bos=False).target())
edited.assign(after=after)

# %% [markdown]
# **Agrees**, as far as six prompts can show: all of them get the requested answer. The effects on
# paraphrases, neighbors and other text, and the comparison with ROME, MEMIT and fine-tuning (table 1, figure
# 24), need more prompts. See the [editing notebook](editing.ipynb) and [all results for this
# model](../docs/editing.md#results-on-the-facts-model).
#
# ## All experiments, with verdicts
#
# So far, "agrees" was our judgement. `reproduce` translates each statement of the paper into claims with
# thresholds, which are the same for every model, and writes a report. On the same 30 prompts:

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
# The first claim decides whether a statement holds. "With exceptions" means that another claim does not
# hold, or that a claim holds but lists exceptions, such as the coefficients of figure 17. These are all
# claims that do not hold:

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
# In summary, the algebra holds, as it must, and the statements about the last token hold in every layer. The
# differences are *at which depth* things happen (this model was trained to read the subject after the
# middle), and the VJPs of the *other* tokens, which differ from those in the paper's larger models.
#
# ## Where to go from here
#
# You can run all experiments, including attention, editing and optimizers, with one command, also for
# another model. It writes a report that compares the paper's statements with the results:
#
# ```sh
# backward-lens reproduce all --model facts
# backward-lens reproduce gradients --model gpt2-xl
# ```
#
# - [The paper's experiments](../docs/reproducing.md): every claim with its threshold, and results on two
#   small models.
# - [Analyses](../docs/analysis.md): the functions of this notebook, one by one.
# - [A whole data set](data_set.ipynb): sweeps, and questions beyond the paper.
# - [Editing](editing.ipynb): section 7 in detail.
# - [Five minutes](five_minutes.ipynb) and [looking](looking.ipynb): introductions to the table.
#
# **Exercise.** In figure 7, the values inverted the target at the other tokens. Detach the values of *one*
# layer at a time, and look at the subject's first token. Is a single layer responsible? In the same runs, look
# also at the subject's *last* token, which may surprise you.
