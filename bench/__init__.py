"""Benchmarks: ``python -m bench forward | backward | training --set standard``, ``step``, ``plot``, ``table``.

No correctness here (that is tests/'s), no timing there. What a number means:

- times are medians of CUDA events; our kernels and the peers run in alternation within a shape, so that the card's
  clock, which follows its power, is the same for all of them;
- the L2 is flushed before each timed call, except where a call takes less than 50 us: see timing.py;
- FLOPs and bytes are counted in problem.py, nowhere else.
"""
