"""fxquant's own int8 kernels: a whole integer graph as one call of a small C++ library, see ``plan.cpp``.

A wheel brings the library, for each instruction set; else it is compiled when it is first asked for, which takes some
seconds and a C++ compiler, and kept. It computes the integers of the reference, to the bit, on every processor, with the
most that this has of the instruction sets in ``sets.py``.
"""
