"""What placing quantizers writes on a graph is taken back whole by ``drop_quantizers``: no fact outlives the placement."""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import COMPUTING, example_of
from torch import fx, nn
from traps import TRAPS

import fxquant
from fxquant import Op, Recipe, Scheme, Setting
from fxquant.capture.capture import capture
from fxquant.capture.islands import graphs_of
from fxquant.errors import LevelError
from fxquant.flow import passes_of, placing_passes, run_passes
from fxquant.graph.facts import OWNERS, Fact, Facts
from fxquant.graph.text import graph_text
from fxquant.passes import drop_quantizers as dropping
from fxquant.passes.facts import Placed
from fxquant.passes.levels import check
from fxquant.targets import TARGETS

PLACING = [getattr(step, "func", step).__name__ for step in placing_passes(Recipe(), TARGETS["x86"])]
SIGNED = Setting(activation=Scheme(signed=True))
RECIPES = {
    "plain": Recipe(),
    "outputs": Recipe(quantize_outputs=True),
    "joined from two schemes": Recipe([(Op("relu"), SIGNED)]),
    "rounded for readers": Recipe(default=Setting(input=Scheme.activation(4))),
    "half in float": Recipe([(Op("add"), None), (Op("max_pool2d"), None)]),
}


class Mixed(nn.Module):
    """A residual sum, a join, a pool, a merged clamp, a shared weight and an accumulator that leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        left = torch.nn.functional.avg_pool2d(self.left(x) + x, 2)
        right = torch.nn.functional.max_pool2d(torch.relu(self.right(x)) * 0.7, 2)
        joined = torch.cat([left, right], 1).mean((2, 3))
        return self.head(joined.softmax(1)), self.right(left)


def facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All that is known of every node, by graph and name; ``by`` aside, which names the pass that last rewrote it."""

    def told(value: Any) -> Any:
        return value.name if isinstance(value, fx.Node) else repr(value)

    return {
        f"{path}/{node.name}": {name: told(value) for name, value in node.meta.items() if name != "by"}
        for path, graph in graphs_of(model).items()
        for node in graph.graph.nodes
    }


@cache
def canonical(name: str) -> nn.Module:
    model, inputs = MODELS[name]()
    captured = capture(model.eval(), inputs, for_training=False)
    for graph in captured.graphs:
        graph.settings.update(qat=False)
    return run_passes(captured.model, passes_of(recipe=Recipe(), qat=False)[: -len(PLACING)], None)


MODELS: dict[str, Any] = {
    "mixed": lambda: (Mixed(), (torch.randn(2, 3, 8, 8),)),
    **{f"trap {name}": partial(lambda trap: (trap.model(), trap.inputs(4)), TRAPS[name]) for name in list(TRAPS)[::24]},
    **{f"op {name}": partial(lambda e: (e.module, e.inputs), example_of(name)) for name in COMPUTING[::10]},
}


def place(model: nn.Module, recipe: Recipe, target: str) -> nn.Module:
    return run_passes(model, placing_passes(recipe, TARGETS[target]), None)


def cases() -> list[tuple[str, str, str]]:
    every = [("mixed", recipe, target) for recipe in RECIPES for target in TARGETS]
    names = [name for name in MODELS if name != "mixed"]
    return every + [(name, list(RECIPES)[i % 3], list(TARGETS)[i % len(TARGETS)]) for i, name in enumerate(names)]


@pytest.mark.parametrize(("name", "recipe", "target"), cases())
def test_what_placing_writes_is_taken_back(name, recipe, target):
    source, before = canonical(name), facts(canonical(name))
    placed = place(source, RECIPES[recipe], target)
    dropped = run_passes(placed, (dropping.drop_quantizers,), None)
    told = facts(dropped)
    assert told == before
    assert facts(place(dropped, RECIPES[recipe], target)) == facts(placed)
    texts = [{p: graph_text(g) for p, g in graphs_of(m).items()} for m in (dropped, source)]
    assert texts[0] == texts[1]


def test_another_recipe_finds_nothing_of_the_first():
    source = canonical("mixed")
    first = place(source, RECIPES["joined from two schemes"], "tflite")
    again = place(run_passes(first, (dropping.drop_quantizers,), None), Recipe(), "x86")
    assert facts(again) == facts(place(source, Recipe(), "x86"))


def written(tree: ast.AST) -> set[str]:
    """The facts that a file writes on nodes: ``n.meta["x"] = …``, ``n.meta.update(x=…)``, ``n.meta.setdefault("x", …)``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
            if ast.unparse(node.value).endswith(".meta"):
                found.add(node.slice.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args + node.keywords:
            if ast.unparse(node.func.value).endswith(".meta") and node.func.attr in ("update", "setdefault"):
                found.update(k.arg for k in node.keywords)
                found.update(a.value for a in node.args[:1] if isinstance(a, ast.Constant))
    return found


def placed(tree: ast.AST) -> set[str]:
    """The facts that a file writes as fields: ``Placed(n).x = …``."""
    stores = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return {n.attr for n in stores if isinstance(n.value, ast.Call) and ast.unparse(n.value.func) == "Placed"}


@pytest.mark.parametrize("name", PLACING)
def test_a_placing_pass_writes_its_own_facts_alone(name):
    """All that it writes is ``Placed``, which ``drop_quantizers`` resets; and the reason of what stays in float."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"fxquant.passes.{name}")))
    assert written(tree) - {"reason"} == set()
    assert placed(tree) and placed(tree) <= set(Placed.facts)


def test_every_fact_of_placing_has_its_writer():
    files = (inspect.getsource(importlib.import_module(f"fxquant.passes.{name}")) for name in PLACING)
    assert set().union(*(placed(ast.parse(text)) for text in files)) == set(Placed.facts)


def test_drop_quantizers_knows_every_placing_pass():
    assert [file.__name__.rpartition(".")[2] for file in dropping._PLACING] == PLACING


def test_the_search_for_facts_finds_them():
    source = "n.meta['a'] = 1\nlast.meta.update(b=2, c=3)\nn.meta.setdefault('d', [])\nprint(n.meta['e'], x['f'])"
    assert written(ast.parse(source)) == {"a", "b", "c", "d"}


def keys(tree: ast.AST) -> set[str]:
    """The literal keys of every ``….meta`` that a file reads, writes or asks for."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            owner, key = node.value, node.slice.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            owner, key = node.func.value, getattr(node.args[0], "value", None)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            owner, key = node.comparators[0], getattr(node.left, "value", None)
        else:
            continue
        if isinstance(key, str) and ast.unparse(owner).endswith(".meta"):
            found.add(key)
    return found


OF_GRAPHS = {"call", "follows_memory", "layer", "level", "path", "read_from_outside", "settings", "sites", "unused"}
"""What is known of a graph, not of a node."""
OF_FX = {"nn_module_stack", "val"}


def test_every_fact_is_declared_with_its_type_and_meaning():
    files = sorted(Path(fxquant.__file__).parent.rglob("*.py"))
    used = set().union(*(keys(ast.parse(file.read_text(encoding="utf-8"))) for file in files))
    declared = {name for owner in OWNERS for name in owner.facts}
    assert used - declared == OF_GRAPHS | OF_FX
    assert all(fact.meaning and owner.__doc__ for owner in OWNERS for fact in owner.facts.values())


def test_a_fact_of_another_type_is_refused_and_breaks_the_law():
    graph = next(iter(graphs_of(place(canonical("mixed"), Recipe(), "x86")).values()))
    node = next(n for n in graph.graph.nodes if Placed(n).quantized)
    with pytest.raises(LevelError, match=rf"{node.name}: Placed.chain \(.*\) is .*given 'relu'"):
        Placed(node).chain = "relu"
    node.meta["quantized"] = "yes"
    with pytest.raises(LevelError, match=r"facts_are_typed(.|\n)*Placed.quantized \(.*\) is 'yes'"):
        check(graph, by="a test")


def test_a_fact_has_one_owner():
    with pytest.raises(LevelError, match="Mine owns group, which Placed owns"):
        type("Mine", (Facts,), {"group": Fact(str, "", "something else")})
    assert all(owner.__name__ != "Mine" for owner in OWNERS)
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert Placed(node).chain == [] and "chain" not in Placed(node)
    Placed(node).group = "x"
    assert "group" in Placed(node) and node.meta == {"group": "x"}
    Placed.reset(node)
    assert not node.meta
