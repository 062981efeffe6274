"""The parts of the forward pass shift: what it reads, what it writes, and how much of it."""
