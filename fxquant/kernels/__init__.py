"""Fast forms of an integer graph. ``nn`` is the meaning of the model; what is here computes the same integers sooner.

``runner`` is asked by a graph module's call, and takes the native kernels for all of a graph or for parts of it; ``program``
makes straight-line code of the graph, or a part, for one shape of inputs, on torch's operators;
``weighted`` and ``elementwise`` choose the operator of each node; ``operators`` knows what torch has on this machine;
``audit`` says which sums, biases and scales could go wrong.
"""
