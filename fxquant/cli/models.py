"""The commands that make integer models and time them: ``diff``, ``quantize``, ``bench``."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch

from fxquant.benchmark.bench import bench
from fxquant.checkpoint import save
from fxquant.cli.arguments import (
    SHAPE,
    Commands,
    add_images,
    add_json,
    add_model,
    example_of,
    images_of,
    note_random_weights,
    positive,
    print_json,
    recipe_of,
    require_folder_of,
    shape_of,
    size_of,
    take_shape,
    where,
)
from fxquant.errors import InputError
from fxquant.export.by_ending import FORMATS, TARGET_OF, require_format, write_as
from fxquant.flow import calibrate, convert, prepare
from fxquant.model_spec import build_model
from fxquant.onnx.files import replacing
from fxquant.reporting.coverage import coverage
from fxquant.reporting.diff import diff
from fxquant.reporting.tabled import megabytes, plain
from fxquant.runtimes import RUNNABLE as RUNTIMES
from fxquant.targets import X86

__all__ = ["add_commands"]

_CHECKPOINTS = (".pt", ".pth")

_DIFF_EXAMPLES = """examples:
  fxquant diff torchvision:mobilenet_v3_large
  fxquant diff torchvision:vit_b_16 --coverage            and what stayed in float, and why
  fxquant diff nets/tiny.py:TinyNet --shape 1,1,28,28     a model of your own, given one input of that shape
  fxquant diff torchvision:resnet18 --target tensorrt     what becomes of it on another runtime
  fxquant diff timm:resnet50 --qat --keep-float 'layer4.*' --out diff.txt
"""
_QUANTIZE_EXAMPLES = """examples:
  fxquant quantize torchvision:resnet18 --weights r18.pth --data photos/ --out int8.pt
  fxquant quantize nets/tiny.py:TinyNet --data digits/ --shape 1x1x28x28 --out t.pt
  fxquant quantize torchvision:resnet18 --weights r18.pth --data photos/ --out int8.onnx

FOLDER holds images, or subfolders of images. The ending of --out says what is written:
  .pt  .pth   what int8 = fxquant.load(model, "int8.pt") reads back
  .onnx       ONNX, for ONNX Runtime and others        .pte   ExecuTorch, for XNNPACK
  .xml        OpenVINO IR, with a .bin beside it       .pt2   a torch.export program
  .tflite     LiteRT
"""
_BENCH_EXAMPLES = """examples:
  fxquant bench torchvision:resnet18 --batch 1 8 --threads 1 2
  fxquant bench torchvision:resnet18 --weights r18.pth --data photos/ --json r18.json
  fxquant bench nets/tiny.py:TinyNet --shape 1,1,28,28 --runtimes torch,onnxruntime --compiled

Without --data the inputs are noise: times, sizes and memory mean something, SQNR does not.
"""


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this file."""
    _add_diff(commands)
    _add_quantize(commands)
    _add_bench(commands)


def _add_diff(commands: Commands[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Print what becomes of each node of a model, and why."
    parser = commands.add_parser("diff", help=text, description=text, epilog=_DIFF_EXAMPLES, formatter_class=raw)
    add_model(parser)
    parser.add_argument("--shape", type=shape_of, metavar="NxCxHxW", help=SHAPE)
    parser.add_argument("--qat", action="store_true", help="prepare for training: batch norms stay")
    parser.add_argument("--coverage", action="store_true", help="also count ops, and list what stayed in float")
    out = "write to FILE, without colours, instead of printing; as JSON where it ends in .json"
    parser.add_argument("--out", metavar="FILE", help=out)
    parser.add_argument("--width", type=positive, metavar="N", help="columns; the terminal's by default")
    add_json(parser)
    parser.set_defaults(run=_run_diff)


def _add_quantize(commands: Commands[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Calibrate a model on images and write the integer model."
    parser = commands.add_parser(
        "quantize", help=text, description=text, epilog=_QUANTIZE_EXAMPLES, formatter_class=raw
    )
    add_model(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to write it; the ending says in which format"
    )
    parser.add_argument("--shape", type=shape_of, metavar="HxW", help="of the images: instead of --channels and --crop")
    add_images(parser, required=True, batch_size=32)
    parser.add_argument("--diff", action="store_true", help="also print the diff of the integer model")
    add_json(parser)
    parser.set_defaults(run=_run_quantize)


def _add_bench(commands: Commands[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Time a model in float and in int8, in every runtime, and print sizes, memory and SQNR too."
    parser = commands.add_parser("bench", help=text, description=text, epilog=_BENCH_EXAMPLES, formatter_class=raw)
    add_model(parser)
    shape = "of noise inputs (default 1,3,224,224); with --data, its channels and side are those of the images"
    parser.add_argument("--shape", type=shape_of, metavar="NxCxHxW", help=shape)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], metavar="N", help="sizes (default 1)")
    threads = "numbers of threads (default: each runtime's own choice)"
    parser.add_argument("--threads", type=positive, nargs="+", default=[None], metavar="N", help=threads)
    names = f"some of {','.join(RUNTIMES)} (default: all)"
    parser.add_argument("--runtimes", type=_runtimes, default="auto", metavar="A,B", help=names)
    parser.add_argument("--compiled", action="store_true", help="also the float model behind torch.compile")
    limit = "seconds that compiling may take (default %(default)s)"
    parser.add_argument("--compile-limit", type=positive, default=120, metavar="S", help=limit)
    parser.add_argument("--rounds", type=positive, default=9, metavar="N", help="rounds (default %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out, which takes a process each")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the rows there too; or print them")
    add_images(parser, required=False, batch_size=8)
    parser.set_defaults(run=_run_bench)


def _run_diff(options: argparse.Namespace) -> None:
    if options.out is not None:
        require_folder_of(options.out)
    model = build_model(options.spec, weights=options.weights)
    example, recipe = example_of(model, options.shape), recipe_of(options)
    prepared = prepare(model, example, qat=options.qat, recipe=recipe, **where(options))
    compared = diff(model, prepared, width=options.width)
    covered = coverage(prepared) if options.coverage else None
    found: dict[str, Any] = {"diff": compared, "coverage": covered}
    counted = [] if covered is None else [str(covered)]
    if options.out is not None:
        text = "\n\n".join([compared.text(width=options.width), *counted])
        is_json = os.path.splitext(options.out)[1].lower() == ".json"
        _write(options.out, f"{json.dumps(plain(found), indent=2) if is_json else text}\n")
    if options.json:
        print_json(options, found)
    elif options.out is None:
        print("\n\n".join([str(compared), *counted]))


def _write(path: str, text: str) -> None:
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        file.write(text)


def _run_quantize(options: argparse.Namespace) -> None:
    require_folder_of(options.out)
    ending = _require_ending(options.out)
    if options.shape is not None:
        take_shape(options)
    model = build_model(options.spec, weights=options.weights)
    images = images_of(options)
    example = torch.zeros(1, options.channels, options.crop, options.crop)
    prepared = prepare(model, example, recipe=recipe_of(options), **where(options, TARGET_OF.get(ending, X86.name)))
    calibrate(prepared, images)
    integer = convert(prepared)
    compared, before = diff(model, integer), size_of(model)  # all that may fail or be interrupted comes before the file
    told = ""
    if ending in FORMATS:
        told = write_as(integer, options.out, next(iter(images))[:2])
    else:
        with replacing(options.out) as new:
            save(integer, new)
    size = os.path.getsize(options.out)
    if options.json:
        facts = {"images": len(images.paths), "out": options.out, "bytes": size, "float_bytes": before, "told": told}
        note_random_weights(options)
        return print_json(options, {**facts, "summary": compared.summary(), "diff": compared if options.diff else None})
    if told:
        print(told)
    if options.diff:
        print(f"{compared}\n")
    print(f"calibrated on {len(images.paths)} images; {compared.summary()}")
    print(f"{options.out}: {megabytes(size)}, from {megabytes(before)}")
    note_random_weights(options)
    return None


def _run_bench(options: argparse.Namespace) -> None:
    if options.json not in (None, "-"):
        require_folder_of(options.json)
    model = build_model(options.spec, weights=options.weights)
    if options.data is not None and options.shape is not None:
        take_shape(options)
    noise = torch.randn(example_of(model, options.shape).shape, generator=torch.Generator().manual_seed(0))
    found = bench(
        model,
        noise if options.data is None else None,
        calibration=None if options.data is None else images_of(options),
        recipe=recipe_of(options),
        **where(options),
        runtimes=options.runtimes,
        threads=options.threads,
        batches=options.batch,
        compiled=options.compiled,
        compile_limit=options.compile_limit,
        memory=not options.no_memory,
        noise=options.data is None,
        rounds=options.rounds,
    )
    rows = {"spec": options.spec, **found.as_dict()}
    if options.json == "-":
        return print_json(options, rows)
    if options.json is not None:
        _write(options.json, json.dumps(plain(rows), indent=1))
    return print(found)


def _require_ending(path: str) -> str:
    """The ending of ``path``, for which there is a format whose packages are installed."""
    ending = os.path.splitext(path)[1]
    if ending not in FORMATS and ending not in _CHECKPOINTS:
        known = ", ".join([*_CHECKPOINTS, *FORMATS])
        raise InputError(f"--out {path}: the ending {ending!r} names no format. Write one of {known}.")
    if ending in FORMATS:
        require_format(path)
    return ending


def _runtimes(text: str) -> str | list[str]:
    return text if text == "auto" else text.split(",")
