"""A model of any level as one in QDQ form, with the model that its numbers are held against."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.calls import Call
from fxquant.capture.islands import graphs_of, islands_of, map_graphs
from fxquant.capture.values import unchanged
from fxquant.export.deployment import Deployment
from fxquant.export.signature import FlatModel, Signature
from fxquant.export.tolerance import exact_outputs, least_sqnr
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.qdq import RealOp, Rounding, Stored
from fxquant.passes.levels import check
from fxquant.passes.to_qdq import to_qdq
from fxquant.targets import X86, Target

__all__ = ["QdqModel", "narrow_weights", "needed_bits"]


class QdqModel:
    """What is written to a file, and what it is compared with.

    Args:
        model: calibrated, frozen or integer; or deployed.
        example_inputs: as for ``prepare``; None for noise of the shapes that it was prepared with.

    Attributes:
        flat: the QDQ form, from tensors to a tuple of tensors.
        reference: the frozen model, likewise; the integer model where that was given.
        integer: the integer model.
        inputs: the example's tensors.
        target: what it was prepared for.
        written: the buffers that forward writes into, by name: a file has no state.
        float_dtype: what its recipe lets a runtime compute its floats in.

    Raises:
        LevelError, CalibrationError: the model is not ready.
        InputError: there is no example, or it does not fit.
    """

    def __init__(self, model: Any, example_inputs: Any = None) -> None:
        deployment = Deployment.of(model, example_inputs)
        frozen, integer = deployment.frozen, deployment.integer
        settings = next(iter(graphs_of(integer).values())).settings
        self.integer, self._call = _on_cpu(integer), _on_cpu(deployment.example)
        self.written = tuple(sorted({*_written_buffers(integer), *_written_by_islands(self.integer, self._call)}))
        self.target: Target = settings.get("target", X86)
        self.float_dtype: str = settings["recipe"].float_dtype
        into = partial(to_qdq, integer_biases=self.target.integer_biases)
        qdq = map_graphs(integer, lambda graph: check(into(graph), by="to_qdq")).eval()
        if not self.target.packs_weights:
            for part in qdq.modules():
                if isinstance(part, Stored):
                    part.bits = max(part.bits, 8)
        call = self._call
        self.signature = Signature(qdq, call)
        self.flat = FlatModel(_on_cpu(qdq), self.signature)
        self.reference = FlatModel(_on_cpu(frozen), self.signature)
        self.inputs = self.signature.tensors(call.args, call.kwargs)
        self.expected = self.reference_outputs(self.inputs)

    @torch.no_grad()
    def reference_outputs(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The reference's outputs, from the state that the file begins with."""
        with self._at_first(self.reference):
            outputs: tuple[Tensor, ...] = self.reference(*(x.clone() for x in tensors))
        return outputs

    def _at_first(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, ``model`` may write its buffers; afterwards they are what they were."""
        return unchanged(model) if self.written else nullcontext()

    def tensor_bits(self) -> set[int]:
        """The widths of the rounded tensors."""
        return needed_bits(self.flat)[0]

    def least_sqnr(self) -> float:
        """Decibels to which a runtime has to agree on the example; see ``tolerance``."""
        return least_sqnr(self.integer, self._call, exact_outputs(self.integer, self._call))

    @torch.no_grad()
    def integers(self, tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
        """What each rounding of the QDQ form makes, by its path, in the order of execution."""
        found: list[tuple[str, Tensor]] = []

        def keep(path: str, part: Rounding) -> Any:
            return part.register_forward_hook(
                lambda _, args, __: found.append((path, part.spot.integers(part.clamped(args[0].float()))))
            )

        hooks = [keep(p, m) for p, m in self.flat.model.named_modules() if isinstance(m, Rounding)]
        try:
            with self._at_first(self.flat):
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
        rounding = part.rounding if isinstance(part, RealOp) else part
        return rounding.spot.scale if isinstance(rounding, Rounding) else None


def _written_buffers(model: nn.Module) -> tuple[str, ...]:
    """The buffers that graphs of ``model`` write into, by their paths in it."""
    found = []
    for path, graph in graphs_of(model).items():
        writes = [node for node in graph.graph.nodes if node.meta.get("writes") == "attribute"]
        read = {source for node in writes for source in node.all_input_nodes[:1] if source.op == "get_attr"}
        found += [f"{path}.{node.target}" if path else str(node.target) for node in read]
    return tuple(sorted(found))


@torch.no_grad()
def _written_by_islands(model: nn.Module, call: Call) -> list[str]:
    """The buffers that ``model`` writes in a call where it runs its author's own code, in which no graph shows that."""
    if not islands_of(model):
        return []
    with unchanged(model):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(*call.args, **call.kwargs)
        after = dict(model.named_buffers())
        return [name for name, x in after.items() if name not in before or not torch.equal(x, before[name])]


def needed_bits(model: nn.Module) -> tuple[set[int], set[int]]:
    """The widths of the integers in an QDQ form: of its tensors, and of its weights and biases as they are stored."""
    tensors = {part.spot.bits for part in model.modules() if isinstance(part, Rounding)}
    weights = {max(4, 1 << (part.bits - 1).bit_length()) for part in model.modules() if isinstance(part, Stored)}
    return tensors, weights


def narrow_weights(model: nn.Module) -> set[str]:
    """The names of the buffers of an QDQ form whose integers fit into 4 bits."""
    return {f"{path}.integers" for path, part in model.named_modules() if isinstance(part, Stored) and part.bits <= 4}


def _on_cpu(value: Any) -> Any:
    """A copy of a model or call on the CPU; itself where it is there already."""
    if isinstance(value, Call):
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), (value.args, value.kwargs))
        return Call(args, kwargs)
    tensors = [*value.parameters(), *value.buffers()]
    return value if all(x.device.type == "cpu" for x in tensors) else copy.deepcopy(value).cpu()
