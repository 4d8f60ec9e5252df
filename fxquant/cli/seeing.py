"""The commands that look at a quantized model: ``errors``, ``sensitivity``, ``evaluate``, ``info``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxquant.analysis.errors import errors_by_layer
from fxquant.analysis.evaluation import evaluate
from fxquant.analysis.file_info import info
from fxquant.analysis.qdq_file import QdqFile
from fxquant.analysis.sensitivity import sensitivity
from fxquant.checkpoint import load
from fxquant.cli.arguments import Commands, add_json, note_random_weights, positive, print_json, require_file
from fxquant.cli.subjects import add_subject, bits_list, model_and_images, prepared_of
from fxquant.flow import convert
from fxquant.image_folder import ImageFolder
from fxquant.reporting.tabled import Tabled
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.runtime import run_session

__all__ = ["add_commands"]


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this file."""
    text = "Print what each rounding costs against float, layer by layer: of a model, or of an exported ONNX file."
    parser = add_subject(commands, "errors", text, _run_errors)
    parser.add_argument("--onnx", metavar="FILE", help="measure this QDQ file, which was exported from the model")
    text = "Print what the output loses with one layer alone rounded. No labels are needed."
    parser = add_subject(commands, "sensitivity", text, _run_sensitivity)
    parser.add_argument("--bits", type=bits_list, default=(8, 4), metavar="A,B", help="what to try (default 8,4)")
    parser.add_argument("--seconds", type=positive, metavar="N", help="stop after about so long")
    text = "Print top-1 and top-5 where subfolders are classes, and the agreement with float."
    parser = add_subject(commands, "evaluate", text, _run_evaluate)
    parser.add_argument(
        "--quantized", metavar="FILE", help="a .pt of fxquant, or an .onnx file; else it is quantized now"
    )
    text = "Print what is in a file: grids, bits, sizes, opset, coverage."
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("file", metavar="FILE", help=".pt or .pth that fxquant wrote, or .onnx")
    add_json(parser)
    parser.set_defaults(run=_run_info)


def _run_errors(options: argparse.Namespace) -> None:
    if options.onnx is not None:
        require_file("--onnx", options.onnx, (".onnx",))
        QdqFile(options.onnx)  # what cannot be read is told before calibration
    model, images = model_and_images(options)
    prepared = prepared_of(options, model, images)
    subject, reference = (prepared, None) if options.onnx is None else (options.onnx, prepared)
    _show(options, errors_by_layer(subject, images, reference=reference, batches=options.batches))


def _run_sensitivity(options: argparse.Namespace) -> None:
    model, images = model_and_images(options)
    prepared = prepared_of(options, model, images)
    _show(options, sensitivity(prepared, images, bits=options.bits, seconds=options.seconds, batches=options.batches))


def _run_evaluate(options: argparse.Namespace) -> None:
    if options.quantized is not None:
        require_file("--quantized", options.quantized, (".pt", ".pth", ".onnx"))
    model, images = model_and_images(options)
    labels, classes = _labels(images, Path(options.data))
    if options.quantized is None:
        run: Any = convert(prepared_of(options, model, images))
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


def _labels(images: ImageFolder, folder: Path) -> tuple[list[int] | None, int | None]:
    """The class of each image, where all lie in subfolders: the number of that in the order of names; and how many."""
    names = [path.relative_to(folder).parts for path in images.paths]
    if any(len(parts) < 2 for parts in names):
        return None, None
    classes = sorted({path.name for path in folder.iterdir() if path.is_dir()})
    return [classes.index(parts[0]) for parts in names], len(classes)
