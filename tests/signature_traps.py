"""Models that take and give more than tensors."""

from __future__ import annotations

import importlib.util
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from trap_inputs import (
    EITHER,
    Perceptron,
    Trap,
    normal,
    rows,
)


class KeywordOnly(nn.Module):
    """Inputs that are taken by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, *, hidden: Tensor, gate: Tensor, gain: float = 2.0) -> Tensor:
        return self.fc(hidden) * torch.sigmoid(gate) * gain


class OptionalMask(nn.Module):
    """An optional input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_features: bool = False) -> Any:
        if mask is not None:
            x = x * mask
        y = self.fc(x)
        return (y, x) if return_features else y


class NoneOutputs(nn.Module):
    """None among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(4, 3), None

    def forward(self, x: Tensor) -> tuple[Tensor, None, list[Tensor | None]]:
        y = self.fc(x)
        aux = self.aux(x) if self.aux is not None else None
        return y, aux, [None, y.sum(1)]


class StarArguments(nn.Module):
    """forward(*args, **kwargs)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = OptionalMask()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)


class ConcatInputs(nn.Module):
    """Any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.fc(torch.cat(xs, dim=1))


class ConfigKwargs(nn.Module):
    """**kwargs looked into, and passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> dict[str, Any]:
        scale = kwargs.pop("scale", 1.0)
        y = self.fc(hidden_states) * scale
        if "residual" in kwargs:
            y = y + kwargs["residual"]
        return {"y": y, "left": sorted(kwargs)}


class DictOfDicts(nn.Module):
    """A nested dict in, a nested dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        image = self.conv(batch["image"]).mean((2, 3))
        meta = [self.fc(t) for t in batch["meta"]["rows"]]
        return {"logits": image, "parts": {"rows": meta, "all": (image + sum(meta),)}}


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


OldPair = namedtuple("OldPair", ["first", "second"])


class NamedTuples(nn.Module):
    """A named tuple in and another kind out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, pair: Pair) -> Any:
        y = self.fc(pair.left)
        return OldPair(first=y, second=Pair(y + self.fc(pair.right), pair[1]))


@dataclass
class Sample:
    """What a loader of dataclasses gives."""

    x: Tensor
    weight: Tensor
    name: str = "sample"


@dataclass
class Prediction:
    """What such a model returns."""

    logits: Tensor
    features: list[Tensor]
    count: int = 0


class DataclassOut(nn.Module):
    """A dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Perceptron()

    def forward(self, x: Tensor) -> Prediction:
        y = self.body(x)
        return Prediction(logits=y, features=[x, y.sum(1)], count=2)


class DataclassInOut(nn.Module):
    """A dataclass in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Perceptron()

    def forward(self, sample: Sample) -> Prediction:
        y = self.body(sample.x) * sample.weight
        return Prediction(y, [y], count=len(sample.name))


class HuggingFaceOut(nn.Module):
    """A ModelOutput of transformers out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Perceptron(), nn.Linear(4, 2)

    def forward(self, x: Tensor, return_dict: bool = True) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.body(x)
        logits = self.head(hidden)
        if not return_dict:
            return logits, hidden
        return SequenceClassifierOutput(loss=None, logits=logits, hidden_states=(x, hidden))


class ConstantsBeside(nn.Module):
    """Constants, the input itself and one tensor twice among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.fc(x)
        return {"y": y, "again": y, "input": x, "stride": 4, "name": "fc", "sizes": (x.shape[1], 0.5), "flag": True}


def _batch(n: int) -> tuple[Any, ...]:
    meta = {"rows": [normal(n, 4, seed=2), normal(n, 4, seed=3)]}
    return ({"image": normal(n, 3, 6, 6), "meta": meta, "name": "batch"},)


TRAPS: dict[str, Trap] = {
    "keyword only": Trap(KeywordOnly, lambda n: {"hidden": normal(n, 4), "gate": normal(n, 4, seed=2)}),
    "optional left out": Trap(OptionalMask, rows),
    "optional given": Trap(OptionalMask, lambda n: (normal(n, 4), normal(n, 4, seed=2).sign())),
    "optional by keyword": Trap(OptionalMask, lambda n: {"x": normal(n, 4), "return_features": True}),
    "none outputs": Trap(NoneOutputs, rows),
    "star arguments": Trap(StarArguments, lambda n: (normal(n, 4), normal(n, 4, seed=2)), EITHER),
    "star keywords": Trap(StarArguments, lambda n: {"x": normal(n, 4), "mask": normal(n, 4, seed=2)}, EITHER),
    "concat inputs": Trap(ConcatInputs, lambda n: (normal(n, 4), normal(n, 3, seed=2), normal(n, 1, seed=3)), EITHER),
    "config kwargs": Trap(
        ConfigKwargs, lambda n: {"hidden_states": normal(n, 4), "residual": normal(n, 4, seed=2), "scale": 0.5}, EITHER
    ),
    "dict of dicts": Trap(DictOfDicts, _batch),
    "named tuples": Trap(NamedTuples, lambda n: (Pair(normal(n, 4), normal(n, 4, seed=2)),)),
    "dataclass out": Trap(DataclassOut, rows, EITHER),
    "dataclass in and out": Trap(DataclassInOut, lambda n: (Sample(normal(n, 4), normal(n, 1)),), EITHER),
    "constants beside": Trap(ConstantsBeside, rows),
}
if importlib.util.find_spec("transformers") is not None:
    TRAPS["model output"] = Trap(HuggingFaceOut, rows, EITHER)
