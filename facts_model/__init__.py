"""The facts model: a small GPT-2 that knows true facts, and the text it is trained on."""
