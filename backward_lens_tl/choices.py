"""Values that arguments choose among; importable without torch, for the command line."""

from __future__ import annotations

from typing import Literal

Kind = Literal["hooked", "bridge"]
MultiToken = Literal["first", "last"]
Direction = Literal["update", "gradient"]
VjpsAt = Literal["matrix", "residual"]
ReadAt = Literal["last", "own"]
Measure = Literal["answer_rank", "entropy"]
Lens = Literal["logit_lens", "normalized", "cosine"]
JACOBIAN_LENS = "jacobian_lens"
"""Name of the Logit Lens through average Jacobians; that of other lenses continues with theirs."""
Denominator = Literal["n", "n-1"]
FactorDtype = Literal["bfloat16", "float32"]
Size = Literal["norm", "write_norm"]
