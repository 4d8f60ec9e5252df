"""fxquant: takes a PyTorch model as its author wrote it and makes it compute in integers.

prepared = fxquant.prepare(model, example_inputs)
fxquant.calibrate(prepared, loader)
int8 = fxquant.convert(prepared)
print(fxquant.diff(model, prepared))
"""

from fxquant.algorithms.recover import recover
from fxquant.analysis.errors import errors_by_layer
from fxquant.analysis.sensitivity import sensitivity
from fxquant.benchmark.bench import bench
from fxquant.checkpoint import load, save
from fxquant.errors import FxquantError
from fxquant.export.runtimes import compile
from fxquant.export.to_onnx import export_onnx
from fxquant.flow import calibrate, convert, freeze, prepare, quantize, quantizers_off
from fxquant.numerics.scheme import Scheme
from fxquant.page.report import report
from fxquant.recipe import Op, Recipe, Setting
from fxquant.reporting.coverage import coverage
from fxquant.reporting.diff import diff
from fxquant.training import Schedule, distill, freeze_batchnorm, parameter_groups, reestimate_batchnorm
from fxquant.tuning.ladder import auto
from fxquant.tuning.placement import tune_placement

__all__ = [
    "FxquantError",
    "Op",
    "Recipe",
    "Schedule",
    "Scheme",
    "Setting",
    "auto",
    "bench",
    "calibrate",
    "compile",
    "convert",
    "coverage",
    "diff",
    "distill",
    "errors_by_layer",
    "export_onnx",
    "freeze",
    "freeze_batchnorm",
    "load",
    "parameter_groups",
    "prepare",
    "quantize",
    "quantizers_off",
    "recover",
    "reestimate_batchnorm",
    "report",
    "save",
    "sensitivity",
    "tune_placement",
]

__version__ = "0.1.0"
