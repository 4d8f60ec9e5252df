"""The command line: ``fxquant demo``, ``fxquant diff``, ``fxquant quantize``, ``fxquant bench``, ``fxquant ops``.

Exit codes: 0 it worked; 1 fxquant says what is wrong, in one message; 2 the command was not understood.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxquant import __version__
from fxquant.benchmark.bench import bench
from fxquant.checkpoint import save
from fxquant.errors import FxquantError, InputError
from fxquant.export.runtimes import RUNTIMES
from fxquant.flow import calibrate, convert, prepare
from fxquant.image_folder import ImageFolder
from fxquant.model_spec import build_model
from fxquant.recipe import Recipe
from fxquant.report.coverage import coverage
from fxquant.report.diff import diff
from fxquant.report.op_table import op_table
from fxquant.targets import TARGETS, X86

__all__ = ["main"]

_SPEC = "torchvision:NAME, timm:NAME, or path/to/file.py:factory (a function or class that returns an nn.Module)"

_EXAMPLES = """examples:
  fxquant demo                                            trains a small network and quantizes it, in seconds
  fxquant diff torchvision:resnet18                       what prepare makes of a model, node by node
  fxquant quantize torchvision:resnet18 --weights r18.pth --data photos/ --out int8.pt
  fxquant bench torchvision:resnet18 --batch 1 8          how fast, large and accurate int8 is, in each runtime
  fxquant ops                                             which ops are quantized, and how
"""
_DIFF_EXAMPLES = """examples:
  fxquant diff torchvision:mobilenet_v3_large
  fxquant diff torchvision:vit_b_16 --coverage            and what stayed in float, and why
  fxquant diff nets/tiny.py:TinyNet --shape 1,1,28,28     a model of your own, given one input of that shape
  fxquant diff torchvision:resnet18 --target tensorrt     what becomes of it on another runtime
  fxquant diff timm:resnet50 --qat --keep-float 'layer4.*' --out diff.txt
"""
_QUANTIZE_EXAMPLES = """examples:
  fxquant quantize torchvision:resnet18 --weights r18.pth --data photos/ --out int8.pt
  fxquant quantize nets/tiny.py:TinyNet --data digits/ --channels 1 --resize 28 --crop 28 --out t.pt

FOLDER holds images, or subfolders of images. Read the result back with:
  int8 = fxquant.load(model, "int8.pt")
"""
_BENCH_EXAMPLES = """examples:
  fxquant bench torchvision:resnet18 --batch 1 8 --threads 1 2
  fxquant bench torchvision:resnet18 --weights r18.pth --data photos/ --json r18.json
  fxquant bench nets/tiny.py:TinyNet --shape 1,1,28,28 --runtimes torch,onnxruntime --compiled

Without --data the inputs are noise: times, sizes and memory mean something, SQNR does not.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: the words of the command line; those of the process where None.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except FxquantError as error:
        print(f"fxquant: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Make PyTorch models compute in integers."
    parser = argparse.ArgumentParser(prog="fxquant", description=text, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"fxquant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_diff(commands)
    _add_quantize(commands)
    _add_bench(commands)
    _add_ops(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Train a small network on scikit-learn's digits, print its diff, and compare float, PTQ and QAT."
    parser = commands.add_parser("demo", help="a whole tour on a small network", description=text)
    parser.set_defaults(run=_run_demo)


def _add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Print what becomes of each node of a model, and why."
    parser = commands.add_parser("diff", help=text, description=text, epilog=_DIFF_EXAMPLES, formatter_class=raw)
    _add_model(parser)
    parser.add_argument("--shape", type=_shape, metavar="N,C,H,W", help="of an example input (default 1,3,224,224)")
    parser.add_argument("--qat", action="store_true", help="prepare for training: batch norms stay")
    parser.add_argument("--coverage", action="store_true", help="also count ops, and list what stayed in float")
    parser.add_argument("--out", metavar="FILE", help="write to FILE, without colours, instead of printing")
    parser.add_argument("--width", type=_positive, metavar="N", help="columns; the terminal's by default")
    parser.set_defaults(run=_run_diff)


def _add_quantize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Calibrate a model on images and write the integer model."
    parser = commands.add_parser(
        "quantize", help=text, description=text, epilog=_QUANTIZE_EXAMPLES, formatter_class=raw
    )
    _add_model(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the integer model")
    _add_images(parser, required=True, batch_size=32)
    parser.add_argument("--diff", action="store_true", help="also print the diff of the integer model")
    parser.set_defaults(run=_run_quantize)


def _add_images(parser: argparse.ArgumentParser, *, required: bool, batch_size: int) -> None:
    parser.add_argument("--data", required=required, metavar="FOLDER", help="images, flat or in subfolders")
    parser.add_argument("--images", type=_positive, default=512, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=batch_size, metavar="N", help="default %(default)s")
    parser.add_argument("--resize", type=_positive, default=256, metavar="N", help="short side (default %(default)s)")
    parser.add_argument("--crop", type=_positive, default=224, metavar="N", help="centre square (default %(default)s)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="grey or colour (default %(default)s)")
    imagenet = "a channel, or one number for all; default ImageNet's"
    parser.add_argument("--mean", type=_numbers, default=(0.485, 0.456, 0.406), metavar="R,G,B", help=imagenet)
    parser.add_argument("--std", type=_numbers, default=(0.229, 0.224, 0.225), metavar="R,G,B", help=imagenet)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Time a model in float and in int8, in every runtime, and print sizes, memory and SQNR too."
    parser = commands.add_parser("bench", help=text, description=text, epilog=_BENCH_EXAMPLES, formatter_class=raw)
    _add_model(parser)
    shape = "of noise inputs (default 1,3,224,224); with --data, its channels and side are those of the images"
    parser.add_argument("--shape", type=_shape, metavar="N,C,H,W", help=shape)
    parser.add_argument("--batch", type=_positive, nargs="+", default=[1], metavar="N", help="sizes (default 1)")
    threads = "numbers of threads (default: each runtime's own choice)"
    parser.add_argument("--threads", type=_positive, nargs="+", default=[None], metavar="N", help=threads)
    names = f"some of {','.join(RUNTIMES)} (default: all)"
    parser.add_argument("--runtimes", type=_runtimes, default="auto", metavar="A,B", help=names)
    parser.add_argument("--compiled", action="store_true", help="also the float model behind torch.compile")
    limit = "seconds that compiling may take (default %(default)s)"
    parser.add_argument("--compile-limit", type=_positive, default=120, metavar="S", help=limit)
    parser.add_argument("--rounds", type=_positive, default=9, metavar="N", help="turns (default %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out, which takes a process each")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    _add_images(parser, required=False, batch_size=8)
    parser.set_defaults(run=_run_bench)


def _add_ops(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "List every op that is quantized: its behaviour, integer form, ONNX operator and spellings."
    parser = commands.add_parser("ops", help="the op table", description=text)
    parser.set_defaults(run=_run_ops)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=_SPEC)
    parser.add_argument("--weights", metavar="FILE", help="a state dict for the model; nothing is ever downloaded")
    parser.add_argument(
        "--target",
        choices=TARGETS,
        default=X86.name,
        metavar="NAME",
        help=f"where it will run: {', '.join(TARGETS)} (default %(default)s)",
    )
    parser.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="GLOB",
        help="modules kept in float: 'fc', 'layer4.*'",
    )


def _run_demo(options: argparse.Namespace) -> None:
    from fxquant.demo import run

    run()


def _run_ops(options: argparse.Namespace) -> None:
    print(op_table())


def _run_diff(options: argparse.Namespace) -> None:
    if options.out is not None:
        _require_folder_of(options.out)
    model = build_model(options.spec, weights=options.weights)
    example, recipe = _example(model, options.shape), _recipe(options)
    prepared = prepare(model, example, qat=options.qat, recipe=recipe, target=options.target)
    compared = diff(model, prepared, width=options.width)
    counted = [str(coverage(prepared))] if options.coverage else []
    if options.out is None:
        print("\n\n".join([str(compared), *counted]))
        return
    with open(options.out, "w", encoding="utf-8") as file:
        file.write("\n\n".join([compared.text(width=options.width), *counted]) + "\n")


def _run_quantize(options: argparse.Namespace) -> None:
    _require_folder_of(options.out)
    model = build_model(options.spec, weights=options.weights)
    images = _images(options)
    example = torch.zeros(1, options.channels, options.crop, options.crop)
    prepared = prepare(model, example, recipe=_recipe(options), target=options.target)
    calibrate(prepared, images)
    integer = convert(prepared)
    save(integer, options.out)
    compared = diff(model, integer)
    if options.diff:
        print(f"{compared}\n")
    size, before = os.path.getsize(options.out), _size(model)
    print(f"calibrated on {len(images.paths)} images; {compared.summary()}")
    print(f"{options.out}: {size / 1e6:.2f} MB, from {before / 1e6:.2f} MB")
    if options.weights is None and options.spec.startswith(("torchvision:", "timm:")):
        print("note: these are random weights; give trained ones with --weights FILE", file=sys.stderr)


def _images(options: argparse.Namespace) -> ImageFolder:
    return ImageFolder(
        options.data,
        limit=options.images,
        resize=options.resize,
        crop=options.crop,
        channels=options.channels,
        mean=options.mean,
        std=options.std,
        batch_size=options.batch_size,
    )


def _run_bench(options: argparse.Namespace) -> None:
    if options.json is not None:
        _require_folder_of(options.json)
    model = build_model(options.spec, weights=options.weights)
    if options.data is not None and options.shape is not None:
        if len(options.shape) != 4 or options.shape[1] not in (1, 3) or options.shape[2] != options.shape[3]:
            raise InputError(f"--shape {options.shape}: with --data it is that of images, as 1,3,224,224.")
        options.channels, options.crop = options.shape[1], options.shape[3]
        options.resize = max(options.resize, options.crop)
    noise = torch.randn(_example(model, options.shape).shape, generator=torch.Generator().manual_seed(0))
    found = bench(
        model,
        noise if options.data is None else None,
        calibration=None if options.data is None else _images(options),
        recipe=_recipe(options),
        runtimes=options.runtimes,
        threads=options.threads,
        batches=options.batch,
        compiled=options.compiled,
        compile_limit=options.compile_limit,
        memory=not options.no_memory,
        noise=options.data is None,
        rounds=options.rounds,
    )
    if options.json is not None:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"spec": options.spec, **found.as_dict()}, file, indent=1)
    print(found)


def _require_folder_of(path: str) -> None:
    """Say at once, and not after minutes of calibration, that a file cannot be written."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise InputError(f"{path!r} cannot be written: it is a folder.")
    if not os.path.isdir(folder):
        raise InputError(f"{path!r} cannot be written: there is no folder {folder!r}.")


def _example(model: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    if shape is None:
        shape = (1, *getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224)))
    return torch.zeros(shape)


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe([(glob, None) for glob in options.keep_float])


def _size(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _runtimes(text: str) -> str | list[str]:
    return text if text == "auto" else text.split(",")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if len(values) not in (1, 3):
        raise argparse.ArgumentTypeError(f"{text} is neither one number nor three")
    return values * 3 if len(values) == 1 else values
