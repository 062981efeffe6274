"""What follows from the tables of docs/training_runs.md, written by hand."""

from __future__ import annotations

CONCLUSIONS = {
    "facts": """\
- **SGD's change stays low-rank.** After 200 steps, ten of 128 directions have 88 % of its squared
  norm. Ten directions of the gradient of a step have all of it.
- **Adam's change has a low-rank head and a long tail.** Its ten largest directions have 80 %,
  not the less than 50 % that was claimed. Its effective rank is about twice SGD's. Most of each
  step is outside the row and column spaces of its gradient, and yet the cosine of the whole change
  and descent is 0.62.
- **Muon's change has no main directions.** After 200 steps its ten largest have 18 %, those of a
  random matrix 16 %. Its first step is mostly inside the gradient's spaces, later ones are
  mostly outside.
- **Muon's change is by far the largest.** After 200 steps its norm is 57 % of that of the weights
  on average, and 95 % for `W_out` of layer 3. Adam's is 8 % and SGD's is 3 %. Muon's loss is 0.001
  at step 100, where SGD's is 0.125. Equal steps do not compare equally trained models.
- **Directions of SGD and Adam show most of the taught answers**: 79 % and 76 %, random ones 11 %
  and the untrained matrix 25 %. They also show more than half of the other answers, so they show
  kinds of answers. Muon's show fewer taught answers than the untrained matrix. With LoRA, which
  has eight directions, all three show 57 to 63 %. Trained on shuffled answers they show about as
  many, so directions do not tell which answer was taught to which prompt.
- **What a change adds for a prompt tells some of it.** With full fine-tuning, a fact's own answer
  is promoted about two to three times as often as that of another taught fact of its relation.
  After training on shuffled answers, the shuffled answer is promoted more often instead. But no
  optimizer promotes the own answer in more than half of the layers and facts, so this claim fails.
  With LoRA the difference is smaller: SGD's change promotes 28 % of the taught answers and 26 % of
  the shuffled ones.
- **Late layers promote it.** With full fine-tuning, each of the layers 5 to 7 promotes 56 % or
  more of the taught answers with every optimizer, and each of the layers 0 to 4 promotes 44 % or
  fewer. The directions of SGD and Adam show 60 % or more in every layer.
- **`W_in` shows fewer of the taught answers** than `W_out` in every run. With LoRA and with Muon it
  shows fewer than the untrained matrix.
""",
    "SmolLM2": """\
- **Low rank is as in the facts model, with longer tails.** After 200 steps, ten of 576 directions
  have 77 % of the squared norm of SGD's change, 60 % of Adam's, 11 % of Muon's and 4 % of a random
  one. Adam's effective rank is nearly four times SGD's. Adam is above the claimed 50 % again.
- **Adam goes on a path of its own**: 69 % of its first step and 96 % of its last one are outside
  the gradient's row and column spaces, and yet the cosine of the whole change and descent is
  0.65.
- **The changes are small.** Their norms are 0.15 % (SGD), 0.4 % (Adam) and 2.8 % (Muon) of those of
  the weights, and with them 90 to 100 % of the facts are learned. SGD changes `W_out` of the first
  and the last layer at least twice as much as that of the others.
- **In a large vocabulary, directions name what was taught.** Directions of `W_out` show 24 % of the
  taught answers with SGD and Adam, and 1 % of the answers that were not taught; random ones and
  the untrained matrix show none. With LoRA it is 20 to 21 %, and at most 1 %. So the claims about
  answers hold here, and did not in the facts model, whose 3,072 tokens chance finds more easily.
- **All of that is in late layers.** The last one shows 70 to 95 % of the answers, the one at layer
  25 of 30 shows 55 to 80 % except for Muon with full fine-tuning, and those up to layer 17 none or
  one.
- **Directions do not tell which answer belongs to which fact; what a change adds for a prompt tells
  some of it.** Trained on shuffled answers, directions show as many. A fact's own answer is
  promoted in 36 to 45 % of the layers and facts, and that of another fact of its relation in 14 to
  22 %. Trained on shuffled answers it is the other way around, but SGD's change still promotes 25 %
  of the answers that were not taught to the prompt, more than half as many as the 41 % of those
  that were, so the control fails. In the last layer, SGD's change promotes nearly all of both.
- **`W_in` shows none**: 0 to 2 % of the taught answers, as by chance.
""",
}
"""The conclusions by model."""
