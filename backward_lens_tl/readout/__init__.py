"""Read vectors of width `d_model` as tokens and target ranks."""
