"""``fxquant.installed``, by the path that it had before runtimes below this folder needed it."""

from __future__ import annotations

from fxquant.installed import is_installed, require

__all__ = ["is_installed", "require"]
