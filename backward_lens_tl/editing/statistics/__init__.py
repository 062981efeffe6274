"""What methods of editing need to know of a model: moments, keys, values, pairs."""
