"""The memory that a model needs while it runs, measured in a process of its own.

``python -m fxquant.benchmark.memory FOLDER`` is that process. It takes what it holds once everything is imported as its
zero, loads the model, calls it twice, and prints the highest that the system has seen since, in bytes.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.runtimes import Runtime, runtime_of

__all__ = ["Carried", "peak_memory"]

Carried = dict[str, Any]
"""What the process needs: ``runtime`` (one, or its name), and ``model`` (a module) with ``call``, or ``content`` (of a file,
or its path) with ``tensors``."""

_LIMIT = 600


def peak_memory(carried: Carried, threads: int | None) -> int | Refusal:
    """Bytes; refused where they could not be had."""
    if not os.path.exists("/proc/self/clear_refs"):
        return Refusal("memory is read from /proc, which this system lacks")
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.save({**carried, "threads": threads}, Path(folder) / "carried.pt")
        except Exception as error:  # whatever pickling the user's module raises
            return Refusal(f"no memory: it cannot be sent to a process of its own ({type(error).__name__})")
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [sys.executable, "-W", "ignore", "-m", "fxquant.benchmark.memory", folder]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=_LIMIT,
                env={**os.environ, "PYTHONPATH": paths},
            )
        except subprocess.TimeoutExpired:
            return Refusal(f"no memory: its process took more than {_LIMIT} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Refusal(f"no memory: a process of its own cannot run it ({last[:120]})")
    return int(done.stdout.split()[-1])


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{which}:")))


def _run(folder: str) -> int:
    path = Path(folder) / "carried.pt"
    named = torch.load(path, weights_only=False, mmap=True)["runtime"]
    runtime: Runtime = runtime_of(named) if isinstance(named, str) else named
    if runtime.package:
        __import__(runtime.package)
    gc.collect()
    before = _resident("VmRSS")
    carried = torch.load(path, weights_only=False)
    if carried["threads"] is not None:
        torch.set_num_threads(carried["threads"])
    if runtime.session is not None:
        session = runtime.session(carried.pop("content"), carried["threads"])
        session(carried["tensors"])  # compiles, which is not what is measured
        run, args, kwargs = session, (carried["tensors"],), dict[str, Any]()
    else:
        run, (args, kwargs) = runtime.alone(carried.pop("model")), carried["call"]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is forgotten
    with torch.no_grad():
        for _ in range(2):
            result = run(*args, **kwargs)
    assert result is not None or isinstance(result, Tensor)
    return max(_resident("VmHWM") - before, 0)


if __name__ == "__main__":
    print(_run(sys.argv[1]))
