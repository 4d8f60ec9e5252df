"""Comparisons that raise; ``test_oracles.py`` holds planted defects against each of them.

Integers are compared as integers, floats by the largest error in units of a scale. None returns a verdict that a caller
could forget to look at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.leveled import LeveledModule
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.integer import Dequantize, IntegerOp, Quantize

Pair = tuple[Tensor, Tensor]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


def _require_alike(actual: Any, expected: Any, what: str) -> list[Pair]:
    a, e = list(tensors_of(actual)), list(tensors_of(expected))
    assert type(actual) is type(expected), f"{what}: a {type(actual).__name__} instead of a {type(expected).__name__}"
    assert e and len(a) == len(e), f"{what}: {len(a)} tensors instead of {len(e)}"
    for x, y in zip(a, e, strict=True):
        assert x.shape == y.shape, f"{what}: shape {tuple(x.shape)} instead of {tuple(y.shape)}"
        assert x.dtype == y.dtype, f"{what}: {x.dtype} instead of {y.dtype}"
        assert y.numel(), f"{what}: nothing to compare"
    return list(zip(a, e, strict=True))


def decibels(true: Tensor, other: Tensor) -> float:
    """The power of ``true`` over that of what ``other`` is off by; infinite where that is nothing."""
    true, other = true.detach().double(), other.detach().double()
    noise = (true - other).square().sum()
    return float(10 * torch.log10(true.square().sum() / noise)) if noise > 0 else float("inf")


def assert_same_bits(actual: Any, expected: Any, what: str = "output") -> None:
    """Tensors, or nested outputs, are equal bit for bit (NaN equals NaN)."""
    for x, y in _require_alike(actual, expected, what):
        assert torch.isfinite(y.double()).all(), f"{what}: the expected value is not finite"
        wrong = x != y
        assert not wrong.any(), (
            f"{what}: {int(wrong.sum())} of {y.numel()} differ, by up to {float((x.double() - y.double()).abs().max()):.3g}"
        )


def assert_close_to_scale(actual: Any, expected: Any, tolerance: float, what: str = "output") -> None:
    """The largest error is at most ``tolerance`` of the expected tensor's largest magnitude."""
    for x, y in _require_alike(actual, expected, what):
        magnitude = float(y.double().abs().max())
        assert 0 < magnitude < float("inf"), f"{what}: the expected value has no signal"
        error = float((x.double() - y.double()).abs().max()) / magnitude
        assert error <= tolerance, f"{what}: off by {error:.3g} of the largest magnitude, {tolerance:.3g} allowed"


def assert_steps_apart(actual: Tensor, expected: Tensor, scale: Tensor, steps: float, what: str = "output") -> None:
    """The largest error is at most ``steps`` steps of the grid ``scale``."""
    for x, y in _require_alike(actual, expected, what):
        error = float(((x.double() - y.double()) / scale.double()).abs().max())
        assert error <= steps, f"{what}: off by {error:.4g} steps of the scale, {steps} allowed"


def assert_integers_agree(
    pairs: Iterable[Pair], *, at_least: int = 1, largest: int = 1, share: float = 0.999, what: str = "integers"
) -> None:
    """Integers differ by at most ``largest``, and the ``share`` that is equal is as wanted, over all pairs together.

    Args:
        pairs: integers got and integers expected.
        at_least: how many integers there must be to compare.
        largest: the largest difference allowed.
        share: how many must be equal.
    """
    count = equal = 0
    for actual, expected in pairs:
        assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
        assert not actual.is_floating_point() and not expected.is_floating_point(), f"{what}: these are not integers"
        difference = (actual.long() - expected.long()).abs()
        worst = int(difference.max()) if difference.numel() else 0
        assert worst <= largest, (
            f"{what}: {worst} levels apart, {largest} allowed; {int((difference > 0).sum())} differ"
        )
        count, equal = count + difference.numel(), equal + int((difference == 0).sum())
    assert count >= at_least, f"{what}: only {count} integers compared, {at_least} wanted"
    assert equal >= share * count, f"{what}: {equal / count:.4%} of {count} equal, {share:.2%} wanted"


def assert_same_top1(actual: Tensor, expected: Tensor, share: float) -> None:
    """Two classifiers give the same class for at least ``share`` of the rows."""
    agreement = float((actual.argmax(1) == expected.argmax(1)).double().mean())
    assert agreement >= share, f"the classes agree on {agreement:.2%}, {share:.2%} wanted"


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The integers of ``x``; raises where ``x`` does not lie on the grid."""
    steps = x.double() / scale.double()
    q = torch.round(steps)
    assert not q.numel() or float((steps - q).abs().max()) < 1e-2, "these values do not lie on their grid"
    return q.long() + zero_point.long()


class _Values(fx.Interpreter):
    """Keeps what every node gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


def values_of(module: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """What every node of ``module`` gives on ``inputs``, by name."""
    recorder = _Values(module)
    spec = module.meta.get("call")
    inputs = inputs if spec is None else tuple(spec.bind(inputs, {}))
    with torch.no_grad():
        recorder.run(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    return recorder.values


class _TeacherForced(fx.Interpreter):
    """Runs an integer graph where every op reads the frozen graph's integers, and keeps both results of each op."""

    def __init__(self, integer: LeveledModule, frozen: LeveledModule, values: dict[str, Any]) -> None:
        super().__init__(integer, garbage_collect_values=False)
        self.values = values
        self.last = {n.meta["chain"][0]: n.name for n in frozen.graph.nodes if n.meta.get("chain")}
        self.last = {head: name for head, name in self.last.items() if name in values}
        self.pairs: dict[str, list[Pair]] = {}
        self.real: dict[str, list[Pair]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        part = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        name = self.last.get(n.name, n.name)
        if not isinstance(part, (IntegerOp, Quantize)) or name not in self.values:
            return value
        expected = self.values[name]
        if isinstance(part, IntegerWeighted) and part.output_dtype is None:
            self.real.setdefault(n.name, []).extend(_require_alike(value, expected, n.name))
            return value
        return self._forced(n.name, value, expected, part)

    def _forced(self, name: str, value: Any, expected: Any, part: Any) -> Any:
        if isinstance(expected, (tuple, list)):
            return type(value)(self._forced(name, v, e, part) for v, e in zip(value, expected, strict=True))
        q = on_grid(expected, part.scale, part.zero_point)
        self.pairs.setdefault(name, []).append((value, q))
        return q.to(value.dtype)


def op_by_op(frozen: LeveledModule, integer: LeveledModule, inputs: tuple[Any, ...]) -> _TeacherForced:
    """Each integer op's result beside the frozen graph's, on the same integers.

    Returns:
        ``pairs``: integers got and expected by node name; ``real``: the same of accumulators that leave as floats.
    """
    forced = _TeacherForced(integer, frozen, values_of(frozen, inputs))
    spec = integer.meta.get("call")
    with torch.no_grad():
        forced.run(*(inputs if spec is None else spec.bind(inputs, {})))
    assert forced.pairs or forced.real, "no integer op was compared"
    return forced


ENOUGH = 5000
"""Of fewer integers a share of 99.9 % says little: a few ties, which the float graph rounds either way, decide."""


def assert_ops_agree(
    frozen: LeveledModule, integer: LeveledModule, inputs: tuple[Any, ...], *, share: float = 0.999
) -> None:
    """Each integer op is within one level of the frozen graph's on the same integers, and equal nearly everywhere.

    The ``share`` that is equal is asked of every op with enough integers, and of all ops of the model together.
    """
    compared = op_by_op(frozen, integer, inputs)
    for name, pairs in compared.pairs.items():
        is_large = sum(q.numel() for q, _ in pairs) >= ENOUGH
        assert_integers_agree(pairs, what=name, share=share if is_large else 0.95)
    together = [pair for pairs in compared.pairs.values() for pair in pairs]
    if together:
        assert_integers_agree(together, what="all ops together", share=share)
    for name, pairs in compared.real.items():
        for actual, expected in pairs:
            assert_close_to_scale(actual, expected, 2e-6, what=name)


def output_integers(integer: LeveledModule, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The integers that an integer model dequantizes at its end."""
    source = [n for n in integer.graph.nodes if n.op == "call_module"]
    ends = [n for n in source if isinstance(integer.get_submodule(n.target), Dequantize)]
    values = values_of(integer, inputs)
    return [values[n.args[0].name] for n in ends if any(user.op == "output" for user in n.users)]
