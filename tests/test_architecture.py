"""The house as it was drawn: imports point one way, ops are named in one place, graphs change in one file."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxquant
from fxquant.ops.table import TABLE
from fxquant.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fxquant"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

STOREYS = (
    ("__main__",),
    ("cli",),
    ("demo", "image_folder", "model_spec", "progress"),
    ("__init__",),
    ("page",),
    ("analysis", "benchmark", "tuning"),
    ("checkpoint",),
    ("algorithms", "export"),
    ("flow", "training"),
    ("calibration", "choose_ranges", "collapse", "reach", "reporting"),
    ("passes", "runtimes"),
    ("targets",),
    ("inputs", "recipe", "onnx"),
    ("ops",),
    ("forms", "quantizers"),
    ("kernels",),
    ("nn",),
    ("capture",),
    ("graph", "numerics", "behaviour"),
    ("installed", "processor"),
    ("errors",),
)
"""From the roof down; an arrow goes down, or stays within one folder. Neighbours do not see each other."""
NEIGHBOURS = {("flow", "training"), ("demo", "model_spec"), ("demo", "image_folder")}
"""Arrows allowed on one storey."""


def name_of(path: Path) -> str:
    """A file's room: its folder, or its own name where it stands alone."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def storey_of(room: str) -> int:
    return next(i for i, rooms in enumerate(STOREYS) if room in rooms)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every module of fxquant that a file imports, wherever in the file; types alone do not count."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fxquant")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxquant":
            known = {module_name(path) for path in FILES}
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else str(node.module) for name in whole)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"


def room_of_import(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_file_has_a_storey():
    assert {name_of(path) for path in FILES} <= {room for rooms in STOREYS for room in rooms}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    room = name_of(path)
    for name in imports_of(TREES[path]):
        other = room_of_import(name)
        if other == room or (room, other) in NEIGHBOURS:
            continue
        assert storey_of(other) > storey_of(room), f"{module_name(path)} imports {name}, which is above or beside it"


def test_targets_are_data():
    """A target names ops and sees schemes and recipes; that the names are those of the table is for ``test_targets``."""
    for path in FILES:
        if name_of(path) == "targets":
            rooms = {room_of_import(n) for n in imports_of(TREES[path])}
            assert rooms <= {"targets", "recipe", "numerics", "errors"}, module_name(path)
    runtimes = [
        p for p in FILES if name_of(p) == "targets" and p.stem not in ("__init__", "target", "fitting", "processors")
    ]
    for path in runtimes:
        assert not [n for n in ast.walk(TREES[path]) if isinstance(n, (ast.FunctionDef, ast.If, ast.ClassDef))], path
    for path in FILES:
        calls = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Target"]
        for call in calls if name_of(path) == "runtimes" else []:
            inside = [n for n in ast.walk(call) if isinstance(n, (ast.Call, ast.Lambda, ast.IfExp)) and n is not call]
            assert {ast.unparse(getattr(n, "func", n)) for n in inside} <= {"Scheme", "frozenset"}, path


def test_no_name_hides_a_module_of_the_same_name():
    """``import fxquant.a.b as c`` gives the attribute ``b`` of ``fxquant.a``: another object of that name would be given."""
    known = {module_name(path) for path in FILES}
    for path in FILES:
        if path.name == "__init__.py":
            parts = {own.stem for own in path.parent.glob("*.py")} | {
                own.parent.name for own in path.parent.glob("*/*.py")
            }
            bound = {
                alias.asname or alias.name
                for node in ast.walk(TREES[path])
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
                if f"{node.module}.{alias.name}" not in known
            }
            assert not parts & bound, f"{module_name(path)} gives {parts & bound} as something else than its module"


def test_passes_know_no_runtime():
    """What a runtime wants stands in its target; a pass reads the fields."""
    for path in FILES:
        if name_of(path) in ("passes", "flow", "reporting", "nn", "graph", "ops"):
            texts = {n.value for n in ast.walk(TREES[path]) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert not texts & set(TARGETS), module_name(path)


def test_recipes_know_numbers_only():
    recipe = {room_of_import(n) for n in imports_of(TREES[PACKAGE / "recipe.py"])}
    assert recipe <= {"errors", "numerics"}
    assert {room_of_import(n) for n in imports_of(TREES[PACKAGE / "inputs.py"])} <= {"errors"}


def test_graph_and_numerics_do_not_see_each_other_nor_anything_else():
    for path in FILES:
        if name_of(path) in ("graph", "numerics"):
            assert {room_of_import(n) for n in imports_of(TREES[path])} <= {name_of(path), "errors"}, module_name(path)
    assert not list(imports_of(TREES[PACKAGE / "errors.py"]))


def test_no_circle_of_files():
    arrows = {module_name(p): {n for n in imports_of(TREES[p]) if n != module_name(p)} for p in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for other in arrows.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


CHANGES = (
    *(
        "erase_node",
        "inserting_after",
        "inserting_before",
        "create_node",
        "replace_all_uses_with",
        "replace_input_with",
    ),
    *(
        "call_function",
        "output",
        "graph_copy",
        "prepend",
        "append_node",
        "placeholder",
        "get_attr",
        "eliminate_dead_code",
    ),
)
FIELDS = ("args", "kwargs", "target", "op")
MAKERS = {
    "graph/edit.py",
    "graph/excerpt.py",
    "graph/leveled.py",
    *(f"capture/{name}.py" for name in ("tracing", "attributes", "guards", "modes", "one_graph")),
    *(f"onnx/{name}.py" for name in ("batch_axis", "default_attributes", "integer_moves", "qoperators")),
    *(f"onnx/{name}.py" for name in ("repeated_roundings", "per_head_scales")),
}
"""``edit`` changes graphs; ``capture`` makes them, and ``excerpt`` of parts of one; ``leveled`` builds one anew from what
was pickled; those of ``onnx`` are graphs of ONNX files, which no pass sees."""


def changes_of_graphs(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            owner = ast.unparse(node.func.value)
            if node.func.attr not in ("call_function", "output", "placeholder", "get_attr") or owner.endswith("graph"):
                if not owner.endswith("edit"):
                    yield f"line {node.lineno}: {ast.unparse(node.func)}"
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                if (
                    isinstance(one, ast.Attribute)
                    and one.attr in FIELDS
                    and ast.unparse(one.value) not in ("self", "args")
                ):
                    yield f"line {node.lineno}: {ast.unparse(one)} = …"


@pytest.mark.parametrize("path", [p for p in FILES if str(p.relative_to(PACKAGE)) not in MAKERS], ids=module_name)
def test_graphs_change_in_edit_only(path):
    assert not list(changes_of_graphs(TREES[path]))


def test_the_search_for_changes_finds_them():
    source = "n.args = (x,)\nm.graph.erase_node(n)\nn.replace_all_uses_with(x)\nn.op, n.target = 1, 2\n"
    source += "with g.inserting_after(n):\n    pass\n"
    assert len(list(changes_of_graphs(ast.parse(source)))) == 6


PLAIN_WORDS = {
    "float",
    "measure",
    "identity",
    "view",
    "select",
    "split",
    "repeat",
    "flip",
    "pad",
    "roll",
    "expand",
    "clone",
}
"""Entries whose names are ordinary words or attributes too."""
FREE_OF_OPS = (
    "algorithms",
    "analysis",
    "passes",
    "reporting",
    "export",
    "onnx",
    "graph",
    "capture",
    "flow",
    "calibration",
    "checkpoint",
    "training",
    "inputs",
    "recipe",
)
NAMED_FOR_A_REASON = {
    ("checkpoint.py", "batch_norm"): "the argument of prepare, as it is saved",
    (
        "capture/patches.py",
        "torch.nn.functional.multi_head_attention_forward",
    ): "Python inside torch that is looked into",
    ("capture/memory.py", "dropout"): "torch's schema does not say that it gives its input itself in eval mode",
    ("capture/patches.py", "stack"): "not every torch takes a proxy for its list of tensors",
    ("capture/patches.py", "cat"): "as stack",
    ("capture/patches.py", "torch.nn.functional.batch_norm"): "what a norm of the user's own is checked against",
}


def named_ops(path: Path) -> Iterator[str]:
    """Entry names among a file's string literals (docstrings aside), and functions of torch.nn.functional."""
    tree = TREES[path]
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            if node.value in TABLE and node.value not in PLAIN_WORDS:
                yield node.value
        elif isinstance(node, ast.ImportFrom) and node.module == "torch.nn.functional":
            yield str(node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
            "F",
            "torch.nn.functional",
            "nn.functional",
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) in FREE_OF_OPS], ids=module_name)
def test_ops_are_named_in_ops_only(path):
    inside = str(path.relative_to(PACKAGE))
    assert not [name for name in named_ops(path) if (inside, name) not in NAMED_FOR_A_REASON]


def test_reasons_for_names_are_still_needed():
    assert all(name in named_ops(PACKAGE / file) for file, name in NAMED_FOR_A_REASON)


def test_public_names():
    names = fxquant.__all__
    assert len(names) <= 30 and names == sorted(names) and len(set(names)) == len(names)
    tree = TREES[PACKAGE / "__init__.py"]
    imported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert imported - {"annotations"} == set(names)
    assert all(getattr(fxquant, name).__module__.startswith("fxquant") for name in names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "a file has at most 400 lines"
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} has more than 60 lines"


def test_most_functions_are_very_short():
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert lengths[int(0.95 * len(lengths))] <= 40


def test_file_names_say_their_subject():
    forbidden = {"utils", "util", "helpers", "helper", "common", "base", "misc", "core", "manager", "tools"}
    assert not [
        p for p in [*FILES, *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")] if p.stem in forbidden
    ]


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    listed = next(
        (
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        ),
        [],
    )
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (node.name in listed or not node.name.startswith("_")):
            yield node


UNTOLD = re.compile(r"^(integer_\w+|carried_pass|padding_pass)$")
"""Builders of integer forms, each one line that says all."""


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_what_is_public_is_told(path):
    assert ast.get_docstring(TREES[path]), "a file opens with what it is about"
    for node in public_definitions(TREES[path]):
        assert ast.get_docstring(node) or UNTOLD.match(node.name), f"{node.name} has no docstring"


def test_checks_are_switched_off_rarely():
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    assert len(re.findall(r"type: ignore", text)) <= 20
    assert len(re.findall(r"\bnoqa\b", text)) <= 12
    assert not re.findall(r"type: ignore(?!\[)", text), "say which check is ignored"


def test_verbs_are_typed():
    """What takes a model, or gives one, says so; a call's inputs, a batch and a result may be anything."""
    for name in fxquant.__all__:
        verb = getattr(fxquant, name)
        if inspect.isfunction(verb):
            told = verb.__annotations__
            models = {told[word] for word in ("model", "module", "prepared", "float_model") if word in told}
            assert "Any" not in models | {told["return"]}, name


def test_every_error_is_ours_or_pythons_own():
    """What is raised on purpose is of our tree; ``assert`` is for what cannot happen."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                assert name not in ("Exception", "RuntimeError", "AssertionError"), (
                    f"{module_name(path)}:{node.lineno} raises {name}"
                )


NO_REFUSAL = {"_wrong", "_wrong_with", "readable", "_rounded_before_joining", "_rounding_of"}
"""What gives a text or None that is no refusal: what was found in numbers or in an object, a file, a name."""
REFUSING = (
    "algorithms",
    "flow",
    "forms",
    "kernels",
    "nn",
    "ops",
    "passes",
    "quantizers",
    "runtimes",
    "targets",
    "tuning",
)


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) in REFUSING], ids=module_name)
def test_there_is_one_way_to_refuse(path):
    """``Refusal``: no reason as a bare text, and no exception for an answer of a file's own."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef) and node.returns is not None and node.name not in NO_REFUSAL:
            assert "str" not in ast.unparse(node.returns).split(" | ")[1:], f"{node.name} gives a text where it refuses"
            assert not ast.unparse(node.returns).startswith("str |"), f"{node.name} gives a text where it refuses"
        if isinstance(node, ast.ClassDef):
            assert not {ast.unparse(base) for base in node.bases} & {"Exception", "BaseException"}, node.name


RENAMED = {
    "QDQ": r"exchange(?!d\b)",
    "PT2E, quantized_decomposed": r"\bdecomposed (model|graph|level)\b",
    "eager recorder": r"\bwitness",
    "guards": r"\bquestions?\b",
    "guard validation": r"\btrials\b",
    "MACs inside islands": r"\bown[_ ]work\b",
    "default attributes": r"\bimplied\b",
    "Q/DQ at Concat inputs": r"\bthe joins\b|round(s|ings?)? (of|at|the) joins\b",
    "interleaved": r"woven|\bin turns\b(?! (to|of))",
    "quantize and dequantize at the border": r"\bdoors?\b",
    "epilogue": r"\b(its|their|layer's) way out\b",
    "output slice": r"\bhomes?\b(?!\(\))",
    "taps": r"\b(window|kernel)s?'s? points?\b|\bpoints? (of|in) (a|the|its|their) (window|kernel)s?\b",
    "KR, NR, packing tiles": r"\bbundles?\b|\bquads?\b",
    "padding regions": r"\bzones?\b",
    "storage, layout": r"\bhow (it|they|a tensor|a tensor of integers) (is|are) held\b",
    "per channel, per row, per node": r"\b(one|scale|number|entry|line|factor|row) an? (in|out)?(put )?"
    r"(channel|row|node|head|slice|column|axis|layer|tensor)\b",
}
"""The field's words, and what stood in their place; every line of the glossary."""
OLD_STEMS = {
    "exchange",
    "witness",
    "questions",
    "trials",
    "own_work",
    "implied",
    "joins",
    "turns",
    "door",
    "home",
    "zones",
}
KEPT_PATHS = {"passes/to_exchange.py": "scripts written before the word have it"}


def texts() -> Iterator[tuple[str, str]]:
    files = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".h", ".cpp", ".js", ".css")]
    for path in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        name = str(path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT))
        if name not in KEPT_PATHS:
            yield name, path.read_text(encoding="utf-8")


@pytest.mark.parametrize("word", RENAMED)
def test_the_fields_words_are_used(word):
    found = [
        f"{name}:{i}"
        for name, text in texts()
        for i, line in enumerate(text.splitlines(), 1)
        if re.search(RENAMED[word], line, re.IGNORECASE) and "belongs to" not in line
    ]
    assert not found, f"write {word!r} in {', '.join(found[:8])}"


def test_files_and_levels_have_the_fields_names():
    from fxquant.graph.leveled import LEVELS

    stems = {p.stem for p in PACKAGE.rglob("*.py") if str(p.relative_to(PACKAGE)) not in KEPT_PATHS}
    assert not [name for name in (*stems, *LEVELS) if OLD_STEMS & {name, *name.split("_")}]
