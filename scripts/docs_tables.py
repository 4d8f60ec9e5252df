"""Write the pages of ``docs/reference`` that the code knows: ops, targets, rules, and who raises what.

Run: python scripts/docs_tables.py           (--check: change nothing, and fail where a page is out of date)
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import fxquant.errors
from fxquant.numerics.scheme import QUANTIZERS
from fxquant.quantizers import RULES
from fxquant.reporting.op_table import op_rows
from fxquant.runtimes import RUNTIMES
from fxquant.targets import PROCESSORS, TARGETS, Target

__all__ = ["main", "pages"]

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
_MADE = "<!-- Made by scripts/docs_tables.py from the code: change that, and run it again. -->\n"
_YES, _NO = "yes", "–"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    stale = 0
    for name, text in pages().items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{path.name} is out of date" if check else f"wrote {path.name}", file=sys.stderr)
            if not check:
                path.write_text(text, encoding="utf-8")
    return int(check and stale > 0)


def pages() -> dict[str, str]:
    """Each page's text by its file's name."""
    return {"ops.md": _ops(), "targets.md": _targets(), "rules.md": _rules(), "raises.md": _raises()}


def _ops() -> str:
    rows = op_rows()
    table = _table(
        ["op", "behaviour", "in integers", "ONNX", "spelled as"],
        (
            [f"`{row['op']}`", row["behaviour"], row["in integers"], row["ONNX"], _codes(row["spelled"].split())]
            for row in rows
        ),
    )
    return f"""{_MADE}
# Ops

The {len(rows)} ops that are quantized, however a model spells them: as a module, a function or a method of tensors.
`fxquant ops` prints the same table. An op of your own is one entry: see *Add an op* in CONTRIBUTING.md.

*Behaviour* is all that the passes know of an op: **weighted** multiplies by parameters; **rescaling** makes values with
a range of their own; **passing** picks or moves values and keeps their grid (*joins*: several tensors on one grid);
**clamping** limits them; **bounded** has a known range; **channelaffine** is a batch norm. *In integers* is the
arithmetic that `convert` gives it: a table over the integers, a linear map, a sum, a product, or an evaluation between
integers in float (`evaluate`).

{table}"""


def _targets() -> str:
    facts = _table(
        ["", *(f"`{target.name}`" for target in TARGETS.values())],
        [[title, *(fact(target) for target in TARGETS.values())] for title, fact in _FACTS],
    )
    rows = (
        [f"`{name}`", *(_op_on(target, name) for target in TARGETS.values())]
        for name in sorted(row["op"] for row in op_rows())
    )
    ops = _table(["op", *(f"`{target.name}`" for target in TARGETS.values())], rows)
    sources = "".join(f"- `{t.name}`: <{t.source}>\n" for t in TARGETS.values() if t.source)
    runtimes = _table(
        ["runtime", "title", "target", "run by `compile`", "install"],
        (
            [f"`{own.name}`", own.title, f"`{own.target.name}`", _YES if own.runs else _NO,
             f"`fxquant[{own.extra}]`" if own.extra else _NO]
            for own in RUNTIMES.values()
        ),
    )  # fmt: skip
    processors = _table(
        ["processor", "", "adds unsigned × signed pairs in 16 bits", "adds signed × signed pairs in 16 bits", "source"],
        ([f"`{p.name}`", p.title, _said(p.adds_pairs), _said(p.narrow_weights), p.source] for p in PROCESSORS.values()),
    )
    return f"""{_MADE}
# Targets

What `prepare(model, x, target=...)` may name: what each runtime computes in integers, on which grids, and where it wants
tensors rounded. [Concepts](../concepts/targets.md) explains the words. A target of your own is `dataclasses.replace` of
one of these.

{facts}
Where the rules are written down:

{sources}
## Ops in integers

*float*: the op stays in float for this target, and the diff gives the reason. *keeps*: its result stays on the grid of
its first operand. *fixed*: its result lies on a grid that the runtime prescribes. *fused*: it reads the accumulator of
the weighted op before it, unrounded.

{ops}
## Runtimes

{runtimes}
## Processors

What `prepare(..., processor=...)` may name; `any` is the default. Kernels that add two products of bytes in 16 bits can
saturate there: weights are then chosen so that they do not, or without their lowest integer.

{processors}"""


def _bits(bits: Iterable[int]) -> str:
    found = sorted(bits)
    whole = found == list(range(found[0], found[-1] + 1)) and len(found) > 2
    return f"{found[0]}–{found[-1]}" if whole else ", ".join(map(str, found))


def _said(flag: bool) -> str:
    return _YES if flag else _NO


def _signs(target: Target) -> str:
    return " or ".join("signed" if sign else "unsigned" for sign in target.activation_signs)


def _per_channel(target: Target) -> str:
    return "all" if target.per_channel is None else _codes(sorted(target.per_channel))


_FACTS = (
    ("runtime", lambda t: t.title),
    ("tensors by default", lambda t: str(t.activation)),
    ("weights by default", lambda t: str(t.weight)),
    ("bits of tensors", lambda t: _bits(t.activation_bits)),
    ("bits of weights", lambda t: _bits(t.weight_bits)),
    ("tensors may be", _signs),
    ("zero points", lambda t: _said(t.affine)),
    ("lowest integer in weights", lambda t: _said(t.wide_weights)),
    ("one weight scale per channel", _per_channel),
    ("rounding of accumulators", lambda t: f"`{t.rounding}`"),
    ("results rounded where they leave the model", lambda t: _codes(sorted(t.rounds_outputs)) or _NO),
    ("biases in files", lambda t: "32-bit integers" if t.integer_biases else "floats"),
    ("weights of up to 4 bits in 4 in files", lambda t: _said(t.packs_weights)),
    ('`form="qoperator"`', lambda t: _said(t.integer_operators)),
    ("files held against its rules", lambda t: _said(bool(t.file_rules))),
)


def _op_on(target: Target, name: str) -> str:
    if target.lacks(name):
        return "float"
    if name in target.keeps_scale:
        return "keeps"
    if name in target.fixed_grids:
        return "fixed"
    return "fused" if name in target.reads_accumulators else _YES


def _rules() -> str:
    rows = []
    for name, rule in sorted(RULES.items()):
        made = rule.tensor or rule.weight
        assert made is not None
        head = (sys.modules[made.__module__].__doc__ or "").strip().splitlines()[0]
        kinds = [kind for kind in ("weight", "tensor") if getattr(rule, kind) is not None]
        says = "the range is what the estimator found" if name == "observed" else head
        rows.append(
            [
                f"`{name}`",
                says,
                " and ".join(f"{k}s" for k in kinds),
                f"`{QUANTIZERS[name]}`",
                str(rule.simulates or "yes"),
            ]
        )
    table = _table(["`quantizer=`", "what it is", "for", "starts from", "integers"], rows)
    return f"""{_MADE}
# Quantizer rules

What `Scheme(quantizer=...)` may name. A rule makes scale and rounding; all but `observed` are made for
quantization-aware training.
*Starts from* is the estimator that sets the range when `calibrate` ends, unless the scheme names another.

{table}"""


_MODULES = ("fxquant", *(f"fxquant.{name}" for name in ("algorithms", "export", "quantizers", "runtimes", "targets")))


def _raises() -> str:
    """Read off the ``Raises:`` sections of public docstrings."""
    found: dict[str, dict[str, str]] = {name: {} for name in fxquant.errors.__all__}
    for module in map(importlib.import_module, _MODULES):
        for name in module.__all__:
            for errors, when in _raised(inspect.getdoc(getattr(module, name)) or ""):
                for error in errors:
                    found[error][f"{module.__name__}.{name}"] = when
    sections = "".join(
        f"\n## {error}\n\n{_table(['raised by', 'when'], ([f'`{by}`', when] for by, when in said.items()))}"
        for error, said in found.items()
        if said
    )
    return f"""{_MADE}
# Who raises what

As the docstrings of public functions and classes say it. Results have more: `Coverage.require` raises `FxquantError`.
Calling a model with an input that the captured graph does not hold for raises `SpecializationError`. Cures:
[Errors](../errors.md).
{sections}"""


def _raised(doc: str) -> Iterator[tuple[list[str], str]]:
    """Which errors a docstring names, and when they are raised."""
    _, mark, section = doc.partition("\nRaises:\n")
    body = re.split(r"\n(?=\S)", section)[0] if mark else ""
    for item in re.findall(r"^ {4}(\S.*(?:\n {5,}.*)*)", body, re.M):
        names, _, when = " ".join(item.split()).partition(": ")
        errors = [name for name in names.split(", ") if name in fxquant.errors.__all__]
        if errors:
            yield errors, when


def _codes(words: Iterable[str]) -> str:
    return " ".join(f"`{word}`" for word in words)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
