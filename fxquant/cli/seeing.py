"""The commands that look at a quantized model: ``report``, ``errors``, ``sensitivity``, ``evaluate``, ``info``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.analysis.errors import errors_by_layer
from fxquant.analysis.evaluation import evaluate
from fxquant.analysis.file_info import info
from fxquant.analysis.qdq_file import QdqFile
from fxquant.analysis.sensitivity import sensitivity
from fxquant.checkpoint import load
from fxquant.cli.arguments import (
    Commands,
    add_images,
    add_json,
    add_model,
    bits_of,
    images_of,
    note_random_weights,
    positive,
    print_json,
    recipe_of,
    require_file,
    require_folder_of,
    shape_of,
    take_shape,
    where,
)
from fxquant.errors import InputError
from fxquant.flow import calibrate, convert, prepare
from fxquant.image_folder import ImageFolder
from fxquant.model_spec import build_model
from fxquant.page.report import FORMATS, Report, report
from fxquant.reporting.tabled import Tabled
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.runtime import run_session
from fxquant.targets import PROCESSORS, TARGETS

__all__ = ["add_commands"]

_FORMATS = ("html", "markdown", "json")
_REPORT_EXAMPLES = """examples:
  fxquant report torchvision:resnet18 --weights r18.pth --data photos/ --out report.html
  fxquant report nets/tiny.py:TinyNet --data digits/ --shape 1x1x28x28 --format markdown
  fxquant report nets.py:Net --data photos/ --out two.html --against weight-bits=4,keep-float=fc
"""
_AGAINST = ("weight-bits", "activation-bits", "keep-float", "target", "processor")


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this file."""
    _add_report(commands)
    text = "Print what each rounding costs against float, layer by layer: of a model, or of an exported ONNX file."
    parser = _add(commands, "errors", text, _run_errors)
    parser.add_argument("--onnx", metavar="FILE", help="measure this QDQ file, which was exported from the model")
    text = "Print what the output loses with one layer alone rounded. No labels are needed."
    parser = _add(commands, "sensitivity", text, _run_sensitivity)
    parser.add_argument("--bits", type=_bits, default=(8, 4), metavar="A,B", help="what to try (default 8,4)")
    parser.add_argument("--seconds", type=positive, metavar="N", help="stop after about so long")
    text = "Print top-1 and top-5 where subfolders are classes, and the agreement with float."
    parser = _add(commands, "evaluate", text, _run_evaluate)
    parser.add_argument(
        "--quantized", metavar="FILE", help="a .pt of fxquant, or an .onnx file; else it is quantized now"
    )
    text = "Print what is in a file: grids, bits, sizes, opset, coverage."
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("file", metavar="FILE", help=".pt or .pth that fxquant wrote, or .onnx")
    add_json(parser)
    parser.set_defaults(run=_run_info)


def _add(commands: Commands[argparse.ArgumentParser], name: str, text: str, run: Any) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    epilog = f"examples:\n  fxquant {name} torchvision:resnet18 --weights r18.pth --data photos/\n"
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=raw)
    add_model(parser)
    parser.add_argument("--shape", type=shape_of, metavar="HxW", help="of the images: instead of --channels and --crop")
    add_images(parser, required=True, batch_size=16)
    batches = "how many are measured, after calibration on all images (default %(default)s)"
    parser.add_argument("--batches", type=positive, default=4, metavar="N", help=batches)
    add_json(parser)
    parser.set_defaults(run=run)
    return parser


def _add_report(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "Write one page that shows where a quantized model loses, what each node became, and why."
    parser = _add(commands, "report", text, _run_report)
    parser.epilog = _REPORT_EXAMPLES
    parser.add_argument(
        "--out", metavar="FILE", help=".html, .md or .json (default report.html; the others are printed)"
    )
    parser.add_argument("--format", choices=_FORMATS, help="where --out does not say it")
    parser.add_argument("--bits", type=_bits, default=(8, 4), metavar="A,B", help="of the sensitivity (default 8,4)")
    parser.add_argument("--no-sensitivity", action="store_true", help="leave it out")
    parser.add_argument("--seconds", type=positive, default=15, metavar="N", help="for it (default %(default)s)")
    against = f"a second model beside the first, whose {', '.join(_AGAINST)} are these instead"
    parser.add_argument("--against", type=_against, metavar="NAME=VALUE,…", help=against)


def _run_report(options: argparse.Namespace) -> None:
    form = _form(options)
    out = options.out or ("report.html" if form == "html" else None)
    if out is not None:
        require_folder_of(out)
    model, images = _model_and_images(options)
    if options.against:  # what cannot be prepared so is told before the first one is measured
        changed = argparse.Namespace(**{**vars(options), **options.against})
        _uncalibrated(changed, model)
    found: Any = _report(options, model, images)
    if options.against:
        found = found.compare(_report(changed, model, images))
    if out is not None:
        found.save(out)
    if options.json:
        print_json(options, found)
    elif out is not None:
        print(out)
    else:
        print(found.to_json(indent=2) if form == "json" else found.markdown())
    note_random_weights(options)


def _form(options: argparse.Namespace) -> str:
    ending = None if options.out is None else FORMATS.get(os.path.splitext(options.out)[1].lower())
    if options.out is not None and ending is None:
        raise InputError(f"--out {options.out}: the ending names no form. Write one of {', '.join(FORMATS)}.")
    given = options.format or ("json" if options.json and options.out is None else None)
    if ending is not None and given not in (None, ending):
        raise InputError(
            f"--out {options.out} is {ending}, and {given} was asked for. Leave --format out, or change --out."
        )
    if options.json and options.out is None and given != "json":
        raise InputError(f"--json prints JSON, and --format {given} was asked for. Leave one out, or give --out FILE.")
    return ending or given or "html"


def _report(options: argparse.Namespace, model: nn.Module, images: ImageFolder) -> Report:
    prepared = _prepared(options, model, images)
    bits = None if options.no_sensitivity else options.bits
    title = f"{options.spec}, {_told(options)}" if options.against else options.spec
    return report(model, prepared, images, title=title, bits=bits, seconds=options.seconds, batches=options.batches)


def _told(options: argparse.Namespace) -> str:
    """What distinguishes a model from another one beside it."""
    given = {name: getattr(options, name.replace("-", "_")) for name in _AGAINST}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value) or "as the target has it"


def _run_errors(options: argparse.Namespace) -> None:
    if options.onnx is not None:
        require_file("--onnx", options.onnx, (".onnx",))
        QdqFile(options.onnx)  # what cannot be read is told before calibration
    model, images = _model_and_images(options)
    prepared = _prepared(options, model, images)
    subject, reference = (prepared, None) if options.onnx is None else (options.onnx, prepared)
    _show(options, errors_by_layer(subject, images, reference=reference, batches=options.batches))


def _run_sensitivity(options: argparse.Namespace) -> None:
    model, images = _model_and_images(options)
    prepared = _prepared(options, model, images)
    _show(options, sensitivity(prepared, images, bits=options.bits, seconds=options.seconds, batches=options.batches))


def _run_evaluate(options: argparse.Namespace) -> None:
    if options.quantized is not None:
        require_file("--quantized", options.quantized, (".pt", ".pth", ".onnx"))
    model, images = _model_and_images(options)
    labels, classes = _labels(images, Path(options.data))
    if options.quantized is None:
        run: Any = convert(_prepared(options, model, images))
    elif options.quantized.lower().endswith(".onnx"):
        session = onnxruntime_session(options.quantized)
        run = lambda batch: run_session(session, [batch])[0]  # noqa: E731
    else:
        run = load(model, options.quantized)
    _show(options, evaluate(model, run, images, labels, classes=classes))


def _run_info(options: argparse.Namespace) -> None:
    found = info(options.file)
    if options.json:
        return print_json(options, found)
    return print(found)


def _show(options: argparse.Namespace, found: Tabled) -> None:
    if options.json:
        print_json(options, found)
    else:
        print(found)
    note_random_weights(options)


def _model_and_images(options: argparse.Namespace) -> tuple[nn.Module, ImageFolder]:
    if options.shape is not None:
        take_shape(options)
    return build_model(options.spec, weights=options.weights), images_of(options)


def _prepared(options: argparse.Namespace, model: nn.Module, images: ImageFolder) -> Any:
    return calibrate(_uncalibrated(options, model), images)


def _uncalibrated(options: argparse.Namespace, model: nn.Module) -> Any:
    example = torch.zeros(1, options.channels, options.crop, options.crop)
    return prepare(model, example, recipe=recipe_of(options), **where(options))


def _labels(images: ImageFolder, folder: Path) -> tuple[list[int] | None, int | None]:
    """The class of each image, where all lie in subfolders: the number of that in the order of names; and how many."""
    names = [path.relative_to(folder).parts for path in images.paths]
    if any(len(parts) < 2 for parts in names):
        return None, None
    classes = sorted({path.name for path in folder.iterdir() if path.is_dir()})
    return [classes.index(parts[0]) for parts in names], len(classes)


def _bits(text: str) -> tuple[int, ...]:
    try:
        return tuple(bits_of(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of bits from 2 to 16: write some, as 8,4") from None


def _against(text: str) -> dict[str, Any]:
    """``weight-bits=4,keep-float=fc`` as options; ``keep-float`` may come repeatedly."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, mark, value = part.partition("=")
        if name not in _AGAINST or not mark or not value:
            raise argparse.ArgumentTypeError(f"{part!r}: write NAME=VALUE, with a name of {', '.join(_AGAINST)}")
        known = list(TARGETS) if name == "target" else list(PROCESSORS) if name == "processor" else [value]
        if value not in known:
            raise argparse.ArgumentTypeError(f"{part!r}: write one of {', '.join(known)} behind {name}=")
        key = name.replace("-", "_")
        if name == "keep-float":
            found.setdefault(key, []).append(value)
        else:
            found[key] = bits_of(value) if name.endswith("bits") else value
    return found
