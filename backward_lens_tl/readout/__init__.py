"""From vectors of the residual stream's width to tokens, ranks and tables."""
