"""Saving a prepared or converted model, and rebuilding it from the user's own float model.

A file holds plain data and tensors only (``torch.load(weights_only=True)`` reads it): the settings that the graph was
made with, and its state dict. Loading runs the same passes on a fresh float model and puts the numbers in.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.islands import graphs_of
from fxquant.errors import CheckpointError, InputError, RecipeError, SchemeError
from fxquant.export.runtimes import Compiled, compile_again
from fxquant.flow import convert, freeze, prepare
from fxquant.inputs import make_inputs
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.modules import QuantWeightedOp
from fxquant.numerics.packing import packed, unpacked
from fxquant.numerics.scheme import Scheme
from fxquant.passes.facts import Folded
from fxquant.quantizers.registry import without_rule
from fxquant.recipe import PLACES, Op, Place, Recipe, Setting
from fxquant.targets import TARGETS, X86, Target

__all__ = ["load", "save"]

FORMAT = 3
"""1: a quantizer that several modules hold stood in the state under each of its names; some switches were not saved.
2: every integer took a byte (see ``numerics.packing``)."""

_SINCE_2 = ("origin", "known", "follows", "is_pinned", "holds_statistics")
"""Buffers that a file of format 1 lacks."""

_UNLIMITED = "vnni"
"""The processor that files from before there was a choice were made for."""


def save(module: nn.Module | Compiled, path: str | os.PathLike[str]) -> None:
    """Write a prepared, frozen, integer or compiled model to ``path``; integers take the bits that they need.

    Of what ``compile`` returned this is the integer model that it was made of, with the runtime's name, the threads and the
    shapes of the example: ``load`` compiles it again, for the machine that it is called on.

    Example:
        >>> fxquant.save(int8, "int8.pt")

    Raises:
        InputError: ``module`` did not come from fxquant; or it is compiled, and the integer model that it was made of has
            been let go, or changed since.
        CheckpointError: it holds quantizers of a class that is not fxquant's.
    """
    if isinstance(module, Compiled):
        origin = module.known_origin
        again = {"runtime": origin.request, "threads": origin.threads, "inputs": origin.inputs}
        torch.save({**_content(origin.model), "compiled": again}, path)
    else:
        torch.save(_content(module), path)


def _content(module: nn.Module) -> dict[str, Any]:
    graph = next(iter(graphs_of(module).values()), None) if isinstance(module, nn.Module) else None
    if graph is None or "recipe" not in graph.settings:
        raise InputError(
            f"save takes what prepare, freeze, convert or compile returned, not a {type(module).__name__}."
        )
    settings = graph.settings
    own = without_rule(module)
    if own:
        raise CheckpointError(
            f"{len(own)} quantizers of your own cannot be rebuilt from a file: {', '.join(own[:4])}.\n"
            "  what to do: enter the class with fxquant.quantizers.register and name it in the recipe's schemes; or save "
            "what fxquant.freeze or convert returns; or save the state dict, and put the quantizers into a model prepared "
            "anew before it is loaded."
        )
    return {
        "fxquant": FORMAT,
        "model": module.__class__.__name__,
        "level": graph.level,
        "qat": settings["qat"],
        "batch_norm": settings["batch_norm"],
        "rounding": settings.get("rounding", "single"),
        "kernels": settings.get("kernels", "auto"),
        "recipe": _recipe_to_plain(settings["recipe"]),
        "target": _target_to_plain(settings.get("target", X86)),
        "processor": settings.get("target", X86).processor,
        "inputs": settings["inputs"],
        "leaves": list(settings["leaves"]),
        "constants": {key: node.meta["grid"] for key, node in _constants(module).items()},
        "state": {name: packed(value) for name, value in module.state_dict().items()},
    }


def unreadable(error: Exception) -> str:
    """Why ``torch.load`` could not read a file, in a few words: its own are a page long."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if not isinstance(error, RuntimeError):  # the reader stumbles over other files in many ways, as with KeyError: 105
        return "torch.save did not write it, or it holds objects of classes and not tensors alone"
    return str(error).splitlines()[0].partition(". ")[0].rstrip(".")


def read(path: str | os.PathLike[str]) -> Any:
    """What a file holds, its integers unpacked.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {os.fspath(path)!r}.") from error
    except Exception as error:
        raise CheckpointError(f"{os.fspath(path)!r} cannot be read: {unreadable(error)}.") from error
    if isinstance(content, dict) and "fxquant" in content and isinstance(content.get("state"), dict):
        content["state"] = {name: unpacked(value) for name, value in content["state"].items()}
    return content


def load(model: nn.Module, path: str | os.PathLike[str], *, recompile: bool = True) -> nn.Module | Compiled:
    """Rebuild a saved model from a float model of the same class; its weights may be anything.

    Example:
        >>> fxquant.save(int8, "int8.pt")
        >>> int8 = fxquant.load(model, "int8.pt")

    Args:
        model: the user's float model, as it was given to ``prepare``; not touched.
        path: what ``save`` wrote.
        recompile: whether a model that was saved compiled is compiled again, in the same runtime; else it is the integer
            model, which every machine runs. Of no meaning for others.

    Returns:
        The model at the level that it was saved at; a ``Compiled`` where that was saved. That keeps no integer model, so
        that ``save`` takes what ``recompile=False`` gives, and not this.

    Raises:
        CheckpointError: the file is not one of ours, or does not fit the model; says which entries differ.
        MissingPackageError, ExportError: the runtime of a compiled model is not here, or does not take it here.
    """
    content = read(path)
    module = _loaded(model, content, path)
    saved = content.get("compiled")
    if saved is None or not recompile:
        return module
    return compile_again(module, saved["runtime"], saved["threads"], saved["inputs"])


def load_model(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """What ``load`` gives with ``recompile=False``: the model itself, whether it was saved compiled or not."""
    return _loaded(model, read(path), path)


def _loaded(model: nn.Module, content: Any, path: str | os.PathLike[str]) -> nn.Module:
    if not isinstance(content, dict) or content.get("fxquant") not in (1, 2, FORMAT):
        raise CheckpointError(f"{os.fspath(path)!r} was not written by this version of fxquant.save (format {FORMAT}).")
    unfit = f"{os.fspath(path)!r} holds a {content['model']} that does not fit this {type(model).__name__}: "
    remedy = "Build the model as it was built when it was saved."
    try:
        module = _rebuild(model, content)
        _make_room(module, content["state"])
    except (InputError, RecipeError, SchemeError) as error:
        raise CheckpointError(f"{unfit}{error}\n  {remedy}") from error
    content["state"] = _one_name_each(content["state"], module)
    if content["fxquant"] == 1:
        content["state"] = _from_format_1(content["state"], module)
    differences = _differences(content["state"], module.state_dict())
    if differences:
        raise CheckpointError(f"{unfit}{differences}. {remedy}")
    module.load_state_dict(content["state"])
    _forget_statistics(module)
    constants = _constants(module)
    for key, numbers in content.get("constants", {}).items():
        constants[key].meta["grid"] = tuple(numbers)
    return module


def _constants(module: nn.Module) -> dict[str, fx.Node]:
    """The nodes that read constants made of integers, whose scale and zero point stand on the node."""
    return {
        f"{path}:{node.name}": node
        for path, graph in graphs_of(module).items()
        for node in graph.graph.nodes
        if node.meta.get("integer_constant")
    }


def _forget_statistics(module: nn.Module) -> None:
    """Forget what the float model's batch norms said: its weights may have been any."""
    for graph in graphs_of(module).values():
        for node in graph.graph.nodes:
            del Folded(node).statistics


def _make_room(module: nn.Module, state: dict[str, Any]) -> None:
    """Give weight quantizers the buffers of roundings that were pinned, where ``state`` has them."""
    for path, part in module.named_modules():
        if isinstance(part, FakeQuantize):
            part.upgrade_state(state, f"{path}.")
        if isinstance(part, WeightQuantize):
            part.make_room(state, f"{path}.")


def _pin_calls(prepared: nn.Module, state: dict[str, Any]) -> None:
    """Pin the weights of functional calls that were pinned when ``state`` was frozen: they are constants of its calls."""
    for path, graph in graphs_of(prepared).items():
        for node in graph.graph.nodes:
            part: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(part, QuantWeightedOp):
                continue
            key = f"{path}." * bool(path) + str(node.target).replace(".", "_")
            if f"{key}_weight" in state:
                weight, bias = state[f"{key}_weight"], state.get(f"{key}_pinned_bias")
                part.weight_quantizer.pin(torch.zeros_like(weight), torch.ones_like(part.weight_quantizer.scale), bias)


def _one_name_each(saved: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A state without the other names of what the rebuilt ``module`` shares, and older versions did not."""
    own, every = module.state_dict(), (nn.Module.named_parameters, nn.Module.named_buffers)
    names = {name for named in every for name, _ in named(module, remove_duplicate=False)}
    return {key: value for key, value in saved.items() if key in own or key not in names}


def _from_format_1(saved: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """An old file's state with what the rebuilt ``module`` has for what it lacks."""
    own, state = module.state_dict(), dict(saved)
    for key, value in own.items():
        before, _, name = key.rpartition(".")
        if name in _SINCE_2 and key not in state:
            scale, zero_point = saved.get(f"{before}.scale"), saved.get(f"{before}.zero_point")
            known = {"known": lambda s=scale: (s > 0).all().float(), "origin": lambda z=zero_point: z.float()}
            state[key] = known[name]() if name in known and scale is not None else value
    return state


def _differences(saved: dict[str, Any], own: dict[str, Any]) -> str:
    """Which entries of a file a model lacks, has in excess, or has in another shape; empty where it fits."""
    shapes = {key: (tuple(saved[key].shape), tuple(own[key].shape)) for key in own if key in saved}
    kinds = {
        "missing": [key for key in own if key not in saved],
        "unexpected": [key for key in saved if key not in own],
        "of another shape": [f"{key} {ours} for {given}" for key, (given, ours) in shapes.items() if given != ours],
    }
    shown = {kind: ", ".join(keys[:4]) + "…" * (len(keys) > 4) for kind, keys in kinds.items()}
    return ", ".join(f"{len(keys)} entries {kind} ({shown[kind]})" for kind, keys in kinds.items() if keys)


def _rebuild(model: nn.Module, content: dict[str, Any]) -> nn.Module:
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    recipe = _recipe_from_plain(content["recipe"], model)
    inputs = make_inputs(content["inputs"], device)
    leaves, mode = content.get("leaves", ()), content["batch_norm"]
    target = _target_from_plain(content.get("target", X86.name))
    where = {"target": target, "processor": content.get("processor", _UNLIMITED)}
    prepared = prepare(model, inputs, qat=content["qat"], batch_norm=mode, recipe=recipe, leaves=leaves, **where)
    if content["level"] == "prepared":
        return prepared
    with torch.no_grad():  # the float model's weights may be anything, NaN too, and none of them stays
        for value in (*prepared.parameters(), *prepared.buffers()):
            value.nan_to_num_(0.0, 0.0, 0.0) if value.is_floating_point() else None
    for part in prepared.modules():
        if isinstance(part, FakeQuantize) and not part.ready:
            part.set_range(torch.full_like(part.scale, -1.0), torch.full_like(part.scale, 1.0))
    _pin_calls(prepared, content["state"])
    if content["level"] == "frozen":
        return freeze(prepared)
    return convert(prepared, rounding=content["rounding"], kernels=content.get("kernels", "auto"))


def _recipe_to_plain(recipe: Recipe) -> dict[str, Any]:
    return {
        "settings": [[_selector_to_plain(selector), _setting_to_plain(setting)] for selector, setting in recipe.pairs],
        "default": _setting_to_plain(recipe.default),
        "quantize_outputs": recipe.quantize_outputs,
        "float_dtype": recipe.float_dtype,
        "title": recipe.title,
    }


def _setting_to_plain(setting: Setting | None) -> dict[str, Any] | None:
    return None if setting is None else asdict(setting)


def _target_to_plain(target: Target) -> str | dict[str, Any]:
    """A target by its name where it is one of ours; else all it says."""
    known = TARGETS.get(target.name)
    if known is not None:
        known = replace(known, processor=target.processor)
        if target in (known, known.with_estimator(target.activation.estimator)):
            return target.name
    plain = asdict(target)
    return {key: sorted(value) if isinstance(value, frozenset) else value for key, value in plain.items()}


def _target_from_plain(plain: str | dict[str, Any]) -> Target | str:
    if isinstance(plain, str):
        return plain
    sets = {"integer_ops", "per_channel", *(key for key, value in vars(X86).items() if isinstance(value, frozenset))}
    made: dict[str, Any] = dict(plain)
    made.update({key: frozenset(plain[key]) for key in sets & set(plain) if plain[key] is not None})
    return Target(**{**made, "activation": Scheme(**plain["activation"]), "weight": Scheme(**plain["weight"])})


def _selector_to_plain(selector: Any) -> dict[str, str]:
    if isinstance(selector, str):
        return {"path": selector}
    if isinstance(selector, Place):
        return {"place": selector.name}
    if isinstance(selector, Op):
        return {"op": selector.name}
    return {"type": f"{selector.__module__}.{selector.__qualname__}"}


def _recipe_from_plain(plain: dict[str, Any], model: nn.Module) -> Recipe:
    classes = {f"{c.__module__}.{c.__qualname__}": c for part in model.modules() for c in type(part).__mro__}

    def selector(value: dict[str, str]) -> Any:
        if "path" in value:
            return value["path"]
        if "place" in value:
            return PLACES[value["place"]]
        if "op" in value:
            return Op(value["op"])
        if value["type"] not in classes:
            raise CheckpointError(
                f"the saved recipe selects {value['type']}, which this {type(model).__name__} does not contain."
            )
        return classes[value["type"]]

    def setting(value: dict[str, Any] | None) -> Setting | None:
        if value is None:
            return None
        return Setting(**{name: scheme and Scheme(**scheme) for name, scheme in value.items()})

    pairs = [(selector(s), setting(v)) for s, v in plain["settings"]]
    return Recipe(
        pairs,
        default=setting(plain["default"]),
        quantize_outputs=plain["quantize_outputs"],
        float_dtype=plain.get("float_dtype", "float32"),
        title=plain.get("title", ""),
    )
