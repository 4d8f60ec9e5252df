"""The model that is captured: what can be, and the copy that is made of it."""

from __future__ import annotations

import copy
import functools
import inspect
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from fxquant.errors import InputError
from fxquant.graph.leveled import LeveledModule

__all__ = [
    "COMPOSED",
    "check_model",
    "deep_copy",
    "is_layer",
    "own_copy",
    "same_random_numbers",
    "unwrapped",
]

COMPOSED = (nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer,
            nn.TransformerDecoder, nn.TransformerDecoderLayer)  # fmt: skip
"""Layers of torch that are written in Python, of other layers: these are looked into."""

_WEIGHT_HOOKS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (WeightNorm, "name", remove_weight_norm),
    (SpectralNorm, "name", remove_spectral_norm),
    (prune.BasePruningMethod, "_tensor_name", prune.remove),
)
"""Hooks of torch that compute a weight before each call: the attribute that names the weight, and what settles it."""


def own_copy(model: nn.Module, *, for_training: bool) -> nn.Module:
    """A copy to capture: wrappers inside taken off; for inference in eval mode, with computed weights settled.

    Modules of the copy whose class was generated for the one module (parametrizations) get a class of their own: what
    happens to it cannot reach the user's model.
    """
    owned = deep_copy(model)
    for path, part in list(owned.named_modules()):
        if path and unwrapped(part) is not part:
            owned.set_submodule(path, unwrapped(part))
        if parametrize.is_parametrized(part):
            shared = type(part)
            part.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    if not for_training:
        _settle_parametrizations(owned.eval())
        _settle_weight_hooks(owned)
    if is_layer(model):
        owned = _as_part(owned, type(model).__name__.lower())
    return owned


def _as_part(layer: nn.Module, name: str) -> nn.Module:
    """A layer of torch as the only part of a model that is called as it is."""
    needed = [p for p in inspect.signature(layer.forward).parameters.values() if p.kind in (0, 1)]
    if len(needed) == 1:
        return nn.Sequential(OrderedDict([(name, layer)])).train(layer.training)
    return WholeLayer(OrderedDict([(name, layer)])).train(layer.training)


class WholeLayer(nn.Sequential):
    """One layer that takes several inputs, as a model with the layer's own signature."""

    def __init__(self, parts: OrderedDict[str, nn.Module]) -> None:
        super().__init__(parts)
        (layer,) = self
        self.__dict__["forward"] = functools.update_wrapper(functools.partial(_call, layer), layer.forward)


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


def is_layer(model: nn.Module) -> bool:
    """Whether a whole model is one layer of torch, and not made of others."""
    model = unwrapped(model)
    return type(model).__module__.startswith("torch.nn") and not isinstance(model, (nn.Sequential, *COMPOSED))


def deep_copy(model: nn.Module) -> Any:
    """``copy.deepcopy``, of a model on which earlier runs have left results too."""
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in _results_kept(model)})


def unwrapped(model: Any) -> Any:
    """The model inside ``DataParallel``, DDP and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod") and isinstance(model, nn.Module):
            model = model._orig_mod
        else:
            return model


def check_model(model: Any) -> nn.Module:
    """``model``, if it is an eager float module.

    Raises:
        InputError: it is something else; says what to give instead.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InputError(
            f"prepare was given the class {model.__name__}, not a model: call it first, {model.__name__}(...)."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{type(model).__name__} is a TorchScript module: its Python is gone and cannot be rewritten. "
            "Give fxquant the nn.Module it was scripted from."
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"prepare takes an nn.Module, not {type(model).__name__}.")
    for path, module in model.named_modules():
        if isinstance(module, LeveledModule):
            raise InputError(f"this model is already {module.level}: prepare takes the float model it was made from.")
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{path} is a TorchScript module: its Python is gone and cannot be rewritten. "
                "Put the nn.Module it was scripted from in its place."
            )
        if not type(module).__name__.endswith("FloatFunctional") and type(module).__module__.startswith(
            ("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic", "torch.nn.quantized", "torch.nn.qat")
        ):
            raise InputError(
                f"{path or 'the model'} is already quantized by torch.ao ({type(module).__name__}): give the float model."
            )
    return model


def _results_kept(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors with a history that earlier runs have left on the modules: torch does not copy those."""
    for part in model.modules():
        for value in part.__dict__.values():
            held = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
            yield from (t for t in held if isinstance(t, torch.Tensor) and t.grad_fn is not None)


def _settle_parametrizations(model: nn.Module) -> None:
    """For inference a parametrized weight is a constant: let it be one."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _settle_weight_hooks(model: nn.Module) -> None:
    """The same for weights that hooks of ``torch.nn.utils`` compute before each call."""
    for module in list(model.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            for kind, name, settle in _WEIGHT_HOOKS:
                if isinstance(hook, kind):
                    settle(module, getattr(hook, name))
                    _forget_loading(module, hook)


def _forget_loading(module: nn.Module, hook: Any) -> None:
    """Take off what ``hook`` has put before ``load_state_dict``: torch leaves it, and it would look for what is gone."""
    for key, given in list(module._load_state_dict_pre_hooks.items()):
        if getattr(getattr(given, "hook", given), "fn", None) is hook:
            del module._load_state_dict_pre_hooks[key]


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards the generators stand where they stood."""
    state, python = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
