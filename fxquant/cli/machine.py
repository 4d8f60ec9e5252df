"""The commands that tell about fxquant and this machine: ``demo``, ``ops``, ``doctor``."""

from __future__ import annotations

import argparse

from fxquant.cli.arguments import Commands, add_json, print_json
from fxquant.export.doctor import doctor
from fxquant.reporting.op_table import op_rows, op_table

__all__ = ["add_commands"]


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this file."""
    text = "Train a small network on scikit-learn's digits, print its diff, and compare float, PTQ and QAT."
    parser = commands.add_parser("demo", help="a whole tour on a small network", description=text)
    add_json(parser)
    parser.set_defaults(run=_run_demo)
    text = "List every op that is quantized: its behaviour, integer form, ONNX operator and spellings."
    parser = commands.add_parser("ops", help="the op table", description=text)
    add_json(parser)
    parser.set_defaults(run=_run_ops)
    text = "Print what this processor, its compiler and its packages give an integer model."
    parser = commands.add_parser("doctor", help="what this machine has", description=text)
    add_json(parser)
    parser.set_defaults(run=_run_doctor)


def _run_demo(options: argparse.Namespace) -> None:
    from fxquant.demo import run

    found = run()
    if options.json:
        print_json(options, found)


def _run_ops(options: argparse.Namespace) -> None:
    if options.json:
        return print_json(options, op_rows())
    return print(op_table())


def _run_doctor(options: argparse.Namespace) -> None:
    found = doctor()
    if options.json:
        return print_json(options, found.as_dict())
    return print(found)
