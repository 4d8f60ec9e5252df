"""``fxquant report``: of a model, of a file, and of two of them beside each other."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxquant.analysis.qdq_file import QdqFile
from fxquant.cli.arguments import (
    Commands,
    bits_of,
    images_of,
    note_random_weights,
    positive,
    print_json,
    require_file,
    require_folder_of,
    take_shape,
)
from fxquant.cli.subjects import add_subject, bits_list, prepared_of, uncalibrated
from fxquant.errors import InputError
from fxquant.image_folder import ImageFolder
from fxquant.model_spec import build_model
from fxquant.page.report import report
from fxquant.page.saving import FORMATS
from fxquant.targets import PROCESSORS, TARGETS

__all__ = ["add_commands"]

_FORMATS = ("html", "markdown", "json")
_FILES = (".onnx", ".pt", ".pth")
_EXAMPLES = """examples:
  fxquant report torchvision:resnet18 --weights r18.pth --data photos/ --out report.html
  fxquant report nets/tiny.py:TinyNet --data digits/ --shape 1x1x28x28 --format markdown
  fxquant report nets.py:Net --data photos/ --out two.html --against weight-bits=4,keep-float=fc

of a file, .onnx or a .pt that fxquant wrote:
  fxquant report int8.onnx                                its grids, bits and sizes; nothing is run
  fxquant report int8.onnx --data photos/                 and what its roundings do to data
  fxquant report int8.onnx --model torchvision:resnet18 --weights r18.pth --data photos/   and what is lost against float
  fxquant report int8.onnx --against other.onnx           two files on a page
  fxquant report torchvision:resnet18 --weights r18.pth --data photos/ --against int8.onnx   a file beside a model
"""
_AGAINST = ("weight-bits", "activation-bits", "keep-float", "target", "processor")


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command of this file."""
    text = "Write one page that shows where a quantized model or file loses, what each node became, and why."
    parser = add_subject(commands, "report", text, _run_report, data=False)
    parser.epilog = _EXAMPLES
    floats = "of a FILE: the float model behind it, as SPEC; or the float .onnx file that another quantizer made it of"
    parser.add_argument("--model", metavar="SPEC", help=floats)
    parser.add_argument(
        "--out", metavar="FILE", help=".html, .md or .json (default report.html; the others are printed)"
    )
    parser.add_argument("--format", choices=_FORMATS, help="where --out does not say it")
    parser.add_argument(
        "--bits", type=bits_list, default=(8, 4), metavar="A,B", help="of the sensitivity (default 8,4)"
    )
    parser.add_argument("--no-sensitivity", action="store_true", help="leave it out")
    parser.add_argument("--seconds", type=positive, default=15, metavar="N", help="for it (default %(default)s)")
    against = f"beside the first: a file; or the same model with other {', '.join(_AGAINST)}"
    parser.add_argument("--against", type=_against, metavar="FILE|NAME=VALUE,…", help=against)


@dataclass(frozen=True)
class _Floats:
    """The float model, or the path of a float file; the images; the prepared model, where it was wanted."""

    model: Any
    images: ImageFolder | None
    prepared: Any = None


def _run_report(options: argparse.Namespace) -> None:
    form = _form(options)
    out = options.out or ("report.html" if form == "html" else None)
    if out is not None:
        require_folder_of(out)
    _require_sense(options)
    for path in (options.spec, options.against):  # what cannot be read is told before anything is calibrated
        if _is_file(path) and path.lower().endswith(".onnx"):
            QdqFile(path)
    floats = _floats(options)
    changed: Any = None
    if isinstance(options.against, dict):  # what cannot be prepared so is told before the first one is measured
        changed = argparse.Namespace(**{**vars(options), **options.against})
        uncalibrated(changed, floats.model)
    found: Any = _of_file(options.spec, options, floats) if _is_file(options.spec) else _of_model(options, floats)
    if changed is not None:
        found = found.compare(_of_model(changed, floats))
    elif options.against is not None:
        found = found.compare(_of_file(options.against, options, floats))
    if out is not None:
        found.save(out)
    if options.json:
        print_json(options, found)
    elif out is not None:
        print(out)
    else:
        print(found.to_json(indent=2) if form == "json" else found.markdown())
    if isinstance(floats.model, nn.Module):
        note_random_weights(argparse.Namespace(**{**vars(options), "spec": options.model or options.spec}))


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


def _is_file(subject: Any) -> bool:
    """Whether a subject names a file and not a model."""
    return isinstance(subject, str) and subject.lower().endswith(_FILES)


def _require_sense(options: argparse.Namespace) -> None:
    """Say what is missing, and what does not belong together."""
    if not _is_file(options.spec):
        if options.data is None:
            build_model(options.spec, weights=options.weights)  # what names no model at all is told first
            raise InputError("report of a model needs images: --data FOLDER. Of a file alone none are needed.")
        if options.model is not None:
            raise InputError(f"--model names the float model behind a file, and {options.spec} is a model itself.")
    else:
        require_file("report", options.spec, _FILES)
        if isinstance(options.against, dict):
            raise InputError(
                f"--against {', '.join(options.against)}: {options.spec} is a file, and is as it is.\n"
                "  what to do: give a second file, or the model in place of the first: fxquant report MODEL --against FILE."
            )
        if options.model is not None and options.data is None:
            raise InputError("--model is measured against, and needs images: --data FOLDER.")
    if _is_file(options.against):
        require_file("--against", options.against, _FILES)


def _floats(options: argparse.Namespace) -> _Floats:
    if options.shape is not None and options.data is not None:
        take_shape(options)
    spec = options.model if _is_file(options.spec) else options.spec
    images = None if options.data is None else images_of(options)
    if spec is None:
        return _Floats(None, images)
    if spec.lower().endswith(".onnx"):
        require_file("--model", spec, (".onnx",))
        return _Floats(spec, images)
    model = build_model(spec, weights=options.weights)
    files = [own for own in (options.spec, options.against) if _is_file(own) and own.lower().endswith(".onnx")]
    return _Floats(model, images, prepared_of(options, model, _some(images)) if files else None)


def _some(images: ImageFolder | None) -> ImageFolder:
    assert images is not None, "_require_sense has seen to them"
    return images


def _of_model(options: argparse.Namespace, floats: _Floats) -> Any:
    prepared = floats.prepared if floats.prepared is not None and not isinstance(options.against, dict) else None
    prepared = prepared if prepared is not None else prepared_of(options, floats.model, _some(floats.images))
    bits = None if options.no_sensitivity else options.bits
    title = f"{options.spec}, {_told(options)}" if options.against else options.spec
    limits = {"bits": bits, "seconds": options.seconds, "batches": options.batches}
    return report(floats.model, prepared, floats.images, title=title, **limits)


def _of_file(path: str, options: argparse.Namespace, floats: _Floats) -> Any:
    is_onnx = path.lower().endswith(".onnx")
    reference = floats.prepared if is_onnx and floats.prepared is not None else floats.model
    data = floats.images if is_onnx or reference is not None else None
    if not is_onnx and isinstance(reference, str):
        raise InputError(f"{path}: a file of fxquant is measured with its model: --model SPEC, not {reference}.")
    return report(path, reference, data, batches=options.batches)


def _told(options: argparse.Namespace) -> str:
    """What distinguishes a model from another one beside it."""
    given = {name: getattr(options, name.replace("-", "_")) for name in _AGAINST}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value) or "as the target has it"


def _against(text: str) -> dict[str, Any] | str:
    """``weight-bits=4,keep-float=fc`` as options; ``keep-float`` may come repeatedly. Or a file."""
    if _is_file(text) and "=" not in text:
        return text
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, mark, value = part.partition("=")
        if name not in _AGAINST or not mark or not value:
            words = f"write a file ({', '.join(_FILES)}), or NAME=VALUE with a name of {', '.join(_AGAINST)}"
            raise argparse.ArgumentTypeError(f"{part!r}: {words}")
        known = list(TARGETS) if name == "target" else list(PROCESSORS) if name == "processor" else [value]
        if value not in known:
            raise argparse.ArgumentTypeError(f"{part!r}: write one of {', '.join(known)} behind {name}=")
        key = name.replace("-", "_")
        if name == "keep-float":
            found.setdefault(key, []).append(value)
        else:
            found[key] = bits_of(value) if name.endswith("bits") else value
    return found
