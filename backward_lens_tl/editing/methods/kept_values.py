"""Values that searches have found, kept in a folder for later edits of the same facts.

A value depends on the model, the fact and the search, but not on the other facts of an edit. So one
search serves edits of 1, 10 and 200 facts, and an edit that was interrupted resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from backward_lens_tl.editing.fact_contexts import FactContexts
from backward_lens_tl.errors import EditError, first_line
from backward_lens_tl.files.storage import Saved
from backward_lens_tl.models import Host


@dataclass(frozen=True)
class FoundValue(Saved):
    """The result of a search.

    Attributes:
        delta: What is added to the activation at the edited token.
    """

    WHAT = "a value that a search for an edit has found"

    delta: Tensor


class KeptValues:
    """The values of one model and one kind of search in a folder.

    Args:
        folder: The folder, which is created.
        host: The model.
        search: What the result of a search depends on, other than the model and the fact; as JSON.

    Raises:
        EditError: If the folder cannot be created.
    """

    def __init__(self, folder: str | Path, host: Host, search: object) -> None:
        self._folder = Path(folder).expanduser()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EditError(
                f"values cannot be kept in {str(folder)!r}: {first_line(error)}; pass another "
                "folder, or None"
            ) from error
        self._about = [host.fingerprint(), search]

    def of(self, fact: FactContexts, find: Callable[[], Tensor]) -> Tensor:
        """Read the value of a fact, or find and keep it.

        Args:
            fact: The fact in its contexts.
            find: Searches for the value.

        Returns:
            The value.
        """
        about: list[Any] = [*self._about, asdict(fact)]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        file = self._folder / f"value-{digest}.safetensors"
        if file.exists():
            return FoundValue.load(file).delta
        found = find()
        FoundValue(found).save(file)
        return found
