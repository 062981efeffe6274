"""Folders for what takes long to compute and serves later edits."""

from __future__ import annotations

from pathlib import Path

from backward_lens_tl.errors import EditError, first_line


def created(folder: str | Path, problem: str, way_out: str) -> Path:
    """Create a folder, unless there is one.

    Args:
        folder: The folder; `~` is the user's own.
        problem: What the error says before the name of the folder.
        way_out: What to do if it cannot be created.

    Returns:
        The folder.

    Raises:
        EditError: If it cannot be created.
    """
    own = Path(folder).expanduser()
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(f"{problem} {str(own)!r}: {first_line(error)}; {way_out}") from error
    return own
