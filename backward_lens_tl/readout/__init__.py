"""From vectors of width `d_model` to tokens and target ranks."""
