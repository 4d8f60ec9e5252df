"""fxquant's own int8 kernels: a whole integer graph as one call of a small C++ library, see ``plan.cpp``.

The library is compiled when it is first asked for, which takes two seconds and a C++ compiler, and kept. It computes the
integers of the reference, to the bit, on machines with AVX512-VNNI; anywhere else torch's own operators remain.
"""
