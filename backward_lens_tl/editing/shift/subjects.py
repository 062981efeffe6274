"""Names that stand for other subjects, for requests whose caller passes none.

Of the kinds that facts are usually about, and known to any language model.
"""

from __future__ import annotations

SUBJECTS = (
    "Barack Obama",
    "Toyota",
    "Norway",
    "Mozart",
    "Chicago",
    "Nokia",
    "The Simpsons",
    "Cristiano Ronaldo",
    "Amazon River",
    "Albert Einstein",
    "Microsoft",
    "Vienna",
    "Marie Curie",
    "BBC",
    "Sony",
    "Julius Caesar",
    "Kenya",
    "Volkswagen Golf",
    "Harvard University",
    "Pablo Picasso",
    "Netflix",
    "Mount Everest",
    "Leo Tolstoy",
    "Windows 95",
    "Taylor Swift",
    "Buddhism",
    "Boeing 747",
    "Serena Williams",
    "Wikipedia",
    "Lake Victoria",
    "Charles Darwin",
    "Spanish",
)
