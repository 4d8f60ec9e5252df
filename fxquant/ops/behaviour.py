"""``fxquant.behaviour``, by the path that entries from outside the package may have it from."""

from fxquant.behaviour import *  # noqa: F403
