"""Guard validation: whether what was captured holds for other calls, another batch size, another length or image size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fxquant.capture.calls import Call
from fxquant.capture.findings import Island, Specialization
from fxquant.capture.values import UNKNOWN, FakeRun, unchanged
from fxquant.graph.leveled import LeveledModule

__all__ = ["contradicted"]


def contradicted(
    module: nn.Module, graph: LeveledModule, calls: list[Call], fake: FakeRun | None, paths: dict[nn.Module, str]
) -> dict[nn.Module, Island]:
    """The parts of ``module`` whose recorded answers do not hold for inputs that ``module`` itself accepts.

    Tried are its other calls in the model, another batch size, and another length or image size. An answer to a
    comparison of lengths stays a specialization where an island would take weights out of the graph.
    """
    found: dict[nn.Module, Island] = {}
    if fake is None or not calls:
        return found
    facts = [node.meta["specialization"] for node in graph.graph.nodes if "specialization" in node.meta]
    variants: list[tuple[Call, bool]] = [(call, True) for call in calls[1:]]
    variants += _variants(calls[0], facts, fake, is_top=not paths[module])
    for call, strict in variants:
        try:
            flat = graph.meta["call"].bind(call.args, call.kwargs)
        except Exception as error:
            if not _accepts(module, call, fake):
                continue
            return {module: Island.of(error, paths[module])}
        broken = _broken(graph, fake, flat)
        if broken and not strict:
            kept = _multiplying(graph, fake, calls[0])
            broken = [(node, text) for node, text in broken
                      if node.meta["specialization"].exact or node.meta["module_path"] not in kept]  # fmt: skip
        if not broken or not _accepts(module, call, fake):
            continue
        for node, text in broken:
            part = module.get_submodule(node.meta["module_path"])
            found[part] = Island(
                paths[part], f"its Python depends on {'the batch' if strict else 'a'} size ({text})",
                node.meta["specialization"].source, "keep sizes symbolic: use tensors and shapes, not Python numbers",
            )  # fmt: skip
    return found


def _variants(call: Call, facts: list[Specialization], fake: FakeRun, *, is_top: bool) -> Iterator[tuple[Call, bool]]:
    """Calls like ``call`` with another batch, and with other lengths where a length itself was needed."""
    shapes = [t.shape for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, torch.Tensor)]
    first = next((shape for shape in shapes if len(shape) > 0), None)
    if is_top and any(isinstance(a, list) and a for a in (*call.args, *call.kwargs.values())):
        longer = [[*a, a[-1]] if isinstance(a, list) and a else a for a in call.args]
        named = {k: [*a, a[-1]] if isinstance(a, list) and a else a for k, a in call.kwargs.items()}
        yield Call(tuple(longer), named), True
    if first is not None and facts:
        yield Call(*fake.resized((call.args, call.kwargs), _another_batch(first[0]))), True
        yield Call(*fake.resized((call.args, call.kwargs), _another_length(first))), False


def _accepts(module: nn.Module, call: Call, fake: FakeRun) -> bool:
    """Whether the module itself runs on ``call``, as far as shapes tell."""
    try:
        with unchanged(module):
            fake(module.forward, call.args, call.kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return True
    except Exception:
        return False
    return True


class _Evaluation(fx.Interpreter):
    """Evaluates a graph on fake tensors, node by node; what fails is `UNKNOWN`, and so is what reads it.

    Args:
        seen: called with each check of a specialization and the value it would check.
    """

    def __init__(self, module: fx.GraphModule, fake: FakeRun, seen: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False
        self._fake, self._seen = fake, seen

    def run_node(self, n: fx.Node) -> Any:
        inputs = [self.env[node] for node in n.all_input_nodes]
        if n.op == "call_function" and getattr(n.target, "is_check", False):
            self._seen(n, inputs[0])
            return None
        if any(value is UNKNOWN for value in inputs):
            return UNKNOWN
        try:
            return super().run_node(n) if n.op == "placeholder" else self._fake(super().run_node, (n,), {})
        except Exception:
            return UNKNOWN


class _Products(_Evaluation):
    """Notes the nodes that multiply by a parameter themselves."""

    def __init__(self, module: fx.GraphModule, fake: FakeRun) -> None:
        super().__init__(module, fake, lambda node, value: None)
        self.found: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        held = [self.env[node] for node in n.all_input_nodes if node.op == "get_attr"]
        if n.op == "call_module" or not any(isinstance(value, nn.Parameter) for value in held):
            return super().run_node(n)
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        if counter.get_total_flops():
            self.found.add(n)
        return value


def _multiplying(graph: LeveledModule, fake: FakeRun, call: Call) -> set[str]:
    """The modules that multiply by parameters in functions: as islands they would not be quantized."""
    products = _Products(graph, fake)
    with unchanged(graph), suppress(Exception):
        products.run(*fake.of(graph.meta["call"].bind(call.args, call.kwargs)))
    return {node.meta["module_path"] for node in products.found}


def _broken(graph: LeveledModule, fake: FakeRun, flat: list[Any]) -> list[tuple[fx.Node, str]]:
    """The checks of ``graph`` that fail on the inputs ``flat``."""
    found: list[tuple[fx.Node, str]] = []

    def seen(node: fx.Node, value: Any) -> None:
        expected, text = node.args[1], node.args[2]
        if value is UNKNOWN:  # what it depends on can only be had with data: an exact number may well change
            if node.meta["specialization"].exact:
                found.append((node, str(text)))
            return
        value = bool(value) if type(expected) is bool else value
        if value != expected:
            found.append((node, str(text)))

    with unchanged(graph):
        try:
            _Evaluation(graph, fake, seen).run(*fake.of(flat))
        except Exception:
            return found
    return found


def _another_batch(batch: int) -> Callable[[torch.Size], tuple[int, ...]]:
    return lambda shape: (batch + 1, *shape[1:]) if shape and shape[0] == batch else tuple(shape)


def _another_length(first: torch.Size) -> Callable[[torch.Size], tuple[int, ...]]:
    def change(shape: torch.Size) -> tuple[int, ...]:
        if len(first) >= 4 and len(shape) >= 4:
            return (*shape[:-2], shape[-2] + 32, shape[-1] + 32)
        if len(first) in (2, 3) and len(shape) >= 2:
            return (shape[0], *(size + 1 if size == first[1] else size for size in shape[1:]))
        return tuple(shape)

    return change
