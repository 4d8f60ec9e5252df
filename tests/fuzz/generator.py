"""Random networks: small programs, drawn by Hypothesis, that print as the Python source of an ``nn.Module``.

A ``Network`` is plain data: a seed, which inputs it has, and steps. A step is the name of an op of the vocabulary and eight
small integers, which choose its operands and attributes; 0 is the simplest choice everywhere, and a step that does not fit
where it stands adds nothing. So any part of a network can be left out or set to 0, and what remains is a network: failing
ones shrink to a few lines. While a network is written each line runs on real tensors, which tells the next step its shapes.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CHOICES = 8
"""Integers that a step has; further choices are 0."""
LARGEST, MOST = 1e6, 20000
"""A step whose result is larger, in magnitude or in elements, is left out."""

HEADER = """\
import math
import torch
import torch.nn.functional as F
from torch import nn
"""


@dataclass(frozen=True)
class Step:
    """One op of the vocabulary and its choices."""

    op: str
    choices: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Step({self.op!r}, {self.choices!r})"


@dataclass(frozen=True)
class Network:
    """One random network.

    Attributes:
        seed: of its weights and data.
        inputs: choices of the inputs' kinds, sizes and scales.
        steps: what it computes, in order.
        outputs: choices of what it returns, and in which container.
    """

    seed: int
    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def smaller(self) -> Any:
        """Networks with one thing less, the largest cuts first."""
        n = len(self.steps)
        size = n // 2
        while size:
            for at in range(n - size, -1, -size):
                yield replace(self, steps=self.steps[:at] + self.steps[at + size :])
            size //= 2
        yield from (replace(self, inputs=c) for c in _lower(self.inputs))
        yield from (replace(self, outputs=c) for c in _lower(self.outputs))
        for i, step in enumerate(self.steps):
            for c in _lower(step.choices):
                yield replace(self, steps=(*self.steps[:i], Step(step.op, c), *self.steps[i + 1 :]))


def _lower(choices: tuple[int, ...]) -> Any:
    if choices:
        yield choices[:-1]
    for i, c in enumerate(choices):
        if c:
            yield (*choices[:i], 0, *choices[i + 1 :])


@dataclass(frozen=True)
class Word:
    """An op of the vocabulary: what writes its lines, and what kinds of trouble it stands for."""

    write: Callable[[Builder], None]
    tags: frozenset[str]
    weight: int


VOCABULARY: dict[str, Word] = {}


def word(*tags: str, weight: int = 1) -> Callable[[Callable[[Builder], None]], Callable[[Builder], None]]:
    """Enter a function in the vocabulary under its name."""

    def enter(write: Callable[[Builder], None]) -> Callable[[Builder], None]:
        VOCABULARY[write.__name__] = Word(write, frozenset(tags), weight)
        return write

    return enter


class DoesNotFitError(Exception):
    """A step has no operand here, or its result cannot be used."""


class Model(nn.Module):
    """What the lines of ``__init__`` are run on while a network is written."""


@dataclass
class Builder:
    """Writes a network's source step by step, running each line as it is written."""

    model: Model = field(default_factory=Model)
    values: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    helpers: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    count: int = 0

    def number(self) -> int:
        return self.numbers.pop(0) if self.numbers else 0

    def choose(self, options: Sequence[Any]) -> Any:
        """One of ``options``; the first is the simplest."""
        if not options:
            raise DoesNotFitError
        return options[self.number() % len(options)]

    def pick(self, fits: Callable[[Tensor], bool] = lambda x: True, *, dtype: str = "float", among: int = 4) -> str:
        """The name of a tensor, the latest ones first."""
        kinds = {
            "float": lambda x: x.is_floating_point(),
            "bool": lambda x: x.dtype == torch.bool,
            "int": lambda x: x.dtype == torch.int64,
            "any": lambda x: True,
        }
        names = [
            n for n, x in self.values.items() if isinstance(x, Tensor) and x.numel() and kinds[dtype](x) and fits(x)
        ]
        name = self.choose(names[::-1][:among])
        self.unread.discard(name)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def layer(self, expression: str, stem: str = "m") -> str:
        """An attribute of the model, made in ``__init__``; returns how ``forward`` spells it."""
        name = f"self.{self.name(stem)}"
        self.make(f"{name} = {expression}")
        return name

    def make(self, line: str) -> None:
        """A line of ``__init__``."""
        self.run(line)
        self.init.append(line)

    def helper(self, source: str) -> None:
        """A class or function that stands above the model."""
        if source not in self.helpers:
            self.helpers.append(source)

    def line(self, text: str) -> None:
        """A line of ``forward``; the tensors that it names can be operands from now on."""
        for name, value in self.run(text).items():
            if isinstance(value, Tensor) and name not in ("i", "r"):
                self.values[name] = value
        self.body.append(text)

    def out(self, expression: str, stem: str = "y") -> str:
        """A line of ``forward`` that gives a new tensor; returns its name."""
        name = self.name(stem)
        self.line(f"{name} = {expression}")
        self.unread.add(name)
        return name

    def run(self, text: str) -> dict[str, Any]:
        """What ``text`` leaves behind when it is run here."""
        scope = {**_BASE, "self": self.model, **self.values}
        for source in self.helpers:
            exec(source, scope)
        with torch.no_grad():
            exec(text, scope)
        return scope


_BASE: dict[str, Any] = {}
exec(HEADER, _BASE)


def _usable(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return True
    if not 0 < value.numel() <= MOST:
        return False
    return not value.is_floating_point() or bool(torch.isfinite(value).all() and value.abs().max() <= LARGEST)


def add_step(builder: Builder, step: Step) -> Builder:
    """The builder after ``step``, or the same one where it does not fit."""
    trial = copy.copy(builder)
    trial.model = copy.deepcopy(builder.model)
    for name in ("init", "body", "helpers", "unread", "layers"):
        setattr(trial, name, copy.copy(getattr(builder, name)))
    trial.values = copy.deepcopy(builder.values)  # keeps views views of one another
    trial.numbers = list(step.choices)
    try:
        VOCABULARY[step.op].write(trial)
    except (DoesNotFitError, RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return builder
    return trial if all(map(_usable, trial.values.values())) else builder


INPUT_KINDS = ("image", "sequence", "signal", "vector", "tokens")
INPUT_SCALES = ("", " * 1e-3", " * 1e3", " * 30 + 5", ".relu()")


def input_lines(choices: Sequence[int]) -> dict[str, str]:
    """Expressions of the model's inputs by name; ``n`` is the batch and ``s`` what sizes have more."""
    own = [*choices, *[0] * CHOICES]
    kind, size, channels = INPUT_KINDS[own[0] % 5], (6, 7, 9, 12)[own[1] % 4], (4, 3, 8, 1)[own[2] % 4]
    scale = INPUT_SCALES[own[3] % 5]
    shapes = {
        "image": f"n, {channels}, {size} + s, {size + own[4] % 2} + s",
        "sequence": f"n, {size} + s, {2 * channels}",
        "signal": f"n, {channels}, {size} + s",
        "vector": f"n, {4 * channels}",
        "tokens": f"n, {size} + s",
    }
    if kind == "tokens":
        lines = {"x": f"torch.randint(0, 11, ({shapes[kind]}))"}
    else:
        lines = {"x": f"torch.randn({shapes[kind]}){scale}"}
    extra = own[5] % 6
    length = f"n, {size} + s" if kind in ("sequence", "tokens") else "n"
    if extra == 1 and kind != "tokens":
        lines["z"] = f"torch.randn({shapes[kind]})"
    if extra == 2:
        lines["mask"] = f"torch.rand({length}) < 0.7"
    if extra == 3:
        lines["k"] = f"torch.randint(0, 5, ({length},))"
    if extra == 4 and kind != "tokens":
        lines["z"] = f"torch.randn({shapes[kind]}) * 1e-2"
    if extra == 5:
        lines["t"] = "torch.rand(n) * 1000"
    return lines


def write(network: Network) -> str:
    """The source of ``network``: a class ``Net`` and ``inputs(n, s)``."""
    builder, lines = _build(network)
    names = _returned(builder, network.outputs)
    kind = (network.outputs[0] if network.outputs else 0) % 4
    if len(names) == 1 and kind != 3:
        result = names[0]
    elif kind == 1:
        result = "{" + ", ".join(f'"{n}": {n}' for n in names) + "}"
    else:
        result = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
    made = "".join(f"        {line}\n" for text in builder.init for line in text.split("\n"))
    done = "".join(f"        {line}\n" for text in builder.body for line in text.split("\n"))
    helpers = "".join(f"\n\n{text}\n" for text in builder.helpers)
    return (
        f"{HEADER}{helpers}\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        torch.manual_seed({network.seed})\n{made}\n"
        f"    def forward(self, {', '.join(lines)}):\n{done}        return {result}\n\n\n"
        f"def inputs(n=2, s=0):\n    return ({', '.join(lines.values())},)\n"
    )


def _build(network: Network) -> tuple[Builder, dict[str, str]]:
    lines = input_lines(network.inputs)
    builder = Builder(inputs=list(lines))
    torch.manual_seed(network.seed)
    builder.values = {name: eval(text, {"torch": torch, "n": 2, "s": 0}) for name, text in lines.items()}
    builder.unread = {name for name, value in builder.values.items() if value.is_floating_point()}
    steps = list(network.steps)
    if builder.values["x"].dtype == torch.int64:
        steps.insert(0, Step("embedding"))
    for step in steps:
        builder = add_step(builder, step)
    if not builder.body:
        builder = add_step(builder, Step("scale_by_number"))
    return builder, lines


def _returned(builder: Builder, choices: Sequence[int]) -> list[str]:
    made = [n for n, x in builder.values.items() if isinstance(x, Tensor) and n not in builder.inputs]
    names = [n for n in made if n in builder.unread or n == made[-1]]
    most = 4 if len(choices) < 2 else 1 + choices[1] % 4
    return names[-most:]


def load(source: str, name: str = "fuzz_network") -> types.ModuleType:
    """The module of a network's source, importable by ``name`` so that pickle finds its classes."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module


def words(without: frozenset[str] = frozenset()) -> list[str]:
    """The names of the vocabulary, each as often as its weight, but for those that bear a tag of ``without``."""
    return [n for n, w in VOCABULARY.items() if not w.tags & without for _ in range(w.weight)]


def networks(*, without: frozenset[str] = frozenset(), steps: int = 12) -> st.SearchStrategy[Network]:
    """Networks of up to ``steps`` steps, which Hypothesis can shrink."""
    choices = st.lists(st.integers(0, 15), min_size=CHOICES, max_size=CHOICES).map(tuple)
    step = st.builds(Step, st.sampled_from(words(without)), choices)
    return st.builds(
        Network,
        seed=st.integers(0, 999),
        inputs=choices,
        steps=st.lists(step, min_size=1, max_size=steps).map(tuple),
        outputs=st.lists(st.integers(0, 3), min_size=2, max_size=2).map(tuple),
    )


def numbered(number: int, *, without: frozenset[str] = frozenset()) -> Network:
    """The network of this number: the same one always, and no two alike."""
    random = Random(number)

    def choices(n: int = CHOICES) -> tuple[int, ...]:
        return tuple(random.choice((0, random.randrange(16))) for _ in range(n))

    names = words(without)
    steps = tuple(Step(random.choice(names), choices()) for _ in range(random.randrange(3, 20)))
    return Network(random.randrange(1000), choices(), steps, choices(2))


def shrink(network: Network, fails: Callable[[Network], bool], tries: int = 150) -> Network:
    """The smallest network found that still fails, by leaving out steps and setting choices to 0."""
    seen = {write(network)}
    while tries > 0:
        for smaller in network.smaller():
            text = write(smaller)
            if text in seen:
                if len(repr(smaller)) < len(repr(network)) and text == write(network):
                    network = smaller
                    break
                continue
            seen.add(text)
            tries -= 1
            if fails(smaller):
                network = smaller
                break
            if tries <= 0:
                return network
        else:
            return network
    return network


__all__ = ["Builder", "DoesNotFitError", "Network", "Step", "load", "networks", "numbered", "shrink", "word", "write"]
