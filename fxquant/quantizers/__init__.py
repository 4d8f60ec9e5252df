"""Quantizer rules, one file each: how a tensor or a weight finds its grid, rounds to it, and learns it.

A scheme names its rule: ``Scheme.activation(4, quantizer="lsq")``. ``RULES`` has them all. One of your own is entered from
outside with ``register``, a way to find ranges with ``register_estimator``; both then work like those that are here.

The contract
------------
A rule has a class for tensors, a subclass of ``FakeQuantize`` called as ``cls(scheme)``, or one for weights, a subclass of
``WeightQuantize`` called as ``cls(scheme, axis=..., channels=...)``, or both. ``quantizers.learned`` has parents that do
all of it but the gradient.

- *rounding*: ``rounded(x, lower, upper, inplace)`` gives numbers on the grid, ``x`` clamped to ``[lower, upper]`` first (a
  ReLU that was merged), with the gradient of the rule. A weight's gets ``x`` alone. It is called while ``active``, by
  ``forward(x, lower, upper, inplace, observes)``, which observes or refreshes first. A rule that overrides that instead
  does so itself, and gives ``x`` back while ``active`` is False.
- *observe*: while ``observing`` is set (``calibrate``), ``observe`` folds what passes into the estimator's state.
- *state*: what a rule knows or learns is in buffers and parameters, of shapes that do not depend on data, so that
  ``state_dict``, ``save``, ``deepcopy``, pickle and averages of models carry it. Parameters are the optimizer's.
- *initialization*: ``update_scale`` sets the grid from the state when ``calibrate`` ends, through ``set_range`` and
  ``take_grid``; ``refresh`` that of a weight from the weight. ``ready`` says whether there is one.
- *grid*: the property ``grid`` is what ``freeze`` takes: scale, zero point (0 for a weight) and scheme. In eval mode all
  that ``forward`` gives lies on it. A weight's integers are what ``forward`` makes of it, however it rounds; a tensor's
  rounding is to the nearest, as integer kernels have it. ``passes.settle_quantizers`` checks both, and refuses what does
  not hold.
- *what it can export*: everything that has such a grid. A rule without one says so with ``simulates``: then the diff shows
  it at every op, and ``freeze``, ``convert`` and the exports refuse by its name, with that reason.
"""

from importlib import import_module
from pkgutil import iter_modules

from fxquant.quantizers.registry import RULES, QuantizerRule, has_rule, register, register_estimator, rule_of

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["RULES", "QuantizerRule", "has_rule", "register", "register_estimator", "rule_of"]
