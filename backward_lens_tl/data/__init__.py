"""Data sets of prompts and targets, and the segments of a prompt."""
