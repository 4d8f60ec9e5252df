"""Quantization-aware training: what a training loop needs beside the prepared model."""

from fxquant.training.codebooks import weigh_codebooks
from fxquant.training.distillation import distill
from fxquant.training.gradient_rounding import GradientRounding
from fxquant.training.incremental import IncrementalQuantization
from fxquant.training.loop import freeze_batchnorm, parameter_groups, reestimate_batchnorm, synchronize
from fxquant.training.oscillations import Oscillations
from fxquant.training.qsgd import QSGD
from fxquant.training.schedule import Schedule

__all__ = [
    "QSGD",
    "GradientRounding",
    "IncrementalQuantization",
    "Oscillations",
    "Schedule",
    "distill",
    "freeze_batchnorm",
    "parameter_groups",
    "reestimate_batchnorm",
    "synchronize",
    "weigh_codebooks",
]
