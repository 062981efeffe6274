"""The lens over any number of prompts, as tables in a folder."""
