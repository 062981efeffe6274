"""Capture `x_i` and `delta_i` of prompts in one forward and one backward pass."""
