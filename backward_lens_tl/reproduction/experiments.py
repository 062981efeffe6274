"""The paper's figures and tables: what each states, and the function that measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from backward_lens_tl.errors import InputError
from backward_lens_tl.reproduction import (
    chance,
    conditions,
    early_layers,
    editing_methods,
    gradient_neurons,
    gradient_ranks,
    imprint_and_shift,
    least_learning_rates,
    neuron_copies,
    normalization,
    optimizer_steps,
    residual_bases,
    segment_norms,
    segment_ranks,
    several_facts,
    shared_readings,
    single_prompts,
    training_changes,
    whitening,
)
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Finding

Group = Literal["gradients", "explanations", "editing"]


@dataclass(frozen=True)
class Experiment:
    """A figure or table of the paper, or several that are measured together.

    Attributes:
        name: Name of the figure or table, and of the experiment's folder.
        title: What it is about.
        statement: The statement of the paper, in our own words.
        measure: The function that measures it.
        also: Other figures and tables that it covers.
        group: `"gradients"` if it reads the gradients of many prompts, for which all experiments
            share one sweep; `"explanations"` if it tests why they find what they do;
            `"editing"` if it edits.
        explains: Experiments whose main claim an explanation may account for.
        part: What it explains, if not everything.
    """

    name: str
    title: str
    statement: str
    measure: Callable[[Evidence], Finding]
    also: tuple[str, ...] = ()
    group: Group = "gradients"
    explains: tuple[str, ...] = ()
    part: str = ""

    @property
    def covers(self) -> tuple[str, ...]:
        """All names of the experiment."""
        return (self.name, *self.also)


EXPERIMENTS = (
    Experiment(
        "fig3",
        "Imprint and shift (lemma 5.2, figures 1 and 3)",
        "One step of gradient descent imprints the layer's own inputs into FF1 and shifts FF2's "
        "output against its VJPs, which is towards the target.",
        imprint_and_shift.imprint_and_shift,
        also=("fig1",),
    ),
    Experiment(
        "fig4",
        "Rank of the gradients (figure 4)",
        "The rank of a gradient is almost always the length of the prompt, with a drop of one or "
        "two once in a few dozen examples. The rank of the last MLP's gradient is 1.",
        gradient_ranks.rank_law,
    ),
    Experiment(
        "fig5",
        "The gradients of one prompt as tokens (figure 5)",
        "In most layers the VJPs project to the target and to tokens similar to it. In the top "
        "layers only the last token has large VJPs.",
        single_prompts.example_table,
    ),
    Experiment(
        "fig6",
        "Norms of W_out's VJPs (figure 6)",
        "The VJPs with the largest norms are those of the subject's tokens in the first layers and "
        "of the last token around the second quarter of the layers. Most other tokens have VJPs "
        "close to zero.",
        segment_norms.norms_of_shifts,
    ),
    Experiment(
        "fig7",
        "Rank of the target by segment (figure 7)",
        "The last token's VJPs consistently rank the target among the least probable tokens. Those "
        "of the other tokens behave alike and mostly rank it as improbable.",
        segment_ranks.target_by_segment,
    ),
    Experiment(
        "fig8",
        "Neurons of W_out's gradient and its VJPs (figures 8 and 9)",
        "The neurons with the largest norms are almost copies of the last VJP, up to the sign. "
        "Those with small norms resemble the zero vector.",
        partial(gradient_neurons.similarity, matrix="W_out"),
        also=("fig9",),
    ),
    Experiment(
        "fig10",
        "Neurons of W_in's gradient and its inputs (figure 10)",
        "The same holds for FF1, whose neurons are combinations of its inputs.",
        partial(gradient_neurons.similarity, matrix="W_in"),
    ),
    Experiment(
        "fig11",
        "The gradients of other prompts as tokens (figures 11 to 15)",
        "Other prompts and models show the same as figure 5.",
        single_prompts.more_tables,
        also=("fig12", "fig13", "fig14", "fig15"),
    ),
    Experiment(
        "fig16",
        "Norms of the VJPs of every matrix (figure 16)",
        "For both FF1 and FF2, the VJPs with the largest norms are those of the subject's last "
        "token around the first quarter of the layers and of the last token around the middle.",
        segment_norms.norms_of_all,
    ),
    Experiment(
        "fig17",
        "Norms of the inputs (figure 17)",
        "The norms of the inputs x_i and of the VJPs delta_i are not correlated.",
        segment_norms.norms_of_inputs,
    ),
    Experiment(
        "fig18",
        "Rank of the target at the last token (figure 18)",
        "In most layers the last token's VJP ranks the target among the most improbable tokens, "
        "with some degradation in the first few layers.",
        segment_ranks.target_at_last_token,
    ),
    Experiment(
        "fig19",
        "Rank of the model's own answer (figure 19)",
        "In the last layers the VJPs rank the model's own answer among the probable tokens, so the "
        "update demotes it, more smoothly than it promotes the target.",
        segment_ranks.answer_by_segment,
    ),
    Experiment(
        "fig20",
        "The model's own answer in W_in's inputs (figure 20)",
        "FF1's inputs show how the forward pass builds up its answer, more clearly if the answer "
        "is correct.",
        segment_ranks.answer_in_inputs,
    ),
    Experiment(
        "fig21",
        "The target in W_in's inputs (figure 21)",
        "FF1's inputs only show the probability that the forward pass itself gives the target.",
        segment_ranks.target_in_inputs,
    ),
    Experiment(
        "fig22",
        "The Normalized Logit Lens (figures 22 and 23, appendix F)",
        "With normalized vectors, most VJPs have the target among the most improbable tokens.",
        single_prompts.normalized_table,
        also=("fig23",),
    ),
    Experiment(
        "table2",
        "Neurons of W_out's gradient as tokens (table 2)",
        "Neurons of similar norm share their tokens: the largest have the target at one end, the "
        "smallest resemble the zero vector.",
        partial(gradient_neurons.tokens_of_neurons, matrix="W_out"),
    ),
    Experiment(
        "table3",
        "The VJPs that span W_out's gradient, as tokens (table 3)",
        "A few VJPs have the tokens of thousands of neurons.",
        partial(gradient_neurons.tokens_of_spanning_set, matrix="W_out"),
    ),
    Experiment(
        "table4",
        "Neurons of W_in's gradient as tokens (table 4)",
        "Neurons of FF1's gradient with similar norms share their tokens, too.",
        partial(gradient_neurons.tokens_of_neurons, matrix="W_in"),
    ),
    Experiment(
        "table5",
        "The inputs that span W_in's gradient, as tokens (table 5)",
        "A few inputs have the tokens of thousands of neurons.",
        partial(gradient_neurons.tokens_of_spanning_set, matrix="W_in"),
    ),
    Experiment(
        "table1",
        "Editing facts (tables 1, 6 and 7)",
        "A shift computed in one forward pass edits facts as reliably as fine-tuning and ROME and "
        "has hardly any effect on fluency. It affects more neighborhood prompts than ROME and "
        "MEMIT, and its paraphrase score is in between.",
        editing_methods.editing_methods,
        also=("table6", "table7"),
        group="editing",
    ),
    Experiment(
        "fig24",
        "Least learning rate of an edit (figure 24)",
        "The rate that the forward pass shift needs varies less than that of SGD. In the early "
        "layers it harms perplexity less than SGD and Adam, in the late layers equally.",
        least_learning_rates.least_learning_rates,
        group="editing",
    ),
    Experiment(
        "several_facts",
        "Several facts at once (beyond the paper)",
        "The paper edits one fact at a time and leaves several at once open.",
        several_facts.several_facts,
        group="editing",
    ),
    Experiment(
        "whitening",
        "The whitened shift (beyond the paper)",
        "The paper's shift uses the input as it is, so it also has an effect on other prompts with "
        "similar inputs.",
        whitening.whitening,
        group="editing",
    ),
    Experiment(
        "optimizers",
        "Steps of optimizers (beyond the paper)",
        "The paper analyses plain gradients, and leaves open how optimizers such as Adam change "
        "their low rank and their tokens.",
        optimizer_steps.optimizer_steps,
        group="editing",
    ),
    Experiment(
        "training",
        "What a training run writes (beyond the paper)",
        "The paper leaves open what optimizers and fine-tuning of many steps do to the low rank of "
        "the gradients and to their tokens.",
        training_changes.training_changes,
        group="editing",
    ),
    Experiment(
        "residual_bases",
        "Bases of the residual stream (beyond the paper)",
        "All layers are read with the last layer's unembedding. Early layers may write in another "
        "basis, which the later layers turn into the last one.",
        residual_bases.residual_bases,
        group="explanations",
        explains=("fig5", "fig7", "fig11", "fig18"),
        part="some layers",
    ),
    Experiment(
        "early_layers",
        "Average Jacobians (beyond the paper)",
        "Carried to the last layer by the average Jacobian of the later layers, updates of early "
        "layers may be readable, too. This is partly circular: gradients come from there.",
        early_layers.early_layers,
        group="explanations",
        explains=("fig5", "fig7", "fig11", "fig18"),
        part="some layers",
    ),
    Experiment(
        "last_layer",
        "Geometry of the last layer (beyond the paper)",
        "The last VJP is the target's embedding minus the expected one (lemma 5.1). What all "
        "prompts expect alike may hide the target.",
        shared_readings.last_layer,
        group="explanations",
        explains=("fig5", "fig7", "fig11", "fig18"),
        part="the last layer",
    ),
    Experiment(
        "junk_tokens",
        "Junk tokens (beyond the paper)",
        "A few tokens lead many cells of every prompt. They may hide the target.",
        shared_readings.junk_tokens,
        group="explanations",
        explains=("fig5", "fig7", "fig11", "fig18"),
    ),
    Experiment(
        "sinks",
        "Attention sinks (beyond the paper)",
        "The first position of a prompt may be an attention sink with a huge residual stream, "
        "whatever its token is.",
        conditions.sinks,
        group="explanations",
        explains=("fig6", "fig7", "fig17", "fig18", "fig19", "fig20", "fig21", "fig22"),
    ),
    Experiment(
        "gated_neurons",
        "Copies among the neurons (beyond the paper)",
        "The more of a gradient one position writes, the more of its largest neurons copy one "
        "vector. Gated MLPs need not be the reason if they do not.",
        neuron_copies.gated_neurons,
        group="explanations",
        explains=("fig8", "fig10"),
    ),
    Experiment(
        "normalization",
        "Normalization without a bias (beyond the paper)",
        "Where the final norm has no bias, the length of a vector does not affect its reading.",
        normalization.normalization,
        group="explanations",
        explains=("fig22",),
        part="the effect of normalization",
    ),
    Experiment(
        "chance",
        "Chance (beyond the paper)",
        "A median over prompts may put the target ahead of the model's own answer by chance, in "
        "layers whose inputs show neither.",
        chance.answers_by_chance,
        group="explanations",
        explains=("fig21",),
    ),
    Experiment(
        "prompt_forms",
        "Other prompts (beyond the paper)",
        "The model is instruction-tuned, knows few of the facts, or writes targets as several "
        "tokens. Claims may hold for prompts that suit it better.",
        conditions.prompt_forms,
        group="explanations",
        explains=("fig6", "fig7", "fig17", "fig18", "fig19", "fig20", "fig21", "fig22"),
    ),
)
"""The experiments in the order of the paper, followed by those beyond it."""


def select_experiments(names: str | Sequence[str]) -> tuple[Experiment, ...]:
    """Find experiments by the names of figures and tables.

    Args:
        names: One or more names such as `"fig4"`, a group, or `"all"`.

    Returns:
        Each experiment once, in the order of the paper.

    Raises:
        InputError: If a name is unknown, or none is given.
    """
    asked = [names] if isinstance(names, str) else list(names)
    known = [*(name for each in EXPERIMENTS for name in each.covers), *get_args(Group), "all"]
    for name in asked:
        if name not in known:
            raise InputError(f"unknown experiment {name!r}; allowed: {', '.join(known)}")
    if not asked:
        raise InputError(f"names is empty; allowed: {', '.join(known)}")
    return tuple(
        experiment
        for experiment in EXPERIMENTS
        if {"all", experiment.group, *experiment.covers} & set(asked)
    )
