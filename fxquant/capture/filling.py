"""A model as graphs: the whole as one, and inside each island what of it can be captured, at any depth.

An island runs its author's code, which calls modules and methods of its own: those that multiply by weights are captured
where the code around them asks nothing of them but their results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from torch import nn

from fxquant.capture.calls import Call
from fxquant.capture.findings import Island
from fxquant.capture.islands import graphs_of, mark_island
from fxquant.capture.model_tracer import ModelTracer
from fxquant.capture.one_graph import multiplies
from fxquant.capture.outside import use_from_outside
from fxquant.capture.own_code import Uses, uses_in
from fxquant.errors import CaptureError
from fxquant.graph.leveled import LeveledModule

__all__ = ["graphs_in"]


def graphs_in(tracer: ModelTracer, name: str) -> nn.Module:
    """The tracer's model, of the class ``name``, as a graph; or itself, an island. Islands in either hold graphs.

    Raises:
        CaptureError: no part of the model could be traced.
    """
    graph = _Filling(tracer).graph_of(tracer.model, tracer.examples)
    if graph is not None:
        graph.__class__.__name__ = name
        return graph
    if not graphs_of(tracer.model):
        raise _nothing(name, tracer.islands.values())
    return tracer.model


class _Filling:
    """The graphs made for the parts of islands, by the modules in whose places they go."""

    def __init__(self, tracer: ModelTracer) -> None:
        self.tracer = tracer
        self.graphs: dict[nn.Module, LeveledModule] = {}
        self._filled: set[nn.Module] = set()

    def graph_of(self, module: nn.Module, calls: list[Call]) -> LeveledModule | None:
        """``module`` as a graph, the islands that it calls filled; None where it is an island itself, filled likewise."""
        graph = self.tracer.graph_of(module, calls)
        if graph is None:
            self.fill(module)
            return None
        for node in graph.graph.nodes:
            called = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if called is not None and called in self.tracer.islands:
                self.fill(called)
        return graph

    def fill(self, island: nn.Module) -> None:
        """Capture the parts of an island, and put their graphs where they were."""
        if island in self._filled:
            return
        self._filled.add(island)
        mark_island(island, self.tracer.islands[island])
        if island in self.tracer.named:
            return
        inside = self._fill_methods(island)
        for part, calls in self._parts(island):
            if part in self.tracer.named or part in self._filled or not _has_weights(part):
                continue
            if part not in self.graphs:
                if calls and inside and all(call.method in inside for call in calls):
                    continue
                self._capture_part(part, calls)
        _replace(island, self.graphs)

    def _fill_methods(self, island: nn.Module) -> set[str]:
        """Capture an island's own methods that multiply by weights; the names of those that could be."""
        done: set[str] = set()
        if self.tracer.call is None:
            return done
        for (owner, name), calls in self.tracer.recorder.methods.items():
            own = [call for call in calls if call.caller is island and call.method is None]
            if owner is not island or not own or len(own) != len(calls):
                continue
            graph = self.tracer.method_graph(island, name, own)
            if graph is not None and multiplies(graph, functions_only=True):
                island.__dict__[name] = graph
                island._modules[name] = graph
                done.add(name)
        return done

    def _parts(self, island: nn.Module) -> list[tuple[nn.Module, list[Call]]]:
        """The modules that an island calls itself, with their calls; without an example, those nearest below it.

        The calls are those seen when the graph around the island was traced, which calls it as it will be called; or
        those of the real run, where that did not get so far.
        """
        if self.tracer.call is None:
            return [(part, []) for part in _nearest(island)]
        found = []
        for part, calls in self.tracer.recorder.calls.items():
            own = [call for call in calls if call.caller is island]
            seen = [call for call in self.tracer.calls.get(part, ()) if call.caller is island]
            if own and part in self.tracer.paths:
                found.append((part, seen or own))
        return found

    def _capture_part(self, part: nn.Module, calls: list[Call]) -> None:
        tracer = self.tracer
        use = use_from_outside(part, tracer.recorder if tracer.call else None, self.possible, tracer.paths)
        if use.is_asked_for:
            self._leave(part)
            return
        if use.refused is not None:
            cause = f"{use.refused} from outside"
            tracer.note(
                part, Island(tracer.paths[part], cause, None, "do it in a method of its own that forward calls")
            )
        graph = self.graph_of(part, calls)
        if graph is not None and multiplies(graph):
            self.graphs[part] = graph
            graph.meta["read_from_outside"] = use.reads

    def _leave(self, part: nn.Module) -> None:
        """Make ``part`` an island without graphs: code around it asks what modules it is made of."""
        cause = "code around it may ask for its class, or call it with other parameters"
        path = self.tracer.paths[part]
        self.tracer.note(part, Island(path, cause, None, "call it by name, with its own parameters"))
        mark_island(part, self.tracer.islands[part])
        self._filled.add(part)

    @cached_property
    def possible(self) -> dict[nn.Module, Uses]:
        """What the code of each module may do with others, in branches too that the example does not take."""
        return uses_in(self.tracer.paths)


def _has_weights(module: nn.Module) -> bool:
    """Whether a module may multiply by weights: it has parameters or buffers of two dimensions and is no table."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    return any(p.dim() >= 2 for p in module.parameters()) or any(b.dim() >= 2 for b in module.buffers())


def _nearest(island: nn.Module) -> Iterator[nn.Module]:
    """The modules nearest below ``island`` that are no mere lists."""
    for child in island.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _nearest(child)
        else:
            yield child


def _replace(island: nn.Module, graphs: dict[nn.Module, LeveledModule]) -> None:
    for parent in list(island.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in graphs and not isinstance(parent, LeveledModule):
                parent._modules[name] = graphs[child]


def _nothing(name: str, islands: Iterable[Island]) -> CaptureError:
    deepest = max(islands, key=lambda found: len(found.path.split(".")) if found.path else 0)
    where = f"module {deepest.path!r}" if deepest.path else f"the top module ({name})"
    return CaptureError(
        f"{name} could not be traced, nor any part of it that multiplies by weights.\n"
        f"  where: {where}, {deepest.source or 'source unknown'}\n"
        f"  cause: {deepest.cause}\n"
        f"  what to do: {deepest.advice}; or move the untraceable part into a submodule of its own, which then runs "
        "as it is while the rest is captured."
    )
