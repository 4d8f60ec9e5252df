"""The fake-quant modules that stand in a prepared graph, and their integer twins."""
