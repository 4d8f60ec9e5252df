"""Types of what depends on data: from one run on the example, where fake tensors do not tell them.

What an island or a data-dependent op returns has no fake value, nor has what is computed from it. Sizes there are never
guessed; but whether a tensor holds real or whole numbers decides what may be rounded, and one run of the graph tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.calls import Call
from fxquant.capture.values import unchanged
from fxquant.graph.leveled import LeveledModule

__all__ = ["note_seen_types"]


def note_seen_types(model: nn.Module, graphs: Iterable[LeveledModule], call: Call) -> None:
    """Write ``dtype`` on every node of ``model``'s ``graphs`` that has none, from one run in eval mode; no more changes.

    A type's name stands for what is no tensor, as on other nodes. A graph that does not run here keeps its gaps.
    """
    waiting = [graph for graph in graphs if any(map(_is_open, graph.graph.nodes))]
    if not waiting:
        return
    inputs: dict[LeveledModule, tuple[Any, ...]] = {}

    def keep(graph: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(graph, LeveledModule)
        inputs.setdefault(graph, _copied(args))

    with unchanged(model), torch.no_grad():
        model.eval()
        hooks = [graph.register_forward_pre_hook(keep) for graph in waiting]
        try:
            model(*_copied(call.args), **_copied(call.kwargs))
            for graph, given in inputs.items():
                _Seeing(graph).run(*given)
        except Exception:  # the example told no more: reported where it matters
            return
        finally:
            for hook in hooks:
                hook.remove()


class _Seeing(fx.Interpreter):
    """Runs a graph and notes what its nodes give."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if _is_open(n):
            n.meta["dtype"] = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        return value


def _is_open(node: fx.Node) -> bool:
    return node.op.startswith("call_") and "dtype" not in node.meta


def _copied(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, value)
