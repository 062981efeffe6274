"""Train the facts model and write the whole shipped folder.

Run with ``python -m facts_model.train`` from the root of the repository.

In addition to next-token prediction, there is a second loss: at the last token of a subject's name,
the residual stream after half of the blocks, projected with the final layer norm and the
unembedding, should predict the subject's attributes. Large models learn this from billions of
tokens (Geva et al. 2023). A model of this size and training time would otherwise look up facts at
the last token of the prompt.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from facts_model import evaluate, gradients, records, tracing
from facts_model.batches import Batch, BatchSampler
from facts_model.card import Training, render_card
from facts_model.corpus import Corpus
from facts_model.tokenizer import CONTEXT, VOCABULARY, train_tokenizer

log = logging.getLogger(__name__)

THREADS = 2
LEARNING_RATE = 2.5e-3
WEIGHT_DECAY = 0.1
WARM_UP = 100
# The learning rate is constant and then falls linearly to zero over this fraction of the steps.
DECAY_SHARE = 0.6
DROPOUT = 0.0
ENRICHMENT_WEIGHT = 0.3
ENRICHMENT_BLOCKS = 4
REPORT_EVERY = 100
ORDINARY_HELD_OUT = 200


@dataclass(frozen=True)
class Losses:
    """Losses of one step, in nats.

    Attributes:
        text: Weighted mean over all next tokens.
        answer: Mean over the answer tokens.
        enrichment: Cross-entropy to the subjects' attributes at their last tokens.
    """

    text: Tensor
    answer: Tensor
    enrichment: Tensor


def build_model(eos_id: int) -> GPT2LMHeadModel:
    """Create the untrained model.

    Args:
        eos_id: Token id of the end of text.

    Returns:
        A GPT-2 with tied embeddings and about two million parameters.
    """
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_ctx=CONTEXT,  # an older name, which HookedTransformer's conversion uses
        n_embd=128,
        n_layer=8,
        n_head=4,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=0.0,
        # The same function as gelu_new, in one kernel.
        activation_function="gelu_pytorch_tanh",
        bos_token_id=eos_id,
        eos_token_id=eos_id,
    )
    return GPT2LMHeadModel(config)


def attribute_targets(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Target probabilities for the enrichment loss, uniform over the answers of each subject.

    Args:
        corpus: The facts.
        tokenizer: The tokenizer.

    Returns:
        Probabilities, shape (subjects, vocabulary).
    """
    targets = torch.zeros(len(corpus.subjects), VOCABULARY)
    for row, subject in enumerate(corpus.subjects):
        facts = corpus.by_subject[subject]
        for fact in facts:
            (token,) = tokenizer(f" {fact.answer}")["input_ids"]
            targets[row, token] += 1 / len(facts)
    return targets


def compute_losses(model: GPT2LMHeadModel, batch: Batch, targets: Tensor) -> Losses:
    """Run the model on one batch.

    Args:
        model: The model.
        batch: The windows.
        targets: From ``attribute_targets``.

    Returns:
        The losses; the text loss and the enrichment loss carry gradients.
    """
    output = model(batch.tokens, output_hidden_states=True, use_cache=False)
    logits, wanted, weights = output.logits[:, :-1], batch.tokens[:, 1:], batch.weights[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    each = each.view_as(weights)
    named = batch.subjects >= 0
    states = output.hidden_states[ENRICHMENT_BLOCKS][named]
    attributes = model.lm_head(model.transformer.ln_f(states)).log_softmax(-1)
    enrichment = -(targets[batch.subjects[named]] * attributes).sum(-1).mean()
    return Losses(
        text=(each * weights).sum() / weights.sum(),
        answer=each.detach()[weights > 1].mean(),
        enrichment=enrichment,
    )


def make_optimizer(model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """Create AdamW with weight decay on matrices only.

    Args:
        model: The model.

    Returns:
        The optimizer.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay.

    Args:
        step: Number of finished steps.
        steps: Total number of steps.

    Returns:
        A number between 0 and 1.
    """
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY_SHARE * steps))


def train(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Training:
    """Train from scratch.

    Args:
        corpus: Facts and phrasings.
        tokenizer: The tokenizer.
        seed: Seed of initialisation, sampling and dropout.
        steps: Number of optimizer steps.

    Returns:
        The trained model in evaluation mode and how it was trained.
    """
    torch.manual_seed(seed)
    model = build_model(tokenizer.eos_token_id).train()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    targets = attribute_targets(corpus, tokenizer)
    sampler = BatchSampler(corpus, tokenizer.backend_tokenizer, tokenizer.eos_token_id, seed)
    start, recent, tokens = time.perf_counter(), [], 0
    for step, batch in zip(range(1, steps + 1), sampler, strict=False):
        losses = compute_losses(model, batch, targets)
        optimizer.zero_grad(set_to_none=True)
        (losses.text + ENRICHMENT_WEIGHT * losses.enrichment).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        tokens += batch.tokens.numel()
        recent.append((losses.text.item(), losses.answer.item(), losses.enrichment.item()))
        if step % REPORT_EVERY == 0 or step == steps:
            text, answer, enrichment = torch.tensor(recent).mean(0).tolist()
            seconds = time.perf_counter() - start
            log.info(
                "step %d: text %.3f, answer %.3f, enrichment %.3f, %.0f s",
                *(step, text, answer, enrichment, seconds),
            )
            recent.clear()
    model.config.activation_function = "gelu_new"
    return Training(
        model=model.eval(),
        seed=seed,
        steps=steps,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        text_loss=text,
        answer_loss=answer,
        enrichment_loss=enrichment,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def write_json(content: object, path: Path) -> None:
    """Write compact JSON, with one entry per line if the content is a list.

    Args:
        content: A list or a dictionary.
        path: File to write.
    """
    if isinstance(content, list):
        lines = [json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in content]
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    else:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    path.write_text(text, encoding="utf-8")


def facts_content(corpus: Corpus) -> dict[str, object]:
    """Collect the data for measuring recall.

    Args:
        corpus: Facts and phrasings.

    Returns:
        Relations with their phrasings, facts, and held-out ordinary sentences.
    """
    return {
        "relations": {
            name: {"trained": relation.trained, "half": relation.half}
            for name, relation in corpus.relations.items()
        },
        "facts": [
            {
                "relation": fact.relation,
                "subject": fact.subject,
                "answer": fact.answer,
                "held_out": fact.held_out,
            }
            for fact in corpus.facts
        ],
        "ordinary_held_out": corpus.ordinary.held_out_sample(ORDINARY_HELD_OUT),
    }


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model and the tokenizer in Hugging Face's format.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        folder: The shipped folder.
    """
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    # Without indentation, the file is five times smaller.
    write_json(json.loads(path.read_text(encoding="utf-8")), path)
    # A class name that the current and the previous major version of transformers support.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "GPT2TokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train the model, write the folder, evaluate it and write its card."""
    parser = argparse.ArgumentParser(description="Train the facts model.")
    parser.add_argument("--out", type=Path, default=evaluate.SHIPPED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2600)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(THREADS)

    corpus = Corpus()
    tokenizer = train_tokenizer(corpus)
    result = train(corpus, tokenizer, options.seed, options.steps)

    folder: Path = options.out
    save(result.model, tokenizer, folder)
    write_json(facts_content(corpus), folder / "facts.json")

    shipped = evaluate.load_shipped(folder)
    report = evaluate.evaluate(shipped)
    log.info("recall\n%s", report.recall_table())
    traced = tracing.trace(shipped)
    tracing.draw(traced, folder / "causal_tracing.png")
    log.info("tracing\n%s", traced.table())
    shipped_records = records.build_records(shipped)
    write_json(shipped_records, folder / "records.json")
    card = render_card(shipped, result, report, traced, gradients.check(shipped), shipped_records)
    (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    log.info("wrote %s", folder)


if __name__ == "__main__":
    main()
