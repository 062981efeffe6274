"""MEND: its networks, how they are trained, and the method."""
