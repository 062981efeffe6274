"""`python -m backward_lens_tl` is the command `backward-lens`."""

import sys

from backward_lens_tl.cli import main

if __name__ == "__main__":
    sys.exit(main())
