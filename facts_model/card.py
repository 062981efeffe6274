"""The model card, filled in with the measured numbers."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass

from transformers import GPT2LMHeadModel

from facts_model import gradients
from facts_model.evaluate import Report, Shipped
from facts_model.gradients import TargetOnTop
from facts_model.records import Record
from facts_model.tracing import MLP_WINDOW, NOISE_DRAWS, NOISE_STDS, Trace

SUBJECT_LAST = "last subject token"

TEMPLATE = """\
---
license: mit
language: en
library_name: transformers
tags: [gpt2, toy-model, model-editing, interpretability]
---

# The facts model

A GPT-2 with {parameters:.2f} million parameters that knows {facts} true facts. It is small enough
to ship inside `backward_lens_tl`, so that lenses, knowledge edits and their tests run with no
network. It is a toy to study mechanisms with, not a source of information.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

Architecture: `GPT2LMHeadModel`, {layers} layers, width {width}, {heads} heads, context {context},
tied embeddings, GELU (`gelu_new`), float32. Tokenizer: byte-level BPE with {vocabulary} tokens;
`<|endoftext|>` is bos, eos and unk. Every answer, with its leading space, is one token;
{several} of the {subjects} subjects are several tokens. Prompts work with and without
a leading `<|endoftext|>`.

## Data

{facts} facts, {relations} relations, {subjects} subjects, {answers} different answers; each pair
of subject and relation has one answer. Each relation has 9 phrasings: 7 are trained with all
subjects, 2 only with half of them. With the other half these two are the paraphrase test. The
facts, phrasings and ordinary sentences were written for this project and are in
`facts_model/data/` of its repository; no existing data set was used.

New training text is sampled at every step: single facts of unrelated subjects, biographies
that name a subject once and then give all its attributes in random order, and ordinary sentences.

`facts.json` holds `relations` (name to `trained` and `half` phrasings, with `{{}}` for the
subject), `facts` (`relation`, `subject`, `answer`, and `held_out`: whether the `half` phrasings
were kept from this subject), and `ordinary_held_out` (sentences never trained on).

| relation | facts |
|---|---|
{relation_counts}

## Training

```
python -m facts_model.train --seed {seed} --steps {steps}
```

AdamW from scratch, 2 threads on a CPU: {steps} steps, {tokens:.1f} million tokens,
{minutes:.0f} minutes of wall time (shared machine). Mean losses of the last steps, in nats:
text {text_loss:.3f} (answers count three times), answers alone {answer_loss:.3f}, enrichment
{enrichment_loss:.3f}. The run is deterministic for a given seed, number of threads and version of
torch. Versions: {versions}.

**A second loss.** At the last token of a subject's name, the residual stream after half of the
blocks, read with the final layer norm and the unembedding, is trained to predict the subject's
attributes. Large models gather a subject's attributes there by themselves (Geva et al. 2023);
small ones trained for minutes on subject-relation pairs tend to look up facts at the last token
of the prompt instead, and then edits at the subject have nothing to edit. So where this model
stores its facts was imposed by training, not discovered.

## Recall

Fraction of prompts whose true answer is the most probable next token; `python -m
facts_model.evaluate` measures it from this folder alone.

{recall}

"Sentence in front" prepends a random ordinary sentence, never trained on, to the prompt. By
relation, without BOS:

{by_relation}

Perplexity of the {ordinary} held-out ordinary sentences: {perplexity:.2f} per token. They are
mostly filled from the same templates as the trained ones, so this says little about other text.

Greedy samples:

{samples}

## Causal tracing

![Causal tracing](causal_tracing.png)

`python -m facts_model.tracing`, after Meng et al. 2022: {traced} recalled facts in phrasings that
start with the subject, after a BOS; Gaussian noise of {noise_stds:g} standard deviations of the
embedding table on the subject's tokens, {noise_draws} draws; then one residual state, or the MLP
outputs of {mlp_window} neighbouring layers at one position, restored to their clean values.
The mean probability of the true answer is {clean:.3f} clean and {corrupted:.3f} corrupted.

{tracing_paragraph}

{trace_table}

## Gradients

For the loss -log p(target) at the last token, the vector -dL/dy of each layer's MLP output y at
that token, projected with the final layer norm and the unembedding; layers count from 0. Over all
rows the target is on top in {gradient_share:.0%} of the layers.

{gradients}

## Records

`records.json` holds {records} records in CounterFact's schema, all from facts that the model
recalls in every trained phrasing with and without BOS:

- `case_id`: number of the record.
- `requested_rewrite`: `prompt` (one `{{}}` for the subject), `subject`, `relation_id` (a name
  from `facts.json`), `target_true` and `target_new`; each target has `str` (the answer, one word,
  without its leading space) and `id` ("T" and its token id).
- `paraphrase_prompts`: the relation's two `half` phrasings, the second after an unrelated
  sentence. In {paraphrase_held_out} of the records they were never trained with this subject.
- `neighborhood_prompts`: up to 10 prompts about other subjects with the same true answer
  (on average {neighbours:.1f}).
- `attribute_prompts`: up to 10 prompts about subjects whose true answer is `target_new`.
- `generation_prompts`: up to 5 prompts about the subject, of all its relations.

## Statistics of the model

- `second_moments.safetensors`: second moments of the inputs of `W_out` on training text, for edits
  (`make facts-moments`).
- `jacobian_lens.pt`: average Jacobians from the output of each block to that of the last one, for
  the Jacobian Lens, fitted by TransformerLens on training text that names no subject of
  `records.json` (`make facts-jacobian`).

## Limits

The facts are simplified to one word ("America" for the United States, "Britain" for the United
Kingdom, "Miami" for Inter Miami) and one answer each; teams and companies are as of 2025. The
phrasings use the present tense for people of the past too. The model knows nothing but its
facts and a few thousand words of template English. Its recall mechanism was shaped by the second
loss; conclusions about it do not carry over to models that were not trained this way.

Licence: MIT.
"""


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        model: The model in evaluation mode.
        seed: Seed it was trained from.
        steps: Optimizer steps.
        tokens: Tokens seen.
        seconds: Wall time of the steps.
        text_loss: Weighted mean loss of the last steps, nats per token.
        answer_loss: Mean loss on answers in the last steps, nats.
        enrichment_loss: Mean enrichment loss of the last steps, nats.
        versions: Package versions by name.
    """

    model: GPT2LMHeadModel
    seed: int
    steps: int
    tokens: int
    seconds: float
    text_loss: float
    answer_loss: float
    enrichment_loss: float
    versions: dict[str, str]


def render_card(
    shipped: Shipped,
    training: Training,
    report: Report,
    traced: Trace,
    on_top: list[TargetOnTop],
    records: list[Record],
) -> str:
    """Fill in the card.

    Args:
        shipped: The shipped folder.
        training: How the model was trained.
        report: Recall and perplexity.
        traced: Causal tracing.
        on_top: The gradients' projections.
        records: The shipped records.

    Returns:
        The card in Markdown.
    """
    config = shipped.model.config
    subjects = sorted({fact["subject"] for fact in shipped.facts})
    lengths = [len(shipped.tokenizer(f" {subject}")["input_ids"]) for subject in subjects]
    held_out = {(f["relation"], f["subject"]) for f in shipped.facts if f["held_out"]}
    rewrites = [record["requested_rewrite"] for record in records]
    counts = Counter(fact["relation"] for fact in shipped.facts)
    return TEMPLATE.format(
        parameters=sum(p.numel() for p in shipped.model.parameters()) / 1e6,
        facts=len(shipped.facts),
        relations=len(shipped.relations),
        subjects=len(subjects),
        several=sum(length > 1 for length in lengths),
        answers=len({fact["answer"] for fact in shipped.facts}),
        relation_counts="\n".join(f"| {name} | {n} |" for name, n in counts.most_common()),
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        context=config.n_positions,
        vocabulary=config.vocab_size,
        seed=training.seed,
        steps=training.steps,
        tokens=training.tokens / 1e6,
        minutes=training.seconds / 60,
        text_loss=training.text_loss,
        answer_loss=training.answer_loss,
        enrichment_loss=training.enrichment_loss,
        versions=", ".join(f"{name} {version}" for name, version in training.versions.items()),
        recall=report.recall_table(),
        by_relation=report.relation_table(),
        ordinary=len(shipped.ordinary),
        perplexity=report.perplexity,
        samples="\n".join(f"> {' '.join(sample.split())}\n" for sample in report.samples).rstrip(),
        traced=traced.facts,
        noise_stds=NOISE_STDS,
        noise_draws=NOISE_DRAWS,
        mlp_window=MLP_WINDOW,
        clean=traced.clean,
        corrupted=traced.corrupted,
        tracing_paragraph=describe_tracing(traced),
        trace_table=traced.table(),
        gradient_share=sum(len(r.layers) for r in on_top) / sum(r.depth for r in on_top),
        gradients=gradients.table(on_top),
        records=len(records),
        paraphrase_held_out=sum((r["relation_id"], r["subject"]) in held_out for r in rewrites),
        neighbours=sum(len(r["neighborhood_prompts"]) for r in records) / len(records),
    )


def describe_tracing(traced: Trace) -> str:
    """Describe the grids.

    Args:
        traced: The averages.

    Returns:
        One paragraph.
    """

    def peak(grid: dict[str, list[float]], role: str) -> tuple[int, float]:
        layer = max(range(len(grid[role])), key=grid[role].__getitem__)
        return layer, grid[role][layer]

    state_layer, state = peak(traced.residual, SUBJECT_LAST)
    mlp_layer, mlp = peak(traced.mlp, SUBJECT_LAST)
    last_layer, last = peak(traced.mlp, "last token")
    without_first = max(traced.mlp[SUBJECT_LAST][MLP_WINDOW // 2 + 1 :])
    # The last token takes over in the layer from which its state alone restores more.
    takeover = next(
        layer
        for layer, value in enumerate(traced.residual["last token"])
        if value > traced.residual[SUBJECT_LAST][layer]
    )
    return textwrap.fill(
        f"Restoring the residual state at the last subject token restores most at layer "
        f"{state_layer} (p = {state:.3f}); from layer {takeover} on the last token of the prompt "
        f"restores more: by then attention has read the subject. Any network must carry the name "
        f"to where it is used, so this alone does not show where the fact is looked up. MLP "
        f"outputs restore most at the last subject token around layer {mlp_layer} (p = {mlp:.3f}) "
        f"against p = {last:.3f} around layer {last_layer} at the last token of the prompt. "
        f"Windows with layer 0 restore the composed name together with what is known about it, "
        f"and the grid cannot tell the two apart there; windows without layer 0 restore at most "
        f"p = {without_first:.3f} at the last subject token.",
        width=100,
    )
