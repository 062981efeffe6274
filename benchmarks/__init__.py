"""Measure speed and memory of `backward_lens_tl` against other ways to compute the same results.

`make bench`, or `python -m benchmarks --help`. It is not part of the package.
"""
