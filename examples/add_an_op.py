"""Teach fxquant an op from outside the package: one entry, and everything else follows.

Run: python examples/add_an_op.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.behaviour import Rescaling
from fxquant.nn.integer import IntegerTable
from fxquant.ops.entry import OpEntry
from fxquant.ops.example import example

OpEntry(
    name="softsign",
    function=F.softsign,
    signature="input*",
    behaviour=Rescaling(),
    modules=(nn.Softsign,),
    integer=IntegerTable,
    onnx="Softsign",
    example=example(nn.Softsign(), (2, 3, 8, 8)),
)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softsign(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4)).eval()
    x = torch.randn(16, 3, 8, 8)
    prepared = fxquant.prepare(model, x)
    fxquant.calibrate(prepared, [x], progress=False)
    print(fxquant.diff(model, fxquant.convert(prepared)))


if __name__ == "__main__":
    main()
