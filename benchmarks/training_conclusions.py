"""What follows from the tables of docs/training_runs.md, written by hand."""

from __future__ import annotations

CONCLUSIONS = {
    "facts": """\
- **SGD's change stays low-rank.** After 200 steps, ten of 128 directions have 88 % of its squared
  norm. Ten directions of the gradient of a step have all of it.
- **Adam's change has a low-rank head and a long tail.** Its ten largest directions have 80 %,
  nearly as much as SGD's, so this claim fails. Its effective rank is about twice as high. Most of
  each step is outside of the row and column space of its gradient, and yet the cosine of the whole
  change and descent is 0.62.
- **Muon's change has no main directions.** After 200 steps its ten largest have 18 %, those of a
  random matrix 16 %. Its first step is mostly inside of the gradient's spaces, later ones are
  mostly outside.
- **Muon's change is by far the largest.** After 200 steps its norm is 57 % of that of the weights
  on average, and 95 % for `W_out` of layer 3. Adam's is 8 % and SGD's is 3 %. Muon's loss is 0.001
  at step 100, where SGD's is 0.125. Equal steps do not compare equally trained models.
- **Directions of SGD and Adam show most of the taught answers**: 79 % and 76 %, random ones 11 %
  and the untrained matrix 25 %. They also show more than half of the other answers, so they show
  kinds of answers. Muon's show fewer taught answers than the untrained matrix. With LoRA, which
  has eight directions, all three show 57 to 63 %. Trained on shuffled answers they show about as
  many, so directions do not tell which answer was taught to which prompt.
- **Responses tell it in part.** In full, a fact's own answer is promoted about two to three times
  as often as that of another taught fact of its relation. Trained on shuffled answers, the shuffled
  one is. But no optimizer promotes it in more than half of the layers and facts, so this claim
  fails. With LoRA the difference is smaller: SGD's change promotes 28 % of the taught answers and
  26 % of the shuffled ones.
- **Late layers respond.** In full, each of the layers 5 to 7 promotes 56 % or more of the taught
  answers with every optimizer, and each of the layers 0 to 4 promotes 44 % or fewer. The directions
  of SGD and Adam show 60 % or more in every layer.
- **`W_in` shows fewer of the taught answers** than `W_out` in every run. With LoRA and with Muon it
  shows fewer than the untrained matrix.
""",
}
"""The conclusions by model."""
