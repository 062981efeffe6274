"""The paper's analyses: each from a table of cells or gradients to a small tidy table."""
