"""Post-training quantization of EfficientNet-Lite0 with its ImageNet weights, beside torch FX and ONNX Runtime.

Depthwise convolutions and ReLU6, whose scales differ by a hundred between channels of one tensor. Every tool gets the same
crops to calibrate on, or, where there are no data, the same images made from the network's batch norms, and is judged on
crops of other photographs: how often it has the float network's top-1, and how far its logits are from the float ones.
fxquant's integer model runs in its native runtime, FX's as its kernels compute it and below 8 bits, which they lack, as fake
quantization, ONNX Runtime's as a QDQ file.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from onnxruntime_static import ort_static
from peers import fx_fake, fx_full_range, fx_per_tensor, fx_x86
from photographs import CALIBRATING, JUDGING, crops, efficientnet_lite0
from record import add_output_option, publish
from torch import Tensor, nn
from tqdm import tqdm

import fxquant
from fxquant import Scheme, Setting
from fxquant.algorithms import correct_biases, equalize, synthesize

SCHEMES = {
    "W8A8": (8, 8, True),
    "W8A8 per tensor": (8, 8, False),
    "W4A8": (4, 8, True),
    "W4A4": (4, 4, True),
}
"""Bits of weights and of activations, and whether weights have a scale a channel."""
SOURCES = ("photographs", "batch norms")
"""What calibrates: crops, or what ``synthesize`` makes where there are no data."""
KEYS = ("scheme", "calibrated on", "tool")
BATCH = 32

Batches = list[tuple[Tensor, Tensor]]
Build = Callable[[nn.Module, Batches, str], Callable[[Tensor], Tensor]]


def setting(scheme: str, estimator: str) -> Setting:
    """fxquant's recipe of a scheme."""
    weight, activation, per_channel = SCHEMES[scheme]
    return Setting(
        weight=Scheme.weight(weight, per_channel=per_channel, estimator=estimator),
        activation=Scheme.activation(activation, estimator=estimator),
    )


def calibrated(model: nn.Module, batches: Batches, scheme: str) -> Callable[[Tensor], Tensor]:
    """fxquant, ranges alone."""
    prepared = fxquant.prepare(model, batches[0][0][:1], recipe=setting(scheme, "minmax"))
    fxquant.calibrate(prepared, batches, progress=False)
    return fxquant.compile(fxquant.convert(prepared), runtime="native")


def recovered(model: nn.Module, batches: Batches, scheme: str) -> Callable[[Tensor], Tensor]:
    """fxquant, with layers equalized where a weight has one scale, and roundings in closed form."""
    prepared = fxquant.prepare(model, batches[0][0][:1], recipe=setting(scheme, "mse"))
    if not SCHEMES[scheme][2]:
        equalize(prepared)
    fxquant.calibrate(prepared, batches, progress=False)
    fxquant.recover(prepared, batches, progress=False)
    return fxquant.compile(fxquant.convert(prepared), runtime="native")
