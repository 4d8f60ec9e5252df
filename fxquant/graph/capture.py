"""Capturing a model: from an ``nn.Module`` as its author wrote it to graphs that compute the same, bit for bit.

The model is copied first and never touched. What cannot be traced makes the smallest submodule an island that runs its
own code, and the parts of an island that can be traced become graphs inside it, at any depth.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from fxquant.errors import CaptureError, InputError
from fxquant.graph.call_spec import CallSpec, bind_example, put_together, take_apart
from fxquant.graph.calls import Call
from fxquant.graph.findings import Island, Specialization
from fxquant.graph.islands import graphs_of, mark_island
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.proxies import Untraceable, find_proxy
from fxquant.graph.tracing import Tracer, TrainingFlag
from fxquant.graph.values import UNKNOWN, Evaluation, FakeRun, unchanged
from fxquant.graph.witness import Witness

__all__ = ["TrainingFlag", "as_call", "capture"]

_ROUNDS = 12
_NAMED = "it was named as a leaf"


def capture(
    model: nn.Module, example_inputs: Any = None, *, for_training: bool = True, leaves: Iterable[str | type] = ()
) -> Any:
    """Trace a copy of ``model`` into graphs at level *captured*.

    Args:
        model: any eager module. ``DataParallel``, DDP and ``torch.compile`` wrappers are taken off.
        example_inputs: what one call takes, see `as_call`; without it Python's questions about shapes have no answer.
        for_training: keep the mode a question asked at run time; otherwise trace what eval mode does.
        leaves: paths or classes of modules to leave as they are.

    Returns:
        A ``LeveledModule``; or, where the top module could not be traced, that module with graphs inside.

    Raises:
        InputError: ``model`` is not an eager ``nn.Module`` (scripted, exported, already quantized, a class, a function),
            or does not run on ``example_inputs``.
        CaptureError: no part of it could be traced; the message names the module, the line and the cause.
    """
    model = _check_model(_unwrapped(model))
    owned = copy.deepcopy(model, {id(t): t.detach().clone() for t in _results_kept(model)})
    for path, part in list(owned.named_modules()):
        if path and _unwrapped(part) is not part:
            owned.set_submodule(path, _unwrapped(part))
    if not for_training:
        _settle_parametrizations(owned.eval())
    if type(model).__module__.startswith("torch.nn") and not isinstance(model, nn.Sequential):
        owned = nn.Sequential(OrderedDict([(type(model).__name__.lower(), owned)])).train(owned.training)
    call = None if example_inputs is None else as_call(model, example_inputs)
    with _same_random_numbers():
        return _Capture(owned, call, for_training=for_training, leaves=tuple(leaves)).whole(type(model).__name__)


def as_call(model: nn.Module, example_inputs: Any) -> Call:
    """The call that ``example_inputs`` stands for.

    A tuple or list holds positional arguments; a dict whose keys are names of forward's parameters holds keyword
    arguments; anything else is the only argument.
    """
    if isinstance(example_inputs, (tuple, list)) and not hasattr(example_inputs, "_fields"):
        return Call(tuple(example_inputs), {})
    if isinstance(example_inputs, dict) and type(example_inputs) in (dict, OrderedDict):
        parameters = inspect.signature(model.forward).parameters.values()
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        required = {p.name for p in parameters if p.default is p.empty and p.name in named}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if required <= set(example_inputs) and (set(example_inputs) <= named or open_ended):
            return Call((), dict(example_inputs))
    return Call((example_inputs,), {})


class _Capture:
    """One model being captured: its islands and graphs so far."""

    def __init__(self, model: nn.Module, call: Call | None, *, for_training: bool, leaves: tuple[str | type, ...]) -> None:
        self.model, self.call, self.for_training = model, call, for_training
        self.fake = None if call is None else FakeRun()
        self.paths = {module: path for path, module in model.named_modules()}
        self.submodules = set(self.paths)
        self.islands: dict[nn.Module, Island] = {}
        self.graphs: dict[nn.Module, LeveledModule] = {}
        self.named = self._named(leaves)
        self.calls: dict[nn.Module, list[Call]] = {}
        self._witness: Witness | None = None
        self._filled: set[nn.Module] = set()

    def _named(self, leaves: tuple[str | type, ...]) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for leaf in leaves:
            hits = [m for m, p in self.paths.items() if p == leaf or (isinstance(leaf, type) and isinstance(m, leaf))]
            if not hits:
                raise InputError(
                    f"leaves names {leaf!r}, which the model does not contain.\n"
                    f"  what to do: give a module's path, as one of {', '.join(list(self.paths.values())[1:6])}, or a class."
                )
            found.update(hits)
        for module in found:
            self.islands[module] = Island(self.paths[module], _NAMED, None, "take it off leaves=", is_named=True)
        return found

    @property
    def witness(self) -> Witness:
        """One real run of the model, made when it is first needed."""
        if self._witness is None:
            assert self.call is not None and self.fake is not None
            self._witness = Witness(self.model, self.call.args, self.call.kwargs, self.fake)
        return self._witness

    def whole(self, name: str) -> Any:
        """The captured model."""
        calls = []
        if self.call is not None and self.fake is not None:
            calls = [Call(*self.fake.of((self.call.args, self.call.kwargs)))]
        graph = None if self.model in self.named else self.graph_of(self.model, calls)
        if graph is not None:
            graph.__class__.__name__ = name
            return graph
        self.fill(self.model)
        if not graphs_of(self.model):
            raise self._nothing(name)
        return self.model

    def graph_of(self, module: nn.Module, calls: list[Call]) -> LeveledModule | None:
        """``module`` as a graph, with the islands inside it filled; None, and an island noted, where it cannot be."""
        path, known = self.paths[module], set(self.islands)
        for _ in range(_ROUNDS):
            tracer = Tracer(self.fake, self.islands, for_training=self.for_training, prefix=path)
            try:
                graph = self._trace(tracer, module, calls)
            except InputError:
                raise
            except Exception as error:
                for part in set(self.islands) - known:
                    del self.islands[part]
                self._note(module, Island.of(error, path))
                return None
            contradicted = self._contradicted(module, graph, calls)
            if module in contradicted:
                self._note(module, contradicted[module])
                return None
            if not contradicted:
                break
            for part, island in contradicted.items():
                self._note(part, island)
        for made in tracer.calls.values():
            for part, given in made.items():
                self.calls.setdefault(part, []).extend(given)
        for node in graph.graph.nodes:
            part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if part is not None and part in self.islands:
                self.fill(part)
        return graph

    def _note(self, module: nn.Module, island: Island) -> None:
        self.islands[module] = island
        if self.call is not None:
            _ = self.witness  # a model that does not run on its example is an error, not an island

    # ---- one graph

    def _trace(self, tracer: Tracer, module: nn.Module, calls: list[Call]) -> LeveledModule:
        known = set(self.islands)
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
            self._refuse_written_inputs(module, graph)
        if self.call is not None and set(self.islands) - known:
            _ = self.witness
        _note_values(tracer, graph)
        _prune(tracer, graph)
        return _leveled(module, graph, spec, self.paths[module], tracer.constants,
                        follows_memory=bool(calls), for_training=self.for_training and module in self.submodules)

    def _refuse_written_inputs(self, module: nn.Module, graph: fx.Graph) -> None:
        """A part of an island may not write into what it is given: its graph would not."""
        if module is self.model:
            return
        if any(node.meta.get("writes") == "input" for node in graph.nodes):
            raise Untraceable("it writes in place into its input", "write out of place, as y = f(x)")

    # ---- specializations that other inputs contradict

    def _contradicted(self, module: nn.Module, graph: LeveledModule, calls: list[Call]) -> dict[nn.Module, Island]:
        """The parts of ``module`` whose recorded answers do not hold for inputs that ``module`` itself accepts.

        Tried are its other calls in the model, another batch size, and another length or image size. An answer to a
        comparison of lengths stays a specialization where an island would take weights out of the graph.
        """
        found: dict[nn.Module, Island] = {}
        if self.fake is None or not calls:
            return found
        facts = [node.meta["specialization"] for node in graph.graph.nodes if "specialization" in node.meta]
        variants: list[tuple[Call, bool]] = [(call, True) for call in calls[1:]]
        variants += self._variants(module, calls[0], facts)
        for call, strict in variants:
            try:
                flat = graph.meta["call"].bind(call.args, call.kwargs)
            except Exception as error:
                if not self._accepts(module, call):
                    continue
                return {module: Island.of(error, self.paths[module])}
            broken = [(node, text) for node, text in _broken(graph, self.fake, flat)
                      if strict or node.meta["specialization"].exact or not _multiplies_itself(graph, node)]  # fmt: skip
            if not broken or not self._accepts(module, call):
                continue
            for node, text in broken:
                part = module.get_submodule(node.meta["module_path"])
                found[part] = Island(
                    self.paths[part], f"its Python depends on {'the batch' if strict else 'a'} size ({text})",
                    node.meta["specialization"].source, "keep sizes symbolic: use tensors and shapes, not Python numbers",
                )  # fmt: skip
        return found

    def _variants(self, module: nn.Module, call: Call, facts: list[Specialization]) -> Iterator[tuple[Call, bool]]:
        """Calls like ``call`` with another batch, and with other lengths where a length itself was needed."""
        assert self.fake is not None
        shapes = [t.shape for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, torch.Tensor)]
        first = next((shape for shape in shapes if len(shape) > 0), None)
        if module is self.model and any(isinstance(a, list) and a for a in (*call.args, *call.kwargs.values())):
            longer = [[*a, a[-1]] if isinstance(a, list) and a else a for a in call.args]
            named = {k: [*a, a[-1]] if isinstance(a, list) and a else a for k, a in call.kwargs.items()}
            yield Call(tuple(longer), named), True
        if first is not None and facts:
            yield Call(*self.fake.resized((call.args, call.kwargs), _another_batch(first[0]))), True
        if first is not None and facts:
            yield Call(*self.fake.resized((call.args, call.kwargs), _another_length(first))), False

    def _accepts(self, module: nn.Module, call: Call) -> bool:
        assert self.fake is not None
        try:
            with unchanged(module):
                self.fake(module.forward, call.args, call.kwargs)
        except (torch._subclasses.fake_tensor.DataDependentOutputException,
                torch._subclasses.fake_tensor.DynamicOutputShapeException):  # fmt: skip
            return True
        except Exception:
            return False
        return True

    # ---- islands

    def fill(self, island: nn.Module) -> None:
        """Capture the parts of an island, and put their graphs where they were."""
        if island in self._filled:
            return
        self._filled.add(island)
        mark_island(island, self.islands[island])
        if island in self.named:
            return
        inside = self._fill_methods(island)
        for part, calls in self._parts(island):
            if part in self.named or part in self._filled or not _has_weights(part):
                continue
            if part not in self.graphs:
                if calls and inside and all(call.method in inside for call in calls):
                    continue
                self._capture_part(part, calls)
        _replace(island, self.graphs)

    def _capture_part(self, part: nn.Module, calls: list[Call]) -> None:
        outside = self._called_from_outside(part)
        if outside is not None:
            self._note(part, Island(self.paths[part], f"its method {outside} is called from outside", None,
                                    "call it through forward"))  # fmt: skip
        graph = None if part in self.islands else self.graph_of(part, calls)
        if graph is None:
            self.fill(part)
        elif _multiplies(graph):
            self.graphs[part] = graph

    def _parts(self, island: nn.Module) -> list[tuple[nn.Module, list[Call]]]:
        """The modules that an island calls itself, with their calls; without an example, those nearest below it.

        The calls are those seen when the graph around the island was traced, which calls it as it will be called; or
        those of the real run, where that did not get so far.
        """
        if self.call is None:
            return [(part, []) for part in _nearest(island)]
        found = []
        for part, calls in self.witness.calls.items():
            own = [call for call in calls if call.caller is island]
            seen = [call for call in self.calls.get(part, ()) if call.caller is island]
            if own and part in self.paths:
                found.append((part, seen or own))
        return found

    def _called_from_outside(self, part: nn.Module) -> str | None:
        if self.call is None:
            return None
        for (owner, name), calls in self.witness.methods.items():
            if owner is part and any(call.caller is not part for call in calls):
                return name
        return None

    def _fill_methods(self, island: nn.Module) -> set[str]:
        """Capture an island's own methods that multiply by weights; the names of those that could be."""
        done: set[str] = set()
        if self.call is None:
            return done
        for (owner, name), calls in self.witness.methods.items():
            own = [call for call in calls if call.caller is island and call.method is None]
            if owner is not island or not own or len(own) != len(calls):
                continue
            graph = self._method_graph(island, name, own)
            if graph is not None and _multiplies(graph, functions_only=True):
                island.__dict__[name] = graph
                island._modules[name] = graph
                done.add(name)
        return done

    def _method_graph(self, island: nn.Module, name: str, calls: list[Call]) -> LeveledModule | None:
        twin = copy.copy(island)
        twin.__dict__["forward"] = getattr(type(island), name).__get__(twin)
        self.paths[twin] = self.paths[island]
        before = dict(self.islands)
        try:
            tracer = Tracer(self.fake, self.islands, for_training=self.for_training, prefix=self.paths[island])
            graph = self._trace(tracer, twin, calls)
            if set(self.islands) == set(before) and not self._contradicted(twin, graph, calls):
                return graph
        except Exception:
            pass
        finally:
            del self.paths[twin]
        self.islands = before
        return None

    def _nothing(self, name: str) -> CaptureError:
        deepest = max(self.islands.values(), key=lambda found: len(found.path.split(".")) if found.path else 0)
        where = f"module {deepest.path!r}" if deepest.path else f"the top module ({name})"
        return CaptureError(
            f"{name} could not be traced, nor any part of it that multiplies by weights.\n"
            f"  where: {where}, {deepest.source or 'source unknown'}\n"
            f"  cause: {deepest.cause}\n"
            f"  what to do: {deepest.advice}; or move the untraceable part into a submodule of its own, which then runs "
            "as it is while the rest is captured."
        )


# ---- models


def _unwrapped(model: Any) -> Any:
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod") and isinstance(model, nn.Module):
            model = model._orig_mod
        else:
            return model


def _check_model(model: Any) -> nn.Module:
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InputError(
            f"prepare was given the class {model.__name__}, not a model: call it first, {model.__name__}(...)."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{type(model).__name__} is a TorchScript module: its Python is gone and cannot be rewritten. "
            "Give fxquant the nn.Module it was scripted from."
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"prepare takes an nn.Module, not {type(model).__name__}.")
    for path, module in model.named_modules():
        if isinstance(module, LeveledModule):
            raise InputError(f"this model is already {module.level}: prepare takes the float model it was made from.")
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{path} is a TorchScript module: its Python is gone and cannot be rewritten. "
                "Put the nn.Module it was scripted from in its place."
            )
        if not type(module).__name__.endswith("FloatFunctional") and type(module).__module__.startswith(
            ("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic", "torch.nn.quantized", "torch.nn.qat")
        ):
            raise InputError(
                f"{path or 'the model'} is already quantized by torch.ao ({type(module).__name__}): give the float model."
            )
    return model


def _results_kept(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors with a history that earlier runs have left on the modules: torch does not copy those."""
    for part in model.modules():
        for value in part.__dict__.values():
            held = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
            yield from (t for t in held if isinstance(t, torch.Tensor) and t.grad_fn is not None)


def _settle_parametrizations(model: nn.Module) -> None:
    """For inference a parametrized weight is a constant: let it be one."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    state, python = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)


def _has_weights(module: nn.Module) -> bool:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    return any(p.dim() >= 2 for p in module.parameters()) or any(b.dim() >= 2 for b in module.buffers())


def _nearest(island: nn.Module) -> Iterator[nn.Module]:
    for child in island.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _nearest(child)
        else:
            yield child


def _replace(island: nn.Module, graphs: dict[nn.Module, LeveledModule]) -> None:
    for parent in list(island.modules()):
        for name, child in list(parent._modules.items()):
            if child in graphs and not isinstance(parent, LeveledModule):
                parent._modules[name] = graphs[child]  # type: ignore[index]


# ---- graphs


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
        made = tracer.create_arg(value) if find_proxy(value) is not None or isinstance(value, torch.Tensor) else value
        leaves.append(made)
        return made

    tree, _ = take_apart(result, "output", leaf)
    if _is_plain(tree):
        node = graph.output(put_together(tree, list(leaves)))
    else:
        node = graph.output(tuple(leaves))
    node.meta["module_path"] = ""
    return None if _is_plain(tree) else tree


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
        reads = node.op == "get_attr" or getattr(node.target, "__name__", "") in ("getitem", "getattr")
        measures = not isinstance(value, torch.Tensor) and value is not UNKNOWN and value is not None
        if (reads or measures) and "specialization" not in node.meta:
            graph.erase_node(node)


def _leveled(
    owner: nn.Module,
    graph: fx.Graph,
    spec: CallSpec,
    path: str,
    constants: dict[str, torch.Tensor],
    *,
    follows_memory: bool,
    for_training: bool,
) -> LeveledModule:
    asks = any(node.op == "call_module" and node.target == "training_flag" for node in graph.nodes)
    if asks:
        owner._modules["training_flag"] = TrainingFlag().train(owner.training)
    owner.__dict__.update(constants)
    try:
        module = LeveledModule(owner, graph, type(owner).__name__)
    finally:
        owner._modules.pop("training_flag", None)
        for name in constants:
            owner.__dict__.pop(name)
    for name, part in module.named_modules():
        if type(part) is nn.Module or part is module:
            part.training = owner.get_submodule(name).training
    module.meta.update(level="captured", call=spec, path=path, follows_memory=follows_memory)
    if for_training:
        module.keep_unused(owner)
        module.adopt_order(owner)
    module.stand_for(owner)
    if type(owner).__module__.startswith("torch.nn"):  # a layer of its own: its one op bears its name
        module.meta["layer"] = type(owner)
    return module


def _multiplies(graph: LeveledModule, *, functions_only: bool = False) -> bool:
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


def _multiplies_itself(graph: LeveledModule, check: fx.Node) -> bool:
    """Whether the module that ``check`` stands in multiplies by parameters in functions: as an island it would not be
    quantized."""
    inside = check.meta["module_path"]
    for node in graph.graph.nodes:
        if node.op == "get_attr" and any(user.meta.get("module_path") == inside for user in node.users):
            held: Any = graph
            for name in str(node.target).split("."):
                held = getattr(held, name)
            if isinstance(held, nn.Parameter) and held.dim() >= 2:
                return True
    return False


def _broken(graph: LeveledModule, fake: FakeRun, flat: list[Any]) -> list[tuple[fx.Node, str]]:
    """The checks of ``graph`` that fail on the inputs ``flat``."""
    found: list[tuple[fx.Node, str]] = []

    def seen(node: fx.Node, inputs: list[Any]) -> None:
        expected, text = node.args[1], node.args[2]
        if inputs[0] is UNKNOWN:  # what it depends on can only be had with data: an exact number may well change
            if node.meta["specialization"].exact:
                found.append((node, str(text)))
            return
        value = bool(inputs[0]) if type(expected) is bool else inputs[0]
        if value != expected:
            found.append((node, str(text)))

    with unchanged(graph):
        try:
            Evaluation(graph, fake, seen).run(*fake.of(flat))
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

