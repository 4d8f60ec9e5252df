"""What runtimes that read ONNX files share: sources as they open them, tensors as they take them."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

__all__ = ["array", "held_beside", "readable", "runs_files"]


def readable(file: bytes | str | os.PathLike[str]) -> bytes | str:
    """A file's bytes or path, as runtimes open it."""
    return file if isinstance(file, bytes) else os.fspath(file)


def held_beside(file: bytes | str | os.PathLike[str]) -> Any:
    """What a runtime may still read while it runs, to be held as long; bytes it has taken in."""
    return None if isinstance(file, bytes) else file


def array(x: Tensor) -> Any:
    """A tensor as a NumPy array."""
    return x.detach().cpu().contiguous().numpy()


def runs_files(saturates: bool) -> str:
    """The status of a runtime of ONNX files whose kernels may add products in 16 bits."""
    return "runs exported files" + ("; models prepared with processor='vnni' saturate" * saturates)
