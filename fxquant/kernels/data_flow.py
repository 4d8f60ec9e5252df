"""Whether what a graph computes may depend on the values of its inputs, not on their shapes alone."""

from __future__ import annotations

from fxquant.graph.leveled import LeveledModule

__all__ = ["follows_data"]


def follows_data(graph: LeveledModule) -> bool:
    """Whether Python inside ``graph`` may decide by data: in a module of the user's, or by a number read off a tensor.

    A trace would hold the decision that it saw. Ops of the table never decide.
    """
    for node in graph.graph.nodes:
        part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        foreign = part is not None and not type(part).__module__.startswith("torch.nn.")
        if "reason" in node.meta and (foreign or not isinstance(node.meta.get("shape"), tuple)):
            return True
    return False
