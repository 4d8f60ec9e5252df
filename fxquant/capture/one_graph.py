"""One module as one graph: its arguments as placeholders, what it returns as an output, and facts on every node."""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.call_spec import CallSpec, bind_example, put_together, take_apart
from fxquant.capture.calls import Call
from fxquant.capture.proxies import find_proxy
from fxquant.capture.tracing import Tracer, TrainingFlag
from fxquant.capture.values import UNKNOWN, unchanged
from fxquant.errors import Refusal
from fxquant.graph.leveled import LeveledModule, is_container

__all__ = ["multiplies", "trace_module"]


def trace_module(
    tracer: Tracer, module: nn.Module, calls: list[Call], *, may_overwrite: bool, keep_unused: bool
) -> LeveledModule:
    """Trace ``module``'s forward into a graph at level *captured*.

    Args:
        tracer: a fresh one.
        calls: examples; the first is traced. Without any, sizes are not known.
        may_overwrite: whether the caller does not mind that what forward overwrites of its input stays as it was.
        keep_unused: keep modules that the graph does not use, so that a float checkpoint still loads.

    Raises:
        Exception: whatever stopped the trace.
    """
    function = module.forward
    bound = _bound(function, calls[0] if calls else None)
    given = _given(function, calls[0] if calls else None)
    signature, trees, ranks = inspect.signature(function), {}, []

    def inputs(tracer: Tracer) -> tuple[Any, Any]:
        def leaf(name: str, value: Any) -> Any:
            ranks.append(value.dim() if isinstance(value, torch.Tensor) else None)
            return tracer.place(_free_name(tracer, name), value)

        for name, value in bound.items():
            if name in given:
                trees[name], bound[name] = take_apart(value, name, leaf)
            else:
                trees[name] = ("constant", value)
        taken = OrderedDict((name, value) for name, value in bound.items() if name in given)
        return _as_called(signature, taken, len(calls[0].args) if calls else len(taken))

    with unchanged(module):
        graph, result = tracer.run(module, function, inputs)
        spec = CallSpec(list(signature.parameters.values()), trees, given)
        spec.output = _write_output(tracer, graph, result)
        spec.ranks = ranks if tracer.uses_ranks and calls else None
        spec.asks_mode = tracer.asked_mode
        if not may_overwrite and any(node.meta.get("writes") == "input" for node in graph.nodes):
            raise Refusal("it writes in place into its input", "write out of place, as y = f(x)")
    _note_values(tracer, graph)
    _prune(tracer, graph)
    return _leveled(tracer, module, graph, spec, follows_memory=bool(calls), keep_unused=keep_unused)


def _bound(function: Callable[..., Any], call: Call | None) -> OrderedDict[str, Any]:
    if call is not None:
        return OrderedDict(bind_example(function, call.args, call.kwargs).arguments)
    found: OrderedDict[str, Any] = OrderedDict()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            found[name] = () if parameter.kind is parameter.VAR_POSITIONAL else {}
        else:
            found[name] = UNKNOWN if parameter.default is parameter.empty else parameter.default
    return found


def _given(function: Callable[..., Any], call: Call | None) -> list[str]:
    signature = inspect.signature(function)
    if call is not None:
        return list(signature.bind(*call.args, **call.kwargs).arguments)
    return [name for name, p in signature.parameters.items() if p.default is p.empty and p.kind.value in (0, 1, 3)]


def _as_called(signature: inspect.Signature, taken: OrderedDict[str, Any], positional: int) -> tuple[Any, Any]:
    """Arguments as the example gave them: the first ``positional`` by position, the others by name."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in taken.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif kind is not inspect.Parameter.KEYWORD_ONLY and len(args) < positional:
            args.append(value)
        else:
            kwargs[name] = value
    return args, kwargs


def _free_name(tracer: Tracer, name: str) -> str:
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    taken = {str(node.target) for node in tracer.graph.nodes if node.op == "placeholder"}
    while name in taken:
        name += "_"
    return name


def _write_output(tracer: Tracer, graph: fx.Graph, result: Any) -> Any:
    """End ``graph``; returns the structure to restore where fx's own containers do not tell it."""
    leaves: list[Any] = []

    def leaf(name: str, value: Any) -> Any:
        tracer.memory.refuse_stale(None, (value,), {})
        made = tracer.create_arg(value) if find_proxy(value) is not None or isinstance(value, torch.Tensor) else value
        leaves.append(made)
        return made

    tree, _ = take_apart(result, "output", leaf)
    is_plain = _is_plain(tree)
    node = graph.output(put_together(tree, list(leaves)) if is_plain else tuple(leaves))
    node.meta["module_path"] = ""
    return None if is_plain else tree


def _is_plain(tree: Any) -> bool:
    if tree[0] == "leaf":
        return True
    if tree[0] == "constant":
        return tree[1] is None or isinstance(tree[1], (bool, str))
    return tree[0] != "fields" and tree[1] in (list, tuple, dict) and all(_is_plain(item) for _, item in tree[2])


def _note_values(tracer: Tracer, graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = tracer.values.get(node, UNKNOWN)
        if isinstance(value, torch.Tensor):
            node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
        elif value is not UNKNOWN:
            node.meta["dtype"] = type(value).__name__
        part = None
        if node.op == "call_module" and node is not tracer.flag:
            part = tracer.root.get_submodule(str(node.target))
        if part is not None and part in tracer.leaves:
            node.meta["island"] = tracer.leaves[part]


def _prune(tracer: Tracer, graph: fx.Graph) -> None:
    """Take out readings of shapes and parts of containers that nothing uses."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op not in ("call_function", "call_method", "get_attr"):
            continue
        value = tracer.values.get(node, UNKNOWN)
        reads = node.op == "get_attr" or node.target in (operator.getitem, getattr)
        measures = not isinstance(value, torch.Tensor) and value is not UNKNOWN and value is not None
        if (reads or measures) and "specialization" not in node.meta:
            graph.erase_node(node)


def _leveled(
    tracer: Tracer, owner: nn.Module, graph: fx.Graph, spec: CallSpec, *, follows_memory: bool, keep_unused: bool
) -> LeveledModule:
    constants = tracer.constants
    asks = any(node.op == "call_module" and node.target == "training_flag" for node in graph.nodes)
    if asks:
        owner._modules["training_flag"] = TrainingFlag().train(owner.training)
    owner.__dict__.update(constants)
    places = {path: owner.get_submodule(path.rpartition(".")[0]) for path in tracer.plain}
    norms = {path: place._modules[path.rpartition(".")[2]] for path, place in places.items()}
    for path, place in places.items():
        place._modules[path.rpartition(".")[2]] = tracer.plain[path]
    try:
        module = LeveledModule(owner, graph, type(owner).__name__)
    finally:
        for path, place in places.items():
            place._modules[path.rpartition(".")[2]] = norms[path]
        owner._modules.pop("training_flag", None)
        for name in constants:
            owner.__dict__.pop(name)
    for name, part in module.named_modules():
        if is_container(part) or part is module:
            part.training = owner.get_submodule(name).training
    module.meta.update(level="captured", call=spec, path=tracer.prefix, follows_memory=follows_memory)
    if keep_unused:
        module.keep_unused(owner)
        module.adopt_order(owner)
    module.stand_for(owner)
    parts = set(owner._modules) - {"parametrizations"}
    if type(owner).__module__.startswith("torch.nn") and not parts:  # a layer of its own: its one op bears its name
        module.meta["layer"] = type(owner)
    return module


def multiplies(graph: LeveledModule, *, functions_only: bool = False) -> bool:
    """Whether a graph multiplies by weights, in modules or functions: there is something to quantize in it."""
    for node in graph.graph.nodes:
        part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if part is not None and not functions_only and any(p.dim() >= 2 for p in part.parameters()):
            return True
        if node.op == "get_attr":
            held: Any = graph
            for name in str(node.target).split("."):
                held = getattr(held, name)
            if isinstance(held, torch.Tensor) and held.dim() >= 2 and held.is_floating_point():
                return True
    return False
