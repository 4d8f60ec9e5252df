"""How models are put together."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from trap_inputs import (
    EITHER,
    ConvNet,
    Perceptron,
    Trap,
    images,
    maps,
    normal,
    rows,
)


class PlainTensor(nn.Module):
    """A tensor that is an attribute and no buffer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.mean = nn.Linear(4, 4), torch.tensor([0.1, 0.2, 0.3, 0.4])
        self.register_buffer("std", torch.full((4,), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x - self.mean.to(x.device)) / self.std)


def checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0], Tensor):
            raise TypeError(f"{type(self).__name__} takes a tensor")
        return forward(self, *args, **kwargs)

    return wrapper


class DecoratedForward(nn.Module):
    """A forward behind functools.wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    @checked
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.fc(x) * scale


class Inherited(ConvNet):
    """super().forward(), and a method of the parent that is overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(5, 2)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))


class PropertyWeight(nn.Module):
    """A weight that a property computes."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.fc = nn.Parameter(normal(4, 3, 3, 3)), nn.Linear(4, 3)

    @property
    def weight(self) -> Tensor:
        return self.raw / self.raw.flatten(1).norm(dim=1)[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(F.conv2d(x, self.weight)).mean((2, 3)))


class Delegating(nn.Module):
    """A wrapper that looks its attributes up in the model within."""

    def __init__(self) -> None:
        super().__init__()
        self.module = ConvNet()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).amax((2, 3)))


class OptionalParts(nn.Module):
    """nn.Identity, and layers that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.Identity(), nn.Linear(4, 4)
        self.proj, self.shortcut = None, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.shortcut(x) if self.shortcut is not None else x
        y = self.norm(self.fc(x))
        return skip + (self.proj(y) if self.proj is not None else y)


def _script(function: Callable[..., Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, and models still have it
        return torch.jit.script(function)


@_script
def scripted_swish(x: Tensor, beta: float = 1.5) -> Tensor:
    return x * torch.sigmoid(beta * x)


class Activations(nn.Module):
    """Activations as a partial, a lambda, a function of torch and a name looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.acts = [functools.partial(F.leaky_relu, negative_slope=0.2), lambda x: x * torch.sigmoid(x), torch.tanh]

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, [*self.acts, getattr(F, "gelu")], strict=True):  # noqa: B009
            x = act(layer(x))
        return x


class ScriptedActivation(nn.Module):
    """A scripted function as the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(scripted_swish(self.a(x)))


class Appending(nn.Module):
    """Appends its output to the caller's list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, feats: list[Tensor]) -> Tensor:
        x = F.relu(self.conv(x))
        feats.append(x)
        return x


class SharedList(nn.Module):
    """A list handed to children, which append to it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Appending() for _ in range(2)), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        feats: list[Tensor] = []
        for block in self.blocks:
            x = block(x, feats)
        return self.head(torch.cat(feats, dim=1))


class Holder(nn.Module):
    """Holds a module that is another's too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = shared, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.shared(x))


class SharedByTwo(nn.Module):
    """One module under two parents."""

    def __init__(self) -> None:
        super().__init__()
        shared = Perceptron()
        self.left, self.right = Holder(shared), Holder(shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - self.right(x)


class OtherMethod(nn.Module):
    """A child called by a method other than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = ConvNet(), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block.features(x))


class Iterating(nn.Module):
    """A generator, zip, enumerate and reversed over layers and features."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    def pyramid(self, x: Tensor) -> Iterator[Tensor]:
        for i, layer in enumerate(self.down):
            x = F.relu(layer(F.max_pool2d(x, 2) if i else x))
            yield x

    def forward(self, x: Tensor) -> Tensor:
        feats = list(self.pyramid(x))
        y = None
        for lateral, feat in zip(reversed(self.up), reversed(feats), strict=True):
            top = lateral(feat)
            y = top if y is None else top + F.interpolate(y, size=top.shape[-2:], mode="nearest")
        return y


class FeaturePyramid(nn.Module):
    """A dict of features by name, as in a feature pyramid network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(OrderedDict(c1=nn.Conv2d(3, 4, 3, padding=1), c2=nn.Conv2d(4, 4, 3, 2, 1)))
        self.lateral = nn.ModuleDict({"c1": nn.Conv2d(4, 4, 1), "c2": nn.Conv2d(4, 4, 1)})
        self.returned = {"c1": "0", "c2": "1"}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feats: dict[str, Tensor] = OrderedDict()
        for name, layer in self.body.items():
            x = F.relu(layer(x))
            if name in self.returned:
                feats[self.returned[name]] = x
        names = list(self.returned.keys())
        outs = {new: self.lateral[old](feats[new]) for old, new in zip(names, feats, strict=True)}
        outs["pool"] = F.max_pool2d(list(outs.values())[-1], 1, 2, 0)
        return outs


class ScriptingBranches(nn.Module):
    """Branches on torch.jit.is_scripting(), is_tracing() and torch.compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self.fc(x)
        if not torch.jit.is_scripting() and isinstance(x, Tensor) and x.requires_grad and not x.is_floating_point():
            raise RuntimeError("no gradient for integers")
        return self.fc(x) * 2


class ImageToTokens(nn.Module):
    """Views in the order of memory of a channels_last input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return self.fc(y.permute(0, 2, 3, 1).reshape(x.size(0), -1, 4))


def _in_channels_last(n: int) -> tuple[Any, ...]:
    return (images(n)[0].to(memory_format=torch.channels_last),)


def _as_graph_module() -> nn.Module:
    return fx.symbolic_trace(ConvNet())


def _compiled() -> nn.Module:
    return torch.compile(ConvNet())


TRAPS: dict[str, Trap] = {
    "plain tensor": Trap(PlainTensor, rows),
    "decorated forward": Trap(DecoratedForward, rows),
    "inherited": Trap(Inherited, images),
    "property weight": Trap(PropertyWeight, images),
    "delegating": Trap(Delegating, images),
    "optional parts": Trap(OptionalParts, rows),
    "activations": Trap(Activations, rows),
    "scripted activation": Trap(ScriptedActivation, rows, EITHER),
    "shared list": Trap(SharedList, maps),
    "shared by two": Trap(SharedByTwo, rows),
    "other method": Trap(OtherMethod, images),
    "iterating": Trap(Iterating, maps),
    "feature pyramid": Trap(FeaturePyramid, images),
    "scripting branches": Trap(ScriptingBranches, rows, EITHER),
    "channels last": Trap(lambda: ImageToTokens().to(memory_format=torch.channels_last), _in_channels_last),
    "bfloat16": Trap(lambda: Perceptron().bfloat16(), lambda n: (normal(n, 4).bfloat16(),)),
    "float16": Trap(lambda: ImageToTokens().half(), lambda n: (images(n)[0].half(),)),
    "graph module": Trap(_as_graph_module, images),
    "data parallel": Trap(lambda: nn.DataParallel(ConvNet()), images, inner=lambda m: m.module),
    "compiled": Trap(_compiled, images, inner=lambda m: m._orig_mod),
}
