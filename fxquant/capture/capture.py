"""Capturing a model: from an ``nn.Module`` as its author wrote it to graphs that compute the same, bit for bit.

The model is copied first and never touched. What cannot be traced makes the smallest submodule an island that runs its
own code, and the parts of an island that can be traced become graphs inside it, at any depth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from fxquant.capture.calls import Call, as_call
from fxquant.capture.eager_recorder import EagerRecorder
from fxquant.capture.findings import Island
from fxquant.capture.guard_validation import contradicted
from fxquant.capture.islands import graphs_of, mark_island
from fxquant.capture.models import check_model, has_weights, is_layer, nearest, own_copy, same_random_numbers, unwrapped
from fxquant.capture.one_graph import multiplies, trace_module
from fxquant.capture.own_code import Uses, uses_in
from fxquant.capture.seen_types import note_seen_types
from fxquant.capture.tracing import Tracer
from fxquant.capture.values import FakeRun
from fxquant.errors import CaptureError, InputError
from fxquant.graph.leveled import LeveledModule

__all__ = ["capture"]

_ROUNDS = 12
_NAMED = "it was named as a leaf"


def capture(
    model: nn.Module, example_inputs: Any = None, *, for_training: bool = True, leaves: Iterable[str | type] = ()
) -> Any:
    """Trace a copy of ``model`` into graphs at level *captured*.

    Args:
        model: any eager module. ``DataParallel``, DDP and ``torch.compile`` wrappers are taken off.
        example_inputs: what one call takes, see `as_call`; without it what Python asks about shapes has no answer.
        for_training: ask for the mode at run time; otherwise trace what eval mode does.
        leaves: paths or classes of modules to leave as they are.

    Returns:
        A ``LeveledModule``; or, where the top module could not be traced, that module with graphs inside.

    Raises:
        InputError: ``model`` is not an eager ``nn.Module`` (scripted, exported, already quantized, a class, a function),
            or does not run on ``example_inputs``.
        CaptureError: no part of it could be traced; the message names the module, the line and the cause.
    """
    model = check_model(unwrapped(model))
    owned = own_copy(model, for_training=for_training)
    call = None if example_inputs is None else as_call(model, example_inputs)
    with same_random_numbers():
        captured = _Capture(owned, call, for_training=for_training, leaves=tuple(leaves)).whole(type(model).__name__)
        if call is not None:
            note_seen_types(captured, call)
        return captured


class _Capture:
    """One model being captured: its islands and graphs so far."""

    def __init__(
        self, model: nn.Module, call: Call | None, *, for_training: bool, leaves: tuple[str | type, ...]
    ) -> None:
        self.model, self.call, self.for_training = model, call, for_training
        self.fake = None if call is None else FakeRun()
        self.paths = {module: path for path, module in model.named_modules()}
        self.submodules = set(self.paths)
        self.islands: dict[nn.Module, Island] = {}
        self.graphs: dict[nn.Module, LeveledModule] = {}
        self.named = self._named(leaves)
        self.calls: dict[nn.Module, list[Call]] = {}
        self._recorder: EagerRecorder | None = None
        self._filled: set[nn.Module] = set()
        self._uses: dict[nn.Module, Uses] | None = None

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
            broken = contradicted(module, graph, calls, self.fake, self.paths)
            if module in broken:
                self._note(module, broken[module])
                return None
            if not broken:
                break
            for part, island in broken.items():
                self._note(part, island)
        for made in tracer.calls.values():
            for part, given in made.items():
                self.calls.setdefault(part, []).extend(given)
        for node in graph.graph.nodes:
            called = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if called is not None and called in self.islands:
                self.fill(called)
        return graph

    def _note(self, module: nn.Module, island: Island) -> None:
        self.islands[module] = island
        if self.call is not None:
            _ = self.recorder  # a model that does not run on its example is an error, not an island

    def _trace(self, tracer: Tracer, module: nn.Module, calls: list[Call]) -> LeveledModule:
        known = set(self.islands)
        keep = self.for_training and module in self.submodules
        graph = trace_module(tracer, module, calls, may_overwrite=module is self.model, keep_unused=keep)
        if self.call is not None and set(self.islands) - known:
            _ = self.recorder
        return graph

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
            if part in self.named or part in self._filled or not has_weights(part):
                continue
            if part not in self.graphs:
                if calls and inside and all(call.method in inside for call in calls):
                    continue
                self._capture_part(part, calls)
        _replace(island, self.graphs)

    def _capture_part(self, part: nn.Module, calls: list[Call]) -> None:
        possible = self._possible_uses(part)
        if part in possible.replaced or (part in possible.asked and is_layer(part)):
            self._leave(part)
            return
        found = {*self._read_from_outside(part), *possible.reads}
        reads = sorted(found, key=lambda read: (self.paths[read[0]], read[1]))
        own = sorted(name for module, name in reads if module is part) if is_layer(part) else []
        outside = self._called_from_outside(part) or self._inner_call_from_outside(part)
        if outside is None and (used := possible.methods or possible.calls - {part}):
            outside = f"{self._names_of(used, part)[0]} may be called"
        elif outside is None and possible.asked:
            outside = f"the class of {self._names_of(possible.asked, part)[0]} may be asked for"
        if outside is None and len(reads) > len(own):
            outside = next(
                f"{self.paths[module]}.{name} is read" for module, name in reads if not own or module is not part
            )
        if outside is not None:
            self._note(part, Island(self.paths[part], f"{outside} from outside", None,
                                    "do it in a method of its own that forward calls"))  # fmt: skip
        graph = None if part in self.islands else self.graph_of(part, calls)
        if graph is None:
            self.fill(part)
        elif multiplies(graph):
            self.graphs[part] = graph
            graph.meta["read_from_outside"] = tuple(own)

    def _leave(self, part: nn.Module) -> None:
        """Make ``part`` an island without graphs: code around it asks what modules it is made of."""
        cause = "code around it may ask for its class, or call it with other parameters"
        self._note(part, Island(self.paths[part], cause, None, "call it by name, with its own parameters"))
        mark_island(part, self.islands[part])
        self._filled.add(part)

    def _possible_uses(self, part: nn.Module) -> Uses:
        """What code around ``part`` may do with it and what is in it, in branches too that the example does not take."""
        if self._uses is None:
            self._uses = uses_in(self.paths)
        found, inside = Uses(), set(part.modules())
        for reader, uses in self._uses.items():
            if reader not in inside and uses.modules & inside:
                found |= uses.among(inside - _reached(reader, without=part) | {part})
        return found

    def _names_of(self, used: set[Any], part: nn.Module) -> list[str]:
        """Modules, and methods of modules, as the user would call them."""
        pairs = [use if isinstance(use, tuple) else (use, "") for use in used]
        named = [f"{self.paths[module]}.{name}".strip(".") for module, name in pairs if module is not part]
        return sorted(named) or sorted(f"its method {name}" if name else self.paths[part] for _, name in pairs)

    def _parts(self, island: nn.Module) -> list[tuple[nn.Module, list[Call]]]:
        """The modules that an island calls itself, with their calls; without an example, those nearest below it.

        The calls are those seen when the graph around the island was traced, which calls it as it will be called; or
        those of the real run, where that did not get so far.
        """
        if self.call is None:
            return [(part, []) for part in nearest(island)]
        found = []
        for part, calls in self.recorder.calls.items():
            own = [call for call in calls if call.caller is island]
            seen = [call for call in self.calls.get(part, ()) if call.caller is island]
            if own and part in self.paths:
                found.append((part, seen or own))
        return found

    def _called_from_outside(self, part: nn.Module) -> str | None:
        if self.call is None:
            return None
        for (owner, name), calls in self.recorder.methods.items():
            if owner is part and any(call.caller is not part for call in calls):
                return f"its method {name} is called"
        return None

    def _inner_call_from_outside(self, part: nn.Module) -> str | None:
        """A module in ``part`` that code around it calls: in a graph it computes with what the graph hands it, alone."""
        inside = set(part.modules())
        for module in inside - {part} if self.call is not None else ():
            callers = {call.caller for call in self.recorder.calls.get(module, ()) if call.caller is not None}
            if any(module not in _reached(caller, without=part) for caller in callers - inside):
                return f"{self.paths[module]} is called"
        return None

    def _read_from_outside(self, part: nn.Module) -> list[tuple[nn.Module, str]]:
        """The parameters and buffers of ``part`` and what is in it that code around it reads, each by module and name."""
        if self.call is None:
            return []
        inside = set(part.modules())
        return [
            (module, name)
            for module in inside & set(self.recorder.reads)
            for name, readers in self.recorder.reads[module].items()
            if any(module not in _reached(reader, without=part) for reader in readers - inside)
        ]

    def _fill_methods(self, island: nn.Module) -> set[str]:
        """Capture an island's own methods that multiply by weights; the names of those that could be."""
        done: set[str] = set()
        if self.call is None:
            return done
        for (owner, name), calls in self.recorder.methods.items():
            own = [call for call in calls if call.caller is island and call.method is None]
            if owner is not island or not own or len(own) != len(calls):
                continue
            graph = self._method_graph(island, name, own)
            if graph is not None and multiplies(graph, functions_only=True):
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
            if set(self.islands) == set(before) and not contradicted(twin, graph, calls, self.fake, self.paths):
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


def _reached(module: nn.Module, *, without: nn.Module) -> set[nn.Module]:
    """``module`` and all that its code finds in it, but for ``without`` and what is found only there."""
    found, waiting = {without}, [module]
    while waiting:
        part = waiting.pop()
        if part not in found:
            found.add(part)
            waiting.extend(child for child in part._modules.values() if child is not None)
    return found - {without}


def _replace(island: nn.Module, graphs: dict[nn.Module, LeveledModule]) -> None:
    for parent in list(island.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in graphs and not isinstance(parent, LeveledModule):
                parent._modules[name] = graphs[child]
