"""drop_noops: take out what does nothing in the mode the model is made ready for."""

from __future__ import annotations

from torch import fx

from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.layout import identity

__all__ = ["drop_noops"]


def drop_noops(module: LeveledModule, *, keep_dropout: bool) -> LeveledModule:
    """Remove identities, and dropout where the model will not train again.

    Args:
        module: a canonical graph.
        keep_dropout: whether the model will train.

    Before:
        x = input
        identity = identity(x)
        drop = Dropout[drop](identity)
        relu = relu(drop)
        return relu

    After:
        x = input
        relu = relu(x)
        return relu

    Law:
        Outputs in eval mode are unchanged, bit for bit.
    """
    edit = Edit(module, by="drop_noops")
    for node in edit.nodes:
        entry = node.meta.get("entry")
        source = node.args[0] if node.args else None
        if entry is None or "reason" in node.meta or not isinstance(source, fx.Node):
            continue
        if (entry.function is identity and not entry.drops) or (entry.drops and not keep_dropout):
            edit.remove(node, source)
    return edit.done()
