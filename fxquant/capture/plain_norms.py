"""Batch norms of the user's own class: what they do to the statistics is torch's, so they become torch's layer.

``class BatchNormAct2d(nn.BatchNorm2d)`` copies torch's forward, counts batches in training mode, calls the function
``batch_norm`` and adds an activation. In the graph the call becomes a call of the layer that the class descends from,
with the same parameters at the same names, which folds and trains like any other.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn

from fxquant.capture.hooks import HOOKS
from fxquant.capture.patches import BATCH_NORM
from fxquant.capture.proxies import ModeFlag, ParameterProxy

__all__ = ["counting_nodes", "plain_norm"]

_HELD = ("running_mean", "running_var", "weight", "bias")


def plain_norm(m: Any, path: str, mode: bool, args: Any, kwargs: Any) -> tuple[nn.Module, Any] | None:
    """The layer of torch that ``batch_norm(*args, **kwargs)`` in the forward of ``m`` stands for, and its input.

    None where the call differs from that layer's own: other statistics, another mode, momentum or eps.
    """
    base = next((c for c in type(m).__mro__ if c.__module__ == nn.BatchNorm2d.__module__), None)
    if base is None or base is type(m) or not isinstance(m, nn.modules.batchnorm._BatchNorm):
        return None
    given = inspect.signature(BATCH_NORM).bind(*args, **kwargs)
    given.apply_defaults()
    call = given.arguments
    own = all(_is_own(m, path, name, call[name]) for name in _HELD)
    training = call["training"]
    follows = isinstance(training, ModeFlag) or (type(training) is bool and training is mode)
    if not (own and follows and m.track_running_stats and call["momentum"] == m.momentum and call["eps"] == m.eps):
        return None
    twin: nn.Module = object.__new__(base)
    twin.__dict__.update(m.__dict__, training=mode)
    for registry in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[registry] = m.__dict__[registry].copy()
    for kind in HOOKS:
        twin.__dict__[kind] = type(m.__dict__[kind])()
    return twin, call["input"]


def _is_own(m: nn.Module, path: str, name: str, given: Any) -> bool:
    if given is None:
        return getattr(m, name) is None
    return type(given) is ParameterProxy and given.node.target == f"{path}.{name}"


def counting_nodes(nodes: list[fx.Node], paths: set[str]) -> list[fx.Node]:
    """The nodes that count batches for the norms at ``paths``, which those do themselves."""
    counters = {f"{path}.num_batches_tracked" for path in paths}
    reads = [n for n in nodes if n.op == "get_attr" and n.target in counters]
    counts = [n for n in nodes if n.meta.get("writes") == "attribute" and not n.users and n.args[0] in reads]
    return [*counts, *(read for read in reads if set(read.users) <= set(counts))]
