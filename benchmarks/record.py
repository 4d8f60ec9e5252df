"""What every benchmark prints and keeps: a table, and a JSON file with the facts of the machine beside it.

Only facts that explain a number are kept (processor, instruction set, threads, allocator, versions, date); nothing that
names the machine or a folder on it.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxquant.processor import instruction_set, processor_name

__all__ = ["RESULTS", "add_output_option", "keep_heap", "machine", "publish", "seconds", "version"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("fxquant", "torchvision", "torchao", "nncf", "onnxruntime", "openvino")
CPU_FLAGS = ("avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "neon", "sve")
FOLDER_OPTIONS = ("data", "weights", "output")

LOAD_BEFORE = os.getloadavg()[0]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def version(package: str) -> str | None:
    """The installed version of ``package``, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def keep_heap() -> None:
    """Tell glibc to keep freed blocks, however large, instead of returning them to the system.

    Fresh pages cost more than the arithmetic on them, so this shows what the kernels cost; see README.md. Call it
    before the first large allocation.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not libc.mallopt(_M_MMAP_MAX, 0) or not libc.mallopt(_M_TRIM_THRESHOLD, -1):
        raise SystemExit("--keep-heap needs glibc's mallopt, which this Python is not linked with")


def _allocator(kept: bool) -> str:
    if kept:
        return "glibc, heap kept"
    tuned = sorted(name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")))
    return f"changed by {', '.join(tuned)}" if tuned else "default"


def machine(*, heap_kept: bool = False) -> dict[str, str]:
    """The facts that explain a timing: instruction set, threads, load before the run, allocator, versions, the day."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    flags = [flag for flag in CPU_FLAGS if capabilities.get(flag)]
    named = f"{processor_name()} ({instruction_set()})"
    cpu = ", ".join([named, f"{torch.get_num_threads()} threads", *flags])
    facts = {"cpu": cpu, "load before": f"{LOAD_BEFORE:.1f}", "allocator": _allocator(heap_kept)}
    facts |= {"python": platform.python_version(), "torch": torch.__version__}
    facts.update({name: version(name) or "not installed" for name in PACKAGES})
    facts["date"] = datetime.date.today().isoformat()
    return facts


def add_output_option(parser: ArgumentParser, name: str) -> None:
    """Give ``parser`` the option every benchmark has: where its JSON goes."""
    default = RESULTS / f"{name}.json"
    parser.add_argument("--output", type=Path, default=default, help=f"JSON file (default: results/{name}.json)")


def publish(
    rows: Sequence[Mapping[str, Any]],
    args: Namespace,
    *,
    quiet: bool = False,
    columns: Sequence[Sequence[str]] = (),
    **more: Any,
) -> None:
    """Print ``rows`` as an aligned table, and write them, the options and the machine's facts to ``args.output``.

    With ``quiet`` they are only written: what a long run has so far. ``columns`` splits a wide table into several.
    """
    facts = machine(heap_kept=getattr(args, "keep_heap", False))
    if not quiet:
        for names in columns or [None]:
            shown = [
                {name: _cell(value) for name, value in row.items() if names is None or name in names} for row in rows
            ]
            print(tabulate(shown, headers="keys", disable_numparse=True, stralign="right", missingval="–") + "\n")
        print(" · ".join(f"{name} {value}" if name != "cpu" else value for name, value in facts.items()))
    settings = {name: value for name, value in vars(args).items() if name not in FOLDER_OPTIONS}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": facts, "settings": settings, "rows": list(rows), **more}
    part = args.output.with_name(args.output.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(args.output)  # all of it or nothing, should the run be stopped here


def seconds(value: float) -> float:
    """A duration at the precision that means something: three significant digits."""
    return float(f"{value:.3g}")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
