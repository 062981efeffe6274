"""Prompts in, factors out: one forward and one backward pass that keep `x_i` and `delta_i`."""
