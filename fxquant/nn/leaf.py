"""Modules that stay whole where torch.fx walks through a model."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["Leaf"]


class Leaf(nn.Module):
    """One node in whatever graph another tracer makes of a prepared model: ``create_feature_extractor``, ``symbolic_trace``.

    Their own rule takes modules of ``torch.nn`` for leaves and follows the code of all others, which ours does not bear:
    quantizers ask their tensors for numbers.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; on a proxy of torch.fx, one call of this module in its graph."""
        for value in args:
            if isinstance(value, fx.Proxy):
                return self._as_leaf(value.tracer, args, kwargs)
        return super().__call__(*args, **kwargs)

    def _as_leaf(self, tracer: Any, args: Any, kwargs: Any) -> Any:
        asked = tracer.is_leaf_module
        tracer.is_leaf_module = lambda part, path: part is self or asked(part, path)
        try:
            return super().__call__(*args, **kwargs)  # which torch.fx has replaced while it traces
        finally:
            del tracer.is_leaf_module
