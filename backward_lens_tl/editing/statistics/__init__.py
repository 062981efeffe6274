"""What editing methods measure on a model: moments, keys, values, pairs."""
