"""Post-training quantization of a torchvision model: three verbs, a diff, and the largest error.

Run: python examples/ptq.py
"""

from __future__ import annotations

import torch
import torchvision

import fxquant


def main() -> None:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(weights=None).eval()
    batches = [torch.randn(8, 3, 96, 96) for _ in range(4)]

    prepared = fxquant.prepare(model, batches[0])
    fxquant.calibrate(prepared, batches)
    int8 = fxquant.convert(prepared)

    print(fxquant.diff(model, int8))
    print(fxquant.coverage(int8))
    with torch.no_grad():
        expected, got = fxquant.freeze(prepared)(batches[0]), int8(batches[0])
    print(f"largest difference to the fake-quantized model: {(expected - got).abs().max().item():.2e}")


if __name__ == "__main__":
    main()
