"""Files for other runtimes, and those runtimes as callables."""

from fxquant.export.to_executorch import export_executorch
from fxquant.export.to_program import export_program
from fxquant.export.to_tflite import export_tflite

__all__ = ["export_executorch", "export_program", "export_tflite"]
