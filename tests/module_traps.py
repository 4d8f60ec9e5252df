"""Models with parameters and containers of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from trap_inputs import (
    EITHER,
    Trap,
    ids,
    images,
    normal,
    rows,
    tokens,
)


class RawParameters(nn.Module):
    """F.conv2d, F.linear and torch.matmul with raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(normal(4, 3, 3, 3) * 0.2), nn.Parameter(normal(4))
        self.matrix, self.mix = nn.Parameter(normal(5, 4)), nn.Parameter(normal(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.kernel, self.bias, padding=1)).mean((2, 3))
        return torch.matmul(F.linear(y, self.matrix).tanh(), self.mix)


class TransposedLinear(nn.Module):
    """GPT-2's linear layer: a weight of (in, out), torch.addmm, and views around it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(8, 10) * 0.4), nn.Parameter(normal(10))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return F.gelu(flat.view(*x.size()[:-1], 10))


class Einsum(nn.Module):
    """torch.einsum with a parameter, and an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc = nn.Parameter(normal(8, 2, 3)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("bnc,chd->bhnd", x, self.weight)
        scores = torch.einsum("...id,...jd->...ij", heads, heads).softmax(-1)
        return self.fc(scores @ heads)


class Normed(nn.Module):
    """A weight that a parametrization computes."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv, self.fc = norm(nn.Conv2d(3, 4, 3)), norm(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.leaky_relu(self.conv(x), 0.2).mean((2, 3)))


class TiedHead(nn.Module):
    """The head is the embedding, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)).tanh())


class TwoResolutions(nn.Module):
    """One conv at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = F.relu(self.stem(x))
        coarse = F.max_pool2d(fine, 2)
        return [self.head(t) for t in (fine, coarse)]


class Containers(nn.Module):
    """ModuleList, ModuleDict, ParameterList and ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "gelu": nn.GELU()})
        self.gains = nn.ParameterList([nn.Parameter(normal(4, seed=i)) for i in range(3)])
        self.shifts = nn.ParameterDict({"in": nn.Parameter(normal(4)), "out": nn.Parameter(normal(4, seed=3))})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shifts["in"]
        for i, layer in enumerate(self.layers):
            x = self.acts["relu" if i % 2 else "gelu"](layer(x)) * self.gains[i]
        return x + self.shifts["out"]


class SlicedLayers(nn.Module):
    """self.layers[i], self.layers[:2] and a nested Sequential by index."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), inner, nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[:2](x)
        y = self.layers[2][0](y) + self.layers[2][1][-1](y)
        return self.layers[len(self.layers) - 1](y)


TRAPS: dict[str, Trap] = {
    "raw parameters": Trap(RawParameters, images),
    "transposed linear": Trap(TransposedLinear, tokens),
    "einsum": Trap(Einsum, tokens),
    "weight norm": Trap(lambda: Normed(parametrizations.weight_norm), images, EITHER),
    "spectral norm": Trap(lambda: Normed(parametrizations.spectral_norm), images, EITHER),
    "spectral norm by hook": Trap(lambda: Normed(nn.utils.spectral_norm), images, EITHER),
    "tied head": Trap(TiedHead, ids),
    "two resolutions": Trap(TwoResolutions, images),
    "containers": Trap(Containers, rows, EITHER),
    "sliced layers": Trap(SlicedLayers, rows),
}
