"""to_integer: from fake-quant modules to integer ops, with quantize and dequantize where float begins and ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import ChannelAffine, Measuring, Passing, Weighted
from fxquant.capture.measuring import answer, asks_type
from fxquant.errors import LevelError
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import nodes_in
from fxquant.nn.accumulating import IntegerSum
from fxquant.nn.fake_quantize import Grid
from fxquant.nn.integer import Dequantize, IntegerEvaluate, IntegerOp, Quantize, Site
from fxquant.nn.modules import QuantInput
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.entry import Call, OpEntry, scalar
from fxquant.ops.normalization import channel_affine_of
from fxquant.ops.table import TABLE
from fxquant.passes.choose_regions import quantized_operands
from fxquant.passes.facts import Converted, Placed
from fxquant.passes.merge_clamps import clamp_bounds

__all__ = ["to_integer"]


def to_integer(module: LeveledModule, *, rounding: str = "single") -> LeveledModule:
    """Replace each chain of fake-quant modules by one integer op.

    Args:
        module: a frozen graph.
        rounding: how accumulators are requantized: ``single``, ``double`` or ``float`` (see ``numerics.requantize``).

    Before:
        x = input
        x_quantizer = QuantInput[x_quantizer](x)
        conv = QuantConv2d[conv](x_quantizer)
        relu = QuantReLU[relu](conv)
        fc = QuantLinear[fc](relu)
        return fc

    After:
        x = input
        x_quantizer = Quantize[x_quantizer](x)
        conv = IntConv2d[conv](x_quantizer)
        fc = IntLinear[fc](conv)
        return fc

    Law:
        Each op's integers are within one of the frozen graph's on the same inputs.

    Raises:
        LevelError: what an op's entry gives for its integer form is none.
    """
    edit = Edit(module, by="to_integer")
    _Converter(edit, rounding).run()
    return edit.done(level="integer")


class _Converter:
    def __init__(self, edit: Edit, rounding: str) -> None:
        self.edit, self.rounding = edit, rounding
        self.grids: dict[fx.Node, Grid] = {}
        self.dequantized: dict[fx.Node, fx.Node] = {}
        self.dtype = edit.parameter_dtype

    def run(self) -> None:
        for node in self.edit.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            part: Any = self.edit.module(node)
            behaviour = behaviour_of(node)
            if isinstance(part, QuantInput):
                self._enter(node, part)
            elif isinstance(behaviour, Measuring):
                self._measure(node)
            elif node.op == "output" or not self._is_quantized(node, part):
                self._leave(node)
            elif isinstance(behaviour, Passing):
                self._pass(node, part)
            elif not Placed(node).continues:
                self._compute(node, part)

    def _is_quantized(self, node: fx.Node, part: Any) -> bool:
        if part is None or "reason" in node.meta or "entry" not in node.meta:
            return False
        return bool(Placed(node).quantized or Placed(node).continues or self._leaves_an_accumulator(node))

    def _leaves_an_accumulator(self, node: fx.Node) -> bool:
        return bool(Placed(node).leaves_as_float) and not isinstance(behaviour_of(node), Passing)

    def _enter(self, node: fx.Node, part: QuantInput) -> None:
        assert part.output_quantizer is not None
        grid = part.output_quantizer.grid
        source = node.args[0]
        assert isinstance(source, fx.Node)
        quantize = Quantize(grid)
        if source in self.grids:
            source = self._dequantize(source)
            self.edit.set_args(node, (source,))
        value = self._constant(source)
        if value is not None:
            path = str(source.target).replace(".", "_") if source.op == "get_attr" else source.name
            constant = self.edit.insert_attribute(
                node,
                self.edit.fresh_path(f"{path}_integers"),
                quantize(value),
                is_tensor=True,
                integer_constant=True,
                grid=(float(grid.scale), int(grid.zero_point)),
            )
            self.edit.fold(node, constant)
            self.grids[constant] = grid
            return
        self.edit.set_module(node, quantize)
        self.grids[node] = grid

    def _constant(self, node: fx.Node) -> Tensor | None:
        """A parameter, or what is computed from parameters alone, the same every time; None for all else."""
        if not node.meta.get("constant") or not self.edit.is_constant(node):
            return None
        with torch.random.fork_rng(devices=[]):
            first, again = (self.edit.constant(node) for _ in range(2))
        return first.detach() if isinstance(first, Tensor) and torch.equal(first, again) else None

    def _leave(self, node: fx.Node) -> None:
        """Let a float op, or the model's output, read real numbers."""
        for read in set(nodes_in((node.args, node.kwargs))):
            if read in self.grids:
                self.edit.redirect([node], read, self._dequantize(read))

    def _measure(self, node: fx.Node) -> None:
        """A shape is read off the integers; a type is that of the real numbers they stand for, and known now."""
        asked = node.args[0] if node.args else None
        if isinstance(asked, fx.Node) and asked in self.grids and asks_type(node.op, node.target, node.args):
            self.edit.put_value(node, answer(node.op, node.target, node.args, self._real_dtype(asked)))

    def _real_dtype(self, node: fx.Node) -> torch.dtype:
        """What a quantized tensor is in the float model."""
        dtype = node.meta.get("dtype")
        return dtype if isinstance(dtype, torch.dtype) else self.dtype

    def _dequantize(self, node: fx.Node) -> fx.Node:
        if node not in self.dequantized:
            dtype = node.meta.get("dtype")
            part = Dequantize(self.grids[node], self._real_dtype(node))
            path = self.edit.fresh_path(f"{str(node.target).replace('.', '_')}_dequantize")
            self.dequantized[node] = self.edit.insert_module(
                node, path, part, users=(), is_tensor=True, shape=node.meta.get("shape"), dtype=dtype
            )
        return self.dequantized[node]

    def _pass(self, node: fx.Node, part: Any) -> None:
        call = call_of(node, part)
        entry, sources = call.entry, call.operands
        if entry.drops:
            self.edit.remove(node, sources[0])
            return
        grid = part.output_quantizer.grid
        if Placed(node).rounds_for_reader:
            self.edit.set_module(node, self._moved(sources[0], grid))
            self.grids[node] = grid
            return
        for source in sources:
            if Placed(node).requantizes:
                self._requantize(node, source, grid)
        static = self._static(call)
        self.edit.set_module(node, _form(entry, Site(entry, static, (grid,), grid, rounding=self.rounding)))
        self.grids[node] = grid

    def _moved(self, source: fx.Node, grid: Grid) -> IntegerSum:
        """What puts the integers of ``source`` onto ``grid``: a sum of one."""
        site = Site(TABLE["identity"], {}, (self.grids[source],), grid, rounding=self.rounding)
        return IntegerSum(site, signs=(1.0,))

    def _requantize(self, node: fx.Node, source: fx.Node, grid: Grid) -> None:
        entry, part = TABLE["identity"], self._moved(source, grid)
        path = self.edit.fresh_path(f"{str(source.target).replace('.', '_')}_requantize")
        made = self.edit.insert_module(source, path, part, users=[node], is_tensor=True, entry=entry)
        self.grids[made] = grid

    @staticmethod
    def _static(call: Call) -> dict[str, Any]:
        return {k: v for k, v in call.attributes.items() if next(nodes_in(v), None) is None}

    def _compute(self, last: fx.Node, last_part: Any) -> None:
        """One integer op for the chain that ends in ``last``; it stands where the chain began."""
        links = self._links(last)
        head = links[0]
        part: Any = self.edit.module(head)
        call = call_of(head, part)
        clamp: tuple[float | None, float | None] = (None, None)
        if len(links) > 1:
            clamp = clamp_bounds(self.edit, last) or clamp
        quantizer = last_part.output_quantizer
        output = None if quantizer is None else quantizer.grid
        site, args = self._site(call, part, output, clamp)
        # An accumulator has no grid to compute on: what reads one computes on real numbers, and rounds.
        evaluates = Placed(head).wide_operand or Placed(head).exact_operands
        integer = IntegerEvaluate(site) if evaluates else _form(call.entry, site)
        dynamic = {k: v for k, v in call.attributes.items() if next(nodes_in(v), None) is not None}
        self.edit.call_module(head, str(head.target), integer, tuple(args), dynamic)
        Converted(head).merged = [link.meta["entry"].title for link in links]
        for link in links[1:]:
            self.edit.absorb(head, link, "merged")
        if output is not None:
            self.grids[head] = output
        head.meta["dtype"] = last.meta.get("dtype", head.meta.get("dtype"))
        Placed(head).take(Placed(last), "continues", "group", "leaves_as_float", "stays_wide")

    def _links(self, last: fx.Node) -> list[fx.Node]:
        chain = [last]
        while len(Placed(last).chain) > 1:
            before = chain[0].args[0]
            if not isinstance(before, fx.Node) or not Placed(before).continues or len(before.users) != 1:
                break
            chain.insert(0, before)
        return chain

    def _site(self, call: Call, part: Any, output: Grid | None, clamp: Any) -> tuple[Site, list[Any]]:
        wanted = set(quantized_operands(call))
        grids: list[Grid | None] = []
        args: list[Any] = []
        scalars: dict[int, float] = {}
        parameters = self._held_parameters(call, part)
        for name in call.entry.operand_names:
            value = call.arguments.get(name)
            if value is None:
                continue
            if isinstance(value, fx.Node) and value.op == "get_attr" and value not in self.grids:
                parameters[name] = self.edit.attributes[str(value.target)]
                continue
            if scalar(value):
                scalars[len(args)] = float(value)
            grids.append(self.grids[value] if value in wanted else None)
            args.append(self._readable(value, value in wanted))
        weight = part.weight_quantizer.grid if isinstance(call.entry.behaviour, Weighted) else None
        site = Site(
            entry=call.entry,
            attributes=self._static(call),
            inputs=tuple(grids),
            output=output,
            clamp=clamp,
            parameters=parameters,
            weight=weight,
            scalars=scalars,
            rounding=self.rounding,
        )
        return site, args

    def _readable(self, value: Any, as_integers: bool) -> Any:
        if isinstance(value, fx.Node) and value in self.grids and not as_integers:
            return self._dequantize(value)
        return value

    def _held_parameters(self, call: Call, part: nn.Module) -> dict[str, Tensor]:
        """Constant tensors that a module holds itself."""
        if isinstance(call.entry.behaviour, ChannelAffine):
            gain, offset = channel_affine_of(part)
            return {"gain": gain, "offset": offset}
        held = {name: getattr(part, name, None) for name in call.entry.operand_names[1:]}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _form(entry: OpEntry, site: Site) -> IntegerOp:
    """The integer form of an op.

    Raises:
        LevelError: it is no form, so that neither kernels nor files would know it for one.
    """
    assert entry.integer is not None, f"{entry.name} has no integer form"
    made = entry.integer(site)
    if not isinstance(made, IntegerOp):
        raise LevelError(
            f"the integer form of op {entry.name!r} is a {type(made).__name__}, which is no IntegerOp.\n"
            "  what to do: derive it from fxquant.nn.integer.IntegerOp, which holds the result's grid; see fxquant.forms."
        )
    return made
