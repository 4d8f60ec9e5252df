"""Every pass against its own docstring, its purity, and the laws of the levels."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
import fxquant.passes
from fxquant.capture.capture import capture
from fxquant.errors import LevelError
from fxquant.flow import passes_of
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.text import graph_text
from fxquant.nn.integer import IntegerOp, Site
from fxquant.numerics.scheme import Scheme
from fxquant.passes import levels
from fxquant.passes.verification import _distance
from fxquant.recipe import Recipe, Setting

NOT_PASSES = ("facts", "finite", "levels", "to_exchange", "verification")
FILES = [m.name for m in pkgutil.iter_modules(fxquant.passes.__path__) if m.name not in NOT_PASSES]


def pass_named(name: str) -> Callable[..., LeveledModule]:
    return getattr(importlib.import_module(f"fxquant.passes.{name}"), name)


def section(name: str, title: str) -> str | None:
    """A section of a pass's docstring, without its indentation."""
    doc = inspect.cleandoc(pass_named(name).__doc__ or "")
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", doc + "\n", re.M)
    return textwrap.dedent(found[1]).strip() if found else None


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.relu_()
        y += x
        return y.view(y.size(0), -1)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.identity, self.drop = nn.Identity(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.identity(x)))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, eps=1e-2)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor([-0.7, 1.2, 0.4]))
            self.bn.running_var.copy_(torch.tensor([0.4, 2.0, 1.3]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Classifier(nn.Module):
    def __init__(self, *, pools: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.pools = nn.Conv2d(2, 3, 3), nn.Linear(4, 2), pools

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return self.fc(F.max_pool2d(y, 2) if self.pools else y)


class Lawful(Normalized):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        return y + self.conv(y)


IMAGE = (2, 2, 10, 10)
RECIPES = {"round_for_readers": Recipe(default=Setting(input=Scheme.activation(4)))}
"""The recipe that a pass's docstring needs, where the usual one gives it nothing to do."""
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "canonicalize": (InPlace, (2, 3, 4), False),
    "drop_noops": (Idle, (2, 3), False),
    "fold_batchnorm": (Normalized, IMAGE, False),
    "round_for_readers": (Residual, IMAGE, False),
    "place_quantizers": (partial(Classifier, pools=True), IMAGE, False),
    "drop_quantizers": (partial(Classifier, pools=True), IMAGE, False),
    "fold_trained_batchnorm": (Normalized, IMAGE, True),
    "freeze": (Normalized, IMAGE, True),
    "to_integer": (partial(Classifier, pools=False), (2, 2, 6, 6), False),
    "to_qdq": (partial(Classifier, pools=False), (2, 2, 6, 6), False),
    "to_decomposed": (partial(Classifier, pools=False), (2, 2, 6, 6), False),
}
"""For each pass that changes the graph: the model of its docstring, its input, and whether it is trained."""


LAST = ("to_qdq", "to_decomposed")
"""The passes that each take an integer graph."""


def steps(
    *, qat: bool, folds_first: bool = False, recipe: Recipe | None = None
) -> list[tuple[str, Callable[..., LeveledModule]]]:
    """The whole way from a captured graph to an integer one, and to the forms that files and programs are written from."""
    passes = passes_of(recipe=recipe or Recipe(), qat=qat, folds_first=folds_first)
    way = [(getattr(s, "func", s).__name__, s) for s in passes]
    later = ("fold_trained_batchnorm", "settle_quantizers", "freeze", "to_integer", *LAST)
    return [*way, *((name, pass_named(name)) for name in later)]


def way_of(
    model: nn.Module, shape: tuple[int, ...], *, qat: bool, folds_first: bool = False, recipe: Recipe | None = None
) -> dict[str, tuple[LeveledModule, LeveledModule]]:
    """What each pass was given and what it gave, by the pass's name."""
    x = torch.randn(shape)
    module = capture(model, (x,), for_training=qat).model
    way = {}
    for name, step in steps(qat=qat, folds_first=folds_first, recipe=recipe):
        if name == "fold_trained_batchnorm":
            fxquant.calibrate(module, [x], progress=False)
        if name in LAST:
            module = way["to_integer"][1]
        after = levels.check(step(module), by=name)
        way[name] = (module, after)
        module = after
        if name == "place_quantizers":  # the way back
            way["drop_quantizers"] = (module, levels.check(pass_named("drop_quantizers")(module), by="drop_quantizers"))
    return way


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_one_pass_of_its_name(name):
    module = importlib.import_module(f"fxquant.passes.{name}")
    function = getattr(module, name)
    assert inspect.isfunction(function) and name in module.__all__
    assert section(name, "Law"), f"{name} states no law"


@pytest.mark.parametrize("name", FILES)
def test_a_pass_that_changes_graphs_shows_it(name):
    before, after = section(name, "Before"), section(name, "After")
    if "The graph is unchanged" in (section(name, "Law") or ""):
        assert before is None and after is None
        for qat in (False, True):
            given, gave = way_of(Normalized(), IMAGE, qat=qat)[name]
            assert graph_text(given) == graph_text(gave)
        return
    assert before and after, f"{name} has no Before and After"
    build, shape, qat = MODELS[name]
    folds_first, recipe = name == "fold_trained_batchnorm", RECIPES.get(name)
    given, gave = way_of(build().eval(), shape, qat=qat, folds_first=folds_first, recipe=recipe)[name]
    assert graph_text(given) == before
    assert graph_text(gave) == after


def fingerprint(module: LeveledModule) -> dict[str, Any]:
    """All that a pure pass leaves alone."""
    plain = ("scale", "ready", "enabled", "frozen", "observing", "tracking", "training", "applies", "inplace")
    return {
        "text": graph_text(module),
        "level": module.level,
        "state": {k: (id(v), v._version, v.clone()) for k, v in module.state_dict(keep_vars=True).items()},
        "modules": {k: id(m) for k, m in module.named_modules() if type(m) is not nn.Module},
        "flags": {
            k: {a: getattr(m, a) for a in plain if isinstance(getattr(m, a, None), bool)}
            for k, m in module.named_modules()
        },
        "facts": {n.name: {k: repr(v) for k, v in n.meta.items()} for n in module.graph.nodes},
    }


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("text", "level", "modules", "flags", "facts"):
        assert before[key] == after[key], f"the given module's {key} changed"
    assert before["state"].keys() == after["state"].keys()
    for name, (identity, version, value) in before["state"].items():
        now = after["state"][name]
        assert (identity, version) == now[:2], f"{name} was replaced or written to"
        assert torch.equal(value, now[2]), f"{name} changed"


@pytest.mark.parametrize(("qat", "folds_first"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    "build", [Normalized, InPlace, partial(Classifier, pools=True)], ids=["bn", "in place", "pool"]
)
def test_passes_are_pure(build, qat, folds_first):
    model = build().train(qat)
    x = torch.randn(IMAGE if build is not InPlace else (2, 3, 4))
    module = capture(model, (x,), for_training=qat).model
    for name, step in steps(qat=qat, folds_first=folds_first):
        if name == "fold_trained_batchnorm":
            fxquant.calibrate(module, [x], progress=False)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.5)  # as an optimizer's step would, after ranges were read
        given = fingerprint(module)
        if module.level == "prepared":
            pass_named("drop_quantizers")(module)
        after = step(module)
        assert_untouched(given, fingerprint(module))
        module = after
        assert module.training == (qat and name not in ("freeze", "to_integer", *LAST))


def test_the_users_model_is_never_touched():
    model, x = Normalized().train(), torch.randn(IMAGE)
    before = {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    modules = {k: (id(m), m.training, dict(m.__dict__)) for k, m in model.named_modules()}
    fxquant.convert(fxquant.calibrate(fxquant.prepare(model, x, qat=True), [x], progress=False))
    fxquant.convert(fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False))
    for k, v in model.state_dict(keep_vars=True).items():
        assert id(v) == before[k][0] and torch.equal(v, before[k][1])
    for k, m in model.named_modules():
        assert (id(m), m.training) == modules[k][:2] and set(m.__dict__) == set(modules[k][2])


def test_example_inputs_are_never_touched():
    x = torch.randn(2, 3, 4)
    kept = x.clone()
    fxquant.prepare(InPlace(), x, verify=True)
    assert torch.equal(x, kept)


def test_new_nodes_tell_who_made_them_and_of_what():
    way = way_of(Normalized().eval(), IMAGE, qat=False)
    prepared = way["place_quantizers"][1]
    quantizer = next(n for n in prepared.graph.nodes if n.name == "x_quantizer")
    assert quantizer.meta["by"] == "place_quantizers" and quantizer.meta["origin"] == ["x"]
    folded = next(n for n in prepared.graph.nodes if n.name == "conv")
    assert folded.meta["absorbed"] == [("bn", "folded")]
    assert folded.meta["source"].rpartition(":")[0].endswith("test_passes.py")


def test_verify_names_the_pass_that_breaks_the_model(monkeypatch):
    from fxquant.passes import fold_batchnorm as file

    right = file.channel_affine_of
    monkeypatch.setattr(file, "channel_affine_of", lambda bn: (right(bn)[0] * 1.1, right(bn)[1]))
    with pytest.raises(LevelError, match="pass fold_batchnorm changed"):
        fxquant.prepare(Normalized().eval(), torch.randn(IMAGE), verify=True)


def test_verify_takes_infinities_that_are_the_same():
    """Logits that are masked out: ``-inf - -inf`` is no difference; one that is lost is."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(x).masked_fill(torch.tensor([False, False, True, True]), float("-inf"))

    x = torch.randn(3, 4)
    assert not fxquant.prepare(Masked().eval(), x, verify=True)(x)[:, 2:].isfinite().any()
    apart = torch.tensor([1.0, float("inf"), float("nan")])
    assert _distance(apart, apart.clone()) == 0.0
    assert _distance(apart, torch.tensor([1.0, 2.0, float("nan")])) == float("inf")
    assert _distance(apart, torch.tensor([1.0, float("inf"), 2.0])) == float("inf")


def test_verify_compares_what_an_autocast_block_calls():
    """A graph inside got bfloat16 and was run again outside the block: mat1 and mat2 must have the same dtype."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.head(self.body(x))
            return y.float()

    x = torch.randn(3, 4)
    assert fxquant.prepare(Narrow().eval(), x, verify=True)(x).dtype is torch.float32


# The laws: each is broken on purpose, and the error has to say everything.


def node_named(module: LeveledModule, name: str) -> Any:
    return next(n for n in module.graph.nodes if n.name == name)


def given(level: str) -> LeveledModule:
    way = way_of(Lawful().eval(), IMAGE, qat=False)
    takes = {
        "captured": "canonicalize",
        "canonical": "drop_noops",
        "prepared": "fold_trained_batchnorm",
        "frozen": "to_integer",
    }
    takes["integer"] = "to_qdq"
    module = way[takes[level]][0] if level in takes else way[f"to_{level}"][1]
    assert module.level == level
    return copy.deepcopy(module)


def break_order(module: LeveledModule) -> None:
    conv, relu = node_named(module, "conv"), node_named(module, "relu")
    relu.append(conv)


def forget_place(module: LeveledModule) -> None:
    del node_named(module, "conv").meta["module_path"]
    node_named(module, "conv").meta.pop("by", None)


def write_another_type(module: LeveledModule) -> None:
    node_named(module, "conv").meta["quantized"] = "yes"


def forget_entry(module: LeveledModule) -> None:
    del node_named(module, "relu").meta["entry"]


def spell_otherwise(module: LeveledModule) -> None:
    node_named(module, "relu").target = torch.relu


def spell_as_method(module: LeveledModule) -> None:
    relu = node_named(module, "relu")
    relu.op, relu.target = "call_method", "relu"


def float_module(module: LeveledModule) -> None:
    module._modules["conv"] = nn.Conv2d(2, 3, 3)
    node_named(module, "conv").meta["quantized"] = True


def no_quantizer(module: LeveledModule) -> None:
    module.relu.output_quantizer = None


def no_weight_quantizer(module: LeveledModule) -> None:
    module.conv.weight_quantizer = nn.Identity()


def zero_scale(module: LeveledModule) -> None:
    module.x_quantizer.output_quantizer.scale.zero_()


def infinite_scale(module: LeveledModule) -> None:
    module.conv.weight_quantizer.scale[1] = torch.inf


def zero_point_off_the_grid(module: LeveledModule) -> None:
    module.x_quantizer.output_quantizer.zero_point.fill_(256)


def reads_float(module: LeveledModule) -> None:
    node_named(module, "conv").args = (node_named(module, "x"),)


def leaves_integers(module: LeveledModule) -> None:
    output = next(n for n in module.graph.nodes if n.op == "output")
    output.args = (node_named(module, "conv"),)


def holds_more(module: LeveledModule) -> None:
    module.conv.register_buffer("gain", torch.ones(3))


def still_integer(module: LeveledModule) -> None:
    module.conv = IntegerOp(Site(node_named(module, "conv").meta["entry"], {}, (), None))


BROKEN = [
    ("captured", "well_formed", break_order, None),
    ("captured", "knows_its_place", forget_place, "conv"),
    ("canonical", "well_formed", break_order, None),
    ("canonical", "knows_its_place", forget_place, "conv"),
    ("canonical", "facts_are_typed", write_another_type, "conv"),
    ("canonical", "one_entry_each", forget_entry, "relu"),
    ("canonical", "one_entry_each", spell_otherwise, "relu"),
    ("canonical", "one_entry_each", spell_as_method, "relu"),
    ("prepared", "well_formed", break_order, None),
    ("prepared", "quantized_once", float_module, "conv"),
    ("prepared", "quantized_once", no_quantizer, "relu"),
    ("prepared", "quantized_once", no_weight_quantizer, "conv"),
    ("frozen", "grids_are_sound", zero_scale, None),
    ("frozen", "grids_are_sound", infinite_scale, None),
    ("frozen", "grids_are_sound", zero_point_off_the_grid, None),
    ("frozen", "quantized_once", no_weight_quantizer, "conv"),
    ("integer", "facts_are_typed", write_another_type, "conv"),
    ("integer", "integers_between", reads_float, "conv"),
    ("integer", "integers_between", leaves_integers, "output"),
    ("integer", "state_can_be_written", holds_more, "conv"),
    ("qdq", "nothing_integer", still_integer, "conv"),
    ("decomposed", "nothing_integer", still_integer, "conv"),
]


@pytest.mark.parametrize(
    ("level", "law", "break_it", "node"), BROKEN, ids=[f"{b[0]}-{b[1]}-{b[2].__name__}" for b in BROKEN]
)
def test_a_broken_law_is_told_in_full(level, law, break_it, node):
    module = given(level)
    levels.check(module, by="nothing")
    break_it(module)
    with pytest.raises(LevelError) as caught:
        levels.check(module, by="a_pass")
    message = str(caught.value)
    assert "pass a_pass broke" in message and f"level {level}: {law}" in message
    assert (getattr(levels, law).__doc__ or "").strip() in message
    if node == "output":
        assert "node: return conv" in message
    elif node is not None:
        assert f"node: {node} = " in message
        assert "module path: " in message and "test_passes.py:" in message


def test_a_value_rounded_twice_breaks_a_law():
    module = copy.deepcopy(way_of(Classifier(pools=True).eval(), IMAGE, qat=False)["place_quantizers"][1])
    module.max_pool2d.applies = True
    with pytest.raises(LevelError, match=r"(?s)quantized_once.*rounds values that pass through.*node: max_pool2d"):
        levels.check(module, by="a_pass")


def test_every_law_is_broken_once_here():
    laws = {law.__name__ for laws in levels.LAWS.values() for law in laws}
    assert laws == {law for _, law, _, _ in BROKEN}
