"""Modules of one model as graphs that hold: each is traced until nothing in it contradicts what the module does.

What a round finds that runs its own code, or whose recorded answers hold for the example alone, is an island in the next.
"""

from __future__ import annotations

import copy

from torch import nn

from fxquant.capture.calls import Call
from fxquant.capture.eager_recorder import EagerRecorder
from fxquant.capture.findings import Island
from fxquant.capture.guard_validation import contradicted
from fxquant.capture.one_graph import trace_module
from fxquant.capture.tracing import Tracer
from fxquant.capture.values import FakeRun
from fxquant.errors import InputError
from fxquant.graph.leveled import LeveledModule

__all__ = ["ModelTracer"]

_ROUNDS = 12
_NAMED = "it was named as a leaf"


class ModelTracer:
    """Makes graphs of one model's modules, and keeps what it found out about them on the way.

    Args:
        model: the model, which is changed: a copy.
        call: an example of its call; None traces without values.
        for_training: leave the mode open; otherwise trace what eval mode does.
        leaves: paths or classes of modules to leave as they are.

    Attributes:
        examples: the example as fake tensors, which the whole model is traced on.
        paths: where each module stands in the model.
        islands: the modules found to run their own code, and why.
        named: those of them that ``leaves`` names.
        calls: how the graphs made so far have the modules inside islands called.

    Raises:
        InputError: ``leaves`` names what the model does not have.
    """

    def __init__(
        self, model: nn.Module, call: Call | None, *, for_training: bool, leaves: tuple[str | type, ...]
    ) -> None:
        self.model, self.call, self.for_training = model, call, for_training
        self.fake = None if call is None else FakeRun()
        self.examples = [] if call is None or self.fake is None else [Call(*self.fake.of((call.args, call.kwargs)))]
        self.paths = {module: path for path, module in model.named_modules()}
        self.submodules = set(self.paths)
        self.islands: dict[nn.Module, Island] = {}
        self.named = self._named(leaves)
        self.calls: dict[nn.Module, list[Call]] = {}
        self._recorder: EagerRecorder | None = None

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
    def recorder(self) -> EagerRecorder:
        """One real run of the model, made when it is first needed."""
        if self._recorder is None:
            assert self.call is not None and self.fake is not None
            self._recorder = EagerRecorder(self.model, self.call.args, self.call.kwargs, self.fake)
        return self._recorder

    def graph_of(self, module: nn.Module, calls: list[Call]) -> LeveledModule | None:
        """``module`` as a graph, which may call islands; None where it is one, or is found to be."""
        if module in self.islands:
            return None
        path, known = self.paths[module], set(self.islands)
        for _ in range(_ROUNDS):
            try:
                graph, made = self._traced(module, calls)
            except InputError:
                raise
            except Exception as error:
                for part in set(self.islands) - known:
                    del self.islands[part]
                self.note(module, Island.of(error, path))
                return None
            broken = contradicted(module, graph, calls, self.fake, self.paths)
            if module in broken:
                self.note(module, broken[module])
                return None
            if not broken:
                break
            for part, island in broken.items():
                self.note(part, island)
        for part, given in made:
            self.calls.setdefault(part, []).extend(given)
        return graph

    def method_graph(self, island: nn.Module, name: str, calls: list[Call]) -> LeveledModule | None:
        """An island's own method as a graph that needs no island inside; None where it cannot be."""
        twin = copy.copy(island)
        twin.__dict__["forward"] = getattr(type(island), name).__get__(twin)
        self.paths[twin] = self.paths[island]
        before = dict(self.islands)
        try:
            graph, _ = self._traced(twin, calls)
            if set(self.islands) == set(before) and not contradicted(twin, graph, calls, self.fake, self.paths):
                return graph
        except Exception:
            pass
        finally:
            del self.paths[twin]
        self.islands = before
        return None

    def note(self, module: nn.Module, island: Island) -> None:
        """Let ``module`` run its own code from now on."""
        self.islands[module] = island
        self._require_runs()

    def _traced(self, module: nn.Module, calls: list[Call]) -> tuple[LeveledModule, list[tuple[nn.Module, list[Call]]]]:
        """One round: a graph, and the calls it has modules inside islands take."""
        known = set(self.islands)
        keep = self.for_training and module in self.submodules
        tracer = Tracer(self.fake, self.islands, for_training=self.for_training, prefix=self.paths[module])
        graph = trace_module(tracer, module, calls, may_overwrite=module is self.model, keep_unused=keep)
        if set(self.islands) - known:
            self._require_runs()
        return graph, [pair for made in tracer.calls.values() for pair in made.items()]

    def _require_runs(self) -> None:
        """A model that does not run on its example is an error, not an island."""
        if self.call is not None:
            _ = self.recorder
