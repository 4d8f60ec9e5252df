"""How a model was prepared, as code to copy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from fxquant.capture.islands import graphs_of
from fxquant.numerics.scheme import Scheme
from fxquant.recipe import Op, Recipe, Setting
from fxquant.reporting.rows import target_of
from fxquant.targets import TARGETS

__all__ = ["code_of", "recipe_code"]


def code_of(prepared: nn.Module) -> str:
    """The call of ``prepare`` that makes such a model of the float one, in the lines of a script."""
    settings = next(iter(graphs_of(prepared).values())).settings
    target = target_of(prepared)
    recipe, imports = recipe_code(settings["recipe"])
    named = TARGETS.get(target.name)
    given = [f"recipe={recipe}", f"target={target.name!r}"]
    if named is not None and named.processor != target.processor:
        given.append(f"processor={target.processor!r}")
    if settings.get("qat"):
        given += ["qat=True", f"batch_norm={settings.get('batch_norm', 'late')!r}"]
    if settings.get("leaves"):
        given.append(f"leaves={list(settings['leaves'])!r}")
    lines = ["import fxquant", *sorted(imports), "", "prepared = fxquant.prepare(", "    model,", "    example_inputs,"]
    lines += [f"    {argument}," for argument in given]
    own = [] if named is not None else [f"# {target.name!r} is a Target of your own: give the object itself"]
    return "\n".join([*own, *lines, ")", "fxquant.calibrate(prepared, loader)", "int8 = fxquant.convert(prepared)"])


def recipe_code(recipe: Recipe) -> tuple[str, set[str]]:
    """An expression that gives ``recipe``, and the lines that import what it names."""
    imports: set[str] = set()
    pairs = ", ".join(f"({_selector(selector, imports)}, {_setting(value)})" for selector, value in recipe.pairs)
    given = [f"[{pairs}]"] if pairs else []
    if recipe.default != Setting():
        given.append(f"default={_setting(recipe.default)}")
    if recipe.quantize_outputs:
        given.append("quantize_outputs=True")
    if recipe.float_dtype != "float32":
        given.append(f"float_dtype={recipe.float_dtype!r}")
    if recipe.title:
        given.append(f"title={recipe.title!r}")
    return f"fxquant.Recipe({', '.join(given)})", imports


def _selector(selector: Any, imports: set[str]) -> str:
    if isinstance(selector, Op):
        return f"fxquant.Op({selector.name!r})"
    if isinstance(selector, type):
        module = "torch.nn" if getattr(nn, selector.__name__, None) is selector else selector.__module__
        imports.add(f"from {module} import {selector.__name__}")
        return selector.__name__
    return repr(selector)


def _setting(setting: Setting | None) -> str:
    if setting is None:
        return "None"
    given = [
        f"{name}={_scheme(value)}"
        for name in ("weight", "activation", "input")
        if (value := getattr(setting, name)) is not None
    ]
    return f"fxquant.Setting({', '.join(given)})"


def _scheme(scheme: Scheme) -> str:
    """The shortest of the three ways to write a scheme."""
    written = []
    makers: dict[str, Any] = {".weight": Scheme.weight, ".activation": Scheme.activation, "": Scheme}
    for name, make in makers.items():
        usual = make(bits=scheme.bits)
        if name == ".weight" and not scheme.signed:
            usual = Scheme.weight(scheme.bits, signed=False)
        others = [
            f"{field.name}={getattr(scheme, field.name)!r}"
            for field in fields(scheme)
            if field.name != "bits" and getattr(scheme, field.name) != getattr(usual, field.name)
        ]
        if name == ".weight" and not scheme.signed:
            others.append("signed=False")
        bits = f"bits={scheme.bits}" if not name else str(scheme.bits)
        written.append(f"fxquant.Scheme{name}({', '.join([bits, *others])})")
    return min(written, key=len)
