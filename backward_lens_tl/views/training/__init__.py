"""A watched training run: a table that follows it in a terminal or a notebook."""
