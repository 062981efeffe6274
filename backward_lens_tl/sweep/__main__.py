"""`python -m backward_lens_tl.sweep`, which `accelerate launch -m` runs in several processes."""

from __future__ import annotations

import argparse
import sys

from backward_lens_tl.errors import BackwardLensError, one_line
from backward_lens_tl.sweep.command import add_arguments, run


def main() -> int:
    """Run the sweep that the process's arguments ask for.

    Returns:
        The exit status: 0, or 2 after an error, which is one line on stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m backward_lens_tl.sweep", description=__doc__)
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except (BackwardLensError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
