"""``main``: the parser of all commands, and what becomes of errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fxquant import __version__
from fxquant.cli import machine, models, report, seeing
from fxquant.cli.arguments import only_json
from fxquant.errors import FxquantError

__all__ = ["main"]

_EXAMPLES = """examples:
  fxquant demo                                            trains a small network and quantizes it, in seconds
  fxquant diff torchvision:resnet18                       what prepare makes of a model, node by node
  fxquant quantize torchvision:resnet18 --weights r18.pth --data photos/ --out int8.pt
  fxquant report torchvision:resnet18 --weights r18.pth --data photos/ --out report.html
  fxquant report int8.onnx                                the grids of a file; with --data and --model what it loses
  fxquant errors torchvision:resnet18 --weights r18.pth --data photos/     where it loses, layer by layer
  fxquant sensitivity torchvision:resnet18 --weights r18.pth --data photos/ --bits 8,4
  fxquant evaluate torchvision:resnet18 --weights r18.pth --data photos/   top-1, top-5, agreement with float
  fxquant info int8.onnx                                  what is in a file: grids, bits, sizes, opset, coverage
  fxquant bench torchvision:resnet18 --batch 1 8          how fast, large and accurate int8 is, in each runtime
  fxquant ops                                             which ops are quantized, and how
  fxquant doctor                                          what this machine has: kernels, runtimes, compiler

exit codes: 0 it worked; 1 fxquant says what is wrong; 2 the command was not understood; 130 interrupted
With --json standard output holds one JSON value and nothing else, and with exit code 1 nothing.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: the words of the command line; those of the process where None.
    """
    options = _parser().parse_args(arguments)
    try:
        with only_json(options):
            options.run(options)
    except FxquantError as error:
        print(f"fxquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fxquant: interrupted; no file was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong, and how to see the options, without printing them all before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"usage: {self.prog} --help tells it\n{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Make PyTorch models compute in integers."
    parser = _Parser(prog="fxquant", description=text, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"fxquant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for part in (models, report, seeing, machine):
        part.add_commands(commands)
    return parser
