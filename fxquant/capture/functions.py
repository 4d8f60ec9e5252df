"""Functions that are called with proxies: most become nodes, some are looked into."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.attributes import Attributes
from fxquant.capture.kept import KEPT_WHOLE
from fxquant.capture.patches import ATTENTION, BATCH_NORM, attention_in_python
from fxquant.capture.plain_norms import plain_norm
from fxquant.capture.proxies import find_proxy

__all__ = ["Functions"]


class Functions(Attributes):
    """The part of the tracer that calls functions.

    Attributes:
        plain: layers of torch that stand for the user's own batch norms, by path.
    """

    plain: dict[str, nn.Module]
    _created: list[fx.Node]

    def erase_since(self, mark: int) -> None:
        """Take back every node made since there were ``mark``."""
        raise NotImplementedError

    def call_torch(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A torch function that was given a proxy."""
        if function is ATTENTION and self.fake is not None:
            with attention_in_python():
                return function(*args, **kwargs)
        if function is BATCH_NORM and (norm := self._plain_norm(args, kwargs)) is not None:
            return norm
        name = getattr(function, "__name__", str(function))
        if torch.overrides.is_tensor_method_or_property(function):
            if name == "__get__":
                return getattr(args[0], function.__self__.__name__)
            return self.create_proxy("call_method", name, args, kwargs)
        return self.create_proxy("call_function", function, args, kwargs, name=self.graph._target_to_str(name))

    def _plain_norm(self, args: Any, kwargs: Any) -> Any:
        path = self.scope.module_path
        mode = self._override if self._override is not None else int(self.root.training) != 0
        found = plain_norm(self.root.get_submodule(path), path, mode, args, kwargs) if path else None
        if found is None:
            return None
        self.plain[path], x = found
        return self.create_proxy("call_module", path, (x,), {})

    def call_wrapped(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A function marked with ``torch.fx.wrap``: looked into if that works."""
        if self.paused or find_proxy((args, kwargs)) is None:
            return function(*args, **kwargs)
        mark, names = len(self._created), self.memory.state()
        if self.fake is not None and f"{function.__module__}.{function.__qualname__}" not in KEPT_WHOLE:
            try:
                return function(*args, **kwargs)
            except Exception:
                self.erase_since(mark)
                self.memory.restore(names)
        return self.create_proxy("call_function", function, args, kwargs)
