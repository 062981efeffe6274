"""The methods of editing, one per file."""
