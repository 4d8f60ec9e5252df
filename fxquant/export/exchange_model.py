"""A model of any level as one in exchange form, with the model that its numbers are held against."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.calls import Call, as_call
from fxquant.capture.islands import graphs_of, level_of, map_graphs
from fxquant.errors import InputError, LevelError
from fxquant.export.signature import FlatModel, Signature
from fxquant.flow import convert, freeze
from fxquant.graph.leveled import LeveledModule
from fxquant.inputs import make_inputs
from fxquant.nn.exchange import Exchanged, Rounding, Stored
from fxquant.passes.levels import check
from fxquant.passes.to_exchange import to_exchange
from fxquant.targets import X86, Target

__all__ = ["ExchangeModel", "example_call", "integer_model", "narrow_weights", "needed_bits"]


class ExchangeModel:
    """What is written to a file, and what it is compared with.

    Args:
        model: calibrated, frozen or integer.
        example_inputs: as for ``prepare``; None for noise of the shapes that it was prepared with.

    Attributes:
        flat: the exchange form, from tensors to a tuple of tensors.
        reference: the frozen model, likewise; the integer model where that was given.
        inputs: the example's tensors.
        target: what it was prepared for.
        float_dtype: what its recipe lets a runtime compute its floats in.

    Raises:
        LevelError, CalibrationError: the model is not ready.
        InputError: there is no example, or it does not fit.
    """

    def __init__(self, model: Any, example_inputs: Any = None) -> None:
        model = _at_rest(model)
        frozen = freeze(model) if level_of(model) == "prepared" else model
        integer = frozen if level_of(frozen) == "integer" else convert(frozen)
        settings = next(iter(graphs_of(integer).values())).settings
        self.target: Target = settings.get("target", X86)
        self.float_dtype: str = settings["recipe"].float_dtype
        into = partial(to_exchange, integer_biases=self.target.integer_biases)
        exchange = map_graphs(integer, lambda graph: check(into(graph), by="to_exchange")).eval()
        call = _on_cpu(example_call(model, example_inputs))
        self.signature = Signature(exchange, call)
        self.flat = FlatModel(_on_cpu(exchange), self.signature)
        self.reference = FlatModel(_on_cpu(frozen), self.signature)
        self.inputs = self.signature.tensors(call.args, call.kwargs)
        self.expected = self.run(self.inputs)

    @torch.no_grad()
    def run(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The reference's outputs."""
        outputs: tuple[Tensor, ...] = self.reference(*(x.clone() for x in tensors))
        return outputs

    @torch.no_grad()
    def integers(self, tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
        """What each rounding of the exchange form makes, by its path, in the order of execution."""
        found: list[tuple[str, Tensor]] = []

        def keep(path: str, part: Rounding) -> Any:
            return part.register_forward_hook(
                lambda _, args, __: found.append((path, part.spot.integers(part.clamped(args[0].float()))))
            )

        hooks = [keep(p, m) for p, m in self.flat.model.named_modules() if isinstance(m, Rounding)]
        try:
            self.flat(*(x.clone() for x in tensors))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def output_scales(self) -> list[float | None]:
        """The step of each output's grid; None where the output is not rounded."""
        graph = self.flat.model
        unknown: list[float | None] = [None] * len(self.expected)
        if not isinstance(graph, LeveledModule):
            return unknown
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        value = output.args[0]
        nodes = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(nodes) != len(unknown):
            return unknown
        return [self._scale(graph, node) for node in nodes]

    @staticmethod
    def _scale(graph: LeveledModule, node: Any) -> float | None:
        part: Any = graph.get_submodule(str(node.target)) if getattr(node, "op", "") == "call_module" else None
        rounding = part.rounding if isinstance(part, Exchanged) else part
        return rounding.spot.scale if isinstance(rounding, Rounding) else None


def integer_model(model: Any) -> Any:
    """``model`` converted, if it is not yet.

    Raises:
        LevelError, CalibrationError: it is not ready.
    """
    model = _at_rest(model)
    return model if level_of(model) == "integer" else convert(model)


def needed_bits(model: nn.Module) -> tuple[set[int], set[int]]:
    """The widths of the integers in an exchange form: of its tensors, and of its weights and biases as they are stored."""
    tensors = {part.spot.bits for part in model.modules() if isinstance(part, Rounding)}
    weights = {max(4, 1 << (part.bits - 1).bit_length()) for part in model.modules() if isinstance(part, Stored)}
    return tensors, weights


def narrow_weights(model: nn.Module) -> set[str]:
    """The names of the buffers of an exchange form whose integers fit into 4 bits."""
    return {f"{path}.integers" for path, part in model.named_modules() if isinstance(part, Stored) and part.bits <= 4}


def _at_rest(model: Any) -> Any:
    """``model`` in eval mode: a copy where it is being trained, since parts of it are shared with what is made of it."""
    level = level_of(model) if isinstance(model, nn.Module) else None
    if level in ("prepared", "frozen", "integer"):
        return copy.deepcopy(model).eval() if any(part.training for part in model.modules()) else model
    what = f"a {type(model).__name__}" if level is None else f"a model at level {level!r}"
    raise LevelError(
        f"export_onnx and compile take a calibrated, frozen or converted model; this was given {what}.\n"
        "  what to do: give what fxquant.prepare and fxquant.calibrate, or fxquant.convert, return."
    )


def example_call(model: Any, example_inputs: Any) -> Call:
    """The call that ``example_inputs`` stand for; None for noise of the shapes that ``model`` was prepared with.

    Raises:
        InputError: there are none.
    """
    if example_inputs is not None:
        return as_call(model, example_inputs)
    described = next(iter(graphs_of(model).values())).settings.get("inputs")
    if described is None:
        raise InputError(
            "example_inputs are missing: the model was prepared without any, and a file needs shapes.\n"
            "  what to do: give example_inputs, as for fxquant.prepare."
        )
    generator = torch.Generator().manual_seed(0)
    made = make_inputs(described, torch.device("cpu"))
    return as_call(model, _map(made, lambda x: torch.randn(x.shape, generator=generator).to(x.dtype)))


def _map(value: Any, change: Any) -> Any:
    """``value`` with ``change`` made to the floating tensors in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return type(value)(_map(item, change) for item in value) if isinstance(value, (list, tuple)) else value


def _on_cpu(value: Any) -> Any:
    """A copy of a model or call on the CPU; itself where it is there already."""
    if isinstance(value, Call):
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), (value.args, value.kwargs))
        return Call(args, kwargs)
    tensors = [*value.parameters(), *value.buffers()]
    return value if all(x.device.type == "cpu" for x in tensors) else copy.deepcopy(value).cpu()
