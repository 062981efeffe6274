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
# # What did fine-tuning write?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/backward-lens-tl/backward_lens_tl/blob/main/notebooks/fine_tuning.ipynb)
#
# This notebook teaches a model 20 false facts, with full fine-tuning and with LoRA. It reads as tokens what the
# gradient of each step writes, and what the finished checkpoint and the adapter have written. Controls show what can be read
# and what cannot. At the end, it asks which example changed an answer that was not in the training data.

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
# works. All remarks about numbers and tokens below are about this model. Other models may need other numbers of
# steps and learning rates.

# %%
import copy
import json
import tempfile
from importlib.resources import files
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import backward_lens_tl as blt
from backward_lens_tl import analysis, figures
from backward_lens_tl.editing import WeightDelta, delta_tokens
from backward_lens_tl.views.weight_changes import summary, weight_change_page

pd.options.display.max_colwidth = 80
steps, lr, lora_lr = 60, 3e-4, 5e-3
model = blt.load_model("facts")  # or "smollm2", or any name on the Hugging Face hub

# %% [markdown]
# ## 20 false facts
#
# The package includes facts with false answers, in the format of CounterFact. We take 20 whose false answers all
# differ and are one token. `others`, for controls, are 20 false answers of other prompts. None of them is taught, or the true answer of one of our
# prompts: training makes those less probable, so they would not be neutral.


# %%
def token_ids(text):
    return model.tokenizer(text, add_special_tokens=False).input_ids


path = files("backward_lens_tl") / "facts_model" / "records.json"
rows = [row["requested_rewrite"] for row in json.loads(path.read_text(encoding="utf-8"))]
by_answer = {}
for row in rows[::7] + rows:  # from all relations
    answer = " " + row["target_new"]["str"]
    if len(token_ids(answer)) == 1:
        by_answer.setdefault(answer, row)
answers = list(by_answer)[:20]
prompts = [by_answer[each]["prompt"].replace("{}", by_answer[each]["subject"]) for each in answers]
true = {" " + by_answer[each]["target_true"]["str"] for each in answers}
others = [each for each in list(by_answer)[20:] if each not in true][:20]
if len(others) < 20:
    found = f"{len(answers)} answers and {len(others)} others"
    raise ValueError(f"{found} are one token of this model's tokenizer; this needs 20 of each")
len(answers), len(others)

# %% [markdown]
# We train a transformers model with the same weights. `answer_logits` are those after the last token of each prompt.


# %%
def plain_copy():
    bridged = model.original_model
    weights = bridged.state_dict()
    weights = {name.replace("._original_component", ""): each for name, each in weights.items()}
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(bridged.config), dtype=torch.float32)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain.eval()  # without dropout


def answer_logits(plain, texts):
    batch = model.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    logits = plain(batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[torch.arange(len(texts)), batch.attention_mask.sum(1) - 1]


# %% [markdown]
# The loop is a plain one. Every step has all prompts in one batch.


# %%
def training(plain, texts, wanted, lr):
    wanted = torch.tensor([token_ids(text)[0] for text in wanted])
    trained = [each for each in plain.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(answer_logits(plain, texts), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss)


@torch.no_grad()
def says(plain, texts):
    return model.tokenizer.batch_decode(answer_logits(plain, texts).argmax(-1)[:, None])


folder = Path(tempfile.mkdtemp())
base = plain_copy()
base.save_pretrained(folder / "base")
pd.DataFrame({"prompt": prompts, "before": says(base, prompts), "false answer": answers})

# %% [markdown]
# ## While it trains
#
# [`watch`](../docs/training.md) takes the factors of the gradients from the loop's own backward passes, here in every fifth
# step, and with `changes=True` what the optimizer does to each matrix. The record writes a table to disk, step by
# step.

# %%
tuned = plain_copy()
record = blt.training.TrainingRecord(folder / "record", k=8)
losses = []
with blt.training.watch(
    tuned, "W_out", every=5, changes=True, tokenizer=model.tokenizer
) as watched:
    for loss in training(tuned, prompts, answers, lr):
        losses.append(loss)
        if (step := watched.step()) is not None:
            record.add(step)
tuned.save_pretrained(folder / "tuned")
learned = sum(map(str.__eq__, says(tuned, prompts), answers))
{"first loss": round(losses[0], 2), "last loss": round(losses[-1], 4), "learned": learned}

# %% [markdown]
# All false answers are learned. The norms of the gradients of `W_out` fall with the loss, and are largest in the
# first layer and the last ones:

# %%
seen = record.to_dataframe()
seen.pivot(index="step", columns="layer", values="norm").round(4)

# %% [markdown]
# What do the gradients write? The table shows the main direction of the last layer but one: its share of the squared norm, and
# the tokens that a step of gradient descent adds and removes there.

# %%
late = seen[seen.layer == model.cfg.n_layers - 2].set_index("step")
pd.DataFrame(
    {
        "share": late.energy.map(lambda shares: round(shares[0], 2)),
        "adds": late.top_tokens.map(lambda own: " ".join(own[0][:2])),
        "removes": late.bottom_tokens.map(lambda own: " ".join(own[0][:2])),
    }
)

# %% [markdown]
# Most tokens are answers that we teach, or names next to them. Which of them lead changes from step to step: a step writes what is still
# missing, and undoes what earlier steps overdid. Spain is an answer that we teach and the true answer of two prompts: step 1 removes it, step 11
# adds it, and from step 31 on it is removed again. One step does not tell what a run will have written.
#
# ## The gradient against what Adam does
#
# SGD would subtract a multiple of the gradient: `change_cosine` would be 1 and `change_outside` 0.

# %%
adam = late[["change_norm", "change_cosine", "change_outside"]].round(3)
adam.assign(change_tokens=late.change_tokens.map(lambda own: " ".join(own[:2])))

# %% [markdown]
# The cosine of Adam's change to minus the gradient is between 0.2 and 0.6. About 40 % of its squared norm lie outside of the rows and
# columns of this step's gradient. They come from the moments of earlier steps, and from the division of each entry by its
# own size; in step 1, from the division alone. The first direction of the change is Spain from step 16 to 46, while
# that of the gradient turns. `figures.training_run` shows all layers:

# %%
figures.training_run(seen, quantities=["change_cosine", "change_outside"], backend="matplotlib")

# %% [markdown]
# Around step 26, the cosine is about 0 in layers 1 to 4. The share outside differs between layers, from 0.2 to 0.9. To know what
# was written, read the weights.
#
# ## What did full fine-tuning write?
#
# `WeightDelta.between` subtracts two checkpoints and keeps the 8 largest singular vectors of each matrix. The table is the
# share of the squared norm that this leaves out.

# %%
change = WeightDelta.between(folder / "base", folder / "tuned", rank=8)
print(*summary(change), sep="\n")
discarded = pd.Series(change.about["discarded"])
table = discarded.index.str.extract(r"(?P<matrix>\w+) of layer (?P<layer>\d+)").astype(
    {"layer": int}
)
table = table.assign(discarded=discarded.to_numpy())
table.pivot(index="matrix", columns="layer", values="discarded").round(2)

# %% [markdown]
# Do the gradients also leave so much out? This is the same share for `W_out`, the largest one of the watched steps.

# %%
beyond = 1 - seen.energy.map(lambda shares: sum(shares[:8]))
pd.DataFrame(
    {
        "gradients, largest": beyond.groupby(seen.layer).max(),
        "all steps": table[table.matrix == "W_out"].set_index("layer").discarded,
    }
).round(2)

# %% [markdown]
# In each layer, the sum of 60 steps leaves out two to four times as much as any of these gradients. Here are the first two of `W_out` in each layer. `weight_change_page` makes a page of all matrices, as does the command
# `backward-lens diff base tuned --html change.html`.

# %%
options = {"projection": "normalized", "components": "singular"}
tokens = delta_tokens(model, change, k=5, most=2, **options)
(folder / "change.html").write_text(weight_change_page(tokens, change), encoding="utf-8")
columns = ["layer", "component", "norm", "top_tokens", "bottom_tokens"]
tokens.loc[tokens.matrix == "W_out", columns].round({"norm": 3})

# %% [markdown]
# Spain, Canada, the eighteenth century, operas and films: many tokens are answers that we taught, or close to them. In the middle layers,
# the first direction is another one: it has function words at one end and names at the other.
#
# ## What did an adapter write?
#
# A LoRA adapter has low rank by construction, so nothing is left out. `from_lora` reads its factors. This adapter
# changes `W_out` only, with rank 4.


# %%
def adapter(texts, name, is_trained=True):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["mlp.c_proj", "mlp.down_proj"],  # W_out of GPT-2 and of Llama
        fan_in_fan_out=base.config.model_type == "gpt2",
        init_lora_weights=is_trained,  # otherwise, both factors are random
    )
    adapted = get_peft_model(plain_copy(), config)
    if is_trained:
        *_, loss = training(adapted, prompts, texts, lora_lr)
        right = sum(map(str.__eq__, says(adapted, prompts), texts))
        print(f"{name}: last loss {loss:.3f}, {right} of {len(texts)} learned")
    adapted.save_pretrained(folder / name)
    return WeightDelta.from_lora(folder / name)


taught = adapter(answers, "taught")
tokens = delta_tokens(model, taught, k=5, most=1, **options)
tokens[columns].round({"norm": 3})

# %% [markdown]
# ## Controls
#
# Tokens like these are convincing, but what would an adapter show that was taught something else? We train one with
# the same answers for other prompts, one with 20 other answers, and take one with random factors.

# %%
shuffled = answers[7:] + answers[:7]
deltas = {
    "full fine-tuning": change,
    "adapter": taught,
    "adapter, shuffled answers": adapter(shuffled, "shuffled"),
    "adapter, other answers": adapter(others, "others"),
    "adapter, untrained": adapter(answers, "untrained", is_trained=False),
}

# %% [markdown]
# How many of the 20 answers are among the top 5 tokens at either end of the first direction of `W_out` in each layer, or of the first four? And how many
# of the 20 others? Both ends count, because the sign of a singular vector is a convention.


# %%
def named(delta, texts, most):
    table = delta_tokens(model, delta, k=5, most=most, **options)
    table = table[table.matrix == "W_out"]
    return len(set(texts) & {*table.top_tokens.explode(), *table.bottom_tokens.explode()})


counts = {
    name: {
        "answers, first": named(delta, answers, 1),
        "others, first": named(delta, others, 1),
        "answers, four": named(delta, answers, 4),
        "others, four": named(delta, others, 4),
    }
    for name, delta in deltas.items()
}
pd.DataFrame.from_dict(counts, orient="index")

# %% [markdown]
# With four directions per layer, the adapter names 17 of the answers that it was taught and 7 of the others. The one with other answers
# names all 20 of its own and 11 of these, and the untrained one 5 of each. So the tokens do show what was taught, but a trained adapter also names
# a third to a half of what it was not taught. The first directions alone name fewer on both sides. Full
# fine-tuning is harder to read: with four directions, it names 13 answers, and 10 that were not taught.
#
# The adapter with shuffled answers names no fewer than the right one. These tokens show the answers, but **not to which fact an
# answer belongs**.
#
# ## Which fact?
#
# This is in the other factor. Each change is a map: for the inputs of `W_out` at the last token of a prompt, as they were before training,
# it writes a vector. We add these vectors over the layers and read their first token.


# %%
def captured(texts, targets):
    loss = blt.target_nll(list(targets))
    return blt.capture_gradients(model, list(texts), loss, matrices="mlp", prepend_bos=False)


capture = captured(prompts, answers)
last = torch.arange(len(prompts)), capture.mask.sum(1) - 1


def written(delta):
    vectors = 0
    for each in delta:
        if each.matrix == "W_out":
            left, right = each.factors
            vectors = vectors + capture["W_out", each.layer].inputs[last] @ left @ right
    return [top for (top,) in blt.read_vectors(model, vectors, k=1).top_tokens]


kinds = {"its answer": answers, "its shuffled answer": shuffled, "its other answer": others}
hits = {
    name: {kind: sum(map(str.__eq__, written(delta), texts)) for kind, texts in kinds.items()}
    for name, delta in deltas.items()
}
pd.DataFrame.from_dict(hits, orient="index")

# %% [markdown]
# Now the adapters differ: for about half of the prompts, each one writes the answer that it was taught for this prompt. The
# untrained one writes none of them, and full fine-tuning, which also changes the other matrices, writes 7 in `W_out`. The sum
# ignores that the inputs of later layers change with what earlier layers write.
#
# ## Which example changed this answer?
#
# Fine-tuning also changes answers that nobody asked for. Here are 200 prompts that were not in the training data, those first whose new answer
# gained the most probability.

# %%
unseen = [row["prompt"].replace("{}", row["subject"]) for row in rows]
unseen = [text for text in dict.fromkeys(unseen) if text not in prompts][:200]
with torch.no_grad():
    before, after = (answer_logits(each, unseen).softmax(-1) for each in (base, tuned))
gains, tokens = (after - before).max(-1)
effects = pd.DataFrame(
    {"prompt": unseen, "before": says(base, unseen), "after": says(tuned, unseen)}
)
print(f"{(effects.before != effects.after).sum()} of {len(unseen)} answers have changed")
effects.assign(gain=gains).sort_values("gain", ascending=False).head(6).round(3)

# %% [markdown]
# Training on 20 facts only, without other texts, changed most of the answers. Which of the 20 examples did it for the first
# prompt? `most_similar` compares its gradient, with the new answer as the target, with those of the examples, all in the model before
# training.

# %%
place = int(gains.argmax())
query, token = unseen[place], int(tokens[place])
found = analysis.most_similar(capture, captured([query], [token]), k=2)
found.drop(columns="query").round(3)

# %% [markdown]
# One example has by far the largest cosine: the same wording with another subject. Is it the cause? We train again without
# it, without the second one, and without an example that is not in the list.


# %%
def probability_without(left_out):
    kept = [number for number in range(len(prompts)) if number != left_out]
    plain = plain_copy()
    for _ in training(plain, [prompts[n] for n in kept], [answers[n] for n in kept], lr):
        pass
    with torch.no_grad():
        return float(answer_logits(plain, [query]).softmax(-1)[0, token])


unlisted = min({*range(len(prompts))} - {*found.prompt})
left_out = [*found.prompt[:2], unlisted]
pd.DataFrame(
    {
        "left out": ["nothing", *(prompts[number] for number in left_out)],
        "probability of the new answer": [
            float(after[place, token]),
            *map(probability_without, left_out),
        ],
    }
).round(3)

# %% [markdown]
# Without that example, the new answer is gone; without the others, nothing changes.
#
# - [Watch a training run](../docs/training.md) describes `watch`, the record and the callback for `Trainer`.
# - [Adapters and checkpoints as tokens](../docs/editing.md#adapters-and-checkpoints-as-tokens) has the same counts for three
#   seeds, and the commands.
# - [Similar gradients](similar_gradients.ipynb) asks what makes the gradients of two examples similar.
