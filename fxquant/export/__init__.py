"""Files for other runtimes, and those runtimes as callables."""

from fxquant.export.to_program import export_program

__all__ = ["export_program"]
