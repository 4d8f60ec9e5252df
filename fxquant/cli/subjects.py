"""What the commands that look at a model have in common: the model, its images, and what is made of both."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from fxquant.cli.arguments import (
    Commands,
    add_images,
    add_json,
    add_model,
    bits_of,
    images_of,
    positive,
    recipe_of,
    shape_of,
    take_shape,
    where,
)
from fxquant.flow import calibrate, prepare
from fxquant.image_folder import ImageFolder
from fxquant.model_spec import build_model

__all__ = ["add_subject", "bits_list", "model_and_images", "prepared_of", "uncalibrated"]


def add_subject(
    commands: Commands[argparse.ArgumentParser], name: str, text: str, run: Any, *, data: bool = True
) -> argparse.ArgumentParser:
    """A command with everything that it takes to make a quantized model; ``data`` where that has to be given."""
    raw = argparse.RawDescriptionHelpFormatter
    epilog = f"examples:\n  fxquant {name} torchvision:resnet18 --weights r18.pth --data photos/\n"
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=raw)
    add_model(parser)
    parser.add_argument("--shape", type=shape_of, metavar="HxW", help="of the images: instead of --channels and --crop")
    add_images(parser, required=data, batch_size=16)
    batches = "how many are measured, after calibration on all images (default %(default)s)"
    parser.add_argument("--batches", type=positive, default=4, metavar="N", help=batches)
    add_json(parser)
    parser.set_defaults(run=run)
    return parser


def model_and_images(options: argparse.Namespace) -> tuple[nn.Module, ImageFolder]:
    """The float model and the images of a command."""
    if options.shape is not None:
        take_shape(options)
    return build_model(options.spec, weights=options.weights), images_of(options)


def prepared_of(options: argparse.Namespace, model: nn.Module, images: ImageFolder) -> Any:
    """The model prepared and calibrated as the options say."""
    return calibrate(uncalibrated(options, model), images)


def uncalibrated(options: argparse.Namespace, model: nn.Module) -> Any:
    """The model prepared as the options say."""
    example = torch.zeros(1, options.channels, options.crop, options.crop)
    return prepare(model, example, recipe=recipe_of(options), **where(options))


def bits_list(text: str) -> tuple[int, ...]:
    """``8,4``."""
    try:
        return tuple(bits_of(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of bits from 2 to 16: write some, as 8,4") from None
