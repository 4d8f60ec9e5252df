"""What must hold of every network, each property a function that raises ``AssertionError`` with what it found.

A ``Trial`` makes a network's levels once; properties read them. A network whose float model cannot run, or whose outputs
say nothing (no signal, not finite), is no trial.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import comparisons
import torch
from frozen import calls_of, copied, ops_in_pairs, require_same_ops
from generator import Network, load, write
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import fxquant
from fxquant.behaviour import FloatOnly, Measuring, Weighted
from fxquant.capture.islands import graphs_of, islands_of
from fxquant.errors import CaptureError, ExportError, InputError, RecipeError, SpecializationError
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.agreement import agreement
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.recipe import Op, Recipe

BATCH, OTHER = 3, 5
ON_FOLDED = 2e-4
"""Of the largest magnitude: what folding a batch norm may move in float32, where factors of 1e3 and 1e-3 meet."""

ON_WRITTEN = 1e-6
"""The same where forward writes in place: a view that is written out of place has other strides, for which torch may take
another kernel that adds in another order. Without writes every bit is the same."""


FLOAT_NOISE = 10.0
"""Of what float32 itself errs by in the user's model, against float64: as much may lie between two orders of additions. A
norm of what is constant but for rounding, or a gradient that is zero on paper, has no other digits."""


NO_SIGN = 0.002
"""Of a sum of magnitudes: as much may the rounding of some eighty terms to 8 bits move their sum."""

TWO_MEANINGS = 0.02
"""Of the largest magnitude: what no order of additions moves a result by."""

ALL_NOISE = 40.0
"""In dB, of the float model in float32 against itself in float64: an output that has less is made by rounding."""


class NotATrialError(Exception):
    """The float model itself says nothing."""


def tensors_of(value: Any) -> list[Tensor]:
    return list(comparisons.tensors_of(value))


def clones(value: Any) -> Any:
    return tuple(v.clone() for v in value)


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to noise in dB, infinite where nothing differs."""
    noise = float((actual.double() - expected.double()).square().sum())
    signal = float(expected.double().square().sum())
    return math.inf if not noise else 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


class Trial:
    """One network and what fxquant makes of it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.module = load(source)
        torch.manual_seed(0)
        self.inputs = self.module.inputs(BATCH)
        self.more = [self.module.inputs(BATCH) for _ in range(2)]
        self.other_batch = self.module.inputs(OTHER)
        self.other_size = self.module.inputs(BATCH, 2)
        self.model = self.module.Net().eval()
        self.before = State(self.model)
        self.float = self.run(self.model, self.inputs)
        flat = tensors_of(self.float)
        if not all(torch.isfinite(x.double()).all() for x in flat) or not any(bool((x != 0).any()) for x in flat):
            raise NotATrialError("the float outputs say nothing")
        self._require_one_meaning()

    def _require_one_meaning(self) -> None:
        """A write into what only one of torch's paths makes a view, and a branch on a sum or an output that is zero but for
        rounding, are no questions to fxquant: torch itself answers them in two ways."""
        sums: list[bool] = []
        judged = copy.deepcopy(self.model)
        for part in judged.modules():
            if type(part).__name__ == "Branch":
                part.register_forward_pre_hook(
                    lambda _, x: sums.append(bool(x[0].sum().abs() <= NO_SIGN * x[0].abs().sum()))
                )
        torch.manual_seed(1)
        with torch.enable_grad():
            other = judged(*clones(self.inputs))
        if any(sums):
            raise NotATrialError("a branch asks for the sign of a sum that rounding decides")
        for x, y in zip(tensors_of(self.float), tensors_of(other), strict=True):
            if x.is_floating_point() and x.numel() and float((x - y).abs().max()) > TWO_MEANINGS * float(x.abs().max()):
                raise NotATrialError("with gradients torch gives another result")
        exact = in_float64(self, self.inputs)
        for x, y in () if exact is None else zip(*map(tensors_of, (self.float, exact)), strict=True):
            if x.is_floating_point() and x.shape == y.shape and x.numel() and sqnr(x, y) < ALL_NOISE:
                raise NotATrialError("an output is made by float32's rounding")

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """The outputs of one call, under one seed, on copies of the inputs; buffers that it writes are put back.

        What is compiled has those of the integer model that it was made from.
        """
        torch.manual_seed(1)
        owner = model if isinstance(model, nn.Module) else self.reference
        before = [(buffer, buffer.clone()) for buffer in owner.buffers()] if self.has_state else ()
        with torch.no_grad():
            try:
                return model(*clones(inputs))
            finally:  # a call that fails has written too
                for buffer, value in before:
                    buffer.copy_(value)

    @cached_property
    def prepared(self) -> Any:
        return fxquant.prepare(self.model, clones(self.inputs))

    @cached_property
    def calibrated(self) -> Any:
        prepared = copy.deepcopy(self.prepared)
        batches = [clones(x) for x in (self.inputs, *self.more, self.other_batch)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            calibrated = fxquant.calibrate(prepared, batches, progress=False)
        self.said = [str(warning.message) for warning in said]
        return calibrated

    @cached_property
    def frozen(self) -> Any:
        return fxquant.freeze(self.calibrated)

    @cached_property
    def reference(self) -> Any:
        return fxquant.convert(self.frozen, kernels="reference")

    @cached_property
    def integer(self) -> Any:
        return fxquant.convert(self.calibrated)

    @cached_property
    def is_folded(self) -> bool:
        """Whether weights change, or torch has another kernel for what is one layer in eval mode."""
        kinds = (nn.modules.batchnorm._BatchNorm, nn.MultiheadAttention)
        return any(isinstance(m, kinds) for m in self.model.modules())

    @cached_property
    def writes_in_place(self) -> bool:
        """Whether a graph writes out of place what forward wrote in place."""
        return any(n.meta.get("writes") for g in graphs_of(self.prepared).values() for n in g.graph.nodes)

    @cached_property
    def derives_parameters(self) -> bool:
        """Whether a layer reads a part of a parameter: under no_grad that asks for no gradient, a parameter of the prepared
        model does, and torch chooses its kernel for a product by that."""
        if re.search(r"self\.w\d+\[", self.source):
            return True  # of which a part may be all
        given = list(self.model.parameters())
        return any(
            not any(own.shape == p.shape and torch.equal(own, p) for p in given) for own in self.prepared.parameters()
        )

    @property
    def has_state(self) -> bool:
        """Whether each call writes a buffer that the next one reads."""
        return "register_buffer('s" in self.source

    @property
    def is_whole(self) -> bool:
        return isinstance(self.integer, LeveledModule) and not islands_of(self.integer)


class State:
    """Everything of a model that fxquant has no business to change."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {k: (v, v.detach().clone()) for k, v in model.state_dict(keep_vars=True).items()}
        self.parts = {
            n: (type(m), m.training, m.forward.__func__, sorted(m.__dict__), self._plain(m))
            for n, m in model.named_modules()
        }

    @staticmethod
    def _plain(part: nn.Module) -> dict[str, Any]:
        return {k: v for k, v in part.__dict__.items() if isinstance(v, (int, float, str, tuple, bool))}

    def require_same(self, model: nn.Module) -> None:
        now = State(model)
        assert now.parts == self.parts, "attributes, classes or modes of the user's model changed"
        assert list(now.tensors) == list(self.tensors), "the names of the user's tensors changed"
        for name, (own, value) in self.tensors.items():
            assert now.tensors[name][0] is own, f"{name} of the user's model is another object"
            assert torch.equal(own, value), f"{name} of the user's model changed"


def graphs(trial: Trial, model: Any) -> list[LeveledModule]:
    return list(graphs_of(model).values())


def model_is_untouched(t: Trial) -> None:
    """The user's model is as it was after every verb."""
    t.integer  # noqa: B018
    t.before.require_same(t.model)
    comparisons.assert_same_bits(t.run(t.model, t.inputs), t.float, "the user's model after all verbs")


def require_float(t: Trial, actual: Any, expected: Any, what: str, inputs: Any) -> None:
    share = ON_FOLDED if t.is_folded else ON_WRITTEN if t.writes_in_place or t.derives_parameters else 0.0
    require_near(actual, expected, what, share, lambda: in_float64(t, inputs))


def in_float64(t: Trial, inputs: Any) -> Any:
    """What the user's model gives in float64; None where its code insists on float32."""
    double = tuple(x.double() if x.is_floating_point() else x for x in clones(inputs))
    try:
        return t.run(copy.deepcopy(t.model).double(), double)
    except (RuntimeError, TypeError):
        return None


def require_near(actual: Any, expected: Any, what: str, share: float, exact: Callable[[], Any] = lambda: None) -> None:
    """Within a share of the largest value, or what float32 errs by; where the share is 0, the same bits.

    Args:
        exact: gives the expected results in float64; asked only where the share is exceeded.
    """
    if not share:
        comparisons.assert_same_bits(actual, expected, what)
        return
    for i, (x, y) in enumerate(comparisons._require_alike(actual, expected, what)):
        error = float((x.double() - y.double()).abs().max())
        allowed = share * max(float(y.double().abs().max()), 1e-30)
        if error > allowed and (z := exact()) is not None:
            allowed = max(allowed, FLOAT_NOISE * float((tensors_of(z)[i].double() - y.double()).abs().max()))
        assert error <= allowed, f"{what}: off by {error:.3g}, where {allowed:.3g} is allowed"


def off_is_float(t: Trial) -> None:
    """With quantizers off, the prepared model gives the float model's outputs."""
    with fxquant.quantizers_off(t.prepared):
        require_float(t, t.run(t.prepared, t.inputs), t.float, "quantizers off against float", t.inputs)


def off_is_float_elsewhere(t: Trial) -> None:
    """The same for another batch and another size, or they are refused."""
    for what, inputs in (("another batch", t.other_batch), ("another size", t.other_size)):
        try:
            expected = t.run(t.model, inputs)
        except Exception:
            continue
        if not all(bool(torch.isfinite(x.double()).all()) and x.numel() for x in tensors_of(expected)):
            continue
        try:
            with fxquant.quantizers_off(t.prepared):
                got = t.run(t.prepared, inputs)
            rounded = t.run(t.integer, inputs)
        except SpecializationError:
            continue
        require_float(t, got, expected, f"quantizers off against float at {what}", inputs)
        comparisons._require_alike(rounded, expected, f"the integer model at {what}")


def frozen_is_prepared(t: Trial) -> None:
    """Freezing changes nothing that is computed, but how float32 decides ties; what differs at the outputs is that."""
    got, expected = t.run(t.frozen, t.inputs), t.run(t.calibrated, t.inputs)
    pairs = comparisons._require_alike(got, expected, "frozen against prepared")
    assert all(torch.isfinite(y.double()).all() for _, y in pairs), "the prepared model's outputs are not finite"
    if not all(torch.equal(x, y) for x, y in pairs):
        require_same_ops(t.frozen, t.calibrated, lambda model: t.run(model, t.inputs))


def integer_is_frozen(t: Trial) -> None:
    """Each integer op is within one step of the frozen graph's."""
    for frozen, integer, compared in ops_in_pairs(t.frozen, t.reference, lambda model: t.run(model, t.inputs)):
        noise = float_noise(frozen, compared.values)
        for name, pairs in compared.pairs.items():
            scale = float(integer.get_submodule(str(node_of(integer, name).target)).scale)
            chain = (name, compared.last.get(name, name))  # a merged clamp's operand may be smaller than the op's
            allowed = 1 + steps_open(max(noise.get(link, 0.0) for link in chain), scale)
            for q, expected in pairs:
                assert q.shape == expected.shape, f"{name}: {tuple(q.shape)} instead of {tuple(expected.shape)}"
                worst = int((q.long() - expected.long()).abs().max()) if q.numel() else 0
                assert worst <= allowed, f"integer against frozen: {name} is {worst} steps off"
        for name, pairs in compared.real.items():
            for x, y in pairs:
                error, most = float((x.double() - y.double()).abs().max()), float(y.double().abs().max())
                assert error <= 1e-5 * most + noise.get(name, 0.0), (
                    f"integer against frozen: {name} is off by {error:.3g} of {most:.3g}"
                )


def steps_open(noise: float, scale: float) -> float:
    """How many steps of a grid float32 leaves open: all, where a quarter of the grid is noise (what is zero on paper)."""
    return math.inf if 4 * noise > 255 * scale else noise / scale


def node_of(graph: LeveledModule, name: str) -> fx.Node:
    return next(n for n in graph.graph.nodes if n.name == name)


def float_noise(graph: LeveledModule, values: dict[str, Any]) -> dict[str, float]:
    """What float32 itself leaves open in each node: a millionth of the largest magnitude that goes in.

    An operand that is not rounded has what went into it open too: a mean of what cancels is all noise.
    """
    found: dict[str, float] = {}
    for node in graph.graph.nodes:
        read = [values.get(n.name) for n in node.all_input_nodes]
        largest = [float(x.abs().max()) for x in read if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
        before = [found[n.name] for n in node.all_input_nodes if not rounds(graph, n)]
        found[node.name] = max([1e-6 * max(largest, default=0.0), *before]) * magnified(node, values)
    return found


def magnified(node: fx.Node, values: dict[str, Any]) -> float:
    """How many times an error of the first operand is in a quotient or a product of floats; 1 at least."""
    other = values.get(node.args[1].name) if len(node.args) > 1 and isinstance(node.args[1], fx.Node) else None
    if (
        node.op != "call_function"
        or not isinstance(other, Tensor)
        or not other.is_floating_point()
        or not other.numel()
    ):
        return 1.0
    name = getattr(node.target, "__name__", "")
    size = other.detach().double().abs()
    return max(
        1.0, float(1 / size.min().clamp(min=1e-30)) if "div" in name else float(size.max()) if "mul" in name else 1.0
    )


def rounds(graph: LeveledModule, node: fx.Node) -> bool:
    part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(part, FakeQuantize) or getattr(part, "output_quantizer", None) is not None


class _Keeping(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, graph: LeveledModule) -> None:
        super().__init__(graph)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@torch.no_grad()
def open_steps(t: Trial) -> dict[str, float]:
    """By the path of each rounding module, how many steps of its grid float32 leaves open.

    Any number where the user's own code, of which nothing is known, gives what is rounded.
    """
    found: dict[str, float] = {}
    calls = calls_of(t.frozen, lambda model: t.run(model, t.inputs))
    for path, graph in graphs_of(t.frozen).items():
        for args in calls.get(path, ()):
            keeping = _Keeping(graph)
            torch.manual_seed(1)
            keeping.run(*copied(args))
            noise = float_noise(graph, keeping.values)
            for node in graph.graph.nodes:
                part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
                quantizer = part if isinstance(part, FakeQuantize) else getattr(part, "output_quantizer", None)
                if quantizer is not None:
                    name = f"{path}.{node.target}" if path else str(node.target)
                    is_entry = bool(path) and any(n.op == "placeholder" for n in node.all_input_nodes)
                    steps = math.inf if is_entry else steps_open(noise[node.name], float(quantizer.grid.scale.max()))
                    found[name] = max(steps, found.get(name, 0.0))
    return found


def require_no_louder(x: Tensor, y: Tensor, z: Tensor, what: str) -> None:
    """``x`` is nearer to ``y`` than ``y`` is to the float model's ``z``, or as near as 25 dB."""
    assert x.shape == y.shape and x.dtype == y.dtype, (
        f"{what}: {x.dtype} {tuple(x.shape)}, not {y.dtype} {tuple(y.shape)}"
    )
    if not y.dtype.is_floating_point:  # a comparison of what may be a step apart
        flipped = int((x != y).sum())
        assert flipped <= max(1, y.numel() // 50), f"{what}: {flipped} of {y.numel()} differ"
        return
    own, other = sqnr(x, y), sqnr(y, z)
    assert own >= min(25, other - 3), f"{what}: {own:.1f} dB, where rounding leaves {other:.1f} dB"


def kernels_are_reference(t: Trial) -> None:
    """Every fast kernel is within one step of the reference, and so is what they give together."""
    if t.is_whole and not t.has_state:
        spec = t.integer.meta.get("call")
        inputs = clones(t.inputs)
        for own in agreement(t.integer, *(inputs if spec is None else spec.bind(inputs, {}))):
            allowed = 1 if own.worst == int(own.worst) else 1e-4
            assert own.worst <= allowed, f"kernel {own.kernel} at {own.node}: {own.worst:.4g} off"
    for x, y, z in zip(
        *map(tensors_of, (t.run(t.integer, t.inputs), t.run(t.reference, t.inputs), t.float)), strict=True
    ):
        require_no_louder(x, y, z, "auto against reference")


def copies_are_equal(t: Trial) -> None:
    """deepcopy, pickle and save/load give the same bits."""
    expected = t.run(t.integer, t.inputs)
    comparisons_equal(t.run(copy.deepcopy(t.integer), t.inputs), expected, "deepcopy")
    comparisons_equal(t.run(pickle.loads(pickle.dumps(t.integer)), t.inputs), expected, "pickle")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt")
        name, model = ("prepared", t.calibrated) if len(t.source) % 2 else ("integer", t.integer)
        fxquant.save(model, path)
        again = fxquant.load(t.module.Net().eval(), path)
        comparisons_equal(t.run(again, t.inputs), t.run(model, t.inputs), f"save and load of the {name} model")


def comparisons_equal(actual: Any, expected: Any, what: str) -> None:
    for x, y in comparisons._require_alike(actual, expected, what):
        assert torch.equal(x, y), f"{what}: {int((x != y).sum())} of {y.numel()} values differ"


def onnx_is_integer(t: Trial) -> None:
    """The ONNX file in ONNX Runtime computes the integer model."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        try:
            report = fxquant.export_onnx(t.reference, path, clones(t.inputs), verify="nodes")
        except ExportError as error:
            if any(text in str(error) for text in ("island", "opset", "which runs its own code because")):
                return
            raise
    clean, steps = True, open_steps(t)
    for node in report.nodes:
        allowed = 1 + steps.get(node.name.partition(":")[0], 0.0)
        assert not clean or node.lsb <= allowed, (
            f"ONNX Runtime: {node.name} is {node.lsb} steps off, with nothing before it off"
        )
        clean = clean and node.equal == 1
    noise = [sqnr(y, z) for y, z in zip(*map(tensors_of, (t.run(t.reference, t.inputs), t.float)), strict=True)]
    for own, other in zip(report.agreement, noise, strict=False):
        assert own.sqnr >= min(25, other - 3), f"ONNX Runtime: {own}, where rounding leaves {other:.1f} dB"


def gradients_of(model: nn.Module, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(2)
    outputs = model(*clones(inputs))
    loss = sum(
        (x.double() * torch.linspace(-1, 1, x.numel(), dtype=torch.double).view(x.shape)).mean()
        for x in tensors_of(outputs)
        if x.is_floating_point()
    )
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return outputs, {}
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return outputs, {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def gradients_in_float64(t: Trial) -> dict[str, Tensor]:
    """The gradients of the user's model in float64; none where its code insists on float32."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in clones(t.inputs))
    try:
        return gradients_of(t.module.Net().train().double(), inputs)[1]
    except (RuntimeError, TypeError):
        return {}


def qat_trains(t: Trial) -> None:
    """Loss and gradients are finite, and with quantizers off they are the float model's, in train mode."""
    model = t.module.Net().train()
    try:
        prepared = fxquant.prepare(model, clones(t.inputs), qat=True).train()
    except (CaptureError, InputError) as error:  # the two modes differ, and no layer is left to train
        if has_nothing(model, error):
            return
        raise
    try:
        expected, wanted = gradients_of(t.module.Net().train(), t.inputs)
    except RuntimeError:
        return
    if not all(bool(torch.isfinite(x.double()).all()) for x in (*tensors_of(expected), *wanted.values())):
        return
    with fxquant.quantizers_off(prepared):
        got, own = gradients_of(copy.deepcopy(prepared), t.inputs)
    # A part inside an island is not told that its inputs are one tensor, which attention multiplies in one product then.
    share = ON_WRITTEN if t.writes_in_place or islands_of(prepared) else 0.0
    require_near(got, expected, "QAT with quantizers off against float, in train mode", share)
    # The loss weighs outputs by 1/2 in all; what sums cancel leaves a ten-millionth of that or of the other gradients.
    noise = 1e-6 * max(0.1, *(float(g.abs().max()) for g in wanted.values()), 0.0)
    for name, gradient in wanted.items():
        assert name in own, f"{name} has a gradient in float, and none in the prepared model"
        what = f"the gradient of {name}, quantizers off"
        if float((own[name] - gradient).abs().max()) > noise:
            require_near(own[name], gradient, what, 1e-4, lambda name=name: gradients_in_float64(t).get(name))
    outputs, gradients = gradients_of(prepared, t.inputs)
    for x in tensors_of(outputs):
        assert torch.isfinite(x.double()).all(), "the outputs of a QAT step are not finite"
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), f"the gradient of {name} is not finite"
    fxquant.convert(prepared.eval())


def native_is_reference(t: Trial) -> None:
    """Where the native kernels take the whole model, they give the reference's bits; softmax and norms evaluate in float32,
    and what is torch's between native parts is within one step."""
    if not t.is_whole:
        return
    try:
        native = fxquant.compile(t.reference, clones(t.inputs), runtime="native")
    except ExportError:
        return
    got, expected = t.run(native, t.inputs), t.run(t.reference, t.inputs)
    whole = not any(kernel != "native" for kernel in fxquant.coverage(t.integer).kernels.values())
    evaluates = any(type(m).__name__ == "IntegerEvaluate" for m in t.reference.modules())
    exact = [whole and not evaluates and not has_float_ops_behind_it(t.reference, x) for x in outputs_of(t.reference)]
    triples = list(zip(*map(tensors_of, (got, expected, t.float)), strict=True))
    # Parts of one node, and containers of the user's own, are not told apart.
    exact = exact if len(exact) == len(triples) else [all(exact)] * len(triples)
    for own, (x, y, z) in zip(exact, triples, strict=True):
        if own:
            comparisons_equal(x, y, "native against reference")
        else:
            require_no_louder(x, y, z, "native against reference")


def outputs_of(graph: LeveledModule) -> list[fx.Node]:
    """What a graph gives."""
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    return [x for x in tree_leaves(output.args[0]) if isinstance(x, fx.Node)]


def has_float_ops_behind_it(graph: LeveledModule, output: fx.Node) -> bool:
    """Whether torch computes floats on the way to an output: it adds in another order where memory lies in another one."""
    waiting, seen = [output], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        kept = node.meta.get("dtype")
        if node.op in ("call_function", "call_method") and isinstance(kept, torch.dtype) and kept.is_floating_point:
            return True
        waiting.extend(node.all_input_nodes)
    return False


COLLAPSED, SOUND = 12.0, 30.0
"""In dB: what 8 bits may not give where the weighted layers alone, in 8 bits, give the other."""


def nothing_is_silent(t: Trial) -> None:
    """Where 8 bits destroy a model that weighted layers in 8 bits do not, calibrate says so."""
    eight = loudest(t, t.reference)
    if eight >= COLLAPSED or any("leaves" in text and "of an output" in text for text in t.said):
        return
    entries = {n.meta["entry"] for g in graphs(t, t.prepared) for n in g.graph.nodes if "entry" in n.meta}
    names = sorted(e.name for e in entries if not isinstance(e.behaviour, (Weighted, FloatOnly, Measuring)))
    settings = []
    for name in names:
        try:
            fxquant.prepare(t.model, clones(t.inputs), recipe=Recipe([(Op(name), None)]))
        except RecipeError:
            continue
        settings.append((Op(name), None))
    prepared = fxquant.prepare(t.model, clones(t.inputs), recipe=Recipe(settings))
    batches = [clones(x) for x in (t.inputs, *t.more, t.other_batch)]
    bare = loudest(t, fxquant.convert(fxquant.calibrate(prepared, batches, progress=False)))
    assert bare < SOUND, f"8 bits give {eight:.1f} dB, and {bare:.1f} dB where {', '.join(names)} stay in float"


def loudest(t: Trial, model: Any) -> float:
    """The worst SQNR of a float output against the float model."""
    pairs = zip(*map(tensors_of, (t.run(model, t.inputs), t.float)), strict=True)
    return min((sqnr(x, y) for x, y in pairs if y.is_floating_point() and (y != 0).any()), default=math.inf)


Property = Callable[[Trial], None]
QUICK: tuple[Property, ...] = (
    off_is_float,
    off_is_float_elsewhere,
    frozen_is_prepared,
    integer_is_frozen,
    kernels_are_reference,
    model_is_untouched,
)
THOROUGH: tuple[Property, ...] = (*QUICK, copies_are_equal, qat_trains, native_is_reference, nothing_is_silent)
ALL: tuple[Property, ...] = (*THOROUGH, onnx_is_integer)


def scheduled(index: int) -> tuple[Property, ...]:
    """What is checked of the network of this index: the quick properties of each, the slow ones of some."""
    turns = (
        (copies_are_equal, 4),
        (qat_trains, 2),
        (native_is_reference, 3),
        (nothing_is_silent, 1),
        (onnx_is_integer, 40),
    )
    return (*QUICK, *(check for check, every in turns if index % every == 0))


def failures(
    source: str, properties: tuple[Callable[[Trial], None], ...] = THOROUGH
) -> Iterator[tuple[str, Exception]]:
    """Each property that does not hold, by name, with what it raised.

    Raises:
        NotATrialError: the float model says nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = Trial(source)
        except NotATrialError:
            raise
        except Exception as error:
            raise NotATrialError(str(error)) from error
        try:
            trial.prepared  # noqa: B018
            trial.calibrated  # noqa: B018
            trial.integer  # noqa: B018
        except Exception as error:
            if has_nothing(trial.model, error):
                raise NotATrialError(str(error)) from error
            yield "verbs", error
            return
        for check in properties:
            try:
                check(trial)
            except Exception as error:
                yield check.__name__, error


def has_nothing(model: nn.Module, error: Exception) -> bool:
    """Whether ``error`` refuses a model in which there is nothing to quantize, or nothing where it can be captured."""
    if isinstance(error, InputError) and "no op that fxquant can quantize" in str(error):
        if "its weight is computed in forward" in str(error):
            return True  # in training, that is refused in words
        recurrent = {id(p) for part in model.modules() if isinstance(part, nn.RNNBase) for p in part.parameters()}
        return all(p.ndim < 2 or id(p) in recurrent for p in model.parameters())
    return isinstance(error, CaptureError) and not any(map(multiplies, model.modules()))


def multiplies(part: nn.Module) -> bool:
    """Whether ``part`` is a layer that fxquant can quantize by itself, where the model around it cannot be traced."""
    weight = getattr(part, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1 and not isinstance(part, nn.Embedding)


def first_failure(
    network: Network, properties: tuple[Callable[[Trial], None], ...] = THOROUGH
) -> tuple[str, Exception] | None:
    try:
        return next(failures(write(network), properties), None)
    except NotATrialError:
        return None
