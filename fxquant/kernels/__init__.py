"""Fast forms of an integer graph. ``nn`` is the meaning of the model; what is here computes the same integers sooner.

``runner`` is asked by a graph module's call; ``program`` makes straight-line code of the graph for one shape of inputs;
``weighted`` and ``elementwise`` choose the operator of each node; ``operators`` knows what torch has on this machine;
``audit`` says which sums, biases and scales could go wrong.
"""
