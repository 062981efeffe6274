"""The paper's figures and tables, each with its statement and what measures it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from backward_lens_tl.errors import InputError
from backward_lens_tl.reproduction import (
    editing_methods,
    gradient_neurons,
    gradient_ranks,
    imprint_and_shift,
    least_learning_rates,
    optimizer_steps,
    segment_norms,
    segment_ranks,
    several_facts,
    single_prompts,
    whitening,
)
from backward_lens_tl.reproduction.evidence import Evidence
from backward_lens_tl.reproduction.finding import Finding

Group = Literal["gradients", "editing"]


@dataclass(frozen=True)
class Experiment:
    """One figure or table of the paper, or several of one kind.

    Attributes:
        name: Its folder.
        covers: The figures and tables that it stands for, as they are asked for.
        title: What it is about.
        statement: What the paper says, in our words.
        measure: What measures it.
        group: `"gradients"` for those that read gradients of many prompts, which share one sweep,
            and `"editing"` for those that edit.
    """

    name: str
    covers: tuple[str, ...]
    title: str
    statement: str
    measure: Callable[[Evidence], Finding]
    group: Group = "gradients"


EXPERIMENTS = (
    Experiment(
        "fig3",
        ("fig1", "fig3"),
        "Imprint and shift (lemma 5.2, figures 1 and 3)",
        "One step of gradient descent imprints the layer's own inputs into FF1, and shifts FF2's "
        "output against its VJPs, which is towards the target.",
        imprint_and_shift.imprint_and_shift,
    ),
    Experiment(
        "fig4",
        ("fig4",),
        "Rank of the gradients (figure 4)",
        "A gradient's rank almost always is the number of the prompt's tokens, with a drop of one "
        "or two in a few dozen examples; that of the last MLP is 1.",
        gradient_ranks.rank_law,
    ),
    Experiment(
        "fig5",
        ("fig5",),
        "The gradients of one prompt in words (figure 5)",
        "Across most layers the VJPs project to the target and to words like it; in the top layers "
        "only the last token writes.",
        single_prompts.example_table,
    ),
    Experiment(
        "fig6",
        ("fig6",),
        "Who writes into W_out (figure 6)",
        "Most is written by the subject's tokens in the first layers and by the last token around "
        "the second quarter of the layers; most other tokens write next to nothing.",
        segment_norms.norms_of_shifts,
    ),
    Experiment(
        "fig7",
        ("fig7",),
        "Rank of the target by segment (figure 7)",
        "The last token's VJPs consistently rank the target among the least probable tokens; those "
        "of the other tokens behave alike, and generally rank it as improbable.",
        segment_ranks.target_by_segment,
    ),
    Experiment(
        "fig8",
        ("fig8", "fig9"),
        "Neurons of W_out's gradient and its VJPs (figures 8 and 9)",
        "The neurons of the largest norm are almost copies of the last VJP, up to the sign; those "
        "of small norm are more like the zero vector.",
        gradient_neurons.shift_similarity,
    ),
    Experiment(
        "fig10",
        ("fig10",),
        "Neurons of W_in's gradient and its inputs (figure 10)",
        "The same holds for FF1, whose neurons are combinations of its inputs.",
        gradient_neurons.imprint_similarity,
    ),
    Experiment(
        "fig11",
        ("fig11", "fig12", "fig13", "fig14", "fig15"),
        "The gradients of other prompts in words (figures 11 to 15)",
        "Other prompts and models show the same as figure 5.",
        single_prompts.more_tables,
    ),
    Experiment(
        "fig16",
        ("fig16",),
        "Who writes into which matrix (figure 16)",
        "FF1 and FF2 are both written mainly by the last subject token around the first quarter of "
        "the layers, and by the last token around the middle.",
        segment_norms.norms_of_all,
    ),
    Experiment(
        "fig17",
        ("fig17",),
        "Norms of the inputs (figure 17)",
        "The norms of the inputs x_i and of the VJPs delta_i are not correlated.",
        segment_norms.norms_of_inputs,
    ),
    Experiment(
        "fig18",
        ("fig18",),
        "Rank of the target at the last token (figure 18)",
        "Along most layers the last token's VJP ranks the target among the most improbable tokens, "
        "with some degradation in the first few layers.",
        segment_ranks.target_at_last_token,
    ),
    Experiment(
        "fig19",
        ("fig19",),
        "Rank of the model's own answer (figure 19)",
        "In the last layers the VJPs rank the model's own answer among the probable tokens, so "
        "that the update takes it away, more smoothly than it adds the target.",
        segment_ranks.answer_by_segment,
    ),
    Experiment(
        "fig20",
        ("fig20",),
        "The model's own answer in W_in's inputs (figure 20)",
        "FF1's inputs show how the forward pass builds up its answer, and more so where the answer "
        "is correct.",
        segment_ranks.answer_in_inputs,
    ),
    Experiment(
        "fig21",
        ("fig21",),
        "The target in W_in's inputs (figure 21)",
        "FF1's inputs only show the probability that the forward pass itself gives the target.",
        segment_ranks.target_in_inputs,
    ),
    Experiment(
        "fig22",
        ("fig22", "fig23"),
        "The Normalized Logit Lens (figures 22 and 23, appendix F)",
        "With vectors of length one, most VJPs have the target among the most improbable tokens.",
        single_prompts.normalized_table,
    ),
    Experiment(
        "table2",
        ("table2",),
        "Neurons of W_out's gradient in words (table 2)",
        "Neurons of similar norm share their tokens: the largest ones have the target at one end, "
        "the smallest ones read like the zero vector.",
        gradient_neurons.shift_neurons,
    ),
    Experiment(
        "table3",
        ("table3",),
        "The VJPs that span W_out's gradient, in words (table 3)",
        "A handful of VJPs says what thousands of neurons say.",
        gradient_neurons.shift_vectors,
    ),
    Experiment(
        "table4",
        ("table4",),
        "Neurons of W_in's gradient in words (table 4)",
        "Neurons of FF1's gradient share their tokens within a group of similar norm, too.",
        gradient_neurons.imprint_neurons,
    ),
    Experiment(
        "table5",
        ("table5",),
        "The inputs that span W_in's gradient, in words (table 5)",
        "A handful of inputs says what thousands of neurons say.",
        gradient_neurons.imprint_vectors,
    ),
    Experiment(
        "table1",
        ("table1", "table6", "table7"),
        "Editing facts (tables 1, 6 and 7)",
        "A shift found in one forward pass edits facts as reliably as fine-tuning and ROME and "
        "hardly touches fluency; more of it leaks into the neighborhood than with ROME and MEMIT, "
        "and its paraphrases lie between.",
        editing_methods.editing_methods,
        "editing",
    ),
    Experiment(
        "fig24",
        ("fig24",),
        "Least learning rate of an edit (figure 24)",
        "The rate that the forward pass shift needs varies less than that of SGD, and in the early "
        "layers it does less harm to perplexity than SGD and Adam; in the late ones as much.",
        least_learning_rates.least_learning_rates,
        "editing",
    ),
    Experiment(
        "several_facts",
        ("several_facts",),
        "Several facts at once (beyond the paper)",
        "The paper shifts one fact at a time and leaves open what becomes of several.",
        several_facts.several_facts,
        "editing",
    ),
    Experiment(
        "whitening",
        ("whitening",),
        "The whitened shift (beyond the paper)",
        "The paper's shift listens to the input as it is, so it also writes wherever another "
        "prompt makes the layer read something alike.",
        whitening.whitening,
        "editing",
    ),
    Experiment(
        "optimizers",
        ("optimizers",),
        "Steps of optimizers (beyond the paper)",
        "The paper reads plain gradients, and leaves open what Adam and its like make of their low "
        "rank and of their words.",
        optimizer_steps.optimizer_steps,
        "editing",
    ),
)
"""In the order of the paper, and behind them what goes beyond it."""


def select_experiments(names: str | Sequence[str]) -> tuple[Experiment, ...]:
    """The experiments of some figures and tables.

    Args:
        names: Such as `"fig4"`, several, one of the groups `"gradients"` and `"editing"`, or
            `"all"`.

    Returns:
        Each experiment once, in the order of the paper.

    Raises:
        InputError: If there is no such figure or table, or none is asked for.
    """
    asked = [names] if isinstance(names, str) else list(names)
    covers = [cover for experiment in EXPERIMENTS for cover in experiment.covers]
    known = [*covers, *get_args(Group), "all"]
    for name in asked:
        if name not in known:
            raise InputError(f"there is no experiment {name!r}; there are {', '.join(known)}")
    if not asked:
        raise InputError(f"no experiment was asked for; there are {', '.join(known)}")
    return tuple(
        experiment
        for experiment in EXPERIMENTS
        if {"all", experiment.group, *experiment.covers} & set(asked)
    )
