"""``passes.to_qdq`` by the path that scripts from before have it from."""

from fxquant.forms.weighted import real_scales
from fxquant.passes.to_qdq import to_qdq as to_exchange

__all__ = ["real_scales", "to_exchange"]
